package gossip

import (
	"errors"
	"strings"
	"testing"
	"time"

	"google.golang.org/protobuf/encoding/protowire"
	"pgregory.net/rapid"
)

func testMember() Member {
	return Member{
		Name: "shanghai-a-1", Site: "shanghai-a", RPC: "rpc.example:7957", API: "127.0.0.1:8101", Admin: "127.0.0.1:8102",
		Gossip: "[::1]:7956", Version: "0.1.0", PID: 4711, Feature: 2, Instance: strings.Repeat("ab", 16),
		StartedAt: time.UnixMilli(1764000000123).UTC(), Draining: true,
	}
}

func TestMetaRoundTrip(t *testing.T) {
	text := rapid.StringMatching(`[a-z0-9.:\[\]-]{0,40}`)
	rapid.Check(t, func(t *rapid.T) {
		m := Member{
			Name: "n", Site: text.Draw(t, "site"), RPC: text.Draw(t, "rpc"), API: text.Draw(t, "api"),
			Admin: text.Draw(t, "admin"), Gossip: text.Draw(t, "gossip"), Version: text.Draw(t, "version"),
			PID: rapid.IntRange(0, 1<<22).Draw(t, "pid"), Feature: rapid.IntRange(0, 100).Draw(t, "feature"),
			Instance: text.Draw(t, "instance"), Draining: rapid.Bool().Draw(t, "draining"),
			StartedAt: time.UnixMilli(rapid.Int64Range(1, 4e12).Draw(t, "started")).UTC(),
		}
		leaving := rapid.Bool().Draw(t, "leaving")
		wire, err := encodeMeta(m, leaving)
		if err != nil {
			t.Fatal(err)
		}
		got, gotLeaving, err := decodeMeta("n", wire)
		if err != nil || got != m || gotLeaving != leaving {
			t.Fatalf("got %+v, leaving %v, %v; want %+v, leaving %v", got, gotLeaving, err, m, leaving)
		}
	})
}

func TestMetaOfALaterFormat(t *testing.T) {
	wire, err := encodeMeta(testMember(), false)
	if err != nil {
		t.Fatal(err)
	}
	wire = protowire.AppendTag(wire, metaFormat, protowire.VarintType)
	wire = protowire.AppendVarint(wire, 9)
	wire = protowire.AppendTag(wire, 77, protowire.BytesType)
	wire = protowire.AppendString(wire, "\xff unknown")
	wire = protowire.AppendTag(wire, 78, protowire.Fixed64Type)
	wire = protowire.AppendFixed64(wire, 1)
	wire = protowire.AppendTag(wire, metaSite, protowire.Fixed32Type) // a known field of another type
	wire = protowire.AppendFixed32(wire, 1)
	got, _, err := decodeMeta("shanghai-a-1", wire)
	if err != nil || got != testMember() {
		t.Fatalf("got %+v, %v", got, err)
	}
}

func TestInvalidMetaIsRefused(t *testing.T) {
	field := func(n protowire.Number, text string) []byte {
		wire := protowire.AppendVarint(protowire.AppendTag(nil, metaFormat, protowire.VarintType), 1)
		return protowire.AppendString(protowire.AppendTag(wire, n, protowire.BytesType), text)
	}
	whole, err := encodeMeta(testMember(), false)
	if err != nil {
		t.Fatal(err)
	}
	for _, tc := range []struct {
		name string
		wire []byte
		err  string
	}{
		{"empty", nil, "no format"},
		{"truncated", whole[:len(whole)-20], "field"},
		{"other data", []byte("hello, gossip"), ""},
		{"too long", make([]byte, maxMeta+1), "at most 512"},
		{"a terminal escape sequence", field(metaVersion, "1.0\x1b[2J"), "can't be printed"},
		{"a line break", field(metaSite, "a\nb"), "can't be printed"},
		{"invalid UTF-8", field(metaRPC, "\xff"), "not valid UTF-8"},
		{"a long text", field(metaRPC, strings.Repeat("x", maxText+1)), "at most 255"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			if _, _, err := decodeMeta("n", tc.wire); !errors.Is(err, errMeta) || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("got %v, want an error with %q", err, tc.err)
			}
		})
	}

	long := testMember()
	long.RPC, long.API, long.Admin = strings.Repeat("r", 200), strings.Repeat("p", 200), strings.Repeat("d", 200)
	if _, err := encodeMeta(long, false); err == nil || !strings.Contains(err.Error(), "shorten the advertised addresses") {
		t.Errorf("got %v, want an error that says what to shorten", err)
	}
	invalid := testMember()
	invalid.Version = "1.0\n"
	if _, err := encodeMeta(invalid, false); err == nil {
		t.Error("metadata that decodeMeta refuses was encoded")
	}
}

func FuzzMeta(f *testing.F) {
	wire, err := encodeMeta(testMember(), true)
	if err != nil {
		f.Fatal(err)
	}
	f.Add(wire)
	f.Add(wire[:len(wire)/2])
	f.Add([]byte{0x08, 0x01})
	f.Add([]byte{})
	f.Fuzz(func(t *testing.T, wire []byte) {
		m, leaving, err := decodeMeta("n", wire)
		if err != nil {
			return
		}
		if _, err := m.StartedAt.MarshalJSON(); err != nil {
			t.Fatalf("decoded a time that JSON can't represent: %v", err)
		}
		again, err := encodeMeta(m, leaving)
		if err != nil {
			t.Fatalf("decoded metadata can't be encoded: %v", err)
		}
		second, secondLeaving, err := decodeMeta("n", again)
		if err != nil || second != m || secondLeaving != leaving {
			t.Fatalf("%+v became %+v, %v", m, second, err)
		}
	})
}
