package storage

import (
	"errors"
	"testing"

	"github.com/hashicorp/raft"
)

func TestCommitIndexIsStoredWithTheNextEntries(t *testing.T) {
	dir := t.TempDir()
	s := openRaft(t, dir)
	want := func(when string, want uint64) {
		t.Helper()
		got, err := s.GetCommitIndex()
		if err != nil || got != want {
			t.Fatalf("%s: commit index %d, %v; want %d", when, got, err, want)
		}
	}
	store := func(index uint64) {
		t.Helper()
		if err := s.StoreLog(&raft.Log{Index: index, Term: 1, Data: []byte("x")}); err != nil {
			t.Fatal(err)
		}
	}
	want("at first", 0)
	store(1)
	if err := s.StageCommitIndex(1); err != nil {
		t.Fatal(err)
	}
	want("only staged", 0)
	store(2)
	want("stored with entry 2", 1)
	if err := s.StageCommitIndex(9); err != nil {
		t.Fatal(err)
	}
	store(3)
	want("staged above the last entry", 3)
	if err := s.Close(); err != nil {
		t.Fatal(err)
	}
	s = openRaft(t, dir)
	want("after a restart", 3)
	if err := s.DeleteRange(3, 3); err != nil {
		t.Fatal(err)
	}
	want("after the last entry was taken back", 2)
}

func TestParseCommit(t *testing.T) {
	for _, tc := range []struct {
		plain []byte
		want  error
	}{
		{[]byte{1, 0, 0, 0, 0, 0, 0, 0, 7}, nil},
		{[]byte{2, 0, 0, 0, 0, 0, 0, 0, 7}, ErrNewerFormat},
		{[]byte{1, 7}, ErrDamaged},
		{nil, ErrDamaged},
	} {
		if _, err := parseCommit(tc.plain); !errors.Is(err, tc.want) {
			t.Errorf("%x: %v, want %v", tc.plain, err, tc.want)
		}
	}
}
