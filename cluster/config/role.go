package config

import (
	"cmp"
	"maps"
	"slices"
	"strings"
)

// Roles of a site, seen from the primary.
const (
	RolePrimary  = "primary"
	RoleSameCity = "same-city"
	RoleRemote   = "remote"
)

// Role is a site's relation to the primary: RolePrimary, RoleSameCity or
// RoleRemote. It is "" if one of the two is not configured: unknown is not remote.
func (c *Config) Role(site, primary string) string {
	s, ok := c.Sites[site]
	p, known := c.Sites[primary]
	switch {
	case !ok || !known:
		return ""
	case site == primary:
		return RolePrimary
	case s.City == p.City:
		return RoleSameCity
	}
	return RoleRemote
}

// SiteOrder lists all configured sites in the order in which a node of the site
// from prefers them: its own, then those of the same city, then the others; each
// group by priority. For a site that isn't configured, all are others.
func (c *Config) SiteOrder(from string) []string {
	distance := func(name string) int {
		switch c.Role(name, from) {
		case RolePrimary:
			return 0
		case RoleSameCity:
			return 1
		}
		return 2
	}
	return slices.SortedFunc(maps.Keys(c.Sites), func(a, b string) int {
		return cmp.Or(distance(a)-distance(b), cmp.Compare(c.Sites[a].Priority, c.Sites[b].Priority), strings.Compare(a, b))
	})
}
