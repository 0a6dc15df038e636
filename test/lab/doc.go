// Package lab runs sites as real processes on links with delay, loss and cuts.
//
// Each site has a network namespace. Its only route to the other sites is a TUN
// device whose other end is this process. Network (network.go) carries IP packets
// from site to site; Link (link.go) says, for each ordered pair of sites, how
// packets are delayed and dropped. So packets are really lost, a link can be cut in
// one direction only, and the program under test contains no code for tests.
//
// Start (lab.go) is where to begin reading: it builds the binary, writes
// certificates, keys and node.yaml files, starts the nodes, bootstraps the cluster,
// and checks the design's laws at the end of every test.
package lab
