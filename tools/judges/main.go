// Tlog-judge checks a transparency log with nothing of Daybook's: signatures with
// golang.org/x/mod/sumdb/note, proofs with golang.org/x/mod/sumdb/tlog, and tiles and entries with
// the fsck of github.com/transparency-dev/tessera.
//
//	tlog-judge -log DIR|URL -origin ORIGIN -key VKEY
//	tlog-judge -proof FILE -entry FILE -origin ORIGIN -key VKEY
//	tlog-judge -old FILE -new FILE -consistency FILE -origin ORIGIN -key VKEY
//
// The first form judges a whole log, the second a tlog-proof file with the bytes of its entry, the
// third that one checkpoint extends another (hashes in base64, one a line). It says what it found in
// one line, and exits with 0 only if all is well.
package main

import (
	"bytes"
	"context"
	"encoding/base64"
	"errors"
	"flag"
	"fmt"
	"net/http"
	"net/url"
	"os"
	"strconv"
	"strings"
	"time"

	"github.com/transparency-dev/merkle/rfc6962"
	"github.com/transparency-dev/tessera/api"
	"github.com/transparency-dev/tessera/client"
	"github.com/transparency-dev/tessera/fsck"
	"golang.org/x/mod/sumdb/note"
	"golang.org/x/mod/sumdb/tlog"
)

// With one worker tessera's fsck hangs on some tampered logs; the deadline is for the rest.
const (
	workers  = 8
	deadline = 2 * time.Minute
)

type judge struct {
	origin   string
	verifier note.Verifier
}

func main() {
	log := flag.String("log", "", "folder or URL of a log")
	origin := flag.String("origin", "", "origin of the log")
	key := flag.String("key", "", "verifier key of the log")
	proof := flag.String("proof", "", "tlog-proof file")
	entry := flag.String("entry", "", "file with the bytes of the entry")
	before := flag.String("old", "", "file with the older checkpoint")
	after := flag.String("new", "", "file with the newer checkpoint")
	consistency := flag.String("consistency", "", "file with the consistency proof")
	flag.Parse()

	verdict, err := run(*origin, *key, *log, *proof, *entry, *before, *after, *consistency)
	if err != nil {
		fmt.Println("not ok:", strings.ReplaceAll(err.Error(), "\n", " "))
		os.Exit(1)
	}
	fmt.Println("ok:", verdict)
}

func run(origin, key, log, proof, entry, before, after, consistency string) (string, error) {
	verifier, err := note.NewVerifier(key)
	if err != nil {
		return "", fmt.Errorf("key: %w", err)
	}
	j := judge{origin, verifier}
	switch {
	case log != "":
		ctx, cancel := context.WithTimeout(context.Background(), deadline)
		defer cancel()
		return j.log(ctx, log)
	case proof != "":
		return j.inclusion(proof, entry)
	case before != "":
		return j.consistency(before, after, consistency)
	}
	return "", errors.New("nothing to judge: give -log, -proof or -old")
}

func (j judge) log(ctx context.Context, at string) (string, error) {
	var fetcher fsck.Fetcher = client.FileFetcher{Root: at}
	if strings.HasPrefix(at, "http://") || strings.HasPrefix(at, "https://") {
		root, err := url.Parse(strings.TrimSuffix(at, "/") + "/")
		if err != nil {
			return "", err
		}
		if fetcher, err = client.NewHTTPFetcher(root, http.DefaultClient); err != nil {
			return "", err
		}
	}
	signed, err := fetcher.ReadCheckpoint(ctx)
	if err != nil {
		return "", fmt.Errorf("checkpoint: %w", err)
	}
	tree, err := j.checkpoint(signed)
	if err != nil {
		return "", err
	}
	if tree.N == 0 {
		if !bytes.Equal(tree.Hash[:], rfc6962.DefaultHasher.EmptyRoot()) {
			return "", errors.New("the root of the empty tree is wrong")
		}
		return "a log of 0 entries", nil
	}
	check := fsck.New(j.origin, j.verifier, fetcher, leafHashes, fsck.Opts{N: workers})
	checked := make(chan error, 1)
	go func() { checked <- check.Check(ctx) }()
	select {
	case err = <-checked:
	case <-ctx.Done():
		err = ctx.Err()
	}
	if err != nil {
		return "", fmt.Errorf("fsck: %w", err)
	}
	return fmt.Sprintf("a log of %d entries", tree.N), nil
}

func leafHashes(bundle []byte) ([][]byte, error) {
	var entries api.EntryBundle
	if err := entries.UnmarshalText(bundle); err != nil {
		return nil, err
	}
	hashes := make([][]byte, 0, len(entries.Entries))
	for _, entry := range entries.Entries {
		hashes = append(hashes, rfc6962.DefaultHasher.HashLeaf(entry))
	}
	return hashes, nil
}

// checkpoint verifies a signed checkpoint and returns the tree that it states.
func (j judge) checkpoint(signed []byte) (tlog.Tree, error) {
	opened, err := note.Open(signed, note.VerifierList(j.verifier))
	if err != nil {
		return tlog.Tree{}, fmt.Errorf("checkpoint: %w", err)
	}
	lines := strings.Split(opened.Text, "\n")
	if len(lines) < 4 || lines[0] != j.origin {
		return tlog.Tree{}, fmt.Errorf("the checkpoint is not of %q", j.origin)
	}
	size, err := strconv.ParseInt(lines[1], 10, 64)
	if err != nil {
		return tlog.Tree{}, fmt.Errorf("size: %w", err)
	}
	hash, err := tlog.ParseHash(lines[2])
	if err != nil {
		return tlog.Tree{}, fmt.Errorf("root: %w", err)
	}
	return tlog.Tree{N: size, Hash: hash}, nil
}

func (j judge) inclusion(proofFile, entryFile string) (string, error) {
	file, err := os.ReadFile(proofFile)
	if err != nil {
		return "", err
	}
	entry, err := os.ReadFile(entryFile)
	if err != nil {
		return "", err
	}
	head, signed, found := bytes.Cut(file, []byte("\n\n"))
	if !found {
		return "", errors.New("the proof has no checkpoint")
	}
	lines := strings.Split(string(head), "\n")
	if len(lines) < 2 || lines[0] != "c2sp.org/tlog-proof@v1" {
		return "", errors.New("it is no tlog-proof")
	}
	lines = lines[1:]
	if strings.HasPrefix(lines[0], "extra ") {
		lines = lines[1:]
	}
	if len(lines) == 0 {
		return "", errors.New("the proof has no index")
	}
	number, found := strings.CutPrefix(lines[0], "index ")
	if !found {
		return "", errors.New("the proof has no index")
	}
	index, err := strconv.ParseInt(number, 10, 64)
	if err != nil {
		return "", fmt.Errorf("index: %w", err)
	}
	path, err := hashes(lines[1:])
	if err != nil {
		return "", err
	}
	tree, err := j.checkpoint(signed)
	if err != nil {
		return "", err
	}
	if err := tlog.CheckRecord(path, tree.N, tree.Hash, index, tlog.RecordHash(entry)); err != nil {
		return "", err
	}
	return fmt.Sprintf("entry %d of %d", index, tree.N), nil
}

func (j judge) consistency(before, after, proofFile string) (string, error) {
	var trees [2]tlog.Tree
	for i, file := range []string{before, after} {
		signed, err := os.ReadFile(file)
		if err != nil {
			return "", err
		}
		if trees[i], err = j.checkpoint(signed); err != nil {
			return "", err
		}
	}
	text, err := os.ReadFile(proofFile)
	if err != nil {
		return "", err
	}
	path, err := hashes(strings.Fields(string(text)))
	if err != nil {
		return "", err
	}
	first, second := trees[0], trees[1]
	if err := tlog.CheckTree(path, second.N, second.Hash, first.N, first.Hash); err != nil {
		return "", err
	}
	return fmt.Sprintf("%d entries extend %d", second.N, first.N), nil
}

func hashes(lines []string) ([]tlog.Hash, error) {
	all := make([]tlog.Hash, 0, len(lines))
	for _, line := range lines {
		decoded, err := base64.StdEncoding.Strict().DecodeString(line)
		if err != nil || len(decoded) != tlog.HashSize {
			return nil, fmt.Errorf("%q is no hash", line)
		}
		all = append(all, tlog.Hash(decoded))
	}
	return all, nil
}
