package mesh

import (
	"bytes"
	"log/slog"
	"os"
	"path/filepath"
	"strings"
	"testing"
	"time"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/prometheus/client_golang/prometheus/testutil"

	"github.com/dsnode/dsnode/test/async"
)

// tlsAuthority is the CA of a test.
type tlsAuthority struct{ cert, key []byte }

func newTLSAuthority(t testing.TB, cluster string) tlsAuthority {
	t.Helper()
	cert, key, err := NewCA(cluster, 24*time.Hour)
	if err != nil {
		t.Fatal(err)
	}
	return tlsAuthority{cert, key}
}

func (a tlsAuthority) issue(t testing.TB, id Identity) (cert, key []byte) {
	t.Helper()
	return a.issueUntil(t, id, time.Now().Add(time.Hour))
}

func (a tlsAuthority) issueUntil(t testing.TB, id Identity, until time.Time) (cert, key []byte) {
	t.Helper()
	cert, key, err := issueBetween(a.cert, a.key, id, nil, until.Add(-6*time.Hour), until)
	if err != nil {
		t.Fatal(err)
	}
	return cert, key
}

// tlsFiles are the three files of a node in a test.
type tlsFiles struct{ cert, key, ca string }

func newTLSFiles(t testing.TB) tlsFiles {
	dir := t.TempDir()
	return tlsFiles{filepath.Join(dir, "node.pem"), filepath.Join(dir, "node.key"), filepath.Join(dir, "ca.pem")}
}

func writeTLSFile(t testing.TB, path string, content []byte) {
	t.Helper()
	if err := os.WriteFile(path, content, 0o600); err != nil {
		t.Fatal(err)
	}
}

func (f tlsFiles) write(t testing.TB, cert, key, ca []byte) {
	t.Helper()
	writeTLSFile(t, f.cert, cert)
	writeTLSFile(t, f.key, key)
	writeTLSFile(t, f.ca, ca)
}

func (f tlsFiles) load(t testing.TB, reg prometheus.Registerer) *Credentials {
	t.Helper()
	c, err := LoadCredentials(f.cert, f.key, f.ca, slog.New(slog.DiscardHandler), reg)
	if err != nil {
		t.Fatal(err)
	}
	return c
}

func TestLoadCredentialsRefuses(t *testing.T) {
	ours, other := newTLSAuthority(t, "dev"), newTLSAuthority(t, "dev")
	id := Identity{"dev", "a", "a-1"}
	cert, key := ours.issue(t, id)
	cert2, key2 := ours.issue(t, id)
	expired, expiredKey := ours.issueUntil(t, id, time.Now().Add(-time.Minute))
	for _, tc := range []struct {
		name          string
		cert, key, ca []byte
		err           string
	}{
		{"another node's key", cert, key2, ours.cert, "don't match"},
		{"another CA", cert, key, other.cert, "can't be verified"},
		{"expired", expired, expiredKey, ours.cert, "expired"},
		{"half a certificate", cert[:len(cert)/2], key, ours.cert, "truncated"},
		{"half a key", cert, key[:len(key)/2], ours.cert, "don't match"},
		{"half of the second CA", cert, key, append(bytes.Clone(ours.cert), other.cert[:len(other.cert)/2]...), "truncated"},
		{"an empty file", nil, key, ours.cert, "no PEM certificate"},
		{"a leaf as CA", cert, key, cert2, "is not a CA"},
		{"a CA as leaf", ours.cert, ours.key, ours.cert, "no node identity"},
		{"a file that is too large", cert, key, bytes.Repeat([]byte("#"), credentialFileMax+1), "larger than"},
	} {
		t.Run(tc.name, func(t *testing.T) {
			f := newTLSFiles(t)
			f.write(t, tc.cert, tc.key, tc.ca)
			_, err := LoadCredentials(f.cert, f.key, f.ca, slog.New(slog.DiscardHandler), nil)
			if err == nil || !strings.Contains(err.Error(), tc.err) {
				t.Fatalf("got %v, want an error with %q", err, tc.err)
			}
		})
	}
	t.Run("a missing file", func(t *testing.T) {
		f := newTLSFiles(t)
		if _, err := LoadCredentials(f.cert, f.key, f.ca, slog.New(slog.DiscardHandler), nil); !os.IsNotExist(unwrapAll(err)) {
			t.Fatalf("got %v, want an error that says that the file does not exist", err)
		}
	})
}

func unwrapAll(err error) error {
	for {
		next, ok := err.(interface{ Unwrap() error }) //nolint:errorlint // walks the chain by hand
		if !ok {
			return err
		}
		if _, ok := err.(*os.PathError); ok { //nolint:errorlint // os.IsNotExist wants this one
			return err
		}
		err = next.Unwrap()
	}
}

func TestReloadKeepsTheLastValidSet(t *testing.T) {
	ours := newTLSAuthority(t, "dev")
	id := Identity{"dev", "a", "a-1"}
	cert, key := ours.issue(t, id)
	f := newTLSFiles(t)
	f.write(t, cert, key, ours.cert)

	var lines bytes.Buffer
	reg := prometheus.NewRegistry()
	c, err := LoadCredentials(f.cert, f.key, f.ca, slog.New(slog.NewTextHandler(&lines, nil)), reg)
	if err != nil {
		t.Fatal(err)
	}
	before := c.NotAfter()
	if got := testutil.ToFloat64(c.metrics.expiry); got != float64(before.Unix()) {
		t.Errorf("expiry metric %v, want %v", got, before.Unix())
	}

	later := time.Now().Add(3 * time.Hour)
	newCert, newKey := ours.issueUntil(t, id, later)
	otherNode, otherNodeKey := ours.issue(t, Identity{"dev", "a", "a-2"})
	for _, step := range []struct {
		name      string
		cert, key []byte
		err       string
	}{
		{"half written", newCert[:200], key, "truncated"},
		{"new certificate, old key", newCert, key, "don't match"},
		{"another node", otherNode, otherNodeKey, "restart it"},
		{"emptied", nil, key, "no PEM certificate"},
	} {
		writeTLSFile(t, f.cert, step.cert)
		writeTLSFile(t, f.key, step.key)
		lines.Reset()
		for range 3 {
			if err := c.Reload(); err == nil || !strings.Contains(err.Error(), step.err) {
				t.Fatalf("%s: got %v, want an error with %q", step.name, err, step.err)
			}
		}
		if n := strings.Count(lines.String(), "level=ERROR"); n != 1 {
			t.Errorf("%s: %d log lines, want one:\n%s", step.name, n, &lines)
		}
		if strings.Contains(lines.String(), "PRIVATE") {
			t.Errorf("%s: the log contains a private key", step.name)
		}
		if !c.NotAfter().Equal(before) || testutil.ToFloat64(c.metrics.stale) != 1 {
			t.Errorf("%s: the last valid set is not in use, or the metric does not show invalid files", step.name)
		}
	}

	writeTLSFile(t, f.cert, newCert)
	writeTLSFile(t, f.key, newKey)
	if err := c.Reload(); err != nil {
		t.Fatal(err)
	}
	if d := c.NotAfter().Sub(later).Abs(); d > time.Second || testutil.ToFloat64(c.metrics.stale) != 0 {
		t.Errorf("the new certificate is not in use, or the metric shows invalid files: the one in use expires at %s", c.NotAfter())
	}
	if c.Identity() != id {
		t.Errorf("identity %v, want %v", c.Identity(), id)
	}
	if used, refused := testutil.ToFloat64(c.metrics.reloads.WithLabelValues("used")), testutil.ToFloat64(c.metrics.reloads.WithLabelValues("refused")); used != 1 || refused != 4 {
		t.Errorf("reloads: %v used, %v refused; want 1 and 4", used, refused)
	}
}

func TestRunFollowsTheFiles(t *testing.T) {
	async.NoLeaks(t)
	ours := newTLSAuthority(t, "dev")
	id := Identity{"dev", "a", "a-1"}
	cert, key := ours.issue(t, id)
	f := newTLSFiles(t)
	f.write(t, cert, key, ours.cert)
	c := f.load(t, nil)
	c.poll = time.Millisecond
	async.Run(t, c.Run)

	later := time.Now().Add(3 * time.Hour)
	cert, key = ours.issueUntil(t, id, later)
	writeTLSFile(t, f.cert, cert[:100])
	async.Await(t, "the invalid file to be reported", func() bool { return testutil.ToFloat64(c.metrics.stale) == 1 })
	writeTLSFile(t, f.cert, cert)
	writeTLSFile(t, f.key, key)
	async.Await(t, "the new certificate to be in use", func() bool { return c.NotAfter().Sub(later).Abs() < time.Second })
}
