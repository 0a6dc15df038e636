package gossip

import (
	"errors"
	"fmt"
	"time"
	"unicode"
	"unicode/utf8"

	"google.golang.org/protobuf/encoding/protowire"
)

// A member's metadata is part of every alive message of memberlist, at most 512
// bytes. It is in protobuf's wire format: a reader skips unknown fields, so a later
// format keeps these field numbers and adds others.
const (
	metaFormatVersion = 1
	maxMeta           = 512
	maxText           = 255 // bytes; the longest text is a DNS name

	metaFormat    protowire.Number = 1
	metaSite      protowire.Number = 2
	metaRPC       protowire.Number = 3
	metaAPI       protowire.Number = 4
	metaAdmin     protowire.Number = 5
	metaGossip    protowire.Number = 6
	metaVersion   protowire.Number = 7
	metaPID       protowire.Number = 8
	metaFeature   protowire.Number = 9
	metaInstance  protowire.Number = 10
	metaStartedAt protowire.Number = 11 // Unix milliseconds
	metaFlags     protowire.Number = 12

	metaFlagDraining = 1
	metaFlagLeaving  = 2 // this instance is about to leave
)

var errMeta = errors.New("invalid gossip metadata")

// encodeMeta encodes a member's metadata, without its name, which memberlist sends
// itself. It returns an error if the metadata is too long or not printable.
func encodeMeta(m Member, leaving bool) ([]byte, error) {
	var to []byte
	number := func(field protowire.Number, v uint64) {
		if v != 0 {
			to = protowire.AppendTag(to, field, protowire.VarintType)
			to = protowire.AppendVarint(to, v)
		}
	}
	text := func(field protowire.Number, v string) {
		if v != "" {
			to = protowire.AppendTag(to, field, protowire.BytesType)
			to = protowire.AppendString(to, v)
		}
	}
	number(metaFormat, metaFormatVersion)
	for _, f := range m.metaTexts() {
		if err := checkText(*f.value); err != nil {
			return nil, fmt.Errorf("the %s of a member %w", f.what, err)
		}
		text(f.field, *f.value)
	}
	number(metaPID, uint64(max(m.PID, 0)))
	number(metaFeature, uint64(max(m.Feature, 0)))
	if !m.StartedAt.IsZero() {
		number(metaStartedAt, uint64(max(m.StartedAt.UnixMilli(), 0)))
	}
	var flags uint64
	if m.Draining {
		flags |= metaFlagDraining
	}
	if leaving {
		flags |= metaFlagLeaving
	}
	number(metaFlags, flags)
	if len(to) > maxMeta {
		return nil, fmt.Errorf("this node's gossip metadata has %d bytes, at most %d are allowed: shorten the advertised addresses (rpc %q, api %q, admin %q, gossip %q)",
			len(to), maxMeta, m.RPC, m.API, m.Admin, m.Gossip)
	}
	return to, nil
}

type metaText struct {
	field protowire.Number
	what  string
	value *string
}

// metaTexts maps the wire's text fields to those of the struct.
func (m *Member) metaTexts() []metaText {
	return []metaText{
		{metaSite, "site", &m.Site},
		{metaRPC, "rpc address", &m.RPC},
		{metaAPI, "api address", &m.API},
		{metaAdmin, "admin address", &m.Admin},
		{metaGossip, "gossip address", &m.Gossip},
		{metaVersion, "version", &m.Version},
		{metaInstance, "instance", &m.Instance},
	}
}

// decodeMeta parses a member's metadata, of this format or a later one, whose unknown
// fields it skips. The result does not refer to buf.
func decodeMeta(name string, buf []byte) (m Member, leaving bool, err error) {
	m.Name = name
	texts := m.metaTexts()
	fail := func(format string, args ...any) (Member, bool, error) {
		return Member{}, false, fmt.Errorf("%w: "+format, append([]any{errMeta}, args...)...)
	}
	if len(buf) > maxMeta {
		return fail("%d bytes, at most %d are allowed", len(buf), maxMeta)
	}
	var format uint64
	for len(buf) > 0 {
		field, kind, n := protowire.ConsumeTag(buf)
		if n < 0 {
			return fail("%w", protowire.ParseError(n))
		}
		buf = buf[n:]
		switch kind {
		case protowire.VarintType:
			v, n := protowire.ConsumeVarint(buf)
			if n < 0 {
				return fail("field %d: %w", field, protowire.ParseError(n))
			}
			buf = buf[n:]
			switch field {
			case metaFormat:
				format = v
			case metaPID:
				m.PID = int(v & (1<<31 - 1))
			case metaFeature:
				m.Feature = int(v & (1<<31 - 1))
			case metaStartedAt:
				// Reduced to times before the year 10000, which JSON can represent.
				m.StartedAt = time.UnixMilli(int64(v % 253402300800000)).UTC()
			case metaFlags:
				m.Draining = v&metaFlagDraining != 0
				leaving = v&metaFlagLeaving != 0
			}
		case protowire.BytesType:
			v, n := protowire.ConsumeBytes(buf)
			if n < 0 {
				return fail("field %d: %w", field, protowire.ParseError(n))
			}
			buf = buf[n:]
			for _, t := range texts {
				if t.field == field {
					*t.value = string(v)
					if err := checkText(*t.value); err != nil {
						return fail("the %s %w", t.what, err)
					}
				}
			}
		default:
			n := protowire.ConsumeFieldValue(field, kind, buf)
			if n < 0 {
				return fail("field %d: %w", field, protowire.ParseError(n))
			}
			buf = buf[n:]
		}
	}
	if format == 0 {
		return fail("it has no format")
	}
	return m, leaving, nil
}

// checkText refuses texts of other nodes that could harm a terminal or a log.
func checkText(s string) error {
	if len(s) > maxText {
		return fmt.Errorf("has %d bytes, at most %d are allowed", len(s), maxText)
	}
	if !utf8.ValidString(s) {
		return errors.New("is not valid UTF-8")
	}
	for _, r := range s {
		if !unicode.IsPrint(r) {
			return errors.New("contains characters that can't be printed")
		}
	}
	return nil
}
