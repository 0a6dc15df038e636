package node

import (
	"encoding/base64"
	"errors"
	"fmt"
	"net"
	"net/netip"
	"os"
	"runtime"
	"slices"
	"strconv"
	"strings"
	"time"

	"github.com/dsnode/dsnode/cluster/agreed"
	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/storage/keyring"
)

const maxSeeds = 64

// configCheck checks the text of a node.yaml.
type configCheck struct {
	*Config
	src *config.Source
}

func (c *configCheck) all() {
	switch {
	case !c.src.Has(config.At("version")):
		c.missing(config.At("version"), "write version: 1")
	case c.Version != 1:
		c.reject(config.At("version"), "write version: 1", "version %d is not supported", c.Version)
	}
	c.name("cluster", c.Cluster, "write the name that the certificates were issued for")
	c.name("name", c.Name, "write a name that no other node has, such as shanghai-a-1")
	c.name("site", c.Site, "write the site's name in cluster.yaml")
	c.required(config.At("data_dir"), c.DataDir, "write the directory for the node's files")

	c.rpc()
	c.gossip()
	c.api()
	c.admin()
	if c.Metrics.Bind != "" {
		c.bind("metrics", c.Metrics.Bind)
	}
	c.distinctPorts()
	c.seeds()
	c.operatorKey()
	if p := config.At("feature_level"); c.src.Has(p) && (c.FeatureLevel < 1 || c.FeatureLevel > agreed.MaxFeatureLevel) {
		c.reject(p, fmt.Sprintf("write a level from 1 to %d, or remove it for the newest one", agreed.MaxFeatureLevel), "this version has no feature level %d", c.FeatureLevel)
	}
	c.within(config.At("shutdown", "delay"), c.Shutdown.Delay, 10*time.Minute)
	c.within(config.At("shutdown", "grace"), c.Shutdown.Grace, time.Hour)
	if levels := []string{"debug", "info", "warn", "error"}; !slices.Contains(levels, c.Log.Level) {
		c.reject(config.At("log", "level"), "write one of "+strings.Join(levels, ", "), "%q is not a level", c.Log.Level)
	}
}

func (c *configCheck) reject(p config.Path, hint, format string, args ...any) {
	c.src.Reject(p, fmt.Sprintf(format, args...), hint)
}

func (c *configCheck) missing(p config.Path, hint string) {
	what := "is missing"
	if c.src.Has(p) {
		what = "is empty"
	}
	c.src.Reject(p, what, hint)
}

func (c *configCheck) required(p config.Path, value, hint string) {
	if value == "" {
		c.missing(p, hint)
	}
}

func (c *configCheck) name(key, value, hint string) {
	switch p := config.At(key); {
	case value == "":
		c.missing(p, hint)
	case !config.ValidName(value):
		c.reject(p, config.NameHint, "%q cannot be a name", value)
	}
}

func (c *configCheck) within(p config.Path, d config.Duration, most time.Duration) {
	if d < 0 || d.D() > most {
		c.reject(p, "write a time from 0s to "+config.Duration(most).String(), "%s is out of range", d)
	}
}

func (c *configCheck) rpc() {
	at := config.At("rpc")
	c.RPC.Advertise = c.advertise("rpc", c.RPC.Bind, c.RPC.Advertise)
	const hint = "write the files that dsnode tls issue has made for this node"
	c.required(at.At("tls", "cert_file"), c.RPC.TLS.CertFile, hint)
	c.required(at.At("tls", "key_file"), c.RPC.TLS.KeyFile, hint)
	c.required(at.At("tls", "ca_file"), c.RPC.TLS.CAFile, "write the certificate that dsnode tls ca has made")
}

func (c *configCheck) gossip() {
	c.Gossip.Advertise = c.advertise("gossip", c.Gossip.Bind, c.Gossip.Advertise)
	c.required(config.At("gossip", "key_file"), c.Gossip.KeyFile, gossipKeyHint)
}

func (c *configCheck) api() {
	c.API.Advertise = c.advertiseDefault("api", c.API.Bind, c.API.Advertise)
	c.serverTLS(config.At("api", "tls"), c.API.TLS)
}

func (c *configCheck) admin() {
	c.Admin.Advertise = c.advertiseDefault("admin", c.Admin.Bind, c.Admin.Advertise)
	c.serverTLS(config.At("admin", "tls"), c.Admin.TLS)
	host, _, ok := splitAddress(c.Admin.Bind)
	if !ok || isLoopback(host) || c.Admin.TokenFile != "" && c.Admin.TLS.On() {
		return
	}
	lacks := "no token_file and no tls"
	switch {
	case c.Admin.TokenFile != "":
		lacks = "no tls"
	case c.Admin.TLS.On():
		lacks = "no token_file"
	}
	c.reject(config.At("admin", "bind"), "write token_file and tls: {cert_file, key_file}, or bind it to 127.0.0.1",
		"other machines can reach %s, and there is %s", c.Admin.Bind, lacks)
}

func (c *configCheck) serverTLS(at config.Path, t ServerTLS) {
	if (t.CertFile == "") != (t.KeyFile == "") {
		c.reject(at, "write both, or none for plain HTTP", "cert_file and key_file go together")
	}
}

// bind checks an address to listen on.
func (c *configCheck) bind(section, bind string) (host string, port int, ok bool) {
	p := config.At(section, "bind")
	if bind == "" {
		c.missing(p, "write host:port, such as 127.0.0.1:8080, or remove the key for the default")
		return "", 0, false
	}
	host, port, ok = splitAddress(bind)
	if !ok {
		c.reject(p, "write host:port, such as 0.0.0.0:8080 or [::1]:8080", "%q is not an address", bind)
	}
	return host, port, ok
}

// advertise returns the address of a port for peers: the configured one, or the bind
// address if that can be dialled.
func (c *configCheck) advertise(section, bind, advertise string) string {
	host, port, ok := c.bind(section, bind)
	if !ok {
		return advertise
	}
	if advertise != "" {
		return c.checkAdvertise(section, advertise, port)
	}
	if isWildcard(host) {
		c.reject(config.At(section, "advertise"), fmt.Sprintf("write the address under which other nodes reach this one, such as advertise: %s",
			net.JoinHostPort("10.0.0.5", strconv.Itoa(port))), "is missing, and other nodes can't dial bind %s", bind)
		return ""
	}
	return bind
}

// advertiseDefault is advertise for the ports that peers don't dial: a wildcard is replaced
// by the host of rpc.
func (c *configCheck) advertiseDefault(section, bind, advertise string) string {
	host, port, ok := c.bind(section, bind)
	switch {
	case !ok:
		return advertise
	case advertise != "":
		return c.checkAdvertise(section, advertise, port)
	case !isWildcard(host):
		return bind
	}
	host, _, ok = splitAddress(c.RPC.Advertise)
	if !ok {
		return "" // the check of rpc has reported it
	}
	return net.JoinHostPort(host, strconv.Itoa(port))
}

func (c *configCheck) checkAdvertise(section, advertise string, bound int) string {
	p := config.At(section, "advertise")
	host, port, ok := splitAddress(advertise)
	switch {
	case !ok:
		c.reject(p, "write host:port, such as 10.0.0.5:8080 or node1.example.org:8080", "%q is not an address", advertise)
	case isWildcard(host):
		c.reject(p, "write a host that other nodes can dial", "other nodes can't dial %q", advertise)
	case port == 0:
		return net.JoinHostPort(host, strconv.Itoa(bound))
	}
	return advertise
}

// distinctPorts refuses two sections with one tcp port. Without it the start would fail
// with a worse message.
func (c *configCheck) distinctPorts() {
	type address struct {
		section, host string
		port          int
	}
	var seen []address
	for _, s := range []struct{ section, bind string }{
		{"api", c.API.Bind}, {"admin", c.Admin.Bind}, {"metrics", c.Metrics.Bind}, {"gossip", c.Gossip.Bind}, {"rpc", c.RPC.Bind},
	} {
		host, port, ok := splitAddress(s.bind)
		if !ok || port == 0 {
			continue
		}
		for _, o := range seen {
			if o.port == port && (o.host == host || isWildcard(o.host) || isWildcard(host)) {
				c.reject(config.At(s.section, "bind"), "choose another port", "port %d is already used by %s.bind", port, o.section)
				break
			}
		}
		seen = append(seen, address{s.section, host, port})
	}
}

func (c *configCheck) seeds() {
	if len(c.Seeds) > maxSeeds {
		c.reject(config.At("seeds"), "name a few nodes of each site", "has %d entries, more than the limit of %d", len(c.Seeds), maxSeeds)
		return
	}
	for i, s := range c.Seeds {
		p := config.At("seeds", i)
		host, port, ok := splitAddress(s)
		switch {
		case !ok || isWildcard(host) || port == 0:
			c.reject(p, "write the rpc address of another node, such as 10.0.0.6:7957", "%q is not an address", s)
		case slices.Contains(c.Seeds[:i], s):
			c.reject(p, "remove it", "%q is listed twice", s)
		}
	}
}

func (c *configCheck) operatorKey() {
	p := config.At("operator_key")
	const hint = "write {file: PATH} or {env: NAME}"
	switch k := c.OperatorKey; {
	case k.IsZero():
		c.missing(p, hint+"; the key has 32 random bytes in base64, as head -c 32 /dev/urandom | base64 prints them")
	case k.Env != "" && k.File != "":
		c.reject(p, hint+", not both", "has both env and file")
	}
	p = config.At("operator_key_previous")
	switch k := c.OperatorKeyPrevious; {
	case k.IsZero() && c.src.Has(p):
		c.missing(p, hint+", or remove it")
	case k.Env != "" && k.File != "":
		c.reject(p, hint+", not both", "has both env and file")
	case !k.IsZero() && k == c.OperatorKey:
		c.reject(p, "write the key that operator_key replaces, or remove it", "is the same as operator_key")
	}
}

// splitAddress reads host:port. An empty host is a wildcard.
func splitAddress(s string) (host string, port int, ok bool) {
	host, text, err := net.SplitHostPort(s)
	if err != nil || text == "" || len(text) > 5 || strings.Trim(text, "0123456789") != "" {
		return "", 0, false
	}
	port, err = strconv.Atoi(text)
	if err != nil || port > 65535 || !validHost(host) {
		return "", 0, false
	}
	return host, port, true
}

func validHost(host string) bool {
	if _, err := netip.ParseAddr(host); err == nil || host == "" {
		return true
	}
	if len(host) > 253 || strings.HasPrefix(host, ".") || strings.Contains(host, "..") {
		return false
	}
	return !strings.ContainsFunc(host, func(r rune) bool {
		return (r < 'a' || r > 'z') && (r < 'A' || r > 'Z') && (r < '0' || r > '9') && r != '-' && r != '.' && r != '_'
	})
}

func isWildcard(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "" || err == nil && ip.IsUnspecified()
}

func isLoopback(host string) bool {
	ip, err := netip.ParseAddr(host)
	return host == "localhost" || err == nil && ip.IsLoopback()
}

// ErrGossipKey means that a text is not a gossip key.
var ErrGossipKey = errors.New("not a gossip key")

const (
	gossipKeySize = 32
	gossipKeyHint = "write a file with 32 random bytes in base64, the same on all nodes, as head -c 32 /dev/urandom | base64 prints them"
)

// ParseGossipKey reads 32 bytes in base64. It ignores white space around them.
func ParseGossipKey(text []byte) ([]byte, error) {
	key, err := base64.StdEncoding.Strict().DecodeString(strings.TrimSpace(string(text)))
	if err != nil || len(key) != gossipKeySize {
		return nil, fmt.Errorf("%w: want %d bytes in base64", ErrGossipKey, gossipKeySize)
	}
	return key, nil
}

// secretFiles are the files that nobody else may read, by their keys.
func (c *Config) secretFiles() map[string]string {
	return map[string]string{
		"rpc.tls.key_file": c.RPC.TLS.KeyFile, "api.tls.key_file": c.API.TLS.KeyFile, "admin.tls.key_file": c.Admin.TLS.KeyFile,
		"admin.token_file": c.Admin.TokenFile, "gossip.key_file": c.Gossip.KeyFile,
	}
}

// openMode says what is wrong with the mode of a file that holds a secret, and what to do;
// both are empty if nothing is. A group may read it: that is how services and Kubernetes
// (fsGroup) share a certificate. The operator's key has a check of its own, which allows
// only its owner.
func openMode(file string) (what, hint string) {
	info, err := os.Stat(file)
	if err != nil || runtime.GOOS == "windows" { // who reads the file reports the error
		return "", ""
	}
	mode := info.Mode().Perm()
	switch {
	case mode&0o007 != 0:
		what = "every user of this machine has access to it"
	case mode&0o020 != 0:
		what = "its group may change it"
	default:
		return "", ""
	}
	return fmt.Sprintf("the file %s has mode %04o: %s", file, mode, what), "run: chmod 600 " + file + " (640 if a group must read it)"
}

// checkFiles checks the files and environment variables that the configuration names.
func (c *Config) checkFiles(src *config.Source) {
	at := config.At("rpc", "tls")
	if t := c.RPC.TLS; t.CertFile != "" && t.KeyFile != "" {
		if pair, ok := src.CheckKeyPair(at, t.CertFile, t.KeyFile, readBounded); ok {
			id, err := mesh.ParseIdentity(pair.Leaf)
			want := mesh.Identity{Cluster: c.Cluster, Site: c.Site, Node: c.Name}
			const hint = "issue one for this node with dsnode tls issue, or correct cluster, site and name"
			switch {
			case err != nil:
				src.Reject(at.At("cert_file"), err.Error(), hint)
			case want.Validate() != nil:
				// The check of the names has reported it.
			case id != want:
				src.Reject(at.At("cert_file"), fmt.Sprintf("the certificate is for %s, not for %s", id, want), hint)
			}
		}
	}
	if c.RPC.TLS.CAFile != "" {
		src.CheckCA(at.At("ca_file"), c.RPC.TLS.CAFile, readBounded)
	}
	for section, t := range map[string]ServerTLS{"api": c.API.TLS, "admin": c.Admin.TLS} {
		if t.CertFile != "" && t.KeyFile != "" {
			src.CheckKeyPair(config.At(section, "tls"), t.CertFile, t.KeyFile, readBounded)
		}
	}
	for key, file := range c.secretFiles() {
		if what, hint := openMode(file); what != "" {
			var parts []any
			for part := range strings.SplitSeq(key, ".") {
				parts = append(parts, part)
			}
			src.Reject(config.At(parts...), what, hint)
		}
	}
	if c.Admin.TokenFile != "" {
		src.CheckSecret(config.At("admin", "token_file"), config.Secret{File: c.Admin.TokenFile}, os.LookupEnv, readBounded)
	}
	if c.Gossip.KeyFile != "" {
		if text, ok := src.CheckFile(config.At("gossip", "key_file"), c.Gossip.KeyFile, readBounded); ok {
			if _, err := ParseGossipKey(text); err != nil {
				src.Reject(config.At("gossip", "key_file"), "the file "+c.Gossip.KeyFile+" is not a gossip key", gossipKeyHint)
			}
		}
	}
	for name, k := range map[string]config.Secret{"operator_key": c.OperatorKey, "operator_key_previous": c.OperatorKeyPrevious} {
		if ref := keyring.KeyRef(k); (ref.Env == "") != (ref.File == "") {
			if _, err := keyring.LoadOperatorKey(ref); err != nil {
				src.Reject(config.At(name), err.Error(), "")
			}
		}
	}
}
