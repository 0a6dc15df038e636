package main

import (
	"context"
	"fmt"
	"io"
	"os"
	"os/user"
	"strings"
	"time"

	"github.com/spf13/cobra"

	"github.com/dsnode/dsnode/node/admin"
)

// defaultAdmin is the default address of a node's admin port.
const defaultAdmin = "http://127.0.0.1:8081"

// connection has the flags of every command that talks to a cluster: where the
// cluster is, and how the answer is shown.
type connection struct {
	admin     []string
	ca        string
	tokenFile string
	output    string
	formats   []string
	timeout   time.Duration
}

// session is an open connection.
type session struct {
	*admin.Client
	env     *environment
	output  string
	timeout time.Duration // of one request, and of a command that waits
}

// onCluster adds the flags of a connection to cmd, and runs work with the session.
func onCluster(env *environment, cmd *cobra.Command, work func(ctx context.Context, s *session, args []string) error) *cobra.Command {
	return onClusterAs(env, cmd, []string{outputTable, outputJSON, outputYAML}, work)
}

// onClusterAs is onCluster with other output formats; the first is the default.
func onClusterAs(env *environment, cmd *cobra.Command, formats []string, work func(ctx context.Context, s *session, args []string) error) *cobra.Command {
	c := connection{formats: formats}
	f := cmd.Flags()
	f.StringSliceVar(&c.admin, "admin", nil, "`URL[,URL]` of admin ports, tried in turn (or DSNODE_ADMIN; default the running dev cluster, else "+defaultAdmin+")")
	f.StringVar(&c.ca, "admin-ca", "", "PEM `FILE` with the CA of the admin port's certificate (default the system's CAs)")
	f.StringVar(&c.tokenFile, "admin-token-file", "", "`FILE` with the operator's token (or DSNODE_ADMIN_TOKEN)")
	f.StringVarP(&c.output, "output", "o", formats[0], "`FORMAT` of the output: "+orList(formats))
	f.DurationVar(&c.timeout, "timeout", 10*time.Second, "`TIME` that a request to the cluster may take")
	cmd.RunE = func(cmd *cobra.Command, args []string) error {
		s, err := c.open(env)
		if err != nil {
			return err
		}
		defer s.Close()
		return work(cmd.Context(), s, args)
	}
	return cmd
}

func (c *connection) open(env *environment) (*session, error) {
	if err := checkOutput(c.output, c.formats); err != nil {
		return nil, err
	}
	if c.timeout <= 0 {
		return nil, usage("for example --timeout 10s", "--timeout must be greater than zero, not %s", c.timeout)
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

// show writes value as JSON or YAML, or calls table for the output for people.
func (s *session) show(value any, table func(io.Writer) error) error {
	return show(s.env.stdout, s.output, value, table)
}

// showGrid is show with a table that is only a grid.
func (s *session) showGrid(value any, g *grid) error {
	return s.show(value, func(w io.Writer) error { return g.write(w, s.env.palette()) })
}

// done returns the error of a change. Without one it tells the user that the change is made.
func (s *session) done(err error, format string, args ...any) error {
	if err == nil {
		say(s.env.stderr, "done", fmt.Sprintf(format, args...))
	}
	return err
}

// patient sets the default of --timeout for a command whose request takes long.
func patient(cmd *cobra.Command, timeout time.Duration) *cobra.Command {
	f := cmd.Flags().Lookup("timeout")
	f.DefValue = timeout.String()
	_ = f.Value.Set(f.DefValue) // it is a duration
	return cmd
}

// urls are those of the flag, else of DSNODE_ADMIN, else of the running dev
// cluster, else the default.
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
		return "", usage("the file must contain the token and nothing else", "%s holds no token", c.tokenFile)
	}
	return token, nil
}

// author names the user who makes a change, for the history: "ann@desk".
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
