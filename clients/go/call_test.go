package tidewright

import (
	"testing"
	"time"
)

func TestTheServerIsToldLessThanIsLeft(t *testing.T) {
	for left, want := range map[time.Duration]time.Duration{
		10 * time.Minute:       598 * time.Second,
		20 * time.Second:       18 * time.Second,
		10 * time.Second:       9 * time.Second,
		4 * time.Second:        3500 * time.Millisecond,
		time.Second:            500 * time.Millisecond,
		400 * time.Millisecond: 200 * time.Millisecond,
		0:                      time.Millisecond,
		-time.Second:           time.Millisecond,
	} {
		if got := told(left); got != want {
			t.Errorf("of %v it has %v, not %v", left, got, want)
		}
	}
}
