package config

import (
	"bytes"
	"encoding"
	"errors"
	"fmt"
	"io"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"unicode/utf8"

	"go.yaml.in/yaml/v4"
	"go.yaml.in/yaml/v4/plugin/loaderlimits"
)

// MaxBytes bounds a configuration file.
const MaxBytes = 1 << 20

// maxDepth bounds nesting; no schema here is deeper than ten levels.
const maxDepth = 64

// Decode reads one YAML document into out, a pointer to a struct with yaml tags.
// Fields that the text doesn't mention keep their values. Unknown and duplicate
// keys, wrong types, bad durations, anchors and aliases, tags, and further
// documents are errors. The returned Source collects them all, and the caller's
// checks add their own; Source.Err returns them as Problems.
//
// It supports structs, maps with string keys, slices, strings, integers, booleans
// and encoding.TextUnmarshaler, and panics on any other type.
func Decode(name string, data []byte, out any) *Source {
	s := newSource(name)
	v := reflect.ValueOf(out)
	if v.Kind() != reflect.Pointer || v.Elem().Kind() != reflect.Struct {
		panic(fmt.Sprintf("config.Decode: out is %T, want a pointer to a struct", out))
	}
	if root := s.parse(data); root != nil {
		s.lines[""] = root.Line
		s.decode(root, v.Elem(), nil)
	}
	return s
}

// parse returns the top node of the only document, or nil after noting a problem.
func (s *Source) parse(data []byte) *yaml.Node {
	fail := func(line int, message, hint string) *yaml.Node {
		s.rejected[""] = true
		s.note(line, "", message, hint)
		return nil
	}
	if len(data) > MaxBytes {
		return fail(0, fmt.Sprintf("the file has %d bytes, more than the limit of %d", len(data), MaxBytes), "remove everything but the configuration")
	}
	if at, what := firstForbidden(data); at >= 0 {
		return fail(1+bytes.Count(data[:at], []byte("\n")), what, "save the file as plain UTF-8 text")
	}
	loader, err := yaml.NewLoader(bytes.NewReader(data), yaml.WithPlugin(loaderlimits.New(loaderlimits.DepthValue(maxDepth))))
	if err != nil {
		return fail(0, "cannot be read as YAML: "+err.Error(), "")
	}
	var doc, second yaml.Node
	switch err := loader.Load(&doc); {
	case errors.Is(err, io.EOF):
		return fail(0, "the file is empty", "start from the commented sample in deploy/")
	case err != nil:
		line, message := syntaxError(err)
		return fail(line, message, yamlHint(data, line, message))
	}
	switch err := loader.Load(&second); {
	case errors.Is(err, io.EOF):
	case err != nil:
		line, message := syntaxError(err)
		return fail(line, message, yamlHint(data, line, message))
	default:
		return fail(second.Line, "a second document starts here", "keep one document in a file")
	}
	if len(doc.Content) != 1 || isNullNode(doc.Content[0]) {
		return fail(0, "the file is empty", "start from the commented sample in deploy/")
	}
	return doc.Content[0]
}

// firstForbidden finds the first invalid UTF-8 byte or control character. The
// YAML library reports these without a line.
func firstForbidden(data []byte) (at int, what string) {
	for i := 0; i < len(data); {
		r, n := utf8.DecodeRune(data[i:])
		if r == utf8.RuneError && n <= 1 {
			return i, "the text is not valid UTF-8"
		}
		if r < ' ' && r != '\t' && r != '\n' && r != '\r' || r == 0x7f {
			return i, fmt.Sprintf("the text contains the control character 0x%02x", r)
		}
		i += n
	}
	return -1, ""
}

func syntaxError(err error) (line int, message string) {
	var load *yaml.LoadError
	if !errors.As(err, &load) {
		return 0, "is not valid YAML: " + err.Error()
	}
	if strings.HasPrefix(load.Message, "unknown anchor") {
		// The library's message repeats the text, which may be a secret that starts
		// with *.
		return load.Mark.Line, "an alias (*) refers to no anchor"
	}
	message = "is not valid YAML: " + load.Message
	if load.ContextMsg != "" {
		message += " " + load.ContextMsg
		if load.ContextMark.Line > 0 && load.ContextMark.Line != load.Mark.Line {
			message += fmt.Sprintf(" that starts on line %d", load.ContextMark.Line)
		}
	}
	return load.Mark.Line, message
}

// yamlHint returns a hint for common mistakes, or "".
func yamlHint(data []byte, line int, message string) string {
	lines := bytes.Split(data, []byte("\n"))
	if line < 1 || line > len(lines) {
		return ""
	}
	text := lines[line-1]
	indent := text[:len(text)-len(bytes.TrimLeft(text, " \t"))]
	switch {
	case strings.HasPrefix(message, "an alias"):
		return "quote text that starts with *"
	case bytes.IndexByte(indent, '\t') >= 0:
		return "indent with spaces, not tabs"
	case strings.Contains(message, "mapping values are not allowed") && bytes.Contains(text, []byte(": ")):
		return "quote values that contain a colon and a space"
	}
	return ""
}

func isNullNode(n *yaml.Node) bool {
	return n.Kind == yaml.ScalarNode && n.ShortTag() == "!!null" && n.Style&yaml.TaggedStyle == 0
}

// plain rejects aliases, anchors and tags, which are not allowed for any type.
func (s *Source) plain(n *yaml.Node, p Path) bool {
	switch {
	case n.Kind == yaml.AliasNode:
		s.Reject(p, "aliases (*"+clipWord(n.Value)+") are not supported", "write the value out")
	case n.Anchor != "":
		s.Reject(p, "anchors (&"+clipWord(n.Anchor)+") are not supported", "write the value out where it is needed")
	case n.Style&yaml.TaggedStyle != 0:
		s.Reject(p, "the tag "+clipWord(n.Tag)+" is not supported", "write the value without a tag")
	default:
		return true
	}
	return false
}

// defaulter sets the defaults of a value in a map or list before it is decoded.
type defaulter interface{ setDefaults() }

func (s *Source) decode(n *yaml.Node, v reflect.Value, p Path) {
	if v.Type() == reflect.TypeFor[Secret]() {
		s.decodeSecret(n, v, p)
		return
	}
	if !s.plain(n, p) {
		return
	}
	if text, ok := v.Addr().Interface().(encoding.TextUnmarshaler); ok {
		s.decodeText(n, text, p)
		return
	}
	switch v.Kind() {
	case reflect.Struct:
		s.decodeStruct(n, v, p)
	case reflect.Map:
		s.decodeMap(n, v, p)
	case reflect.Slice:
		s.decodeSlice(n, v, p)
	default:
		s.decodeScalar(n, v, p)
	}
}

// decodeSecret never repeats the text in a message: users write the secret
// itself there by mistake.
func (s *Source) decodeSecret(n *yaml.Node, v reflect.Value, p Path) {
	const message, hint = "must be a reference to a secret", "write {env: NAME} or {file: PATH}"
	decorated := func(n *yaml.Node) bool { return n.Anchor != "" || n.Style&yaml.TaggedStyle != 0 }
	if n.Kind != yaml.MappingNode || decorated(n) {
		s.Reject(p, message, hint)
		return
	}
	for i := 0; i < len(n.Content); i += 2 {
		k, value := n.Content[i], n.Content[i+1]
		if k.Value != "env" && k.Value != "file" || decorated(k) || decorated(value) || value.Kind != yaml.ScalarNode {
			s.Reject(p, message+" with the key env or file", hint)
			return
		}
	}
	s.decodeStruct(n, v, p)
}

func (s *Source) decodeStruct(n *yaml.Node, v reflect.Value, p Path) {
	fields := map[string]int{}
	var names []string
	for i := range v.NumField() {
		name, _, _ := strings.Cut(v.Type().Field(i).Tag.Get("yaml"), ",")
		if name == "" || name == "-" {
			continue
		}
		fields[name] = i
		names = append(names, name)
	}
	s.eachKey(n, p, func(key string, keyNode, value *yaml.Node) {
		at := p.At(key)
		i, known := fields[key]
		if !known && s.full() {
			s.omitted++
			return
		}
		if !known {
			hint := "allowed here: " + strings.Join(names, ", ")
			if best := nearestWord(key, names); best != "" {
				hint = didYouMean(key, names) + " (" + hint + ")"
				// The right key is misspelt: don't report it as missing too.
				if !slices.ContainsFunc(n.Content, func(c *yaml.Node) bool { return c.Value == best }) {
					s.rejected[p.At(best).String()] = true
				}
			}
			s.note(keyNode.Line, at.String(), "unknown key "+quoted(key), hint)
			return
		}
		field := v.Field(i)
		if isNullNode(value) {
			s.decodeNull(field, at)
			return
		}
		s.decode(value, field, at)
	})
}

// decodeNull accepts null for a section whose lines may all be commented out,
// and rejects it as a forgotten value anywhere else.
func (s *Source) decodeNull(v reflect.Value, p Path) {
	switch v.Kind() {
	case reflect.Map, reflect.Slice:
		return
	case reflect.Struct:
		if v.Type() != reflect.TypeFor[Secret]() {
			return
		}
	default:
	}
	s.Reject(p, "has no value", "write one, or remove the key for the default")
}

func (s *Source) decodeMap(n *yaml.Node, v reflect.Value, p Path) {
	if v.IsNil() {
		v.Set(reflect.MakeMap(v.Type()))
	}
	s.eachKey(n, p, func(key string, _, value *yaml.Node) {
		elem := newElem(v.Type().Elem())
		at := p.At(key)
		if isNullNode(value) {
			s.decodeNull(elem, at)
		} else {
			s.decode(value, elem, at)
		}
		v.SetMapIndex(reflect.ValueOf(key).Convert(v.Type().Key()), elem)
	})
}

func (s *Source) decodeSlice(n *yaml.Node, v reflect.Value, p Path) {
	if n.Kind != yaml.SequenceNode {
		s.Reject(p, "must be a list, not "+nodeKind(n), "write - before each entry, or [a, b]")
		return
	}
	list := reflect.MakeSlice(v.Type(), 0, len(n.Content))
	for i, c := range n.Content {
		at := p.At(i)
		s.lines[at.String()] = c.Line
		elem := newElem(v.Type().Elem())
		if isNullNode(c) {
			s.Reject(at, "is an empty entry", "write a value or remove it")
		} else {
			s.decode(c, elem, at)
		}
		list = reflect.Append(list, elem)
	}
	v.Set(list)
}

func newElem(t reflect.Type) reflect.Value {
	elem := reflect.New(t)
	if d, ok := elem.Interface().(defaulter); ok {
		d.setDefaults()
	}
	return elem.Elem()
}

// eachKey calls f for each key that is a plain string, once.
func (s *Source) eachKey(n *yaml.Node, p Path, f func(key string, keyNode, value *yaml.Node)) {
	if n.Kind != yaml.MappingNode {
		s.Reject(p, "must be keys with values, not "+nodeKind(n), "write key: value lines below it")
		return
	}
	first := make(map[string]int, len(n.Content)/2)
	for i := 0; i+1 < len(n.Content); i += 2 {
		k, value := n.Content[i], n.Content[i+1]
		if k.Kind != yaml.ScalarNode || isNullNode(k) || k.Value == "" || k.Anchor != "" || k.Style&yaml.TaggedStyle != 0 {
			s.note(k.Line, p.String(), "has a key that is not a plain string", "write key: value")
			continue
		}
		if k.Value == "<<" {
			s.note(k.Line, p.String(), "merge keys (<<) are not supported", "write the values out")
			s.rejected[p.String()] = true // don't report the keys that it would have merged as missing
			continue
		}
		at := p.At(k.Value)
		if line, again := first[k.Value]; again {
			s.note(k.Line, at.String(), fmt.Sprintf("the key %s is already on line %d", quoted(k.Value), line), "keep one of them")
			continue
		}
		first[k.Value] = k.Line
		line := k.Line
		if value.Kind == yaml.ScalarNode && value.Line > line {
			line = value.Line
		}
		s.lines[at.String()] = line
		f(k.Value, k, value)
	}
}

func (s *Source) decodeText(n *yaml.Node, out encoding.TextUnmarshaler, p Path) {
	if n.Kind != yaml.ScalarNode {
		s.Reject(p, "must be one value, not "+nodeKind(n), "")
		return
	}
	if err := out.UnmarshalText([]byte(n.Value)); err != nil {
		s.rejectError(p, err)
	}
}

// decodeScalar takes strings as they are written, so that the model name 1.10
// doesn't become 1.1. It accepts numbers only in decimal, without quotes, and
// booleans only as true and false.
func (s *Source) decodeScalar(n *yaml.Node, v reflect.Value, p Path) {
	if n.Kind != yaml.ScalarNode {
		s.Reject(p, "must be one value, not "+nodeKind(n), "")
		return
	}
	isQuoted := n.Style&(yaml.SingleQuotedStyle|yaml.DoubleQuotedStyle|yaml.LiteralStyle|yaml.FoldedStyle) != 0
	switch v.Kind() {
	case reflect.String:
		v.SetString(n.Value)
	case reflect.Bool:
		if isQuoted || n.Value != "true" && n.Value != "false" {
			s.Reject(p, "must be true or false, not "+quoted(n.Value), "write it without quotes")
			return
		}
		v.SetBool(n.Value == "true")
	case reflect.Int, reflect.Int64:
		i, err := strconv.ParseInt(n.Value, 10, v.Type().Bits())
		switch {
		case errors.Is(err, strconv.ErrRange):
			s.Reject(p, quoted(n.Value)+" is too large", "")
		case err != nil || n.Value != strconv.FormatInt(i, 10):
			s.Reject(p, "must be a whole number, not "+quoted(n.Value), "write only digits, without a unit or separators")
		case isQuoted:
			s.Reject(p, "must be a number, not text", "write "+n.Value+" without quotes")
		default:
			v.SetInt(i)
		}
	default:
		panic(fmt.Sprintf("config.Decode: %s has the type %s, which it can't decode", p, v.Type()))
	}
}

func nodeKind(n *yaml.Node) string {
	switch n.Kind {
	case yaml.MappingNode:
		return "keys with values"
	case yaml.SequenceNode:
		return "a list"
	default:
		return quoted(n.Value)
	}
}
