// Package jobtable is what a node knows of every job: one row a job, joined
// from the records of all journals.
//
// A row is merged by one pure function, Join (join.go), and read through Row
// (row.go): start there. Table keeps the rows in a bbolt file, which is derived:
// it can be made anew from the journals or from another node's rows.
package jobtable
