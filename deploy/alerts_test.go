package deploy

import (
	"bytes"
	"os"
	"regexp"
	"slices"
	"testing"

	"github.com/prometheus/client_golang/prometheus"
	"go.yaml.in/yaml/v4"

	"github.com/dsnode/dsnode/node/gateway"
	"github.com/dsnode/dsnode/node/ports"
)

type alert struct {
	Alert       string            `yaml:"alert"`
	Expr        string            `yaml:"expr"`
	For         string            `yaml:"for"`
	Labels      map[string]string `yaml:"labels"`
	Annotations map[string]string `yaml:"annotations"`
}

// TestAlerts checks the rules against the metrics of a port and of the gateway: an alert on
// a name or a reason that no node has never fires, and a reason without an alert is not seen.
func TestAlerts(t *testing.T) {
	text, err := os.ReadFile("alerts.yaml")
	if err != nil {
		t.Fatal(err)
	}
	var file struct {
		Groups []struct {
			Name  string  `yaml:"name"`
			Rules []alert `yaml:"rules"`
		} `yaml:"groups"`
	}
	decode, err := yaml.NewLoader(bytes.NewReader(text), yaml.WithKnownFields())
	if err == nil {
		err = decode.Load(&file)
	}
	if err != nil {
		t.Fatal(err)
	}
	reasons := refusals(t) // by name of the metric
	seen := map[string]bool{}
	covered := map[string]bool{}
	selector := regexp.MustCompile(`(dsnode_\w+)(?:\{(\w+)=~?"([\w|]+)"\})?(?:\[\d+m\]|\))`)
	others, err := os.ReadFile("../cluster/metrics.go") // metrics of a cluster, which needs more than a registry
	if err != nil {
		t.Fatal(err)
	}
	for _, g := range file.Groups {
		for _, a := range g.Rules {
			if a.Alert == "" || seen[a.Alert] || a.Labels["severity"] == "" || a.Annotations["summary"] == "" || a.Annotations["description"] == "" {
				t.Errorf("alert %q has no name of its own, severity, summary or description", a.Alert)
			}
			seen[a.Alert] = true
			found := selector.FindStringSubmatch(a.Expr)
			if found != nil && bytes.Contains(others, []byte(`"`+found[1]+`"`)) {
				continue
			}
			if found == nil || reasons[found[1]] == nil {
				t.Errorf("%s asks for no metric of a node: %s", a.Alert, a.Expr)
				continue
			}
			switch metric, label, value := found[1], found[2], found[3]; label {
			case "reason":
				if !slices.Contains(reasons[metric], value) {
					t.Errorf("%s: no %s has the reason %s", a.Alert, metric, value)
				}
				covered[metric+value] = true
			case "": // of all reasons
				for _, reason := range reasons[metric] {
					covered[metric+reason] = true
				}
			case "port":
				if value != "rpc" && value != "gossip" {
					t.Errorf("%s: port %s", a.Alert, value)
				}
			}
		}
	}
	for metric, all := range reasons {
		for _, reason := range all {
			if !covered[metric+reason] {
				t.Errorf("no alert for %s{reason=%q}", metric, reason)
			}
		}
	}
}

// refusals are the values of the label reason, by metric.
func refusals(t *testing.T) map[string][]string {
	t.Helper()
	reg := prometheus.NewRegistry()
	ports.New(ports.Options{Name: "client", Registerer: reg})
	gateway.New(gateway.Options{Registerer: reg})
	families, err := reg.Gather()
	if err != nil {
		t.Fatal(err)
	}
	found := map[string][]string{}
	for _, f := range families {
		for _, m := range f.GetMetric() {
			for _, l := range m.GetLabel() {
				if l.GetName() == "reason" {
					found[f.GetName()] = append(found[f.GetName()], l.GetValue())
				}
			}
		}
	}
	if len(found) != 2 {
		t.Fatalf("metrics with reasons: %v", found)
	}
	return found
}
