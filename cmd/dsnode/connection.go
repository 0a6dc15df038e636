package main

import (
	"context"
	"fmt"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

// defaultAdmin is where a node's admin port is when nobody says otherwise.
const defaultAdmin = "http://127.0.0.1:8081"

// connection is how a command reaches a cluster, and how it shows what it got.
type connection struct {
	admin     []string
	ca        string
	tokenFile string
	output    string
	formats   []string
	timeout   time.Duration
}

// session is a connection in use.
type session struct {
	*admin.Client
	env     *environment
	output  string
	timeout time.Duration // of one question; also of a wait
}

// onCluster makes cmd one that talks to a cluster: it gets the flags for that,
// and work gets the session.
func onCluster(env *environment, cmd *cobra.Command, work func(ctx context.Context, s *session, args []string) error) *cobra.Command {
	return onClusterAs(env, cmd, []string{outputTable, outputJSON, outputYAML}, work)
}

// onClusterAs is onCluster for an answer in other formats, the first of them by
// default.
func onClusterAs(env *environment, cmd *cobra.Command, formats []string, work func(ctx context.Context, s *session, args []string) error) *cobra.Command {
	c := connection{formats: formats}
	f := cmd.Flags()
	f.StringSliceVar(&c.admin, "admin", nil, "admin `URL[,URL]`s, asked in turn (or DSNODE_ADMIN; default the dev cluster that runs, else "+defaultAdmin+")")
	f.StringVar(&c.ca, "admin-ca", "", "PEM `FILE` with the CA of the admin port's certificate (default the system's)")
	f.StringVar(&c.tokenFile, "admin-token-file", "", "`FILE` with the operator's token (or DSNODE_ADMIN_TOKEN)")
	f.StringVarP(&c.output, "output", "o", formats[0], "`FORMAT` of the answer: "+orList(formats))
	f.DurationVar(&c.timeout, "timeout", 10*time.Second, "`TIME` that one question to the cluster may take")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := c.open(env)
		if err != nil {
			return err
		}
		defer s.Close()
		ctx := cmd.Context()
		if ctx == nil {
			ctx = context.Background()
		}
		return work(ctx, s, args)
	}
	return cmd
}

func (c *connection) open(env *environment) (*session, error) {
	if err := checkOutput(c.output, c.formats); err != nil {
		return nil, err
	}
	if c.timeout <= 0 {
		return nil, usage("write for instance --timeout 10s", "--timeout must be more than nothing, not %s", c.timeout)
	}
	token, err := c.token(env)
	if err != nil {
		return nil, err
	}
	client, err := admin.NewClient(c.urls(env), admin.ClientOptions{
		Token: token, CAFile: c.ca, Timeout: c.timeout, Author: author(env),
	})
	if err != nil {
		return nil, &exitError{code: exitUsage, err: err, hint: "check --admin, --admin-ca and DSNODE_ADMIN"}
	}
	return &session{Client: client, env: env, output: c.output, timeout: c.timeout}, nil
}

// patient gives a command whose question takes long another default.
func patient(cmd *cobra.Command, timeout time.Duration) *cobra.Command {
	f := cmd.Flags().Lookup("timeout")
	f.DefValue = timeout.String()
	_ = f.Value.Set(f.DefValue) // it is a duration
	return cmd
}

// urls are those of the flag, else of the environment, else of the dev cluster
// that runs, else the default.
func (c *connection) urls(env *environment) []string {
	if len(c.admin) > 0 {
		return c.admin
	}
	if text := env.getenv("DSNODE_ADMIN"); text != "" {
		return strings.Split(text, ",")
	}
	if dev, runs := env.readRunningDev(); runs {
		return dev.Admin
	}
	return []string{defaultAdmin}
}

func (c *connection) token(env *environment) (string, error) {
	if c.tokenFile == "" {
		return strings.TrimSpace(env.getenv("DSNODE_ADMIN_TOKEN")), nil
	}
	text, err := os.ReadFile(c.tokenFile)
	if err != nil {
		return "", usage("check --admin-token-file", "read the operator's token: %w", err)
	}
	token := strings.TrimSpace(string(text))
	if token == "" || strings.ContainsAny(token, " \t\r\n") {
		return "", usage("put the token alone into the file", "%s holds no token", c.tokenFile)
	}
	return token, nil
}

// author is who makes a change, as the history shows it: "ann@desk".
func author(env *environment) string {
	name := env.getenv("USER")
	if u, err := user.Current(); name == "" && err == nil {
		name = u.Username
	}
	host, err := os.Hostname()
	if err != nil || host == "" {
		return name
	}
	return fmt.Sprintf("%s@%s", name, host)
}
