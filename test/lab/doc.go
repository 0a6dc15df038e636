// Package lab runs sites as real processes on links that delay, lose and cut.
//
// Each site lives in a network namespace of its own. Its only way to the other
// sites is a TUN device whose other end is this process: Network (network.go)
// carries IP packets from site to site and does to them, per ordered pair of
// sites, what Link (link.go) says. So loss is loss of packets, a cut in one
// direction is one, and the program under test knows nothing of all this.
//
// Start builds the binary, writes certificates, keys and node.yaml files,
// starts and bootstraps the nodes, and checks the laws at the end of every test.
// Start reading there (lab.go).
package lab
