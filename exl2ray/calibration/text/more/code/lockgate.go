// Package lockgate sequences the gates and paddles of a canal lock.
//
// A lock chamber has two pairs of gates. The one rule that must never be broken is that both pairs are not open
// at the same time; the second is that gates only move when the water on their two sides is level. The Controller
// accepts requests from the bank (push buttons, the lock keeper's tablet) and drives the actuators one step at a
// time, re-reading the gauges before each step.
package lockgate

import (
	"context"
	"errors"
	"fmt"
	"log/slog"
	"math"
	"sync"
	"time"
)

type End int

const (
	Lower End = iota
	Upper
)

func (e End) Opposite() End { return 1 - e }

func (e End) String() string {
	if e == Upper {
		return "upper"
	}
	return "lower"
}

// Plant is the hardware. Actuator calls block until the limit switch reports, or the context ends.
type Plant interface {
	MoveGates(ctx context.Context, end End, open bool) error
	MovePaddles(ctx context.Context, end End, open bool) error
	GatesClosed(end End) bool
	// Levels in millimetres above the lock's datum.
	Chamber() (int, error)
	Pound(end End) (int, error)
}

const (
	levelTolerance = 15 // mm; a man can just push the gates at this difference
	pollEvery      = 2 * time.Second
	fillLimit      = 25 * time.Minute
	stallAfter     = 90 * time.Second
)

var (
	ErrBusy    = errors.New("lockgate: a passage is under way")
	ErrStalled = errors.New("lockgate: the water does not move; debris in a paddle?")
)

// InterlockError is returned when a step would have broken a rule. It always means that the software
// and the lock disagree about the state of the lock, so the controller stops and wants a person.
type InterlockError struct {
	End    End
	Reason string
}

func (e *InterlockError) Error() string {
	return fmt.Sprintf("lockgate: interlock at the %s gates: %s", e.End, e.Reason)
}

type Controller struct {
	plant Plant
	log   *slog.Logger
	sleep func(context.Context, time.Duration) error

	busy    sync.Mutex // held for the length of a passage
	mu      sync.Mutex
	tripped error
}

func New(p Plant, log *slog.Logger) *Controller {
	return &Controller{plant: p, log: log, sleep: sleepContext}
}

// MakeReady brings the chamber level with one end and opens the gates there. It is what both a boat in the
// chamber and a boat waiting outside ask for. On return with a nil error the gates are open.
func (c *Controller) MakeReady(ctx context.Context, end End) (err error) {
	if !c.busy.TryLock() {
		return ErrBusy
	}
	defer c.busy.Unlock()
	if err := c.Tripped(); err != nil {
		return fmt.Errorf("out of service: %w", err)
	}
	defer func() {
		var lock *InterlockError
		if errors.As(err, &lock) {
			c.trip(err)
		}
	}()

	far := end.Opposite()
	steps := []struct {
		name string
		do   func(context.Context) error
	}{
		{"close far gates", func(ctx context.Context) error { return c.plant.MoveGates(ctx, far, false) }},
		{"close far paddles", func(ctx context.Context) error { return c.plant.MovePaddles(ctx, far, false) }},
		{"open near paddles", func(ctx context.Context) error { return c.openPaddles(ctx, end) }},
		{"level", func(ctx context.Context) error { return c.waitLevel(ctx, end) }},
		{"open near gates", func(ctx context.Context) error { return c.openGates(ctx, end) }},
		{"close near paddles", func(ctx context.Context) error { return c.plant.MovePaddles(ctx, end, false) }},
	}
	for _, s := range steps {
		c.log.Info("step", "end", end, "do", s.name)
		if err := s.do(ctx); err != nil {
			// Leave nothing running: open paddles would go on filling an unattended chamber. The caller's
			// context may be the very thing that failed, so the clean-up gets its own.
			safe, cancel := context.WithTimeout(context.WithoutCancel(ctx), time.Minute)
			defer cancel()
			return errors.Join(fmt.Errorf("%s: %w", s.name, err), c.plant.MovePaddles(safe, end, false))
		}
	}
	return nil
}

func (c *Controller) openPaddles(ctx context.Context, end End) error {
	if !c.plant.GatesClosed(end.Opposite()) {
		return &InterlockError{end, "paddles wanted while the far gates are open"}
	}
	return c.plant.MovePaddles(ctx, end, true)
}

func (c *Controller) openGates(ctx context.Context, end End) error {
	if !c.plant.GatesClosed(end.Opposite()) {
		return &InterlockError{end, "both pairs of gates would be open"}
	}
	diff, err := c.difference(end)
	if err != nil {
		return err
	}
	if diff > levelTolerance {
		return &InterlockError{end, fmt.Sprintf("water differs by %d mm", diff)}
	}
	return c.plant.MoveGates(ctx, end, true)
}

func (c *Controller) waitLevel(ctx context.Context, end End) error {
	ctx, cancel := context.WithTimeout(ctx, fillLimit)
	defer cancel()
	best, quiet := math.MaxInt, time.Duration(0)
	for {
		diff, err := c.difference(end)
		if err != nil {
			return err
		}
		switch {
		case diff <= levelTolerance:
			return nil
		case diff < best:
			best, quiet = diff, 0
		case quiet >= stallAfter:
			return fmt.Errorf("%w (still %d mm)", ErrStalled, diff)
		}
		if err := c.sleep(ctx, pollEvery); err != nil {
			return err
		}
		quiet += pollEvery
	}
}

func (c *Controller) difference(end End) (int, error) {
	in, err := c.plant.Chamber()
	if err != nil {
		return 0, fmt.Errorf("chamber gauge: %w", err)
	}
	out, err := c.plant.Pound(end)
	if err != nil {
		return 0, fmt.Errorf("%s gauge: %w", end, err)
	}
	return max(in-out, out-in), nil
}

// Tripped returns the interlock error that took the lock out of service, or nil.
func (c *Controller) Tripped() error {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.tripped
}

// Reset is the key switch in the keeper's hut.
func (c *Controller) Reset() {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.tripped = nil
}

func (c *Controller) trip(err error) {
	c.mu.Lock()
	defer c.mu.Unlock()
	c.log.Error("lock out of service", "err", err)
	c.tripped = err
}

func sleepContext(ctx context.Context, d time.Duration) error {
	t := time.NewTimer(d)
	defer t.Stop()
	select {
	case <-t.C:
		return nil
	case <-ctx.Done():
		return ctx.Err()
	}
}
