// Command dsnode is the one binary of a cluster: it runs a node, rehearses a
// whole cluster on one machine, and is the operator's hand on both.
//
// Each file holds one command with its flags and its words. What a command
// does is in the packages below; what it sees of the world is an environment;
// how it ends is in exit.go. Start reading at newRootCommand.
package main

import "os"

// version is stamped by the linker: -ldflags "-X main.version=0.1.0".
var version string

func main() {
	os.Exit(run(os.Args[1:], &environment{
		stdin: os.Stdin, stdout: os.Stdout, stderr: os.Stderr,
		getenv: os.Getenv, cacheDir: os.UserCacheDir, version: stampedVersion(version),
	}))
}
