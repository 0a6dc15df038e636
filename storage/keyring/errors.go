package keyring

import "errors"

var (
	// ErrWrongKey means that the bytes were sealed with another key.
	ErrWrongKey = errors.New("sealed with another key")
	// ErrDamaged means that the bytes are not what was sealed, or were sealed
	// for another place than the one they were found in.
	ErrDamaged = errors.New("sealed data is damaged")
	// ErrNewerFormat means that a later version of dsnode wrote the bytes.
	ErrNewerFormat = errors.New("written in a format that this version does not know")
	// ErrNoOperatorKey means that the reference names no key.
	ErrNoOperatorKey = errors.New("no operator key")
	// ErrBadOperatorKey means that what was found is not 32 bytes in base64 or hex.
	ErrBadOperatorKey = errors.New("not an operator key")
	// ErrKeyFileMode means that others than the owner may use the key file.
	ErrKeyFileMode = errors.New("operator key file is open to others")
	// ErrWrongOperatorKey means that the node's key was wrapped with another
	// operator key than the one given.
	ErrWrongOperatorKey = errors.New("wrong operator key")
)
