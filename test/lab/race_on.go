//go:build linux && race

package lab

// raceDetector reports whether this binary is built with it.
const raceDetector = true
