package tidewright_test

// What users get wrong: each error says what to change.

import (
	"bufio"
	"context"
	"crypto/tls"
	"encoding/json"
	"errors"
	"net"
	"net/http"
	"net/http/httptest"
	"net/url"
	"os"
	"strings"
	"testing"
	"unicode/utf8"

	tidewright "github.com/tidewright/tidewright/clients/go"
)

// settings is the first frame of an HTTP/2 server.
const settings = "\x00\x00\x06\x04\x00\x00\x00\x00\x00\x00\x03\x00\x00\x00\x80"

// wrong makes a chat that must fail, and tell these words.
func wrong(t *testing.T, options tidewright.Options, kind error, words ...string) {
	t.Helper()
	options.MaxRetries = -1
	client, err := tidewright.New(options)
	if err == nil {
		defer client.Close()
		_, err = client.Chat(context.Background(), hi)
	}
	if !errors.Is(err, kind) {
		t.Fatalf("%v is not %v", err, kind)
	}
	for _, word := range words {
		if !strings.Contains(err.Error(), word) {
			t.Errorf("%q does not say %q", err, word)
		}
	}
}

func TestURLs(t *testing.T) {
	for given, word := range map[string]string{
		"127.0.0.1:8080":                        `"http://127.0.0.1:8080"`,
		"localhost:8080":                        `"http://127.0.0.1:8080"`,
		"gateway":                               `"http://127.0.0.1:8080"`,
		"grpc://gateway:8001":                   `"grpc" is not http or https`,
		"ws://gateway:8080/v1/stream":           `"ws" is not http or https`,
		"http://":                               "no host",
		"http://:8080":                          "no host",
		"http://gateway:80a":                    "is none",
		"http://user:secret-password@gateway":   "Options.Key",
		"http://user:secret-password@gateway:x": "is none",
		"http://gateway?key=1":                  "query",
		"http://gateway/v1/chat/completions":    `leave out "/v1/chat/completions"`,
		"http://gateway/llm/v1/completions/":    `leave out "/v1/completions"`,
		"http://gateway/v1/models":              `leave out "/v1/models"`,
		"http://gateway/v1/responses":           `leave out "/v1/responses"`,
	} {
		_, err := tidewright.New(tidewright.Options{URL: given})
		if !errors.Is(err, tidewright.ErrInvalidRequest) || !strings.Contains(err.Error(), word) {
			t.Errorf("%s: %v", given, err)
		}
		if err != nil && strings.Contains(err.Error(), "secret-password") {
			t.Error(err)
		}
	}
	var path string
	at := serve(t, func(w http.ResponseWriter, r *http.Request) { path = r.URL.Path; answered(200, wholeHi)(w, r) })
	for given, want := range map[string]string{
		"": "/v1/chat/completions", "/": "/v1/chat/completions", "/v1": "/v1/chat/completions", "/v1/": "/v1/chat/completions",
		"/llm/v1": "/llm/v1/chat/completions", "/llm/": "/llm/v1/chat/completions",
	} {
		if _, err := newClient(t, tidewright.Options{URL: at + given}).Chat(context.Background(), hi); err != nil || path != want {
			t.Error(given, path, err)
		}
	}
}

func TestTheEnvironmentNamesURLAndKey(t *testing.T) {
	var key string
	at := serve(t, func(w http.ResponseWriter, r *http.Request) {
		key = r.Header.Get("Authorization")
		answered(200, wholeHi)(w, r)
	})
	t.Setenv("TIDEWRIGHT_URL", at)
	t.Setenv("TIDEWRIGHT_KEY", "tw-of-the-environment")
	if _, err := newClient(t, tidewright.Options{}).Chat(context.Background(), hi); err != nil || key != "Bearer tw-of-the-environment" {
		t.Error(key, err)
	}
	if _, err := newClient(t, tidewright.Options{Key: "tw-own"}).Chat(context.Background(), hi); err != nil || key != "Bearer tw-own" {
		t.Error(key, err)
	}
	for _, around := range []string{"\n", "\r\n", " "} { // a file's last line break
		if _, err := newClient(t, tidewright.Options{Key: around + "tw-own" + around}).Chat(context.Background(), hi); err != nil || key != "Bearer tw-own" {
			t.Error(key, err)
		}
		t.Setenv("TIDEWRIGHT_KEY", "tw-of-the-environment"+around)
		if _, err := newClient(t, tidewright.Options{}).Chat(context.Background(), hi); err != nil || key != "Bearer tw-of-the-environment" {
			t.Error(key, err)
		}
	}
}

func TestKeys(t *testing.T) {
	for _, key := range []string{"tw-secret-1\ntw-secret-1", "tw secret-1", "tw-sécret-1", "tw-secret-1\x00"} {
		_, err := tidewright.New(tidewright.Options{Key: key})
		if !errors.Is(err, tidewright.ErrInvalidRequest) || !strings.Contains(err.Error(), "the key has characters that") || strings.Contains(err.Error(), "cret-1") {
			t.Errorf("%q: %v", key, err)
		}
	}
	says := `{"error": {"message": "no key tw-secret-1", "type": "invalid_request_error", "code": "tw-secret-1", "param": "tw-secret-1"}}`
	at := serve(t, answered(401, says))
	t.Setenv("TIDEWRIGHT_KEY", "")
	wrong(t, tidewright.Options{URL: at}, tidewright.ErrUnauthenticated, "set Options.Key or the environment variable TIDEWRIGHT_KEY")
	wrong(t, tidewright.Options{URL: at, Key: "tw-secret-1"}, tidewright.ErrUnauthenticated, "no key [key]", "Options.Key")
	for _, answer := range []http.HandlerFunc{
		answered(401, says),
		answered(400, "tw-secret-1"),
		answered(302, "tw-secret-1"),
		answered(200, "tw-secret-1"),
		answered(200, `{"choices": "tw-secret-1"}`),
		func(w http.ResponseWriter, _ *http.Request) { w.Header().Set("Content-Type", "tw-secret-1") },
	} {
		_, err := newClient(t, tidewright.Options{URL: serve(t, answer), Key: "tw-secret-1"}).Chat(context.Background(), hi)
		if err == nil || strings.Contains(err.Error(), "tw-secret-1") {
			t.Error(err)
		}
	}
}

func TestAServerThatDoesNotKnowWhatTheClientSends(t *testing.T) {
	says := `{"error": {"message": "unknown field", "type": "invalid_request_error", "param": "timeout"}}`
	wrong(t, tidewright.Options{URL: serve(t, answered(400, says))}, tidewright.ErrInvalidRequest, "Options.Timeout", "another version")
}

func TestLongMessagesAreCut(t *testing.T) {
	at := serve(t, answered(400, `{"error": {"message": "`+strings.Repeat("é", 100_000)+`", "code": "c"}}`))
	_, err := newClient(t, tidewright.Options{URL: at}).Chat(context.Background(), hi)
	if !errors.Is(err, tidewright.ErrInvalidRequest) || len(err.Error()) > 5000 || !utf8.ValidString(err.Error()) {
		t.Errorf("%d bytes: %.100s", len(err.Error()), err)
	}
}

func TestRequests(t *testing.T) {
	client := newClient(t, tidewright.Options{URL: serve(t, answered(200, wholeHi))})
	for word, request := range map[string]tidewright.ChatRequest{
		"Client.Models":       {Messages: hi.Messages},
		"Messages is empty":   {Model: "m"},
		"StreamChat":          {Model: "m", Messages: hi.Messages, Extra: map[string]any{"stream": true}},
		"one answer":          {Model: "m", Messages: hi.Messages, Extra: map[string]any{"n": 2}},
		"is not JSON":         {Model: "m", Messages: hi.Messages, Extra: map[string]any{"stop": make(chan int)}},
		"may not be negative": {Model: "m", Messages: hi.Messages, Timeout: -1},
	} {
		for _, err := range []error{second(client.Chat(context.Background(), request)), second(client.StreamChat(context.Background(), request))} {
			if !errors.Is(err, tidewright.ErrInvalidRequest) || !strings.Contains(err.Error(), word) {
				t.Errorf("%v does not say %q", err, word)
			}
		}
	}
}

func second[T any](_ T, err error) error { return err }

func TestAddressesWhereNoGatewayIs(t *testing.T) {
	closed, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	closed.Close()
	wrong(t, tidewright.Options{URL: "http://" + closed.Addr().String()}, tidewright.ErrConnectionFailed, "nothing listens at "+closed.Addr().String())

	noName := tidewright.NewTransport()
	noName.DialContext = func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Err: &net.DNSError{Err: "no such host", Name: "gatewya"}}
	}
	wrong(t, tidewright.Options{URL: "http://gatewya", Transport: noName}, tidewright.ErrConnectionFailed, "host name gatewya is not known")

	noRoute := tidewright.NewTransport()
	noRoute.DialContext = func(context.Context, string, string) (net.Conn, error) {
		return nil, &net.OpError{Op: "dial", Err: os.ErrDeadlineExceeded}
	}
	wrong(t, tidewright.Options{URL: "http://10.9.9.9", Transport: noRoute}, tidewright.ErrConnectionFailed, "10.9.9.9 did not answer", "firewalls")

	wrong(t, tidewright.Options{URL: raw(t, "SSH-2.0-OpenSSH_9.6\r\n")}, tidewright.ErrConnectionFailed, "does not speak HTTP")
	wrong(t, tidewright.Options{URL: raw(t, settings)}, tidewright.ErrConnectionFailed, "gRPC", "8080")
	wrong(t, tidewright.Options{URL: raw(t, "")}, tidewright.ErrConnectionFailed, "write https://")
	wrong(t, tidewright.Options{URL: serve(t, http.NotFound)}, tidewright.ErrNotFound, "8080", "8000 to 8002")
}

// raw answers each request with these bytes.
func raw(t *testing.T, text string) string {
	return listen(t, func(connection net.Conn) {
		http.ReadRequest(bufio.NewReader(connection))
		connection.Write([]byte(text))
	})
}

func listen(t *testing.T, handle func(net.Conn)) string {
	listener, err := net.Listen("tcp", "127.0.0.1:0")
	if err != nil {
		t.Fatal(err)
	}
	t.Cleanup(func() { listener.Close() })
	go func() {
		for {
			connection, err := listener.Accept()
			if err != nil {
				return
			}
			handle(connection)
			connection.Close()
		}
	}()
	return "http://" + listener.Addr().String()
}

func TestAServerThatSpeaksFirst(t *testing.T) {
	at := listen(t, func(connection net.Conn) {
		connection.Write([]byte(settings)) // as gRPC does, perhaps before the request
		http.ReadRequest(bufio.NewReader(connection))
	})
	for range 50 { // which of them is first is chance
		wrong(t, tidewright.Options{URL: at}, tidewright.ErrConnectionFailed, "gRPC", "8080 by default")
	}
}

func TestTLS(t *testing.T) {
	secure := httptest.NewTLSServer(answered(200, wholeHi))
	defer secure.Close()
	secure.Config.ErrorLog = nil
	plain := strings.Replace(secure.URL, "https", "http", 1)
	wrong(t, tidewright.Options{URL: plain}, tidewright.ErrInvalidRequest, "write https://")
	wrong(t, tidewright.Options{URL: raw(t, "\x15\x03\x01\x00\x02\x02\x46")}, tidewright.ErrConnectionFailed, "write https://")
	wrong(t, tidewright.Options{URL: strings.Replace(serve(t, answered(200, wholeHi)), "http", "https", 1)},
		tidewright.ErrConnectionFailed, "write http://")
	wrong(t, tidewright.Options{URL: secure.URL}, tidewright.ErrConnectionFailed, "not trusted", "SSL_CERT_FILE", "Options.Transport")

	otherName := tidewright.NewTransport()
	otherName.TLSClientConfig = &tls.Config{RootCAs: secure.Client().Transport.(*http.Transport).TLSClientConfig.RootCAs, ServerName: "gateway"}
	wrong(t, tidewright.Options{URL: secure.URL, Transport: otherName}, tidewright.ErrConnectionFailed, "not trusted", "gateway")

	trusting := tidewright.NewTransport()
	trusting.TLSClientConfig = &tls.Config{RootCAs: otherName.TLSClientConfig.RootCAs}
	if _, err := newClient(t, tidewright.Options{URL: secure.URL, Transport: trusting}).Chat(context.Background(), hi); err != nil {
		t.Error(err)
	}
}

func TestProxies(t *testing.T) {
	through := func(proxy string) tidewright.Options {
		parsed, err := url.Parse(proxy)
		if err != nil {
			t.Fatal(err)
		}
		transport := tidewright.NewTransport()
		transport.Proxy = http.ProxyURL(parsed)
		return tidewright.Options{URL: "http://gateway.internal:8080", Transport: transport}
	}
	page := func(status int) http.HandlerFunc {
		return func(w http.ResponseWriter, _ *http.Request) {
			w.Header().Set("Content-Type", "text/html")
			w.WriteHeader(status)
			w.Write([]byte("<html>proxy</html>"))
		}
	}
	wrong(t, through("http://127.0.0.1:1"), tidewright.ErrConnectionFailed, "HTTP_PROXY", "name gateway.internal in NO_PROXY")
	wrong(t, through(serve(t, page(407))), tidewright.ErrInvalidRequest, "user and password")
	wrong(t, through(serve(t, page(503))), tidewright.ErrUnavailable, "a proxy answers in its place", "NO_PROXY")
	wrong(t, through(serve(t, page(200))), tidewright.ErrUnexpectedAnswer, "text/html", "NO_PROXY")
}

func TestRedirectsNameTheirTarget(t *testing.T) {
	at := serve(t, func(w http.ResponseWriter, r *http.Request) { http.Redirect(w, r, "https://other.example/secret", 308) })
	wrong(t, tidewright.Options{URL: at}, tidewright.ErrUnexpectedAnswer, "https://other.example", "give its URL")
}

// TestWithRealServers asks at the addresses of TIDEWRIGHT_WRONG: {"http", "grpc" and "metrics" of a Triton}, and with
// the key "expired" of the gateway at TIDEWRIGHT_URL.
func TestWithRealServers(t *testing.T) {
	given := os.Getenv("TIDEWRIGHT_WRONG")
	if given == "" {
		t.Skip("TIDEWRIGHT_WRONG names no servers")
	}
	var at struct{ HTTP, GRPC, Metrics, Expired string }
	if err := json.Unmarshal([]byte(given), &at); err != nil {
		t.Fatal(err)
	}
	wrong(t, tidewright.Options{URL: at.GRPC}, tidewright.ErrConnectionFailed, "gRPC", "8080 by default")
	for _, url := range []string{at.HTTP, at.Metrics} {
		client := newClient(t, tidewright.Options{URL: url, MaxRetries: -1})
		_, err := client.Chat(context.Background(), hi)
		if err == nil || !strings.Contains(err.Error(), "is this the gateway's port, 8080 by default, and not one of Triton's") {
			t.Error(err)
		}
		if ready, err := client.Health(context.Background()); ready || err == nil {
			t.Error("a Triton passes as a gateway that is ready")
		}
	}
	wrong(t, tidewright.Options{Key: at.Expired}, tidewright.ErrUnauthenticated, "expired", "TIDEWRIGHT_KEY")
}
