package tidewright

import (
	"bufio"
	"bytes"
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"maps"
	"net/http"
	"strings"
	"time"
)

const (
	// mostOfError bounds what is read of an error's body. A longer one costs its connection.
	mostOfError    = 1 << 20
	isItTheGateway = "is the URL the gateway's? A proxy may also answer in its place (HTTP_PROXY, HTTPS_PROXY, NO_PROXY)"
)

// call is one call of the API: its attempts, and its time.
type call struct {
	client  *Client
	user    context.Context // the caller's
	ctx     context.Context // also ends with the timeout, and by cancel
	cancel  context.CancelCauseFunc
	timeout time.Duration
	ends    time.Time
}

// asked is a request, from which each attempt is made.
type asked struct {
	method, path string
	fields       map[string]any // nil: no body
	streams      bool
}

// reply is an answer of status 2xx whose first byte has come.
type reply struct {
	*http.Response
	body io.Reader
}

func (r *reply) requestID() string { return r.Header.Get("X-Request-Id") }

func (c *Client) begin(user context.Context, timeout time.Duration) (*call, error) {
	if timeout < 0 {
		return nil, invalid("Timeout may not be negative")
	}
	if timeout == 0 {
		timeout = c.options.Timeout
	}
	ends := time.Now().Add(timeout)
	timed, stop := context.WithDeadlineCause(user, ends, errTimeout)
	ctx, cancel := context.WithCancelCause(timed)
	if earlier, ok := user.Deadline(); ok && earlier.Before(ends) {
		ends = earlier
	}
	both := func(cause error) { cancel(cause); stop() }
	return &call{c, user, ctx, both, timeout, ends}, nil
}

// end frees what the call holds. Its connection stays if the answer was read to its end.
func (c *call) end() { c.cancel(errClosed) }

// send makes attempts until one gives an answer or no other may help.
func (c *call) send(request asked) (*reply, *Error) {
	c.client.budget.request()
	for retry := 0; ; retry++ {
		reply, failed, wait := c.attempt(request)
		if failed == nil {
			return reply, nil
		}
		if wait == never || retry >= c.client.options.MaxRetries {
			return nil, failed
		}
		if wait == unknown {
			wait = waitBefore(retry)
		}
		if wait > mostPatience || wait >= time.Until(c.ends) || !c.client.budget.retry() {
			return nil, failed
		}
		timer := time.NewTimer(wait)
		select {
		case <-timer.C:
		case <-c.ctx.Done():
			timer.Stop()
			return nil, c.why(c.ctx.Err(), beforeAnswer)
		}
	}
}

// The wait before a next attempt where the server did not name one.
const (
	never   time.Duration = -1
	unknown time.Duration = -2
)

// attempt sends the request once. After an error, it also gives the wait before the next attempt.
func (c *call) attempt(asked asked) (*reply, *Error, time.Duration) {
	request, failed := c.request(asked)
	if failed != nil {
		return nil, failed, never
	}
	watch := &watched{cancel: c.cancel}
	if asked.streams {
		watch.idle = c.client.options.IdleTimeout
	}
	watch.start()
	response, err := c.client.http.Do(request)
	watch.stop()
	if err != nil {
		failed := c.why(err, beforeAnswer)
		return nil, failed, retriedIf(failed.Kind == ErrConnectionFailed)
	}
	watch.body = response.Body
	if response.StatusCode < 200 || response.StatusCode > 299 {
		failed, wait := c.refusal(asked, response, watch)
		return nil, failed, wait
	}
	reply := &reply{Response: response}
	if failed := c.checkType(reply, asked.streams); failed != nil {
		response.Body.Close()
		return nil, failed, never
	}
	body := bufio.NewReader(watch)
	if _, err := body.Peek(1); err != nil && err != io.EOF {
		response.Body.Close()
		failed := c.about(reply, c.why(err, beforeAnswer))
		return nil, failed, retriedIf(failed.Kind == ErrConnectionFailed)
	}
	reply.body = body
	return reply, nil, never
}

func retriedIf(condition bool) time.Duration {
	if condition {
		return unknown
	}
	return never
}

func (c *call) request(asked asked) (*http.Request, *Error) {
	var body io.Reader
	if asked.fields != nil {
		encoded, failed := c.encode(asked.fields)
		if failed != nil {
			return nil, failed
		}
		body = bytes.NewReader(encoded)
	}
	request, err := http.NewRequestWithContext(c.ctx, asked.method, c.client.root.JoinPath(asked.path).String(), body)
	if err != nil {
		return nil, invalid("%v", err)
	}
	header := request.Header
	header.Set("User-Agent", "tidewright-go/"+Version)
	header.Set("Accept", "application/json")
	if asked.streams {
		header.Set("Accept", "text/event-stream")
	}
	if asked.fields != nil {
		header.Set("Content-Type", "application/json")
	}
	if key := c.client.options.Key; key != "" {
		header.Set("Authorization", "Bearer "+key)
	}
	return request, nil
}

// encode writes the body, with the time that is left now: the server then ends by itself, with what it has.
func (c *call) encode(fields map[string]any) ([]byte, *Error) {
	if _, isCallers := fields["timeout"]; !isCallers {
		fields = maps.Clone(fields)
		fields["timeout"] = told(time.Until(c.ends)).Seconds()
	}
	encoded, err := json.Marshal(fields)
	if err != nil {
		return nil, invalid("the request is not JSON: %v", err)
	}
	return encoded, nil
}

// told is the time that the server has of what is left: less a margin for the answer's way back, on a busy machine too.
func told(left time.Duration) time.Duration {
	margin := min(max(left/10, 500*time.Millisecond), 2*time.Second, left/2)
	return max(left-margin, time.Millisecond)
}

// refusal is what an answer says that is no success; text is its body.
func (c *call) refusal(asked asked, response *http.Response, text io.Reader) (*Error, time.Duration) {
	defer response.Body.Close()
	body, err := io.ReadAll(io.LimitReader(text, mostOfError))
	status := response.StatusCode
	if err != nil && c.ctx.Err() != nil {
		return c.why(err, inAnswer), never
	}
	if status >= 300 && status < 400 {
		return c.about(&reply{Response: response}, c.redirect(response)), never
	}
	failed := &Error{Kind: kindOfStatus(status), Status: status}
	var found wireAnswer
	if json.Unmarshal(body, &found) != nil {
		found.Error = nil
	}
	if told, ok := errorOf(found.Error); ok {
		failed.Message, failed.Code, failed.Param = told.Message, told.code(), told.Param
	} else {
		failed.Message = c.foreign(response, body)
	}
	if status == 401 && c.client.options.Key == "" {
		failed.Message += "; no key was sent: set Options.Key or the environment variable TIDEWRIGHT_KEY"
	} else if status == 401 {
		failed.Message += "; the key is that of Options.Key or of the environment variable TIDEWRIGHT_KEY"
	}
	if _, isCallers := asked.fields["timeout"]; failed.Param == "timeout" && !isCallers {
		failed.Message += "; the client sends this field itself, from Options.Timeout: a server that does not know it is no " +
			"Tidewright gateway, or one of another version"
	}
	failed = c.about(&reply{Response: response}, failed)
	wait, isTold := retryAfter(response.Header, time.Now())
	failed.RetryAfter = wait
	if !isRetried(status) || strings.EqualFold(response.Header.Get("X-Should-Retry"), "false") {
		return failed, never
	}
	if !isTold {
		wait = unknown
	}
	return failed, wait
}

func (c *call) redirect(response *http.Response) *Error {
	target := "nowhere"
	if location, err := response.Location(); err == nil {
		target = location.Scheme + "://" + location.Host
	}
	failed := unexpected("%s redirects to %s, which is not followed: if that is the gateway, give its URL", c.client.root.Host, target)
	failed.Status = response.StatusCode
	return failed
}

// foreign is about an error that is not in the gateway's form: somebody else answered.
func (c *call) foreign(response *http.Response, body []byte) string {
	host, kind := c.client.root.Host, response.Header.Get("Content-Type")
	if kind == "" {
		kind = "no content type"
	}
	text := fmt.Sprintf("%s answered %s, which is no error of the gateway (%s)", host, response.Status, kind)
	switch {
	case response.StatusCode == 400 && bytes.Contains(bytes.ToUpper(body), []byte("HTTPS")):
		return text + ": the port speaks TLS: write https:// in the URL"
	case response.StatusCode == 407:
		return text + ": the proxy of HTTP_PROXY or HTTPS_PROXY wants a user and password in its URL"
	case response.StatusCode >= 500:
		return text + ": a proxy answers in its place (HTTP_PROXY, HTTPS_PROXY, NO_PROXY), or one in front of it does not reach it"
	case response.Header.Get("X-Request-Id") == "":
		return text + ": is this the gateway's port, 8080 by default, and not one of Triton's (8000 to 8002)?"
	}
	return text
}

// checkType fails if the answer is not of the type that was asked for.
func (c *call) checkType(reply *reply, streams bool) *Error {
	kind, want := reply.Header.Get("Content-Type"), "application/json"
	if streams {
		want = "text/event-stream"
	}
	if strings.HasPrefix(strings.ToLower(kind), want) {
		return nil
	}
	return c.about(reply, unexpected("%s answered with %q, not with %s: %s", c.client.root.Host, kind, want, isItTheGateway))
}

// read decodes a whole answer.
func (c *call) read(reply *reply, into any) *Error {
	defer reply.Body.Close()
	most := c.client.options.MaxAnswerBytes
	tooLong := unexpected("the answer is longer than MaxAnswerBytes, %d", most)
	text, err := io.ReadAll(io.LimitReader(reply.body, most))
	if err == nil && int64(len(text)) == most {
		if more, _ := reply.body.Read(make([]byte, 1)); more > 0 {
			return c.about(reply, tooLong)
		}
	}
	if err != nil {
		return c.about(reply, c.why(err, inAnswer))
	}
	if err := json.Unmarshal(text, into); err != nil {
		return c.about(reply, unexpected("%s answered JSON of another form (%v): %s", c.client.root.Host, err, isItTheGateway))
	}
	return nil
}

// stage is how far a call had come.
type stage int

const (
	beforeAnswer stage = iota
	inAnswer
	inStream
)

// why makes the error of a call whose connection failed, or whose own context ended.
func (c *call) why(err error, stage stage) *Error {
	made := &Error{Kind: ErrConnectionFailed, cause: err}
	switch cause := context.Cause(c.ctx); {
	case cause == errClosed:
		made.Kind, made.Message = context.Canceled, "the stream was closed"
	case cause == errIdle && stage == inStream:
		made.Kind = ErrInterrupted
		made.Message = fmt.Sprintf("nothing came for %v, not even a keep-alive: the server or a proxy on the way hangs", c.client.options.IdleTimeout)
	case cause == errIdle:
		made.Kind = ErrTimedOut
		made.Message = fmt.Sprintf("%s said nothing for %v", c.client.root.Host, c.client.options.IdleTimeout)
	case cause == errTimeout:
		made.Kind, made.cause = ErrTimedOut, context.DeadlineExceeded
		made.Message = fmt.Sprintf("the answer did not end within the timeout, %v", c.timeout)
	case errors.Is(c.user.Err(), context.DeadlineExceeded):
		made.Kind, made.cause = ErrTimedOut, context.DeadlineExceeded
		made.Message = "the context's deadline passed"
	case c.user.Err() != nil:
		made.Kind, made.cause = context.Canceled, context.Cause(c.user)
		made.Message = "the call was cancelled"
	case stage == inStream:
		made.Kind = ErrInterrupted
		made.Message = fmt.Sprintf("the stream from %s broke off (%v): the server or a proxy on the way went away", c.client.root.Host, err)
	case stage == inAnswer:
		made.Message = fmt.Sprintf("the answer from %s broke off (%v): the server or a proxy on the way went away; ask again", c.client.root.Host, err)
	default:
		made.Message = explain(err, c.client.root)
	}
	return c.about(nil, made)
}

// about completes an error, and keeps the key out of it.
func (c *call) about(reply *reply, failed *Error) *Error {
	if reply != nil {
		failed.RequestID = reply.requestID()
	}
	clean := c.client.clean
	failed.Message, failed.Code, failed.Param = clean(failed.Message), clean(failed.Code), clean(failed.Param)
	return failed
}
