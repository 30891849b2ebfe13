// Package quota limits how many requests a tenant may make, without a lock per request.
//
// The algorithm is the "generic cell rate algorithm" known from telephony. Instead of a bucket that
// must be refilled, each tenant has a single number: the theoretical arrival time (TAT), the moment
// at which its backlog would be worked off. One compare-and-swap per request is all it takes.
package quota

import (
	"errors"
	"fmt"
	"sync"
	"sync/atomic"
	"time"
)

// ErrUnknownTenant is returned for tenants that were never configured. Treating them as unlimited
// would turn a typo in a configuration file into an outage.
var ErrUnknownTenant = errors.New("quota: unknown tenant")

// Rate allows Burst requests at once and one more every Interval.
type Rate struct {
	Interval time.Duration
	Burst    int
}

func (r Rate) validate() error {
	switch {
	case r.Interval <= 0:
		return fmt.Errorf("quota: interval must be positive, got %v", r.Interval)
	case r.Burst < 1:
		return fmt.Errorf("quota: burst must be at least 1, got %d", r.Burst)
	}
	return nil
}

// Decision tells the caller what to do and what to put into the Retry-After header.
type Decision struct {
	Allowed    bool
	RetryAfter time.Duration // zero when allowed
	Remaining  int           // requests that would be accepted right now
}

type tenant struct {
	rate Rate
	tat  atomic.Int64 // nanoseconds since the limiter's epoch
}

// Limiter is safe for concurrent use.
type Limiter struct {
	now     func() time.Duration
	mu      sync.RWMutex
	tenants map[string]*tenant
}

// New returns a limiter driven by the monotonic clock.
func New() *Limiter {
	epoch := time.Now()
	return &Limiter{
		now:     func() time.Duration { return time.Since(epoch) },
		tenants: make(map[string]*tenant),
	}
}

// Configure sets the rate of a tenant and forgets its backlog.
func (l *Limiter) Configure(name string, rate Rate) error {
	if err := rate.validate(); err != nil {
		return fmt.Errorf("tenant %q: %w", name, err)
	}
	l.mu.Lock()
	defer l.mu.Unlock()
	l.tenants[name] = &tenant{rate: rate}
	return nil
}

// Allow accounts for cost requests of one tenant. A refused request costs nothing, so a client that
// hammers a closed door is not locked out any longer than a polite one.
func (l *Limiter) Allow(name string, cost int) (Decision, error) {
	l.mu.RLock()
	t := l.tenants[name]
	l.mu.RUnlock()
	if t == nil {
		return Decision{}, fmt.Errorf("%w: %q", ErrUnknownTenant, name)
	}
	if cost < 1 || cost > t.rate.Burst {
		return Decision{}, fmt.Errorf("quota: cost %d is outside 1..%d", cost, t.rate.Burst)
	}

	interval := int64(t.rate.Interval)
	tolerance := interval * int64(t.rate.Burst)
	for {
		now := int64(l.now())
		old := t.tat.Load()
		next := max(old, now) + interval*int64(cost)
		if early := next - now - tolerance; early > 0 {
			return Decision{
				RetryAfter: time.Duration(early),
				Remaining:  int((now + tolerance - max(old, now)) / interval),
			}, nil
		}
		if t.tat.CompareAndSwap(old, next) {
			return Decision{Allowed: true, Remaining: int((now + tolerance - next) / interval)}, nil
		}
		// Somebody else was faster; their request may have used up our allowance, so start over.
	}
}
