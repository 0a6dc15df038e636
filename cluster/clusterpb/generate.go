// Package clusterpb is generated from cluster.proto by tools/generate. It needs
// Debian's protoc; the two plugins are pinned in tools/go.mod. .ci/run checks that
// the generated files are up to date.
package clusterpb

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative cluster.proto
