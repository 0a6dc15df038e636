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

// Config is node.yaml: what one node alone knows. What the whole cluster agrees
// on is cluster.Config. LoadConfig and ParseConfig are its makers outside tests
// and dev mode; what they return is complete (no defaults left to fill in) and
// has absolute paths.
type Config struct {
	Version int `yaml:"version"`
	// Cluster, Site and Name are what the rpc certificate must say too.
	Cluster string `yaml:"cluster"`
	Name    string `yaml:"name"`
	Site    string `yaml:"site"`
	DataDir string `yaml:"data_dir"`

	API     APIConfig     `yaml:"api"`
	Admin   AdminConfig   `yaml:"admin"`
	Metrics MetricsConfig `yaml:"metrics,omitempty"`
	Gossip  GossipConfig  `yaml:"gossip"`
	RPC     RPCConfig     `yaml:"rpc"`

	// Seeds are rpc addresses of other nodes: whom to ask when nobody is known.
	Seeds       []string      `yaml:"seeds,omitempty"`
	OperatorKey config.Secret `yaml:"operator_key"`
	// OperatorKeyPrevious still opens things while the cluster changes to
	// another operator key.
	OperatorKeyPrevious config.Secret  `yaml:"operator_key_previous,omitempty"`
	Shutdown            ShutdownConfig `yaml:"shutdown"`
	Log                 LogConfig      `yaml:"log"`

	dir string // node.yaml's, absolute; what relative paths start from
}

// APIConfig is the door for clients.
type APIConfig struct {
	Bind string `yaml:"bind"` // host:port; port 0 takes a free one
	// Advertise is how others reach Bind. Its port is never 0 unless Bind's is:
	// then the real port is known only after listening.
	Advertise string    `yaml:"advertise,omitempty"`
	TLS       ServerTLS `yaml:"tls,omitempty"` // zero: plain HTTP
}

// AdminConfig is the door for operators.
type AdminConfig struct {
	Bind      string `yaml:"bind"`
	Advertise string `yaml:"advertise,omitempty"`
	// TokenFile holds the operator's bearer token; "" asks for none, which only
	// loopback may do.
	TokenFile string    `yaml:"token_file,omitempty"`
	TLS       ServerTLS `yaml:"tls,omitempty"`
}

// MetricsConfig is a door that shows metrics alone, to anybody.
type MetricsConfig struct {
	Bind string `yaml:"bind,omitempty"` // "": off
}

// GossipConfig is membership, over tcp and udp.
type GossipConfig struct {
	Bind      string `yaml:"bind"`
	Advertise string `yaml:"advertise,omitempty"`
	KeyFile   string `yaml:"key_file"` // see ParseGossipKey
}

// RPCConfig is the door for peers, with mutual TLS.
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

// PeerTLS is a node's identity and the authority that peers must be of.
type PeerTLS struct {
	CertFile string `yaml:"cert_file"`
	KeyFile  string `yaml:"key_file"`
	CAFile   string `yaml:"ca_file"`
}

// ShutdownConfig is how SIGTERM is answered.
type ShutdownConfig struct {
	// Delay is how long the listeners stay after readiness has gone, so that
	// load balancers notice first.
	Delay config.Duration `yaml:"delay"`
	// Grace is how long running requests may take to finish after that.
	Grace config.Duration `yaml:"grace"`
}

// LogConfig says what is logged.
type LogConfig struct {
	Level string `yaml:"level"` // debug, info, warn or error
}

// DefaultConfig is what a node.yaml need not say. Names, certificates and keys
// are missing.
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

// LoadConfig reads a node.yaml and checks everything that can be known without
// starting: its text and the files and variables that it names. The error is a
// cluster.Problems with all that is wrong.
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

// ParseConfig checks the text of a node.yaml alone and opens no file. name
// stands in the messages; relative paths start from dir. The error is a
// cluster.Problems with all that is wrong.
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

// Path makes a path absolute as node.yaml's own are: from the directory that
// node.yaml is in. The files that cluster.yaml names are found in the same way.
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

// errTooLarge is a file that can't be what it is named as.
var errTooLarge = fmt.Errorf("has more than %d bytes", config.MaxBytes)

// readBounded reads a file that a configuration names, of at most the size that
// a configuration itself may have. Its errors are PathErrors.
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
