package node

import (
	"io/fs"
	"math"
	"path"
	"strconv"
	"strings"
)

// machineMemory is how much memory this process may use, in bytes: that of the machine, or
// less if a cgroup allows less. It is false if the system doesn't tell. root is the root of
// the file system.
func machineMemory(root fs.FS) (bytes int64, known bool) {
	bytes = math.MaxInt64
	for line := range strings.Lines(text(root, "proc/meminfo")) {
		if f := strings.Fields(line); len(f) == 3 && f[0] == "MemTotal:" && f[2] == "kB" {
			if n, err := strconv.ParseInt(f[1], 10, 64); err == nil && n > 0 {
				bytes = min(bytes, n<<10)
			}
		}
	}
	// A line is id:controllers:path; version 2 has no controllers. In a container the path
	// may be that of the host, and the limit is at the root. A parent's limit counts too.
	for line := range strings.Lines(text(root, "proc/self/cgroup")) {
		f := strings.SplitN(strings.TrimSpace(line), ":", 3)
		if len(f) != 3 {
			continue
		}
		dir, file := "sys/fs/cgroup", "memory.max"
		if f[1] == "memory" {
			dir, file = "sys/fs/cgroup/memory", "memory.limit_in_bytes"
		} else if f[1] != "" {
			continue
		}
		for at := path.Clean("/" + f[2]); ; at = path.Dir(at) {
			if n, err := strconv.ParseInt(strings.TrimSpace(text(root, path.Join(dir, at, file))), 10, 64); err == nil && n > 0 {
				bytes = min(bytes, n)
			}
			if at == "/" {
				break
			}
		}
	}
	return bytes, bytes < math.MaxInt64
}

func text(root fs.FS, name string) string {
	b, err := fs.ReadFile(root, name)
	if err != nil {
		return "" // another system, or another version of cgroups
	}
	return string(b)
}

// bodyMemory is how much of it the bodies of requests may take: a sixteenth, since the
// garbage collector lets the heap grow to twice what is in use, and the cache and the
// tables need theirs.
func bodyMemory(root fs.FS) int64 {
	const least, most = 64 << 20, 512 << 20
	bytes, known := machineMemory(root)
	if !known {
		return most
	}
	return min(max(bytes/16, least), most)
}

// MemoryLimit is a limit for the Go runtime, which then collects garbage before the kernel
// ends the process: three quarters of what the process may use. It is false if that is
// not known.
func MemoryLimit(root fs.FS) (bytes int64, known bool) {
	bytes, known = machineMemory(root)
	return bytes / 4 * 3, known
}
