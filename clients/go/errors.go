package tidewright

import (
	"errors"
	"fmt"
	"strings"
	"time"
)

// What happened, for errors.Is. An [*Error] has one of them as its Kind, or context.Canceled.
var (
	// ErrInvalidRequest means that the request must change: status 400, 413, 422 and every other 4xx that has no kind
	// of its own. Error.Param names the field.
	ErrInvalidRequest = errors.New("invalid request")
	// ErrUnauthenticated means that the key is missing, wrong, expired or revoked: status 401.
	ErrUnauthenticated = errors.New("unauthenticated")
	// ErrForbidden means that the key may not do this, or that the host's name is not one of the gateway's: status 403
	// and 421.
	ErrForbidden = errors.New("forbidden")
	// ErrNotFound means that the model or path does not exist: status 404.
	ErrNotFound = errors.New("not found")
	// ErrRateLimited means that a limit of the key is used up: status 429. Error.RetryAfter says for how long.
	ErrRateLimited = errors.New("rate limited")
	// ErrTimedOut means that the server or the client ran out of time: status 408, Options.Timeout or IdleTimeout, or
	// the context's deadline.
	ErrTimedOut = errors.New("timed out")
	// ErrUnavailable means that the server failed or is overloaded: status 500 and more.
	ErrUnavailable = errors.New("unavailable")
	// ErrConnectionFailed means that no connection was made, or that it broke before an answer.
	ErrConnectionFailed = errors.New("connection failed")
	// ErrInterrupted means that a stream ended without its end. Error.Partial is the answer so far.
	ErrInterrupted = errors.New("interrupted")
	// ErrUnexpectedAnswer means that what answered is not a gateway, or that its answer is larger than allowed.
	ErrUnexpectedAnswer = errors.New("unexpected answer")
)

// Error is every error of this package.
type Error struct {
	// Kind is one of the Err values, or context.Canceled.
	Kind error
	// Message says what happened and, where it is known, what to change. It never holds the key.
	Message string
	// Status of the answer; 0 if there was none.
	Status int
	// Code is the server's name for the error, such as "context_length_exceeded".
	Code string
	// Param is the field of the request that the error is about.
	Param string
	// RequestID finds the request in the gateway's logs.
	RequestID string
	// RetryAfter is how long the server asks to wait; 0 if it did not say.
	RetryAfter time.Duration
	// Partial is what had come of a stream that had begun; nil of all others.
	Partial *Answer

	cause error
}

// Error tells all that is known in one line.
func (e *Error) Error() string {
	text := "tidewright: " + e.Kind.Error()
	if e.Message != "" {
		text += ": " + e.Message
	}
	var more []string
	if e.Status != 0 {
		more = append(more, fmt.Sprintf("status %d", e.Status))
	}
	if e.Code != "" {
		more = append(more, e.Code)
	}
	if e.RequestID != "" {
		more = append(more, "request "+e.RequestID)
	}
	if len(more) == 0 {
		return text
	}
	return text + " (" + strings.Join(more, ", ") + ")"
}

// Unwrap lets errors.Is find the kind, and errors.As the network's own error where there is one.
func (e *Error) Unwrap() []error {
	if e.cause == nil {
		return []error{e.Kind}
	}
	return []error{e.Kind, e.cause}
}

func invalid(format string, values ...any) *Error {
	return &Error{Kind: ErrInvalidRequest, Message: fmt.Sprintf(format, values...)}
}

func unexpected(format string, values ...any) *Error {
	return &Error{Kind: ErrUnexpectedAnswer, Message: fmt.Sprintf(format, values...)}
}

// kindOfStatus is for answers that are no success.
func kindOfStatus(status int) error {
	switch {
	case status == 401:
		return ErrUnauthenticated
	case status == 403, status == 421:
		return ErrForbidden
	case status == 404:
		return ErrNotFound
	case status == 408:
		return ErrTimedOut
	case status == 429:
		return ErrRateLimited
	case status >= 500:
		return ErrUnavailable
	case status >= 400:
		return ErrInvalidRequest
	}
	return ErrUnexpectedAnswer
}

// kindInStream is for error events, which have no status.
func kindInStream(errorType, code string) error {
	switch {
	case code == "timeout":
		return ErrTimedOut
	case errorType == "rate_limit_error":
		return ErrRateLimited
	case errorType == "server_error":
		return ErrUnavailable
	}
	return ErrInvalidRequest
}
