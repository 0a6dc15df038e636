// Package jobtable stores one row for each job, merged from the records of all
// journals.
//
// A pure function, Join (join.go), merges records; Row (row.go) reads a row: start
// there. Table stores the rows in a bbolt file. The file is derived: it can be
// rebuilt from the journals or from another node's rows.
package jobtable
