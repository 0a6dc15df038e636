package cluster

import (
	"errors"
	"fmt"
	"go/ast"
	"go/parser"
	"go/token"
	"os"
	"path/filepath"
	"strings"
	"testing"
)

// A follower passes a change on to the leader. Each refusal of the agreed state
// must reach the proposer as the same sentinel, or its errors.Is misses.
func TestRefusalsOfTheAgreedStateCrossTheWire(t *testing.T) {
	local := map[string]string{
		"ErrUnknownCommand": "ends the node that meets it",
		"ErrKeyMissing":     "about a client's request, never about a change",
		"ErrKeyUnknown":     "about a client's request, never about a change",
		"ErrKeyExpired":     "about a client's request, never about a change",
		"ErrKeyRevoked":     "about a client's request, never about a change",
	}
	table, err := os.ReadFile("errors.go")
	if err != nil {
		t.Fatal(err)
	}
	files, err := filepath.Glob("agreed/*.go")
	if err != nil {
		t.Fatal(err)
	}
	found := 0
	for _, file := range files {
		if strings.HasSuffix(file, "_test.go") {
			continue
		}
		parsed, err := parser.ParseFile(token.NewFileSet(), file, nil, 0)
		if err != nil {
			t.Fatal(err)
		}
		for name, object := range parsed.Scope.Objects {
			if object.Kind != ast.Var || !strings.HasPrefix(name, "Err") {
				continue
			}
			found++
			row := strings.Contains(string(table), ", agreed."+name+"},")
			if _, isLocal := local[name]; row == isLocal {
				t.Errorf("%s in %s: row in wire %t, only used locally %t", name, file, row, isLocal)
			}
		}
	}
	if found < 20 {
		t.Errorf("found only %d sentinels in agreed", found)
	}
}

func TestRefusalsKeepTheirSentinelAndMessage(t *testing.T) {
	seen := map[string]bool{}
	for _, row := range wire {
		if seen[row.code] {
			t.Errorf("code %q stands for two errors", row.code)
		}
		seen[row.code] = true
		err := fmt.Errorf("node z: %w", row.err)
		if back := unrefuse(refusal(err)); !errors.Is(back, row.err) || back.Error() != err.Error() {
			t.Errorf("%s: %v became %v", row.code, err, back)
		}
	}
	if refusal(errors.New("unexpected")) != nil {
		t.Error("an unexpected error became a refusal")
	}
}
