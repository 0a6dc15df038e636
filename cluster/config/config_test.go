package config

import (
	"crypto/ecdsa"
	"crypto/elliptic"
	"crypto/rand"
	"crypto/x509"
	"encoding/json"
	"encoding/pem"
	"errors"
	"io/fs"
	"math/big"
	"strings"
	"testing"
	"time"

	"github.com/google/go-cmp/cmp"
	"go.yaml.in/yaml/v4"
	"pgregory.net/rapid"
)

const fourSites = `version: 1
sites:
  beijing:    {city: beijing,  priority: 1}
  shanghai-a: {city: shanghai, priority: 2}
  shanghai-b: {city: shanghai, priority: 3}
  tianjin:    {city: tianjin,  priority: 4}
`

func TestRole(t *testing.T) {
	c := mustParse(t, fourSites)
	for _, tc := range []struct{ site, primary, want string }{
		{"shanghai-a", "shanghai-a", RolePrimary},
		{"shanghai-b", "shanghai-a", RoleSameCity},
		{"shanghai-a", "shanghai-b", RoleSameCity},
		{"beijing", "shanghai-a", RoleRemote},
		{"shanghai-a", "beijing", RoleRemote},
		{"gone", "shanghai-a", ""},
		{"shanghai-a", "gone", ""},
		{"gone", "gone", ""},
		{"shanghai-a", "", ""},
	} {
		if got := c.Role(tc.site, tc.primary); got != tc.want {
			t.Errorf("Role(%q, %q) = %q, want %q", tc.site, tc.primary, got, tc.want)
		}
	}
}

func TestSiteOrderPrefersOwnSiteThenSameCity(t *testing.T) {
	c := mustParse(t, fourSites)
	for from, want := range map[string]string{
		"shanghai-b": "shanghai-b shanghai-a beijing tianjin",
		"shanghai-a": "shanghai-a shanghai-b beijing tianjin",
		"tianjin":    "tianjin beijing shanghai-a shanghai-b",
		"gone":       "beijing shanghai-a shanghai-b tianjin",
	} {
		if got := strings.Join(c.SiteOrder(from), " "); got != want {
			t.Errorf("SiteOrder(%q) = %s, want %s", from, got, want)
		}
	}
}

func TestTimeoutsForInherits(t *testing.T) {
	c := mustParse(t, `version: 1
sites: {a: {city: x, priority: 1}}
upstreams:
  u: {site: a, url: http://h, timeouts: {connect: 1s, total: 40m}}
  v: {site: a, url: http://h}
models:
  m: {serve: [{upstream: u}, {upstream: v}], timeouts: {total: 50m}}
  n: {serve: [{upstream: u}]}
timeouts: {connect: 3s, between_tokens: 20s}
`)
	for _, tc := range []struct{ model, upstream, want string }{
		{"m", "u", "1s 2m 20s 50m"},
		{"m", "v", "3s 2m 20s 50m"},
		{"n", "u", "1s 2m 20s 40m"},
		{"n", "v", "3s 2m 20s 30m"},
		{"gone", "gone", "3s 2m 20s 30m"},
	} {
		got := c.TimeoutsFor(tc.model, tc.upstream)
		if s := strings.Join([]string{got.Connect.String(), got.FirstToken.String(), got.BetweenTokens.String(), got.Total.String()}, " "); s != tc.want {
			t.Errorf("TimeoutsFor(%q, %q) = %s, want %s", tc.model, tc.upstream, s, tc.want)
		}
	}
	if got := new(Config).TimeoutsFor("m", "u"); got != DefaultTimeouts() {
		t.Errorf("an empty Config has %v", got)
	}
}

func TestDurationTextRoundTrips(t *testing.T) {
	type file struct {
		D Duration `yaml:"d" json:"d"`
	}
	for text, want := range map[string]time.Duration{"800ms": 800 * time.Millisecond, "30m": 30 * time.Minute, "1h": time.Hour, "1h30m": 90 * time.Minute, "1m30s": 90 * time.Second, "0s": 0, "10s": 10 * time.Second, "1h0m5s": time.Hour + 5*time.Second} {
		d, err := ParseDuration(text)
		if err != nil || d.D() != want || d.String() != text {
			t.Errorf("ParseDuration(%q) = %s, %v", text, d, err)
		}
		y, yErr := yaml.Dump(file{d})
		j, jErr := json.Marshal(file{d})
		if yErr != nil || jErr != nil || string(y) != "d: "+text+"\n" || string(j) != `{"d":"`+text+`"}` {
			t.Errorf("%s is written as %s and %s (%v, %v)", text, y, j, yErr, jErr)
		}
		var fromYAML, fromJSON file
		if err := errors.Join(yaml.Load(y, &fromYAML), json.Unmarshal(j, &fromJSON)); err != nil || fromYAML.D != d || fromJSON.D != d {
			t.Errorf("%s is read as %s and %s (%v)", text, fromYAML.D, fromJSON.D, err)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		d := Duration(rapid.Int64Min(0).Draw(t, "d"))
		if got, err := ParseDuration(d.String()); err != nil || got != d {
			t.Fatalf("%s is read as %s, %v", d, got, err)
		}
	})
	if _, err := ParseDuration("5"); !errors.Is(err, ErrDuration) {
		t.Errorf("%v is not ErrDuration", err)
	}
}

func TestDecodeKeepsFieldsThatTheTextOmits(t *testing.T) {
	type inner struct {
		A int `yaml:"a"`
	}
	type outer struct {
		Kept   string         `yaml:"kept"`
		Number int64          `yaml:"number"`
		Flag   bool           `yaml:"flag"`
		Words  []string       `yaml:"words"`
		Map    map[string]int `yaml:"map"`
		Inner  inner          `yaml:"inner"`
		Text   string         `yaml:"text"`
		Hidden string         `yaml:"-"`
	}
	got := outer{Kept: "k", Words: []string{"gone"}, Map: map[string]int{"old": 1}, Inner: inner{7}}
	err := Decode("f", []byte("number: -5\nflag: true\nwords: [1.10, yes, 'null']\nmap: {new: 2}\ninner:\ntext: |\n  a\n  b\n"), &got).Err()
	want := outer{Kept: "k", Number: -5, Flag: true, Words: []string{"1.10", "yes", "null"}, Map: map[string]int{"old": 1, "new": 2}, Inner: inner{7}, Text: "a\nb\n"}
	if diff := cmp.Diff(want, got); err != nil || diff != "" {
		t.Errorf("%v, -want +got:\n%s", err, diff)
	}
	err = Decode("f", []byte("hidden: x\nmap: {a: b}\nnumber: 9223372036854775808\n"), &got).Err()
	const message = "f:1: hidden: unknown key \"hidden\"; allowed here: kept, number, flag, words, map, inner, text\n" +
		"f:2: map.a: must be a whole number, not \"b\"; write only digits, without a unit or separators\n" +
		"f:3: number: \"9223372036854775808\" is too large"
	if err == nil || err.Error() != message {
		t.Errorf("got %v", err)
	}
}

func TestNearestWord(t *testing.T) {
	known := []string{"shanghai-b", "shanghai-a", "beijing", "a"}
	for wrong, want := range map[string]string{
		"shangai": "shanghai-a", "shanghai-c": "shanghai-a", "SHANGHAI-B": "shanghai-b", "biejing": "beijing", "bejing": "beijing",
		"london": "", "": "", "b": "", strings.Repeat("x", 1000): "",
	} {
		if got := nearestWord(wrong, known); got != want {
			t.Errorf("nearestWord(%q) = %q, want %q", wrong, got, want)
		}
	}
	for _, tc := range []struct {
		a, b string
		want int
	}{{"", "", 0}, {"", "abc", 3}, {"abc", "", 3}, {"kitten", "sitting", 3}, {"ctiy", "city", 1}, {"abcd", "badc", 2}} {
		if got := editDistance(tc.a, tc.b); got != tc.want {
			t.Errorf("editDistance(%q, %q) = %d, want %d", tc.a, tc.b, got, tc.want)
		}
	}
}

func TestDifferentPathsHaveDifferentStrings(t *testing.T) {
	if got := At("models", "gpt-4.1", "serve", 0, "upstream").String(); got != `models."gpt-4.1".serve[0].upstream` {
		t.Error(got)
	}
	base := At("a")
	one, two := base.At("b"), base.At("c")
	if base.String() != "a" || one.String() != "a.b" || two.String() != "a.c" {
		t.Error(base, one, two)
	}
	elem := rapid.SliceOfN(rapid.OneOf(
		rapid.Map(rapid.SampledFrom([]string{"a", "a.b", "", "[0]", `"`, "a[0]", "é"}), func(s string) any { return s }),
		rapid.Map(rapid.IntRange(0, 3), func(i int) any { return i })), 1, 4)
	rapid.Check(t, func(t *rapid.T) {
		p, q := Path(elem.Draw(t, "p")), Path(elem.Draw(t, "q"))
		if (p.String() == q.String()) != cmp.Equal(p, q) {
			t.Fatalf("%#v and %#v are %s and %s", p, q, p, q)
		}
	})
}

// Every name that a configuration may have is also allowed in a certificate.
func TestValidNamesFitCertificates(t *testing.T) {
	for _, bad := range []string{"", "-a", "a-", "A", "a.b", "a_b", "a b", "é", strings.Repeat("a", 64)} {
		if ValidName(bad) {
			t.Errorf("%q is valid", bad)
		}
	}
	rapid.Check(t, func(t *rapid.T) {
		name := rapid.StringMatching(`[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?`).Draw(t, "name")
		if !ValidName(name) {
			t.Fatalf("%q is not valid", name)
		}
		if err := CheckIdentityPart("site", name); err != nil {
			t.Fatal(err)
		}
	})
}

func TestResolveSecret(t *testing.T) {
	env := func(name string) (string, bool) {
		v, ok := map[string]string{"KEY": " s3cret\n", "EMPTY": " ", "LINES": "a\nb"}[name]
		return v, ok
	}
	read := func(name string) ([]byte, error) {
		switch name {
		case "key":
			return []byte("s3cret\r\n"), nil
		case "huge":
			return []byte(strings.Repeat("x", maxSecretBytes+1)), nil
		case "closed":
			return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrPermission}
		}
		return nil, &fs.PathError{Op: "open", Path: name, Err: fs.ErrNotExist}
	}
	for _, tc := range []struct {
		ref  Secret
		want string // the secret s3cret, or the error's text
	}{
		{Secret{Env: "KEY"}, "s3cret"},
		{Secret{File: "key"}, "s3cret"},
		{Secret{}, "has neither env nor file; write {env: NAME} or {file: PATH}"},
		{Secret{Env: "KEY", File: "key"}, "has both env and file; write {env: NAME} or {file: PATH}, not both"},
		{Secret{Env: "NONE"}, "the environment variable NONE is not set; set it in the environment of dsnode run"},
		{Secret{Env: "EMPTY"}, "the environment variable EMPTY is empty; put the secret there"},
		{Secret{Env: "LINES"}, "the environment variable LINES has more than one line or control characters; put only the secret there"},
		{Secret{File: "none"}, "the file none does not exist; create it or correct the path"},
		{Secret{File: "closed"}, "permission to read the file closed is denied; allow the user that runs dsnode to read it"},
		{Secret{File: "huge"}, "the file huge has more than 65536 bytes; put only the secret there"},
	} {
		got, err := ResolveSecret(tc.ref, env, read)
		switch {
		case tc.want == "s3cret":
			if got != tc.want || err != nil {
				t.Errorf("%v: %q, %v", tc.ref, got, err)
			}
		case !errors.Is(err, ErrSecret) || err.Error() != "secret cannot be read: "+tc.want || got != "":
			t.Errorf("%v: %q, %v", tc.ref, got, err)
		}
	}
	if _, err := ResolveSecret(Secret{File: "none"}, env, read); !errors.Is(err, fs.ErrNotExist) {
		t.Errorf("%v does not wrap fs.ErrNotExist", err)
	}
}

func TestCheckLocalChecksUpstreamsOfTheSite(t *testing.T) {
	caCert, caKey := selfSigned(t)
	cert, key := selfSigned(t)
	files := map[string][]byte{
		"ca.pem": caCert, "cert.pem": cert, "key.pem": key, "empty": nil, "text": []byte("hello"), "other-key.pem": caKey,
		"broken.pem": []byte("-----BEGIN CERTIFICATE-----\nAAAA\n-----END CERTIFICATE-----\n"),
	}
	read := func(name string) ([]byte, error) {
		data, ok := files[name]
		if !ok {
			return nil, fs.ErrNotExist
		}
		return data, nil
	}
	env := func(name string) (string, bool) { return "value", name == "KEY" }

	c := mustParse(t, `version: 1
sites:
  a: {city: x, priority: 1}
  b: {city: x, priority: 2}
  good: {city: x, priority: 3}
upstreams:
  good:
    {site: good, url: https://h, api_key: {env: KEY}, tls: {ca_file: ca.pem, cert_file: cert.pem, key_file: key.pem}}
  plain: {site: good, url: http://h}
  one:
    site: a
    url: https://h
    api_key:
      env: NO_KEY
    tls:
      ca_file: none.pem
      cert_file: text
      key_file: key.pem
  two:
    {site: a, url: https://h, api_key: {file: empty}, tls: {ca_file: text, cert_file: none.pem, key_file: empty}}
  three:
    {site: a, url: https://h, tls: {ca_file: broken.pem, cert_file: cert.pem, key_file: other-key.pem}}
  elsewhere: {site: b, url: https://h, api_key: {env: NO_KEY}}
`)
	if err := c.CheckLocal("good", env, read); err != nil {
		t.Errorf("site good: %v", err)
	}
	want := []string{
		`cluster.yaml:13: upstreams.one.api_key: secret cannot be read: the environment variable NO_KEY is not set; set it in the environment of dsnode run`,
		`cluster.yaml:16: upstreams.one.tls.ca_file: the file none.pem does not exist; create it or correct the path`,
		`cluster.yaml:17: upstreams.one.tls.cert_file: the files text and key.pem are not a certificate and its key (failed to find any PEM data in certificate input); create both together with dsnode tls issue`,
		`cluster.yaml:20: upstreams.two.api_key: secret cannot be read: the file empty is empty; put the secret there`,
		`cluster.yaml:20: upstreams.two.tls.ca_file: the file text has no certificate in PEM form; use the CA's certificate, as dsnode tls ca writes it`,
		`cluster.yaml:20: upstreams.two.tls.cert_file: the file none.pem does not exist; create it or correct the path`,
		`cluster.yaml:20: upstreams.two.tls.key_file: the file empty is empty; fill it or correct the path`,
		`cluster.yaml:22: upstreams.three.tls.ca_file: the file broken.pem has an invalid certificate: x509: malformed certificate; copy the CA's certificate again`,
		`cluster.yaml:22: upstreams.three.tls.cert_file: the files cert.pem and other-key.pem are not a certificate and its key (private key does not match public key); create both together with dsnode tls issue`,
	}
	err := c.CheckLocal("a", env, read)
	if err == nil {
		t.Fatal("site a has no problem")
	}
	if diff := cmp.Diff(want, strings.Split(err.Error(), "\n")); diff != "" {
		t.Errorf("-want +got:\n%s", diff)
	}
	if again := c.CheckLocal("a", env, read); again == nil || again.Error() != err.Error() {
		t.Errorf("a second call gives another error: %v", again)
	}

	made := &Config{Upstreams: map[string]Upstream{"u": {Site: "a", APIKey: Secret{Env: "NO_KEY"}}}}
	if err := made.CheckLocal("a", env, read); err == nil || !strings.HasPrefix(err.Error(), "upstreams.u.api_key: secret cannot be read") {
		t.Errorf("a config that was not parsed: %v", err)
	}
}

// selfSigned makes a certificate and its key in PEM form.
func selfSigned(t *testing.T) (cert, key []byte) {
	t.Helper()
	private, err := ecdsa.GenerateKey(elliptic.P256(), rand.Reader)
	if err != nil {
		t.Fatal(err)
	}
	template := &x509.Certificate{SerialNumber: big.NewInt(1), NotAfter: time.Now().Add(time.Hour), DNSNames: []string{"localhost"}, IsCA: true, BasicConstraintsValid: true}
	der, err := x509.CreateCertificate(rand.Reader, template, template, private.Public(), private)
	if err != nil {
		t.Fatal(err)
	}
	pkcs8, err := x509.MarshalPKCS8PrivateKey(private)
	if err != nil {
		t.Fatal(err)
	}
	return pem.EncodeToMemory(&pem.Block{Type: "CERTIFICATE", Bytes: der}), pem.EncodeToMemory(&pem.Block{Type: "PRIVATE KEY", Bytes: pkcs8})
}

func TestAccessStale(t *testing.T) {
	for _, tc := range []struct {
		staleFor, age time.Duration
		known, want   bool
	}{
		{0, 1000 * time.Hour, true, false}, // no limit
		{0, 0, false, false},
		{time.Minute, time.Minute, true, false},
		{time.Minute, time.Minute + 1, true, true},
		{time.Minute, 0, false, true}, // unknown is too old
	} {
		if got := (Access{StaleFor: Duration(tc.staleFor)}).Stale(tc.age, tc.known); got != tc.want {
			t.Errorf("stale_for %s, age %s (known %v): %v", tc.staleFor, tc.age, tc.known, got)
		}
	}
}
