package tidewright

import (
	"crypto/tls"
	"crypto/x509"
	"errors"
	"fmt"
	"io"
	"net"
	"net/url"
	"strings"
	"syscall"
)

// explain says what failed, and what to change.
func explain(err error, base *url.URL) string {
	var asked *url.Error
	if errors.As(err, &asked) {
		err = asked.Err
	}
	var name *net.DNSError
	var network *net.OpError
	var timeout net.Error
	host, text := base.Host, err.Error()
	switch {
	case errors.As(err, &network) && network.Op == "proxyconnect":
		return fmt.Sprintf("the proxy of HTTP_PROXY or HTTPS_PROXY: %v; correct it, or name %s in NO_PROXY", err, base.Hostname())
	case errors.As(err, &name):
		return fmt.Sprintf("the host name %s is not known (%v): check the URL", name.Name, name.Err)
	case strings.Contains(text, "server gave HTTP response to HTTPS client"):
		return fmt.Sprintf("%s does not speak TLS: write http:// in the URL in place of https://", host)
	case isOfCertificate(err):
		return fmt.Sprintf("the certificate of %s is not trusted (%v): if it is your own, name its CA in the environment "+
			"variable SSL_CERT_FILE or in Options.Transport (see NewTransport)", host, err)
	case strings.Contains(text, "malformed HTTP"):
		if strings.Contains(text, `"\x00\x00`) { // a frame of HTTP/2
			return fmt.Sprintf("%s speaks gRPC: this is Triton's port; the gateway's is 8080 by default", host)
		}
		if strings.Contains(text, `"\x15\x03`) { // a record of TLS
			return fmt.Sprintf("%s speaks TLS: write https:// in the URL in place of http://", host)
		}
		return fmt.Sprintf("%s does not speak HTTP (%v): check the URL's port", host, err)
	case strings.Contains(text, "readLoopPeekFailLocked"): // net/http's word for bytes that come before a request
		return fmt.Sprintf("%s speaks before it is asked, as gRPC does: if this is Triton's port, the gateway's is 8080 by default", host)
	case errors.Is(err, syscall.ECONNREFUSED):
		return fmt.Sprintf("nothing listens at %s: check that the gateway runs, and the URL's port, which is 8080 by default", host)
	case errors.As(err, &timeout) && timeout.Timeout():
		return fmt.Sprintf("%s did not answer (%v): check the URL's host, and firewalls on the way", host, err)
	case errors.Is(err, io.EOF), errors.Is(err, io.ErrUnexpectedEOF), errors.Is(err, syscall.ECONNRESET), strings.Contains(text, "EOF"):
		if base.Scheme == "http" {
			return fmt.Sprintf("%s closed the connection without an answer (%v); if it serves TLS, write https:// in the URL", host, err)
		}
		return fmt.Sprintf("%s closed the connection without an answer (%v)", host, err)
	}
	return fmt.Sprintf("%s: %v: check the URL", host, err)
}

func isOfCertificate(err error) bool {
	var verification *tls.CertificateVerificationError
	var authority x509.UnknownAuthorityError
	var name x509.HostnameError
	var validity x509.CertificateInvalidError
	return errors.As(err, &verification) || errors.As(err, &authority) || errors.As(err, &name) || errors.As(err, &validity)
}

// parseURL is the gateway's root, with neither /v1 nor a slash at its end.
func parseURL(text string) (*url.URL, error) {
	example := `write it as "http://127.0.0.1:8080"`
	parsed, err := url.Parse(strings.TrimSpace(text))
	if err != nil || parsed.Opaque != "" || (parsed.Scheme == "" && parsed.Host == "") {
		return nil, invalid("the URL %q is none: %s, with its scheme", shown(text), example)
	}
	if parsed.Scheme != "http" && parsed.Scheme != "https" {
		return nil, invalid("the URL's scheme %q is not http or https: %s", parsed.Scheme, example)
	}
	if parsed.Hostname() == "" {
		return nil, invalid("the URL %q has no host: %s", shown(text), example)
	}
	if parsed.User != nil {
		return nil, invalid("the URL has a user or password: give the key as Options.Key")
	}
	if parsed.RawQuery != "" || parsed.Fragment != "" {
		return nil, invalid("the URL has a query or fragment: %s", example)
	}
	path := strings.TrimRight(parsed.Path, "/")
	for _, end := range []string{"/chat/completions", "/completions", "/models", "/responses", "/messages", "/embeddings"} {
		if strings.HasSuffix(path, "/v1"+end) {
			return nil, invalid("the URL is that of one call: leave out %q", "/v1"+end)
		}
	}
	parsed.Path, parsed.RawPath = strings.TrimRight(strings.TrimSuffix(path, "/v1"), "/"), ""
	return parsed, nil
}

// shown is a text of the caller's without what may be a password in it.
func shown(text string) string {
	if at := strings.LastIndex(text, "@"); at >= 0 {
		return "…" + text[at:]
	}
	return text
}
