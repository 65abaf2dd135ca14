package tidewright

import (
	"net/http"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

func TestTheBudgetIsATenthOfTheRequests(t *testing.T) {
	var b budget
	for range 10 {
		if !b.retry() {
			t.Fatal("it begins with ten")
		}
	}
	if b.retry() {
		t.Fatal("an eleventh")
	}
	for range 9 {
		b.request()
	}
	if b.retry() {
		t.Fatal("nine requests make less than a retry")
	}
	b.request()
	if !b.retry() || b.retry() {
		t.Fatal("ten requests make one retry")
	}
	for range 1000 {
		b.request()
	}
	count := 0
	for b.retry() {
		count++
	}
	if count != 10 {
		t.Fatalf("%d retries saved, not 10", count)
	}
}

func TestTheBudgetHoldsForManyGoroutines(t *testing.T) {
	var b budget
	var retries atomic.Int64
	var group sync.WaitGroup
	for range 50 {
		group.Add(1)
		go func() {
			defer group.Done()
			if b.retry() {
				retries.Add(1)
			}
		}()
	}
	group.Wait()
	if retries.Load() != 10 {
		t.Fatalf("%d retries", retries.Load())
	}
}

func TestRetryAfter(t *testing.T) {
	now := time.Date(2026, 11, 30, 12, 0, 0, 0, time.UTC)
	none := time.Duration(-1)
	for text, want := range map[string]time.Duration{
		"":                                0 + none,
		"0":                               0,
		"3":                               3 * time.Second,
		" 3 ":                             3 * time.Second,
		"1.5":                             1500 * time.Millisecond,
		"-1":                              none,
		"NaN":                             none,
		"soon":                            none,
		"Mon, 30 Nov 2026 12:00:07 GMT":   7 * time.Second,
		"Monday, 30-Nov-26 12:00:07 GMT":  7 * time.Second,
		"Mon Nov 30 12:00:07 2026":        7 * time.Second,
		"Mon, 30 Nov 2026 11:00:00 GMT":   0,
		"Mon, 30 Nov 2026 12:00:07 LOCAL": none,
	} {
		got, ok := retryAfter(http.Header{"Retry-After": {text}}, now)
		if !ok {
			got = none
		}
		if got != want {
			t.Errorf("%q: %v, not %v", text, got, want)
		}
	}
	for _, text := range []string{"1e300", "Inf", "99999999999999999999"} {
		if got, ok := retryAfter(http.Header{"Retry-After": {text}}, now); !ok || got < time.Hour {
			t.Errorf("%q: %v", text, got)
		}
	}
}

func TestBackoff(t *testing.T) {
	for retry, most := range []time.Duration{
		500 * time.Millisecond, time.Second, 2 * time.Second, 4 * time.Second, 8 * time.Second, 8 * time.Second,
	} {
		if got := backoff(retry, 0); got != most {
			t.Errorf("retry %d: %v at most, not %v", retry, got, most)
		}
		if got := backoff(retry, 1); got != most/2 {
			t.Errorf("retry %d: %v at least, not %v", retry, got, most/2)
		}
	}
	if got := backoff(1000, 0); got != 8*time.Second {
		t.Error(got)
	}
}
