// Tessera-bench is the yardstick of Daybook's notary: it appends entries to a new log of
// github.com/transparency-dev/tessera in an empty folder, with its POSIX driver, and prints as JSON how
// many were durable and how many published a second, and how long it was from each Add to the published
// checkpoint that covers its entry. `cargo xtask bench notarise` runs it.
//
//	tessera-bench -folder DIR [-seconds S] [-entries N] [-bytes N] [-in-flight N | -rate N]
//	              [-interval D] [-batch N] [-batch-age D]
//
// Flat out, so many writers each wait until their entry is durable before they add the next. With a rate,
// entries are added at fixed times, whatever became of those before: writers that wait would get no
// further than one entry each a batch, and the batch would wait for them.
package main

import (
	"bytes"
	"context"
	"crypto/rand"
	"encoding/hex"
	"encoding/json"
	"errors"
	"flag"
	"fmt"
	"os"
	"runtime/debug"
	"slices"
	"strconv"
	"sync"
	"time"

	"github.com/transparency-dev/tessera"
	"github.com/transparency-dev/tessera/storage/posix"
	"golang.org/x/mod/sumdb/note"
)

const (
	tesseraModule = "github.com/transparency-dev/tessera"
	// How often the published checkpoint is looked at, as on Daybook's side.
	poll = time.Millisecond
	// What was added is published so long after the last one was durable, or something is wrong.
	patience = time.Minute
)

type options struct {
	folder   string
	seconds  float64
	entries  int64
	bytes    int
	inFlight int
	rate     int
	interval time.Duration
	batch    uint
	batchAge time.Duration
}

type report struct {
	Tessera            string  `json:"tessera"`
	Syncs              string  `json:"syncs"`
	Bytes              int     `json:"bytes"`
	InFlight           int     `json:"in_flight"`
	Rate               int     `json:"rate"`
	CheckpointInterval float64 `json:"checkpoint_interval_ms"`
	BatchMaxSize       uint    `json:"batch_max_size"`
	BatchMaxAge        float64 `json:"batch_max_age_ms"`
	Entries            int     `json:"entries"`
	DurablePerSecond   float64 `json:"durable_per_second"`
	PublishedPerSecond float64 `json:"published_per_second"`
	P50                float64 `json:"p50_ms"`
	P99                float64 `json:"p99_ms"`
	Max                float64 `json:"max_ms"`
}

func main() {
	var o options
	flag.StringVar(&o.folder, "folder", "", "empty folder for the log")
	flag.Float64Var(&o.seconds, "seconds", 5, "how long entries are added")
	flag.Int64Var(&o.entries, "entries", 0, "no more entries than this; 0 for as many as the time allows")
	flag.IntVar(&o.bytes, "bytes", 1024, "bytes of an entry")
	flag.IntVar(&o.inFlight, "in-flight", 1024, "how many writers at once")
	flag.IntVar(&o.rate, "rate", 0, "entries a second; 0 for flat out")
	flag.DurationVar(&o.interval, "interval", time.Second, "checkpoint interval; the driver takes 100ms at least")
	flag.UintVar(&o.batch, "batch", tessera.DefaultBatchMaxSize, "most entries of a batch")
	flag.DurationVar(&o.batchAge, "batch-age", tessera.DefaultBatchMaxAge, "longest wait for a batch to fill")
	flag.Parse()

	found, err := o.measure(context.Background())
	if err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
	if err := json.NewEncoder(os.Stdout).Encode(found); err != nil {
		fmt.Fprintln(os.Stderr, "error:", err)
		os.Exit(1)
	}
}

func (o options) measure(ctx context.Context) (*report, error) {
	files, err := os.ReadDir(o.folder)
	switch {
	case err != nil:
		return nil, fmt.Errorf("-folder: %w", err)
	case len(files) > 0:
		return nil, fmt.Errorf("-folder: %s is not empty", o.folder)
	case o.rate < 0 || o.entries < 0 || o.rate == 0 && o.inFlight < 1:
		return nil, errors.New("-rate and -entries are not negative, and flat out needs a writer")
	}
	template, err := newTemplate(o.bytes)
	if err != nil {
		return nil, err
	}
	key, _, err := note.GenerateKey(rand.Reader, "bench.example.com/tessera")
	if err != nil {
		return nil, err
	}
	signer, err := note.NewSigner(key)
	if err != nil {
		return nil, err
	}
	ctx, cancel := context.WithCancelCause(ctx)
	defer cancel(nil)
	driver, err := posix.New(ctx, posix.Config{Path: o.folder})
	if err != nil {
		return nil, err
	}
	appender, _, reader, err := tessera.NewAppender(ctx, driver, tessera.NewAppendOptions().
		WithCheckpointSigner(signer).
		WithCheckpointInterval(o.interval).
		WithBatching(o.batch, o.batchAge))
	if err != nil {
		return nil, err
	}
	w := &watch{read: reader.ReadCheckpoint, reached: make(chan struct{})}
	go func() {
		if err := w.run(ctx); err != nil {
			cancel(err)
		}
	}()

	begun := time.Now()
	end := begun.Add(time.Duration(o.seconds * float64(time.Second)))
	add := func(number uint64) {
		added := time.Now()
		index, err := appender.Add(ctx, tessera.NewEntry(template.entry(number)))()
		if err != nil {
			cancel(fmt.Errorf("add: %w", err))
			return
		}
		w.durable(index.Index, added)
	}
	if o.rate > 0 {
		o.paced(ctx, end, add)
	} else {
		o.flatOut(ctx, end, add)
	}
	wrote := time.Since(begun)
	w.finish()
	select {
	case <-w.reached:
	case <-ctx.Done():
		return nil, context.Cause(ctx)
	case <-time.After(patience):
		return nil, fmt.Errorf("not all is published %v after the last entry was durable", patience)
	}
	published := time.Since(begun)

	slices.Sort(w.delays)
	entries := len(w.delays)
	return &report{
		Tessera: version(),
		Syncs: "before it acknowledges: files are written with O_SYNC, renamed, and their folders synced " +
			"(storage/posix/file_ops.go)",
		Bytes:              o.bytes,
		InFlight:           o.inFlight,
		Rate:               o.rate,
		CheckpointInterval: milliseconds(o.interval),
		BatchMaxSize:       o.batch,
		BatchMaxAge:        milliseconds(o.batchAge),
		Entries:            entries,
		DurablePerSecond:   float64(entries) / wrote.Seconds(),
		PublishedPerSecond: float64(entries) / published.Seconds(),
		P50:                w.delay(500),
		P99:                w.delay(990),
		Max:                w.delay(1000),
	}, nil
}

// flatOut lets writers add one entry after the other until the end, or until there are enough.
func (o options) flatOut(ctx context.Context, end time.Time, add func(uint64)) {
	var mu sync.Mutex
	var next uint64
	take := func() (uint64, bool) {
		mu.Lock()
		defer mu.Unlock()
		if o.isEnough(next) || ctx.Err() != nil || !time.Now().Before(end) {
			return 0, false
		}
		next++
		return next - 1, true
	}
	var writers sync.WaitGroup
	for range o.inFlight {
		writers.Go(func() {
			for number, more := take(); more; number, more = take() {
				add(number)
			}
		})
	}
	writers.Wait()
}

// paced adds entries at fixed times. What was missed is not made up for.
func (o options) paced(ctx context.Context, end time.Time, add func(uint64)) {
	apart := time.Second / time.Duration(o.rate)
	var writers sync.WaitGroup
	next := time.Now()
	for number := uint64(0); !o.isEnough(number) && ctx.Err() == nil; number++ {
		if now := time.Now(); now.After(next) {
			next = now
		}
		if !next.Before(end) {
			break
		}
		time.Sleep(time.Until(next))
		next = next.Add(apart)
		writers.Go(func() { add(number) })
	}
	writers.Wait()
}

func (o options) isEnough(entries uint64) bool {
	return o.entries > 0 && entries >= uint64(o.entries)
}

// watch knows which entries are published, and how long that took. It is lighter than tessera's
// PublicationAwaiter, which wakes everybody who waits each time it looks.
type watch struct {
	read    func(context.Context) ([]byte, error)
	reached chan struct{}

	mu       sync.Mutex
	size     uint64
	waiting  []addition
	delays   []time.Duration
	finished bool
}

// addition is an entry that is durable and not yet published.
type addition struct {
	index uint64
	added time.Time
}

func (w *watch) durable(index uint64, added time.Time) {
	w.mu.Lock()
	defer w.mu.Unlock()
	if index < w.size {
		w.delays = append(w.delays, time.Since(added))
		return
	}
	w.waiting = append(w.waiting, addition{index, added})
}

// finish says that no more entries come.
func (w *watch) finish() {
	w.mu.Lock()
	defer w.mu.Unlock()
	w.finished = true
}

// run looks at the published checkpoint until all is published, or the context ends.
func (w *watch) run(ctx context.Context) error {
	ticks := time.NewTicker(poll)
	defer ticks.Stop()
	for {
		select {
		case <-ctx.Done():
			return nil
		case <-ticks.C:
		}
		checkpoint, err := w.read(ctx)
		if errors.Is(err, os.ErrNotExist) {
			continue
		}
		if err != nil {
			return fmt.Errorf("checkpoint: %w", err)
		}
		size, err := treeSize(checkpoint)
		if err != nil {
			return err
		}
		if w.published(size) {
			close(w.reached)
			return nil
		}
	}
}

// published notes what a checkpoint of this size covers, and says whether that is all.
func (w *watch) published(size uint64) bool {
	w.mu.Lock()
	defer w.mu.Unlock()
	if size > w.size {
		w.size = size
		now := time.Now()
		w.waiting = slices.DeleteFunc(w.waiting, func(a addition) bool {
			covered := a.index < size
			if covered {
				w.delays = append(w.delays, now.Sub(a.added))
			}
			return covered
		})
	}
	return w.finished && len(w.waiting) == 0
}

// delay is the one that so many of a thousand do not exceed, in milliseconds.
func (w *watch) delay(perThousand int) float64 {
	if len(w.delays) == 0 {
		return 0
	}
	return milliseconds(w.delays[min(len(w.delays)*perThousand/1000, len(w.delays)-1)])
}

// treeSize reads the second line of a checkpoint, which this process has signed.
func treeSize(checkpoint []byte) (uint64, error) {
	lines := bytes.SplitN(checkpoint, []byte("\n"), 3)
	if len(lines) < 3 {
		return 0, fmt.Errorf("%q is no checkpoint", checkpoint)
	}
	return strconv.ParseUint(string(lines[1]), 10, 64)
}

// template makes entries of exactly the wanted size that differ in their ids, as the events are that
// Daybook's side appends: an envelope in JSON around random hexadecimal digits.
type template struct {
	bytes []byte
	idAt  int
}

func newTemplate(size int) (*template, error) {
	const head, id, tail = `{"specversion":"1.0","id":"`, "00000000-0000-7000-8000-000000000000",
		`","source":"/projects/bench","type":"dev.daybook.deployment.status_observed.v1",` +
			`"datacontenttype":"application/json","data":{"digest":"`
	const end = `"}}`
	filling := size - len(head) - len(id) - len(tail) - len(end)
	if filling < 0 {
		return nil, fmt.Errorf("an entry has at least %d bytes", size-filling)
	}
	digits := make([]byte, filling/2+1)
	if _, err := rand.Read(digits); err != nil {
		return nil, err
	}
	text := head + id + tail + hex.EncodeToString(digits)[:filling] + end
	return &template{[]byte(text), len(head) + len(id) - 12}, nil
}

func (t *template) entry(number uint64) []byte {
	entry := bytes.Clone(t.bytes)
	copy(entry[t.idAt:], fmt.Sprintf("%012x", number))
	return entry
}

func milliseconds(d time.Duration) float64 {
	return d.Seconds() * 1000
}

// version is that of tessera, as go.mod pins it.
func version() string {
	if build, ok := debug.ReadBuildInfo(); ok {
		for _, module := range build.Deps {
			if module.Path == tesseraModule {
				return module.Version
			}
		}
	}
	return "unknown"
}
