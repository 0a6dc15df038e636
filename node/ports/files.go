package ports

// Shares are how a node divides the files that its process may have open. A connection is
// an open file, and a request that is being answered needs another one for its upstream.
type Shares struct {
	Clients  int // connections of the api port
	InFlight int // requests of clients and peers that are answered at once
	Admin    int // connections of the admin port
	Metrics  int // connections of the metrics port
	// Peers are the connections of the rpc port, in both directions; Handshakes those of it
	// whose peer is not known yet.
	Peers, Handshakes int
}

// own are the files of the node itself: journals, tables, the cache's segments, Raft's
// files, gossip, listeners, lookups of names, the log.
const own = 64

// Divide is how many of each a process with so many open files may have. What neither the
// node itself nor its operators and peers need is for clients, half of it for the
// connections to upstreams. Bounds that the configuration sets apply too.
func Divide(files int) Shares {
	s := Shares{
		Admin: clamp(files/16, 8, 128), Metrics: clamp(files/64, 4, 32),
		Peers: clamp(files/8, 48, 8192), Handshakes: clamp(files/16, 16, 128),
	}
	rest := files - own - files/64 - s.Admin - s.Metrics - s.Peers - s.Handshakes
	s.Clients = max(rest/2, 8)
	s.InFlight = s.Clients
	return s
}

func clamp(n, least, most int) int { return min(max(n, least), most) }
