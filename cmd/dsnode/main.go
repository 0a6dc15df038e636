// Command dsnode is the only binary of a cluster: it runs a node, runs a whole
// cluster on one machine for development (dev), and is the operators' CLI.
//
// Each file holds one command: its flags, its output and its error texts. The work
// is done by the packages below. environment.go has what a command takes from the
// process (streams, variables), exit.go maps errors to exit codes. Start reading at
// newRootCommand.
package main

import "os"

// version is set by the linker: -ldflags "-X main.version=0.1.0".
var version string

func main() {
	os.Exit(run(os.Args[1:], &environment{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		getenv: os.Getenv, cacheDir: os.UserCacheDir, version: stampedVersion(version),
	}))
}
