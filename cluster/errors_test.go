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

	"google.golang.org/grpc/codes"
	"google.golang.org/grpc/status"
)

// A follower forwards a change to the leader. Each refusal of agreed.Apply must reach
// the proposer as the same sentinel, so that errors.Is works.
func TestAgreedRefusalsHaveWireCodes(t *testing.T) {
	local := map[string]string{
		"ErrUnknownCommand": "ends the node that applies the command",
		"ErrKeyMissing":     "refuses a client's request, not a command",
		"ErrKeyUnknown":     "refuses a client's request, not a command",
		"ErrKeyExpired":     "refuses a client's request, not a command",
		"ErrKeyRevoked":     "refuses a client's request, not a command",
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
				t.Errorf("%s in %s: has a row in wire: %t, is used only locally: %t", name, file, row, isLocal)
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
			t.Errorf("code %q is used for two errors", row.code)
		}
		seen[row.code] = true
		err := fmt.Errorf("node z: %w", row.err)
		encoded, failed := refusal(err)
		if back := unrefuse(encoded); failed != nil || !errors.Is(back, row.err) || back.Error() != err.Error() {
			t.Errorf("%s: %v was decoded as %v, %v", row.code, err, back, failed)
		}
	}
	if encoded, err := refusal(errors.New("unexpected")); encoded != nil || status.Code(err) != codes.Internal {
		t.Errorf("an error without a row in wire was encoded as %v, %v", encoded, err)
	}
	if encoded, err := refusal(nil); encoded != nil || err != nil {
		t.Errorf("no error was encoded as %v, %v", encoded, err)
	}
}
