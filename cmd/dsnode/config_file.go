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
		Short: "Check a file without asking anybody",
		Long: "Check a cluster.yaml, or with --node a node.yaml, without asking anybody. Everything that is\n" +
			"wrong is told at once, with its line and what to write instead.\n\n" +
			"With --site the secrets and files that a cluster.yaml names for that site must be here too,\n" +
			"as they must be on the site's nodes. A node.yaml is always checked with the files it names.",
		Example: "  dsnode config validate cluster.yaml\n  dsnode config validate --node /etc/dsnode/node.yaml",
		Args:    takes("a FILE (- for stdin)"),
		RunE: func(_ *cobra.Command, args []string) error {
			var err error
			switch {
			case isNode && site != "":
				return usage("", "--site is for a cluster.yaml, not for --node")
			case isNode && args[0] == "-":
				return usage("give the file's name", "a node.yaml is not read from stdin: the files that it names are found from where it stands")
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
	cmd.Flags().StringVar(&site, "site", "", "check what the nodes of this site need, too")
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
		return usage("its sites are listed under sites:", "%s has no site %q", shownName(file), site)
	}
	dir := filepath.Dir(file)
	return config.CheckLocal(site, os.LookupEnv, func(path string) ([]byte, error) {
		if !filepath.IsAbs(path) {
			path = filepath.Join(dir, path)
		}
		return os.ReadFile(path)
	})
}

// readClusterConfig reads a cluster.yaml that is valid: better to hear what is
// wrong before anybody else is asked.
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

// readFile reads a configuration; - is stdin.
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
	// One byte more than the bound, so that the parser sees it is over.
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

// badFile counts what is wrong with a file; report lists it.
func badFile(file string, err error) error {
	var problems config.Problems
	var exit *exitError
	switch {
	case errors.As(err, &exit):
		return err
	case errors.As(err, &problems):
		return &exitError{code: exitFailed, err: err, hint: "repair " + shownName(file) + " and try again"}
	}
	return &exitError{code: exitFailed, err: err, hint: "check the file's name"}
}
