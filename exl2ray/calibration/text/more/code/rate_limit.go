// Package ratelimit limits how often each client may do something, with a token bucket per client.
//
// A bucket isn't refilled by a timer. It remembers when it was last looked at, and what has accrued since then is worked out
// when somebody asks. Idle clients cost nothing but their entry, which Sweep removes.
package ratelimit

import (
	"errors"
	"sync"
	"time"
)

// ErrTooLarge is returned for a request that would not be granted even by a full bucket.
var ErrTooLarge = errors.New("ratelimit: request exceeds the burst")

type bucket struct {
	tokens float64
	seen   time.Time
}

// Limiter is safe for use by several goroutines.
type Limiter struct {
	rate  float64 // tokens per second
	burst float64

	mu      sync.Mutex
	buckets map[string]*bucket
	now     func() time.Time
}

// New returns a limiter that grants rate tokens a second to each client, and up to burst at once.
func New(rate, burst float64) *Limiter {
	if rate <= 0 || burst < 1 {
		panic("ratelimit: rate must be positive and burst at least 1")
	}
	return &Limiter{rate: rate, burst: burst, buckets: make(map[string]*bucket), now: time.Now}
}

// Take asks for n tokens on behalf of a client. It returns 0 if they were granted, or how long to wait before it is worth
// asking again. Nothing is reserved by asking: two clients who were told to wait a second may both come back.
func (l *Limiter) Take(client string, n float64) (time.Duration, error) {
	if n > l.burst {
		return 0, ErrTooLarge
	}
	l.mu.Lock()
	defer l.mu.Unlock()

	now := l.now()
	b, ok := l.buckets[client]
	if !ok {
		b = &bucket{tokens: l.burst, seen: now}
		l.buckets[client] = b
	}
	if elapsed := now.Sub(b.seen).Seconds(); elapsed > 0 { // clocks may be set back
		b.tokens = min(l.burst, b.tokens+elapsed*l.rate)
	}
	b.seen = now
	if b.tokens >= n {
		b.tokens -= n
		return 0, nil
	}
	missing := (n - b.tokens) / l.rate
	return time.Duration(missing * float64(time.Second)), nil
}

// Sweep forgets clients whose bucket is full by now, since a new bucket would be no different. It returns how many it forgot.
func (l *Limiter) Sweep() int {
	l.mu.Lock()
	defer l.mu.Unlock()
	now, forgotten := l.now(), 0
	for client, b := range l.buckets {
		if b.tokens+now.Sub(b.seen).Seconds()*l.rate >= l.burst {
			delete(l.buckets, client)
			forgotten++
		}
	}
	return forgotten
}
