//go:build race

package failover

// raceDetector makes virtual time several times slower.
const raceDetector = true
