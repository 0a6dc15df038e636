package gossip

import (
	"crypto/aes"
	"crypto/cipher"
	"crypto/rand"
	"encoding/binary"
	"fmt"
	"math"
	"sync"
)

// The format of sealed messages is memberlist's, version 1 (security.go of memberlist
// v0.7.0), so that nodes of all versions understand each other:
//
//	packet: [244, length of the label, label] [1] [nonce: 12] [AES-GCM of the message]
//	stream: [244, length of the label, label] [10] [length: 4] [1] [nonce: 12] [AES-GCM of the message]
//
// The answer on a stream has no label. The additional data of a packet is the label, that
// of a stream is the five bytes before the version, and the label.
const (
	labelType     = 244
	streamType    = 10
	sealedVersion = 1
	nonceSize     = 12
	tagSize       = 16
	sealOverhead  = 1 + nonceSize + tagSize
	streamHeader  = 1 + 4
)

// A nonce is numberedNonce, seven random bytes that the sender's process draws at its
// start, and a count. Receivers use it to take each message once. Nonces of earlier
// versions are random: one in 256 of them looks numbered, which does no harm.
const numberedNonce = 0xd5

// refusal is why bytes from the network were refused: the metric's label.
type refusal string

const (
	accepted         refusal = ""
	refusedMalformed refusal = "malformed" // not the format above, or too long
	refusedLabel     refusal = "label"     // of another cluster or generation
	refusedKey       refusal = "key"       // not sealed with this node's key
	refusedReplay    refusal = "replay"    // received before, or too old to know
	refusedMessage   refusal = "message"   // sealed, but no message that nodes send
	refusedSite      refusal = "site"      // Options.Admit refuses it
	refusedCount     refusal = "streams"   // too many streams are open
	refusedBytes     refusal = "bytes"     // too many bytes of streams are held
	refusedTimeout   refusal = "timeout"   // the stream did not send its message in time
)

var refusals = []refusal{
	refusedMalformed, refusedLabel, refusedKey, refusedReplay, refusedMessage,
	refusedSite, refusedCount, refusedBytes, refusedTimeout,
}

// sealing seals and opens the messages of memberlist, which itself neither encrypts nor
// decrypts: memberlist v0.7.0 panics on sealed bytes with another version byte.
type sealing struct {
	label   []byte // with its header; empty without a label
	name    []byte // the label
	aeads   []cipher.AEAD
	packets sequence
	streams sequence
	replays *replays
}

// newSealing seals with the first key and opens with each of them.
func newSealing(keys [][]byte, label string, numbered func() bool) (*sealing, error) {
	s := &sealing{name: []byte(label), replays: newReplays(numbered)}
	if label != "" {
		s.label = append([]byte{labelType, byte(len(label))}, label...)
	}
	for _, key := range keys {
		block, err := aes.NewCipher(key)
		if err != nil {
			return nil, fmt.Errorf("the gossip key: %w", err)
		}
		aead, err := cipher.NewGCM(block)
		if err != nil {
			return nil, fmt.Errorf("the gossip key: %w", err)
		}
		s.aeads = append(s.aeads, aead)
	}
	return s, nil
}

// sealPacket returns the datagram for a message.
func (s *sealing) sealPacket(message []byte) []byte {
	out := make([]byte, 0, len(s.label)+sealOverhead+len(message))
	return s.seal(append(out, s.label...), &s.packets, message, s.name)
}

// sealStream returns the bytes for a message on a stream, with the label if first is true.
func (s *sealing) sealStream(message []byte, first bool) []byte {
	out := make([]byte, 0, len(s.label)+streamHeader+sealOverhead+len(message))
	if first {
		out = append(out, s.label...)
	}
	header := binary.BigEndian.AppendUint32([]byte{streamType}, uint32(sealOverhead+len(message)))
	return s.seal(append(out, header...), &s.streams, message, append(header, s.name...))
}

func (s *sealing) seal(out []byte, q *sequence, message, additional []byte) []byte {
	nonce := q.next()
	out = append(append(out, sealedVersion), nonce[:]...)
	return s.aeads[0].Seal(out, nonce[:], message, additional)
}

// openPacket returns the message of a datagram. The cheapest checks are first: anybody
// can send these bytes.
func (s *sealing) openPacket(datagram []byte) ([]byte, refusal) {
	if len(datagram) > maxPacket {
		return nil, refusedMalformed
	}
	sealed, refused := s.cutLabel(datagram)
	if refused != accepted {
		return nil, refused
	}
	message, refused := s.open(nil, sealed, s.name)
	if refused == accepted && !knownPacket(message) {
		return nil, refusedMessage
	}
	return message, refused
}

// cutLabel removes the label's header.
func (s *sealing) cutLabel(b []byte) ([]byte, refusal) {
	switch {
	case len(b) >= len(s.label) && string(b[:len(s.label)]) == string(s.label):
		return b[len(s.label):], accepted
	case len(b) >= 2 && b[0] == labelType && len(b) >= 2+int(b[1]):
		return nil, refusedLabel
	}
	return nil, refusedMalformed
}

// open returns the message, in dst if that has the capacity. An empty message is refused:
// memberlist reads its first byte without asking for the length.
func (s *sealing) open(dst, sealed, additional []byte) ([]byte, refusal) {
	if len(sealed) <= sealOverhead || sealed[0] != sealedVersion {
		return nil, refusedMalformed
	}
	nonce := [nonceSize]byte(sealed[1:])
	for _, aead := range s.aeads {
		message, err := aead.Open(dst, nonce[:], sealed[1+nonceSize:], additional)
		if err != nil {
			continue
		}
		if !s.replays.first(nonce) {
			return nil, refusedReplay
		}
		return message, accepted
	}
	return nil, refusedKey
}

// sequence makes the nonces of one kind of message, each once. After 2^32 it draws other
// random bytes.
type sequence struct {
	mu       sync.Mutex // guards what follows
	instance [7]byte
	last     uint32
}

func (q *sequence) next() (nonce [nonceSize]byte) {
	q.mu.Lock()
	defer q.mu.Unlock()
	if q.last == 0 || q.last == math.MaxUint32 {
		_, _ = rand.Read(q.instance[:]) // never fails
		q.last = 0
	}
	q.last++
	nonce[0] = numberedNonce
	copy(nonce[1:8], q.instance[:])
	binary.BigEndian.PutUint32(nonce[8:], q.last)
	return nonce
}
