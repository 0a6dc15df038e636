//go:build linux

package main

import (
	"errors"
	"fmt"
	"os"
	"os/exec"
	"path/filepath"
	"strings"
)

// nginxProxy turns buffering off, since streams must not be delayed.
const nginxProxy = `worker_processes auto; daemon off; pid DIR/nginx.pid; worker_rlimit_nofile 16384;
events { worker_connections 8192; }
http {
  access_log off; tcp_nodelay on; keepalive_requests 100000000; keepalive_timeout 300s;
  client_body_temp_path DIR/b; proxy_temp_path DIR/p; fastcgi_temp_path DIR/f; uwsgi_temp_path DIR/u; scgi_temp_path DIR/s;
  upstream model { server UPSTREAM; keepalive 512; keepalive_requests 100000000; }
  server {
    listen LISTEN backlog=4096;
    location / { proxy_pass http://model; proxy_http_version 1.1; proxy_set_header Connection ""; proxy_buffering off; proxy_read_timeout 300s; }
  }
}
`

var errNoNginx = errors.New("nginx is not installed (Debian: apt-get install nginx-light)")

// findNginx also looks in /usr/sbin, where Debian installs it; only root's PATH has that.
func findNginx() (string, error) {
	for _, name := range []string{"nginx", "/usr/sbin/nginx"} {
		if path, err := exec.LookPath(name); err == nil {
			return path, nil
		}
	}
	return "", errNoNginx
}

// startNginx starts nginx with a configuration in which DIR, LISTEN and UPSTREAM are
// replaced.
func (s *sandbox) startNginx(name, binary, conf, upstream string) (*process, string, error) {
	dir := filepath.Join(s.dir, name)
	if err := os.Mkdir(dir, 0o700); err != nil {
		return nil, "", fmt.Errorf("configure nginx: %w", err)
	}
	port, err := freePort()
	if err != nil {
		return nil, "", err
	}
	listen := fmt.Sprintf("127.0.0.1:%d", port)
	text := strings.NewReplacer("DIR", dir, "UPSTREAM", upstream, "LISTEN", listen).Replace(conf)
	file := filepath.Join(dir, "nginx.conf")
	if err := os.WriteFile(file, []byte(text), 0o600); err != nil {
		return nil, "", fmt.Errorf("configure nginx: %w", err)
	}
	p, err := s.start(name, exec.Command(binary, "-p", dir, "-c", file, "-e", "stderr"))
	return p, listen, err
}
