package quota

import (
	"errors"
	"sync"
	"sync/atomic"
	"testing"
	"time"
)

// newFrozen returns a limiter whose clock moves only when the test says so.
func newFrozen(t *testing.T, rate Rate) (*Limiter, *time.Duration) {
	t.Helper()
	l := New()
	clock := new(time.Duration)
	l.now = func() time.Duration { return *clock }
	if err := l.Configure("acme", rate); err != nil {
		t.Fatalf("Configure: %v", err)
	}
	return l, clock
}

func TestAllow(t *testing.T) {
	type step struct {
		at    time.Duration
		cost  int
		want  bool
		retry time.Duration
		left  int
	}
	tests := []struct {
		name  string
		rate  Rate
		steps []step
	}{
		{
			name: "burst is available immediately",
			rate: Rate{Interval: time.Second, Burst: 3},
			steps: []step{
				{at: 0, cost: 1, want: true, left: 2},
				{at: 0, cost: 1, want: true, left: 1},
				{at: 0, cost: 1, want: true, left: 0},
				{at: 0, cost: 1, want: false, retry: time.Second, left: 0},
			},
		},
		{
			name: "one request returns per interval",
			rate: Rate{Interval: 250 * time.Millisecond, Burst: 1},
			steps: []step{
				{at: 0, cost: 1, want: true},
				{at: 249 * time.Millisecond, cost: 1, want: false, retry: time.Millisecond},
				{at: 250 * time.Millisecond, cost: 1, want: true},
			},
		},
		{
			name: "idle time is not saved beyond the burst",
			rate: Rate{Interval: time.Second, Burst: 2},
			steps: []step{
				{at: time.Hour, cost: 2, want: true},
				{at: time.Hour, cost: 1, want: false, retry: time.Second},
			},
		},
		{
			name: "an expensive request waits until all of it fits",
			rate: Rate{Interval: time.Second, Burst: 4},
			steps: []step{
				{at: 0, cost: 3, want: true, left: 1},
				{at: 0, cost: 3, want: false, retry: 2 * time.Second, left: 1},
				{at: 0, cost: 1, want: true, left: 0},
			},
		},
	}
	for _, tc := range tests {
		t.Run(tc.name, func(t *testing.T) {
			l, clock := newFrozen(t, tc.rate)
			for i, s := range tc.steps {
				*clock = s.at
				got, err := l.Allow("acme", s.cost)
				if err != nil {
					t.Fatalf("step %d: %v", i, err)
				}
				want := Decision{Allowed: s.want, RetryAfter: s.retry, Remaining: s.left}
				if got != want {
					t.Errorf("step %d: got %+v, want %+v", i, got, want)
				}
			}
		})
	}
}

func TestErrors(t *testing.T) {
	l, _ := newFrozen(t, Rate{Interval: time.Second, Burst: 2})
	if _, err := l.Allow("acne", 1); !errors.Is(err, ErrUnknownTenant) {
		t.Errorf("misspelt tenant: got %v", err)
	}
	for _, cost := range []int{-1, 0, 3} {
		if _, err := l.Allow("acme", cost); err == nil {
			t.Errorf("cost %d was accepted", cost)
		}
	}
	if err := l.Configure("free", Rate{Interval: time.Second}); err == nil {
		t.Error("a burst of zero was accepted")
	}
}

// With the clock standing still, exactly Burst requests may pass however they interleave.
func TestConcurrentCallersShareOneAllowance(t *testing.T) {
	const burst, callers = 100, 16
	l, _ := newFrozen(t, Rate{Interval: time.Minute, Burst: burst})
	var passed atomic.Int64
	var wg sync.WaitGroup
	for range callers {
		wg.Add(1)
		go func() {
			defer wg.Done()
			for range burst {
				if d, err := l.Allow("acme", 1); err == nil && d.Allowed {
					passed.Add(1)
				}
			}
		}()
	}
	wg.Wait()
	if got := passed.Load(); got != burst {
		t.Fatalf("%d requests passed, want %d", got, burst)
	}
}

func BenchmarkAllow(b *testing.B) {
	l := New()
	if err := l.Configure("bench", Rate{Interval: time.Nanosecond, Burst: 1 << 20}); err != nil {
		b.Fatal(err)
	}
	b.RunParallel(func(pb *testing.PB) {
		for pb.Next() {
			_, _ = l.Allow("bench", 1)
		}
	})
}
