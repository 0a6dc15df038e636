package cache

// AppendTo appends the entry as it goes to peers: its key, then what stands in a
// shared tier.
func (e Entry) AppendTo(b []byte) []byte {
	b = append(b, e.Key[:]...)
	return append(b, e.value()...)
}

// DecodeEntry reads what AppendTo wrote; Sealed stays a part of it. Whether the
// entry is what it says shows when it is opened.
func DecodeEntry(b []byte) (Entry, error) {
	var k Key
	if len(b) < len(k) {
		return Entry{}, errEntry
	}
	copy(k[:], b)
	return parseEntry(k, b[len(k):])
}
