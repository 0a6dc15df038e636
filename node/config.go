package node

import (
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"syscall"
	"time"

	"go.yaml.in/yaml/v4"

	"github.com/dsnode/dsnode/cluster/config"
)

// Config is node.yaml: the settings of one node. The settings that the cluster agrees on
// are config.Config. LoadConfig and ParseConfig return a Config with all defaults filled
// in and with absolute paths.
type Config struct {
	Version int `yaml:"version"`
	// Cluster, Site and Name must match the rpc certificate.
	Cluster string `yaml:"cluster"`
	Name    string `yaml:"name"`
	Site    string `yaml:"site"`
	DataDir string `yaml:"data_dir"`

	API     APIConfig     `yaml:"api"`
	Admin   AdminConfig   `yaml:"admin"`
	Metrics MetricsConfig `yaml:"metrics,omitempty"`
	Gossip  GossipConfig  `yaml:"gossip"`
	RPC     RPCConfig     `yaml:"rpc"`

	// Seeds are rpc addresses of other nodes. A node that knows no members asks them.
	Seeds       []string      `yaml:"seeds,omitempty"`
	OperatorKey config.Secret `yaml:"operator_key"`
	// OperatorKeyPrevious opens what the current operator key does not open yet, while
	// the cluster changes to another operator key.
	OperatorKeyPrevious config.Secret `yaml:"operator_key_previous,omitempty"`
	// FeatureLevel holds the cluster at this feature level, so that it can go back to an
	// older version; 0: the newest level of this version.
	FeatureLevel int            `yaml:"feature_level,omitempty"`
	Shutdown     ShutdownConfig `yaml:"shutdown"`
	Log          LogConfig      `yaml:"log"`

	dir string // of node.yaml, absolute; relative paths start there
}

// APIConfig is the port for clients.
type APIConfig struct {
	Bind string `yaml:"bind"` // host:port; port 0 takes a free one
	// Advertise is the address of Bind for others. Its port is 0 only if Bind's is:
	// then the real port is known only after the port is open.
	Advertise string    `yaml:"advertise,omitempty"`
	TLS       ServerTLS `yaml:"tls,omitempty"` // zero: plain HTTP
}

// AdminConfig is the port for operators.
type AdminConfig struct {
	Bind      string `yaml:"bind"`
	Advertise string `yaml:"advertise,omitempty"`
	// TokenFile holds the operator's bearer token. It may be empty (no token is asked for)
	// only on loopback.
	TokenFile string    `yaml:"token_file,omitempty"`
	TLS       ServerTLS `yaml:"tls,omitempty"`
}

// MetricsConfig is a port that serves metrics only, without authentication.
type MetricsConfig struct {
	Bind string `yaml:"bind,omitempty"` // "": off
}

// GossipConfig is the port for membership, tcp and udp.
type GossipConfig struct {
	Bind      string `yaml:"bind"`
	Advertise string `yaml:"advertise,omitempty"`
	KeyFile   string `yaml:"key_file"` // see ParseGossipKey
}

// RPCConfig is the port for peers, with mutual TLS.
type RPCConfig struct {
	Bind      string  `yaml:"bind"`
	Advertise string  `yaml:"advertise,omitempty"`
	TLS       PeerTLS `yaml:"tls"`
}

// ServerTLS is a certificate with its key, in PEM files.
type ServerTLS struct {
	CertFile string `yaml:"cert_file,omitempty"`
	KeyFile  string `yaml:"key_file,omitempty"`
}

// On reports whether TLS is configured.
func (t ServerTLS) On() bool { return t != ServerTLS{} }

// PeerTLS has the node's certificate, and the authority that must have issued the
// certificates of its peers.
type PeerTLS struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	CAFile   string `yaml:"ca_file"`
}

// ShutdownConfig says how the node stops at SIGTERM.
type ShutdownConfig struct {
	// Delay is how long the node serves on after it reports that it is not ready, so that
	// load balancers notice first.
	Delay config.Duration `yaml:"delay"`
	// Grace is how long running requests may take after that.
	Grace config.Duration `yaml:"grace"`
}

// LogConfig configures the log.
type LogConfig struct {
	Level string `yaml:"level"` // debug, info, warn or error
}

// DefaultConfig has the defaults. Names, certificates and keys have none.
func DefaultConfig() *Config {
	return &Config{
		Version: 1,
		DataDir: "/var/lib/dsnode",
		API:     APIConfig{Bind: "0.0.0.0:8080"},
		Admin:   AdminConfig{Bind: "127.0.0.1:8081"},
		Gossip:  GossipConfig{Bind: "0.0.0.0:7956"},
		RPC:     RPCConfig{Bind: "0.0.0.0:7957"},
		Shutdown: ShutdownConfig{
			Grace: config.Duration(30 * time.Second),
		},
		Log: LogConfig{Level: "info"},
	}
}

// LoadConfig reads a node.yaml and checks its text, and the files and environment variables
// that it names. The error is a config.Problems that lists all mistakes.
func LoadConfig(path string) (*Config, error) {
	text, err := readBounded(path)
	if err != nil {
		return nil, fmt.Errorf("read node configuration: %w", err)
	}
	dir, err := filepath.Abs(filepath.Dir(path))
	if err != nil {
		return nil, fmt.Errorf("find the directory of %s: %w", path, err)
	}
	c, src := parseConfig(path, text, dir)
	if !src.Broken(nil) {
		c.checkFiles(src)
	}
	if err := src.Err(); err != nil {
		return nil, err
	}
	return c, nil
}

// ParseConfig checks the text of a node.yaml and opens no file. name is the file's name in
// messages, and relative paths start from dir. The error is a config.Problems that lists
// all mistakes.
func ParseConfig(name string, text []byte, dir string) (*Config, error) {
	c, src := parseConfig(name, text, dir)
	if err := src.Err(); err != nil {
		return nil, err
	}
	return c, nil
}

func parseConfig(name string, text []byte, dir string) (*Config, *config.Source) {
	c := DefaultConfig()
	src := config.Decode(name, text, c)
	c.dir = dir
	if !src.Broken(nil) {
		check := &configCheck{Config: c, src: src}
		check.all()
		c.resolvePaths()
	}
	return c, src
}

func (c *Config) resolvePaths() {
	for _, p := range []*string{
		&c.DataDir, &c.API.TLS.CertFile, &c.API.TLS.KeyFile,
		&c.Admin.TokenFile, &c.Admin.TLS.CertFile, &c.Admin.TLS.KeyFile, &c.Gossip.KeyFile,
		&c.RPC.TLS.CertFile, &c.RPC.TLS.KeyFile, &c.RPC.TLS.CAFile, &c.OperatorKey.File, &c.OperatorKeyPrevious.File,
	} {
		if *p != "" {
			*p = c.Path(*p)
		}
	}
}

// Path makes a path absolute, starting from the directory of node.yaml. The files that
// cluster.yaml names are found in the same way.
func (c *Config) Path(p string) string {
	if filepath.IsAbs(p) || c.dir == "" {
		return filepath.Clean(p)
	}
	return filepath.Join(c.dir, p)
}

// Encode writes the configuration as a node.yaml that LoadConfig reads back.
func (c *Config) Encode() ([]byte, error) {
	text, err := yaml.Dump(c, yaml.WithIndent(2), yaml.WithLineWidth(-1))
	if err != nil {
		return nil, fmt.Errorf("encode node configuration: %w", err)
	}
	return text, nil
}

var errTooLarge = fmt.Errorf("has more than %d bytes", config.MaxBytes)

// readBounded reads a file of at most config.MaxBytes. Its errors are PathErrors.
func readBounded(path string) ([]byte, error) {
	info, err := os.Stat(path)
	if err != nil {
		return nil, err
	}
	switch {
	case info.IsDir():
		return nil, &fs.PathError{Op: "read", Path: path, Err: syscall.EISDIR}
	case info.Size() > config.MaxBytes:
		return nil, &fs.PathError{Op: "read", Path: path, Err: errTooLarge}
	}
	return os.ReadFile(path)
}
