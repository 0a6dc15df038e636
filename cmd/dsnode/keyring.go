package main

import (
	"context"
	"fmt"
	"io"
	"slices"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newKeyringCommand(env *environment) *cobra.Command {
	return newGroup("keyring", "Show and rotate the keys that encrypt data",
		newKeyringListCommand(env),
		newKeyringRotateCommand(env),
		newKeyringRewrapCommand(env),
	)
}

func newKeyringListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the data keys, their state and their records",
		Long: "List the data keys. A new key is pending until every node has confirmed that it can open it. Then it is active:\n" +
			"new records are encrypted with it. The previous key is retired: its records are re-encrypted in the\n" +
			"background, and it is dropped when no node has any left. RECORDS counts each copy of a record; - is unknown.",
		Args: takes(),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		k, err := s.Keyring(ctx)
		if err != nil {
			return err
		}
		return showKeyring(s, k)
	})
}

func showKeyring(s *session, k admin.Keyring) error {
	return s.show(k, func(w io.Writer) error {
		if err := dataKeysGrid(k, time.Now()).write(w, s.env.palette()); err != nil || k.OperatorKey == nil {
			return err
		}
		if err := emit(w, "\nThe data keys are wrapped with operator key %s.\n", printable(*k.OperatorKey)); err != nil {
			return err
		}
		for _, n := range k.Nodes {
			if n.OperatorKey != nil && *n.OperatorKey == *k.OperatorKey {
				continue
			}
			if err := emit(w, "Node %s was started with operator key %s.\n", printable(n.Name), text(n.OperatorKey)); err != nil {
				return err
			}
		}
		return nil
	})
}

func dataKeysGrid(k admin.Keyring, now time.Time) *grid {
	g := &grid{heads: []string{"ID", "KIND", "STATE", "AGE", "RECORDS", "CONFIRMED BY", "MISSING"}}
	for _, key := range k.Keys {
		state := plain(key.State)
		switch key.State {
		case "active":
			state.colour = green
		case "pending":
			state.colour = yellow
		}
		g.add(plain(key.ID), plain(key.Kind), state, plain(age(now.Sub(key.CreatedAt))), plain(number(key.Records)),
			plain(strings.Join(key.Confirmed, ",")), cell{strings.Join(key.Missing, ","), yellow})
	}
	return g
}

// keyringPollEvery is the pause between two requests for the state of a key.
const keyringPollEvery = 200 * time.Millisecond

func newKeyringRotateCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Make a new data key and re-encrypt old records",
		Long: "Make a new data key and wait until it is active, which is when every node has confirmed that it can open it.\n" +
			"Nodes re-encrypt the records of the previous key in the background.\n\n" +
			"After --timeout the command ends with exit code 1 and names the missing nodes. The key still becomes active\n" +
			"when they have confirmed it, and repeating the command until then makes no second key.",
		Args: takes(),
	}
	onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		ctx, cancel := context.WithTimeout(ctx, s.timeout)
		defer cancel()
		key, err := s.RotateKeyring(ctx, "")
		if err != nil {
			return err
		}
		key, nodes, err := awaitDataKey(ctx, s, key)
		if err != nil {
			return err
		}
		if key.State == "pending" {
			return failure("it becomes active when they have confirmed it; dsnode node remove NAME removes a node that will not come back",
				"data key %s is not active yet: not confirmed by %s", key.ID, bySite(key.Missing, nodes))
		}
		return s.show(key, func(w io.Writer) error {
			return emit(w, "Data key %s is active. dsnode keyring list shows how many records the previous key still has.\n", printable(key.ID))
		})
	})
	return patient(cmd, 30*time.Second)
}

// awaitDataKey polls until the key is active or ctx has ended, and returns what it
// saw last.
func awaitDataKey(ctx context.Context, s *session, key admin.DataKey) (admin.DataKey, []admin.KeyringNode, error) {
	var nodes []admin.KeyringNode
	for key.State == "pending" {
		k, err := s.Keyring(ctx)
		switch {
		case err != nil && ctx.Err() != nil:
			return key, nodes, nil
		case err != nil:
			return key, nodes, err
		}
		nodes = k.Nodes
		at := slices.IndexFunc(k.Keys, func(one admin.DataKey) bool { return one.ID == key.ID })
		if at < 0 {
			return key, nodes, failure("dsnode keyring list shows the keys", "data key %s does not exist any more", key.ID)
		}
		if key = k.Keys[at]; key.State != "pending" {
			break
		}
		select {
		case <-ctx.Done():
			return key, nodes, nil
		case <-time.After(keyringPollEvery):
		}
	}
	return key, nodes, nil
}

// bySite names nodes with their sites: "beijing-1 (site beijing)".
func bySite(names []string, nodes []admin.KeyringNode) string {
	named := make([]string, 0, len(names))
	for _, name := range names {
		text := name
		for _, n := range nodes {
			if n.Name == name {
				text = fmt.Sprintf("%s (site %s)", name, n.Site)
			}
		}
		named = append(named, text)
	}
	return strings.Join(named, ", ")
}

func newKeyringRewrapCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rewrap",
		Short: "Wrap all data keys with a new operator key",
		Long: "Wrap all data keys with a new operator key.\n\n" +
			"  1. On one node after the other, set the new key as operator_key and the present one as\n" +
			"     operator_key_previous in node.yaml, and restart the node.\n" +
			"  2. Run this command. It is refused while a node lacks the new key, and names the node.\n" +
			"  3. When dsnode keyring list shows every key confirmed by all nodes, remove operator_key_previous.",
		Args: takes(),
	}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		k, err := s.RewrapKeyring(ctx, "")
		if err != nil {
			return err
		}
		say(env.stderr, "done", fmt.Sprintf("the data keys are wrapped with operator key %s", text(k.OperatorKey)))
		return showKeyring(s, k)
	})
}
