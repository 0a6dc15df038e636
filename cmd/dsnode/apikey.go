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

func newAPIKeyCommand(env *environment) *cobra.Command {
	return newGroup("apikey", "Create, list and revoke client keys",
		newAPIKeyCreateCommand(env),
		newAPIKeyListCommand(env),
		newAPIKeyRevokeCommand(env),
	)
}

func newAPIKeyCreateCommand(env *environment) *cobra.Command {
	var req admin.APIKeyRequest
	var validFor span
	cmd := &cobra.Command{
		Use:   "create --tenant NAME",
		Short: "Create a client key; its secret is shown once",
		Long: "Create a client key for a tenant. The secret is written to stdout and can't be shown again: the cluster\n" +
			"keeps only its hash.\n\n" +
			"As soon as a key exists, every client needs one, unless access.anonymous is set.",
		Example: "  OPENAI_API_KEY=$(dsnode apikey create --tenant search)\n  dsnode apikey create --tenant search --model deepseek-chat --expires-in 90d",
		Args:    takes(),
	}
	f := cmd.Flags()
	f.StringVar(&req.Tenant, "tenant", "", "`NAME` of the tenant that uses the key (required)")
	f.StringVar(&req.Note, "note", "", "`TEXT` that dsnode apikey list shows")
	f.StringArrayVar(&req.Models, "model", nil, "a `MODEL` that the key may use; repeatable (default all)")
	f.Var(&validFor, "expires-in", "`TIME` after which the key expires, such as 90d or 12h (default never)")
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		if req.Tenant == "" {
			return usage("for example --tenant search", "apikey create needs --tenant NAME")
		}
		if validFor > 0 {
			at := time.Now().Add(time.Duration(validFor)).UTC().Truncate(time.Second)
			req.ExpiresAt = &at
		}
		key, err := s.CreateAPIKey(ctx, req)
		if err != nil {
			return err
		}
		return s.show(key, func(w io.Writer) error {
			say(env.stderr, "done", fmt.Sprintf("created key %s for %s; keep the secret, it is not shown again", key.ID, key.Tenant))
			return emit(w, "%s\n", key.Secret)
		})
	})
}

func newAPIKeyListCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "list", Short: "List the keys, without their secrets", Args: takes()}
	return onCluster(env, cmd, func(ctx context.Context, s *session, _ []string) error {
		keys, err := s.APIKeys(ctx)
		if err != nil {
			return err
		}
		return s.showGrid(keys, keysGrid(keys, time.Now()))
	})
}

func keysGrid(keys []admin.APIKeyInfo, now time.Time) *grid {
	g := &grid{heads: []string{"ID", "TENANT", "STATE", "MODELS", "CREATED", "EXPIRES", "NOTE"}}
	for _, k := range keys {
		models, expires := "all", "never"
		if len(k.Models) > 0 {
			models = strings.Join(k.Models, ",")
		}
		if k.ExpiresAt != nil {
			expires = k.ExpiresAt.UTC().Format(time.RFC3339)
		}
		g.add(plain(k.ID), plain(k.Tenant), stateCell(k.State(now)), plain(models),
			plain(k.CreatedAt.UTC().Format(time.RFC3339)), plain(expires), plain(k.Note))
	}
	return g
}

func newAPIKeyRevokeCommand(env *environment) *cobra.Command {
	cmd := &cobra.Command{Use: "revoke ID", Short: "Revoke a key permanently", Args: takes("the ID of a key")}
	return onCluster(env, cmd, func(ctx context.Context, s *session, args []string) error {
		return s.done(s.RevokeAPIKey(ctx, args[0]), "key %s is revoked", args[0])
	})
}
