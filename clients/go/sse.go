package tidewright

import (
	"bytes"
	"fmt"
	"io"
)

// maxLine bounds a line of a stream, and the data of an event of several lines.
const maxLine = 16 << 20

var errLineTooLong = fmt.Errorf("a line or event of more than %d bytes", maxLine)

// events reads server-sent events as the HTML standard has them, and of these the data only. It reads no more than it
// needs for the next event and one buffer.
type events struct {
	source  io.Reader
	buffer  []byte
	unread  []byte // of the buffer
	line    []byte // that began in an earlier buffer
	data    []byte
	hasData bool
	// A CR ended the last line, so that a LF, which may come with the next read, belongs to it.
	skipsLF bool
	begun   bool
}

func newEvents(source io.Reader) *events {
	return &events{source: source, buffer: make([]byte, 32<<10)}
}

// next is the data of the next event, valid until the next call. io.EOF is the end; an event without the blank line
// after it is none.
func (e *events) next() ([]byte, error) {
	e.data, e.hasData = e.data[:0], false
	for {
		line, err := e.nextLine()
		if err != nil {
			return nil, err
		}
		if len(line) == 0 {
			if e.hasData {
				return e.data, nil
			}
			continue
		}
		name, value, _ := bytes.Cut(line, []byte(":")) // a comment has the empty name
		if string(name) != "data" {
			continue
		}
		if e.hasData {
			e.data = append(e.data, '\n')
		}
		e.data = append(e.data, bytes.TrimPrefix(value, []byte(" "))...)
		e.hasData = true
		if len(e.data) > maxLine {
			return nil, errLineTooLong
		}
	}
}

// nextLine is without its end, and valid until the next call.
func (e *events) nextLine() ([]byte, error) {
	e.line = e.line[:0]
	for {
		if len(e.unread) == 0 {
			count, err := e.source.Read(e.buffer)
			e.unread = e.buffer[:count]
			if count == 0 && err != nil {
				return nil, err // another Read gives it again, if bytes came with it
			}
		}
		if e.skipsLF && len(e.unread) > 0 {
			e.unread, e.skipsLF = bytes.TrimPrefix(e.unread, []byte("\n")), false
		}
		end := endOfLine(e.unread)
		if end < 0 {
			e.line = append(e.line, e.unread...)
			e.unread = nil
			if len(e.line) > maxLine {
				return nil, errLineTooLong
			}
			continue
		}
		line := e.unread[:end]
		if len(e.line) > 0 {
			e.line = append(e.line, line...)
			line = e.line
		}
		e.skipsLF = e.unread[end] == '\r'
		e.unread = e.unread[end+1:]
		if !e.begun {
			e.begun = true
			line = bytes.TrimPrefix(line, []byte("\xef\xbb\xbf"))
		}
		return line, nil
	}
}

// endOfLine is where the first CR or LF is, or -1.
func endOfLine(text []byte) int {
	end := bytes.IndexByte(text, '\n')
	before := text
	if end >= 0 {
		before = text[:end]
	}
	if cr := bytes.IndexByte(before, '\r'); cr >= 0 {
		return cr
	}
	return end
}
