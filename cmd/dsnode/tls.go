package main

import (
	"crypto/rand"
	"encoding/base64"
	"errors"
	"fmt"
	"io/fs"
	"os"
	"path/filepath"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/cluster/mesh"
	"github.com/dsnode/dsnode/storage/keyring"
)

func newTLSCommand(env *environment) *cobra.Command {
	return newGroup("tls", "Create the certificates and keys of the nodes",
		newTLSCACommand(env),
		newTLSIssueCommand(env),
		newTLSKeysCommand(env),
	)
}

func newTLSCACommand(env *environment) *cobra.Command {
	var name, out string
	validFor := span(10 * 365 * day)
	cmd := &cobra.Command{
		Use:   "ca --cluster NAME",
		Short: "Create a private CA",
		Long:  "Create a private CA: ca.pem, which every node needs, and ca-key.pem, which must be kept safe and off the nodes.",
		Args:  takes(),
		RunE: func(*cobra.Command, []string) error {
			if name == "" {
				return usage("for example --cluster prod", "tls ca needs --cluster NAME")
			}
			cert, key, err := mesh.NewCA(name, time.Duration(validFor))
			if err != nil {
				return usage("see dsnode tls ca --help", "%w", err)
			}
			return writeNew(env, out, []newFile{{"ca.pem", cert, 0o644}, {"ca-key.pem", key, 0o600}},
				"keep ca-key.pem off the nodes; dsnode tls issue needs it")
		},
	}
	cmd.Flags().StringVar(&name, "cluster", "", "`NAME` of the cluster, as in node.yaml (required)")
	cmd.Flags().StringVar(&out, "out", ".", "`DIR` to write into")
	cmd.Flags().Var(&validFor, "valid-for", "`TIME` for which the CA is valid")
	return cmd
}

func newTLSIssueCommand(env *environment) *cobra.Command {
	var id mesh.Identity
	var caFile, caKeyFile, out string
	var hosts []string
	validFor := span(365 * day)
	cmd := &cobra.Command{
		Use:   "issue --cluster NAME --site SITE --node NODE",
		Short: "Create a node's certificate",
		Long: "Create a node's certificate for the rpc port: NODE.pem and NODE-key.pem. Peers check the identity in it,\n" +
			"spiffe://CLUSTER/site/SITE/node/NODE, so it needs no address. With --host the certificate can also be used\n" +
			"for the api and admin ports.",
		Example: "  dsnode tls issue --cluster prod --site shanghai-a --node shanghai-a-1 --host a1.example.com,10.0.0.7",
		Args:    takes(),
		RunE: func(*cobra.Command, []string) error {
			if id.Cluster == "" || id.Site == "" || id.Node == "" {
				return usage("see dsnode tls issue --help", "tls issue needs --cluster, --site and --node")
			}
			if err := id.Validate(); err != nil {
				return usage("use the names in node.yaml", "%w", err)
			}
			caCert, err := os.ReadFile(caFile)
			if err != nil {
				return failure("create one with dsnode tls ca, or name its file with --ca", "read the CA: %w", err)
			}
			caKey, err := os.ReadFile(caKeyFile)
			if err != nil {
				return failure("name its file with --ca-key", "read the CA's key: %w", err)
			}
			cert, key, err := mesh.Issue(caCert, caKey, id, hosts, time.Duration(validFor))
			if err != nil {
				return failure("check --ca, --ca-key, --host and --valid-for", "%w", err)
			}
			return writeNew(env, out, []newFile{{id.Node + ".pem", cert, 0o644}, {id.Node + "-key.pem", key, 0o600}},
				"set them under rpc.tls in node.yaml, with the CA's certificate")
		},
	}
	f := cmd.Flags()
	f.StringVar(&id.Cluster, "cluster", "", "`NAME` of the cluster (required)")
	f.StringVar(&id.Site, "site", "", "the node's `SITE` (required)")
	f.StringVar(&id.Node, "node", "", "name of the `NODE` (required)")
	f.StringSliceVar(&hosts, "host", nil, "DNS `NAME,…` and IP addresses for the certificate")
	f.StringVar(&caFile, "ca", "ca.pem", "`FILE` with the CA's certificate")
	f.StringVar(&caKeyFile, "ca-key", "ca-key.pem", "`FILE` with the CA's key")
	f.StringVar(&out, "out", ".", "`DIR` to write into")
	f.Var(&validFor, "valid-for", "`TIME` for which the certificate is valid, at most as long as the CA")
	return cmd
}

func newTLSKeysCommand(env *environment) *cobra.Command {
	var out string
	cmd := &cobra.Command{
		Use:   "keys",
		Short: "Create the keys that all nodes share",
		Long: "Create the two keys that all nodes of a cluster share: operator.key wraps every other key on disk, gossip.key\n" +
			"encrypts the gossip between nodes. Without operator.key the data on the nodes' disks can't be read.",
		Args: takes(),
		RunE: func(*cobra.Command, []string) error {
			gossip := make([]byte, 32)
			_, _ = rand.Read(gossip) // it never returns an error
			return writeNew(env, out, []newFile{
				{"operator.key", []byte(keyring.GenerateOperatorKey().Encode() + "\n"), 0o600},
				{"gossip.key", []byte(base64.StdEncoding.EncodeToString(gossip) + "\n"), 0o600},
			}, "keep a copy of operator.key outside the data centres")
		},
	}
	cmd.Flags().StringVar(&out, "out", ".", "`DIR` to write into")
	return cmd
}

// newFile is a file that must not exist yet.
type newFile struct {
	name    string
	content []byte
	mode    fs.FileMode
}

// writeNew writes all the files or none, prints their names on stdout, and then the
// next step. It replaces no file, because a replaced key could not be restored.
func writeNew(env *environment, dir string, files []newFile, next string) error {
	for _, f := range files {
		path := filepath.Join(dir, f.name)
		if _, err := os.Lstat(path); err == nil {
			return failure("choose another folder with --out, or move the file away", "%s exists already and is not replaced", path)
		} else if !errors.Is(err, fs.ErrNotExist) {
			return failure("choose another folder with --out", "%w", err)
		}
	}
	if err := os.MkdirAll(dir, 0o700); err != nil {
		return failure("choose another folder with --out", "%w", err)
	}
	for i, f := range files {
		if err := writeOne(filepath.Join(dir, f.name), f); err != nil {
			for _, done := range files[:i] {
				err = errors.Join(err, os.Remove(filepath.Join(dir, done.name)))
			}
			return failure("choose another folder with --out", "%w", err)
		}
	}
	for _, f := range files {
		if err := emit(env.stdout, "%s\n", filepath.Join(dir, f.name)); err != nil {
			return err
		}
	}
	say(env.stderr, "done", next)
	return nil
}

// writeOne fails if the file exists by now.
func writeOne(path string, f newFile) error {
	file, err := os.OpenFile(path, os.O_WRONLY|os.O_CREATE|os.O_EXCL, f.mode) //nolint:gosec // the user named the folder
	if err != nil {
		return fmt.Errorf("write %s: %w", f.name, err)
	}
	_, err = file.Write(f.content)
	if err := errors.Join(err, file.Sync(), file.Close()); err != nil {
		return errors.Join(fmt.Errorf("write %s: %w", f.name, err), os.Remove(path))
	}
	return nil
}
