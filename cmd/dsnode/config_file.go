package main

import (
	"errors"
	"fmt"
	"io"
	"os"
	"path/filepath"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/cluster/config"
	"github.com/dsnode/dsnode/node"
)

func newConfigValidateCommand(env *environment) *cobra.Command {
	var isNode bool
	var site string
	cmd := &cobra.Command{
		Use:   "validate FILE",
		Short: "Check a configuration file offline",
		Long: "Check a cluster.yaml, or with --node a node.yaml, without a cluster. All problems are listed, each\n" +
			"with its line and what to write instead.\n\n" +
			"With --site the secrets and files that a cluster.yaml names for that site are checked too; they must be\n" +
			"on this machine. A node.yaml is always checked with the files that it names.",
		Example: "  dsnode config validate cluster.yaml\n  dsnode config validate --node /etc/dsnode/node.yaml",
		Args:    takes("a FILE (- for stdin)"),
		RunE: func(_ *cobra.Command, args []string) error {
			var err error
			switch {
			case isNode && site != "":
				return usage("", "--site is for a cluster.yaml, not for --node")
			case isNode && args[0] == "-":
				return usage("give the file's name", "a node.yaml can't be read from stdin: the paths in it are relative to its directory")
			case isNode:
				_, err = node.LoadConfig(args[0])
			default:
				err = validateCluster(env, args[0], site)
			}
			if err != nil {
				return badFile(args[0], err)
			}
			say(env.stderr, "done", args[0]+" is valid")
			return nil
		},
	}
	cmd.Flags().BoolVar(&isNode, "node", false, "the file is a node.yaml")
	cmd.Flags().StringVar(&site, "site", "", "also check the secrets and files that the nodes of this `SITE` need")
	return cmd
}

func validateCluster(env *environment, file, site string) error {
	text, err := readFile(env, file)
	if err != nil {
		return err
	}
	config, err := config.Parse(shownName(file), text)
	if err != nil || site == "" {
		return err
	}
	if _, known := config.Sites[site]; !known {
		return usage("the sites are listed under sites: in the file", "%s has no site %q", shownName(file), site)
	}
	dir := filepath.Dir(file)
	return config.CheckLocal(site, os.LookupEnv, func(path string) ([]byte, error) {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		return os.ReadFile(path)
	})
}

// readClusterConfig reads a cluster.yaml and checks it, before a node is asked.
func readClusterConfig(env *environment, file string) ([]byte, error) {
	text, err := readFile(env, file)
	if err != nil {
		return nil, badFile(file, err)
	}
	if _, err := config.Parse(shownName(file), text); err != nil {
		return nil, badFile(file, err)
	}
	return text, nil
}

// readFile reads a configuration file; - is stdin.
func readFile(env *environment, file string) ([]byte, error) {
	from := env.stdin
	if file != "-" {
		f, err := os.Open(file) //nolint:gosec // the user named it
		if err != nil {
			return nil, err
		}
		defer func() { _ = f.Close() }() // only read from
		from = f
	}
	// One byte more than the bound, so that the parser refuses a file that is too large.
	text, err := io.ReadAll(io.LimitReader(from, config.MaxBytes+1))
	if err != nil {
		return nil, fmt.Errorf("read %s: %w", shownName(file), err)
	}
	return text, nil
}

func shownName(file string) string {
	if file == "-" {
		return "stdin"
	}
	return file
}

// badFile is the error of a configuration file. report lists its problems.
func badFile(file string, err error) error {
	var problems config.Problems
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		return err
	case errors.As(err, &problems):
		return &exitError{code: exitFailed, err: err, hint: "correct " + shownName(file) + " and try again"}
	}
	return &exitError{code: exitFailed, err: err, hint: "check the file's name"}
}
