package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"os"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node/gateway"
)

// doors are the node's ports and what listens on them.
type doors struct {
	rpc                         net.Listener // the cluster serves and closes it
	rpcAddr, apiAddr, adminAddr string
	adminToken                  string
	pairs                       []*keyPair

	// clients are shut down gracefully when the node drains: the api port and
	// the peers' door. The others stay until the end.
	clients, operators []door
}

type door struct {
	name   string
	ln     net.Listener
	tls    *tls.Config // nil: plain
	server *http.Server
}

// listen opens the ports. The handlers come later (equip), because what they
// say of this node holds the real ports.
func (n *Node) listen() error {
	open := func(name, bind string) (net.Listener, error) {
		ln, err := net.Listen("tcp", bind)
		if err != nil {
			return nil, fmt.Errorf("listen on the %s port: %w: is another node running here? choose another %s.bind", name, err, name)
		}
		n.onStop(name+" port", func() error { return closed(ln.Close()) })
		return ln, nil
	}
	var err error
	if n.doors.rpc, err = open("rpc", n.cfg.RPC.Bind); err != nil {
		return err
	}
	api, err := open("api", n.cfg.API.Bind)
	if err != nil {
		return err
	}
	adm, err := open("admin", n.cfg.Admin.Bind)
	if err != nil {
		return err
	}
	n.doors.rpcAddr = advertised(n.cfg.RPC.Advertise, n.doors.rpc)
	n.doors.apiAddr = advertised(n.cfg.API.Advertise, api)
	n.doors.adminAddr = advertised(n.cfg.Admin.Advertise, adm)

	apiTLS, err := n.doors.pair(n.cfg.API.TLS)
	if err != nil {
		return err
	}
	adminTLS, err := n.doors.pair(n.cfg.Admin.TLS)
	if err != nil {
		return err
	}
	if n.cfg.Admin.TokenFile != "" {
		text, err := readBounded(n.cfg.Admin.TokenFile)
		if err != nil {
			return fmt.Errorf("read the operator's token: %w", err)
		}
		n.doors.adminToken = strings.TrimSpace(string(text))
	}

	n.doors.clients = []door{{name: "api", ln: api, tls: apiTLS}}
	n.doors.operators = []door{{name: "admin", ln: adm, tls: adminTLS}}
	if n.cfg.Metrics.Bind != "" {
		ln, err := open("metrics", n.cfg.Metrics.Bind)
		if err != nil {
			return err
		}
		n.doors.operators = append(n.doors.operators, door{name: "metrics", ln: ln})
	}
	return nil
}

// equip puts the handlers behind the open ports.
func (n *Node) equip() {
	server := func(d *door, h http.Handler) {
		d.server = gateway.NewHTTPServer(h, config.DefaultLimits().HeaderBytes, n.log)
		d.server.TLSConfig = d.tls
	}
	api := &n.doors.clients[0]
	api.ln = n.gateway.Listen(api.ln, api.tls != nil)
	server(api, n.gateway)
	peers := door{name: "peers", ln: n.cluster.Mesh().Listener(mesh.KindHTTP)}
	server(&peers, n.gateway.PeerHandler())
	peers.server.ConnContext = mesh.HTTPConnContext
	n.doors.clients = append(n.doors.clients, peers)

	metrics := http.NewServeMux()
	metrics.Handle("GET /metrics", promhttp.HandlerFor(n.reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	for i := range n.doors.operators {
		switch d := &n.doors.operators[i]; d.name {
		case "admin":
			server(d, n.admin)
		case "metrics":
			server(d, metrics)
		}
	}
}

// advertised is the configured address, with the real port where port 0 was
// asked for, or the bound address where nothing was configured.
func advertised(configured string, ln net.Listener) string {
	host, port, err := net.SplitHostPort(configured)
	if err != nil {
		return ln.Addr().String()
	}
	if port == "0" {
		_, port, _ = net.SplitHostPort(ln.Addr().String()) // a listener's address is host:port
	}
	return net.JoinHostPort(host, port)
}

// serve starts every door.
func (d *doors) serve(g *errgroup.Group) {
	for _, door := range append(append([]door{}, d.clients...), d.operators...) {
		g.Go(func() error {
			var err error
			if door.tls != nil {
				err = door.server.ServeTLS(door.ln, "", "")
			} else {
				err = door.server.Serve(door.ln)
			}
			if errors.Is(err, http.ErrServerClosed) || closed(err) == nil {
				return nil
			}
			return fmt.Errorf("serve the %s port: %w", door.name, err)
		})
	}
}

// shutdown lets what runs at the clients' doors finish, all at once.
func (d *doors) shutdown(ctx context.Context) error {
	g := errgroup.Group{}
	for _, door := range d.clients {
		g.Go(func() error {
			if err := door.server.Shutdown(ctx); err != nil {
				return fmt.Errorf("%s port: %w", door.name, errors.Join(err, door.server.Close()))
			}
			return nil
		})
	}
	return g.Wait()
}

// close ends every door at once.
func (d *doors) close() {
	for _, door := range append(append([]door{}, d.clients...), d.operators...) {
		_ = door.server.Close() // it closes listeners and connections; nothing is under way any more
	}
}

// closed is nil for an error that only says that something is closed already.
func closed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// keyPair is a door's certificate, replaced by Reload.
type keyPair struct {
	files   ServerTLS
	current atomic.Pointer[tls.Certificate]
}

// pair gives a TLS configuration that follows the files, nil for plain HTTP.
func (d *doors) pair(files ServerTLS) (*tls.Config, error) {
	if !files.On() {
		return nil, nil
	}
	p := &keyPair{files: files}
	if err := p.load(); err != nil {
		return nil, err
	}
	d.pairs = append(d.pairs, p)
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"}, // one stream a connection: a slow client slows nobody else
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.current.Load(), nil },
	}, nil
}

func (p *keyPair) load() error {
	cert, err := os.ReadFile(p.files.CertFile)
	if err != nil {
		return fmt.Errorf("read certificate: %w", err)
	}
	key, err := os.ReadFile(p.files.KeyFile)
	if err != nil {
		return fmt.Errorf("read certificate's key: %w", err)
	}
	c, err := tls.X509KeyPair(cert, key)
	if err != nil {
		return fmt.Errorf("certificate %s with key %s: %w", p.files.CertFile, p.files.KeyFile, err)
	}
	p.current.Store(&c)
	return nil
}

func (d *doors) reload() error {
	var errs []error
	for _, p := range d.pairs {
		errs = append(errs, p.load())
	}
	return errors.Join(errs...)
}
