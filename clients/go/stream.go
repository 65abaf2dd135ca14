package tidewright

import (
	"encoding/json"
	"io"
	"iter"
	"time"
)

// After its end, a stream's connection is used again if the server ends the answer soon, with little more.
const (
	endsWithin  = time.Second
	mostIgnored = 64 << 10
)

// Stream is an answer as it comes. Read it with one goroutine; Close may be called from any.
//
// A stream that is not read from stops the server's sending, by the network's own backpressure.
type Stream struct {
	call    *call
	reply   *reply
	events  *events
	built   builder
	waiting []Event // of the last part of the answer
	isOver  bool
	failed  *Error
}

// Events is the rest of the stream, for a range loop. An error is its last element. Leaving the loop early closes the
// stream.
func (s *Stream) Events() iter.Seq2[Event, error] {
	return func(yield func(Event, error) bool) {
		defer s.Close() // also when the loop ends by a break or a panic
		for {
			event, err := s.next()
			if err == io.EOF {
				return
			}
			if !yield(event, err) || err != nil {
				return
			}
		}
	}
}

// Answer is what the events so far add up to; after the last one, the whole answer.
func (s *Stream) Answer() *Answer { return s.built.built() }

// Close ends the stream: its connection is closed at once, and the server stops generating. After the stream's end it
// does nothing. It always returns nil.
func (s *Stream) Close() error {
	s.call.end()
	s.reply.Body.Close()
	return nil
}

// next is io.EOF after the end, and an *Error after a failure, each time.
func (s *Stream) next() (Event, error) {
	for len(s.waiting) == 0 {
		if s.failed == nil && !s.isOver {
			s.failed = s.read()
		}
		if s.failed != nil {
			return nil, s.failed
		}
		if s.isOver {
			return nil, io.EOF
		}
	}
	event := s.waiting[0]
	s.waiting = s.waiting[1:]
	s.built.add(event)
	if most := s.call.client.options.MaxAnswerBytes; s.built.size > most {
		s.waiting, s.failed = nil, s.fail(unexpected("the answer is longer than MaxAnswerBytes, %d", most))
		return nil, s.failed
	}
	return event, nil
}

// read takes the next part of the answer.
func (s *Stream) read() *Error {
	data, err := s.events.next()
	switch {
	case err == errLineTooLong:
		return s.fail(unexpected("%s sent %v", s.call.client.root.Host, err))
	case err == io.EOF:
		return s.fail(&Error{Kind: ErrInterrupted, Message: "the stream ended before the answer did: the server or a proxy on the way went away"})
	case err != nil:
		return s.fail(s.call.why(err, inStream))
	case len(data) == 0:
		return nil
	case string(data) == "[DONE]":
		s.isOver = true
		s.release()
		return nil
	}
	var part wireAnswer
	if err := json.Unmarshal(data, &part); err != nil {
		return s.fail(unexpected("%s sent an event of another form (%v): %s", s.call.client.root.Host, err, isItTheGateway))
	}
	if told, ok := errorOf(part.Error); ok {
		return s.fail(&Error{
			Kind:    kindInStream(told.Type, told.code()),
			Message: told.Message,
			Code:    told.code(),
			Param:   told.Param,
		})
	}
	if part.Model != "" {
		s.built.answer.Model = part.Model
	}
	if part.ServedBy != "" {
		s.built.answer.ServedBy = part.ServedBy
	}
	s.waiting = part.events()
	return nil
}

// fail closes the connection.
func (s *Stream) fail(failed *Error) *Error {
	switch failed.Kind {
	case ErrInterrupted:
		failed.Message += "; ask again: Error.Partial has what came"
	case ErrTimedOut:
		failed.Message += "; Error.Partial has what came"
	}
	failed = s.call.about(s.reply, failed)
	failed.Partial = s.Answer()
	s.Close()
	return failed
}

// release reads the answer to its end, so that the next request can use the connection.
func (s *Stream) release() {
	timer := time.AfterFunc(endsWithin, func() { s.call.cancel(errClosed) })
	defer timer.Stop()
	io.CopyN(io.Discard, s.reply.body, mostIgnored)
	s.Close()
}
