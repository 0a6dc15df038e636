package node

import (
	"context"
	"crypto/tls"
	"errors"
	"fmt"
	"net"
	"net/http"
	"slices"
	"strings"
	"sync/atomic"
	"time"

	"github.com/prometheus/client_golang/prometheus/promhttp"
	"golang.org/x/sync/errgroup"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/ports"
)

// listeners are the node's open ports and their HTTP servers.
type listeners struct {
	rpc                         net.Listener // the cluster serves and closes it
	rpcAddr, apiAddr, adminAddr string       // as others reach them
	adminToken                  string
	pairs                       []*keyPair

	// clients (the api port, and HTTP requests of peers on the rpc port) are shut down
	// gracefully when the node drains. operators (admin, metrics) stay open until the
	// end.
	clients, operators []listener
}

type listener struct {
	name   string
	ln     net.Listener
	tls    *tls.Config // nil: plain
	server *http.Server
}

func (l *listeners) all() []listener { return slices.Concat(l.clients, l.operators) }

// listen opens the ports. setHandlers follows later, because the handlers need the real
// port numbers.
func (n *Node) listen() error {
	open := func(name, bind string) (net.Listener, error) {
		ln, err := n.host.Listen(bind)
		if err != nil {
			return nil, fmt.Errorf("listen on the %s port: %w: is another node running here? choose another %s.bind", name, err, name)
		}
		n.onStop(name+" port", func() error { return ignoreClosed(ln.Close()) })
		return ln, nil
	}
	l := &n.listeners
	var err error
	if l.rpc, err = open("rpc", n.cfg.RPC.Bind); err != nil {
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
	l.rpcAddr = advertised(n.cfg.RPC.Advertise, l.rpc)
	l.apiAddr = advertised(n.cfg.API.Advertise, api)
	l.adminAddr = advertised(n.cfg.Admin.Advertise, adm)

	apiTLS, err := l.tlsConfig(n.cfg.API.TLS)
	if err != nil {
		return err
	}
	adminTLS, err := l.tlsConfig(n.cfg.Admin.TLS)
	if err != nil {
		return err
	}
	if n.cfg.Admin.TokenFile != "" {
		text, err := readBounded(n.cfg.Admin.TokenFile)
		if err != nil {
			return fmt.Errorf("read the operator's token: %w", err)
		}
		l.adminToken = strings.TrimSpace(string(text))
	}

	l.clients = []listener{{name: "api", ln: api, tls: apiTLS}}
	l.operators = []listener{{name: "admin", ln: adm, tls: adminTLS}}
	if n.cfg.Metrics.Bind != "" {
		ln, err := open("metrics", n.cfg.Metrics.Bind)
		if err != nil {
			return err
		}
		l.operators = append(l.operators, listener{name: "metrics", ln: ln})
	}
	return nil
}

// setHandlers makes the HTTP servers.
func (n *Node) setHandlers() {
	headerBytes := config.DefaultLimits().HeaderBytes
	server := func(l *listener, h http.Handler, o ports.Options) {
		o.Registerer = n.reg
		p := ports.New(o)
		l.ln = p.Listen(l.ln, l.tls != nil)
		l.server = p.Server(h, headerBytes, n.log)
		l.server.TLSConfig = l.tls
	}
	server(&n.listeners.clients[0], n.gateway, ports.Options{
		Name: "client", Refusal: n.gateway.RefuseConnection, WriteTolerance: 4 * time.Second,
		Limit: func() int { return min(n.gateway.Connections(), n.shares.Clients) },
	})
	peers := listener{name: "peers", ln: n.cluster.Mesh().Listener(mesh.KindHTTP)}
	peers.server = ports.NewHTTPServer(n.cluster.MembersOnly(mesh.AnswerProbes(n.gateway.PeerHandler())), headerBytes, n.log)
	peers.server.ConnContext = mesh.HTTPConnContext
	n.listeners.clients = append(n.listeners.clients, peers)

	metrics := http.NewServeMux()
	metrics.Handle("GET /metrics", promhttp.HandlerFor(n.reg, promhttp.HandlerOpts{MaxRequestsInFlight: 4, Timeout: 10 * time.Second}))
	for i := range n.listeners.operators {
		switch l := &n.listeners.operators[i]; l.name {
		case "admin":
			server(l, n.admin, ports.Options{Name: "admin", Limit: func() int { return n.shares.Admin }})
		case "metrics":
			server(l, admin.ForMetrics(metrics), ports.Options{Name: "metrics", Limit: func() int { return n.shares.Metrics }})
		}
	}
}

// advertised is the configured address, with the real port if port 0 was configured. If no
// address was configured, it is the bound one.
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

// serve starts all HTTP servers.
func (l *listeners) serve(g *errgroup.Group) {
	for _, l := range l.all() {
		g.Go(func() error {
			var err error
			if l.tls != nil {
				err = l.server.ServeTLS(l.ln, "", "")
			} else {
				err = l.server.Serve(l.ln)
			}
			if errors.Is(err, http.ErrServerClosed) || ignoreClosed(err) == nil {
				return nil
			}
			return fmt.Errorf("serve the %s port: %w", l.name, err)
		})
	}
}

// shutdown lets the requests of clients finish, on all ports at once. What still runs when
// ctx ends is cut off, and the error says so.
func (l *listeners) shutdown(ctx context.Context) error {
	g := errgroup.Group{}
	for _, l := range l.clients {
		g.Go(func() error {
			if err := l.server.Shutdown(ctx); err != nil {
				return fmt.Errorf("%s port: %w", l.name, errors.Join(err, l.server.Close()))
			}
			return nil
		})
	}
	return g.Wait()
}

// close closes all listeners and connections at once.
func (l *listeners) close() {
	for _, l := range l.all() {
		_ = l.server.Close() // an error changes nothing: no request is running
	}
}

// ignoreClosed returns nil for the error that something is closed already.
func ignoreClosed(err error) error {
	if errors.Is(err, net.ErrClosed) {
		return nil
	}
	return err
}

// keyPair is the certificate of a port. Reload replaces it.
type keyPair struct {
	files   ServerTLS
	current atomic.Pointer[tls.Certificate]
}

// tlsConfig returns a TLS configuration that always uses the certificate loaded last, nil
// for plain HTTP.
func (l *listeners) tlsConfig(files ServerTLS) (*tls.Config, error) {
	if !files.On() {
		return nil, nil
	}
	p := &keyPair{files: files}
	if err := p.load(); err != nil {
		return nil, err
	}
	l.pairs = append(l.pairs, p)
	return &tls.Config{
		MinVersion:     tls.VersionTLS12,
		NextProtos:     []string{"http/1.1"}, // not h2: a slow client must not delay other streams of its connection
		GetCertificate: func(*tls.ClientHelloInfo) (*tls.Certificate, error) { return p.current.Load(), nil },
	}, nil
}

func (p *keyPair) load() error {
	c, err := tls.LoadX509KeyPair(p.files.CertFile, p.files.KeyFile)
	if err != nil {
		return fmt.Errorf("load certificate %s with key %s: %w", p.files.CertFile, p.files.KeyFile, err)
	}
	p.current.Store(&c)
	return nil
}

func (l *listeners) reload() error {
	var errs []error
	for _, p := range l.pairs {
		errs = append(errs, p.load())
	}
	return errors.Join(errs...)
}
