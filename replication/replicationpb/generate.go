// Package replicationpb is generated from replication.proto. protoc is Debian's;
// its two plugins are pinned in tools/go.mod and must be on the PATH. .ci/run
// checks that this folder is fresh.
package replicationpb

//go:generate protoc --go_out=. --go_opt=paths=source_relative --go-grpc_out=. --go-grpc_opt=paths=source_relative replication.proto
