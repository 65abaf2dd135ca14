package tidewright

import (
	"context"
	"errors"
	"io"
	"net"
	"net/http"
	"time"
)

// NewTransport is what a client uses if Options.Transport is nil: a pool of connections for hundreds of streams at a
// time, and the proxy of HTTP_PROXY, HTTPS_PROXY and NO_PROXY. Change it for certificates of your own:
//
//	transport := tidewright.NewTransport()
//	transport.TLSClientConfig = &tls.Config{RootCAs: pool}
//	client, err := tidewright.New(tidewright.Options{Transport: transport})
func NewTransport() *http.Transport {
	return &http.Transport{
		Proxy:                 http.ProxyFromEnvironment,
		DialContext:           (&net.Dialer{Timeout: 10 * time.Second, KeepAlive: 30 * time.Second}).DialContext,
		TLSHandshakeTimeout:   10 * time.Second,
		ExpectContinueTimeout: time.Second,
		ForceAttemptHTTP2:     true,
		MaxIdleConns:          1024,
		MaxIdleConnsPerHost:   1024,
		// Less than the gateway's 75 s: a connection that it closes at the moment in which it is used loses the request.
		IdleConnTimeout:    60 * time.Second,
		DisableCompression: true, // it would hold events back
	}
}

// The reasons for which a call's own context ends; context.Cause finds them.
var (
	errTimeout = errors.New("the call's timeout passed")
	errIdle    = errors.New("nothing came")
	errClosed  = errors.New("the stream was closed")
)

// watched ends a call when a read takes too long. The time between reads does not count: it is the caller's.
type watched struct {
	body   io.Reader
	idle   time.Duration // 0: no limit
	cancel context.CancelCauseFunc
	timer  *time.Timer
}

func (w *watched) Read(buffer []byte) (int, error) {
	w.start()
	defer w.stop()
	return w.body.Read(buffer)
}

func (w *watched) start() {
	if w.idle <= 0 {
		return
	}
	if w.timer == nil {
		w.timer = time.AfterFunc(w.idle, func() { w.cancel(errIdle) })
	} else {
		w.timer.Reset(w.idle)
	}
}

func (w *watched) stop() {
	if w.timer != nil {
		w.timer.Stop()
	}
}
