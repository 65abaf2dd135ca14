package tidewright

import (
	"context"
	"encoding/json"
	"net/http"
	"net/url"
	"os"
	"strings"
	"time"
)

// Version of this client, which it sends as its User-Agent.
const Version = "0.1.0"

// Options of a [Client]. The zero value is the gateway on this machine, without a key.
type Options struct {
	// URL of the gateway, with or without /v1. "": the environment variable TIDEWRIGHT_URL, else http://127.0.0.1:8080.
	URL string
	// Key is sent as a bearer token, without the white space around it. "": the environment variable TIDEWRIGHT_KEY, else none is sent.
	Key string
	// MaxRetries of a call. 0: 2. Negative: none.
	MaxRetries int
	// Timeout of a call from its begin to its last byte, retries included. 0: 10 minutes. A context may end it earlier.
	// The server is told to end by itself a little before; if it is overloaded, ErrTimedOut may come first.
	Timeout time.Duration
	// IdleTimeout ends a stream of which nothing comes for so long, not even a keep-alive. 0: 1 minute.
	IdleTimeout time.Duration
	// MaxAnswerBytes bounds a whole answer's JSON, and the text of a stream. 0: 64 MiB.
	MaxAnswerBytes int64
	// Transport makes the connections. nil: one like NewTransport's, for this client alone.
	Transport http.RoundTripper
}

// Client calls one gateway. It is safe for concurrent use, and all its calls share one pool of connections.
type Client struct {
	options Options
	root    *url.URL
	http    *http.Client
	budget  budget
}

// New makes a client. It fails with ErrInvalidRequest if the URL or the key can't be one; it connects to nothing yet.
func New(options Options) (*Client, error) {
	if options.URL == "" {
		options.URL = os.Getenv("TIDEWRIGHT_URL")
	}
	if options.URL == "" {
		options.URL = "http://127.0.0.1:8080"
	}
	if options.Key = strings.TrimSpace(options.Key); options.Key == "" { // a file's last line break is no part of the key
		options.Key = strings.TrimSpace(os.Getenv("TIDEWRIGHT_KEY"))
	}
	if options.MaxRetries == 0 {
		options.MaxRetries = 2
	}
	if options.Timeout == 0 {
		options.Timeout = 10 * time.Minute
	}
	if options.IdleTimeout == 0 {
		options.IdleTimeout = time.Minute
	}
	if options.MaxAnswerBytes == 0 {
		options.MaxAnswerBytes = 64 << 20
	}
	if options.Timeout < 0 || options.IdleTimeout < 0 || options.MaxAnswerBytes < 0 {
		return nil, invalid("Timeout, IdleTimeout and MaxAnswerBytes may not be negative")
	}
	if options.Transport == nil {
		options.Transport = NewTransport()
	}
	for _, char := range []byte(options.Key) {
		if char <= ' ' || char > '~' {
			return nil, invalid("the key has characters that no key has, such as a space or a line break: " +
				"is it the whole key of Options.Key or TIDEWRIGHT_KEY, and nothing else?")
		}
	}
	root, err := parseURL(options.URL)
	if err != nil {
		return nil, err
	}
	keepRedirects := func(*http.Request, []*http.Request) error { return http.ErrUseLastResponse }
	return &Client{options: options, root: root, http: &http.Client{Transport: options.Transport, CheckRedirect: keepRedirects}}, nil
}

// Close closes the connections that no call uses. A client that lives as long as its program needs no Close.
func (c *Client) Close() { c.http.CloseIdleConnections() }

// Chat answers a chat as a whole.
func (c *Client) Chat(ctx context.Context, request ChatRequest) (*Answer, error) {
	fields, err := request.fields(false)
	if err != nil {
		return nil, err
	}
	return c.whole(ctx, "/v1/chat/completions", fields, request.Timeout)
}

// Complete continues a text, as a whole.
func (c *Client) Complete(ctx context.Context, request CompletionRequest) (*Answer, error) {
	fields, err := request.fields(false)
	if err != nil {
		return nil, err
	}
	return c.whole(ctx, "/v1/completions", fields, request.Timeout)
}

// StreamChat answers a chat as it is generated. It returns when the first byte of the answer has come; errors before
// that are its own, later ones those of [Stream.Events].
func (c *Client) StreamChat(ctx context.Context, request ChatRequest) (*Stream, error) {
	fields, err := request.fields(true)
	if err != nil {
		return nil, err
	}
	return c.stream(ctx, "/v1/chat/completions", fields, request.Timeout)
}

// StreamComplete continues a text as it is generated. It returns as [Client.StreamChat] does.
func (c *Client) StreamComplete(ctx context.Context, request CompletionRequest) (*Stream, error) {
	fields, err := request.fields(true)
	if err != nil {
		return nil, err
	}
	return c.stream(ctx, "/v1/completions", fields, request.Timeout)
}

// Model is one that the gateway serves.
type Model struct {
	ID      string `json:"id"`
	Created int64  `json:"created"`
	OwnedBy string `json:"owned_by"`
}

// Models lists what is served.
func (c *Client) Models(ctx context.Context) ([]Model, error) {
	call, err := c.begin(ctx, 0)
	if err != nil {
		return nil, err
	}
	defer call.end()
	reply, failed := call.send(asked{method: http.MethodGet, path: "/v1/models"})
	if failed != nil {
		return nil, failed
	}
	var list struct {
		Data []Model `json:"data"`
	}
	if failed := call.read(reply, &list); failed != nil {
		return nil, failed
	}
	if list.Data == nil {
		return nil, call.about(reply, unexpected("%s answered JSON that is no list of models: %s", c.root.Host, isItTheGateway))
	}
	return list.Data, nil
}

// Health reports whether the gateway can take requests now. It needs no key, and is not retried. The error is nil
// unless the gateway could not be asked.
func (c *Client) Health(ctx context.Context) (bool, error) {
	call, err := c.begin(ctx, 0)
	if err != nil {
		return false, err
	}
	defer call.end()
	reply, failed, _ := call.attempt(asked{method: http.MethodGet, path: "/health/ready"})
	if failed != nil {
		// A 503 of a proxy in front of it is as bad: it can take none.
		if failed.Status == http.StatusServiceUnavailable {
			return false, nil
		}
		return false, failed
	}
	var ignored json.RawMessage
	if failed := call.read(reply, &ignored); failed != nil {
		return false, failed
	}
	return true, nil
}

func (c *Client) whole(ctx context.Context, path string, fields map[string]any, timeout time.Duration) (*Answer, error) {
	call, err := c.begin(ctx, timeout)
	if err != nil {
		return nil, err
	}
	defer call.end()
	reply, failed := call.send(asked{method: http.MethodPost, path: path, fields: fields})
	if failed != nil {
		return nil, failed
	}
	var found wireAnswer
	if failed := call.read(reply, &found); failed != nil {
		return nil, failed
	}
	if len(found.Choices) == 0 {
		return nil, call.about(reply, unexpected("%s answered JSON without choices: %s", c.root.Host, isItTheGateway))
	}
	answer := found.whole()
	answer.RequestID = reply.requestID()
	return answer, nil
}

func (c *Client) stream(ctx context.Context, path string, fields map[string]any, timeout time.Duration) (*Stream, error) {
	call, err := c.begin(ctx, timeout)
	if err != nil {
		return nil, err
	}
	reply, failed := call.send(asked{method: http.MethodPost, path: path, fields: fields, streams: true})
	if failed != nil {
		call.end()
		return nil, failed
	}
	stream := &Stream{call: call, reply: reply, events: newEvents(reply.body)}
	stream.built.answer.RequestID = reply.requestID()
	return stream, nil
}

// mostOfMessage bounds what an error keeps of a server's words, in bytes.
const mostOfMessage = 4 << 10

// clean keeps the key out of what a server says, and long tales.
func (c *Client) clean(text string) string {
	if key := c.options.Key; len(key) >= 8 { // shorter ones are words, such as "none"
		text = strings.ReplaceAll(text, key, "[key]")
	}
	if len(text) > mostOfMessage {
		text = strings.ToValidUTF8(text[:mostOfMessage], "") + "…"
	}
	return text
}
