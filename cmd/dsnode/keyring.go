package main

import (
	"context"
	"fmt"
	"io"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

func newKeyringCommand(env *environment) *cobra.Command {
	return newGroup("keyring", "Keys that data is encrypted with",
		newKeyringListCommand(env),
		newKeyringRotateCommand(env),
		newKeyringRewrapCommand(env),
	)
}

func newKeyringListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "list",
		Short: "List the data keys: who has confirmed each, and how many records it has sealed",
		Long: "List the data keys. A new one is pending until every node has confirmed that it can open it, then active:\n" +
			"new records are sealed with it. The one before is retired; its records are sealed anew in the background,\n" +
			"and it is dropped when no node carries any. RECORDS counts copies, - is unknown.",
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
	return show(s.env.stdout, s.output, k, func(w io.Writer) error {
		if err := dataKeysGrid(k, time.Now()).write(w, s.env.palette()); err != nil || k.OperatorKey == nil {
			return err
		}
		if err := emit(w, "\nWrapped with operator key %s.\n", printable(*k.OperatorKey)); err != nil {
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

// keyringLookEvery is the pause between two looks at something that is awaited.
const keyringLookEvery = 200 * time.Millisecond

func newKeyringRotateCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rotate",
		Short: "Seal new records with a new data key, and the old ones anew in the background",
		Long: "Make a new data key and wait until it is in use, which is when every node has confirmed that it can open it.\n" +
			"After --timeout the command ends with exit code 1 and says who is missing; the key comes into use all the\n" +
			"same once they have confirmed it. Repeating the command meanwhile makes no further key.",
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
			return failure("it comes into use by itself when they have; dsnode node remove NAME takes out a node that is gone for good",
				"data key %s is not in use yet: not confirmed by %s", key.ID, bySite(key.Missing, nodes))
		}
		return show(env.stdout, s.output, key, func(w io.Writer) error {
			return emit(w, "Data key %s is in use. dsnode keyring list shows how many records the one before still has.\n", printable(key.ID))
		})
	})
	return patient(cmd, 30*time.Second)
}

// awaitDataKey looks until the key is in use or ctx has ended, and gives what it
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
		found := false
		for _, one := range k.Keys {
			if one.ID == key.ID {
				key, found = one, true
			}
		}
		if !found {
			return key, nodes, failure("look with dsnode keyring list", "data key %s is gone again", key.ID)
		}
		if key.State != "pending" {
			break
		}
		select {
		case <-ctx.Done():
			return key, nodes, nil
		case <-time.After(keyringLookEvery):
		}
	}
	return key, nodes, nil
}

// bySite names nodes with their sites: "beijing-1 (site beijing)".
func bySite(names []string, nodes []admin.KeyringNode) string {
	words := make([]string, 0, len(names))
	for _, name := range names {
		word := name
		for _, n := range nodes {
			if n.Name == name {
				word = fmt.Sprintf("%s (site %s)", name, n.Site)
			}
		}
		words = append(words, word)
	}
	return strings.Join(words, ", ")
}

func newKeyringRewrapCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{
		Use:   "rewrap",
		Short: "Wrap all data keys with the new operator key that every node has by now",
		Long: "Wrap all data keys with another operator key. First give every node, one after the other, the new key as\n" +
			"operator_key and the present one as operator_key_previous in its node.yaml, and restart it. Then run this:\n" +
			"it is refused, with names, while a node lacks the new key. When dsnode keyring list shows every key confirmed\n" +
			"by all nodes, operator_key_previous can go.",
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
