//go:build !linux

package main

import "syscall"

// endWithParent does nothing: only Linux can end a child with its parent. Children of
// a killed dev go on and hold their ports until somebody ends them.
func endWithParent(*syscall.SysProcAttr) {}
