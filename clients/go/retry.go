package tidewright

import (
	"math"
	"math/rand/v2"
	"net/http"
	"strconv"
	"strings"
	"sync"
	"time"
)

const (
	firstWait   = 500 * time.Millisecond
	longestWait = 8 * time.Second
	// mostPatience is how long a server may ask to wait: beyond it, the error comes at once.
	mostPatience = 60 * time.Second
)

// budget bounds retries to a tenth of the requests: while all fail, a client sends little more than without retries.
// It counts tenths, which add up exactly.
type budget struct {
	mu    sync.Mutex
	spent int
}

const budgetSize, costOfRetry = 100, 10

// request makes room for a tenth of a retry.
func (b *budget) request() {
	b.mu.Lock()
	defer b.mu.Unlock()
	b.spent = max(b.spent-1, 0)
}

// retry reports whether there is room for one, and takes it.
func (b *budget) retry() bool {
	b.mu.Lock()
	defer b.mu.Unlock()
	if b.spent+costOfRetry > budgetSize {
		return false
	}
	b.spent += costOfRetry
	return true
}

// isRetried is for statuses that may be better the next time.
func isRetried(status int) bool {
	switch status {
	case 408, 409, 429, 500, 502, 503, 504:
		return true
	}
	return false
}

// backoff is the wait before a retry, the first of which is 0; random is in [0, 1).
func backoff(retry int, random float64) time.Duration {
	wait := min(firstWait<<min(retry, 10), longestWait)
	return wait - time.Duration(random*float64(wait)/2)
}

func waitBefore(retry int) time.Duration { return backoff(retry, rand.Float64()) }

// retryAfter reads the header: seconds, or a date. False if it has neither.
func retryAfter(header http.Header, now time.Time) (time.Duration, bool) {
	text := strings.TrimSpace(header.Get("Retry-After"))
	if seconds, err := strconv.ParseFloat(text, 64); err == nil {
		if math.IsNaN(seconds) || seconds < 0 {
			return 0, false
		}
		seconds = math.Min(seconds, math.MaxInt32) // a Duration holds no more than some hundred years
		return time.Duration(seconds * float64(time.Second)), true
	}
	date, err := http.ParseTime(text)
	if err != nil {
		return 0, false
	}
	return max(date.Sub(now), 0), true
}
