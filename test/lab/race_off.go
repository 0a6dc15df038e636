//go:build linux && !race

package lab

// raceDetector is whether this test binary has it.
const raceDetector = false
