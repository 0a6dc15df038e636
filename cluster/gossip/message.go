package gossip

import (
	"encoding/binary"

	"github.com/hashicorp/go-msgpack/v2/codec"
)

// memberlist's types of messages, the first byte of each (net.go of memberlist v0.7.0).
// Nodes send no others: no user messages, nothing compressed.
const (
	pingMessage = iota
	indirectPingMessage
	ackMessage
	suspectMessage
	aliveMessage
	deadMessage
	pushPullMessage
	compoundMessage
	_ // user message
	_ // compressed
	_ // encrypted
	nackMessage
	crcMessage
	errorMessage
)

// knownPacket reports whether a packet's message is one that nodes send: a single one or
// several in one compound, with or without a checksum in front. It refuses what
// memberlist would unpack without a bound: compressed data, and compounds in compounds.
func knownPacket(message []byte) bool {
	if len(message) > 5 && message[0] == crcMessage {
		message = message[5:]
	}
	if len(message) < 2 || message[0] != compoundMessage {
		return simplePacket(message)
	}
	count := int(message[1])
	sizes, rest := message[2:], len(message)-2-2*count
	if count == 0 || rest < 0 {
		return false
	}
	parts := sizes[2*count:]
	for i := range count {
		size := int(binary.BigEndian.Uint16(sizes[2*i:]))
		if size > len(parts) || !simplePacket(parts[:size]) {
			return false
		}
		parts = parts[size:]
	}
	return len(parts) == 0
}

func simplePacket(message []byte) bool {
	if len(message) == 0 {
		return false
	}
	switch message[0] {
	case pingMessage, indirectPingMessage, ackMessage, nackMessage, suspectMessage, aliveMessage, deadMessage:
		return true
	}
	return false
}

// knownStream reports whether a stream's message is one that nodes send. A list of
// members must not announce more of them than a node knows: memberlist allocates for as
// many as are announced.
func knownStream(message []byte) bool {
	if len(message) == 0 {
		return false
	}
	switch message[0] {
	case pingMessage, ackMessage, errorMessage:
		return true
	case pushPullMessage:
		var header struct{ Nodes, UserStateLen int }
		err := codec.NewDecoderBytes(message[1:], &codec.MsgpackHandle{}).Decode(&header)
		return err == nil && header.Nodes >= 0 && header.Nodes <= maxListed && header.UserStateLen == 0
	}
	return false
}
