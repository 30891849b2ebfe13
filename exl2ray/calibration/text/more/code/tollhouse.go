// Package toll settles who pays for a bridge that belongs to four parishes.
//
// Crossings arrive from the barrier over a flaky radio link: late, doubled and in any order. The book is
// closed every night at three; what comes in for a closed day is put on the next one with a note.
package toll

import (
	"bufio"
	"cmp"
	"context"
	"encoding/binary"
	"errors"
	"fmt"
	"hash/crc32"
	"io"
	"iter"
	"log/slog"
	"maps"
	"slices"
	"sync"
	"time"
)

// Class is what the loop in the road thinks it saw.
type Class uint8

const (
	Cycle Class = iota
	Car
	Cart
	Lorry
)

func (c Class) String() string {
	switch c {
	case Cycle:
		return "cycle"
	case Car:
		return "car"
	case Cart:
		return "cart"
	case Lorry:
		return "lorry"
	}
	return fmt.Sprintf("class(%d)", uint8(c))
}

// Crossing is one passage of the barrier. Seq restarts at zero when the barrier does, which Boot counts.
type Crossing struct {
	Boot  uint16
	Seq   uint32
	Class Class
	At    time.Time
	Late  bool
}

type key struct {
	boot uint16
	seq  uint32
}

var (
	ErrChecksum = errors.New("toll: frame has a wrong checksum")
	ErrClosed   = errors.New("toll: book is closed")
)

const frameLen = 2 + 4 + 1 + 4 + 4

// Frames decodes a stream. After a bad frame it hunts, byte by byte, for the next one whose checksum is
// right; errors are yielded so that the caller can count them.
func Frames(r io.Reader) iter.Seq2[Crossing, error] {
	return func(yield func(Crossing, error) bool) {
		br := bufio.NewReaderSize(r, 4096)
		lost := 0
		for {
			b, err := br.Peek(frameLen)
			if err != nil {
				if !errors.Is(err, io.EOF) {
					yield(Crossing{}, err)
				}
				return
			}
			if crc32.ChecksumIEEE(b[:frameLen-4]) != binary.BigEndian.Uint32(b[frameLen-4:]) {
				br.Discard(1)
				lost++
				continue
			}
			if lost > 0 {
				if !yield(Crossing{}, fmt.Errorf("%w: %d bytes skipped", ErrChecksum, lost)) {
					return
				}
				lost = 0
			}
			c := Crossing{
				Boot:  binary.BigEndian.Uint16(b),
				Seq:   binary.BigEndian.Uint32(b[2:]),
				Class: Class(b[6]),
				At:    time.Unix(int64(binary.BigEndian.Uint32(b[7:])), 0).UTC(),
			}
			br.Discard(frameLen)
			if !yield(c, nil) {
				return
			}
		}
	}
}

// Day is a calendar day at the bridge, as "2006-01-02".
type Day string

type Tariff map[Class]int // pence

// Book holds the days that are open and the totals of those that are not.
type Book struct {
	tariff Tariff
	zone   *time.Location
	log    *slog.Logger

	mu     sync.Mutex
	open   map[Day]map[key]Crossing
	seen   map[key]Day // crossings on closed days, so that an echo a day later is still an echo
	closed Day         // the latest closed day
}

func NewBook(t Tariff, zone *time.Location, log *slog.Logger) *Book {
	return &Book{
		tariff: maps.Clone(t),
		zone:   zone,
		log:    log,
		open:   make(map[Day]map[key]Crossing),
		seen:   make(map[key]Day),
	}
}

func (b *Book) dayOf(t time.Time) Day {
	// The day turns at three: a wedding party that crosses at one in the morning belongs to the evening before.
	return Day(t.In(b.zone).Add(-3 * time.Hour).Format(time.DateOnly))
}

// Add enters a crossing and reports whether it was new.
func (b *Book) Add(c Crossing) bool {
	b.mu.Lock()
	defer b.mu.Unlock()

	k := key{c.Boot, c.Seq}
	if _, dup := b.seen[k]; dup {
		return false
	}
	d := b.dayOf(c.At)
	if d <= b.closed {
		c.Late = true
		next, err := time.Parse(time.DateOnly, string(b.closed))
		if err != nil {
			b.log.Error("book has a closed day that is no day", "day", b.closed)
			return false
		}
		d = Day(next.AddDate(0, 0, 1).Format(time.DateOnly))
	}
	b.seen[k] = d
	if b.open[d] == nil {
		b.open[d] = make(map[key]Crossing)
	}
	b.open[d][k] = c
	return true
}

// Statement is what the treasurer gets.
type Statement struct {
	Day    Day
	Counts map[Class]int
	Late   int
	Gaps   []Gap
	Pence  int
}

// Gap is a run of sequence numbers that never arrived.
type Gap struct {
	Boot     uint16
	From, To uint32
}

func (b *Book) Close(d Day) (*Statement, error) {
	b.mu.Lock()
	defer b.mu.Unlock()
	if d <= b.closed {
		return nil, fmt.Errorf("%w for %s", ErrClosed, d)
	}
	st := &Statement{Day: d, Counts: make(map[Class]int)}
	crossings := slices.SortedFunc(maps.Values(b.open[d]), func(x, y Crossing) int {
		return cmp.Or(cmp.Compare(x.Boot, y.Boot), cmp.Compare(x.Seq, y.Seq))
	})
	for i, c := range crossings {
		st.Counts[c.Class]++
		st.Pence += b.tariff[c.Class]
		if c.Late {
			st.Late++
			continue
		}
		if i > 0 {
			p := crossings[i-1]
			if !p.Late && p.Boot == c.Boot && c.Seq > p.Seq+1 {
				st.Gaps = append(st.Gaps, Gap{c.Boot, p.Seq + 1, c.Seq - 1})
			}
		}
	}
	delete(b.open, d)
	b.closed = d

	// Echoes older than a week have never been seen; let them go.
	limit, _ := time.Parse(time.DateOnly, string(d))
	old := Day(limit.AddDate(0, 0, -7).Format(time.DateOnly))
	maps.DeleteFunc(b.seen, func(_ key, on Day) bool { return on < old })
	return st, nil
}

// Split divides pence among the parishes by shares, giving the odd pennies to the largest remainders. The
// parish that comes first in the list wins a tie, as agreed in the deed.
func Split(pence int, shares []int) []int {
	total := 0
	for _, s := range shares {
		total += s
	}
	out := make([]int, len(shares))
	order := make([]int, len(shares))
	left := pence
	for i, s := range shares {
		out[i] = pence * s / total
		left -= out[i]
		order[i] = i
	}
	slices.SortStableFunc(order, func(a, c int) int {
		return cmp.Compare(pence*shares[c]%total, pence*shares[a]%total)
	})
	for _, i := range order[:left] {
		out[i]++
	}
	return out
}

// Run reads frames until ctx is done and closes each day at three.
func (b *Book) Run(ctx context.Context, r io.ReadCloser, deliver func(*Statement) error) error {
	stop := context.AfterFunc(ctx, func() { r.Close() })
	defer stop()

	go func() {
		for {
			now := time.Now().In(b.zone)
			next := time.Date(now.Year(), now.Month(), now.Day(), 3, 10, 0, 0, b.zone)
			if !next.After(now) {
				next = next.AddDate(0, 0, 1)
			}
			select {
			case <-ctx.Done():
				return
			case <-time.After(time.Until(next)):
			}
			st, err := b.Close(b.dayOf(next.Add(-time.Hour)))
			if err == nil {
				err = deliver(st)
			}
			if err != nil {
				b.log.Error("statement not delivered", "err", err)
			}
		}
	}()

	for c, err := range Frames(r) {
		switch {
		case errors.Is(err, ErrChecksum):
			b.log.Warn("radio", "err", err)
		case err != nil && ctx.Err() != nil:
			return ctx.Err()
		case err != nil:
			return fmt.Errorf("reading the barrier: %w", err)
		default:
			b.Add(c)
		}
	}
	return ctx.Err()
}
