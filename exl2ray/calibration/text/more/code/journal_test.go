package journal

import (
	"bytes"
	"encoding/binary"
	"errors"
	"hash/crc32"
	"io"
	"math/rand/v2"
	"path/filepath"
	"testing"
	"testing/iotest"
)

// mustAppend keeps the table tests readable; a failing append is never the point of one.
func mustAppend(t *testing.T, w *Writer, recs ...string) {
	t.Helper()
	for _, r := range recs {
		if err := w.Append([]byte(r)); err != nil {
			t.Fatalf("append %q: %v", r, err)
		}
	}
}

func readAll(r io.Reader) (recs []string, err error) {
	rd := NewReader(r)
	for {
		b, err := rd.Next()
		if errors.Is(err, io.EOF) {
			return recs, nil
		}
		if err != nil {
			return recs, err
		}
		recs = append(recs, string(b))
	}
}

func TestRoundTrip(t *testing.T) {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	want := []string{"", "otter", string(make([]byte, 70_000)), "ø"}
	mustAppend(t, w, want...)

	// Short reads used to break the header parser on network file systems.
	for name, r := range map[string]io.Reader{
		"plain":    bytes.NewReader(buf.Bytes()),
		"one byte": iotest.OneByteReader(bytes.NewReader(buf.Bytes())),
		"half":     iotest.HalfReader(bytes.NewReader(buf.Bytes())),
		"data+EOF": iotest.DataErrReader(bytes.NewReader(buf.Bytes())),
	} {
		t.Run(name, func(t *testing.T) {
			got, err := readAll(r)
			if err != nil {
				t.Fatal(err)
			}
			if len(got) != len(want) {
				t.Fatalf("%d records, want %d", len(got), len(want))
			}
			for i := range want {
				if got[i] != want[i] {
					t.Errorf("record %d differs (%d and %d bytes)", i, len(got[i]), len(want[i]))
				}
			}
		})
	}
}

// A crash can cut the file anywhere. Whatever the cut, the reader must return a prefix of the records
// and report either a clean end or ErrTorn, never ErrCorrupt and never a made-up record.
func TestEveryTruncation(t *testing.T) {
	var buf bytes.Buffer
	w := NewWriter(&buf)
	recs := []string{"first", "second, somewhat longer", "3"}
	ends := []int{buf.Len()}
	for _, r := range recs {
		mustAppend(t, w, r)
		ends = append(ends, buf.Len())
	}

	for cut := 0; cut <= buf.Len(); cut++ {
		whole := 0
		for whole < len(recs) && ends[whole+1] <= cut {
			whole++
		}
		got, err := readAll(bytes.NewReader(buf.Bytes()[:cut]))
		if len(got) != whole {
			t.Errorf("cut at %d: %d records, want %d", cut, len(got), whole)
		}
		atBoundary := cut == ends[whole]
		switch {
		case atBoundary && err != nil:
			t.Errorf("cut at %d: unexpected %v", cut, err)
		case !atBoundary && !errors.Is(err, ErrTorn):
			t.Errorf("cut at %d: got %v, want ErrTorn", cut, err)
		}
	}
}

func TestFlippedBitsAreNoticed(t *testing.T) {
	rng := rand.New(rand.NewPCG(17, 4))
	var buf bytes.Buffer
	w := NewWriter(&buf)
	mustAppend(t, w, "the keeper's log", "wind NNE 6", "lamp lit 16:42")

	for range 500 {
		damaged := bytes.Clone(buf.Bytes())
		bit := rng.IntN(len(damaged) * 8)
		damaged[bit/8] ^= 1 << (bit % 8)

		got, err := readAll(bytes.NewReader(damaged))
		if err == nil {
			t.Fatalf("bit %d: damage went unnoticed, read %q", bit, got)
		}
		var ce *CorruptError
		if errors.As(err, &ce) && ce.Offset > int64(bit/8) {
			t.Errorf("bit %d: blamed offset %d, behind the damage", bit, ce.Offset)
		}
	}
}

// Lengths come from disk and must be checked before they reach make().
func TestHugeLengthIsRefusedWithoutAllocating(t *testing.T) {
	var head [8]byte
	binary.LittleEndian.PutUint32(head[:], 0xfffffff0)
	binary.LittleEndian.PutUint32(head[4:], crc32.ChecksumIEEE(nil))

	allocs := testing.AllocsPerRun(10, func() {
		if _, err := NewReader(bytes.NewReader(head[:])).Next(); err == nil {
			t.Error("accepted a record of almost 4 GiB")
		}
	})
	if allocs > 8 {
		t.Errorf("%v allocations", allocs)
	}
}

func TestReopenContinuesAfterTornTail(t *testing.T) {
	path := filepath.Join(t.TempDir(), "walk.journal")

	f, err := Open(path)
	if err != nil {
		t.Fatal(err)
	}
	mustAppend(t, f.Writer, "kept")
	if _, err := f.file.Write([]byte{9, 0, 0}); err != nil { // half a header
		t.Fatal(err)
	}
	f.Close()

	f, err = Open(path)
	if err != nil {
		t.Fatalf("reopen: %v", err)
	}
	defer f.Close()
	if f.Repaired != 3 {
		t.Errorf("repaired %d bytes, want 3", f.Repaired)
	}
	mustAppend(t, f.Writer, "after the crash")

	got, err := f.ReadAll()
	if err != nil {
		t.Fatal(err)
	}
	if len(got) != 2 || string(got[1]) != "after the crash" {
		t.Errorf("got %q", got)
	}
}

func FuzzReader(f *testing.F) {
	f.Add([]byte{})
	f.Add([]byte{5, 0, 0, 0, 0, 0, 0, 0, 'h', 'e', 'l', 'l', 'o'})
	f.Fuzz(func(t *testing.T, data []byte) {
		recs, _ := readAll(bytes.NewReader(data))
		// What was accepted must encode to exactly the bytes it came from.
		var buf bytes.Buffer
		w := NewWriter(&buf)
		mustAppend(t, w, recs...)
		if !bytes.HasPrefix(data, buf.Bytes()) {
			t.Errorf("%d records do not re-encode to the input", len(recs))
		}
	})
}

func BenchmarkAppend(b *testing.B) {
	w := NewWriter(io.Discard)
	rec := bytes.Repeat([]byte("x"), 180)
	b.SetBytes(int64(len(rec)))
	b.ReportAllocs()
	for b.Loop() {
		if err := w.Append(rec); err != nil {
			b.Fatal(err)
		}
	}
}
