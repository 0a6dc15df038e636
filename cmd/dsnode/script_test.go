package main

import (
	"errors"
	"net/http"
	"net/http/httptest"
	"os"
	"os/exec"
	"strconv"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"github.com/rogpeppe/go-internal/testscript"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node/admin"
	"github.com/dsnode/dsnode/node/gateway"
)

func TestMain(m *testing.M) {
	testscript.Main(m, map[string]func(){"dsnode": main, "quietpeer": peerProgram})
}

// TestScripts runs the command lines in testdata/*.txtar. Each script has its own admin
// port in DSNODE_ADMIN. UPDATE_SCRIPTS=1 rewrites the golden files.
func TestScripts(t *testing.T) {
	testscript.Run(t, testscript.Params{
		Dir:           "testdata",
		UpdateScripts: os.Getenv("UPDATE_SCRIPTS") != "",
		Setup: func(e *testscript.Env) error {
			open := newFakePort(e, "")
			e.Setenv("DSNODE_ADMIN", open.url)
			e.Setenv("GUARDED_ADMIN", newFakePort(e, "s3same").url)
			e.Values["cluster"] = open.cluster
			e.Setenv("USER", "ann")
			e.Setenv("XDG_CACHE_HOME", e.WorkDir+"/cache")
			e.Setenv("NO_COLOR", "1")
			return nil
		},
		Cmds: map[string]func(ts *testscript.TestScript, neg bool, args []string){
			"exits":   exits,
			"cluster": setCluster,
			"devruns": devRuns,
		},
	})
}

type fakePort struct {
	cluster *fakeCluster
	url     string
}

func newFakePort(e *testscript.Env, token string) fakePort {
	f := &fakeCluster{state: "outside"}
	s := httptest.NewServer(admin.New(admin.Options{
		Cluster: f, Gatherer: prometheus.NewRegistry(), Health: http.NotFoundHandler(), Token: token,
		Jobs: gateway.New(gateway.Options{
			Config: func() *config.Config {
				return &config.Config{Limits: config.DefaultLimits(), Models: map[string]config.Model{"deepseek-chat": {}}}
			},
			Jobs: &fakeJobs{}, Registerer: prometheus.NewRegistry(),
		}).OperatorHandler(),
	}))
	e.Defer(s.Close)
	return fakePort{cluster: f, url: s.URL}
}

// exits runs a program and checks its exit code: exits 3 dsnode status.
func exits(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) < 2 {
		ts.Fatalf("usage: exits CODE PROGRAM [ARG…]")
	}
	want, err := strconv.Atoi(args[0])
	ts.Check(err)
	got := 0
	if err := ts.Exec(args[1], args[2:]...); err != nil {
		var exit *exec.ExitError
		if !errors.As(err, &exit) {
			ts.Fatalf("%v", err)
		}
		got = exit.ExitCode()
	}
	if got != want {
		ts.Fatalf("%v ended with %d, want %d", args[1:], got, want)
	}
}

// setCluster sets the state of the script's cluster: cluster lost.
func setCluster(ts *testscript.TestScript, neg bool, args []string) {
	if neg || len(args) != 1 {
		ts.Fatalf("usage: cluster healthy|degraded|lost|outside|failedover")
	}
	f, ok := ts.Value("cluster").(*fakeCluster)
	if !ok {
		ts.Fatalf("the script has no cluster")
	}
	f.setState(args[0])
	if args[0] == "failedover" {
		f.setLost()
	}
}

// devRuns writes the record of a dev cluster, with the pid of this process (devruns URL),
// or with the pid of a process that has ended (! devruns URL).
func devRuns(ts *testscript.TestScript, neg bool, args []string) {
	if len(args) != 1 {
		ts.Fatalf("usage: [!] devruns URL")
	}
	pid := os.Getpid()
	if neg {
		gone := exec.Command("true")
		ts.Check(gone.Run())
		pid = gone.Process.Pid
	}
	env := &environment{cacheDir: func() (string, error) { return ts.Getenv("XDG_CACHE_HOME"), nil }}
	ts.Check(env.writeRunningDev(runningDev{Admin: []string{args[0]}, PID: pid, DataDir: ts.MkAbs("dev")}))
}
