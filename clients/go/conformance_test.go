package tidewright_test

import (
	"bytes"
	"context"
	"encoding/json"
	"net/http"
	"os"
	"os/exec"
	"path/filepath"
	"slices"
	"strings"
	"testing"
	"time"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

// vector is one of ../conformance/vectors; README.md there says what the fields mean.
type vector struct {
	Name    string
	Against string
	API     string
	Stream  bool
	Request struct {
		Model       string
		Messages    []struct{ Role, Content string }
		Prompt      string
		MaxTokens   int `json:"max_tokens"`
		Temperature *float64
		Tools       []struct {
			Function struct {
				Name       string
				Parameters any
			}
		}
		Extra map[string]any
	}
	Client struct {
		MaxRetries     *int    `json:"max_retries"`
		Timeout        float64 `json:"timeout"`
		IdleTimeout    float64 `json:"idle_timeout"`
		MaxAnswerBytes int64   `json:"max_answer_bytes"`
		Key            string
	}
	Act struct {
		CancelAfterEvents int `json:"cancel_after_events"`
		PauseAfterEvents  int `json:"pause_after_events"`
		Seconds           float64
		Then              string
		Repeat            int
	}
	Server json.RawMessage
	Expect *expectation
}

// leftOut are vectors that this client does not run, and why.
var leftOut = map[string]string{}

// TestConformance runs the vectors that the scripted gateway plays. TIDEWRIGHT_SCRIPTED may name one that runs;
// PYTHON the interpreter for one that the test starts.
func TestConformance(t *testing.T) {
	scripted := os.Getenv("TIDEWRIGHT_SCRIPTED")
	if scripted == "" {
		scripted = startScripted(t)
	}
	var quick []vector
	for _, vector := range vectors(t) {
		switch {
		case vector.Against == "gateway":
		case strings.Contains(string(vector.Server), `"flood"`) || strings.Contains(string(vector.Server), `"big"`):
			// Alone: megabytes would keep those waiting that are about time.
			t.Run(vector.Name, func(t *testing.T) { vector.playAt(t, scripted) })
		default:
			quick = append(quick, vector)
		}
	}
	for _, vector := range quick {
		t.Run(vector.Name, func(t *testing.T) {
			t.Parallel()
			vector.playAt(t, scripted)
		})
	}
}

// TestConformanceWithGateway runs the vectors that need a real gateway, at TIDEWRIGHT_URL and with TIDEWRIGHT_KEY.
func TestConformanceWithGateway(t *testing.T) {
	url := os.Getenv("TIDEWRIGHT_URL")
	if url == "" {
		t.Skip("TIDEWRIGHT_URL names no gateway with the embedded model")
	}
	client, err := tidewright.New(tidewright.Options{})
	if err != nil {
		t.Fatal(err)
	}
	models, err := client.Models(context.Background())
	if err != nil {
		t.Fatal(err)
	}
	for _, vector := range vectors(t) {
		if vector.Against != "gateway" {
			continue
		}
		t.Run(vector.Name, func(t *testing.T) {
			if vector.Request.Model == "" {
				vector.Request.Model = models[0].ID
			}
			vector.run(t, url)
			vector.check(t, client, url)
		})
	}
}

func vectors(t *testing.T) []vector {
	files, err := filepath.Glob("../conformance/vectors/*.json")
	if err != nil || len(files) == 0 {
		t.Fatal("no vectors", err)
	}
	var all []vector
	for _, file := range files {
		text, err := os.ReadFile(file)
		if err != nil {
			t.Fatal(err)
		}
		var some []vector
		decoder := json.NewDecoder(bytes.NewReader(text))
		if err := decoder.Decode(&some); err != nil {
			t.Fatal(file, err)
		}
		all = append(all, some...)
	}
	return slices.DeleteFunc(all, func(one vector) bool {
		if reason, ok := leftOut[one.Name]; ok {
			t.Logf("left out: %s: %s", one.Name, reason)
			return true
		}
		return false
	})
}

func startScripted(t *testing.T) string {
	python := os.Getenv("PYTHON")
	if python == "" {
		python = "python3"
	}
	command := exec.Command(python, "../conformance/scripted.py")
	command.Stderr = os.Stderr
	input, err := command.StdinPipe()
	if err != nil {
		t.Fatal(err)
	}
	output, err := command.StdoutPipe()
	if err != nil {
		t.Fatal(err)
	}
	if err := command.Start(); err != nil {
		t.Fatal("the scripted gateway needs Python 3.10 or later: ", err)
	}
	t.Cleanup(func() { input.Close(); command.Wait() })
	var at struct{ URL string }
	if err := json.NewDecoder(output).Decode(&at); err != nil {
		t.Fatal("the scripted gateway did not start: ", err)
	}
	return at.URL
}

func (v vector) playAt(t *testing.T, scripted string) {
	var run struct {
		BaseURL string `json:"base_url"`
	}
	post(t, scripted+"/runs", map[string]string{"vector": v.Name}, &run)
	v.Request.Model = "scripted"
	v.run(t, run.BaseURL)
	var verdict struct{ Faults []string }
	post(t, run.BaseURL+"/verdict", nil, &verdict)
	for _, fault := range verdict.Faults {
		t.Error(fault)
	}
}

func post(t *testing.T, url string, body, into any) {
	t.Helper()
	text, _ := json.Marshal(body)
	response, err := http.Post(url, "application/json", bytes.NewReader(text))
	if err != nil {
		t.Fatal(err)
	}
	defer response.Body.Close()
	if err := json.NewDecoder(response.Body).Decode(into); err != nil {
		t.Fatal(err)
	}
}

// run makes the calls and holds what came against what the vector expects.
func (v vector) run(t *testing.T, url string) {
	options := tidewright.Options{
		URL:            url,
		Key:            v.Client.Key,
		Timeout:        seconds(v.Client.Timeout),
		IdleTimeout:    seconds(v.Client.IdleTimeout),
		MaxAnswerBytes: v.Client.MaxAnswerBytes,
	}
	if v.Client.MaxRetries != nil {
		options.MaxRetries = *v.Client.MaxRetries
		if options.MaxRetries == 0 {
			options.MaxRetries = -1
		}
	}
	client, err := tidewright.New(options)
	if err != nil {
		t.Fatal(err)
	}
	defer client.Close()
	for range max(v.Act.Repeat, 1) {
		answer, events, err := v.call(context.Background(), client)
		if v.Expect != nil {
			v.Expect.compare(t, answer, events, err)
		} else if err != nil {
			t.Error(err)
		}
	}
}

func seconds(number float64) time.Duration { return time.Duration(number * float64(time.Second)) }

// call gives what came, also with an error.
func (v vector) call(ctx context.Context, client *tidewright.Client) (*tidewright.Answer, []tidewright.Event, error) {
	if v.API == "models" {
		models, err := client.Models(ctx)
		answer := &tidewright.Answer{}
		for _, model := range models {
			answer.Text += model.ID
		}
		return answer, nil, err
	}
	if !v.Stream {
		answer, err := v.whole(ctx, client)
		return answer, nil, err
	}
	var stream *tidewright.Stream
	var err error
	if v.API == "chat" {
		stream, err = client.StreamChat(ctx, v.chat())
	} else {
		stream, err = client.StreamComplete(ctx, v.completion())
	}
	if err != nil {
		return nil, nil, err
	}
	defer stream.Close()
	var events []tidewright.Event
	for event, err := range stream.Events() {
		if err != nil {
			return stream.Answer(), events, err
		}
		events = append(events, event)
		if len(events) == v.Act.CancelAfterEvents {
			break
		}
		if len(events) == v.Act.PauseAfterEvents {
			time.Sleep(seconds(v.Act.Seconds))
			if v.Act.Then == "cancel" {
				stream.Close()
				break
			}
		}
	}
	return stream.Answer(), events, nil
}

func (v vector) whole(ctx context.Context, client *tidewright.Client) (*tidewright.Answer, error) {
	if v.API == "chat" {
		return client.Chat(ctx, v.chat())
	}
	return client.Complete(ctx, v.completion())
}

func (v vector) chat() tidewright.ChatRequest {
	made := tidewright.ChatRequest{
		Model:       v.Request.Model,
		MaxTokens:   v.Request.MaxTokens,
		Temperature: v.Request.Temperature,
		Extra:       v.Request.Extra,
	}
	for _, message := range v.Request.Messages {
		made.Messages = append(made.Messages, tidewright.Message{Role: message.Role, Content: message.Content})
	}
	for _, tool := range v.Request.Tools {
		made.Tools = append(made.Tools, tidewright.Tool{Name: tool.Function.Name, Parameters: tool.Function.Parameters})
	}
	return made
}

func (v vector) completion() tidewright.CompletionRequest {
	return tidewright.CompletionRequest{
		Model:       v.Request.Model,
		Prompt:      v.Request.Prompt,
		MaxTokens:   v.Request.MaxTokens,
		Temperature: v.Request.Temperature,
		Extra:       v.Request.Extra,
	}
}
