#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torch>=2.4", "transformers>=5.0", "gguf>=0.17", "accelerate", "tokenizers>=0.20"]
# ///
"""Compares the C program's logits on a real model with transformers' (float32, eager, dequantised GGUF weights).

    python tests/reference.py model.gguf ./run --max-kl 1e-7 --max-ppl-ratio 1.00001 --strict-top --exact
    python tests/reference.py model.gguf              the reference's perplexity alone

The text is cut into chunks of -c tokens as llama-perplexity does; an incomplete last chunk is dropped. Of 512 tokens,
the logits at 256..510 are scored: they predict tokens 257..511. The C program is called once a chunk:

    run CHECKPOINT -m logits --ids "1 2 3" -o FILE     writes float32, tokens x vocabulary, little-endian

Exit status: 0 all thresholds hold, 1 one does not, 2 something is missing or unusable.
Memory: about three times chunk x vocabulary x 4 bytes (100 MB for 512 x 49152). Disk, with --cache: half of
that a chunk.

Letters in the shapes: T tokens of a chunk, P scored positions, V vocabulary.
"""
from __future__ import annotations

import argparse
import hashlib
import math
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

import gguf
import numpy as np

CLEAR_GAP = 2e-4  # nearer than this, the two best logits may change places by rounding
BLOCK = 16        # positions whose float64 probabilities are held at once


def fail(message: str) -> None:
    print(f"reference.py: {message}", file=sys.stderr)
    sys.exit(2)


# ==== 1. The checkpoint and the text ====

@dataclass
class Checkpoint:
    path: Path
    add_bos: bool
    bos: int
    digest: str    # of the file: the cache's key


def open_checkpoint(path: Path) -> tuple[Checkpoint, gguf.GGUFReader]:
    """Reads the metadata; refuses what transformers' GGUF loader would get wrong without a word."""
    if not path.is_file():
        fail(f"{path}: no such file")
    reader = gguf.GGUFReader(path)

    def value(key: str, default):
        return reader.fields[key].contents() if key in reader.fields else default

    arch = value("general.architecture", "")
    scaling = value(f"{arch}.rope.scaling.type", "none")
    if scaling != "none" or any(tensor.name.startswith("rope_f") for tensor in reader.tensors):
        fail(f"{path}: has rope scaling, which transformers does not read from a GGUF file")
    with path.open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest() if sys.version_info >= (3, 11) else \
            hashlib.sha256(file.read()).hexdigest()
    return Checkpoint(path, value("tokenizer.ggml.add_bos_token", False), value("tokenizer.ggml.bos_token_id", 0),
                      digest), reader


def tokenize(checkpoint: Checkpoint, reader: gguf.GGUFReader, text: Path, run: Path | None, by_run: bool) -> np.ndarray:
    """The ids of the whole text, begin token first if the model adds one      out (tokens)"""
    if by_run:
        if run is None:
            fail("--tokenize-by-run needs the program")
        done = subprocess.run([run, checkpoint.path, "-m", "tokenize", "-f", text], capture_output=True)
        if done.returncode != 0:
            fail(f"{run} -m tokenize: exit status {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
        return np.array(done.stdout.split(), dtype=np.int64)
    ids = byte_level_bpe(reader).encode(text.read_bytes().decode()).ids
    return np.array([checkpoint.bos] * checkpoint.add_bos + ids, dtype=np.int64)


def byte_level_bpe(reader: gguf.GGUFReader):
    """The GGUF's tokenizer as an object of the library `tokenizers`. Not by transformers'
    AutoTokenizer(gguf_file=...): 5.24 ignores tokenizer.ggml.pre, which gives 7658 ids instead of 7639 for GPL-3, and
    perplexity 18.13 instead of 18.30."""
    from tokenizers import Tokenizer, models, pre_tokenizers
    words = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=True)  # GPT-2's pattern
    digits = pre_tokenizers.Digits(individual_digits=True)
    splits = {"gpt-2": words, "smollm": pre_tokenizers.Sequence([digits, words])}  # llama.cpp: llama-vocab.cpp

    model, pre = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("model", "pre"))
    if model != "gpt2" or pre not in splits:
        fail(f"tokenizer {model}, {pre}: known are gpt2 with {', '.join(splits)}; use --tokenize-by-run")
    tokens, merges = (reader.fields[f"tokenizer.ggml.{key}"].contents() for key in ("tokens", "merges"))
    vocab = {token: n for n, token in enumerate(tokens)}
    tokenizer = Tokenizer(models.BPE(vocab, [tuple(merge.split(" ")) for merge in merges]))
    tokenizer.pre_tokenizer = splits[pre]
    return tokenizer


def cut(checkpoint: Checkpoint, ids: np.ndarray, size: int, limit: int | None) -> np.ndarray:
    """As llama-perplexity -c size: whole chunks only; each begins with the begin token if the model adds one.
    ids (tokens)   out (chunks, T)"""
    chunks = ids[:len(ids) // size * size].reshape(-1, size)[:limit].copy()
    if len(chunks) == 0:
        fail(f"the text has {len(ids)} tokens, fewer than one chunk of {size}")
    if checkpoint.add_bos:
        chunks[:, 0] = checkpoint.bos
    return chunks


# ==== 2. Logits ====

class Reference:
    """transformers' logits, loaded when the first chunk is not in the cache."""

    def __init__(self, checkpoint: Checkpoint, reader: gguf.GGUFReader, cache: Path | None):
        self.checkpoint, self.reader, self.cache, self.net = checkpoint, reader, cache, None

    def load(self) -> None:
        import torch
        from transformers import AutoModelForCausalLM
        path = self.checkpoint.path
        self.net = AutoModelForCausalLM.from_pretrained(path.parent, gguf_file=path.name, dtype=torch.float32,
                                                        attn_implementation="eager").eval()
        other = {str(p.dtype) for p in self.net.parameters()} - {"torch.float32"}
        if other:
            fail(f"transformers kept weights as {', '.join(other)}, wanted float32")
        state = self.net.state_dict()  # one weight against gguf-py, lest transformers dequantise in another way
        tensor = next(t for t in self.reader.tensors if t.name == "blk.0.ffn_down.weight")
        wanted = gguf.dequantize(tensor.data, tensor.tensor_type)
        if not np.array_equal(state["model.layers.0.mlp.down_proj.weight"].numpy(), wanted):
            fail("transformers' model.layers.0.mlp.down_proj.weight is not gguf-py's blk.0.ffn_down.weight")

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """The scored positions only      ids (T)   out (P, V) float32"""
        import torch
        key = hashlib.sha256(self.checkpoint.digest.encode() + ids.astype("<i8").tobytes()).hexdigest()[:24]
        kept = self.cache / f"{key}.npy" if self.cache else None
        if kept and kept.is_file():
            return np.load(kept, mmap_mode="r")
        if self.net is None:
            self.load()
        with torch.no_grad():
            hidden = self.net.model(torch.from_numpy(ids)[None], use_cache=False).last_hidden_state[0]
            out = self.net.lm_head(hidden[len(ids) // 2:-1]).numpy()
        if kept:
            self.cache.mkdir(parents=True, exist_ok=True)
            part = kept.with_suffix(".part")
            with part.open("wb") as file:
                np.save(file, out)
            part.rename(kept)  # so that an interrupted run leaves no half file
        return out


def run_logits(command: list, ids: np.ndarray, vocab: int, folder: Path) -> np.ndarray:
    """The C program's logits at the scored positions      ids (T)   out (P, V) float32, mapped"""
    out = folder / "logits"
    done = subprocess.run([*command, "--ids", " ".join(map(str, ids)), "-o", out], capture_output=True)
    if done.returncode != 0:
        fail(f"{command[0]}: exit status {done.returncode}: {done.stderr.decode(errors='replace').strip()}")
    size, wanted = out.stat().st_size if out.is_file() else 0, len(ids) * vocab * 4
    if size != wanted:
        fail(f"{command[0]}: wrote {size} bytes of logits, wanted {wanted} ({len(ids)} tokens x {vocab})")
    return np.memmap(out, "<f4", "r", shape=(len(ids), vocab))[len(ids) // 2:-1]


# ==== 3. Scores ====

class Scores:
    """Sums over all scored positions; each is one float64 a position."""

    def __init__(self) -> None:
        self.nll: list[np.ndarray] = []      # -log p(next token), reference
        self.run_nll: list[np.ndarray] = []  # the same, C program
        self.kl: list[np.ndarray] = []       # sum p log(p / q), p the reference
        self.same: list[np.ndarray] = []     # equal argmax
        self.clear: list[np.ndarray] = []    # other argmax though the reference's gap is above CLEAR_GAP
        self.worst = 0.0                     # largest difference of two logits

    def add(self, targets: np.ndarray, ours: np.ndarray, theirs: np.ndarray | None) -> None:
        """targets (P)   ours: the reference's logits (P, V)   theirs: the C program's (P, V) or None"""
        for at in range(0, len(targets), BLOCK):
            rows = slice(at, at + BLOCK)
            log_p, index = log_softmax(ours[rows]), np.arange(len(targets[rows]))
            self.nll.append(-log_p[index, targets[rows]])
            if theirs is None:
                continue
            log_q = log_softmax(theirs[rows])
            self.run_nll.append(-log_q[index, targets[rows]])
            self.kl.append((np.exp(log_p) * (log_p - log_q)).sum(axis=1))
            same = log_p.argmax(axis=1) == log_q.argmax(axis=1)
            best = np.partition(log_p, -2, axis=1)[:, -2:]
            self.same.append(same)
            self.clear.append(~same & (best[:, 1] - best[:, 0] > CLEAR_GAP))
            self.worst = max(self.worst, float(np.abs(ours[rows] - theirs[rows]).max()))  # a NaN shows in kl


def log_softmax(x: np.ndarray) -> np.ndarray:
    """x - log sum exp x, in float64      x (P, V)"""
    x = x.astype(np.float64)
    x -= x.max(axis=1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=1, keepdims=True))


def perplexity(nll: list[np.ndarray]) -> tuple[float, float]:
    """exp of the mean, and its standard error as llama-perplexity gives it."""
    values = np.concatenate(nll)
    mean = math.exp(values.mean())
    return mean, mean * values.std() / math.sqrt(max(len(values) - 1, 1))


def report(scores: Scores, args: argparse.Namespace) -> bool:
    """Prints the figures. True if every threshold holds."""
    ppl, error = perplexity(scores.nll)
    print(f"reference perplexity   {ppl:.4f} +/- {error:.4f}   ({sum(map(len, scores.nll))} positions)")
    if not scores.kl:
        return True
    kl, same, clear = (np.concatenate(values) for values in (scores.kl, scores.same, scores.clear))
    run_ppl, run_error = perplexity(scores.run_nll)
    print(f"run perplexity         {run_ppl:.4f} +/- {run_error:.4f}   ratio {run_ppl / ppl:.7f}")
    print(f"mean KL                {kl.mean():.3e}")
    print(f"max KL                 {kl.max():.3e}")
    print(f"largest difference     {scores.worst:.3e}")
    print(f"equal argmax           {100 * same.mean():.3f} %")
    print(f"clear argmax differs   {clear.sum()}   (reference's gap above {CLEAR_GAP})")
    bad = []  # each test is written so that a NaN fails it
    if not np.isfinite(kl).all():
        bad.append(f"{(~np.isfinite(kl)).sum()} positions are not finite")
    if args.max_kl is not None and not kl.mean() <= args.max_kl:
        bad.append(f"mean KL {kl.mean():.3e}, wanted at most {args.max_kl:g}")
    if args.max_ppl_ratio is not None and not abs(math.log(run_ppl / ppl)) <= math.log(args.max_ppl_ratio):
        bad.append(f"perplexity ratio {run_ppl / ppl:.7f}, wanted within a factor of {args.max_ppl_ratio:g}")
    if args.strict_top and clear.any():
        bad.append(f"{clear.sum()} positions with another argmax, wanted none")
    for line in bad:
        print(f"FAILED: {line}")
    return not bad


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("checkpoint", type=Path, help="GGUF file")
    parser.add_argument("run", type=Path, nargs="?", help="the C program; without it only the reference is computed")
    parser.add_argument("-f", "--file", type=Path, default=Path("/usr/share/common-licenses/GPL-3"), help="the text")
    parser.add_argument("-c", "--ctx-size", type=int, default=512, help="tokens a chunk")
    parser.add_argument("--chunks", type=int, help="no more than so many")
    parser.add_argument("--cache", type=Path, help="folder for the reference's logits (float32, 50 MB a chunk)")
    parser.add_argument("--exact", action="store_true", help="passed on to the program")
    parser.add_argument("--option", action="append", default=[], help="one more argument for the program: --option=-j1")
    parser.add_argument("--tokenize-by-run", action="store_true", help="take the ids from run -m tokenize")
    parser.add_argument("--max-kl", type=float, help="limit of the mean KL(reference || run)")
    parser.add_argument("--max-ppl-ratio", type=float, help="the perplexities' ratio is within 1/R and R")
    parser.add_argument("--strict-top", action="store_true",
                        help=f"no other argmax where the reference's two best logits differ by more than {CLEAR_GAP}")
    args = parser.parse_args()
    if args.run is None and (args.max_kl is not None or args.max_ppl_ratio is not None or args.strict_top):
        parser.error("thresholds need the program")
    if args.ctx_size < 4 or (args.chunks is not None and args.chunks < 1):
        parser.error("-c is at least 4, --chunks at least 1")
    if args.max_ppl_ratio is not None and not args.max_ppl_ratio >= 1:
        parser.error("--max-ppl-ratio is at least 1")
    if not args.file.is_file():
        fail(f"{args.file}: no such file")

    start = time.monotonic()
    checkpoint, reader = open_checkpoint(args.checkpoint)
    run = args.run.resolve() if args.run else None
    ids = tokenize(checkpoint, reader, args.file, run, args.tokenize_by_run)
    chunks = cut(checkpoint, ids, args.ctx_size, args.chunks)
    print(f"{args.file}: {len(ids)} tokens, {len(chunks)} chunks of {args.ctx_size}")
    reference, scores = Reference(checkpoint, reader, args.cache), Scores()
    command = [run, checkpoint.path, "-m", "logits", *["--exact"] * args.exact, *args.option]
    with tempfile.TemporaryDirectory() as folder:
        for n, chunk in enumerate(chunks):
            ours = reference.logits(chunk)
            theirs = run_logits(command, chunk, ours.shape[1], Path(folder)) if run else None
            scores.add(chunk[len(chunk) // 2 + 1:], ours, theirs)
            print(f"[{n + 1}/{len(chunks)}] {perplexity(scores.nll)[0]:.4f}", file=sys.stderr, flush=True)
    good = report(scores, args)
    print(f"{time.monotonic() - start:.0f} s")
    sys.exit(0 if good else 1)


if __name__ == "__main__":
    main()
