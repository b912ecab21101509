#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gguf>=0.17"]
# ///
"""Measures what a model lost when it was quantised: how far its predictions over a text are from its source's.

    python tests/calibrate.py source.gguf made.bin                     two files that the C program opens
    python tests/calibrate.py source.gguf made.bin -f TEXT -c 128

A folder is made a native file first: export_model.py FOLDER -o source.bin. The text is cut into chunks of -c tokens, of
which the second half is scored, as by tests/reference.py. The source is computed exactly; the other with the usual
arithmetic, then exactly. Printed are for each: the mean KL divergence in nats, both perplexities, and how often both
find the same token likeliest.

Exit status: 0 done, 2 something is missing or unusable.
"""
from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np

from reference import Scores, fail, perplexity


def call(run: Path, path: Path, *words: str) -> bytes:
    done = subprocess.run([run, path, *words], capture_output=True)
    if done.returncode != 0:
        fail((done.stderr.decode(errors="replace").strip().splitlines() or [f"{run} says nothing"])[-1])
    return done.stdout


def cut(run: Path, source: Path, text: Path, size: int) -> np.ndarray:
    """Whole chunks, each with the begin token first if the model adds one      out ids (chunks, T)"""
    ids, begin = (np.array(call(run, source, "-m", "tokenize", *words).split(), np.int64)
                  for words in (("-f", str(text)), ("-i", "")))  # of an empty text: what is added
    if len(ids) < size:
        fail(f"{text}: has {len(ids)} tokens, which is less than one chunk of {size}")
    chunks = ids[:len(ids) // size * size].reshape(-1, size)
    chunks[:, :len(begin)] = begin
    return chunks


def logits(run: Path, path: Path, ids: np.ndarray, *options: str) -> np.ndarray:
    """At the scored positions      ids (T)   out f32 (P, V)"""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits"
        call(run, path, "-m", "logits", "-c", str(len(ids)), "--ids", " ".join(map(str, ids)), "-o", str(out), *options)
        return np.fromfile(out, "<f4").reshape(len(ids), -1)[len(ids) // 2:-1]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="a file that the C program opens")
    parser.add_argument("made", type=Path, help="another, made of it")
    parser.add_argument("-f", "--file", type=Path, default=Path("/usr/share/common-licenses/GPL-3"), help="the text")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, help="tokens a chunk")
    parser.add_argument("--run", type=Path, default=Path(__file__).resolve().parent.parent / "run",
                        help="the C program")
    o = parser.parse_args()
    if o.ctx_size < 4:
        parser.error("-c is at least 4")
    if missing := [path for path in (o.run, o.source, o.made, o.file) if not path.is_file()]:
        fail(f"{missing[0]}: no such file")
    run, chunks = o.run.resolve(), cut(o.run.resolve(), o.source, o.file, o.ctx_size)
    ways = {o.file.name: (Scores(), []), f"{o.file.name} --exact": (Scores(), ["--exact"])}
    for n, ids in enumerate(chunks):
        wanted = logits(run, o.source, ids, "--exact")
        for scores, options in ways.values():
            scores.add(ids[len(ids) // 2 + 1:], wanted, logits(run, o.made, ids, *options))
        print(f"[{n + 1}/{len(chunks)}]", file=sys.stderr, flush=True)
    for name, (scores, _) in ways.items():
        kl, same = np.concatenate(scores.kl), np.concatenate(scores.same)
        print(f"{name:24} KL {kl.mean():.3e}  perplexity {perplexity(scores.nll)[0]:.4f} -> "
              f"{perplexity(scores.run_nll)[0]:.4f}, same top-1 {same.mean():.2%} of {len(same)}")


if __name__ == "__main__":
    main()
