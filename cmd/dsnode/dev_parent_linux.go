package main

import "syscall"

// endWithParent makes the kernel kill the child when the thread that started it ends,
// so that no node outlives a killed dev.
func endWithParent(attr *syscall.SysProcAttr) { attr.Pdeathsig = syscall.SIGKILL }
