//go:build linux

package test

import (
	"testing"

	"github.com/dsnode/dsnode/test/lab"
)

func TestMain(m *testing.M) { lab.Main(m) }
