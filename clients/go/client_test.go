package tidewright_test

import (
	"context"
	"encoding/json"
	"errors"
	"fmt"
	"io"
	"net"
	"net/http"
	"net/http/httptest"
	"reflect"
	"slices"
	"strings"
	"sync"
	"sync/atomic"
	"testing"
	"time"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

const (
	wholeHi  = `{"model": "m", "choices": [{"index": 0, "message": {"content": "Hi"}, "finish_reason": "stop"}]}`
	eventHi  = `data: {"model": "m", "choices": [{"index": 0, "delta": {"content": "Hi"}}]}` + "\n\n"
	eventEnd = `data: {"choices": [{"index": 0, "delta": {}, "finish_reason": "stop"}]}` + "\n\ndata: [DONE]\n\n"
)

var hi = tidewright.ChatRequest{Model: "m", Messages: []tidewright.Message{tidewright.User("Hi")}}

func serve(t *testing.T, handler http.HandlerFunc) string {
	server := httptest.NewServer(handler)
	t.Cleanup(server.Close)
	return server.URL
}

func newClient(t *testing.T, options tidewright.Options) *tidewright.Client {
	t.Helper()
	client, err := tidewright.New(options)
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(client.Close)
	return client
}

func streamed(parts ...string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for _, part := range parts {
			io.WriteString(w, part)
			w.(http.Flusher).Flush()
		}
	}
}

func answered(status int, body string) http.HandlerFunc {
	return func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		w.WriteHeader(status)
		io.WriteString(w, body)
	}
}

// endless streams until the client goes, and then closes the channel.
func endless(t *testing.T) (string, chan struct{}) {
	gone := make(chan struct{})
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "text/event-stream")
		for r.Context().Err() == nil {
			io.WriteString(w, eventHi)
			w.(http.Flusher).Flush()
			time.Sleep(time.Millisecond)
		}
		close(gone)
	})
	return url, gone
}

func await(t *testing.T, gone chan struct{}) {
	t.Helper()
	select {
	case <-gone:
	case <-time.After(10 * time.Second):
		t.Error("the server goes on")
	}
}

func TestLeavingTheLoopEndsTheRequest(t *testing.T) {
	leave := map[string]func(context.CancelFunc, *tidewright.Stream){
		"break": func(_ context.CancelFunc, stream *tidewright.Stream) {
			for range stream.Events() {
				break
			}
		},
		"panic": func(_ context.CancelFunc, stream *tidewright.Stream) {
			defer func() { recover() }()
			for range stream.Events() {
				panic("in the loop")
			}
		},
		"close": func(_ context.CancelFunc, stream *tidewright.Stream) {
			stream.Close()
			stream.Close()
		},
		"cancel": func(cancel context.CancelFunc, stream *tidewright.Stream) { cancel() },
	}
	for name, leave := range leave {
		t.Run(name, func(t *testing.T) {
			url, gone := endless(t)
			ctx, cancel := context.WithCancel(context.Background())
			defer cancel()
			stream, err := newClient(t, tidewright.Options{URL: url}).StreamChat(ctx, hi)
			if err != nil {
				t.Fatal(err)
			}
			leave(cancel, stream)
			await(t, gone)
			for _, err := range stream.Events() {
				if err != nil && !errors.Is(err, context.Canceled) {
					t.Errorf("a stream that was left gives %v", err)
				}
			}
		})
	}
}

func TestTheCallersOwnPausesAreNoIdleTime(t *testing.T) {
	// More than the client's buffers hold, so that it reads again after the pause.
	url := serve(t, streamed(append(slices.Repeat([]string{eventHi}, 5000), eventEnd)...))
	stream, err := newClient(t, tidewright.Options{URL: url, IdleTimeout: 500 * time.Millisecond}).StreamChat(context.Background(), hi)
	if err != nil {
		t.Fatal(err)
	}
	pause := sync.OnceFunc(func() { time.Sleep(time.Second) })
	for _, err := range stream.Events() {
		if err != nil {
			t.Error(err)
		}
		pause()
	}
	if text := stream.Answer().Text; len(text) != 5000*len("Hi") {
		t.Errorf("%d bytes", len(text))
	}
}

func TestAnErrorThatDoesNotEndIsIdleToo(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.WriteHeader(502)
		w.(http.Flusher).Flush()
		<-r.Context().Done()
	})
	client := newClient(t, tidewright.Options{URL: url, IdleTimeout: 300 * time.Millisecond, Timeout: time.Minute})
	_, err := client.StreamChat(context.Background(), hi)
	if !errors.Is(err, tidewright.ErrTimedOut) || !strings.Contains(err.Error(), "said nothing for 300ms") {
		t.Error(err)
	}
}

func TestAServerThatGoesOnAfterTheEndIsLeft(t *testing.T) {
	gone := make(chan struct{})
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		streamed(eventHi, eventEnd)(w, r)
		<-r.Context().Done()
		close(gone)
	})
	stream, err := newClient(t, tidewright.Options{URL: url}).StreamChat(context.Background(), hi)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range stream.Events() {
		if err != nil {
			t.Error(err)
		}
	}
	await(t, gone)
	if answer := stream.Answer(); answer.Text != "Hi" || answer.FinishReason != "stop" {
		t.Errorf("%+v", answer)
	}
}

func TestAStreamMayBeClosedFromAnotherGoroutine(t *testing.T) {
	url, gone := endless(t)
	stream, err := newClient(t, tidewright.Options{URL: url}).StreamChat(context.Background(), hi)
	if err != nil {
		t.Fatal(err)
	}
	var last error
	count := 0
	for _, last = range stream.Events() {
		if count++; count == 3 {
			go stream.Close()
		}
	}
	if !errors.Is(last, context.Canceled) {
		t.Error(last)
	}
	await(t, gone)
}

// deadline is a context whose deadline passes when the test wants it.
type deadline struct {
	context.Context
	passed chan struct{}
}

func (d *deadline) Done() <-chan struct{} { return d.passed }

func (d *deadline) Err() error {
	select {
	case <-d.passed:
		return context.DeadlineExceeded
	default:
		return nil
	}
}

func TestAContextEndsAStream(t *testing.T) {
	cause := errors.New("the user left")
	for name, one := range map[string]struct {
		begin func() (context.Context, func())
		is    []error
	}{
		"cancel": {func() (context.Context, func()) {
			ctx, cancel := context.WithCancelCause(context.Background())
			return ctx, func() { cancel(cause) }
		}, []error{context.Canceled, cause}},
		"deadline": {func() (context.Context, func()) {
			ctx := &deadline{context.Background(), make(chan struct{})}
			return ctx, sync.OnceFunc(func() { close(ctx.passed) })
		}, []error{tidewright.ErrTimedOut, context.DeadlineExceeded}},
	} {
		t.Run(name, func(t *testing.T) {
			url, gone := endless(t)
			ctx, end := one.begin()
			stream, err := newClient(t, tidewright.Options{URL: url}).StreamChat(ctx, hi)
			if err != nil {
				t.Fatal(err)
			}
			var last error
			for _, last = range stream.Events() {
				end()
			}
			for _, want := range one.is {
				if !errors.Is(last, want) {
					t.Errorf("%v is not %v", last, want)
				}
			}
			var failed *tidewright.Error
			if !errors.As(last, &failed) || failed.Partial == nil || !strings.HasPrefix(failed.Partial.Text, "Hi") {
				t.Errorf("%+v has no partial answer", failed)
			}
			await(t, gone)
		})
	}
}

func TestAContextEndsTheWaitBeforeARetry(t *testing.T) {
	ctx, cancel := context.WithCancel(context.Background())
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		w.Header().Set("Retry-After", "50")
		w.WriteHeader(503)
		time.AfterFunc(50*time.Millisecond, cancel)
	})
	if _, err := newClient(t, tidewright.Options{URL: url}).Chat(ctx, hi); !errors.Is(err, context.Canceled) {
		t.Error(err)
	}
}

func TestManyGoroutinesShareAClient(t *testing.T) {
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		var body struct{ Stream bool }
		json.NewDecoder(r.Body).Decode(&body)
		if body.Stream {
			streamed(eventHi, eventEnd)(w, r)
		} else {
			answered(200, wholeHi)(w, r)
		}
	})
	client := newClient(t, tidewright.Options{URL: url})
	var group sync.WaitGroup
	for range 40 {
		group.Add(1)
		go func() {
			defer group.Done()
			for range 5 {
				answer, err := client.Chat(context.Background(), hi)
				if err != nil || answer.Text != "Hi" {
					t.Error(answer, err)
				}
				stream, err := client.StreamChat(context.Background(), hi)
				if err != nil {
					t.Error(err)
					continue
				}
				for _, err := range stream.Events() {
					if err != nil {
						t.Error(err)
					}
				}
				if answer := stream.Answer(); answer.Text != "Hi" || answer.FinishReason != "stop" || answer.Model != "m" {
					t.Errorf("%+v", answer)
				}
			}
		}()
	}
	group.Wait()
}

func TestAnOutageIsNotMultiplied(t *testing.T) {
	var requests atomic.Int64
	url := serve(t, func(w http.ResponseWriter, _ *http.Request) {
		requests.Add(1)
		w.Header().Set("Retry-After", "0")
		w.WriteHeader(503)
	})
	client := newClient(t, tidewright.Options{URL: url})
	for range 100 {
		if _, err := client.Chat(context.Background(), hi); !errors.Is(err, tidewright.ErrUnavailable) {
			t.Fatal(err)
		}
	}
	// Ten retries to begin with, and one for each ten requests.
	if got := requests.Load(); got < 115 || got > 120 {
		t.Errorf("%d requests for 100 calls", got)
	}
}

func TestABodyThatBreaksOffIsNotAskedForAgain(t *testing.T) {
	var requests atomic.Int64
	breaks := func(kind string) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			requests.Add(1)
			w.Header().Set("Content-Type", kind)
			w.Header().Set("Content-Length", "1000")
			io.WriteString(w, eventHi) // and no more: the server closes the connection
		}
	}
	_, err := newClient(t, tidewright.Options{URL: serve(t, breaks("application/json"))}).Chat(context.Background(), hi)
	if !errors.Is(err, tidewright.ErrConnectionFailed) || !strings.Contains(err.Error(), "ask again") || requests.Load() != 1 {
		t.Error(err, requests.Load())
	}
	stream, err := newClient(t, tidewright.Options{URL: serve(t, breaks("text/event-stream"))}).StreamChat(context.Background(), hi)
	if err != nil {
		t.Fatal(err)
	}
	var last error
	for _, last = range stream.Events() {
	}
	var failed *tidewright.Error
	if !errors.Is(last, tidewright.ErrInterrupted) || !errors.As(last, &failed) || failed.Partial.Text != "Hi" || requests.Load() != 2 {
		t.Error(last, requests.Load())
	}
	if !strings.Contains(failed.Message, "ask again: Error.Partial has what came") {
		t.Error(last)
	}
	for _, again := range stream.Events() {
		if again != last {
			t.Error("asked again, it gives another error: ", again)
		}
	}
}

func TestAConnectionThatBreaksBeforeTheFirstByteIsTriedAgain(t *testing.T) {
	var requests atomic.Int64
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		if requests.Add(1) > 1 {
			streamed(eventHi, eventEnd)(w, r)
			return
		}
		w.Header().Set("Content-Type", "text/event-stream")
		w.(http.Flusher).Flush() // the head
		panic(http.ErrAbortHandler)
	})
	stream, err := newClient(t, tidewright.Options{URL: url}).StreamChat(context.Background(), hi)
	if err != nil {
		t.Fatal(err)
	}
	for _, err := range stream.Events() {
		if err != nil {
			t.Error(err)
		}
	}
	if stream.Answer().Text != "Hi" || requests.Load() != 2 {
		t.Error(stream.Answer(), requests.Load())
	}
}

func TestAnswersOfJustTheLimit(t *testing.T) {
	url := serve(t, answered(200, wholeHi))
	chunked := serve(t, func(w http.ResponseWriter, r *http.Request) {
		w.Header().Set("Content-Type", "application/json")
		io.WriteString(w, wholeHi[:20])
		w.(http.Flusher).Flush()
		io.WriteString(w, wholeHi[20:])
	})
	for _, url := range []string{url, chunked} {
		size := int64(len(wholeHi))
		if _, err := newClient(t, tidewright.Options{URL: url, MaxAnswerBytes: size}).Chat(context.Background(), hi); err != nil {
			t.Error(err)
		}
		_, err := newClient(t, tidewright.Options{URL: url, MaxAnswerBytes: size - 1}).Chat(context.Background(), hi)
		if !errors.Is(err, tidewright.ErrUnexpectedAnswer) || !strings.Contains(err.Error(), "longer than MaxAnswerBytes") {
			t.Error(err)
		}
	}
}

func TestHealth(t *testing.T) {
	for status, want := range map[int]bool{200: true, 503: false} {
		url := serve(t, func(w http.ResponseWriter, r *http.Request) {
			if r.URL.Path != "/health/ready" {
				status = 404
			}
			answered(status, `{"status": "it"}`)(w, r)
		})
		if got, err := newClient(t, tidewright.Options{URL: url + "/v1"}).Health(context.Background()); got != want || err != nil {
			t.Error(status, got, err)
		}
	}
}

func TestWhatIsSent(t *testing.T) {
	var got map[string]any
	var path string
	url := serve(t, func(w http.ResponseWriter, r *http.Request) {
		path = r.URL.Path
		got = nil
		json.NewDecoder(r.Body).Decode(&got)
		delete(got, "timeout")
		answered(200, wholeHi)(w, r)
	})
	client := newClient(t, tidewright.Options{URL: url})
	answer := tidewright.Answer{ToolCalls: []tidewright.ToolCall{{ID: "c", Name: "f", Arguments: "{}"}}}
	_, err := client.Chat(context.Background(), tidewright.ChatRequest{
		Model:       "m",
		Messages:    []tidewright.Message{tidewright.System("s"), tidewright.User("u"), answer.Message(), tidewright.ToolResult("c", "r")},
		Tools:       []tidewright.Tool{{Name: "f", Description: "d", Parameters: map[string]any{"type": "object"}, Strict: true}},
		Temperature: tidewright.Ptr(0.0),
		TopP:        tidewright.Ptr(0.5),
		Seed:        tidewright.Ptr(int64(7)),
		Stop:        []string{"x"},
		MaxTokens:   3,
		Extra:       map[string]any{"top_k": 5, "max_tokens": 4},
	})
	if err != nil {
		t.Fatal(err)
	}
	var want map[string]any
	json.Unmarshal([]byte(`{"model": "m", "temperature": 0, "top_p": 0.5, "seed": 7, "stop": ["x"], "max_tokens": 4, "top_k": 5,
		"messages": [{"role": "system", "content": "s"}, {"role": "user", "content": "u"},
			{"role": "assistant", "content": "", "tool_calls": [{"id": "c", "type": "function", "function": {"name": "f", "arguments": "{}"}}]},
			{"role": "tool", "content": "r", "tool_call_id": "c"}],
		"tools": [{"type": "function", "function": {"name": "f", "description": "d", "parameters": {"type": "object"}, "strict": true}}]}`), &want)
	if !reflect.DeepEqual(got, want) || path != "/v1/chat/completions" {
		t.Errorf("%v to %s, not %v", got, path, want)
	}
	if _, err := client.Complete(context.Background(), tidewright.CompletionRequest{Model: "m", Prompt: "p"}); err != nil {
		t.Fatal(err)
	}
	if !reflect.DeepEqual(got, map[string]any{"model": "m", "prompt": "p"}) || path != "/v1/completions" {
		t.Errorf("%v to %s", got, path)
	}
}

func TestOneConnectionForManyRequestsAndStreams(t *testing.T) {
	var connections atomic.Int64
	server := httptest.NewUnstartedServer(streamed(eventHi, eventEnd))
	server.Config.ConnState = func(_ net.Conn, state http.ConnState) {
		if state == http.StateNew {
			connections.Add(1)
		}
	}
	server.Start()
	defer server.Close()
	client := newClient(t, tidewright.Options{URL: server.URL})
	for range 20 {
		stream, err := client.StreamChat(context.Background(), hi)
		if err != nil {
			t.Fatal(err)
		}
		for range stream.Events() {
		}
	}
	if connections.Load() != 1 {
		t.Errorf("%d connections", connections.Load())
	}
}

func ExampleClient_StreamChat() {
	server := httptest.NewServer(streamed(eventHi, eventEnd)) // in place of a gateway
	defer server.Close()

	client, err := tidewright.New(tidewright.Options{URL: server.URL})
	if err != nil {
		panic(err)
	}
	stream, err := client.StreamChat(context.Background(), tidewright.ChatRequest{
		Model:    "smollm2-135m",
		Messages: []tidewright.Message{tidewright.User("Say Hi.")},
	})
	if err != nil {
		panic(err)
	}
	defer stream.Close()
	for event, err := range stream.Events() {
		if err != nil {
			panic(err)
		}
		switch event := event.(type) {
		case tidewright.Text:
			fmt.Println("text:", event)
		case tidewright.Finish:
			fmt.Println("end:", event.Reason)
		}
	}
	// Output:
	// text: Hi
	// end: stop
}

func ExampleError() {
	server := httptest.NewServer(answered(400, `{"error": {"message": "temperature must be at least 0",
		"type": "invalid_request_error", "param": "temperature", "code": "invalid_value"}}`)) // in place of a gateway
	defer server.Close()

	client, err := tidewright.New(tidewright.Options{URL: server.URL})
	if err != nil {
		panic(err)
	}
	_, err = client.Chat(context.Background(), tidewright.ChatRequest{
		Model:       "smollm2-135m",
		Messages:    []tidewright.Message{tidewright.User("Hi")},
		Temperature: tidewright.Ptr(-1.0),
	})
	var failed *tidewright.Error
	if errors.Is(err, tidewright.ErrInvalidRequest) && errors.As(err, &failed) {
		fmt.Println(failed.Param)
	}
	fmt.Println(err)
	// Output:
	// temperature
	// tidewright: invalid request: temperature must be at least 0 (status 400, invalid_value)
}
