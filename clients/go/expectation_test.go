package tidewright_test

import (
	"context"
	"errors"
	"fmt"
	"io"
	"net/http"
	"os"
	"reflect"
	"slices"
	"strconv"
	"strings"
	"testing"
	"time"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

type expectation struct {
	Text         *string
	TextLength   *int                                   `json:"text_length"`
	ToolCalls    []struct{ ID, Name, Arguments string } `json:"tool_calls"`
	FinishReason *string                                `json:"finish_reason"`
	EndedBy      *string                                `json:"ended_by"`
	Usage        *tidewright.Usage
	ServedBy     *string `json:"served_by"`
	RequestID    *string `json:"request_id"`
	Events       [][]any
	Error        *struct {
		Type         string
		Status       *int
		Code         *string
		Param        *string
		RetryAfter   *float64 `json:"retry_after"`
		RequestID    *string  `json:"request_id"`
		PartialText  *string  `json:"partial_text"`
		MessageHas   []string `json:"message_has"`
		MessageLacks []string `json:"message_lacks"`
	}
	Checks struct {
		StreamEqualsWhole bool     `json:"stream_equals_whole"`
		UsageAddsUp       bool     `json:"usage_adds_up"`
		FinishIn          []string `json:"finish_in"`
		Calls             string
		IdleWithin        float64 `json:"idle_within"`
	}
}

// kinds are the contract's names of errors.
var kinds = map[string]error{
	"InvalidRequest":   tidewright.ErrInvalidRequest,
	"Unauthenticated":  tidewright.ErrUnauthenticated,
	"Forbidden":        tidewright.ErrForbidden,
	"NotFound":         tidewright.ErrNotFound,
	"RateLimited":      tidewright.ErrRateLimited,
	"TimedOut":         tidewright.ErrTimedOut,
	"Unavailable":      tidewright.ErrUnavailable,
	"ConnectionFailed": tidewright.ErrConnectionFailed,
	"Interrupted":      tidewright.ErrInterrupted,
	"UnexpectedAnswer": tidewright.ErrUnexpectedAnswer,
}

func (e *expectation) compare(t *testing.T, answer *tidewright.Answer, events []tidewright.Event, err error) {
	t.Helper()
	if e.Error != nil {
		e.compareError(t, err)
		return
	}
	if err != nil {
		t.Fatal(err)
	}
	same(t, "text", e.Text, answer.Text)
	same(t, "text_length", e.TextLength, len([]rune(answer.Text)))
	same(t, "finish_reason", e.FinishReason, answer.FinishReason)
	same(t, "ended_by", e.EndedBy, answer.EndedBy)
	same(t, "usage", e.Usage, answer.Usage)
	same(t, "served_by", e.ServedBy, answer.ServedBy)
	same(t, "request_id", e.RequestID, answer.RequestID)
	if e.ToolCalls != nil {
		var got []struct{ ID, Name, Arguments string }
		for _, call := range answer.ToolCalls {
			got = append(got, struct{ ID, Name, Arguments string }{call.ID, call.Name, call.Arguments})
		}
		same(t, "tool_calls", &e.ToolCalls, got)
	}
	if e.Events != nil {
		var got [][]any
		for _, event := range events {
			got = append(got, listed(event))
		}
		same(t, "events", &e.Events, got)
	}
}

func same[T any](t *testing.T, name string, want *T, got T) {
	t.Helper()
	if want != nil && !reflect.DeepEqual(*want, got) {
		t.Errorf("%s: %v, not %v", name, got, *want)
	}
}

// listed is an event as the vectors write it.
func listed(event tidewright.Event) []any {
	orNull := func(text string) any {
		if text == "" {
			return nil
		}
		return text
	}
	switch event := event.(type) {
	case tidewright.Text:
		return []any{"text", string(event)}
	case tidewright.ToolCall:
		return []any{"tool_call", float64(event.Index), orNull(event.ID), orNull(event.Name), event.Arguments}
	case tidewright.Finish:
		return []any{"finish", event.Reason}
	case tidewright.UsageReport:
		return []any{"usage"}
	}
	return nil
}

func (e *expectation) compareError(t *testing.T, err error) {
	t.Helper()
	want := e.Error
	if !errors.Is(err, kinds[want.Type]) {
		t.Fatalf("error %v, not %s", err, want.Type)
	}
	var got *tidewright.Error
	if !errors.As(err, &got) {
		t.Fatalf("%T is no *Error", err)
	}
	same(t, "status", want.Status, got.Status)
	same(t, "code", want.Code, got.Code)
	same(t, "param", want.Param, got.Param)
	same(t, "retry_after", want.RetryAfter, got.RetryAfter.Seconds())
	same(t, "request_id", want.RequestID, got.RequestID)
	if want.PartialText != nil && got.Partial == nil {
		t.Error("no partial answer")
	} else if want.PartialText != nil {
		same(t, "partial_text", want.PartialText, got.Partial.Text)
	}
	for _, text := range want.MessageHas {
		if !strings.Contains(err.Error(), text) {
			t.Errorf("%q lacks %q", err, text)
		}
	}
	for _, text := range want.MessageLacks {
		if strings.Contains(fmt.Sprintf("%+v", got), text) {
			t.Errorf("%q has %q", err, text)
		}
	}
}

// check does what only a real gateway's answers are asked for.
func (v vector) check(t *testing.T, client *tidewright.Client, url string) {
	if v.Expect == nil || v.Expect.Error != nil {
		return
	}
	checks := v.Expect.Checks
	if checks.IdleWithin > 0 { // run has made the call, and closed it
		until := time.Now().Add(seconds(checks.IdleWithin))
		for inFlight(t, url) > 0 {
			if time.Now().After(until) {
				t.Fatal("the request is still in flight")
			}
			time.Sleep(20 * time.Millisecond)
		}
		return
	}
	streamed, _, err := v.call(context.Background(), client)
	if err != nil {
		t.Fatal(err)
	}
	if checks.StreamEqualsWhole {
		whole, err := v.whole(context.Background(), client)
		if err != nil {
			t.Fatal(err)
		}
		same(t, "whole text", &whole.Text, streamed.Text)
		same(t, "whole usage", &whole.Usage, streamed.Usage)
	}
	if used := streamed.Usage; checks.UsageAddsUp &&
		(used.PromptTokens <= 0 || used.CompletionTokens <= 0 || used.PromptTokens+used.CompletionTokens != used.TotalTokens) {
		t.Errorf("usage %+v", used)
	}
	if checks.FinishIn != nil && !slices.Contains(checks.FinishIn, streamed.FinishReason) {
		t.Errorf("finish_reason %q", streamed.FinishReason)
	}
	if checks.Calls != "" && (len(streamed.ToolCalls) != 1 || streamed.ToolCalls[0].Name != checks.Calls) {
		t.Errorf("tool calls %+v", streamed.ToolCalls)
	}
}

// inFlight is what the gateway's metrics say of its replicas.
func inFlight(t *testing.T, url string) float64 {
	request, err := http.NewRequest(http.MethodGet, strings.TrimSuffix(url, "/v1")+"/metrics", nil)
	if err != nil {
		t.Fatal(err)
	}
	request.Header.Set("Authorization", "Bearer "+os.Getenv("TIDEWRIGHT_KEY"))
	response, err := http.DefaultClient.Do(request)
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	text, err := io.ReadAll(response.Body)
	if err != nil {
		t.Fatal(err)
	}
	found, isThere := 0.0, false
	for _, line := range strings.Split(string(text), "\n") {
		if strings.HasPrefix(line, "tidewright_gateway_replica_in_flight{") {
			value, err := strconv.ParseFloat(line[strings.LastIndex(line, " ")+1:], 64)
			if err != nil {
				t.Fatal(err)
			}
			found, isThere = found+value, true
		}
	}
	if !isThere {
		t.Fatalf("no metric of replicas: %s", response.Status)
	}
	return found
}
