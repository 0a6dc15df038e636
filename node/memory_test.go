package node

import (
	"testing"
	"testing/fstest"
)

func TestMemoryOfTheMachine(t *testing.T) {
	const meminfo = "MemTotal:       24684544 kB\nMemFree:        1 kB\n"
	for name, tt := range map[string]struct {
		files  map[string]string
		want   int64 // 0: unknown
		bodies int64
	}{
		"a machine":           {map[string]string{"proc/meminfo": meminfo}, 24684544 << 10, 512 << 20},
		"a small machine":     {map[string]string{"proc/meminfo": "MemTotal: 2097152 kB\n"}, 2 << 30, 128 << 20},
		"another system":      {nil, 0, 512 << 20},
		"cgroup 2, container": {map[string]string{"proc/meminfo": meminfo, "proc/self/cgroup": "0::/\n", "sys/fs/cgroup/memory.max": "536870912\n"}, 512 << 20, 64 << 20},
		"cgroup 2, a service": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "0::/system.slice/dsnode.service\n",
			"sys/fs/cgroup/system.slice/dsnode.service/memory.max": "max\n", "sys/fs/cgroup/system.slice/memory.max": "4294967296\n",
		}, 4 << 30, 256 << 20},
		"cgroup 1, the host's path": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "5:cpu:/x\n4:memory:/docker/1234\n0::/\n", "sys/fs/cgroup/memory/memory.limit_in_bytes": "3221225472\n",
		}, 3 << 30, 192 << 20},
		"cgroup 1, no limit": {map[string]string{
			"proc/meminfo": meminfo, "proc/self/cgroup": "4:memory:/a\n", "sys/fs/cgroup/memory/a/memory.limit_in_bytes": "9223372036854771712\n",
		}, 24684544 << 10, 512 << 20},
		"damaged": {map[string]string{"proc/meminfo": "MemTotal: many kB\n", "proc/self/cgroup": "x\n0::\n", "sys/fs/cgroup/memory.max": "-1\n"}, 0, 512 << 20},
	} {
		root := fstest.MapFS{}
		for file, text := range tt.files {
			root[file] = &fstest.MapFile{Data: []byte(text)}
		}
		got, known := machineMemory(root)
		if known != (tt.want != 0) || known && got != tt.want {
			t.Errorf("%s: %d, %v, want %d", name, got, known, tt.want)
		}
		if got := bodyMemory(root); got != tt.bodies {
			t.Errorf("%s: %d for bodies, want %d", name, got, tt.bodies)
		}
		if limit, ok := MemoryLimit(root); ok != known || known && limit >= got {
			t.Errorf("%s: limit %d, %v", name, limit, ok)
		}
	}
}
