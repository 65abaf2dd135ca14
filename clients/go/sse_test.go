package tidewright

import (
	"bytes"
	"errors"
	"io"
	"math/rand/v2"
	"slices"
	"strings"
	"testing"
	"testing/iotest"
)

// readAll is the data of all events, and how it ended.
func readAll(source io.Reader) ([]string, error) {
	var found []string
	parser := newEvents(source)
	for {
		data, err := parser.next()
		if err != nil {
			return found, err
		}
		found = append(found, string(data))
	}
}

// expected reads events as the standard describes them, from the text as a whole.
func expected(text string) []string {
	text = strings.TrimPrefix(text, "\ufeff")
	text = strings.ReplaceAll(strings.ReplaceAll(text, "\r\n", "\n"), "\r", "\n")
	lines := strings.Split(text, "\n")
	var found, data []string
	for _, line := range lines[:len(lines)-1] { // the last one has no end
		name, value, _ := strings.Cut(line, ":")
		switch {
		case line == "" && data != nil:
			found, data = append(found, strings.Join(data, "\n")), nil
		case name == "data":
			data = append(data, strings.TrimPrefix(value, " "))
		}
	}
	return found
}

var seeds = []string{
	"data: a\n\ndata: b\n\n",
	"data: a\r\n\r\ndata: b\r\rdata:c\n\n",
	"\ufeffdata: a\n\n",
	": comment\n\nevent: x\nid: 1\ndata:  two spaces\ndata\ndata: 3\n\ndata: no end",
	"data\n\ndata:\n\n\n\n:\r\n\r\ndat",
	"data: naïve 🌊\r\n\r\n",
	"database: no\ndata : no\n data: no\ndata: yes\n\n",
	"\r\n\ufeffdata: a\n\n",
	"data: a\r",
	"",
}

func TestEventsAreThoseOfTheStandard(t *testing.T) {
	want := [][]string{
		{"a", "b"}, {"a", "b", "c"}, {"a"}, {" two spaces\n\n3"}, {"", ""}, {"naïve 🌊"}, {"yes"}, nil, nil, nil,
	}
	for index, text := range seeds {
		got, err := readAll(strings.NewReader(text))
		if err != io.EOF || !slices.Equal(got, want[index]) {
			t.Errorf("%q: %q and %v, not %q", text, got, err, want[index])
		}
		if !slices.Equal(expected(text), want[index]) {
			t.Errorf("%q: the oracle gives %q, not %q", text, expected(text), want[index])
		}
	}
}

// cut reads in pieces of random length, some of them empty, and may give the error together with the last bytes.
type cut struct {
	left   []byte
	random *rand.Rand
}

func (c *cut) Read(buffer []byte) (int, error) {
	count := copy(buffer, c.left[:c.random.IntN(min(len(c.left), 6)+1)])
	c.left = c.left[count:]
	if len(c.left) == 0 && c.random.IntN(2) == 0 {
		return count, io.EOF
	}
	return count, nil
}

func FuzzEventsDoNotDependOnTheCuts(f *testing.F) {
	for index, text := range seeds {
		f.Add([]byte(text), uint64(index))
	}
	f.Fuzz(func(t *testing.T, text []byte, seed uint64) {
		want := expected(string(text))
		sources := map[string]io.Reader{
			"whole":               bytes.NewReader(text),
			"byte by byte":        iotest.OneByteReader(bytes.NewReader(text)),
			"data with its error": iotest.DataErrReader(bytes.NewReader(text)),
			"cut":                 &cut{bytes.Clone(text), rand.New(rand.NewPCG(seed, 0))},
		}
		for name, source := range sources {
			if got, err := readAll(source); err != io.EOF || !slices.Equal(got, want) {
				t.Errorf("%s: %q and %v, not %q", name, got, err, want)
			}
		}
	})
}

func TestLongLinesAreCutAcrossBuffers(t *testing.T) {
	long := strings.Repeat("x", 100_000)
	got, _ := readAll(strings.NewReader("data: " + long + "\r\n\r\ndata: end\n\n"))
	if len(got) != 2 || got[0] != long || got[1] != "end" {
		t.Errorf("%d events", len(got))
	}
}

// long repeats a text, and counts what is read of it. It ends, lest a parser without limits takes all memory.
type long struct {
	text string
	read int
}

func (e *long) Read(buffer []byte) (int, error) {
	if e.read > 4*maxLine {
		return 0, io.EOF
	}
	count := copy(buffer, e.text)
	e.read += count
	return count, nil
}

func TestTooLongLinesAndEventsAreRefused(t *testing.T) {
	for _, text := range []string{"x", "data: xxxxxxxxxxxxxxxxxxxxxxxx\n"} {
		source := &long{text: strings.Repeat(text, 32<<10)}
		if _, err := readAll(source); err != errLineTooLong {
			t.Error(err)
		}
		if source.read > 2*maxLine {
			t.Errorf("%d bytes were read", source.read)
		}
	}
}

func TestTheConnectionsErrorIsKept(t *testing.T) {
	broken := errors.New("broken")
	got, err := readAll(io.MultiReader(strings.NewReader("data: a\n\ndata: b\n"), iotest.ErrReader(broken)))
	if err != broken || !slices.Equal(got, []string{"a"}) {
		t.Errorf("%q and %v", got, err)
	}
}
