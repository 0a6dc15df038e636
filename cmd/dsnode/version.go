package main

import (
	"io"
	"runtime"
	"runtime/debug"

	"github.com/spf13/cobra"
)

// unstamped is the version of a build without -X main.version.
const unstamped = "0.1.0-dev"

// stampedVersion is the version that the linker was given, else that of the module,
// else the version in development with the revision of the build.
func stampedVersion(stamped string) string {
	if stamped != "" {
		return stamped
	}
	info, ok := debug.ReadBuildInfo()
	if !ok {
		return unstamped
	}
	return buildVersion(info)
}

func buildVersion(info *debug.BuildInfo) string {
	var revision, changed string
	for _, s := range info.Settings {
		switch s.Key {
		case "vcs.revision":
			revision = s.Value
		case "vcs.modified":
			if s.Value == "true" {
				changed = ".changed"
			}
		}
	}
	switch {
	case revision != "":
		return unstamped + "+" + revision[:min(12, len(revision))] + changed
	case info.Main.Version != "" && info.Main.Version != "(devel)":
		return info.Main.Version
	}
	return unstamped
}

// versionInfo is the output of `dsnode version -o json`.
type versionInfo struct {
	Version  string `json:"version"`
	Go       string `json:"go"`
	Platform string `json:"platform"`
}

func newVersionCommand(env *environment) *cobra.Command {
	var output string
	cmd := &cobra.Command{
		Use: "version", Short: "Show the version", Args: takes(),
		RunE: func(*cobra.Command, []string) error {
			if err := checkOutput(output, []string{outputTable, outputJSON, outputYAML}); err != nil {
				return err
			}
			v := versionInfo{Version: env.version, Go: runtime.Version(), Platform: runtime.GOOS + "/" + runtime.GOARCH}
			return show(env.stdout, output, v, func(w io.Writer) error {
				return emit(w, "dsnode %s (%s, %s)\n", v.Version, v.Go, v.Platform)
			})
		},
	}
	cmd.Flags().StringVarP(&output, "output", "o", outputTable, "`FORMAT` of the output: table, json or yaml")
	return cmd
}
