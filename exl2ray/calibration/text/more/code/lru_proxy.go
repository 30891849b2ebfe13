// Package pagecache keeps rendered pages in memory in front of a slow origin.
//
// A page is looked up by its canonical URL. Concurrent misses for the same
// page cause one request to the origin; the others wait for it. A page past
// its lifetime is still served for a while ("stale") as one goroutine fetches
// a new copy.
package pagecache

import (
	"container/list"
	"context"
	"errors"
	"fmt"
	"sync"
	"time"
)

// ErrTooLarge is returned by Fetch functions for pages that should be passed
// through and never stored.
var ErrTooLarge = errors.New("pagecache: page too large to keep")

// Page is immutable once stored; callers must not modify Body.
type Page struct {
	Body    []byte
	Type    string
	Fetched time.Time
	TTL     time.Duration
}

func (p *Page) size() int64 { return int64(len(p.Body)+len(p.Type)) + 96 }

// FetchFunc gets a page from the origin.
type FetchFunc func(ctx context.Context, url string) (*Page, error)

type entry struct {
	url  string
	page *Page
}

type call struct {
	done chan struct{}
	page *Page
	err  error
}

// Cache is safe for concurrent use. The zero value is not usable; see New.
type Cache struct {
	fetch    FetchFunc
	maxBytes int64
	grace    time.Duration
	now      func() time.Time

	mu       sync.Mutex
	lru      *list.List // front is most recently used
	byURL    map[string]*list.Element
	inflight map[string]*call
	bytes    int64
	stats    Stats
}

// Stats counts what happened since New.
type Stats struct {
	Hits, Stale, Misses, Shared, Evicted uint64
}

func New(fetch FetchFunc, maxBytes int64, grace time.Duration) *Cache {
	return &Cache{
		fetch:    fetch,
		maxBytes: maxBytes,
		grace:    grace,
		now:      time.Now,
		lru:      list.New(),
		byURL:    make(map[string]*list.Element),
		inflight: make(map[string]*call),
	}
}

// Get returns the page for url. The context bounds how long this caller waits;
// it does not cancel a fetch that others are waiting for too.
func (c *Cache) Get(ctx context.Context, url string) (*Page, error) {
	c.mu.Lock()
	if el, ok := c.byURL[url]; ok {
		p := el.Value.(*entry).page
		switch age := c.now().Sub(p.Fetched); {
		case age < p.TTL:
			c.stats.Hits++
			c.lru.MoveToFront(el)
			c.mu.Unlock()
			return p, nil
		case age < p.TTL+c.grace:
			c.stats.Stale++
			c.lru.MoveToFront(el)
			c.startLocked(url)
			c.mu.Unlock()
			return p, nil
		}
	}
	_, shared := c.inflight[url]
	if shared {
		c.stats.Shared++
	} else {
		c.stats.Misses++
	}
	cl := c.startLocked(url)
	c.mu.Unlock()

	select {
	case <-cl.done:
		return cl.page, cl.err
	case <-ctx.Done():
		return nil, fmt.Errorf("waiting for %s: %w", url, ctx.Err())
	}
}

// startLocked begins a fetch unless one is under way.
func (c *Cache) startLocked(url string) *call {
	if cl, ok := c.inflight[url]; ok {
		return cl
	}
	cl := &call{done: make(chan struct{})}
	c.inflight[url] = cl
	go func() {
		ctx, cancel := context.WithTimeout(context.Background(), 30*time.Second)
		defer cancel()
		cl.page, cl.err = c.fetch(ctx, url)

		c.mu.Lock()
		delete(c.inflight, url)
		switch {
		case cl.err == nil:
			c.storeLocked(url, cl.page)
		case errors.Is(cl.err, ErrTooLarge) && cl.page != nil:
			cl.err = nil
		}
		c.mu.Unlock()
		close(cl.done)
	}()
	return cl
}

func (c *Cache) storeLocked(url string, p *Page) {
	if el, ok := c.byURL[url]; ok {
		e := el.Value.(*entry)
		c.bytes += p.size() - e.page.size()
		e.page = p
		c.lru.MoveToFront(el)
	} else {
		c.byURL[url] = c.lru.PushFront(&entry{url, p})
		c.bytes += p.size()
	}
	for c.bytes > c.maxBytes && c.lru.Len() > 1 {
		el := c.lru.Back()
		e := c.lru.Remove(el).(*entry)
		delete(c.byURL, e.url)
		c.bytes -= e.page.size()
		c.stats.Evicted++
	}
}

// Purge drops one page and reports whether it was there. A fetch in flight is
// left alone: its answer is newer than the purge or as good as.
func (c *Cache) Purge(url string) bool {
	c.mu.Lock()
	defer c.mu.Unlock()
	el, ok := c.byURL[url]
	if !ok {
		return false
	}
	c.bytes -= el.Value.(*entry).page.size()
	c.lru.Remove(el)
	delete(c.byURL, url)
	return true
}

// Stats returns a copy of the counters.
func (c *Cache) Stats() Stats {
	c.mu.Lock()
	defer c.mu.Unlock()
	return c.stats
}
