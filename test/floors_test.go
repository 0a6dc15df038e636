package test

import (
	"bufio"
	"encoding/json"
	"errors"
	"io"
	"io/fs"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
)

const module = "github.com/dsnode/dsnode"

// floor is the layer of each package, in the order of the layers in the design: commands,
// wiring, handlers, services, decisions, transport, pure, storage. A package imports only
// packages of lower layers.
var floor = map[string]int{
	"cmd/dsnode": 60,

	"node": 50,

	"node/operate":  45, // above admin, because it fills in admin's types
	"node/datakeys": 40,
	"node/gateway":  40,
	"node/admin":    40,
	"node/modelsim": 40,

	"node/jobs":      35,
	"node/serving":   30,
	"failover/drill": 30,
	"node/upstream":  28, // the model servers; knows the endpoint and the model of a request
	"node/cache":     25, // keys and answers; knows nothing about requests

	"failover": 20,

	"replication":               12,
	"cluster":                   10,
	"replication/replicationpb": 9, // generated
	"cluster/clusterpb":         9, // generated
	"node/shares":               5, // what each tenant uses of a bound; pure
	"node/openai":               5, // the wire format; imports none of our packages
	"node/ports":                5, // bounds of HTTP ports; imports none of our packages
	"cluster/mesh":              2,
	"cluster/gossip":            2,

	"storage/jobtable": 2,
	"storage":          1,
	"storage/journal":  1,
	"storage/boltfile": 0,

	"storage/keyring/keyringtest": 0, // for tests
	"storage/keyring":             -1,
	"cluster/agreed":              -2,
	"cluster/host":                -2,
	"storage/atomicfile":          -2,
	"cluster/config":              -3, // without Raft and gRPC, so that readers of settings don't compile them
	"cluster/clock":               -3,
	"cluster/throttle":            -3,
	"cluster/cause":               -3,
	"storage/notify":              -4,
}

// An arrow is an import that is allowed, and why it has to be.
type arrow struct{ from, to, reason string }

var arrows = []arrow{
	{"cmd/dsnode", "node", "run starts a node; dev writes node.yaml files"},
	{"cmd/dsnode", "node/admin", "the client of the admin API, which all commands use"},
	{"cmd/dsnode", "node/modelsim", "the hidden modelsim command, which dev starts"},
	{"cmd/dsnode", "failover/drill", "renders a drill's report, and follows one"},
	{"cmd/dsnode", "cluster/mesh", "tls ca and tls issue"},
	{"cmd/dsnode", "storage", "dev finds out which process uses a data directory"},
	{"cmd/dsnode", "storage/keyring", "tls keys and dev make an operator's key"},
	{"cmd/dsnode", "cluster/config", "config validate offline; dev writes cluster.yaml"},

	{"node", "node/ports", "wiring: bounds the connections of the HTTP ports"},
	{"node", "node/operate", "wiring: what the admin port serves"},
	{"node", "node/admin", "wiring: opens the admin port"},
	{"node", "node/datakeys", "wiring: opens the keys that everything at rest is sealed with"},
	{"node", "node/gateway", "wiring: opens the api port"},
	{"node", "node/jobs", "wiring: opens, runs and shows the jobs"},
	{"node", "failover/drill", "wiring: runs drills, and cuts the site off during one"},
	{"node", "node/serving", "wiring: puts the pipeline together"},
	{"node", "node/upstream", "wiring: configures and runs the fleet of model servers"},
	{"node", "node/cache", "wiring: opens and runs the cache"},
	{"node", "failover", "wiring: runs the fence, the coordinator, the placement of voters and the adoption of streams"},
	{"node", "replication", "wiring: carries the journals between nodes"},
	{"node", "cluster", "wiring: membership, Raft, identity"},
	{"node", "cluster/mesh", "wiring: identity, certificates and connections"},
	{"node", "storage/jobtable", "wiring: opens the table and fills it from the journals"},
	{"node", "storage", "wiring: opens and closes the node's files"},
	{"node", "storage/journal", "wiring: opens the journals"},
	{"node", "storage/keyring", "wiring: the operator's key"},
	{"node", "cluster/agreed", "wiring: reads the agreed state for whoever runs on it"},
	{"node", "cluster/clock", "wiring: shared ticks"},
	{"node", "cluster/host", "wiring: gives the machine to whoever reads clocks, dials or writes"},
	{"node", "cluster/config", "wiring: timing, and what a new configuration changes"},

	{"node/operate", "node/admin", "implements what the admin port serves, in its types"},
	{"node/operate", "node/datakeys", "lists, rotates and rewraps the keyring"},
	{"node/operate", "failover/drill", "plans, starts and ends drills"},
	{"node/operate", "node/upstream", "the health of the site's own upstreams"},
	{"node/operate", "node/cache", "statistics, and the form of a key to purge"},
	{"node/operate", "failover", "switchovers and their checks; failback; the quarantine"},
	{"node/operate", "replication", "how far the copies of each site are behind"},
	{"node/operate", "cluster", "reads the cluster's view, and proposes changes"},
	{"node/operate", "cluster/gossip", "which nodes have left"},
	{"node/operate", "cluster/host", "the wall clock"},
	{"node/operate", "cluster/agreed", "the agreed state, and the commands that change it"},
	{"node/operate", "cluster/config", "checks a configuration before it is proposed"},

	{"node/admin", "node/ports", "which requests come from this machine"},
	{"node/admin", "failover/drill", "tells over HTTP why a drill was refused"},
	{"node/admin", "failover", "tells over HTTP how a switchover failed, and which checks hold"},
	{"node/admin", "cluster", "errors of changes"},
	{"node/admin", "cluster/agreed", "shows what is agreed on"},
	{"node/admin", "cluster/config", "checks and compares configurations"},

	{"node/datakeys", "cluster", "proposes keys, and runs a loop while this node leads Raft"},
	{"node/datakeys", "storage/keyring", "the ring"},
	{"node/datakeys", "cluster/agreed", "the agreed keys"},
	{"node/datakeys", "cluster/clock", "how long nobody has carried a key"},

	{"node/gateway", "node/ports", "which requests come from this machine; says when one has come"},
	{"node/gateway", "node/jobs", "hands submissions and questions about jobs on"},
	{"node/gateway", "node/serving", "hands requests to the pipeline"},
	{"node/gateway", "node/openai", "reads requests, writes errors"},
	{"node/gateway", "node/shares", "no tenant alone uses all of a limit"},
	{"node/gateway", "storage/journal", "ids, statuses and durabilities of jobs"},
	{"node/gateway", "cluster/agreed", "why a key was refused, and what a tenant may be named"},
	{"node/gateway", "cluster/config", "limits of requests, and who has access"},

	{"node/jobs", "node/serving", "sends requests through the same stages as the gateway"},
	{"node/jobs", "node/shares", "no tenant alone fills the queue"},
	{"node/jobs", "node/upstream", "the list of peers to ask for jobs"},
	{"node/jobs", "failover", "starts a job only with a permit"},
	{"node/jobs", "node/openai", "reads a job's request, writes errors"},
	{"node/jobs", "storage/jobtable", "reads jobs from rows"},
	{"node/jobs", "storage/journal", "appends records"},
	{"node/jobs", "storage/keyring", "the id of a job with an idempotency key is a MAC"},
	{"node/jobs", "cluster/agreed", "who owns which stream"},
	{"node/jobs", "storage/atomicfile", "keeps the list of its islands"},
	{"node/jobs", "cluster/clock", "measures the time between a permit and the start"},
	{"node/jobs", "cluster/host", "the clocks"},
	{"node/jobs", "cluster/config", "durabilities, limits and expiry of jobs"},

	{"failover/drill", "failover", "rehearses its decisions and its handoff"},
	{"failover/drill", "cluster", "the views of peers; proposes changes"},
	{"failover/drill", "cluster/agreed", "records of drills"},
	{"failover/drill", "cluster/config", "which city a site is in"},
	{"failover/drill", "cluster/clock", "a wait that ends with its context"},
	{"failover/drill", "cluster/host", "dials the api ports of nodes"},
	{"failover/drill", "cluster/cause", "a report repeats nothing of an answer"},
	{"failover/drill", "node/openai", "the code of a node's refusal"},
	{"failover/drill", "storage/atomicfile", "keeps a cut over a restart"},

	{"node/serving", "node/upstream", "asks the servers that the fleet permits, in its order"},
	{"node/serving", "node/cache", "looks up and stores answers"},
	{"node/serving", "node/openai", "reads what servers answer"},
	{"node/serving", "cluster/cause", "logs and errors repeat nothing of an answer"},
	{"node/serving", "cluster/config", "which answers are kept, and how long"},

	{"node/upstream", "node/openai", "knows the endpoints of model servers"},
	{"node/upstream", "cluster/clock", "shared ticks"},
	{"node/upstream", "cluster/host", "dials model servers; the clocks"},
	{"node/upstream", "cluster/cause", "logs and statuses repeat nothing of an answer"},
	{"node/upstream", "cluster/config", "model servers, models and timeouts"},

	{"node/cache", "storage/keyring", "seals entries, and makes keys of requests"},
	{"node/cache", "cluster/agreed", "purges"},
	{"node/cache", "cluster/cause", "logs and statistics repeat nothing that a Redis answers"},
	{"node/cache", "cluster/config", "sizes, lifetimes and the Redis of a site"},

	{"failover", "cluster", "the views of peers and of Raft"},
	{"failover", "cluster/agreed", "the primary, its nodes and the owners of streams"},
	{"failover", "cluster/clock", "leases run on its clock"},
	{"failover", "cluster/config", "cities, priorities and timing"},

	{"replication", "replication/replicationpb", "messages on the rpc port"},
	{"replication", "cluster/mesh", "which peer calls"},
	{"replication", "storage/journal", "streams are what it carries"},
	{"replication", "storage/keyring", "acknowledges only records that it can open"},
	{"replication", "storage/atomicfile", "notes how durable records are"},
	{"replication", "cluster/clock", "shared ticks"},
	{"replication", "storage/notify", "wakes its loops"},

	{"cluster", "cluster/clusterpb", "messages on the rpc port"},
	{"cluster", "cluster/gossip", "addresses of the members, and who is alive"},
	{"cluster", "cluster/mesh", "what Raft, pings and joins are sent over"},
	{"cluster", "cluster/agreed", "the state machine of its Raft log"},
	{"cluster", "storage/atomicfile", "notes what the node is a member of"},
	{"cluster", "cluster/clock", "leases run on its clock"},
	{"cluster", "cluster/host", "the clocks; asks the disk before the watchdog writes"},
	{"cluster", "cluster/config", "the agreed configuration, parsed"},
	{"cluster", "storage/notify", "wakes those who wait for the agreed state, a lease or a leadership"},

	{"cluster/gossip", "cluster/config", "which names fit a certificate"},
	{"cluster/gossip", "cluster/host", "listens and dials"},
	{"cluster/gossip", "cluster/throttle", "strangers must not fill the log"},
	{"cluster/gossip", "storage/notify", "wakes its loops"},

	{"cluster/mesh", "cluster/agreed", "the generation in a preface"},
	{"cluster/mesh", "cluster/clock", "shared ticks"},
	{"cluster/mesh", "cluster/host", "dials; the clock of the ticks"},
	{"cluster/mesh", "cluster/cause", "marks its own errors among those of net/http"},
	{"cluster/mesh", "cluster/config", "which names fit a certificate"},
	{"cluster/mesh", "cluster/throttle", "strangers must not fill the log"},

	{"storage/jobtable", "storage/journal", "rows are joined from records"},
	{"storage/jobtable", "storage/boltfile", "may bbolt open its file"},
	{"storage/jobtable", "storage/keyring", "tenants in indexes, and which keys are still in use"},
	{"storage/jobtable", "storage/atomicfile", "notes that it was discarded"},
	{"storage/jobtable", "storage/notify", "wakes those who wait for a commit"},

	{"storage", "storage/boltfile", "may bbolt open Raft's file"},
	{"storage", "storage/keyring", "what is at rest is sealed"},
	{"storage", "storage/atomicfile", "writes snapshots, rewrites Raft's file"},

	{"storage/journal", "storage/keyring", "payloads are sealed"},
	{"storage/journal", "storage/atomicfile", "syncs directories"},
	{"storage/journal", "storage/notify", "announces new records"},

	{"storage/boltfile", "storage/atomicfile", "syncs directories"},

	{"storage/keyring/keyringtest", "storage/keyring", "makes rings for tests"},

	{"storage/keyring", "storage/atomicfile", "replaces the node's key and the data keys that it keeps"},
	{"storage/keyring", "storage/notify", "announces a change of the keys"},

	{"cluster/agreed", "cluster/config", "a configuration is agreed on as text, and read as parsed"},

	{"cluster/host", "cluster/clock", "the clock of this machine"},
}

type listed struct {
	ImportPath   string
	Imports      []string
	TestImports  []string
	XTestImports []string
}

// packages lists the module's own packages with their direct imports, cut down
// to paths inside the module.
func packages(t *testing.T) []listed {
	t.Helper()
	cmd := exec.Command("go", "list", "-json=ImportPath,Imports,TestImports,XTestImports", "./...")
	cmd.Dir = ".."
	cmd.Stderr = os.Stderr
	out, err := cmd.Output()
	if err != nil {
		t.Fatalf("go list: %v", err)
	}
	var all []listed
	for dec := json.NewDecoder(strings.NewReader(string(out))); ; {
		var p listed
		err := dec.Decode(&p)
		if errors.Is(err, io.EOF) {
			return all
		}
		if err != nil {
			t.Fatalf("go list's output: %v", err)
		}
		p.ImportPath = inside(p.ImportPath)
		p.Imports = ours(p.Imports)
		p.TestImports = ours(append(p.TestImports, p.XTestImports...))
		all = append(all, p)
	}
}

func inside(path string) string { return strings.TrimPrefix(strings.TrimPrefix(path, module), "/") }

func ours(paths []string) []string {
	var in []string
	for _, p := range paths {
		if p == module || strings.HasPrefix(p, module+"/") {
			in = append(in, inside(p))
		}
	}
	return in
}

// outside reports whether a package is in no layer: tests of the whole, and samples with
// their test. Nothing but tests may import it.
func outside(path string) bool {
	top, _, _ := strings.Cut(path, "/")
	return top == "test" || top == "deploy"
}

func TestArrowsPointDown(t *testing.T) {
	allowed := map[[2]string]bool{}
	for _, a := range arrows {
		from, okFrom := floor[a.from]
		to, okTo := floor[a.to]
		switch {
		case !okFrom || !okTo:
			t.Errorf("the arrow %s → %s names a package without a layer", a.from, a.to)
		case from <= to:
			t.Errorf("the arrow %s → %s points up or sideways (%d → %d)", a.from, a.to, from, to)
		case a.reason == "":
			t.Errorf("the arrow %s → %s has no reason", a.from, a.to)
		case allowed[[2]string{a.from, a.to}]:
			t.Errorf("the arrow %s → %s is listed twice", a.from, a.to)
		}
		allowed[[2]string{a.from, a.to}] = true
	}
	used := map[[2]string]bool{}
	for _, p := range packages(t) {
		if outside(p.ImportPath) {
			continue // it may import everything, and no arrow leads to it
		}
		if _, ok := floor[p.ImportPath]; !ok {
			t.Errorf("package %q has no layer: add it to floor in floors_test.go", p.ImportPath)
		}
		for _, to := range p.Imports {
			used[[2]string{p.ImportPath, to}] = true
			if !allowed[[2]string{p.ImportPath, to}] {
				t.Errorf("%s imports %s: no arrow allows it", p.ImportPath, to)
			}
		}
		for _, to := range p.TestImports {
			// A test may import every lower layer, the simulated model server and
			// the packages below test.
			if to == p.ImportPath || to == "node/modelsim" || outside(to) || floor[to] < floor[p.ImportPath] {
				continue
			}
			t.Errorf("a test of %s imports %s, which is in no lower layer", p.ImportPath, to)
		}
	}
	for _, a := range arrows {
		if !used[[2]string{a.from, a.to}] {
			t.Errorf("%s no longer imports %s: remove the arrow", a.from, a.to)
		}
	}
}

// What these packages compile, directly or not, keeps out what they have no use for:
// tests of them stay quick, and a reader need not know Raft to change them.
func TestWhatPackagesCompileWithout(t *testing.T) {
	raft, memberlist, grpc := "github.com/hashicorp/raft", "github.com/hashicorp/memberlist", "google.golang.org/grpc"
	for dir, without := range map[string][]string{
		"cluster/config": {raft, memberlist, grpc},
		"cluster/agreed": {raft, memberlist, grpc},
		"cluster/mesh":   {memberlist},
		"cluster/gossip": {raft, grpc},
		"node/openai":    {raft, memberlist, grpc},
		"node/upstream":  {raft, memberlist, grpc},
		"node/cache":     {raft, memberlist, grpc},
		"node/serving":   {raft, memberlist, grpc},
		"storage":        {memberlist, grpc},
	} {
		cmd := exec.Command("go", "list", "-deps", "./"+dir)
		cmd.Dir = ".."
		out, err := cmd.Output()
		if err != nil {
			t.Fatalf("go list -deps %s: %v", dir, err)
		}
		deps := strings.Fields(string(out))
		if !slices.Contains(deps, module+"/"+dir) {
			t.Fatalf("go list -deps %s does not list the package itself", dir)
		}
		for _, dep := range deps {
			for _, not := range without {
				if dep == not || strings.HasPrefix(dep, not+"/") {
					t.Errorf("%s compiles %s", dir, dep)
				}
			}
		}
	}
}

// Each top-level entry is agreed, so that a reader knows where to look.
func TestTopLevelEntries(t *testing.T) {
	folders := []string{"node", "cluster", "replication", "storage", "failover", "cmd", "deploy", "test", "tools"}
	entries, err := os.ReadDir("..")
	if err != nil {
		t.Fatal(err)
	}
	for _, e := range entries {
		if e.IsDir() && !strings.HasPrefix(e.Name(), ".") && !slices.Contains(folders, e.Name()) {
			t.Errorf("top-level folder %s is not in the design", e.Name())
		}
	}
}

// A package's DESIGN.md is for reading in one go: at most two screens.
func TestDesignPages(t *testing.T) {
	const longest = 120
	for _, dir := range []string{"node", "cluster", "replication", "storage", "failover", "test"} {
		if !hasGo(t, filepath.Join("..", dir)) {
			continue
		}
		page := filepath.Join("..", dir, "DESIGN.md")
		f, err := os.Open(page)
		if err != nil {
			t.Errorf("%s has Go files and no DESIGN.md", dir)
			continue
		}
		lines := 0
		for s := bufio.NewScanner(f); s.Scan(); {
			lines++
		}
		if err := f.Close(); err != nil {
			t.Error(err)
		}
		if lines == 0 || lines > longest {
			t.Errorf("%s has %d lines, want 1 to %d", page, lines, longest)
		}
	}
}

func hasGo(t *testing.T, dir string) bool {
	t.Helper()
	found := false
	err := filepath.WalkDir(dir, func(path string, _ fs.DirEntry, err error) error {
		if err == nil && strings.HasSuffix(path, ".go") {
			found = true
			return fs.SkipAll
		}
		return err
	})
	if err != nil && !errors.Is(err, fs.ErrNotExist) {
		t.Fatal(err)
	}
	return found
}
