package journal

import (
	"encoding/binary"
	"encoding/json"
	"fmt"
	"sync"
	"sync/atomic"

	"github.com/klauspost/compress/zstd"

	"github.com/dsnode/dsnode/storage/keyring"
)

// A payload, before it is sealed, is
//
//	form (1): 0 as it is, 1 zstd | length of meta (uvarint) | meta, JSON | body
//
// Everything after the form is compressed together. The digest is over the uncompressed
// bytes.
const (
	formRaw  = 0
	formZstd = 1

	// Below this size compression costs more than it saves.
	compressFrom = 4 << 10
	maxPlaintext = MaxPayload - keyring.Overhead - 1

	scopePurpose  = "job journal v1"
	digestPurpose = "job digest v1"

	// maxScopes bounds the cached scopes, one per stream.
	maxScopes = 256
)

// Sealer seals and opens the payloads of records. There is one per node; it is safe for
// concurrent use.
type Sealer struct {
	ring    *keyring.Ring
	mac     atomic.Pointer[keyring.MAC]
	encoder *zstd.Encoder
	decoder *zstd.Decoder
	scratch sync.Pool // of *scratch

	mu     sync.RWMutex // guards scopes
	scopes map[Stream]keyring.Scoped
}

// NewSealer makes a sealer; the ring may still be empty.
func NewSealer(ring *keyring.Ring) *Sealer {
	s := &Sealer{ring: ring, scopes: map[Stream]keyring.Scoped{}}
	s.scratch.New = func() any { return new(scratch) }
	var err error
	if s.encoder, err = zstd.NewWriter(nil, zstd.WithEncoderLevel(zstd.SpeedFastest), zstd.WithLowerEncoderMem(true)); err == nil {
		s.decoder, err = zstd.NewReader(nil, zstd.WithDecoderConcurrency(0), zstd.WithDecoderLowmem(true),
			zstd.WithDecoderMaxMemory(maxPlaintext))
	}
	if err != nil {
		panic("journal: zstd refuses constant options: " + err.Error())
	}
	return s
}

// SealSubmission sets Kind, Payload and Digest. All other fields but Seq and Clock must
// be set: the seal covers them. The error wraps keyring.ErrNoDataKey or ErrTooLarge.
func (s *Sealer) SealSubmission(r *Record, v *Submission) error {
	r.Kind, r.Rank = Submitted, 0
	if err := s.seal(r, v, v.Body); err != nil {
		return err
	}
	r.head = &Head{Tenant: v.Tenant, KeyHash: v.KeyHash, ExpiresAt: v.ExpiresAt}
	return nil
}

// OpenSubmission opens what SealSubmission sealed. The error of the Open methods wraps
// keyring.ErrUnknownKey, keyring.ErrNewerFormat, keyring.ErrDamaged or ErrDamaged.
func (s *Sealer) OpenSubmission(r *Record) (Submission, error) {
	var v Submission
	body, err := s.open(r, Submitted, &v)
	v.Body = body
	return v, err
}

// Head returns the head of a submission. A record that was sealed in this process, and
// copies of it in memory, have it cached; other records are opened.
func (s *Sealer) Head(r *Record) (Head, error) {
	if r.head != nil {
		return *r.head, nil
	}
	var h Head
	_, err := s.open(r, Submitted, &h)
	return h, err
}

// SealOutcome sets Kind, Rank, Payload and Digest, like SealSubmission.
func (s *Sealer) SealOutcome(r *Record, v *Outcome) error {
	if !v.Status.Final() {
		return fmt.Errorf("seal an outcome: %q is not a final status", v.Status)
	}
	r.Kind, r.Rank = Finished, v.Status.Rank()
	return s.seal(r, v, v.Body)
}

// OpenOutcome opens what SealOutcome sealed.
func (s *Sealer) OpenOutcome(r *Record) (Outcome, error) {
	var v Outcome
	body, err := s.open(r, Finished, &v)
	if err == nil && v.Status.Rank() != r.Rank {
		err = fmt.Errorf("%w: rank %d of an outcome %q", ErrDamaged, r.Rank, v.Status)
	}
	v.Body = body
	return v, err
}

// SealDelay sets Kind, Payload and Digest, like SealSubmission.
func (s *Sealer) SealDelay(r *Record, v *Delay) error {
	r.Kind, r.Rank = Retrying, 0
	return s.seal(r, v, nil)
}

// OpenDelay opens what SealDelay sealed.
func (s *Sealer) OpenDelay(r *Record) (Delay, error) {
	var v Delay
	_, err := s.open(r, Retrying, &v)
	return v, err
}

// Reseal seals the payload with the ring's current key, unless it already is. Place, Digest
// and the payload's size do not change.
func (s *Sealer) Reseal(r *Record) (changed bool, err error) {
	if len(r.Payload) == 0 {
		return false, nil
	}
	with, err := keyring.SealedWith(r.Payload)
	if err != nil {
		return false, err
	}
	current, ok := s.ring.Current()
	if !ok {
		return false, keyring.ErrNoDataKey
	}
	if with == current {
		return false, nil
	}
	scope, place := s.scope(r.Stream), r.Place()
	plain, err := scope.Open(nil, r.Payload, place)
	if err != nil {
		return false, err
	}
	payload, err := scope.Seal(nil, plain, place)
	if err != nil {
		return false, err
	}
	r.Payload = payload
	return true, nil
}

// meta is the part of a payload other than the body.
type meta interface {
	appendMeta(b []byte) ([]byte, error)
}

func (s *Sealer) seal(r *Record, v meta, body []byte) error {
	r.head = nil
	mac, err := s.digester()
	if err != nil {
		return err
	}
	w := s.scratch.Get().(*scratch) //nolint:forcetypeassert // New is the only source
	defer s.scratch.Put(w)
	if w.meta, err = v.appendMeta(w.meta[:0]); err != nil {
		return fmt.Errorf("encode %T: %w", v, err)
	}
	if len(w.meta)+len(body)+binary.MaxVarintLen64 > maxPlaintext {
		return fmt.Errorf("%w: %d bytes of payload", ErrTooLarge, len(w.meta)+len(body))
	}
	plain := append(w.plain[:0], formRaw)
	plain = binary.AppendUvarint(plain, uint64(len(w.meta)))
	plain = append(plain, w.meta...)
	plain = append(plain, body...)
	if cap(plain) <= maxScratch {
		w.plain = plain
	}
	place := r.Place()
	sum := mac.Sum(place, plain[1:])
	if len(plain) >= compressFrom {
		packed := s.encoder.EncodeAll(plain[1:], append(make([]byte, 0, len(plain)), formZstd))
		if len(packed) < len(plain)-len(plain)/16 {
			plain = packed
		}
	}
	// Allocate the exact size: the payload lives as long as the record.
	payload, err := s.scope(r.Stream).Seal(make([]byte, 0, len(plain)+keyring.Overhead), plain, place)
	if err != nil {
		return err
	}
	r.Payload = payload
	copy(r.Digest[:], sum[:])
	return nil
}

// scratch holds buffers for reuse.
type scratch struct{ meta, plain []byte }

const maxScratch = 64 << 10

func (s *Sealer) open(r *Record, want Kind, meta any) (body []byte, err error) {
	if r.Kind != want {
		return nil, fmt.Errorf("%w: kind %d where %d was expected", ErrDamaged, r.Kind, want)
	}
	place := r.Place()
	plain, err := s.scope(r.Stream).Open(nil, r.Payload, place)
	if err != nil {
		return nil, err
	}
	if plain, err = s.unpack(plain); err != nil {
		return nil, err
	}
	mac, err := s.digester()
	if err != nil {
		return nil, err
	}
	if sum := mac.Sum(place, plain); string(sum[:len(r.Digest)]) != string(r.Digest[:]) {
		return nil, fmt.Errorf("%w: digest", ErrDamaged)
	}
	return decodePlain(plain, meta)
}

// unpack removes the form and decompresses.
func (s *Sealer) unpack(plain []byte) ([]byte, error) {
	if len(plain) == 0 {
		return nil, fmt.Errorf("%w: an empty payload", ErrDamaged)
	}
	switch plain[0] {
	case formRaw:
		return plain[1:], nil
	case formZstd:
		plain, err := s.decoder.DecodeAll(plain[1:], nil)
		if err != nil {
			return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
		}
		return plain, nil
	}
	return nil, fmt.Errorf("%w: payload form %d", ErrNewerFormat, plain[0])
}

func decodePlain(plain []byte, meta any) (body []byte, err error) {
	length, n := binary.Uvarint(plain)
	if n <= 0 || length > uint64(len(plain)-n) {
		return nil, fmt.Errorf("%w: length of meta", ErrDamaged)
	}
	plain = plain[n:]
	if err := json.Unmarshal(plain[:length], meta); err != nil {
		return nil, fmt.Errorf("%w: %w", ErrDamaged, err)
	}
	if body = plain[length:]; len(body) == 0 {
		body = nil
	}
	return body, nil
}

// digester caches the MAC: its key never changes.
func (s *Sealer) digester() (*keyring.MAC, error) {
	if m := s.mac.Load(); m != nil {
		return m, nil
	}
	m, err := s.ring.MAC(digestPurpose)
	if err != nil {
		return nil, err
	}
	s.mac.Store(m)
	return m, nil
}

func (s *Sealer) scope(stream Stream) keyring.Scoped {
	s.mu.RLock()
	scoped, ok := s.scopes[stream]
	s.mu.RUnlock()
	if ok {
		return scoped
	}
	s.mu.Lock()
	defer s.mu.Unlock()
	if scoped, ok := s.scopes[stream]; ok {
		return scoped
	}
	if len(s.scopes) >= maxScopes {
		for victim := range s.scopes { // any one: a scope is made again in microseconds
			delete(s.scopes, victim)
			break
		}
	}
	scoped = s.ring.Scope(scopePurpose, []byte(stream.Origin), stream.Incarnation[:])
	s.scopes[stream] = scoped
	return scoped
}
