package keyring

import "errors"

var (
	// ErrWrongKey means that the bytes were sealed with another key.
	ErrWrongKey = errors.New("sealed with another key")
	// ErrDamaged means that the bytes differ from what was sealed, or were sealed
	// for another place.
	ErrDamaged = errors.New("sealed data is damaged")
	// ErrNewerFormat means that a later version of dsnode wrote the bytes.
	ErrNewerFormat = errors.New("written in a format that this version does not know")
	// ErrNoOperatorKey means that the reference names no key.
	ErrNoOperatorKey = errors.New("no operator key")
	// ErrBadOperatorKey means that the content is not 32 bytes in base64 or hex.
	ErrBadOperatorKey = errors.New("not an operator key")
	// ErrKeyFileMode means that the key file's mode allows access by others.
	ErrKeyFileMode = errors.New("operator key file is open to others")
	// ErrWrongOperatorKey means that the node's key was wrapped with another
	// operator key than the one given.
	ErrWrongOperatorKey = errors.New("wrong operator key")
	// ErrNoDataKey means that the cluster has not agreed on a data key yet, or that
	// not every site has confirmed it. Sealing must wait.
	ErrNoDataKey = errors.New("no data key is in use yet")
	// ErrUnknownKey means that the bytes were sealed with a data key that this
	// ring does not hold. The error is an UnknownKeyError.
	ErrUnknownKey = errors.New("sealed with a data key that is not known here")
)

// UnknownKeyError names the missing data key. errors.Is matches it to ErrUnknownKey.
type UnknownKeyError struct{ Key KeyID }

func (e *UnknownKeyError) Error() string        { return ErrUnknownKey.Error() + ": " + e.Key.String() }
func (e *UnknownKeyError) Is(target error) bool { return target == ErrUnknownKey }
