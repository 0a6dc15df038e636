//go:build !linux

package main

import "syscall"

// endWithParent can't be had here: children of a dev that was killed live on
// and are ended by the next dev on the same directory's ports, by hand.
func endWithParent(*syscall.SysProcAttr) {}
