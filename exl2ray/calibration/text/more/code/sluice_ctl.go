// Command sluicectl talks to the sluice controllers along the Harrow Leat over a serial line
// protocol that predates everyone still working there.
//
// A frame is
//
//	STX addr cmd len payload... crcLo crcHi
//
// with the CRC over addr to the end of the payload. Controllers answer within 400 ms or not at all.
// Nobody speaks unless spoken to, so one goroutine owns the line.
package main

import (
	"bufio"
	"context"
	"encoding/binary"
	"errors"
	"flag"
	"fmt"
	"io"
	"log/slog"
	"os"
	"os/signal"
	"sort"
	"strings"
	"text/tabwriter"
	"time"
)

const (
	stx          = 0x02
	maxPayload   = 64
	replyTimeout = 400 * time.Millisecond
	retries      = 3
)

type command byte

const (
	cmdStatus command = 'S'
	cmdMove   command = 'M'
	cmdStop   command = 'X'
)

var (
	errTimeout  = errors.New("no reply")
	errChecksum = errors.New("checksum mismatch")
	errStray    = errors.New("reply from the wrong station")
)

// A nakError is a reply that arrived intact and said no.
type nakError struct {
	Addr byte
	Code byte
}

func (e *nakError) Error() string {
	reason, ok := map[byte]string{
		1: "unknown command",
		2: "interlock open",
		3: "gate in local control",
		4: "motor overload",
	}[e.Code]
	if !ok {
		reason = fmt.Sprintf("code %d", e.Code)
	}
	return fmt.Sprintf("station %d refused: %s", e.Addr, reason)
}

func crc16(p []byte) uint16 {
	crc := uint16(0xFFFF)
	for _, b := range p {
		crc ^= uint16(b)
		for range 8 {
			if crc&1 != 0 {
				crc = crc>>1 ^ 0xA001
			} else {
				crc >>= 1
			}
		}
	}
	return crc
}

func encode(addr byte, cmd command, payload []byte) []byte {
	f := make([]byte, 0, 6+len(payload))
	f = append(f, stx, addr, byte(cmd), byte(len(payload)))
	f = append(f, payload...)
	return binary.LittleEndian.AppendUint16(f, crc16(f[1:]))
}

type frame struct {
	addr    byte
	cmd     command
	payload []byte
}

// readFrame skips noise until an STX. Lightning on the line produces plenty.
func readFrame(r *bufio.Reader) (frame, error) {
	for {
		b, err := r.ReadByte()
		if err != nil {
			return frame{}, err
		}
		if b == stx {
			break
		}
	}
	head := make([]byte, 3, 3+maxPayload+2)
	if _, err := io.ReadFull(r, head); err != nil {
		return frame{}, err
	}
	n := int(head[2])
	if n > maxPayload {
		return frame{}, errChecksum // a mangled length; resynchronise on the next STX
	}
	body := head[:3+n+2]
	if _, err := io.ReadFull(r, body[3:]); err != nil {
		return frame{}, err
	}
	if got := binary.LittleEndian.Uint16(body[3+n:]); got != crc16(body[:3+n]) {
		return frame{}, errChecksum
	}
	return frame{addr: body[0], cmd: command(body[1]), payload: body[3 : 3+n]}, nil
}

type line struct {
	port   io.ReadWriter
	frames chan frame
	log    *slog.Logger
}

func newLine(port io.ReadWriter, log *slog.Logger) *line {
	l := &line{port: port, frames: make(chan frame, 4), log: log}
	go func() {
		defer close(l.frames)
		r := bufio.NewReader(port)
		for {
			f, err := readFrame(r)
			switch {
			case errors.Is(err, errChecksum):
				log.Debug("damaged frame dropped")
			case err != nil:
				log.Error("line lost", "err", err)
				return
			default:
				l.frames <- f
			}
		}
	}()
	return l
}

// ask sends one command and waits for its reply. It must not be called concurrently.
func (l *line) ask(ctx context.Context, addr byte, cmd command, payload []byte) ([]byte, error) {
	var last error
	for try := range retries {
		// A late answer to an earlier question would be taken for this one.
		for drained := false; !drained; {
			select {
			case <-l.frames:
			default:
				drained = true
			}
		}
		if _, err := l.port.Write(encode(addr, cmd, payload)); err != nil {
			return nil, fmt.Errorf("write to station %d: %w", addr, err)
		}
		timer := time.NewTimer(replyTimeout)
		select {
		case f, ok := <-l.frames:
			timer.Stop()
			switch {
			case !ok:
				return nil, io.ErrUnexpectedEOF
			case f.addr != addr:
				last = errStray
			case f.cmd == '!' && len(f.payload) == 1:
				return nil, &nakError{addr, f.payload[0]}
			default:
				return f.payload, nil
			}
		case <-timer.C:
			last = errTimeout
		case <-ctx.Done():
			timer.Stop()
			return nil, ctx.Err()
		}
		l.log.Debug("retrying", "station", addr, "try", try+1, "cause", last)
		// Moving twice is harmless, positions are absolute.
	}
	return nil, fmt.Errorf("station %d: %w", addr, last)
}

type status struct {
	Station  string
	Position float64 // per cent open
	UpMM     int     // water level above the gate
	DownMM   int
	Flags    byte
}

func parseStatus(name string, p []byte) (status, error) {
	if len(p) != 7 {
		return status{}, fmt.Errorf("%s: status of %d bytes", name, len(p))
	}
	return status{
		Station:  name,
		Position: float64(binary.LittleEndian.Uint16(p)) / 10,
		UpMM:     int(int16(binary.LittleEndian.Uint16(p[2:]))),
		DownMM:   int(int16(binary.LittleEndian.Uint16(p[4:]))),
		Flags:    p[6],
	}, nil
}

var stations = map[string]byte{
	"headweir": 1, "mill": 2, "chapel": 3, "withy-bed": 5, "tail": 8, // 4, 6, 7 were filled in
}

func main() {
	dev := flag.String("port", "/dev/ttyS1", "serial device, already set to 4800 8E1")
	verbose := flag.Bool("v", false, "log every retry")
	flag.Parse()

	level := slog.LevelInfo
	if *verbose {
		level = slog.LevelDebug
	}
	log := slog.New(slog.NewTextHandler(os.Stderr, &slog.HandlerOptions{Level: level}))

	port, err := os.OpenFile(*dev, os.O_RDWR, 0)
	if err != nil {
		log.Error("open", "err", err)
		os.Exit(1)
	}
	defer port.Close()
	ctx, stop := signal.NotifyContext(context.Background(), os.Interrupt)
	defer stop()
	l := newLine(port, log)

	names := make([]string, 0, len(stations))
	for n := range stations {
		names = append(names, n)
	}
	sort.Slice(names, func(i, j int) bool { return stations[names[i]] < stations[names[j]] })

	w := tabwriter.NewWriter(os.Stdout, 0, 0, 2, ' ', tabwriter.AlignRight)
	fmt.Fprintln(w, "station\topen %\tabove mm\tbelow mm\tflags\t")
	for _, n := range names {
		p, err := l.ask(ctx, stations[n], cmdStatus, nil)
		if err == nil {
			var s status
			if s, err = parseStatus(n, p); err == nil {
				fmt.Fprintf(w, "%s\t%.1f\t%d\t%d\t%s\t\n", s.Station, s.Position, s.UpMM, s.DownMM, flagText(s.Flags))
				continue
			}
		}
		fmt.Fprintf(w, "%s\t-\t-\t-\t%v\t\n", n, err)
	}
	w.Flush()
}

func flagText(f byte) string {
	var on []string
	for i, name := range []string{"local", "moving", "overload", "ice", "battery"} {
		if f>>i&1 != 0 {
			on = append(on, name)
		}
	}
	if len(on) == 0 {
		return "ok"
	}
	return strings.Join(on, ",")
}
