package gossip

import (
	"bytes"
	"compress/lzw"
	"testing"
)

// Fuzzing the port with memberlist behind it. Bytes come from anybody, or they are a message
// that is sealed with the key: then the version is what somebody may have changed on the
// way, and memberlist's parsers get the message if it is 1. The node must go on answering.

// compressed is data in a message of memberlist's compressed type.
func compressed(data []byte) []byte {
	var buf bytes.Buffer
	w := lzw.NewWriter(&buf, lzw.LSB, 8)
	_, _ = w.Write(data)
	_ = w.Close()
	return wireMessage(9, wireCompressed{Buf: buf.Bytes()})
}

var seedVersion = []uint8{1, 5, 2, 0, 0, 0}

func seedMeta() []byte {
	meta, err := encodeMeta(Member{Site: "s", RPC: "192.0.2.2:7950"}, false)
	if err != nil {
		panic(err)
	}
	return meta
}

func memberPackets() map[string][]byte {
	addr := wireTest.Addr().AsSlice()
	ping := wirePingFor(7)
	alive := wireMessage(4, wireAlive{Incarnation: 1, Node: "b", Addr: addr, Port: 7956, Meta: seedMeta(), Vsn: seedVersion})
	return map[string][]byte{
		"ping":                   ping,
		"indirect ping":          wireMessage(1, wirePing{SeqNo: 8, Target: addr, Port: 7956, Node: "b", Nack: true, SourceAddr: addr, SourcePort: 7956, SourceNode: "test"}),
		"ack":                    wireMessage(2, wirePing{SeqNo: 1}),
		"suspect":                wireMessage(3, wirePing{Incarnation: 1, Node: "b", From: "test"}),
		"alive":                  alive,
		"alive, short address":   wireMessage(4, wireAlive{Incarnation: 2, Node: "c", Addr: []byte{1, 2, 3}, Port: 1, Meta: seedMeta(), Vsn: seedVersion}),
		"dead":                   wireMessage(5, wirePing{Incarnation: 1, Node: "b", From: "b"}),
		"compound":               wireCompound(ping, alive),
		"compound of compounds":  wireCompound(wireCompound(ping)),
		"truncated compound":     wireCompound(ping)[:6],
		"user message":           wireMessage(8),
		"compressed":             compressed(ping),
		"nack":                   wireMessage(11, wirePing{SeqNo: 1}),
		"checksum":               wireChecksum(ping),
		"checksum of nothing":    wireChecksum(nil),
		"a wrong checksum":       append([]byte{12, 0, 0, 0, 0}, ping...),
		"a type without message": {4},
		"nothing":                {},
	}
}

func memberStreams() map[string][]byte {
	addr := wireTest.Addr().AsSlice()
	member := wireMember{Name: "b", Addr: addr, Port: 7956, Meta: seedMeta(), Incarnation: 1, Vsn: seedVersion}
	return map[string][]byte{
		"ping":           wireMessage(0, wirePing{SeqNo: 7, Node: "a"}),
		"list":           wireMessage(6, wirePing{Nodes: 1, Join: true}, member),
		"too few listed": wireMessage(6, wirePing{Nodes: 3}, member),
		"a huge list":    wireMessage(6, wirePing{Nodes: 1 << 20}),
		"user state":     wireMessage(6, wirePing{UserStateLen: 20 << 20}),
		"user message":   wireMessage(8, wirePing{UserMsgLen: 20 << 20}),
		"compressed":     compressed(wireMessage(6, wirePing{Nodes: 1}, member)),
		"error":          wireMessage(13, struct{ Error string }{"no"}),
		"nothing":        {},
	}
}

// addSeeds adds messages to be sealed, with each version, and as a listener has them:
// sealed, cut, or never sealed.
func addSeeds(f *testing.F, messages map[string][]byte, seal func(version byte, nonce, message []byte) []byte) {
	for _, m := range messages {
		for version := range byte(3) {
			f.Add(m, true, version)
			f.Add(seal(version, wireNonce(), m), false, byte(0))
		}
		f.Add(seal(1, wireNonce(), m)[:10], false, byte(0))
		f.Add(append(labelHeader(), m...), false, byte(0))
		f.Add(m, false, byte(0))
	}
}

func FuzzPackets(f *testing.F) {
	addSeeds(f, memberPackets(), sealedPacket)
	w, _ := startOnWire(f, nil)
	f.Fuzz(func(t *testing.T, data []byte, sealed bool, version byte) {
		if sealed {
			data = sealedPacket(version, wireNonce(), data)
		}
		w.send(data)
		w.wantAnswer(t)
	})
}

func FuzzStreams(f *testing.F) {
	addSeeds(f, memberStreams(), sealedStream)
	w, _ := startOnWire(f, nil)
	f.Fuzz(func(t *testing.T, data []byte, sealed bool, version byte) {
		if sealed {
			data = sealedStream(version, wireNonce(), data)
		}
		w.stream(t, data)
		w.wantAnswer(t)
	})
}
