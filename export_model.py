#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26"]
# ///
"""Turns checkpoints of other programs into cria's, and back.

    python export_model.py SmolLM2-135M-Instruct -o smollm2.bin              a Hugging Face folder
    python export_model.py Qwen2.5-1.5B-Instruct -o qwen.bin --type mixed    the same, quantised
    python export_model.py Llama-2-7b -o llama.gguf --to gguf --type q8      Meta's folder, for llama.cpp too
    python export_model.py model.gguf --lora my-adapter -o tuned.bin         with a LoRA adapter merged in
    python export_model.py stories15M.pt --tokenizer tokenizer.bin -o s.bin  a checkpoint of llama2.c's training
    python export_model.py tuned.bin -o folder --to hf                       back to transformers

Read are: a Hugging Face folder (config.json and safetensors or pytorch_model*.bin), Meta's (params.json and
consolidated.NN.pth), a llama2.c .pt, a GGUF file, cria's own file. Written are: cria's own file, GGUF, llama2.c's .bin,
a Hugging Face folder.

In between a model always has the same form: GGUF's keys and tensors, as llama.cpp names and orders them. A reader makes
it, a writer takes it; a tensor is read only when its turn to be written comes. Only numpy is needed, and torch where
the source is a pickle (.pth, .pt, .bin), which is opened in torch's mode for weights alone.

    1 Numbers and blocks     2 Tensors          3 GGUF               4 cria's own file      5 Families
    6 Tokenizers             7 Sources          8 LoRA               9 Numpy forward pass  10 Writers
   11 Verification          12 The command line

Letters in the shapes: V vocabulary, D dim, H heads, G kv heads, K head_dim, R rotated part of K, F ffn, E experts,
L layers, T tokens. Shapes are outermost first.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import io
import json
import math
import os
import random
import re
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

try:
    import numpy as np
except ImportError:
    sys.exit("export_model.py: needs numpy: python3 -m pip install numpy")


class Refusal(Exception):
    """What cannot be exported, in one line for the user. Exit status 1."""


def printable(message: str) -> str:
    """As one line that a terminal only shows, whatever names a file has."""
    return "".join(c if c.isprintable() else "?" for c in message)


# ==== 1. Numbers and blocks ====
# A matrix is stored in one of these types. The first three are arrays of numbers (bf16, which numpy has not, as the
# upper halves of f32 in uint16). The others are ggml's blocks, kept as bytes: uint8 (rows, bytes of a row).

@dataclass(frozen=True)
class Type:
    name: str            # in the option --type, and in messages
    ggml: int            # its number in GGUF files
    cols: int            # weights of a block
    n_bytes: int         # bytes of a block
    file_type: int = -1  # general.file_type of a GGUF file that is mostly of this type; -1: not written by this program


TYPES = {t.name: t for t in (
    Type("f32", 0, 1, 4, 0), Type("f16", 1, 1, 2, 1), Type("bf16", 30, 1, 2, 32),
    Type("q8", 8, 32, 34, 7), Type("q4", 2, 32, 18, 2), Type("q4m", 3, 32, 20, 3),
    Type("q5", 6, 32, 22), Type("q5m", 7, 32, 24), Type("q2k", 10, 256, 84), Type("q3k", 11, 256, 110),
    Type("q4k", 12, 256, 144), Type("q5k", 13, 256, 176), Type("q6k", 14, 256, 210), Type("iq4nl", 20, 32, 18),
    Type("iq4xs", 23, 256, 136), Type("mxfp4", 39, 32, 17))}
FLOATS = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
SLAB = 1 << 16  # weights that are converted at once: they stay in the processor's cache


def row_bytes(type_name: str, cols: int) -> int:
    return cols // TYPES[type_name].cols * TYPES[type_name].n_bytes


def bfloat_of_float(x: np.ndarray) -> np.ndarray:
    """The upper half of each f32, rounded to nearest, ties to even; NaN stays NaN      x f32   out uint16"""
    bits = np.ascontiguousarray(x, np.float32).view(np.uint32)
    rounded = (bits + (np.uint32(0x7fff) + (bits >> 16 & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), (bits >> 16 | 0x40).astype(np.uint16), rounded)


def float_of_bfloat(x: np.ndarray) -> np.ndarray:
    return (np.asarray(x).astype(np.uint32) << 16).view(np.float32)


def half(x: np.ndarray) -> np.ndarray:
    """x rounded to f16, as f32: what a scale becomes in a file."""
    return x.astype(np.float16).astype(np.float32)


def quotient(x: np.ndarray, y: np.ndarray) -> np.ndarray:
    """x / y, and 0 where y is 0."""
    return np.divide(x, y, out=np.zeros(np.broadcast_shapes(x.shape, y.shape), np.float32), where=y != 0)


@dataclass(frozen=True)
class Grid:
    """The whole numbers that a block can hold, and where to look for its scale and minimum: x ~ q * scale + minimum."""
    low: int
    high: int
    has_minimum: bool
    starts: tuple  # has_minimum: which parts of the range are cut off below and above; else by what the scale shrinks

    def store(self, x: np.ndarray, scale: np.ndarray, minimum: np.ndarray) -> np.ndarray:
        """q      x (blocks, 32)   scale, minimum (blocks, 1)"""
        q = x - minimum if self.has_minimum else x.copy()
        q *= quotient(np.ones_like(scale), scale)
        return np.clip(np.rint(q, out=q), self.low, self.high, out=q)

    def guesses(self, x: np.ndarray) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Scales and minima to start from. The first is ggml's: the whole range fits."""
        if self.has_minimum:
            least, most = x.min(1, keepdims=True), x.max(1, keepdims=True)
            for below, above in self.starts:
                yield half((most - least) * ((1 - below - above) / self.high)), half(least + below * (most - least))
            return
        peak = np.take_along_axis(x, np.abs(x).argmax(1)[:, None], 1)  # becomes `low` or, less the factor, is cut off
        for factor in self.starts:
            yield half(peak / (self.low * factor)), np.zeros_like(peak)

    def fit(self, x: np.ndarray, q: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The scale and minimum with the least squared error for these q: linear regression."""
        product, square = (np.einsum("bi,bi->b", q, y)[:, None] for y in (x, q))
        if not self.has_minimum:
            return half(quotient(product, square)), np.zeros_like(product)
        mean_q, mean_x = q.mean(1, keepdims=True), x.mean(1, keepdims=True)
        scale = half(quotient(product - 32 * mean_q * mean_x, square - 32 * mean_q * mean_q))
        return scale, half(mean_x - scale * mean_q)

    def search(self, x: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Of all guesses, and of what fits their q best, for each block the one with the least squared error.
        x (blocks, 32)   out q (blocks, 32), scale (blocks, 1), minimum (blocks, 1)"""
        best = None
        for guess in self.guesses(x):
            for scale, minimum in (guess, self.fit(x, self.store(x, *guess))):
                off = self.store(x, scale, minimum)
                off *= scale
                off += minimum - x if self.has_minimum else -x
                error = np.einsum("bi,bi->b", off, off)[:, None]
                if best is None:
                    best = error, scale, minimum
                    continue
                better = error < best[0]
                best = tuple(np.where(better, new, old) for new, old in zip((error, scale, minimum), best))
        return self.store(x, *best[1:]), *best[1:]


GRIDS = {"q8": Grid(-127, 127, False, (1, 0.996, 1.004)), "q4": Grid(-8, 7, False, (1, 0.93, 1.07)),
         "q4m": Grid(0, 15, True, ((0, 0), (0.05, 0.05), (0, 0.06), (0.06, 0)))}


def halves(x: np.ndarray) -> np.ndarray:
    return x.astype("<f2").view(np.uint8)


def quantise(x: np.ndarray, type_name: str) -> np.ndarray:
    """Blocks of 32 as ggml stores them      x f32 (blocks, 32)   out uint8 (blocks, bytes of a block)"""
    q, scale, minimum = GRIDS[type_name].search(x)
    if type_name == "q8":
        return np.hstack([halves(scale), q.astype(np.int8).view(np.uint8)])
    if type_name == "q4":
        q, minimum = q + 8, minimum[:, :0]
    return np.hstack([halves(scale), halves(minimum), join(q.astype(np.uint8).reshape(-1, 2, 16), -2, 4)])


def encode(x: np.ndarray, type_name: str) -> np.ndarray:
    """Rows of numbers as a file stores them.
    x f32 (rows, cols)   out (rows, cols) of f32, f16 or uint16, or uint8 (rows, bytes of a row)"""
    if type_name == "f32":
        return x
    if type_name == "bf16":
        return bfloat_of_float(x)
    if type_name == "f16":
        with np.errstate(over="ignore"):
            narrow = x.astype(np.float16)
        if not np.array_equal(np.isfinite(narrow), np.isfinite(x)):
            raise Refusal("has numbers beyond the range of f16; use --type bf16 or f32")
        return narrow
    if not np.isfinite(x).all():
        raise Refusal("has numbers that are not finite and cannot be quantised")
    return quantise(x.reshape(-1, 32), type_name).reshape(len(x), -1)


# What the weights of iq4nl and iq4xs stand for, places on a curve, and those of mxfp4, twice a float of 4 bits.
CURVE = np.array([-127, -104, -83, -65, -49, -35, -22, -10, 1, 13, 25, 38, 53, 69, 89, 113], np.float32)
SMALL_FLOATS = np.array([0, 1, 2, 3, 4, 6, 8, 12, 0, -1, -2, -3, -4, -6, -8, -12], np.float32)


def join(x: np.ndarray, axis: int, bits: int) -> np.ndarray:
    """Small numbers along an axis in one byte, the first in its lowest bits."""
    shifts = np.arange(0, bits * x.shape[axis], bits, np.uint8)
    return np.bitwise_or.reduce(x << shifts.reshape(-1, *[1] * (-1 - axis)), axis)


def split(x: np.ndarray, n: int, bits: int) -> np.ndarray:
    """The inverse, for n bytes each time      uint8 (blocks, m * n) -> (blocks, m * 8 / bits * n)"""
    shifts = np.arange(0, 8, bits, np.uint8)[:, None]
    return (x.reshape(len(x), -1, 1, n) >> shifts & (1 << bits) - 1).reshape(len(x), -1)


def block_weights(b: np.ndarray, type_name: str) -> np.ndarray:
    """The weights of blocks, without scale and minimum      out f32 (blocks, cols of a block)"""
    if type_name == "q8":
        return b[:, 2:].view(np.int8).astype(np.float32)
    if type_name in ("q2k", "q3k"):
        q = split(b[:, 16:80] if type_name == "q2k" else b[:, 32:96], 32, 2)
        return q.astype(np.float32) if type_name == "q2k" else (q | split(b[:, :32], 32, 1) << 2).astype(np.float32) - 4
    if type_name == "q6k":
        return (split(b[:, :128], 64, 4) | split(b[:, 128:192], 32, 2) << 4).astype(np.float32) - 32
    q = split(b[:, -128:] if b.shape[1] > 128 else b[:, -16:], 32 if type_name in ("q4k", "q5k") else 16, 4)
    if type_name in ("q5", "q5m", "q5k"):
        high = {"q5": b[:, 2:6], "q5m": b[:, 4:8]}.get(type_name)
        q |= (split(b[:, 16:48], 32, 1) if high is None else np.unpackbits(high, 1, bitorder="little")) << 4
    table = {"iq4nl": CURVE, "iq4xs": CURVE, "mxfp4": SMALL_FLOATS}.get(type_name)
    return q.astype(np.float32) - {"q4": 8, "q5": 16}.get(type_name, 0) if table is None else table[q]


def block_scales(b: np.ndarray, type_name: str) -> tuple[np.ndarray, np.ndarray | None]:
    """The scales of blocks or of their parts, and what is added, if anything      out f32 (blocks, parts)"""
    if type_name == "mxfp4":  # 2^(e - 128)
        return np.ldexp(np.float32(1), b[:, :1].astype(int) - 128), None
    at = {"q2k": 80, "q3k": 108, "q6k": 208}.get(type_name, 0)
    d, dmin = (b[:, i:i + 2].view("<f2").astype(np.float32) if i < b.shape[1] else None for i in (at, at + 2))
    if type_name == "q2k":
        return d * (b[:, :16] & 15), -(dmin * (b[:, :16] >> 4))
    if type_name == "q3k":
        s = split(b[:, 96:104], 8, 4) | split(b[:, 104:108], 4, 2) << 4
        return d * (s.astype(np.float32) - 32), None
    if type_name in ("q4k", "q5k"):
        low, both = b[:, 4:12], split(b[:, 12:16], 4, 4)
        s = np.hstack([low & 63, both | low >> 6 << 4])  # four scales, four minima, and so on
        return d * s[:, [0, 1, 2, 3, 8, 9, 10, 11]], -(dmin * s[:, [4, 5, 6, 7, 12, 13, 14, 15]])
    if type_name == "q6k":
        return d * b[:, 192:208].view(np.int8), None
    if type_name == "iq4xs":
        s = split(b[:, 4:8], 1, 4) | split(b[:, 2:4], 1, 2) << 4
        return d * (s.astype(np.float32) - 32), None
    return d, dmin if type_name in ("q4m", "q5m") else None


def dequantise(b: np.ndarray, type_name: str) -> np.ndarray:
    """b uint8 (blocks, bytes of a block)   out f32 (blocks, cols of a block)"""
    q, (scale, minimum) = block_weights(b, type_name), block_scales(b, type_name)
    x = q.reshape(*scale.shape, -1) * scale[..., None]
    return (x if minimum is None else x + minimum[..., None]).reshape(len(b), -1)


def decode(stored: np.ndarray, type_name: str) -> np.ndarray:
    """The inverse of encode()."""
    if type_name == "bf16":
        return float_of_bfloat(stored)
    if type_name in FLOATS:
        return np.asarray(stored, np.float32)
    blocks = np.ascontiguousarray(stored).reshape(-1, TYPES[type_name].n_bytes)
    return dequantise(blocks, type_name).reshape(*stored.shape[:-1], -1)


def check_finite(stored: np.ndarray, type_name: str, first: int) -> None:
    """Refuses numbers and scales that are not finite, and names the row      stored: rows from number `first` on"""
    with np.errstate(over="ignore", invalid="ignore"):
        if type_name in FLOATS:
            parts = [decode(stored, type_name)]
        else:
            blocks = np.ascontiguousarray(stored).reshape(-1, TYPES[type_name].n_bytes)
            parts = [x.reshape(len(stored), -1) for x in block_scales(blocks, type_name) if x is not None]
        if type_name == "mxfp4":
            parts[0] = parts[0] * np.float32(12)  # the greatest weight
    bad = ~np.logical_and.reduce([np.isfinite(x).all(1) for x in parts])
    if bad.any():
        raise Refusal(f"has a weight or scale in row {first + int(bad.argmax())} that is not finite")


# ==== 2. Tensors ====

@dataclass(frozen=True)
class Tensor:
    """One tensor of a source, not read yet."""
    shape: tuple[int, ...]
    type: str                               # of TYPES
    read: Callable[[], np.ndarray]          # as stored: (shape) of numbers, or uint8 (shape[:-1], bytes of a row)
    original: Tensor | None = None          # as the source had it, where the rows of query and key had to be reordered

    def floats(self) -> np.ndarray:
        """f32 (shape), the caller's own"""
        return np.require(decode(self.read(), self.type).reshape(self.shape), requirements="W")

    def then(self, change: Callable[[np.ndarray], np.ndarray], shape: tuple[int, ...] | None = None) -> Tensor:
        """The same, with whole rows moved: no number changes."""
        return replace(self, read=lambda: change(self.read()), shape=shape or self.shape, original=None)

    def computed(self, change: Callable[[np.ndarray], np.ndarray], type_name: str = "f32") -> Tensor:
        """With other numbers, in f32 unless said otherwise."""
        return Tensor(self.shape, type_name, lambda: encode(change(self.floats()), type_name))


def constant(x: Any) -> Tensor:
    x = np.asarray(x, np.float32)
    return Tensor(x.shape, "f32", lambda: x)


def stack(parts: list[Tensor]) -> Tensor:
    """Tensors of one shape and type as one with an axis more, outermost."""
    return Tensor((len(parts), *parts[0].shape), parts[0].type, lambda: np.stack([p.read() for p in parts]))


def concatenate(parts: list[Tensor], axis: int) -> Tensor:
    """Tensors of one type as one, that much longer."""
    shape = list(parts[0].shape)
    shape[axis] = sum(p.shape[axis] for p in parts)
    return replace(parts[0], shape=tuple(shape), read=lambda: np.concatenate([p.read() for p in parts], axis))


def pair_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Rows 0, K/2, 1, K/2+1, ... of each head: what is rotated together becomes neighbours      w (heads*K, ...)"""
    return np.ascontiguousarray(w.reshape(heads, 2, len(w) // heads // 2, *w.shape[1:]).swapaxes(1, 2)).reshape(w.shape)


def unpair_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """The inverse of pair_rows()."""
    return np.ascontiguousarray(w.reshape(heads, len(w) // heads // 2, 2, *w.shape[1:]).swapaxes(1, 2)).reshape(w.shape)


SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """| u64 n | n bytes of JSON: name -> dtype, shape, begin and end of its data | data |"""
    size = path.stat().st_size
    with path.open("rb") as file:
        n = int.from_bytes(file.read(8), "little")
        if n > size - 8:
            raise Refusal(f"{path}: not a safetensors file, or cut short")
        header = parse_json(file.read(n), path)
    header.pop("__metadata__", None)
    tensors = {}
    for name, entry in header.items():
        try:
            dtype, shape, (begin, end) = entry["dtype"], tuple(entry["shape"]), entry["data_offsets"]
        except (TypeError, KeyError, ValueError):
            raise Refusal(f"{path}: the entry of {name} is not one of safetensors") from None
        if dtype not in SAFETENSORS_TYPES:
            raise Refusal(f"{path}: {name} has dtype {dtype}, expected F32, F16 or BF16")
        number = FLOATS[SAFETENSORS_TYPES[dtype]]
        if not 0 <= begin <= end <= size - 8 - n or end - begin != math.prod(shape) * number.itemsize:
            raise Refusal(f"{path}: {name} does not lie within the file: not copied whole?")
        tensors[name] = mapped(path, 8 + n + begin, number, shape, SAFETENSORS_TYPES[dtype])
    return tensors


def mapped(path: Path, offset: int, number: np.dtype, stored: tuple[int, ...], type_name: str,
           shape: tuple[int, ...] | None = None) -> Tensor:
    """Numbers of a file, read when they are wanted      stored: as the file has them"""
    def read() -> np.ndarray:
        return np.fromfile(path, number, math.prod(stored), offset=offset).reshape(stored)
    return Tensor(shape or stored, type_name, read)


def open_pickle(path: Path) -> dict[str, Any]:
    """A file of torch.save(), by torch's reader that makes nothing but tensors and plain containers."""
    try:
        import torch
    except ImportError:
        raise Refusal(f"{path}: reading this needs torch: pip install torch") from None
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds
        reason = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise Refusal(f"{path}: torch cannot open it: {reason}") from None


def of_torch(name: str, t: Any) -> Tensor:
    types = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
    if str(getattr(t, "dtype", "")) not in types or str(t.layout) != "torch.strided":
        found = getattr(t, "dtype", type(t).__name__)
        raise Refusal(f"{name} has dtype {found}, expected float32, float16 or bfloat16")
    type_name = types[str(t.dtype)]

    def read() -> np.ndarray:
        import torch
        whole = t.detach().contiguous()
        return whole.view(torch.int16).numpy().view(np.uint16) if type_name == "bf16" else whole.numpy()
    return Tensor(tuple(t.shape), type_name, read)


def parse_json(text: bytes | str, path: Path) -> dict:
    try:
        value = json.loads(text)
    except ValueError as error:
        raise Refusal(f"{path}: not JSON: {error}") from None
    if not isinstance(value, dict):
        raise Refusal(f"{path}: a JSON {type(value).__name__}, expected an object")
    return value


def read_json(path: Path) -> dict:
    """A JSON object, or an empty one if there is no such file."""
    return parse_json(path.read_bytes(), path) if path.is_file() else {}


# ==== 3. GGUF ====
# | "GGUF" | u32 version | u64 n_tensors | u64 n_keys | keys | tensor entries | zeros | data, each aligned |

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
NUMBERS = {U8: "<u1", I8: "<i1", U16: "<u2", I16: "<i2", U32: "<u4", I32: "<i4", F32: "<f4", BOOL: "<u1", U64: "<u8",
           I64: "<i8", F64: "<f8"}


@dataclass(frozen=True)
class Value:
    """Of a key. An array has an item kind, and its data are a list of str, or a numpy array."""
    kind: int
    data: Any
    item: int = -1


def u32(x: int) -> Value:
    return Value(U32, int(x))


def f32(x: float) -> Value:
    return Value(F32, float(np.float32(x)))


def boolean(x: Any) -> Value:
    return Value(BOOL, bool(x))


def text(x: str) -> Value:
    return Value(STRING, x)


def array(item: int, values: list) -> Value:
    return Value(ARRAY, values if item == STRING else np.asarray(values, NUMBERS[item]), item)


@dataclass
class Model:
    """A model between reader and writer: GGUF's keys and tensors."""
    source: Path
    keys: dict[str, Value]
    tensors: dict[str, Tensor]
    hf_config: dict = field(default_factory=dict)  # the source's config.json, if it has one
    vocabulary: Path | None = None                 # where its tokenizer is: a folder, or a file of its own

    @property
    def arch(self) -> str:
        return self.get("general.architecture", "")

    def get(self, key: str, default: Any = None) -> Any:
        return self.keys[key].data if key in self.keys else default

    def value(self, key: str, default: Any = None) -> Any:
        """Of a key of the architecture."""
        return self.get(f"{self.arch}.{key}", default)

    def n_parameters(self) -> int:
        return sum(math.prod(t.shape) for t in self.tensors.values())


class Bytes:
    """A cursor over a file that is mapped into memory; what does not fit is refused."""

    def __init__(self, path: Path):
        self.path, self.at = path, 0
        self.data = np.memmap(path, np.uint8, "r") if path.stat().st_size else np.zeros(0, np.uint8)

    def take(self, n: int) -> bytes:
        if n > len(self.data) - self.at:
            raise Refusal(f"{self.path}: the file ends too early: not copied whole?")
        self.at += n
        return self.data[self.at - n:self.at].tobytes()

    def number(self, kind: int) -> Any:
        return np.frombuffer(self.take(np.dtype(NUMBERS[kind]).itemsize), NUMBERS[kind])[0].item()

    def string(self) -> str:
        return self.take(self.number(U64)).decode("utf-8", "surrogateescape")


def read_value(c: Bytes, kind: int) -> Value:
    if kind == STRING:
        return Value(STRING, c.string())
    if kind == BOOL:
        return Value(BOOL, bool(c.number(U8)))
    if kind in NUMBERS:
        return Value(kind, c.number(kind))
    item, count = c.number(U32), c.number(U64)
    if kind != ARRAY or item not in (*NUMBERS, STRING):
        raise Refusal(f"{c.path}: a key has a value of kind {kind}/{item}, which is not known")
    if item == STRING:
        if count > len(c.data):
            raise Refusal(f"{c.path}: an array of {count} strings does not fit the file")
        return Value(ARRAY, [c.string() for _ in range(count)], STRING)
    return Value(ARRAY, np.frombuffer(c.take(count * np.dtype(NUMBERS[item]).itemsize), NUMBERS[item]), item)


def open_gguf(path: Path) -> Model:
    """A file or, of a split one (NAME-00001-of-00003.gguf), all parts, whichever of them is named."""
    name = re.fullmatch(r"(.*)-\d{5}-of-(\d{5})\.gguf", path.name, re.DOTALL)
    n = int(name[2]) if name else 1
    paths = [path.with_name(f"{name[1]}-{i + 1:05d}-of-{n:05d}.gguf") for i in range(n)] if name else [path]
    parts = [open_gguf_part(p) for p in paths]
    whole = Model(path, parts[0].keys, {})
    for i, part in enumerate(parts):
        number, count = part.get("split.no", 0), part.get("split.count", 0)
        if number != i or (count or 1) != n:
            raise Refusal(f"{part.source}: says that it is part {number + 1} of {count} of a split GGUF, its name says "
                          f"{i + 1} of {n}")
        if twice := whole.tensors.keys() & part.tensors.keys():
            raise Refusal(f"{part.source}: tensor {min(twice)} is in another part, too")
        whole.tensors |= part.tensors
    wanted = whole.get("split.tensors.count", len(whole.tensors))
    if wanted != len(whole.tensors):
        raise Refusal(f"{path}: has {len(whole.tensors)} tensors, key split.tensors.count says {wanted}")
    join_experts(whole.tensors, path)
    for key in [key for key in whole.keys if key.startswith("split.")]:
        del whole.keys[key]
    return whole


def join_experts(tensors: dict[str, Tensor], path: Path) -> None:
    """llama.cpp wrote a tensor for each expert at first (blk.0.ffn_gate.3.weight): they become one for all."""
    found: dict[str, dict[int, Tensor]] = {}
    for name in list(tensors):
        if m := re.fullmatch(r"(blk\.\d+\.ffn_(?:gate|up|down))\.(\d+)\.weight", name):
            found.setdefault(f"{m[1]}_exps.weight", {})[int(m[2])] = tensors.pop(name)
    for name, experts in found.items():
        if name in tensors or experts.keys() != set(range(len(experts))) \
                or len({(t.type, t.shape) for t in experts.values()}) > 1:
            raise Refusal(f"{path}: of {name} an expert is missing, there twice, or of another type or shape")
        tensors[name] = stack([experts[e] for e in range(len(experts))])


def open_gguf_part(path: Path) -> Model:
    c = Bytes(path)
    c.take(4)
    version, n_tensors, n_keys = c.number(U32), c.number(U64), c.number(U64)
    if version not in (2, 3):
        raise Refusal(f"{path}: GGUF version {version}, expected 2 or 3 (little-endian)")
    keys = {}
    for _ in range(n_keys):
        name = c.string()
        if name in keys:
            raise Refusal(f"{path}: key {name} is there twice")
        keys[name] = read_value(c, c.number(U32))
    entries = []
    for _ in range(n_tensors):
        name = c.string()
        dims = [c.number(U64) for _ in range(min(c.number(U32), 5))]
        entries.append((name, tuple(reversed(dims)), c.number(U32), c.number(U64)))
    alignment = keys["general.alignment"].data if "general.alignment" in keys else 32
    begin = -(-c.at // alignment) * alignment
    names = {t.ggml: t.name for t in TYPES.values()}
    tensors = {}
    for name, shape, ggml, offset in entries:
        if ggml not in names:
            raise Refusal(f"{path}: {name} is of GGUF type {ggml}, which is not known")
        if name in tensors:
            raise Refusal(f"{path}: tensor {name} is there twice")
        tensors[name] = gguf_tensor(c, name, shape, names[ggml], begin + offset)
    return Model(path, keys, tensors)


def gguf_tensor(c: Bytes, name: str, shape: tuple[int, ...], type_name: str, at: int) -> Tensor:
    if not 1 <= len(shape) <= 4 or shape[-1] % TYPES[type_name].cols:
        raise Refusal(f"{c.path}: {name} has the shape {shape}, which {type_name} cannot have")
    if type_name in FLOATS:
        number, stored = FLOATS[type_name], shape
    else:
        number, stored = np.dtype(np.uint8), (*shape[:-1], row_bytes(type_name, shape[-1]))
    if at + math.prod(stored) * number.itemsize > len(c.data):
        raise Refusal(f"{c.path}: {name} does not lie within the file: not copied whole?")
    return mapped(c.path, at, number, stored, type_name, shape)


def pack_string(s: str) -> bytes:
    encoded = s.encode("utf-8", "surrogateescape")
    return struct.pack("<Q", len(encoded)) + encoded


def pack_value(v: Value) -> bytes:
    if v.kind == STRING:
        return pack_string(v.data)
    if v.kind != ARRAY:
        return np.array(v.data, NUMBERS[v.kind]).tobytes()
    items = b"".join(map(pack_string, v.data)) if v.item == STRING else np.asarray(v.data, NUMBERS[v.item]).tobytes()
    return struct.pack("<IQ", v.item, len(v.data)) + items


def pack_gguf_header(keys: dict[str, Value], tensors: dict[str, tuple[Tensor, str]]) -> bytes:
    """All before the data      tensors: name -> tensor and the type that it is written in"""
    parts = [b"GGUF", struct.pack("<IQQ", 3, len(tensors), len(keys))]
    for key, value in keys.items():
        parts += [pack_string(key), struct.pack("<I", value.kind), pack_value(value)]
    offset = 0
    for name, (tensor, type_name) in tensors.items():
        shape = tensor.shape
        parts += [pack_string(name), struct.pack("<I", len(shape)), struct.pack(f"<{len(shape)}Q", *reversed(shape)),
                  struct.pack("<IQ", TYPES[type_name].ggml, offset)]
        offset += -(-stored_bytes(shape, type_name) // 32) * 32
    header = b"".join(parts)
    return header + bytes(-len(header) % 32)


def stored_bytes(shape: tuple[int, ...], type_name: str) -> int:
    return math.prod(shape[:-1]) * row_bytes(type_name, shape[-1])


# ==== 4. cria's own file ====
# Drawn in README, "The native file, byte by byte". A matrix lies in tiles of 16 rows x 32 columns, or 256:
# here they become GGUF's rows of blocks again, with the same bits.

NATIVE_MAGIC = b"\x89cria\r\n\x1a"
NATIVE_LAYOUT = 2
# By its number, a matrix's type, the bits of a weight, and what a row of a tile has before them: the bytes of its scale
# and, if there is one, of its minimum, and how many bytes of smaller scales.
NATIVE_TYPES = (("f32", 32, (), 0), ("f16", 16, (), 0), ("bf16", 16, (), 0), ("q8", 8, (2,), 0), ("q8f", 8, (4,), 0),
                ("q4", 4, (2,), 0), ("q4m", 4, (2, 2), 0), ("q5", 5, (2,), 0), ("q5m", 5, (2, 2), 0),
                ("q2k", 2, (2, 2), 16), ("q3k", 3, (2,), 16), ("q4k", 4, (2, 2), 16), ("q5k", 5, (2, 2), 16),
                ("q6k", 6, (2,), 16), ("iq4nl", 4, (2,), 0), ("iq4xs", 4, (2,), 8), ("mxfp4", 4, (1,), 0))
NATIVE_VECTOR = 255
NATIVE_PRE = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "deepseek-llm", "default", "mpt", "command-r", "hunyuan",
              "glm4", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "deepseek-coder")
# Names of the configuration and GGUF's keys; "": native_keys() makes these, or they follow from the family.
NATIVE_CONFIG = {"n_layers": "block_count", "dim": "embedding_length", "n_tokens": "vocab_size",
                 "head_dim": "attention.key_length", "rope_dim": "rope.dimension_count", "context": "context_length",
                 "original_context": "rope.scaling.original_context_length",
                 "norm_eps": "attention.layer_norm_rms_epsilon", "rope_theta": "rope.freq_base", "rope_scale": "",
                 "rope_magnitude": "", "yarn_fast": "", "yarn_slow": "", "local_theta": "", "embedding_scale": "",
                 "residual_scale": "", "attention_scale": "", "logit_scale": "",
                 "attention_cap": "attn_logit_softcapping", "logit_cap": "final_logit_softcapping",
                 "activation": "", "n_heads": "attention.head_count", "n_kv_heads": "attention.head_count_kv",
                 "ffn_dim": "feed_forward_length", "window": "", "angles": "", "n_experts": "expert_count",
                 "n_experts_used": "expert_used_count"}
NATIVE_PER_LAYER = ("n_heads", "n_kv_heads", "ffn_dim", "window", "angles", "n_experts", "n_experts_used")
NATIVE_OFF = ("original_context", "attention_cap", "logit_cap", "n_experts", "n_experts_used")  # at 0 they are not there


def stored_weights(w: np.ndarray, bits: int) -> np.ndarray:
    """The weights of 32 columns and 16 rows from the planes that have their bits      uint8 (..., 64 * bits) ->
    (..., 8, 64): eight groups of four columns"""
    q, at, below = np.zeros((*w.shape[:-1], 8, 64), np.uint8), 0, 0
    for width in (n for n in (8, 4, 2, 1) if bits & n):
        plane, shifts = w[..., at:at + 64 * width].reshape(*w.shape[:-1], width, 64), np.arange(0, 8, width, np.uint8)
        plane = plane[..., None, :, :] if width == 4 else plane[..., None, :]
        plane = plane >> shifts.reshape(-1, *[1] * (1 + (width == 4)))
        q |= (plane.reshape(q.shape) & (1 << width) - 1) << below
        at, below = at + 64 * width, below + width
    return q


def pack_scales(s: np.ndarray, type_name: str) -> list[np.ndarray]:
    """A tile's smaller scales as ggml has them      uint8 (..., 16 or 8)"""
    at = s.shape[:-1]
    if type_name in ("q4k", "q5k"):  # 8 scales, 8 minima
        low, high = s.reshape(*at, 2, 2, 4)[..., 0, :], s.reshape(*at, 2, 2, 4)[..., 1, :]
        return [(low | high >> 4 << 6).reshape(*at, 8), join(high & 15, -2, 4)]
    s = s + np.uint8(32) if type_name in ("q3k", "iq4xs") else s
    if type_name == "q3k":
        return [join((s & 15).reshape(*at, 2, 8), -2, 4), join((s >> 4).reshape(*at, 4, 4), -2, 2)]
    if type_name == "iq4xs":
        return [join((s >> 4).reshape(*at, 2, 4), -1, 2), join((s & 15).reshape(*at, 4, 2), -1, 4)]
    return [s]


def pack_block(q: np.ndarray, scales: list[np.ndarray], narrow: np.ndarray, type_name: str) -> list[np.ndarray]:
    """The fields of ggml's blocks, in their order      q uint8 (rows, blocks, cols)  scales (..., bytes), of minima too
    narrow (..., 16 or 8)"""
    at, smaller = q.shape[:2], pack_scales(narrow, type_name)

    def bits(x: np.ndarray, shape: tuple[int, ...], axis: int, n: int) -> np.ndarray:
        return join(x.reshape(*at, *shape), axis, n).reshape(*at, -1)
    if type_name in ("q4k", "q5k"):
        high = [bits(q >> 4, (8, 32), -2, 1)] if type_name == "q5k" else []
        return [*scales, *smaller, *high, bits(q & 15, (4, 2, 32), -2, 4)]
    if type_name == "q2k":
        return [*smaller, bits(q, (2, 4, 32), -2, 2), *scales]
    if type_name == "q3k":
        return [bits(q >> 2, (8, 32), -2, 1), bits(q & 3, (2, 4, 32), -2, 2), *smaller, *scales]
    if type_name == "q6k":
        return [bits(q & 15, (2, 2, 64), -2, 4), bits(q >> 4, (2, 4, 32), -2, 2), *smaller, *scales]
    if type_name == "q8":
        return [*scales, q]
    high = [np.packbits(q >> 4, -1, "little")] if type_name in ("q5", "q5m") else []
    return [*scales, *smaller, *high, bits(q & 15, (-1, 2, 16), -2, 4)]


def untile(tiles: np.ndarray, number: int, rows: int) -> np.ndarray:
    """uint8 (row tiles, column tiles, bytes of a tile) -> rows as in a GGUF file; of q8f, floats"""
    r, c, _ = tiles.shape
    type_name, bits, widths, n_narrow = NATIVE_TYPES[number]
    if type_name in FLOATS:
        numbers = tiles.reshape(r, c, -1).view(FLOATS[type_name]).reshape(r, c, 32, 16)
        return numbers.transpose(0, 3, 1, 2).reshape(r * 16, c * 32)[:rows]
    at = 0

    def take(x: np.ndarray, n: int) -> np.ndarray:
        """What has n bytes for each of 16 rows, one row after the other, once or several times, by rows."""
        return x.reshape(r, c, -1, 16, n).transpose(0, 3, 1, 2, 4).reshape(r * 16, c, -1)
    scales = []
    for n in (*widths, n_narrow):
        scales.append(take(tiles[..., at:at + 16 * n], n if n < 8 else 1) if n else None)
        at += 16 * n
    weights = tiles[..., at:].reshape(r, c, -1, 64 * bits)
    q = take(stored_weights(weights, bits).reshape(r, c, -1), 4)
    if type_name == "q8f":
        scale = np.ascontiguousarray(scales[0]).view("<f4")
        return (q.view(np.int8).astype(np.float32) * scale).reshape(r * 16, -1)[:rows]
    narrow = scales.pop()
    fields = pack_block(q, scales, q[..., :0] if narrow is None else narrow, type_name)
    return np.concatenate(fields, 2).reshape(r * 16, -1)[:rows]


def native_tensor(c: Bytes, record: bytes) -> tuple[str, Tensor]:
    """| name[64] | u32 type, rows, columns, matrices | u64 at, n_bytes |"""
    name = record[:64].rstrip(b"\0").decode("ascii", "replace")
    kind, rows, cols, n, at, n_bytes = struct.unpack("<4I2Q", record[64:])
    if at + n_bytes > len(c.data):
        raise Refusal(f"{c.path}: {name} does not lie within the file: not copied whole?")
    if kind == NATIVE_VECTOR:
        return name, mapped(c.path, at, FLOATS["f32"], (cols,), "f32")
    if kind >= len(NATIVE_TYPES):
        raise Refusal(f"{c.path}: {name} is in tiles of type {kind}, which is not known here")
    type_name, bits, widths, n_narrow = NATIVE_TYPES[kind]
    tile_cols = 256 if n_narrow else 32
    grid = n * -(-rows // 16), -(-cols // tile_cols)  # each expert's matrix begins with a tile of its own
    if n_bytes != math.prod(grid) * (16 * (sum(widths) + n_narrow) + 2 * tile_cols * bits):
        raise Refusal(f"{c.path}: {name} has {n_bytes} bytes for {math.prod(grid)} tiles")

    def read() -> np.ndarray:
        tiles = np.fromfile(c.path, np.uint8, n_bytes, offset=at).reshape(*grid, -1)
        stored = untile(tiles, kind, grid[0] * 16).reshape(n, -(-rows // 16) * 16, -1)[:, :rows]
        stored = stored[..., :cols] if type_name in FLOATS else stored
        return np.ascontiguousarray(stored if by_expert else stored[0])
    by_expert = name.endswith("_exps.weight")
    shape = (n, rows, cols) if by_expert else (rows, cols)
    return name, Tensor(shape, "f32" if type_name == "q8f" else type_name, read)


def fuse_phi3(tensors: dict[str, Tensor], path: Path) -> dict[str, Tensor]:
    """GGUF has these as one matrix, a native file never."""
    fused, out = {"attn_q": ("attn_qkv", "qkv"), "ffn_gate": ("ffn_up", ("gate", "up"))}, {}
    for name, tensor in tensors.items():
        blk, kind = name.removesuffix(".weight").rpartition(".")[::2]
        if kind in fused:
            whole, ends = fused[kind]
            parts = [tensors[f"{blk}.{kind[:kind.index('_')]}_{end}.weight"] for end in ends]
            if len({p.type for p in parts}) > 1:
                raise Refusal(f"{path}: {name} is of another type than what GGUF has in the same matrix")
            out[f"{blk}.{whole}.weight"] = concatenate(parts, 0)
        elif kind not in ("attn_k", "attn_v", "ffn_up"):
            out[name] = tensor
    return out


def native_fields(section: bytes, path: Path) -> dict[str, list]:
    """Records | name[28] | u32 count | f64[count] |"""
    fields, at = {}, 0
    while at < len(section):
        name = section[at:at + 28].rstrip(b"\0").decode("ascii", "replace")
        (count,) = struct.unpack_from("<I", section, at + 28)
        fields[name] = list(struct.unpack_from(f"<{count}d", section, at + 32))
        at += 32 + 8 * count
    for name in [*(fields.keys() - NATIVE_CONFIG.keys()), *(NATIVE_CONFIG.keys() - fields.keys())]:
        raise Refusal(f"{path}: its configuration {'has' if name in fields else 'lacks'} {name}, which is not expected")
    for name, values in fields.items():
        if len(values) != (fields["n_layers"][0] if name in NATIVE_PER_LAYER else 1):
            raise Refusal(f"{path}: its configuration has {len(values)} values of {name}")
    return fields


def inverse(y: float) -> float:
    """1 / y, and of the f32 that are as good the roundest: y was one over that."""
    x = float(f"{1 / y:.6g}")
    return x if np.float32(1) / np.float32(x) == np.float32(y) else 1 / y


def scaling_keys(one: dict[str, float], arch: str, has_factors: bool) -> dict[str, Value]:
    """How the angles are scaled      has_factors: by LongRoPE's tensors"""
    kind = "yarn" if one["yarn_fast"] else "linear" if one["rope_scale"] != 1 else ""
    keys = {"rope.scaling.type": text(kind), "rope.scaling.factor": f32(one["rope_scale"])} if kind else {}
    if has_factors and arch != "phi3":
        keys["rope.scaling.type"] = text("longrope")
    if kind == "yarn":
        keys |= {f"rope.scaling.yarn_beta_{end}": f32(one[f"yarn_{end}"])
                 for end, usual in (("fast", 32), ("slow", 1)) if one[f"yarn_{end}"] != usual}
    magnitude = one["rope_magnitude"] / (yarn_magnitude(one["rope_scale"]) if kind == "yarn" else 1)
    if has_factors or abs(magnitude - 1) > 1e-6:
        keys["rope.scaling.attn_factor"] = f32(magnitude)
    return keys


def native_keys(fields: dict[str, list], arch: str, path: Path, has_factors: bool) -> dict[str, Value]:
    """A native file's configuration as GGUF's keys. What these cannot say is refused by name."""
    f = next((f for f in FAMILIES.values() if f.arch == arch), None)
    if not f:
        raise Refusal(f"{path}: models of family {arch!r} are not known here")
    keys = {}
    for name, key in NATIVE_CONFIG.items():
        values, make = fields[name], f32 if name in ("norm_eps", "rope_theta", "attention_cap", "logit_cap") else u32
        if key and (any(values) or name not in NATIVE_OFF):
            keys[key] = make(values[0]) if len(set(values)) == 1 else array(U32, [int(v) for v in values])
    keys["attention.value_length"] = keys["attention.key_length"]
    if arch == "stablelm":
        keys["attention.layer_norm_epsilon"] = keys.pop("attention.layer_norm_rms_epsilon")
        keys["use_parallel_residual"] = boolean(False)
    one, windows = {name: values[0] for name, values in fields.items()}, [int(w) for w in fields["window"]]
    local, n_layers = one["local_theta"], len(windows)
    keys |= scaling_keys(one, arch, has_factors)
    if local and arch == "gemma3":
        keys["rope.freq_base_swa"] = f32(local)
    if f.windows or any(windows):
        keys["attention.sliding_window"] = u32(max(windows))
    if any(windows) and [w > 0 for w in windows] != usual_windows(arch, n_layers):
        keys["attention.sliding_window_pattern"] = array(BOOL, [w > 0 for w in windows])
    if arch == "qwen3moe":
        keys["expert_feed_forward_length"] = keys["feed_forward_length"]
    scales = {"embedding_scale": math.sqrt(one["dim"]) if f.norm_plus_one else 1, "residual_scale": 1, "logit_scale": 1}
    if arch == "granite":
        keys |= {name: f32(one[name]) for name in ("embedding_scale", "residual_scale")}
        keys["logit_scale"], scales = f32(inverse(one["logit_scale"])), {}
    usual = usual_scalar(arch, n_layers, one["dim"] // one["n_heads"], one["head_dim"]) ** -0.5
    if arch == "granite" or not math.isclose(one["attention_scale"], usual, rel_tol=1e-6):
        keys["attention.scale"] = f32(one["attention_scale"])
    unrotated = [arch == "smollm3" and (i + 1) % 4 == 0 for i in range(n_layers)]
    unscaled = one["rope_theta"] if arch == "olmo2" and any(windows) else 0
    implied = scales | {"activation": int(f.norm_plus_one), "local_theta": local if arch == "gemma3" else unscaled,
                        "window": [w and max(windows) for w in windows],
                        "angles": [0 if no else 2 if w and local else 1 for no, w in zip(unrotated, windows)]}
    implied |= {name: one[name] or 1 for name in ("attention_cap", "logit_cap") if arch == "gemma2"}  # not without
    for name, values in implied.items():
        if not np.allclose(fields[name], values, 1e-6):
            raise Refusal(f"{path}: {name} is not as GGUF's keys mean it in family {arch}")
    return {f"{arch}.{key}": value for key, value in keys.items()}


def native_vocabulary(section: bytes, path: Path) -> dict[str, Value]:
    """The tokenizer's section as GGUF's keys."""
    kind, pre, flags, bos, eos, unk, n_end, n, n_merges, n_text = struct.unpack_from("<3I3i4I", section)
    at, arrays = 40, []
    for number, count in (("<f4", n), ("<u4", n + 1), ("<u4", 3 * n_merges), ("<u4", n_end),
                          ("<i4", 8 if flags & 1024 else 0), ("<u1", n), ("<u1", n if flags & 512 else 0)):
        arrays.append(np.frombuffer(section, number, count, at))
        at += arrays[-1].nbytes
    scores, starts, merges, ends, around, types, takes = arrays
    if pre >= len(NATIVE_PRE):
        raise Refusal(f"{path}: its pre-tokenizer has number {pre}, which is not known here")
    raw = [section[at + starts[i]:at + starts[i + 1]] for i in range(n)]
    spm = kind == 1
    pieces = [spell_piece(piece, int(t), spm) for piece, t in zip(raw, types)]
    keys = {"tokenizer.ggml.model": text("llama" if spm else "gpt2"),
            "tokenizer.ggml.pre": text("default" if spm else NATIVE_PRE[pre]),
            "tokenizer.ggml.tokens": array(STRING, pieces), "tokenizer.ggml.token_type": array(I32, list(types))}
    if spm:
        keys["tokenizer.ggml.scores"] = array(F32, scores)
        keys["tokenizer.ggml.add_space_prefix"] = boolean(flags & 4)
        keys |= {key: boolean(True) for i, key in enumerate(SPM_FLAGS) if flags >> 5 + i & 1}
    else:
        pairs = [f"{pieces[a]} {pieces[b]}" for a, b, _ in merges.reshape(-1, 3)]
        keys["tokenizer.ggml.merges"] = array(STRING, pairs)
        keys["tokenizer.ggml.ignore_merges"] = boolean(flags & 8)
        keys["tokenizer.ggml.normalizer.nfc"] = boolean(flags & 16)
    if len(takes):
        keys["tokenizer.ggml.takes_white"] = array(I32, list(takes))
    for key, ids in zip(AROUND.values(), (around[:4], around[4:])):
        keys |= {key: array(U32, ids[ids >= 0])} if len(ids) and ids[0] >= 0 else {}
    others = [int(i) for i in ends if i != eos]
    ids = {"bos": bos, "eos": eos, "unknown": unk}
    keys |= {f"tokenizer.ggml.{name}_token_id": u32(i) for name, i in ids.items() if i >= 0} | end_keys(others)
    return keys | {"tokenizer.ggml.add_bos_token": boolean(flags & 1),
                   "tokenizer.ggml.add_eos_token": boolean(flags & 2)}


def end_keys(others: list[int]) -> dict[str, Value]:
    """The tokens beside eos that end a text. GGUF has keys for two; cria reads the third."""
    keys = {f"tokenizer.ggml.{name}_token_id": u32(i) for name, i in zip(("eot", "eom"), others)}
    return keys | ({"tokenizer.ggml.end_token_ids": array(U32, others)} if len(others) > 2 else {})


def spell_piece(piece: bytes, token_type: int, spm: bool) -> str:
    """A piece as it stands in texts, in GGUF's spelling."""
    if token_type == BYTE:
        return f"<0x{piece[0]:02X}>"
    if not spm and token_type == NORMAL:
        return "".join(BYTE_CHARACTERS[b] for b in piece)
    string = piece.decode("utf-8", "surrogateescape")
    return string.replace(" ", "\u2581") if spm and token_type in (NORMAL, UNUSED) else string


def open_native(path: Path) -> Model:
    c = Bytes(path)
    header = c.take(128)
    layout, n_tensors, n_bytes = struct.unpack_from("<IIQ", header, 8)
    if layout != NATIVE_LAYOUT:
        raise Refusal(f"{path}: has layout {layout}, expected {NATIVE_LAYOUT}: make it again from its source")
    if n_bytes != len(c.data):
        raise Refusal(f"{path}: {len(c.data)} bytes, expected {n_bytes}: not copied whole?")
    arch = header[24:40].rstrip(b"\0").decode("ascii", "replace")
    sections = []
    for i in range(4):
        c.at, size = struct.unpack_from("<QQ", header, 40 + 16 * i)
        sections.append(c.take(size))
    config, records, tokenizer, template = sections
    tensors = dict(native_tensor(c, records[96 * i:96 * i + 96]) for i in range(n_tensors))
    keys = native_keys(native_fields(config, path), arch, path, "rope_factors_long.weight" in tensors)
    keys = {"general.architecture": text(arch)} | keys | native_vocabulary(tokenizer, path)
    if template:
        keys["tokenizer.chat_template"] = text(template.decode("utf-8", "surrogateescape"))
    return Model(path, keys, fuse_phi3(tensors, path) if arch == "phi3" else tensors)


# ==== 5. Families ====
# What the config.json of a family says, as GGUF's keys, and which tensors of Hugging Face's become which of GGUF's. The
# same tables serve both directions. To add a family: a row in FAMILIES, what is its own in read_config(), hf_own() and
# native_keys().

class Config:
    """A config.json. It notes which keys have been asked for: any other is refused, for it may change the model. Only
    keys that the family's code reads count: the others of any family change nothing, and a line says so. null means
    that there is no such key."""

    # Of no consequence for what a model computes from a text, whatever their values.
    HARMLESS = set("""
        architectures auto_map _name_or_path _commit_hash name_or_path transformers_version torch_dtype dtype use_cache
        initializer_range bos_token_id eos_token_id pad_token_id unk_token_id sep_token_id decoder_start_token_id
        attention_dropout hidden_dropout resid_pdrop embd_pdrop embedding_dropout id2label label2id problem_type
        task_specific_params finetuning_task return_dict output_attentions output_hidden_states output_router_logits
        router_aux_loss_coef router_jitter_noise output_scores return_dict_in_generate use_bfloat16 torchscript
        tokenizer_class prefix max_length min_length do_sample early_stopping num_beams num_beam_groups
        diversity_penalty temperature top_k top_p typical_p repetition_penalty length_penalty no_repeat_ngram_size
        encoder_no_repeat_ngram_size bad_words_ids num_return_sequences remove_invalid_values
        exponential_decay_length_penalty suppress_tokens begin_suppress_tokens forced_bos_token_id forced_eos_token_id
        cache_implementation _attn_implementation_autoset attn_implementation unsloth_version unsloth_fixed
        transformers.js_config is_llama_config max_sequence_length pretraining_tp _attn_implementation
        _experts_implementation use_flash_attn use_sdpa use_cache_quantization quantization_status
        output_past is_composition""".split())
    # Of no consequence at these values.
    NEUTRAL = {"is_encoder_decoder": (False,), "is_decoder": (False, True), "add_cross_attention": (False,),
               "tie_encoder_decoder": (False,), "pruned_heads": ({},), "chunk_size_feed_forward": (0,),
               "tf_legacy_loss": (False,), "use_bidirectional_attention": (False,), "rope_interleaved": (False,),
               "lm_head_bias": (False,), "full_attn_mod": (1,), "interpolate_factor": (1,),
               "rotary_scaling_factor": (1,), "use_mrope": (False,)}
    # The greatest integers, as in the C program.
    LIMITS = {"num_hidden_layers": 1024, "hidden_size": 65536, "num_attention_heads": 65536, "head_dim": 65536}

    def __init__(self, values: dict, where: Path, read: set[str] | None = None, defaults: dict | None = None):
        """read: the keys that count; None: all"""
        self.where, self.asked = where, set()
        unread = [] if read is None else [key for key in values if key in KNOWN_KEYS - read]
        self.values = {key: value for key, value in ((defaults or {}) | values).items()
                       if value is not None and key not in unread}
        if noted := [key for key in unread if values[key] not in (None, False, [], {})]:
            warn(f"{where}: {', '.join(noted)}: not read by a model of type {values.get('model_type')}, so without "
                 "effect")

    def get(self, key: str, otherwise: Any = None) -> Any:
        """Its value; `otherwise` where there is none, or null."""
        self.asked.add(key)
        return self.values.get(key, otherwise)

    def integer(self, key: str, otherwise: int | None = None) -> int:
        value, limit = self.get(key, otherwise), self.LIMITS.get(key, (1 << 31) - 1)
        if isinstance(value, bool) or not isinstance(value, int) or not 0 < value <= limit:
            raise Refusal(f"{self.where}: {key} is {json.dumps(value)}, expected a whole number from 1 to {limit}")
        return value

    def real(self, key: str, otherwise: float | None = None) -> float:
        value = self.get(key, otherwise)
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise Refusal(f"{self.where}: {key} is {json.dumps(value)}, expected a number")
        return float(value)

    def refuse(self, key: str, why: str = "is not supported") -> None:
        raise Refusal(f"{self.where}: {key} = {json.dumps(self.values.get(key))} {why}")

    def demand(self, key: str, *allowed: Any) -> None:
        """Its value, if it is there, must be one of these."""
        if self.get(key) is not None and self.values[key] not in allowed:
            self.refuse(key)

    def finish(self) -> None:
        for key, allowed in self.NEUTRAL.items():
            self.demand(key, *allowed)
        for key in self.values:
            if key not in self.asked | self.HARMLESS | DEFAULTS.keys():
                raise Refusal(f"{self.where}: key {key} is not known: it may change what the model computes")


# A layer's tensors, one a row: GGUF's name, Hugging Face's, and the shape in letters of Sizes. `{e}` stands for the
# number of an expert or of a head: Hugging Face has a tensor for each. "?": it may be absent; "b": it has a bias;
# "b?": it may have one.
QKV = ("attn_q self_attn.q_proj HK,D", "attn_k self_attn.k_proj GK,D", "attn_v self_attn.v_proj GK,D")
OUT = ("attn_output self_attn.o_proj D,HK",)
FFN = ("ffn_gate mlp.gate_proj F,D", "ffn_up mlp.up_proj F,D", "ffn_down mlp.down_proj D,F")
NORMS = ("attn_norm input_layernorm D", "ffn_norm post_attention_layernorm D")
HEAD_NORMS = ("attn_q_norm self_attn.q_norm K", "attn_k_norm self_attn.k_norm K")
WHOLE_NORMS = ("attn_q_norm self_attn.q_norm HK", "attn_k_norm self_attn.k_norm GK")
POST_NORMS = ("post_attention_norm post_attention_layernorm D", "post_ffw_norm post_feedforward_layernorm D")
STABLELM_NORMS = ("attn_norm input_layernorm D b", "ffn_norm post_attention_layernorm D ? b?",
                  "attn_q_norm self_attn.q_layernorm.norms.{e} H,K ?",
                  "attn_k_norm self_attn.k_layernorm.norms.{e} G,K ?")
GEMMA_NORMS = (NORMS[0], POST_NORMS[0], "ffn_norm pre_feedforward_layernorm D", POST_NORMS[1])
FUSED = ("attn_qkv self_attn.qkv_proj Q,D", *OUT, "ffn_up mlp.gate_up_proj 2F,D", FFN[2])
WHOLE = ("token_embd model.embed_tokens V,D", "output_norm model.norm D b?", "output lm_head V,D ?")


def marked(mark: str, rows: tuple[str, ...]) -> tuple[str, ...]:
    return tuple(f"{row} {mark}" for row in rows)


def experts(block: str, gate: str, up: str, down: str) -> tuple[str, ...]:
    each = block + ".experts.{e}."
    return (f"ffn_gate_inp {block}.gate E,D", f"ffn_gate_exps {each}{gate} E,F,D", f"ffn_up_exps {each}{up} E,F,D",
            f"ffn_down_exps {each}{down} E,D,F")


@dataclass(frozen=True)
class Family:
    """One of Hugging Face's model types."""
    model_type: str
    hf_class: str                # transformers' class is called so, with ForCausalLM
    arch: str                    # general.architecture
    layer: tuple[str, ...]       # its tensors
    pairs: bool = False          # llama.cpp rotates neighbours: rows of query and key are put in that order
    norm_plus_one: bool = False  # Hugging Face's norms multiply by 1 + weight; GGUF holds the sum
    own_output: bool = False     # llama.cpp wants an output matrix even where it is the embedding
    experts: str = ""            # where the experts are: the module's name
    windows: bool = False        # attention.sliding_window is always written
    any_head_dim: bool = True    # else llama.cpp's format means D / H
    integers: dict = field(default_factory=dict)               # keys of config.json that have one in GGUF: u32
    scalars: dict = field(default_factory=lambda: RMS)         # f32
    demands: dict = field(default_factory=lambda: SILU)        # keys that, if they are there, must have such a value
    reads: str = ""              # further keys that count here
    defaults: dict = field(default_factory=dict)  # what config.json means where it is silent, as in transformers


# What config.json means where it is silent: transformers' LlamaConfig; a family's own defaults are in its row.
DEFAULTS = {"vocab_size": 32000, "hidden_size": 4096, "intermediate_size": 11008, "num_hidden_layers": 32,
            "num_attention_heads": 32, "max_position_embeddings": 2048, "rms_norm_eps": 1e-6, "rope_theta": 1e4}
MISTRAL = {"intermediate_size": 14336, "num_key_value_heads": 8, "max_position_embeddings": 131072}
QWEN = {"vocab_size": 151936, "intermediate_size": 22016, "num_key_value_heads": 32, "max_position_embeddings": 32768,
        "sliding_window": 4096}
OLMO = {"vocab_size": 50304, "rms_norm_eps": 1e-5}
GEMMA = {"vocab_size": 256000, "hidden_size": 2304, "intermediate_size": 9216, "num_hidden_layers": 26,
         "num_attention_heads": 8, "num_key_value_heads": 4, "head_dim": 256, "max_position_embeddings": 8192,
         "sliding_window": 4096, "query_pre_attn_scalar": 256, "tie_word_embeddings": True}
# Keys of config.json that have one in GGUF: of all families, and of some.
INTEGERS = {"num_hidden_layers": "block_count", "max_position_embeddings": "context_length",
            "hidden_size": "embedding_length", "intermediate_size": "feed_forward_length",
            "num_attention_heads": "attention.head_count", "num_key_value_heads": "attention.head_count_kv",
            "vocab_size": "vocab_size"}
RMS = {"rms_norm_eps": "attention.layer_norm_rms_epsilon"}
GRANITE_SCALES = {"attention_multiplier": "attention.scale", "embedding_multiplier": "embedding_scale",
                  "residual_multiplier": "residual_scale", "logits_scaling": "logit_scale"}
FINAL_CAP = {"final_logit_softcapping": "final_logit_softcapping"}
BOTH_CAPS = FINAL_CAP | {"attn_logit_softcapping": "attn_logit_softcapping"}
SILU = {"hidden_act": ("silu", "swish")}
PLAIN = SILU | {"attention_bias": (False,)}
GELU = {"hidden_activation": ("gelu_pytorch_tanh",), "attention_bias": (False,)}
ALL_SPARSE = {"norm_topk_prob": (True,), "decoder_sparse_step": (1,), "mlp_only_layers": ([],)}
WINDOWS = "sliding_window layer_types "
QWEN_WINDOWS = "sliding_window use_sliding_window "  # the second says whether the first counts
GEMMA_READS = WINDOWS + "query_pre_attn_scalar use_bidirectional_attention "
LLAMA_LAYER = NORMS + marked("b?", QKV + OUT + FFN)
FAMILIES = {f.model_type: f for f in (
    Family("llama", "Llama", "llama", LLAMA_LAYER, pairs=True, reads="attention_bias mlp_bias"),
    Family("mistral", "Mistral", "llama", LLAMA_LAYER, pairs=True, reads=WINDOWS,
           defaults=MISTRAL | {"sliding_window": 4096}),
    Family("mixtral", "Mixtral", "llama", NORMS + QKV + OUT + experts("block_sparse_moe", "w1", "w3", "w2"),
           pairs=True, experts="block_sparse_moe", reads=WINDOWS,
           integers={"num_local_experts": "expert_count", "num_experts_per_tok": "expert_used_count"},
           defaults=MISTRAL | {"rope_theta": 1e6, "rms_norm_eps": 1e-5, "num_local_experts": 8,
                               "num_experts_per_tok": 2}),
    Family("qwen2", "Qwen2", "qwen2", NORMS + marked("b", QKV) + OUT + FFN, defaults=QWEN,
           reads=QWEN_WINDOWS + "max_window_layers layer_types"),
    Family("qwen3", "Qwen3", "qwen3", NORMS + QKV + OUT + HEAD_NORMS + FFN, demands=PLAIN,
           reads=QWEN_WINDOWS + "max_window_layers layer_types", defaults=QWEN | {"head_dim": 128}),
    Family("qwen3_moe", "Qwen3Moe", "qwen3moe",
           NORMS + QKV + OUT + HEAD_NORMS + experts("mlp", "gate_proj", "up_proj", "down_proj"), experts="mlp",
           integers={"num_experts": "expert_count", "num_experts_per_tok": "expert_used_count",
                     "moe_intermediate_size": "expert_feed_forward_length"},
           demands=PLAIN | ALL_SPARSE, reads=QWEN_WINDOWS,
           defaults=QWEN | {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 24,
                            "num_key_value_heads": 4, "moe_intermediate_size": 768, "num_experts": 128,
                            "num_experts_per_tok": 8, "norm_topk_prob": False}),
    Family("phi3", "Phi3", "phi3", NORMS + FUSED, windows=True, any_head_dim=False,
           reads=WINDOWS + "partial_rotary_factor",
           defaults={"vocab_size": 32064, "hidden_size": 3072, "intermediate_size": 8192, "rms_norm_eps": 1e-5,
                     "max_position_embeddings": 4096}),
    Family("granite", "Granite", "granite", LLAMA_LAYER, pairs=True, any_head_dim=False,
           scalars=RMS | GRANITE_SCALES, reads="attention_bias mlp_bias", defaults=dict.fromkeys(GRANITE_SCALES, 1.0)),
    Family("smollm3", "SmolLM3", "smollm3", NORMS + QKV + OUT + FFN, pairs=True, any_head_dim=False,
           demands=PLAIN | {"mlp_bias": (False,), "use_sliding_window": (False,)},
           reads=WINDOWS + "no_rope_layers no_rope_layer_interval",
           defaults={"vocab_size": 128256, "hidden_size": 2048, "num_hidden_layers": 36, "num_attention_heads": 16,
                     "num_key_value_heads": 4, "max_position_embeddings": 32768, "rope_theta": 2e6,
                     "tie_word_embeddings": True}),
    Family("olmo2", "Olmo2", "olmo2", WHOLE_NORMS + POST_NORMS + QKV + OUT + FFN, own_output=True, any_head_dim=False,
           demands=PLAIN, defaults=OLMO),
    Family("olmo3", "Olmo3", "olmo2", WHOLE_NORMS + POST_NORMS + QKV + OUT + FFN, own_output=True, any_head_dim=False,
           windows=True, demands=PLAIN, reads=WINDOWS, defaults=OLMO | {"sliding_window": 4096, "rope_theta": 5e5}),
    Family("stablelm", "StableLm", "stablelm", STABLELM_NORMS + marked("b?", QKV) + OUT + FFN, own_output=True,
           any_head_dim=False, scalars={"layer_norm_eps": "attention.layer_norm_epsilon"},
           reads="partial_rotary_factor use_qkv_bias qk_layernorm use_parallel_residual",
           defaults={"vocab_size": 50304, "intermediate_size": 6912, "hidden_size": 2560, "num_key_value_heads": 32,
                     "max_position_embeddings": 4096, "partial_rotary_factor": 0.25, "layer_norm_eps": 1e-5}),
    Family("gemma2", "Gemma2", "gemma2", GEMMA_NORMS + QKV + OUT + FFN, norm_plus_one=True, windows=True,
           scalars=RMS | BOTH_CAPS, demands=GELU, reads=GEMMA_READS,
           defaults=GEMMA | {"final_logit_softcapping": 30.0, "attn_logit_softcapping": 50.0}),
    Family("gemma3_text", "Gemma3", "gemma3", GEMMA_NORMS + QKV + OUT + HEAD_NORMS + FFN, norm_plus_one=True,
           windows=True, scalars=RMS | FINAL_CAP, demands=GELU | {"attn_logit_softcapping": (None,)},
           reads=GEMMA_READS + "rope_local_base_freq sliding_window_pattern",
           defaults=GEMMA | {"vocab_size": 262208, "max_position_embeddings": 131072, "rope_theta": 1e6,
                             "rope_local_base_freq": 1e4}))}
COMMON_READS = set("""model_type architectures head_dim original_max_position_embeddings rope_theta rope_scaling
    rope_parameters tie_word_embeddings""".split()) | INTEGERS.keys()


def keys_read(f: Family) -> set[str]:
    """The keys of config.json that count for a family."""
    return COMMON_READS.union(f.integers, f.scalars, f.demands, f.reads.split())


# All keys that some family reads, and some that published files have and no family here reads.
KNOWN_KEYS = set().union(*map(keys_read, FAMILIES.values())) | set("""
    sliding_window_size _sliding_window_pattern rotary_pct rope_pct rotary_dim""".split())


@dataclass(frozen=True)
class Sizes:
    """What the shapes of a model's tensors are made of."""
    V: int
    D: int
    H: int
    G: int
    K: int
    F: int
    E: int = 0

    @property
    def Q(self) -> int:
        """Rows of query, key and value in one matrix."""
        return (self.H + 2 * self.G) * self.K

    def shape(self, letters: str) -> tuple[int, ...]:
        """"HK,D" -> (H * K, D); a digit is a factor"""
        return tuple(math.prod(int(c) if c.isdigit() else getattr(self, c) for c in word)
                     for word in letters.split(","))


@dataclass(frozen=True)
class Part:
    """One tensor in both worlds, as the rows above describe it."""
    gguf: str
    hf: str
    shape: str
    move: str     # "q", "k": rows in pairs; "+1": one is added; "stack": one tensor for each {e}
    needed: bool


def parts_of(f: Family, row: str) -> list[Part]:
    """A row's weight, and its bias if it has one."""
    gguf, hf, shape, *marks = row.split()
    norm = gguf.endswith("norm")
    move = "stack" if "{e}" in hf else "+1" if norm and f.norm_plus_one else ""
    if f.pairs and gguf in ("attn_q", "attn_k"):
        move = gguf[-1]
    parts = [Part(f"{gguf}.weight", f"{hf}.weight", shape, move, "?" not in marks)]
    if "b" in marks or "b?" in marks:
        parts.append(Part(f"{gguf}.bias", f"{hf}.bias", shape.split(",")[0], "" if norm else move, "b" in marks))
    return parts


def model_parts(f: Family, n_layers: int) -> list[Part]:
    """All tensors of a model, in the order in which they are written."""
    whole, layer = ([part for row in rows for part in parts_of(f, row)] for rows in (WHOLE, f.layer))
    return whole + [replace(p, gguf=f"blk.{i}.{p.gguf}", hf=f"model.layers.{i}.{p.hf}")
                    for i in range(n_layers) for p in layer]


def to_gguf(part: Part, tensor: Tensor, sizes: Sizes) -> Tensor:
    """Of Hugging Face's tensor (if stacked: of the stack), GGUF's."""
    if part.move in ("q", "k"):
        heads = sizes.H if part.move == "q" else sizes.G
        return replace(tensor.then(lambda w: pair_rows(w, heads)), original=tensor)
    return tensor.computed(lambda w: w + 1) if part.move == "+1" else tensor


def from_gguf(part: Part, tensor: Tensor, sizes: Sizes) -> Tensor:
    """The inverse of to_gguf()."""
    if part.move in ("q", "k"):
        heads = sizes.H if part.move == "q" else sizes.G
        return tensor.original or tensor.then(lambda w: unpair_rows(w, heads))
    return tensor.computed(lambda w: w - 1) if part.move == "+1" else tensor


def take_part(part: Part, tensors: dict[str, Tensor], sizes: Sizes, where: Path) -> Tensor | None:
    """Takes a part's tensors out of Hugging Face's; None if they are not there and need not be."""
    shape, names = sizes.shape(part.shape), [part.hf]
    if part.move == "stack":
        names = [part.hf.format(e=e) for e in range(shape[0])]
        shape = shape[1:]
    missing = [name for name in names if name not in tensors]
    if len(missing) == len(names) and not part.needed:
        return None
    if missing:
        raise Refusal(f"{where}: tensor {missing[0]} is missing")
    found = [tensors.pop(name) for name in names]
    for name, tensor in zip(names, found):
        check_shape(name, tensor, shape, where)
    return stack(found) if part.move == "stack" else found[0]


def check_shape(name: str, tensor: Tensor, shape: tuple[int, ...], where: Path) -> None:
    if tensor.shape != shape:
        raise Refusal(f"{where}: {name} has the shape {list(tensor.shape)}, expected {list(shape)}")


def split_fused_experts(tensors: dict[str, Tensor], f: Family) -> None:
    """transformers 5 may hold all experts in one tensor, gate and up together: as single ones."""
    gate, up, down = (row.split()[1].rpartition(".")[2] for row in f.layer if "{e}" in row)
    for name in [n for n in tensors if n.endswith((".experts.gate_up_proj", ".experts.down_proj"))]:
        fused, prefix = tensors.pop(name), name.rpartition(".")[0].replace(".mlp.", f".{f.experts}.")
        parts = (gate, up) if name.endswith("gate_up_proj") else (down,)
        n, rows, cols = fused.shape[0], fused.shape[1] // len(parts), fused.shape[2]
        for e in range(n):
            for i, part in enumerate(parts):
                tensors[f"{prefix}.{e}.{part}.weight"] = fused.then(
                    lambda w, e=e, first=i * rows, end=(i + 1) * rows: w[e, first:end], (rows, cols))
    for name in [n for n in tensors if ".mlp.gate.weight" in n]:
        tensors[name.replace(".mlp.", f".{f.experts}.")] = tensors.pop(name)


def map_tensors(model: Model, f: Family, tied: bool, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """Hugging Face's tensors as GGUF's. What is left over is refused by name."""
    tensors = {n: t for n, t in tensors.items() if not n.endswith((".rotary_emb.inv_freq", ".masked_bias"))}
    if f.experts:
        split_fused_experts(tensors, f)
    if tied:
        tensors.pop("lm_head.weight", None)
    elif "lm_head.weight" not in tensors:
        raise Refusal(f"{model.source}: tensor lm_head.weight is missing")
    sizes, mapped_tensors = sizes_of(model), {}
    for part in model_parts(f, model.value("block_count")):
        if tensor := take_part(part, tensors, sizes, model.source):
            mapped_tensors[part.gguf] = to_gguf(part, tensor, sizes)
    if tied and f.own_output:
        mapped_tensors["output.weight"] = mapped_tensors["token_embd.weight"]
    if tensors:
        raise Refusal(f"{model.source}: tensor {next(iter(tensors))} is not one of a {f.model_type} model")
    return mapped_tensors


# -- config.json -> keys --

# The numbers of rope_scaling by its type: those that it must have, and those that it may have.
ROPE_KEYS = {"default": ("", ""), "linear": ("factor", ""),
             "llama3": ("factor low_freq_factor high_freq_factor original_max_position_embeddings", ""),
             "yarn": ("factor original_max_position_embeddings",
                      "beta_fast beta_slow attention_factor mscale mscale_all_dim"),
             "longrope": ("short_factor long_factor", "factor attention_factor")}
ALL_ROPE_KEYS = {key for keys in ROPE_KEYS.values() for key in " ".join(keys).split()}


def read_rope(c: Config) -> tuple[dict, dict]:
    """The rotation of whole and of windowed attention: rope_parameters of transformers 5, or rope_theta and
    rope_scaling of 4, in the form of 5. Unknown keys are refused."""
    theta, scaling, both = c.get("rope_theta"), c.get("rope_scaling", {}), c.get("rope_parameters", {})
    local = c.get("rope_local_base_freq")
    if not all(isinstance(x, dict) for x in (scaling, both)):
        raise Refusal(f"{c.where}: rope_scaling is {json.dumps(scaling or both)}, expected an object")
    if scaling and both and scaling != both:
        warn(f"{c.where}: rope_scaling and rope_parameters differ: the first counts, as in transformers")
    both = scaling or both
    by_layers = "full_attention" in both or "sliding_attention" in both
    full, windowed = (both.get(f"{kind}_attention") or {} for kind in ("full", "sliding")) if by_layers else (both, {})
    full = {"rope_theta": theta} | full
    return check_rope(c, full), check_rope(c, {"rope_theta": local or (theta if by_layers else full["rope_theta"])}
                                           | windowed)


def check_rope(c: Config, rope: dict) -> dict:
    """Its numbers, and its type as rope_type."""
    kind = rope.get("rope_type") or rope.get("type") or "default"
    kind = {"su": "longrope"}.get(kind, kind)
    if kind not in ROPE_KEYS:
        raise Refusal(f"{c.where}: rope_scaling type {json.dumps(kind)} is not supported")
    needed, optional = map(str.split, ROPE_KEYS[kind])
    common = ("rope_theta", "partial_rotary_factor", "original_max_position_embeddings")
    out = {"rope_type": kind}
    for key, value in rope.items():
        if value is None or key in ("rope_type", "type") or (key == "truncate" and value is True):
            continue
        if key in (*needed, *optional, *common):
            out[key] = value
        elif key in ALL_ROPE_KEYS:
            warn(f"{c.where}: rope_scaling.{key}: not read with rope_type {kind}, so without effect")
        else:
            raise Refusal(f"{c.where}: rope_scaling.{key} = {json.dumps(value)} is not supported with {kind}")
    if missing := [key for key in needed if key not in out]:
        raise Refusal(f"{c.where}: rope_scaling.{missing[0]} is missing")
    return out


def llama3_factors(rope: dict, dim: int) -> np.ndarray:
    """By how much each angle is divided: LLaMA 3.1's long waves by `factor`, its short ones not, those between by
    something between      out (dim / 2)"""
    wave = 2 * math.pi * rope.get("rope_theta", 10000.0) ** (np.arange(0, dim, 2) / dim)
    low, high = rope["low_freq_factor"], rope["high_freq_factor"]
    turns = rope["original_max_position_embeddings"] / wave
    smooth = np.clip((turns - low) / (high - low), 0, 1)
    return 1 / ((1 - smooth) / rope["factor"] + smooth)


def yarn_magnitude(factor: float, scale: float = 1.0) -> float:
    """What YaRN multiplies cosine and sine by, where nothing else is said."""
    return 0.1 * scale * math.log(factor) + 1 if factor > 1 else 1.0


def longrope_magnitude(factor: float, original: int) -> float:
    return math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0


def rotated_part(c: Config, f: Family, rope: dict) -> float:
    """How much of a head is rotated: 0 to 1"""
    partial = rope.get("partial_rotary_factor", c.get("partial_rotary_factor", 1.0))
    if partial == 1 or "partial_rotary_factor" in f.reads:
        return partial
    if rope["rope_type"] != "default":  # which has it read, and the family's code cannot rotate a part
        raise Refusal(f"{c.where}: partial_rotary_factor = {partial} with rope_type {rope['rope_type']} is not one of "
                      f"{f.model_type}")
    warn(f"{c.where}: partial_rotary_factor: not read by a model of type {f.model_type}, so without effect")
    return 1.0


def rope_keys(c: Config, f: Family, head_dim: int, context: int) -> tuple[dict[str, Value], dict[str, Tensor]]:
    """Keys (without the architecture) and tensors that say how positions are rotated in."""
    rope, windowed = read_rope(c)
    kind, dim, theta = rope["rope_type"], int(head_dim * rotated_part(c, f, rope)), rope.get("rope_theta", 10000.0)
    keys, tensors = {"rope.freq_base": f32(theta), "rope.dimension_count": u32(dim)}, {}
    if windowed["rope_type"] != "default":
        raise Refusal(f"{c.where}: rope_parameters.sliding_attention is scaled, which is not supported")
    if f.arch == "gemma3":
        keys["rope.freq_base_swa"] = f32(windowed.get("rope_theta", 10000.0))
    elif windowed.get("rope_theta", theta) != theta:
        raise Refusal(f"{c.where}: rope_parameters.sliding_attention has another rope_theta, which is not supported")
    original = rope.get("original_max_position_embeddings", c.get("original_max_position_embeddings", context))
    if f.arch == "phi3" or kind in ("yarn", "longrope"):
        keys["rope.scaling.original_context_length"] = u32(original)
    if kind in ("linear", "yarn"):
        keys |= {"rope.scaling.type": text(kind), "rope.scaling.factor": f32(rope["factor"])}
    if kind == "llama3":
        tensors["rope_freqs.weight"] = constant(llama3_factors(rope, dim))
    if kind == "yarn":
        usual = magnitude = yarn_magnitude(rope["factor"])
        if rope.get("mscale") and rope.get("mscale_all_dim"):
            magnitude = yarn_magnitude(rope["factor"], rope["mscale"]) \
                / yarn_magnitude(rope["factor"], rope["mscale_all_dim"])
        magnitude = rope.get("attention_factor", magnitude)
        if abs(magnitude - usual) > 1e-6:
            keys["rope.scaling.attn_factor"] = f32(magnitude / usual)
        keys |= {f"rope.scaling.yarn_{key}": f32(rope[key]) for key in ("beta_fast", "beta_slow") if key in rope}
    if kind == "longrope":
        if f.arch != "phi3":
            keys["rope.scaling.type"] = text(kind)
        usual = longrope_magnitude(rope.get("factor", context / original), original)
        keys["rope.scaling.attn_factor"] = f32(rope.get("attention_factor", usual))
        for name in ("long_factor", "short_factor"):
            if len(rope[name]) != dim // 2:
                raise Refusal(f"{c.where}: rope_scaling.{name} has {len(rope[name])} values, expected {dim // 2}")
            tensors[f"rope_factors_{name.split('_')[0]}.weight"] = constant(rope[name])
    return keys, tensors


WINDOW_STEPS = {"gemma2": 2, "gemma3": 6, "olmo2": 4}  # every so manieth layer sees everything


def every_but(step: int, n_layers: int) -> list[bool]:
    return [(i + 1) % step != 0 for i in range(n_layers)]


def usual_windows(arch: str, n_layers: int) -> list[bool]:
    """Which layers llama.cpp takes to have a window where a file has no pattern."""
    return every_but(WINDOW_STEPS[arch], n_layers) if arch in WINDOW_STEPS else [True] * n_layers


def window_keys(c: Config, f: Family, n_layers: int, context: int) -> dict[str, Value]:
    """How far back attention looks, and in which layers. A window that is as long as the context changes nothing."""
    size, kinds, layers = c.get("sliding_window", 0), c.get("layer_types"), usual_windows(f.arch, n_layers)
    if "sliding_window_pattern" in c.values:
        layers = every_but(c.integer("sliding_window_pattern"), n_layers)
    if "max_window_layers" in f.reads:
        layers = [i >= c.get("max_window_layers", 28) for i in range(n_layers)]
    if "use_sliding_window" in keys_read(f) and not c.get("use_sliding_window", False):
        size = 0
    if kinds is not None:
        if len(kinds) != n_layers or set(kinds) - {"full_attention", "sliding_attention"}:
            c.refuse("layer_types")
        layers = [kind == "sliding_attention" for kind in kinds]
    if f.model_type in ("mistral", "mixtral", "phi3") and size and not all(layers):
        c.refuse("layer_types", f"beside sliding_window = {size} is not supported: {f.model_type} has one window for "
                                "all layers")
    if not f.windows and (size == 0 or size >= context or not any(layers)):
        return {}
    keys = {"attention.sliding_window": u32(size)}
    if layers != usual_windows(f.arch, n_layers) and size:
        keys["attention.sliding_window_pattern"] = array(BOOL, layers)
    return keys


def usual_scalar(arch: str, n_layers: int, width: float, head_dim: float) -> float:
    """1 / sqrt(this) is the scale of attention where no key says another; width: D / H"""
    return width if n_layers == {"gemma2": 46, "gemma3": 62}.get(arch) else head_dim


def own_keys(c: Config, f: Family, n_layers: int, width: int, head_dim: int) -> dict[str, Value]:
    """The keys that only this family has      width: D / H"""
    if f.norm_plus_one:  # llama.cpp knows no other scale of attention than the usual one: the key is for cria alone
        scalar, usual = c.real("query_pre_attn_scalar"), usual_scalar(f.arch, n_layers, width, head_dim)
        if scalar != usual:
            warn(f"llama.cpp would take {usual} for query_pre_attn_scalar = {scalar:g}")
            return {"attention.scale": f32(scalar ** -0.5)}
    if f.arch == "stablelm":
        c.get("use_qkv_bias"), c.get("qk_layernorm")  # the tensors say so
        return {"use_parallel_residual": boolean(c.get("use_parallel_residual", False))}
    if f.arch == "smollm3":
        layers = c.get("no_rope_layers", [int(x) for x in every_but(c.get("no_rope_layer_interval", 4), n_layers)])
        if [bool(x) for x in layers] != every_but(4, n_layers):
            raise Refusal(f"{c.where}: no_rope_layers = {json.dumps(layers)} is not supported: llama.cpp's format "
                          f"means every fourth layer")
    if f.experts and c.get("num_experts_per_tok") > (n := c.get("num_local_experts", c.get("num_experts"))):
        c.refuse("num_experts_per_tok", f"of {n} experts is too many")
    return {}


def read_config(values: dict, where: Path) -> tuple[Family, bool, dict[str, Value], dict[str, Tensor]]:
    """config.json as: family, whether the output matrix is the embedding, GGUF's keys, and the tensors that GGUF has
    in place of keys."""
    f = FAMILIES.get(values.get("model_type"))
    if not f:
        raise Refusal(f"{where}: model_type = {json.dumps(values.get('model_type'))} is not supported; known are "
                      f"{', '.join(FAMILIES)}")
    names = ("num_local_experts", "num_experts")  # one name or the other
    values = {names[names[1] in f.integers] if f.experts and k in names else k: v for k, v in values.items()}
    c = Config(values, where, keys_read(f), DEFAULTS | f.defaults)
    if any(not str(name).endswith(("ForCausalLM", "ForConditionalGeneration")) for name in c.get("architectures", [])):
        c.refuse("architectures")
    for key, allowed in f.demands.items():
        c.demand(key, *allowed)
        if key in f.defaults and c.get(key) is None:
            c.refuse(key)
    for key in ("model_type", "attention_bias", "mlp_bias"):
        c.get(key)  # settle_biases() looks whether the tensors say so, too
    D, H = c.integer("hidden_size"), c.integer("num_attention_heads")
    if c.get("head_dim") is None and D % H:
        raise Refusal(f"{c.where}: num_attention_heads = {H} does not divide hidden_size = {D}")
    K = c.integer("head_dim", D // H)
    if not f.any_head_dim and K != D // H:
        c.refuse("head_dim", f"is not supported: llama.cpp's format of {f.arch} means {D // H}")
    n_layers, context = c.integer("num_hidden_layers"), c.integer("max_position_embeddings")
    rotation, tensors = rope_keys(c, f, K, context)
    usual = {"num_key_value_heads": H}
    keys = {gguf: u32(c.integer(hf, usual.get(hf))) for hf, gguf in (INTEGERS | f.integers).items()}
    keys |= {gguf: f32(c.real(hf, DEFAULTS.get(hf))) for hf, gguf in f.scalars.items()
             if hf in DEFAULTS | f.defaults or c.get(hf) is not None} | rotation
    if c.get("head_dim") is not None and f.arch != "granite":
        keys |= {"attention.key_length": u32(K), "attention.value_length": u32(K)}
    keys |= window_keys(c, f, n_layers, context) | own_keys(c, f, n_layers, D // H, K)
    tied = bool(c.get("tie_word_embeddings", False))
    c.finish()
    named = {f"{f.arch}.{key}": value for key, value in keys.items()}
    return f, tied, {"general.architecture": text(f.arch)} | named, tensors


def family_of(model: Model) -> Family:
    """Which of Hugging Face's model types a GGUF model is: of several, the one with experts and windows as it has."""
    candidates = [f for f in FAMILIES.values() if f.arch == model.arch]
    if not candidates:
        raise Refusal(f"{model.source}: models of family {model.arch!r} are not known here")
    has_experts, has_window = (bool(model.value(key)) for key in ("expert_count", "attention.sliding_window"))
    return max(candidates, key=lambda f: (bool(f.experts) == has_experts,
                                          ("sliding_window" in f.reads) == has_window))


def sizes_of(model: Model) -> Sizes:
    """Of its keys, and where there is an embedding already, its number of rows."""
    def number(key: str, otherwise: int | None = None) -> int:
        value = model.value(key, otherwise)
        if not isinstance(value, int):
            raise Refusal(f"{model.source}: {key} is not one number for all layers, which is needed here")
        return value
    D, H, F = number("embedding_length"), number("attention.head_count"), number("feed_forward_length")
    embedding = model.tensors.get("token_embd.weight")
    return Sizes(embedding.shape[0] if embedding else number("vocab_size"), D, H, number("attention.head_count_kv", H),
                 number("attention.key_length", D // max(H, 1)), number("expert_feed_forward_length", F) or F,
                 number("expert_count", 0))


# ==== 6. Tokenizers ====
# GGUF's keys tokenizer.ggml.* from tokenizer.json, SentencePiece's tokenizer.model, Meta's tiktoken text or llama2.c's
# tokenizer.bin; and tokenizer.json from the keys.

NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)


def byte_characters() -> list[str]:
    """GPT-2's printable character for each byte: its own, or, where that cannot be seen, U+0100, U+0101, ..."""
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = iter(range(256, 512))
    return [chr(b) if b in visible else chr(next(hidden)) for b in range(256)]


BYTE_CHARACTERS = byte_characters()

# How byte-level BPE cuts a text into words before it merges, as tokenizer.json spells it, and llama.cpp's name.
# "digits" is the pre-tokenizer Digits, "bytes" ByteLevel with GPT-2's own pattern; patterns are those of Split.
ENGLISH = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
ENGLISH_LONG = r"(?:'[sS]|'[tT]|'[rR][eE]|'[vV][eE]|'[mM]|'[lL][lL]|'[dD])|"
WORDS = r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASED = r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + r"+%s|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER + \
    r"*%s|\p{N}%s| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+"
SUFFIX = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
DEEPSEEK_WORD = r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|""" \
    r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
MARKED_WORDS = WORDS.replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")
CHINESE = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"


def letters_with_case() -> str:
    """DeepSeek LLM's pattern for words in alphabets that have capitals, which names 140 ranges of letters."""
    ranges = """41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C
        38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B
        1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4
        1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113
        2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B
        2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06
        FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
        1E900-1E943"""
    return r"\s?[" + "".join("-".join(chr(int(c, 16)) for c in r.split("-")) for r in ranges.split()) + "]+"


PRE_TOKENIZERS = {
    "gpt-2": ("bytes",),
    "smollm": ("digits", "bytes"),
    "llama-bpe": (ENGLISH + WORDS % "{1,3}",),
    "dbrx": (ENGLISH + WORDS % "{1,3}",),  # the same words, but merged even where a word is a token
    "qwen2": (ENGLISH + WORDS % "",),
    "qwen35": (ENGLISH + MARKED_WORDS % "",),
    "tekken": (CASED % ("", "", ""),),
    "gpt-4o": (CASED % (SUFFIX, SUFFIX, "{1,3}"),),
    "deepseek-v3": (r"\p{N}{1,3}", "[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+", DEEPSEEK_WORD),
    "deepseek-coder": (r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", CHINESE, "digits"),
    "deepseek-llm": (r"[\r\n]", letters_with_case(),
                     "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+", r"\s+$", CHINESE, "digits"),
}
# Other names that llama.cpp has for the same words.
SAME_WORDS = {"gpt-2": "phi-2 jais trillion granite-docling exaone4 mellum a.x-4.0 gigachat modern-bert roberta-bpe "
                       "jina-es jina-de jina-v1-en jina-v2-es jina-v2-de jina-v2-code mpt olmo",
              "smollm": "starcoder refact codeshell exaone minerva-7b mellum2 command-r",
              "llama-bpe": "llama3 llama-v3 falcon3 falcon-h1 pixtral midm-2.0 lfm2 jina-v5-nano glm4 glm5",
              "dbrx": "smaug-bpe chatglm-bpe",
              "qwen2": "deepseek-r1-qwen stablelm2 f2llmv2 hunyuan megrez kormo solar-open grok-2",
              "gpt-4o": "llama4 kanana2 talkie minimax-m2", "deepseek-v3": "hunyuan-dense joyai-llm hy_v4"}
# What these names imply where a GGUF file is silent; a tokenizer.json never is. README says where it was looked up.
COMPOSED = "qwen2 deepseek-r1-qwen stablelm2 f2llmv2 qwen35 mpt olmo command-r".split()
IGNORE_MERGES = ["llama-bpe", "tekken", *SAME_WORDS["llama-bpe"].split()]


def steps_of(part: Any) -> list[dict]:
    """A normalizer, pre_tokenizer, ... of tokenizer.json as a list of such, without sequences."""
    if not part or part["type"] != "Sequence":
        return [part] if part else []
    inner = next(value for value in part.values() if isinstance(value, list))
    return [step for p in inner for step in steps_of(p)]


def split_step(pre: dict) -> str:
    """A step of a pre_tokenizer in the words of PRE_TOKENIZERS; "" what changes nothing; `?...` what is not there."""
    kind, pattern = pre["type"], pre.get("pattern", {})
    if kind == "Digits" and pre.get("individual_digits"):
        return "digits"
    if kind == "ByteLevel":
        if pre.get("add_prefix_space"):
            return "?ByteLevel with add_prefix_space = true"
        return "bytes" if pre.get("use_regex", True) else ""
    how = pre.get("behavior"), bool(pre.get("invert"))
    newline = pattern.get("String") == "\n" and how == ("Isolated", False)
    if kind == "Split" and how in (("Isolated", False), ("Removed", True)) and ("Regex" in pattern or newline):
        regex = pattern.get("Regex", "\n").replace("\r", r"\r").replace("\n", r"\n").replace(ENGLISH_LONG, ENGLISH)
        return "digits" if regex == r"\p{N}" else regex
    return f"?{kind}"


def recognise_pre_tokenizer(tokenizer: dict, where: Path) -> str:
    steps = tuple(filter(None, map(split_step, steps_of(tokenizer.get("pre_tokenizer")))))
    name = next((name for name, known in PRE_TOKENIZERS.items() if known == steps), None)
    if not name:
        raise Refusal(f"{where}: its pre-tokenizer ({', '.join(steps) or 'none'}) is not known; "
                      f"name the one that splits texts alike: --pre NAME")
    return "dbrx" if name == "llama-bpe" and not tokenizer["model"].get("ignore_merges") else name


TAKES_WHITE = {"lstrip": 1, "rstrip": 2}  # on which side a token takes the white space: bits of a key of cria's own


class Vocabulary:
    """Tokens by id, with type and score, while they are collected from several files."""

    def __init__(self, size: int):
        """size: of the embedding"""
        self.size, self.pieces, self.takes = size, {}, {}

    def put(self, i: int, token: str, kind: int, score: float = 0.0) -> None:
        self.pieces[i] = token, kind, score

    def add(self, added: list[dict]) -> None:
        """Tokens beside the trained ones, as tokenizer.json has them. The model has no row for some."""
        for t in added:
            if t["id"] >= self.size:
                warn(f"token {t['id']}, {t['content']}, is beyond vocab_size = {self.size} and left out")
                continue
            special = t["special"] or looks_special(t["content"])
            self.put(t["id"], t["content"], CONTROL if special else USER_DEFINED, -1000.0)
            self.takes[t["id"]] = sum(bit for flag, bit in TAKES_WHITE.items() if t.get(flag))

    def keys(self, where: Path, pre: str | None = None) -> dict[str, Value]:
        """pre: the pre-tokenizer of byte-level BPE; None: a vocabulary of SentencePiece, which has scores"""
        if self.pieces and max(self.pieces) >= self.size:
            raise Refusal(f"{where}: token {max(self.pieces)} is beyond vocab_size = {self.size}")
        pieces = [self.pieces.get(i, (f"[PAD{i}]", UNUSED, -10000.0)) for i in range(self.size)]
        keys = {"model": text("gpt2" if pre else "llama"), "pre": text(pre or "default"),
                "tokens": array(STRING, [token for token, _, _ in pieces]),
                "token_type": array(I32, [kind for _, kind, _ in pieces])}
        if not pre:
            keys["scores"] = array(F32, [score for _, _, score in pieces])
        if any(self.takes.values()):
            keys["takes_white"] = array(I32, [self.takes.get(i, 0) for i in range(self.size)])
        return ggml_keys(keys)


def ggml_keys(keys: dict[str, Value]) -> dict[str, Value]:
    return {f"tokenizer.ggml.{name}": value for name, value in keys.items()}


def id_keys(keys: dict[str, Value], **tokens: str) -> dict[str, Value]:
    """The ids of special tokens, of those that the vocabulary has      tokens: bos="<s>", ..."""
    known = keys["tokenizer.ggml.tokens"].data
    return {f"tokenizer.ggml.{name}_token_id": u32(known.index(token)) for name, token in tokens.items()
            if token in known}


def looks_special(token: str) -> bool:
    """Some checkpoints do not mark these as special, but they are no text."""
    return bool(re.fullmatch(r"<pad>|<mask>|<2mass>|\[@BOS@\]|<\|.*\|>|<\uff5c.*\uff5c>|<unused.*>", token, re.S))


# -- tokenizer.json --

def added_tokens(tokenizer: dict, config: dict, more: dict) -> list[dict]:
    """From added_tokens.json, tokenizer_config.json and tokenizer.json; the last has the last word. Each as there:
    id, content, special, normalized, lstrip, rstrip, single_word"""
    found = {i: {"content": t} for t, i in more.items()}
    found |= {int(i): dict(t) for i, t in config.get("added_tokens_decoder", {}).items()}
    found |= {t["id"]: dict(t) for t in tokenizer.get("added_tokens", [])}
    return [t | {"id": i, "special": bool(t.get("special"))} for i, t in sorted(found.items())]


def check_added(added: list[dict], size: int, where: Path, refused: tuple[str, ...] = ("single_word",),
                late: bool = False) -> None:
    """Refuses tokens that are found as whole words only, or in another order      refused: flags that the C program
    does not obey      late: those with `normalized` are found where spaces are U+2581, so that none is taken"""
    for t in added:
        flags = [*refused, *(TAKES_WHITE if late and t.get("normalized") else ())]
        if flags := [flag for flag in flags if t.get(flag) and t["id"] < size]:
            raise Refusal(f"{where}: added token {t['content']} has {flags[0]} = true, which the C program does not "
                          "obey yet")
    first = [t["content"] for t in added if not t.get("normalized") and t["content"]]
    for t in added:
        if t.get("normalized") and (within := [s for s in first if s in t["content"]]):
            raise Refusal(f"{where}: added token {t['content']} (normalized = true) is never found, for {within[0]} is "
                          "found before, which is not supported")


def check_bpe(model: dict, more: str, where: Path) -> None:
    """What the C program's BPE has not, whatever the vocabulary      more: of this kind of vocabulary"""
    for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix", more):
        if model.get(key):
            raise Refusal(f"{where}: its BPE has {key} = {json.dumps(model[key])}, which is not supported")


def check_steps(tokenizer: dict, part: str, allowed: tuple[dict, ...], where: Path) -> list[dict]:
    """The steps of a part of tokenizer.json, each of which must be as one of those allowed in all that this says."""
    steps = steps_of(tokenizer.get(part))
    for step in steps:
        if not any(known.items() <= step.items() for known in allowed):
            raise Refusal(f"{where}: {part} {json.dumps(step)[:200]} is not supported")
    return steps


def byte_level_keys(tokenizer: dict, added: list[dict], size: int, pre: str, where: Path) -> dict[str, Value]:
    model, vocabulary = tokenizer["model"], Vocabulary(size)
    check_bpe(model, "byte_fallback", where)
    if model.get("unk_token") and not set(BYTE_CHARACTERS) <= model["vocab"].keys():
        raise Refusal(f"{where}: unk_token = {json.dumps(model['unk_token'])} stands for bytes that have no token, "
                      "which is not supported")
    check_added(added, size, where)
    check_steps(tokenizer, "decoder", ({"type": "ByteLevel"},), where)
    composes = bool(check_steps(tokenizer, "normalizer", ({"type": "NFC"},), where))
    for t in added if composes else []:
        composing = not t["content"].isascii() or t["content"][-1:].isalpha()
        if t.get("normalized") and composing:  # its end with a mark after it, or a text that becomes it
            raise Refusal(f"{where}: added token {t['content']} is looked for in NFC (normalized = true), which is not "
                          "supported")
    for token, i in model["vocab"].items():
        vocabulary.put(i, token, NORMAL)
    vocabulary.add(added)
    merges = [m if isinstance(m, str) else " ".join(part.replace(" ", "\u0120") for part in m) for m in model["merges"]]
    return vocabulary.keys(where, pre) | ggml_keys({
        "merges": array(STRING, merges), "normalizer.nfc": boolean(composes),
        "ignore_merges": boolean(model.get("ignore_merges"))})


# What tokenizer.json does about spaces where the vocabulary is SentencePiece's.
SPACES_AS_BARS = {"type": "Replace", "pattern": {"String": " "}, "content": "\u2581"}
BARS_AS_SPACES = {"type": "Replace", "pattern": {"String": "\u2581"}, "content": " "}
BAR_FIRST = {"type": "Prepend", "prepend": "\u2581"}
STRIP_FIRST = {"type": "Strip", "content": " ", "start": 1, "stop": 0}
METASPACE = {"type": "Metaspace", "replacement": "\u2581"}
CUTS_AT_SPACES = {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious", "invert": False}
SPM_DECODERS = (BARS_AS_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}, STRIP_FIRST, {"type": "Metaspace"})
# How a text is prefixed and added tokens are found, where it is not as SentencePiece does it.
# These keys are cria's own, in the order of the flags of a native file.
SPM_FLAGS = tuple(f"tokenizer.ggml.{name}" for name in ("space_prefix.first", "space_prefix.unless_space",
                                                        "added_tokens_first", "space_prefix.last"))
SCHEME_KEYS = {"always": SPM_FLAGS[1:2], "first": SPM_FLAGS[:2]}


def spm_prefix(tokenizer: dict, where: Path) -> str:
    """What tokenizer.json puts before a text: "" nothing; "prepend" a space before each part between added tokens;
    "always" the same where there is none yet; "first" so before the text only. Refuses what changes more."""
    steps = check_steps(tokenizer, "normalizer", (SPACES_AS_BARS, BAR_FIRST), where)
    pres = check_steps(tokenizer, "pre_tokenizer", (METASPACE, CUTS_AT_SPACES), where)
    metaspaces = [pre for pre in pres if pre["type"] == "Metaspace"]
    if SPACES_AS_BARS not in steps and len(metaspaces) < max(len(pres), 1):  # else none is left to cut at
        raise Refusal(f"{where}: neither its normalizer nor its pre_tokenizer makes U+2581 of spaces, which is not "
                      "supported for SentencePiece's BPE")
    prefix = "prepend" if BAR_FIRST in steps else ""
    for pre in metaspaces:
        scheme = pre.get("prepend_scheme", "always" if pre.get("add_prefix_space", True) else "never")
        prefix = prefix or {"never": ""}.get(scheme, scheme)
        inner = [t for t in tokenizer["model"]["vocab"] if "\u2581" in t[1:]]
        if pre.get("split", True) and inner:
            raise Refusal(f"{where}: Metaspace splits (split = true), so that {json.dumps(inner[0])} never comes "
                          "of a text, which is not supported")
    return prefix


def place_added(tokenizer: dict, added: list[dict], prefix: str, where: Path) -> tuple[list[dict], bool]:
    """Added tokens as the C program finds them, and whether those that are text are found before a text gets its
    prefix. Those with `normalized` are found after the normalizer, which has gone over their own text, too."""
    entries, raw, late = [], [], []
    for t in added:
        content = t["content"]
        if t["special"] or looks_special(content):
            if t.get("normalized") and prefix == "prepend":
                warn(f"{where}: special token {content} has normalized = true, so that its own tokenizer finds it "
                     "after a space only; here it is found everywhere")
        elif t.get("normalized") and tokenizer.get("normalizer"):
            late.append(content)
            content = ("\u2581" if prefix == "prepend" else "") + content.replace(" ", "\u2581")
        elif "\u2581" in content:  # which no text has: it can only come of merging
            if content not in tokenizer["model"]["vocab"]:
                raise Refusal(f"{where}: added token {content} is found in texts that have U+2581, only")
            continue
        else:
            raw.append(content)
        entries.append(t | {"content": content})
    if raw and late and prefix:
        raise Refusal(f"{where}: added token {raw[0]} is found before the normalizer, {late[0]} after it "
                      "(normalized = true), which is not supported")
    return entries, bool(raw and prefix)


def spm_json_keys(tokenizer: dict, added: list[dict], size: int, where: Path) -> dict[str, Value]:
    """SentencePiece's BPE as tokenizer.json has it. Merges come in the order of the scores: a piece's score is how
    early it is merged."""
    model, vocabulary = tokenizer["model"], Vocabulary(size)
    check_bpe(model, "ignore_merges", where)
    prefix = spm_prefix(tokenizer, where)
    check_added(added, size, where, late=bool(tokenizer.get("normalizer")))
    check_steps(tokenizer, "decoder", SPM_DECODERS, where)
    entries, raw = place_added(tokenizer, added, prefix, where)
    first: dict[str, int] = {}
    for rank, merge in enumerate(model["merges"]):
        first.setdefault("".join(merge.split(" ") if isinstance(merge, str) else merge), rank)
    unknown = model.get("unk_token")
    for token, i in model["vocab"].items():
        is_byte = re.fullmatch("<0x[0-9A-F]{2}>", token)
        kind = UNKNOWN if token == unknown else BYTE if is_byte else NORMAL
        vocabulary.put(i, token, kind, 0.0 if kind != NORMAL else -float(first.get(token, len(first))))
    vocabulary.add([t for t in entries if t["content"] != unknown])
    flags = dict.fromkeys((*SCHEME_KEYS.get(prefix, ()), *(SPM_FLAGS[2:3] if raw else ())), boolean(True))
    return vocabulary.keys(where) | ggml_keys({"add_space_prefix": boolean(prefix)}) | flags


# -- SentencePiece's tokenizer.model --

def read_sentencepiece(path: Path) -> Any:
    """A ModelProto."""
    try:
        from google.protobuf.message import DecodeError
        from sentencepiece import sentencepiece_model_pb2
    except ImportError:
        raise Refusal(f"{path}: to read a SentencePiece model: python3 -m pip install sentencepiece protobuf") from None
    try:
        return sentencepiece_model_pb2.ModelProto.FromString(path.read_bytes())
    except DecodeError:
        raise Refusal(f"{path}: not a SentencePiece model, or cut short") from None


def spm_model_keys(path: Path, added: list[dict], size: int, config: dict | None = None) -> dict[str, Value]:
    """size: of the embedding; 0: as many as there are      config: tokenizer_config.json"""
    proto = read_sentencepiece(path)
    trainer, normalizer = proto.trainer_spec, proto.normalizer_spec
    if trainer.model_type != 2:
        raise Refusal(f"{path}: its model_type is {trainer.model_type}, expected 2 (BPE)")
    prefix = normalizer.add_dummy_prefix
    if config and config.get("add_prefix_space") is False and prefix:
        warn(f"{path.parent / 'tokenizer_config.json'}: add_prefix_space is false, so no space is put before a text, "
             f"whatever {path.name} says")
        prefix = False
    suffix = trainer.treat_whitespace_as_suffix and prefix
    for name, holds in (("precompiled_charsmap", normalizer.precompiled_charsmap),
                        ("precompiled_charsmap", proto.denormalizer_spec.precompiled_charsmap),
                        ("remove_extra_whitespaces = true", normalizer.remove_extra_whitespaces),
                        ("escape_whitespaces = false", not normalizer.escape_whitespaces)):
        if holds:
            raise Refusal(f"{path}: {name}, which the C program does not obey yet")
    vocabulary = Vocabulary(size or len(proto.pieces))
    check_added(added, vocabulary.size, path, ("single_word", *TAKES_WHITE))
    for i, piece in enumerate(proto.pieces[:vocabulary.size]):
        vocabulary.put(i, piece.piece, piece.type, piece.score)
    unknown = {i for i, (_, kind, _) in vocabulary.pieces.items() if kind == UNKNOWN}
    vocabulary.add([t for t in added if t["id"] not in unknown])
    return vocabulary.keys(path) | ggml_keys({"add_space_prefix": boolean(prefix)}) | \
        ({SPM_FLAGS[3]: boolean(True)} if suffix else {})


# -- Tokens with ranks: Meta's tiktoken text, Mistral's tekken.json --

def is_tiktoken(path: Path) -> bool:
    with path.open("rb") as file:
        return re.fullmatch(rb"[A-Za-z0-9+/]+=* \d+", file.readline(200).strip()) is not None


def merge_of(token: bytes, ranks: dict[bytes, int]) -> tuple[bytes, bytes] | None:
    """The last two parts that merging makes of a token. Some merges that lead to it may come after its own: then it is
    found within a longer word only."""
    parts = [token[i:i + 1] for i in range(len(token))]
    while len(parts) > 2:
        joined = [ranks.get(a + b, math.inf) for a, b in zip(parts, parts[1:])]
        i = joined.index(min(joined))
        if joined[i] == math.inf:
            return None
        parts[i:i + 2] = [parts[i] + parts[i + 1]]
    return (parts[0], parts[1]) if len(parts) == 2 else None


MAX_RANKED = 512  # bytes of a token: what merging makes of it takes the square of that; published ones have 128


def rank_keys(ranks: dict[bytes, int], special: dict[int, str], first: int, size: int, pre: str,
              where: Path) -> dict[str, Value]:
    """A vocabulary that is given as tokens with ranks: a rank, from `first` on, is an id, and orders the merges."""
    def spell(part: bytes) -> str:
        return "".join(BYTE_CHARACTERS[b] for b in part)
    if long := [token for token in ranks if len(token) > MAX_RANKED]:
        raise Refusal(f"{where}: a token has {len(long[0])} bytes, more than {MAX_RANKED}")
    pairs = (merge_of(token, ranks) for token in sorted(ranks, key=ranks.get))
    model = {"vocab": {spell(t): first + i for t, i in ranks.items()}, "ignore_merges": True,
             "merges": [f"{spell(p[0])} {spell(p[1])}" for p in pairs if p]}
    added = [{"id": i, "content": token, "special": True} for i, token in special.items()]
    return byte_level_keys({"model": model}, added, size, pre, where) | ggml_keys({"add_bos_token": boolean(True)})


LLAMA3_SPECIAL = {0: "begin_of_text", 1: "end_of_text", 6: "start_header_id", 7: "end_header_id", 9: "eot_id"}
LLAMA31_SPECIAL = LLAMA3_SPECIAL | {4: "finetune_right_pad_id", 8: "eom_id", 10: "python_tag"}


def tiktoken_keys(path: Path, size: int, with_tools: bool) -> dict[str, Value]:
    """LLaMA 3's: lines of "base64 rank", and 256 special tokens, of which 3.1 (with_tools) names three more."""
    ranks = {}
    try:
        for line in path.read_bytes().splitlines():
            encoded, rank = line.split()
            ranks[base64.b64decode(encoded, validate=True)] = int(rank)
    except ValueError:
        raise Refusal(f"{path}: not a tiktoken file: expected lines of base64 and a number") from None
    if len(ranks) + 256 > size:
        raise Refusal(f"{path}: {len(ranks)} tokens and 256 special ones are more than vocab_size = {size}")
    if len(ranks) == 200_000:
        raise Refusal(f"{path}: this is LLaMA 4's vocabulary, which is not supported; LLaMA 3's has 128,000 tokens")
    named = LLAMA31_SPECIAL if with_tools else LLAMA3_SPECIAL
    reserved = (f"reserved_special_token_{n}" for n in range(256))
    special = {len(ranks) + i: f"<|{named.get(i) or next(reserved)}|>" for i in range(256)}
    keys = rank_keys(ranks, special, 0, size, "llama-bpe", path)
    return keys | id_keys(keys, bos="<|begin_of_text|>", eos="<|end_of_text|>", eot="<|eot_id|>", eom="<|eom_id|>")


# The first special tokens of tekken.json where it does not name them: versions up to 7.
TEKKEN_SPECIAL = ("<unk> <s> </s> [INST] [/INST] [AVAILABLE_TOOLS] [/AVAILABLE_TOOLS] [TOOL_RESULTS] [/TOOL_RESULTS] "
                  "[TOOL_CALLS] [IMG] <pad> [IMG_BREAK] [IMG_END] [PREFIX] [MIDDLE] [SUFFIX] [SYSTEM_PROMPT] "
                  "[/SYSTEM_PROMPT] [TOOL_CONTENT]").split()


def tekken_keys(path: Path, size: int) -> dict[str, Value]:
    """{"config": {"pattern", "default_num_special_tokens", "version"}, "vocab": [{"rank", "token_bytes" in base64}],
    "special_tokens": [{"rank", "token_str"}] or none}: special tokens come first, and only as many of the others are
    used as the model has rows for."""
    tekken = read_json(path)
    try:
        config, n_special = tekken["config"], tekken["config"]["default_num_special_tokens"]
        named = tekken.get("special_tokens")
        if named is None and int(config["version"].strip("v").split("m")[0]) > 7:
            raise Refusal(f"{path}: version {config['version']} without special_tokens is not supported")
        special = {i: f"<SPECIAL_{i}>" for i in range(n_special)}
        special |= dict(enumerate(TEKKEN_SPECIAL)) if named is None else {t["rank"]: t["token_str"] for t in named}
        if (config["pattern"],) != PRE_TOKENIZERS["tekken"]:
            raise Refusal(f"{path}: its pattern ({config['pattern']}) is not known")
        ranks = {base64.b64decode(token["token_bytes"]): token["rank"] for token in tekken["vocab"]
                 if token["rank"] < size - n_special}
    except (KeyError, TypeError, ValueError, AttributeError) as error:
        raise Refusal(f"{path}: not as mistral_common reads it: {error!r}") from None
    keys = rank_keys(ranks, special, n_special, size, "tekken", path)
    return keys | id_keys(keys, unknown="<unk>", padding="<pad>", bos="<s>", eos="</s>")


# -- llama2.c's tokenizer.bin --

def llama2c_tokenizer_keys(path: Path, size: int) -> dict[str, Value]:
    """| i32 longest piece | then per token | f32 score | i32 length | bytes |. Ids 0, 1, 2 are <unk>, <s>, </s>, 3 to
    258 the bytes."""
    c, vocabulary = Bytes(path), Vocabulary(size)
    c.take(4)
    for i in range(size):
        score, piece = c.number(F32), c.take(c.number(U32)).decode("utf-8", "surrogateescape")
        vocabulary.put(i, piece.replace(" ", "\u2581"), NORMAL, score)
        if i < 3:
            vocabulary.put(i, ("<unk>", "<s>", "</s>")[i], UNKNOWN if i == 0 else CONTROL, score)
        elif i < 259:
            vocabulary.put(i, f"<0x{i - 3:02X}>", BYTE, score)
    return vocabulary.keys(path) | ggml_keys({
        "bos_token_id": u32(1), "eos_token_id": u32(2), "eot_token_id": u32(1),  # its stories follow each other
        "unknown_token_id": u32(0), "add_bos_token": boolean(True), "add_space_prefix": boolean(True)})


def llama2c_tokenizer(model: Model) -> bytes | None:
    """tokenizer.bin of a SentencePiece vocabulary in llama2.c's order of ids; None if it has another."""
    tokens, types = model.get("tokenizer.ggml.tokens", []), model.get("tokenizer.ggml.token_type", [])
    if model.get("tokenizer.ggml.model") != "llama" or len(tokens) < 259 or any(t != BYTE for t in types[3:259]):
        return None
    texts = [t.replace("\u2581", " ").encode("utf-8", "surrogateescape") for t in tokens]
    texts[1:3] = b"\n<s>\n", b"\n</s>\n"
    parts = [struct.pack("<i", max(map(len, texts)))]
    for score, piece in zip(model.get("tokenizer.ggml.scores"), texts):
        parts += [struct.pack("<fi", score, len(piece)), piece]
    return b"".join(parts)


# -- A Hugging Face folder's --

def added_ends(tokenizer: dict, where: Path) -> list[list[tuple[int, str]]]:
    """The special tokens that the post-processor puts before a text, and those after it: (id, text)"""
    ends: list = [[], []]
    for p in steps_of(tokenizer.get("post_processor")):
        if p["type"] in ("BertProcessing", "RobertaProcessing"):
            new = [[(p[name][1], p[name][0])] for name in ("cls", "sep")]
        elif p["type"] == "TemplateProcessing":
            names = [next(iter(piece.items())) for piece in p["single"]]
            at = [i for i, (what, _) in enumerate(names) if what == "Sequence"]
            if len(at) != 1:
                raise Refusal(f"{where}: its post_processor has a text {len(at)} times, expected once")
            new = [[(i, token) for _, special in part for entry in [p["special_tokens"][special["id"]]]
                    for i, token in zip(entry["ids"], entry["tokens"])] for part in (names[:at[0]], names[at[0] + 1:])]
        elif p["type"] == "ByteLevel":
            continue
        else:
            raise Refusal(f"{where}: post_processor {p['type']} is not supported")
        if any(new) and any(ends):
            raise Refusal(f"{where}: several steps of its post_processor add tokens, which is not supported")
        ends = new if any(new) else ends
    if len(most := max(ends, key=len)) > 4:
        raise Refusal(f"{where}: its post_processor puts {len(most)} tokens on one side of a text; supported are at "
                      "most 4")
    return ends


def chat_template(folder: Path, config: dict) -> str | None:
    if (folder / "chat_template.jinja").is_file():
        return (folder / "chat_template.jinja").read_text("utf-8")
    template = config.get("chat_template") or read_json(folder / "chat_template.json").get("chat_template")
    if isinstance(template, list):  # several, by name
        named = {t.get("name"): t.get("template") for t in template}
        template = named.get("default", next(iter(named.values()), None))
    return template if isinstance(template, str) else None


def special_keys(folder: Path, config: dict, hf_config: dict, tokens: list[str]) -> dict[str, Value]:
    """The ids of special tokens: as tokenizer_config.json names them, else as the other files number them."""
    def numbered(key: str) -> list[int]:
        """Of generation_config.json, then of config.json, those that the model has."""
        lists = [ids if isinstance(ids, list) else [ids] for ids in (generation.get(key), hf_config.get(key))]
        return [i for ids in lists for i in ids if isinstance(i, int) and 0 <= i < len(tokens)]
    generation, keys = read_json(folder / "generation_config.json"), {}
    for name, gguf in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        token = config.get(f"{name}_token")
        token = token.get("content") if isinstance(token, dict) else token
        ids = [tokens.index(token)] if token in tokens else numbered(f"{name}_token_id")[::-1]
        if ids:
            keys[f"tokenizer.ggml.{gguf}_token_id"] = u32(ids[0])
    eos = keys.get("tokenizer.ggml.eos_token_id")
    return keys | end_keys([i for i in dict.fromkeys(numbered("eos_token_id")) if not eos or i != eos.data])


AROUND = {"bos": "tokenizer.ggml.text_begin_ids", "eos": "tokenizer.ggml.text_end_ids"}  # cria's own: more than one


def end_flags(tokenizer: dict, config: dict, keys: dict[str, Value], folder: Path) -> dict[str, Value]:
    """Whether a begin and an end token are added to a text. Where there is a tokenizer.json, its post_processor says
    so, as in transformers; one token must be that which the other files name, if they name one."""
    where, flags = folder / "tokenizer.json", {}
    for name, found in zip(AROUND, added_ends(tokenizer, where)):
        key, explicit = f"tokenizer.ggml.{name}_token_id", config.get(f"add_{name}_token")
        if not isinstance(explicit, bool):
            explicit = None
        adds = bool(found)
        if found and found[0][0] < len(keys["tokenizer.ggml.tokens"].data):
            flags |= {} if key in keys else {key: u32(found[0][0])}
        if len(found) == 1 and (keys | flags).get(key) != u32(found[0][0]):
            raise Refusal(f"{where}: its post_processor adds {found[0][1]}, which is not {name}_token")
        if len(found) > 1:
            flags[AROUND[name]] = array(U32, [i for i, _ in found])
        if tokenizer and explicit not in (None, adds):
            warn(f"{folder / 'tokenizer_config.json'}: add_{name}_token has no effect: what {where.name} says counts")
        if not tokenizer:  # SentencePiece's users add a begin token where nothing says otherwise
            adds = name == "bos" if explicit is None else explicit
        flags[f"tokenizer.ggml.add_{name}_token"] = boolean(adds)
    return flags


def folder_tokenizer_keys(folder: Path, hf_config: dict, size: int, pre: str | None) -> dict[str, Value]:
    """The keys tokenizer.* of a Hugging Face folder. tokenizer.json counts, where there is one, as in transformers."""
    config, more = read_json(folder / "tokenizer_config.json"), read_json(folder / "added_tokens.json")
    if "added_tokens_decoder" not in config:  # else the other file is not read, as in transformers
        config |= {k: v for k, v in read_json(folder / "special_tokens_map.json").items() if v is not None}
    path, spm_path, tekken = (folder / name for name in ("tokenizer.json", "tokenizer.model", "tekken.json"))
    tokenizer = read_json(path)
    kind = (tokenizer.get("model") or {}).get("type", "BPE" if tokenizer else None)
    if tokenizer and kind != "BPE":
        raise Refusal(f"{path}: a tokenizer of type {kind} is not supported, only BPE")
    try:
        added = added_tokens(tokenizer, config, more)
        if tokenizer and not tokenizer["model"].get("byte_fallback"):
            if config.get("add_prefix_space"):
                raise Refusal(f"{folder / 'tokenizer_config.json'}: add_prefix_space = true is not supported for "
                              "byte-level BPE")
            keys = byte_level_keys(tokenizer, added, size, pre or recognise_pre_tokenizer(tokenizer, path), path)
        elif tokenizer:
            keys = spm_json_keys(tokenizer, added, size, path)
        elif spm_path.is_file() and not is_tiktoken(spm_path):
            keys = spm_model_keys(spm_path, added, size, config)
        elif tekken.is_file():
            keys = tekken_keys(tekken, size)
            config = {f"{name}_token": token for name, token in zip(("unk", "bos", "eos"), TEKKEN_SPECIAL)} | config
        else:
            raise Refusal(f"{folder}: has neither tokenizer.json nor SentencePiece's tokenizer.model nor tekken.json")
        keys |= special_keys(folder, config, hf_config, keys["tokenizer.ggml.tokens"].data)
        keys |= end_flags(tokenizer, config, keys, folder)
    except (KeyError, TypeError, AttributeError, IndexError) as error:
        raise Refusal(f"{path}: not as tokenizers writes it: {error!r}") from None
    template = chat_template(folder, config)
    return keys | ({"tokenizer.chat_template": text(template)} if template else {})


# -- GGUF's keys -> tokenizer.json --

def pre_tokenizer_json(name: str, where: Path) -> dict:
    """The inverse of recognise_pre_tokenizer()."""
    name = next((first for first, others in SAME_WORDS.items() if name in others.split()), name)
    if name not in PRE_TOKENIZERS:
        raise Refusal(f"{where}: no tokenizer.json can be made for the pre-tokenizer {name!r}")
    digits = {"type": "Digits", "individual_digits": True}
    steps = [digits if step == "digits" else BYTE_LEVEL if step == "bytes" else
             {"type": "Split", "pattern": {"Regex": step}, "behavior": "Isolated", "invert": False}
             for step in PRE_TOKENIZERS[name]]
    if BYTE_LEVEL not in steps:
        steps.append(BYTE_LEVEL | {"use_regex": False})
    return {"type": "Sequence", "pretokenizers": steps} if len(steps) > 1 else steps[0]


BYTE_LEVEL = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}


def merges_of_scores(tokens: list[str], scores: np.ndarray, types: np.ndarray) -> list[list[str]]:
    """SentencePiece merges the pair whose piece has the highest score: all pairs in the order of their scores."""
    ids = {token: i for i, token in enumerate(tokens) if types[i] == NORMAL}
    pairs = [(-scores[i], ids[token[:cut]], ids[token[cut:]], token[:cut], token[cut:])
             for token, i in ids.items() for cut in range(1, len(token)) if token[:cut] in ids and token[cut:] in ids]
    return [[left, right] for *_, left, right in sorted(pairs)]


def tokenizer_json(model: Model) -> dict:
    """tokenizer.json of a model that has none."""
    def get(key: str, otherwise: Any = None) -> Any:
        return model.get(f"tokenizer.ggml.{key}", otherwise)
    tokens, spm, pre = get("tokens", []), get("model") == "llama", get("pre", "default")
    types = np.asarray(get("token_type", np.ones(len(tokens))))
    takes = get("takes_white", np.zeros(len(tokens), int))
    added = [{"id": i, "content": token, "single_word": False, "normalized": False,
              "special": bool(types[i] != USER_DEFINED)} | {flag: bool(takes[i] & b) for flag, b in TAKES_WHITE.items()}
             for i, token in enumerate(tokens) if types[i] in (UNKNOWN, CONTROL, USER_DEFINED)]
    bpe = {"type": "BPE", "dropout": None, "unk_token": None, "continuing_subword_prefix": None,
           "end_of_word_suffix": None, "fuse_unk": spm, "byte_fallback": spm,
           "ignore_merges": not spm and bool(get("ignore_merges", pre in IGNORE_MERGES)),
           "vocab": {token: i for i, token in enumerate(tokens) if types[i] != UNUSED}}
    made = {"version": "1.0", "truncation": None, "padding": None, "added_tokens": added, "normalizer": None,
            "pre_tokenizer": None, "post_processor": template_json(model, tokens), "decoder": BYTE_LEVEL, "model": bpe}
    if spm:
        bpe["unk_token"] = next((token for i, token in enumerate(tokens) if types[i] == UNKNOWN), None)
        bpe["merges"] = merges_of_scores(tokens, get("scores", np.zeros(len(tokens))), types)
        return made | spaces_json(model, added, bpe["vocab"])
    bpe["merges"] = [m.split(" ") for m in get("merges", [])]
    if get("normalizer.nfc", pre in COMPOSED):
        made["normalizer"] = {"type": "NFC"}
    return made | {"pre_tokenizer": pre_tokenizer_json(pre, model.source)}


def spaces_json(model: Model, added: list[dict], vocab: dict[str, int]) -> dict:
    """How spaces become U+2581 and back: the inverse of spm_prefix() and place_added(), which changes `added`, too."""
    space = bool(model.get("tokenizer.ggml.add_space_prefix", True))
    first, unless_space, raw, last = (bool(model.get(key)) for key in SPM_FLAGS)
    if last or (first and not unless_space):
        raise Refusal(f"{model.source}: no tokenizer.json can be made for {SPM_FLAGS[3 if last else 0]} alone")
    made = {"normalizer": {"type": "Sequence", "normalizers": [BAR_FIRST] * space + [SPACES_AS_BARS]}}
    if unless_space:
        made = {"pre_tokenizer": METASPACE | {"split": False, "prepend_scheme": "first" if first else "always"}}
    for t in added:  # what is found after the prefix was put
        if space and not unless_space and not raw and not t["special"] and t["content"][0] in " \u2581":
            vocab[t["content"][1:]] = vocab.pop(t["content"])
            t |= {"content": t["content"][1:], "normalized": True}
    decoders = [BARS_AS_SPACES, {"type": "ByteFallback"}, {"type": "Fuse"}] + [STRIP_FIRST] * space
    return made | {"decoder": {"type": "Sequence", "decoders": decoders}}


def template_json(model: Model, tokens: list[str]) -> dict | None:
    """The post-processor that adds the begin and end tokens that the model wants."""
    usual, ends = {"bos": model.get("tokenizer.ggml.model") == "llama"}, {"bos": [], "eos": []}
    for name in ends:
        i = model.get(f"tokenizer.ggml.{name}_token_id")
        if model.get(f"tokenizer.ggml.add_{name}_token", usual.get(name)) and i is not None:
            ends[name] = [int(i) for i in model.get(AROUND[name], [i])]
    if not any(ends.values()):
        return None

    def around(letter: str, type_id: int) -> list[dict]:
        bos, eos = ([{"SpecialToken": {"id": tokens[i], "type_id": type_id}} for i in ids] for ids in ends.values())
        return [*bos, {"Sequence": {"id": letter, "type_id": type_id}}, *eos]
    special = {tokens[i]: {"id": tokens[i], "ids": [i], "tokens": [tokens[i]]} for i in sum(ends.values(), [])}
    return {"type": "TemplateProcessing", "single": around("A", 0), "pair": around("A", 0) + around("B", 1),
            "special_tokens": special}


# ==== 7. Sources ====

@dataclass(frozen=True)
class Choices:
    """What the command line says about reading a source."""
    tokenizer: Path | None = None
    pre: str | None = None
    context: int | None = None


def open_source(path: Path, choices: Choices) -> Model:
    """A checkpoint of any kind: folders by their files, files by their first bytes."""
    if path.is_dir():
        if (path / "config.json").is_file():
            return open_hf(path, choices)
        if (path / "params.json").is_file():
            return open_meta(path, choices)
        raise Refusal(f"{path}: has neither config.json (Hugging Face) nor params.json (Meta)")
    with path.open("rb") as file:
        magic = file.read(8)
    if magic[:4] == b"GGUF":
        return open_gguf(path)
    if magic == NATIVE_MAGIC:
        return open_native(path)
    if magic[:2] in (b"PK", b"\x80\x02"):
        return open_llama2c(path, choices)
    raise Refusal(f"{path}: neither GGUF, cria's own file nor a llama2.c .pt; of safetensors, name the folder")


def shards(folder: Path) -> list[Path]:
    """The files of a Hugging Face folder that hold weights, in transformers' order of preference: an index counts only
    where there is no file with all."""
    for whole in ("model.safetensors", "pytorch_model.bin"):
        path, index = folder / whole, folder / f"{whole}.index.json"
        if path.is_file():
            if index.is_file():
                warn(f"{index}: not read, for {whole} holds all, as in transformers")
            return [path]
        if index.is_file():
            weight_map = read_json(index).get("weight_map")
            if not isinstance(weight_map, dict) or not weight_map:
                raise Refusal(f"{index}: has no weight_map")
            names = sorted(set(map(str, weight_map.values())))
            if missing := [name for name in names if "/" in name or not (folder / name).is_file()]:
                raise Refusal(f"{folder}: {index.name} names {missing[0]}, which is not here")
            return [folder / name for name in names]
    for pattern in ("model*.safetensors", "pytorch_model*.bin"):
        if found := sorted(folder.glob(pattern)):
            return found
    raise Refusal(f"{folder}: has neither model*.safetensors nor pytorch_model*.bin")


def state_of(content: Any, path: Path) -> dict[str, Tensor]:
    """The tensors of a pickle, which may lie one level down (state_dict, model, ...), beside counters and the like."""
    def holds_tensors(x: Any) -> bool:
        return isinstance(x, dict) and any(hasattr(t, "dtype") for t in x.values())
    if not holds_tensors(content):
        found = [key for key, value in content.items() if holds_tensors(value)] if isinstance(content, dict) else []
        if len(found) != 1:
            raise Refusal(f"{path}: expected tensors by name, or one dict of them; it has "
                          f"{', '.join(map(str, found)) or 'none'}")
        warn(f"{path}: its tensors are those of {found[0]}")
        content = content[found[0]]
    for prefix in ("_orig_mod.", "module."):  # of torch.compile, of DistributedDataParallel
        if all(str(name).startswith(prefix) for name in content):
            content = {name.removeprefix(prefix): t for name, t in content.items()}
    return {name: of_torch(name, t) for name, t in content.items()}


def open_weights(paths: list[Path]) -> dict[str, Tensor]:
    tensors: dict[str, Tensor] = {}
    for path in paths:
        if not path.is_file():
            raise Refusal(f"{path}: no file")
        found = open_safetensors(path) if path.suffix == ".safetensors" else state_of(open_pickle(path), path)
        for name in tensors.keys() & found.keys():
            if digest(tensors[name]) != digest(found[name]):
                warn(f"{path}: {name} differs from that of another file, and takes its place, as in transformers")
        tensors |= found
    return tensors


def digest(tensor: Tensor) -> bytes:
    """Two tensors of one type with the same digest are the same; only one at a time is in memory."""
    return tensor.type.encode() + hashlib.sha256(np.ascontiguousarray(tensor.read())).digest()


def settle_names(tensors: dict[str, Tensor], folder: Path) -> dict[str, Tensor]:
    """Of a model that was saved without its head, and its names without `model.`, transformers' names."""
    if not tensors or any(name.startswith("model.") for name in tensors):
        return tensors
    warn(f"{folder}: its tensors' names lack the prefix model.")
    return {name if name.startswith("lm_head.") else f"model.{name}": t for name, t in tensors.items()}


def settle_head(f: Family, values: dict, tensors: dict[str, Tensor], folder: Path) -> None:
    """Where embedding and head are one matrix, but stored both, or only by the other's name: as transformers does."""
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    if not values.get("tie_word_embeddings", f.defaults.get("tie_word_embeddings")) or head not in tensors:
        return
    if embedding not in tensors:
        warn(f"{folder}: only {head} is stored; tie_word_embeddings makes it the embedding, too")
        tensors[embedding] = tensors[head]
    elif digest(tensors[head]) != digest(tensors[embedding]):
        warn(f"{folder}: tie_word_embeddings is true, but {head} differs from {embedding}: both are used, as in "
             "transformers")
        values["tie_word_embeddings"] = False


def settle_biases(f: Family, values: dict, tensors: dict[str, Tensor], n_layers: int, folder: Path) -> None:
    """config.json says whether there are biases; what is stored beside that is not read."""
    keys = {"use_qkv_bias": ("self_attn", "qkv")} if f.arch == "stablelm" else \
        {"attention_bias": ("self_attn", "qkvo"), "mlp_bias": ("mlp", ("gate", "up", "down"))}
    for key, (module, ends) in keys.items() if f.arch in ("llama", "granite", "stablelm") else ():
        names = [f"model.layers.{i}.{module}.{end}_proj.bias" for i in range(n_layers) for end in ends]
        if key in f.reads.split() and values.get(key):
            if missing := [name for name in names if name not in tensors]:
                raise Refusal(f"{folder}: {key} is true, but tensor {missing[0]} is missing")
        elif found := [name for name in names if tensors.pop(name, None)]:
            warn(f"{folder}: {found[0]} and {len(found) - 1} more are not read: {key} is not true in config.json")


def text_part(values: dict, tensors: dict[str, Tensor]) -> tuple[dict, dict[str, Tensor]]:
    """Of a Gemma 3 that sees, the part that reads and writes text."""
    if values.get("model_type") != "gemma3" or "text_config" not in values:
        return values, tensors
    warn("the vision tower is left out")
    config = {"architectures": ["Gemma3ForCausalLM"]} | values["text_config"] | {"model_type": "gemma3_text"}
    return config, {name.replace("model.language_model.", "model.").removeprefix("language_model."): tensor
                    for name, tensor in tensors.items()
                    if "vision_tower" not in name and "multi_modal_projector" not in name}


def open_hf(folder: Path, choices: Choices) -> Model:
    values, tensors = text_part(read_json(folder / "config.json"), open_weights(shards(folder)))
    tensors = settle_names(tensors, folder)
    if values.get("model_type") in FAMILIES:
        settle_head(FAMILIES[values["model_type"]], values, tensors, folder)
    f, tied, keys, extra = read_config(values, folder / "config.json")
    model = Model(folder, keys, {}, values, folder)
    settle_biases(f, values, tensors, model.value("block_count"), folder)
    model.tensors = map_tensors(model, f, tied, tensors) | extra
    keys |= folder_tokenizer_keys(folder, values, model.value("vocab_size"), choices.pre)
    keys["general.name"] = text(folder.resolve().name)
    if re.search("phi-?3", folder.resolve().name, re.I):  # where no key says otherwise, special tokens take white space
        keys.setdefault("tokenizer.ggml.takes_white", array(I32, [0] * model.value("vocab_size")))
    return model


# -- Meta's folder, and llama2.c's .pt, which has the same names. Rows of q and k lie as in GGUF. --

META_NAMES = {"attention_norm.weight": "attn_norm.weight", "attention.wq.weight": "attn_q.weight",
              "attention.wk.weight": "attn_k.weight", "attention.wv.weight": "attn_v.weight",
              "attention.wo.weight": "attn_output.weight", "ffn_norm.weight": "ffn_norm.weight",
              "feed_forward.w1.weight": "ffn_gate.weight", "feed_forward.w3.weight": "ffn_up.weight",
              "feed_forward.w2.weight": "ffn_down.weight"}
META_WHOLE = {"tok_embeddings.weight": "token_embd.weight", "norm.weight": "output_norm.weight",
              "output.weight": "output.weight"}
META_ANGLES = ("rope.freqs", "freqs_cos", "freqs_sin")  # which follow from the configuration


def by_gguf_names(tensors: dict[str, Tensor], where: Path) -> dict[str, Tensor]:
    found = {}
    for name, tensor in tensors.items():
        layer = re.fullmatch(r"layers\.(\d+)\.(.+)", name)
        if layer and layer[2] in META_NAMES:
            found[f"blk.{layer[1]}.{META_NAMES[layer[2]]}"] = tensor
        elif name in META_WHOLE:
            found[META_WHOLE[name]] = tensor
        elif name not in META_ANGLES:
            raise Refusal(f"{where}: tensor {name} is not one of a LLaMA model")
    return found


def join_parts(name: str, parts: list[Tensor], shape: tuple[int, ...], where: Path) -> Tensor:
    """A tensor whose rows or columns are spread over the files of a model-parallel checkpoint. Vectors are in each."""
    if parts[0].shape == shape:
        return parts[0]
    for axis in range(len(shape)):
        if (joined := concatenate(parts, axis)).shape == shape:
            return joined
    raise Refusal(f"{where}: {name} has the shape {list(parts[0].shape)} in each of {len(parts)} parts, "
                  f"expected {list(shape)} in all")


def meta_config(path: Path, p: dict, first: dict[str, Tensor], n_parts: int, context: int | None) -> dict:
    """config.json of what params.json says, or a .pt's arguments      first: the tensors of the first of the files"""
    c = Config(p, path)
    D, H = c.integer("dim"), c.integer("n_heads")
    eps, theta, scaled = c.real("norm_eps", 1e-5), c.real("rope_theta", 10000.0), c.get("use_scaled_rope", False)
    rows, cols = first["token_embd.weight"].shape
    for key in ("vocab_size", "multiple_of", "ffn_dim_multiplier", "hidden_dim", "max_seq_len", "max_batch_size",
                "dropout"):
        c.get(key)  # the tensors say so, or they are of no consequence
    factor = c.get("rope_scaling_factor", 32 if D in (2048, 3072) else 8)  # LLaMA 3.2's 1B and 3B do not say it
    if context is None:  # the file does not say it: 3.1 and later, Code Llama, 3, 2, 1
        context = p.get("max_seq_len") or (131072 if scaled else 16384 if theta == 1e6 else 8192 if theta == 5e5 else
                                           4096 if eps == 1e-5 else 2048)
    V = rows if cols < D else rows * n_parts  # a part of the columns in each file, as in LLaMA 1 and 2, or of the rows
    config = {"model_type": "llama", "num_hidden_layers": c.integer("n_layers"), "hidden_size": D, "vocab_size": V,
              "intermediate_size": first["blk.0.ffn_gate.weight"].shape[0] * n_parts, "num_attention_heads": H,
              "num_key_value_heads": c.integer("n_kv_heads", H), "rms_norm_eps": eps, "rope_theta": theta,
              "max_position_embeddings": context}
    if scaled:
        config["rope_scaling"] = {"rope_type": "llama3", "factor": factor, "low_freq_factor": 1, "high_freq_factor": 4,
                                  "original_max_position_embeddings": 8192}
    c.finish()
    return config


def meta_model(path: Path, p: dict, parts: list[dict[str, Tensor]], choices: Choices, tokenizer: Path) -> Model:
    """p: params.json's, or a .pt's arguments      parts: what each file holds, by GGUF's names"""
    for name in ("token_embd.weight", "blk.0.ffn_gate.weight"):
        if name not in parts[0]:
            raise Refusal(f"{path}: {name} (by GGUF's name) is missing")
    f, _, keys, extra = read_config(meta_config(path, p, parts[0], len(parts), choices.context), path)
    model = Model(path, keys, {}, vocabulary=choices.tokenizer or tokenizer)
    sizes, whole = sizes_of(model), {}
    for part in model_parts(f, model.value("block_count")):
        pieces = [p[part.gguf] for p in parts if part.gguf in p]
        if len(pieces) == len(parts):
            whole[part.gguf] = join_parts(part.gguf, pieces, sizes.shape(part.shape), path)
        elif part.needed:
            raise Refusal(f"{path}: {part.gguf} (by GGUF's name) is missing")
    if left := [name for name in parts[0] if name not in whole]:
        raise Refusal(f"{path}: {left[0]} (by GGUF's name) is beyond n_layers = {model.value('block_count')}")
    model.tensors = whole | extra
    model.keys |= loose_tokenizer_keys(model.vocabulary, sizes.V, bool(p.get("use_scaled_rope")))
    return model


def open_meta(folder: Path, choices: Choices) -> Model:
    paths = sorted(folder.glob("consolidated.*.pth")) or sorted(folder.glob("consolidated*.safetensors"))
    if not paths:
        raise Refusal(f"{folder}: has params.json but no consolidated.NN.pth")
    parts = [by_gguf_names(open_weights([path]), path) for path in paths]
    tokenizer = folder / ("tekken.json" if (folder / "tekken.json").is_file() else "tokenizer.model")
    model = meta_model(folder, read_json(folder / "params.json"), parts, choices, tokenizer)
    model.keys["general.name"] = text(folder.resolve().name)
    return model


def open_llama2c(path: Path, choices: Choices) -> Model:
    """A .pt of llama2.c's training: model_args and the state of the model."""
    checkpoint = open_pickle(path)
    if not isinstance(checkpoint, dict) or not isinstance(checkpoint.get("model_args"), dict):
        raise Refusal(f"{path}: not a llama2.c checkpoint: it has no model_args")
    tensors = by_gguf_names(state_of(checkpoint.get("model"), path), path)
    head, embedding = tensors.get("output.weight"), tensors.get("token_embd.weight")
    if head and embedding and head.shape == embedding.shape and digest(head) == digest(embedding):
        del tensors["output.weight"]
    beside = [path.parent / name for name in ("tokenizer.model", "tokenizer.bin")]
    tokenizer = next(filter(Path.is_file, beside), beside[0])
    return meta_model(path, checkpoint["model_args"], [tensors], choices, tokenizer)


def loose_tokenizer_keys(path: Path, size: int, with_tools: bool) -> dict[str, Value]:
    """Of a vocabulary that comes as a file of its own: tokenizer.model of either kind, or tokenizer.bin."""
    if not path.is_file():
        raise Refusal(f"{path}: no such file: name the vocabulary with --tokenizer FILE")
    if path.suffix == ".bin":
        return llama2c_tokenizer_keys(path, size)
    if path.suffix == ".json":
        return tekken_keys(path, size)
    if is_tiktoken(path):
        return tiktoken_keys(path, size, with_tools)
    keys = spm_model_keys(path, [], size)
    return keys | id_keys(keys, bos="<s>", eos="</s>") | ggml_keys({"add_bos_token": boolean(True)})


# ==== 8. LoRA ====
# A weight W of the base becomes W + scale * B A, scale = alpha / rank, or alpha / sqrt(rank) for rsLoRA. What
# modules_to_save names was trained as a whole, and comes in place of the base's; so does an embedding that has become
# longer, which needs no mention there. Where an adapter does more, PEFT itself merges it, in memory.

# What only says how the adapter was trained, or which tensors it has.
LORA_HARMLESS = set("""
    base_model_name_or_path revision task_type inference_mode lora_dropout auto_mapping layers_to_transform
    layers_pattern peft_version runtime_config qalora_group_size megatron_core target_modules exclude_modules eva_config
    init_lora_weights loftq_config corda_config lora_ga_config""".split())
# What PEFT merges, for it changes the base before the sum, or beside it: the value that means "not used", and a part of
# the names of the tensors that the adapter has then.
LORA_BY_PEFT = {"use_dora": (False, "lora_magnitude_vector"), "bias": ("none", ".bias"), "lora_bias": (False, ""),
                "trainable_token_indices": (None, ""), "target_parameters": (None, ""),
                "ensure_weight_tying": (False, "")}
# How A and B began is of no consequence if the base stayed as it was; every other way takes a part out of it.
LORA_INITS = (True, False, "gaussian", "eva", "orthogonal")


@dataclass(frozen=True)
class Adapter:
    """A PEFT adapter: for each module (Hugging Face's name) A, B and scale; and tensors that replace the base's. For
    one that PEFT has to merge, why (key and value)."""
    folder: Path
    by_peft: str
    modules: dict[str, tuple[Tensor, Tensor, float]] = field(default_factory=dict)
    whole: dict[str, Tensor] = field(default_factory=dict)


def pattern_value(patterns: dict, module: str, otherwise: float) -> float:
    """Of rank_pattern or alpha_pattern: the first entry that the end of the module's name matches. What could take for
    ever, because it repeats a group or repeats often, is refused."""
    for p in patterns:
        if re.search(r"\)[*+{]|\(\?(?!:)|\s", p) or len(re.findall(r"[*+{]", p)) > 3:
            raise Refusal(f"the pattern {p} repeats a group, or repeats often, which is not supported")
    return next((v for p, v in patterns.items() if re.match(rf"(.*\.)?({p})$", module)), otherwise)


def peft_reason(c: Config, tensors: dict[str, Tensor]) -> str:
    """The key, and its value, for which PEFT has to merge an adapter; "" if there is none."""
    keys = [key for key, (unused, _) in LORA_BY_PEFT.items() if c.get(key, unused) != unused and c.get(key)]
    if c.get("init_lora_weights", True) not in LORA_INITS:
        keys.append("init_lora_weights")
    if any(".lora_embedding_A" in name for name in tensors):  # an embedding's sum
        keys.append("target_modules")
    for key in keys[:1]:
        reason, needed = f"{key} = {json.dumps(c.get(key))}", LORA_BY_PEFT.get(key, ("", ""))[1]
        if not any(needed in name for name in tensors):
            raise Refusal(f"{c.where}: {reason}, but the adapter has no {needed}")
        return reason
    return ""


def open_adapter(folder: Path) -> Adapter:
    where, safe = folder / "adapter_config.json", folder / "adapter_model.safetensors"
    c = Config(read_json(where), where)
    if not c.values:
        raise Refusal(f"{folder}: has no adapter_config.json")
    c.demand("peft_type", "LORA")
    rank, alpha, root = c.integer("r"), c.real("lora_alpha", 8), c.get("use_rslora", False)
    ranks, alphas, saved = c.get("rank_pattern", {}), c.get("alpha_pattern", {}), c.get("modules_to_save", [])
    tensors = open_weights([safe if safe.is_file() else folder / "adapter_model.bin"])
    by_peft = peft_reason(c, tensors)
    for key, value in c.values.items():  # PEFT writes all keys that it has: false or empty is a feature unused
        if key not in c.asked | LORA_HARMLESS and value:
            c.refuse(key)
    if by_peft:
        return Adapter(folder, by_peft)
    modules = {}
    for name in [n for n in tensors if n.endswith(".lora_A.weight")]:
        module = name.removesuffix(".lora_A.weight").removeprefix("base_model.model.")
        a, b = tensors.pop(name), tensors.pop(name.replace(".lora_A.", ".lora_B."), None)
        if b is None or len(a.shape) != 2 or len(b.shape) != 2 or a.shape[0] != b.shape[1]:
            raise Refusal(f"{folder}: lora_A and lora_B of {module} do not fit together")
        if a.shape[0] != (r := pattern_value(ranks, module, rank)):
            raise Refusal(f"{folder}: {module} has rank {a.shape[0]}, adapter_config.json says {r}")
        modules[module] = a, b, pattern_value(alphas, module, alpha) / (math.sqrt(r) if root else r)
    whole = {name.removeprefix("base_model.model.").replace(".base_layer.", "."): t for name, t in tensors.items()}
    left = {name: name.rpartition(".")[0] for name in whole}  # their modules, of which PEFT names the ends
    for end in saved:
        if not any(module.endswith(end) for module in left.values()):
            raise Refusal(f"{where}: modules_to_save names {end}, which the adapter has no tensor of")
    for name, module in left.items():
        if not module.endswith((*saved, "embed_tokens", "lm_head")) or not name.endswith((".weight", ".bias")):
            raise Refusal(f"{folder}: tensor {name} is not one of a LoRA of linear maps, nor in modules_to_save")
    return Adapter(folder, "", modules, whole)


def available_memory() -> float:
    """Bytes that a process may take, or infinity where the system does not say."""
    try:
        return int(re.search(r"MemAvailable: *(\d+) kB", Path("/proc/meminfo").read_text())[1]) * 1024
    except (OSError, TypeError):
        return math.inf


def merge_by_peft(model: Model, adapter: Adapter) -> None:
    """The whole model in memory, in float32, merged as PEFT does; matrices that did not change stay as they are."""
    what = f"{adapter.folder / 'adapter_config.json'}: {adapter.by_peft}"
    try:
        import peft
        import torch
        import transformers
    except ImportError:
        raise Refusal(f"{what}: is merged by PEFT: python3 -m pip install peft torch transformers") from None
    if 6 * model.n_parameters() > available_memory():
        raise Refusal(f"{what}: is merged in memory, which needs {6 * model.n_parameters() >> 20} MiB")
    with tempfile.TemporaryDirectory() as folder, quiet(transformers) as said:
        base = Path(folder) / "base"
        write_hf(model, "keep", base, False)
        try:
            network = transformers.AutoModelForCausalLM.from_pretrained(base, dtype=torch.float32)
            network = peft.PeftModel.from_pretrained(network, adapter.folder).merge_and_unload()
        except Exception as error:  # PEFT raises many kinds
            raise Refusal(f"{what}: PEFT cannot merge it: {first_line(error)}") from None
    if any("missing adapter keys" in str(w.message) for w in said):
        raise Refusal(f"{what}: the adapter lacks tensors that PEFT expects")
    tied = network.get_output_embeddings().weight.data_ptr() == network.get_input_embeddings().weight.data_ptr()
    tensors = {name: of_torch(name, t) for name, t in network.state_dict().items()
               if not (tied and name == "lm_head.weight")}
    f, sizes = family_of(model), sizes_of(model)
    if f.experts:
        split_fused_experts(tensors, f)
    for part in model_parts(f, model.value("block_count")):
        new, old = take_part(part, tensors, sizes, adapter.folder), model.tensors.get(part.gguf)
        if new and not (old and np.array_equal(from_gguf(part, old, sizes).floats(), new.floats())):
            put_merged(model, part, new.computed(lambda w: w, writable_type(old.type if old else "f32")))
    if not tied and model.hf_config:
        model.hf_config["tie_word_embeddings"] = False
    if tensors:
        raise Refusal(f"{what}: the merged model has {next(iter(tensors))}, which has no place in a GGUF file")


def first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]


def writable_type(type_name: str) -> str:
    """The type of what is computed from a tensor of this one."""
    return type_name if TYPES[type_name].file_type >= 0 else "q8"


def put_merged(model: Model, part: Part, merged: Tensor) -> None:
    """merged: in Hugging Face's order of rows"""
    moved, old = to_gguf(part, merged, sizes_of(model)), model.tensors.get(part.gguf)
    original = moved.original if old and old.original else None  # of all tensors, or of none
    model.tensors[part.gguf] = replace(moved, original=original)


def resize_vocabulary(model: Model, adapter: Adapter) -> None:
    """Makes room for an adapter's embedding and output matrix, which may have more rows than the base's: then it brings
    the tokens, too. One that was trained without the other parts them."""
    new = {name: t for name, t in adapter.whole.items() if name in ("model.embed_tokens.weight", "lm_head.weight")}
    if new and "output.weight" not in model.tensors:
        model.tensors["output.weight"] = model.tensors["token_embd.weight"]
        if model.hf_config:
            model.hf_config["tie_word_embeddings"] = False
    rows, n = {t.shape[0] for t in new.values()}, sizes_of(model).V
    if not rows or rows == {n}:
        return
    if len(rows) > 1 or len(new) < 2 or max(rows) < n:
        raise Refusal(f"{adapter.folder}: the base has {n} tokens, " + ", ".join(
            f"{name} {t.shape[0]}" for name, t in new.items()) + ": expected more, in both matrices")
    n = rows.pop()
    usual = {f"{name}_token_id": model.get(f"tokenizer.ggml.{name}_token_id") for name in ("bos", "eos")}
    model.keys |= folder_tokenizer_keys(adapter.folder, usual, n, None) | {f"{model.arch}.vocab_size": u32(n)}
    if model.hf_config:
        model.hf_config["vocab_size"] = n
    model.vocabulary = adapter.folder
    for name in ("token_embd.weight", "output.weight"):
        tensor = model.tensors[name]
        model.tensors[name] = replace(tensor, shape=(n, tensor.shape[1]))  # which new ones take the place of


def merge_adapter(model: Model, adapter: Adapter) -> None:
    """Into the model's tensors, in the source's order of rows."""
    if "output.weight" not in model.tensors and "lm_head" in adapter.modules:
        adapter = replace(adapter, by_peft="target_modules = lm_head, of a model whose head is its embedding")
    if adapter.by_peft:
        return merge_by_peft(model, adapter)
    resize_vocabulary(model, adapter)
    f, sizes = family_of(model), sizes_of(model)
    left = {f"{module}.weight" for module in adapter.modules} | adapter.whole.keys()
    for part in model_parts(f, model.value("block_count")):
        if part.hf not in left or part.gguf not in model.tensors:
            continue
        left.remove(part.hf)
        base = from_gguf(part, model.tensors[part.gguf], sizes)
        merged = adapter.whole.get(part.hf, base)
        shape, found = merged.shape, adapter.modules.get(part.hf.removesuffix(".weight"))
        if found:
            a, b, scale = found
            shape = b.shape[0], a.shape[1]
            merged = merged.computed(lambda w, a=a, b=b, s=scale: w + np.float32(s) * (b.floats() @ a.floats()),
                                     writable_type(base.type))
        if base.shape != shape or merged.shape != shape:
            raise Refusal(f"{adapter.folder}: {part.hf} has the shape {list(base.shape)}, the adapter's {list(shape)}")
        put_merged(model, part, merged)
    if left:
        raise Refusal(f"{adapter.folder}: the base has no {min(left)}")


# ==== 9. Numpy forward pass ====
# What the model computes, in float32 and in the plainest way, from GGUF's keys alone: so it finds a key that is missing
# or wrong. Where rows of query and key were reordered, it takes the source's order, and so finds a wrong order, too.

PAIRED = {f.arch for f in FAMILIES.values() if f.pairs}


def softmax(x: np.ndarray) -> np.ndarray:
    e = np.exp(x - x.max(-1, keepdims=True))
    return e / e.sum(-1, keepdims=True)


def rms_norm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + np.float32(eps)) * weight


def layer_norm(x: np.ndarray, weight: np.ndarray, bias: np.ndarray | float, eps: float) -> np.ndarray:
    x = x - x.mean(-1, keepdims=True)
    return x / np.sqrt(np.mean(np.square(x), -1, keepdims=True) + np.float32(eps)) * weight + bias


def rotate(x: np.ndarray, angles: tuple[np.ndarray, np.ndarray], paired: bool) -> np.ndarray:
    """x (T, heads, K)   angles: cos and sin, each (T, R/2); of a head, its first R numbers are rotated: neighbours
    (paired), or i and i + R/2"""
    cos, sin = (a[:, None].astype(np.float32) for a in angles)
    R, out = 2 * cos.shape[-1], x.copy()
    first, second = (slice(0, R, 2), slice(1, R, 2)) if paired else (slice(0, R // 2), slice(R // 2, R))
    a, b = x[..., first], x[..., second]
    out[..., first], out[..., second] = a * cos - b * sin, b * cos + a * sin
    return out


def yarn_ramp(model: Model, theta: float, R: int) -> np.ndarray:
    """How much of each angle YaRN divides by the factor: from 0 for fast turns to 1 for slow ones      out (R/2)"""
    def turning(n: float) -> float:
        """The number of the angle that turns n times within the original context."""
        return R * math.log(original / (n * 2 * math.pi)) / (2 * math.log(theta))
    original = model.value("rope.scaling.original_context_length", model.value("context_length"))
    low = max(math.floor(turning(model.value("rope.scaling.yarn_beta_fast", 32.0))), 0)
    high = min(math.ceil(turning(model.value("rope.scaling.yarn_beta_slow", 1.0))), R - 1)
    return np.clip((np.arange(R // 2) - low) / (high - low or 0.001), 0, 1)


class Network:
    """A forward pass over T tokens. Matrices are read when they are used."""

    def __init__(self, model: Model, types: dict[str, str] | None = None):
        """types: the type that each tensor is rounded to before it is used; none: as it is"""
        self.model, self.types, self.s = model, types or {}, sizes_of(model)
        self.arch = model.arch
        self.eps = model.value("attention.layer_norm_rms_epsilon", model.value("attention.layer_norm_epsilon"))
        query = model.tensors.get("blk.0.attn_q.weight")
        self.paired = self.arch in PAIRED and not (query and query.original)

    def weight(self, name: str) -> np.ndarray | None:
        tensor = self.model.tensors.get(name)
        if tensor is None:
            return None
        tensor = tensor.original or tensor
        type_name, w = self.types.get(name, tensor.type), tensor.floats()
        rows = w.reshape(-1, w.shape[-1])
        n = max(1, SLAB // w.shape[-1])
        for i in range(0, len(rows) if type_name != tensor.type else 0, n):
            rows[i:i + n] = decode(encode(rows[i:i + n], type_name), type_name)
        return w

    def linear(self, x: np.ndarray, name: str) -> np.ndarray:
        y, bias = x @ self.weight(f"{name}.weight").T, self.weight(f"{name}.bias")
        return y if bias is None else y + bias

    def norm(self, x: np.ndarray, name: str) -> np.ndarray:
        """x itself where there is no such norm."""
        weight = self.weight(f"{name}.weight")
        if weight is None:
            return x
        if self.arch == "stablelm":
            bias = self.weight(f"{name}.bias")
            return layer_norm(x, weight, 0.0 if bias is None else bias, self.eps)
        return rms_norm(x, weight, self.eps)

    def angles(self, n: int, windowed: bool) -> tuple[np.ndarray, np.ndarray]:
        """cos and sin, each (T, R/2)"""
        v = self.model.value
        R, theta = v("rope.dimension_count", self.s.K), v("rope.freq_base", 10000.0)
        kind, factor, scale = v("rope.scaling.type", "none"), v("rope.scaling.factor", 1.0), 1.0
        if windowed and self.arch == "gemma3":
            theta = v("rope.freq_base_swa", 10000.0)
        original = v("rope.scaling.original_context_length", v("context_length"))
        turn = theta ** (-np.arange(0, R, 2) / R)
        if windowed and self.arch in ("gemma3", "olmo2"):
            angle = np.arange(n)[:, None] * turn
            return np.cos(angle), np.sin(angle)
        if kind == "linear":
            turn = turn / factor
        elif kind == "yarn":
            ramp = yarn_ramp(self.model, theta, R)
            turn = turn * (1 - ramp) + turn / factor * ramp
            scale = yarn_magnitude(factor) / yarn_magnitude(factor, v("rope.scaling.yarn_log_multiplier", 0.0))
        elif "rope_factors_long.weight" in self.model.tensors:
            name = "long" if n > original else "short"
            turn = turn / self.weight(f"rope_factors_{name}.weight").astype(float)
            usual = longrope_magnitude(v("context_length") / original, original)
            scale = 1.0 if v("rope.scaling.attn_factor") else usual
        scale *= v("rope.scaling.attn_factor", 1.0)
        factors = self.weight("rope_freqs.weight")
        turn = turn if factors is None else turn / factors.astype(float)
        angle = np.arange(n)[:, None] * turn
        return np.cos(angle) * scale, np.sin(angle) * scale

    def is_windowed(self, layer: int) -> bool:
        pattern = self.model.value("attention.sliding_window_pattern")
        pattern = usual_windows(self.arch, layer + 1) if pattern is None else pattern
        return self.model.value("attention.sliding_window", 0) > 0 and bool(pattern[layer])

    def attention_scale(self) -> float:
        v, s = self.model.value, self.s
        return v("attention.scale") or usual_scalar(self.arch, v("block_count"), s.D // s.H, s.K) ** -0.5

    def query_key_value(self, x: np.ndarray, blk: str) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """(T, D) -> (T, H, K), (T, G, K), (T, G, K), normed, not rotated"""
        s, n = self.s, len(x)
        if f"{blk}attn_qkv.weight" in self.model.tensors:
            fused = self.linear(x, f"{blk}attn_qkv")
            q, k, v = np.split(fused, [s.H * s.K, (s.H + s.G) * s.K], 1)
        else:
            q, k, v = (self.linear(x, f"{blk}attn_{name}") for name in "qkv")
        shapes = (n, s.H, s.K), (n, s.G, s.K)
        if self.arch != "olmo2":  # which normalises all heads at once
            q, k = q.reshape(shapes[0]), k.reshape(shapes[1])
        q, k = self.norm(q, f"{blk}attn_q_norm"), self.norm(k, f"{blk}attn_k_norm")
        return q.reshape(shapes[0]), k.reshape(shapes[1]), v.reshape(shapes[1])

    def attention(self, x: np.ndarray, layer: int) -> np.ndarray:
        """(T, D) -> (T, D)"""
        blk, n, windowed = f"blk.{layer}.", len(x), self.is_windowed(layer)
        q, k, v = self.query_key_value(x, blk)
        if self.arch != "smollm3" or (layer + 1) % 4:
            angles = self.angles(n, windowed)
            q, k = rotate(q, angles, self.paired), rotate(k, angles, self.paired)
        k, v = (np.repeat(t, self.s.H // self.s.G, 1) for t in (k, v))
        scores = np.einsum("thk,shk->hts", q, k) * np.float32(self.attention_scale())
        if cap := self.model.value("attn_logit_softcapping", 0):
            scores = np.tanh(scores / np.float32(cap)) * np.float32(cap)
        back = np.arange(n)[:, None] - np.arange(n)
        seen = (back >= 0) & (back < (self.model.value("attention.sliding_window") if windowed else n))
        mixed = np.einsum("hts,shk->thk", softmax(np.where(seen, scores, np.float32(-1e30))), v)
        return self.linear(mixed.reshape(n, -1), f"{blk}attn_output")

    def activate(self, x: np.ndarray) -> np.ndarray:
        if self.arch in ("gemma2", "gemma3"):
            return 0.5 * x * (1 + np.tanh(np.float32(math.sqrt(2 / math.pi)) * (x + np.float32(0.044715) * x ** 3)))
        return x / (1 + np.exp(-x))

    def feed_forward(self, x: np.ndarray, blk: str) -> np.ndarray:
        """(T, D) -> (T, D)"""
        if f"{blk}ffn_gate_inp.weight" in self.model.tensors:
            return self.mixture(x, blk)
        if self.arch == "phi3":
            gate, up = np.split(self.linear(x, f"{blk}ffn_up"), 2, 1)
        else:
            gate, up = self.linear(x, f"{blk}ffn_gate"), self.linear(x, f"{blk}ffn_up")
        return self.linear(self.activate(gate) * up, f"{blk}ffn_down")

    def mixture(self, x: np.ndarray, blk: str) -> np.ndarray:
        """The likeliest experts of each token, weighted      (T, D) -> (T, D)"""
        p = softmax(self.linear(x, f"{blk}ffn_gate_inp"))
        chosen = np.argsort(-p, 1, kind="stable")[:, :self.model.value("expert_used_count")]
        weights = np.take_along_axis(p, chosen, 1)
        weights /= weights.sum(1, keepdims=True)
        gate, up, down = (self.weight(f"{blk}ffn_{name}_exps.weight") for name in ("gate", "up", "down"))
        y = np.zeros_like(x)
        for e in range(len(gate)):
            token, place = np.nonzero(chosen == e)
            hidden = self.activate(x[token] @ gate[e].T) * (x[token] @ up[e].T)
            y[token] += hidden @ down[e].T * weights[token, place, None]
        return y

    def layer(self, x: np.ndarray, layer: int) -> np.ndarray:
        """(T, D) -> (T, D)"""
        blk, scale = f"blk.{layer}.", np.float32(self.model.value("residual_scale", 1.0))
        normed = self.norm(x, f"{blk}attn_norm")
        attended = self.norm(self.attention(normed, layer), f"{blk}post_attention_norm") * scale
        if self.arch == "stablelm" and f"{blk}ffn_norm.weight" not in self.model.tensors:
            return x + attended + self.feed_forward(normed, blk)  # side by side
        x = x + attended
        fed = self.feed_forward(self.norm(x, f"{blk}ffn_norm"), blk)
        return x + self.norm(fed, f"{blk}post_ffw_norm") * scale

    def logits(self, ids: np.ndarray) -> np.ndarray:
        """ids (T)   out f32 (T, V)"""
        v = self.model.value
        embedding = self.weight("token_embd.weight")
        x = embedding[ids] * np.float32(v("embedding_scale", 1.0))
        if self.arch in ("gemma2", "gemma3"):
            x = x * np.float32(math.sqrt(self.s.D))
        for layer in range(v("block_count")):
            x = self.layer(x, layer)
        x = self.norm(x, "output_norm")
        head = "output.weight" if "output.weight" in self.model.tensors else "token_embd.weight"
        y = x @ (embedding if head == "token_embd.weight" else self.weight(head)).T
        y = y / np.float32(v("logit_scale", 1.0) or 1.0)
        cap = np.float32(v("final_logit_softcapping", 0))
        return np.tanh(y / cap) * cap if cap else y


# ==== 10. Writers ====

def sensitive(name: str) -> bool:
    """What --type mixed gives more bits: an error in these shows most."""
    return name.startswith(("token_embd", "output")) or any(
        part in name for part in (".attn_v.", ".attn_qkv.", ".ffn_down"))


def planned_type(name: str, tensor: Tensor, choice: str) -> str:
    """The type that a tensor is written in. Vectors, norms and routers stay f32, as everywhere."""
    if len(tensor.shape) == 1 or name.endswith("_norm.weight") or ".ffn_gate_inp." in name:
        return "f32"
    if choice == "keep":
        return tensor.type
    type_name = ("q8" if sensitive(name) else "q4m") if choice == "mixed" else choice
    return "f16" if tensor.shape[-1] % TYPES[type_name].cols else type_name


@dataclass
class Errors:
    """How far stored weights are from the source's, gathered over the slabs of a tensor."""
    squares: float = 0.0
    norm: float = 0.0
    worst: float = 0.0  # of a block of 32: its root mean square error in parts of its root mean square

    def add(self, x: np.ndarray, y: np.ndarray) -> None:
        """x, y f32 (rows, cols)"""
        x, y = x.astype(np.float64).ravel(), y.astype(np.float64).ravel()
        self.squares += float(np.square(x - y).sum())
        self.norm += float(np.square(x).sum())
        n = len(x) // 32 * 32
        size, error = (np.square(t[:n]).reshape(-1, 32).sum(1) for t in (x, x - y))
        ratio = np.sqrt(np.divide(error, size, out=np.zeros_like(size), where=size > 0))
        self.worst = max(self.worst, float(ratio.max(initial=0)))

    def line(self, name: str, source: str, target: str) -> str:
        rmse = math.sqrt(self.squares / self.norm) if self.norm else 0.0
        return f"{name:32} {source:>5} -> {target:5} RMSE {rmse:9.3e}  worst block {self.worst:9.3e}"


def slabs(tensor: Tensor, type_name: str, errors: Errors | None = None) -> Iterator[bytes]:
    """A tensor's bytes in this type, a few rows at a time."""
    stored = tensor.read()
    rows = stored.reshape(-1, stored.shape[-1])
    n_rows = max(1, SLAB // tensor.shape[-1])
    for i in range(0, len(rows), n_rows):
        slab = rows[i:i + n_rows]
        check_finite(slab, tensor.type, i)
        if type_name != tensor.type:
            x = decode(slab, tensor.type)
            slab = encode(x, type_name)
            if errors:
                errors.add(x, decode(slab, type_name))
        yield slab.tobytes()


class Progress:
    """A bar on stderr, if that is a terminal."""

    def __init__(self, total: int, label: str):
        self.total, self.done, self.label, self.shown = max(total, 1), 0, label, -1
        self.active = sys.stderr.isatty()

    def add(self, n: int) -> None:
        self.done += n
        share = self.done * 40 // self.total
        if self.active and share != self.shown:
            self.shown = share
            bar = "#" * share + "." * (40 - share)
            print(f"\r{self.label} [{bar}] {self.done >> 20} of {self.total >> 20} MiB", end="", file=sys.stderr)
            if self.done >= self.total:
                print(file=sys.stderr)


def write_tensors(file: Any, tensors: dict[str, tuple[Tensor, str]], alignment: int, report: bool, label: str) -> None:
    """The data of tensors in their order, each padded with zeros      tensors: name -> tensor, type to write"""
    progress = Progress(sum(stored_bytes(t.shape, type_name) for t, type_name in tensors.values()), label)
    for name, (tensor, type_name) in tensors.items():
        errors, n = Errors() if report else None, 0
        try:
            for slab in slabs(tensor, type_name, errors):
                file.write(slab)
                n += len(slab)
                progress.add(len(slab))
        except Refusal as refusal:
            raise Refusal(f"{name} {refusal}") from None
        file.write(bytes(-n % alignment))
        if errors and type_name != tensor.type:
            print(printable(errors.line(name, tensor.type, type_name)), file=sys.stderr)


def file_type(types: list[str]) -> int:
    """general.file_type: that of most matrices."""
    known = [TYPES[t].file_type for t in types if t != "f32" and TYPES[t].file_type >= 0]
    return max(sorted(set(known)), key=known.count) if known else 0


def gguf_header(model: Model, types: dict[str, str], more: dict[str, tuple[Tensor, str]] | None = None) -> bytes:
    """more: further tensors, behind the model's"""
    keys = {"general.architecture": model.keys["general.architecture"], "general.type": text("model")}
    keys |= {k: v for k, v in model.keys.items() if k != "general.alignment"}
    if any(t.type != types[name] for name, t in model.tensors.items()) or "general.file_type" not in keys:
        keys["general.file_type"] = u32(file_type(list(types.values())))
    keys["general.quantization_version"] = u32(2)
    return pack_gguf_header(keys, {name: (t, types[name]) for name, t in model.tensors.items()} | (more or {}))


def write_gguf(model: Model, types: dict[str, str], path: Path, report: bool) -> None:
    with path.open("wb") as file:
        file.write(gguf_header(model, types))
        write_tensors(file, {name: (t, types[name]) for name, t in model.tensors.items()}, 32, report, "writing")


def write_native(model: Model, types: dict[str, str], path: Path, report: bool, run: Path) -> None:
    """By way of a GGUF file, which the C program turns into its own."""
    gguf = path.with_name(path.name + ".gguf")
    try:
        check_openable(model, types, gguf, run)
        write_gguf(model, types, gguf, report)
        done = call(run, gguf, "-m", "export", "-o", path)
        if done.returncode:
            raise Refusal(f"{run} cannot make a native file of it: {last_line(done.stderr).replace(str(gguf), 'it')}")
    finally:
        gguf.unlink(missing_ok=True)


def check_openable(model: Model, types: dict[str, str], path: Path, run: Path) -> None:
    """Asks the C program before anything big is written: shows it a file with a hole in place of the data, and with one
    tensor more, which it names if there is nothing else that it does not know."""
    extra = "~"  # after all other names
    with path.open("wb") as file:
        file.write(gguf_header(model, types, {extra: (constant([0.0]), "f32")}))
        file.truncate(file.tell() + sum(-(-stored_bytes(t.shape, types[n]) // 32) * 32
                                        for n, t in model.tensors.items()) + 32)
    done = call(run, path, "-m", "inspect")
    if f"tensor {extra} " not in done.stderr:
        kind, reason = model.hf_config.get("model_type", model.arch), last_line(done.stderr)
        asked = [f"{key} = true, " for key in ("use_parallel_residual", "qk_layernorm") if model.hf_config.get(key)]
        raise Refusal(f"{model.source}: the C program does not open such a model of type {kind} yet ({''.join(asked)}"
                      f"{reason.removeprefix(f'run: {path}: ')}); --to gguf writes it for llama.cpp")


def call(run: Path, *words: Any) -> subprocess.CompletedProcess:
    """Signals wait until the child's number is known: else it would go on alone, and write what nobody removes."""
    came: list[int] = []
    usual = {number: signal.signal(number, lambda number, frame: came.append(number))
             for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP)
             if signal.getsignal(number) != signal.SIG_IGN}
    try:
        process = subprocess.Popen([str(run), *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                                   text=True, errors="replace")
    finally:
        for number, handler in usual.items():
            signal.signal(number, handler)
    with process:
        try:
            if came:
                os.kill(os.getpid(), came[0])
            out, err = process.communicate()
        except BaseException:
            process.terminate()  # it removes what it has begun to write, and is waited for
            raise
    return subprocess.CompletedProcess(process.args, process.returncode, out, err)


def last_line(s: str) -> str:
    return (s.strip().splitlines() or ["it says nothing"])[-1]


# -- llama2.c's .bin --

LLAMA2C_ORDER = ("attn_norm", "attn_q", "attn_k", "attn_v", "attn_output", "ffn_norm", "ffn_gate", "ffn_down", "ffn_up")


def check_llama2c(model: Model) -> Sizes:
    """llama2.c's program has the rest of the configuration in its source."""
    sizes, v = sizes_of(model), model.value
    wrong = None
    if model.arch != "llama" or v("expert_count", 0):
        wrong = f"family {model.arch}"
    elif v("rope.freq_base", 10000.0) != 10000.0:
        wrong = f"rope.freq_base = {v('rope.freq_base'):g}"
    elif abs(v("attention.layer_norm_rms_epsilon") - 1e-5) > 1e-9:
        wrong = f"attention.layer_norm_rms_epsilon = {v('attention.layer_norm_rms_epsilon'):g}"
    elif sizes.K * sizes.H != sizes.D or v("rope.dimension_count", sizes.K) != sizes.K:
        wrong = "attention.key_length or rope.dimension_count"
    elif v("rope.scaling.type", "none") != "none" or v("attention.sliding_window", 0):
        wrong = "rope.scaling.type or attention.sliding_window"
    known = {f"blk.{i}.{name}.weight" for i in range(v("block_count")) for name in LLAMA2C_ORDER}
    others = set(model.tensors) - known - {"token_embd.weight", "output_norm.weight", "output.weight"}
    if wrong or others:
        raise Refusal(f"{model.source}: llama2.c's format has no place for {wrong or sorted(others)[0]}")
    return sizes


def group_quantise(w: np.ndarray, group: int) -> tuple[np.ndarray, np.ndarray]:
    """llama2.c's v2: int8 and one f32 scale for each group      w f32 (any)   out int8 (groups, group), f32 (groups)"""
    w = w.reshape(-1, group)
    scale = np.abs(w).max(1) / np.float32(127)
    return np.rint(quotient(w, scale[:, None])).astype(np.int8), scale


def write_llama2c(model: Model, path: Path, version: int) -> None:
    sizes, n_layers = check_llama2c(model), model.value("block_count")
    context, tied = model.value("context_length"), "output.weight" not in model.tensors

    def of_layers(name: str) -> list[str]:
        return [f"blk.{i}.{name}.weight" for i in range(n_layers)]
    norms = [*of_layers("attn_norm"), *of_layers("ffn_norm"), "output_norm.weight"]
    head = [] if tied else ["output.weight"]
    numbers = (sizes.D, sizes.F, n_layers, sizes.H, sizes.G, sizes.V if tied or version == 2 else -sizes.V, context)
    with path.open("wb") as file:
        if version == 0:
            file.write(struct.pack("<7i", *numbers))
            names = ["token_embd.weight", *(n for name in LLAMA2C_ORDER for n in of_layers(name)), "output_norm.weight"]
            write_tensors(file, {n: (model.tensors[n], "f32") for n in names}, 1, False, "writing")
            file.write(bytes(4 * context * sizes.K))  # tables of cos and sin, which nobody reads
            write_tensors(file, {n: (model.tensors[n], "f32") for n in head}, 1, False, "writing")
            return
        group = next((g for g in (64, 32) if sizes.D % g == 0 and sizes.F % g == 0 and sizes.G * sizes.K % g == 0), 0)
        if not group:
            raise Refusal(f"{model.source}: rows of {sizes.D} and {sizes.F} cannot be cut into groups of 32")
        header = b"24ka" + struct.pack("<i7iBi", 2, *numbers, tied, group)
        file.write(header.ljust(256, b"\0"))
        write_tensors(file, {n: (model.tensors[n], "f32") for n in norms}, 1, False, "writing")
        matrices = [n for name in LLAMA2C_ORDER if not name.endswith("_norm") for n in of_layers(name)]
        for name in ["token_embd.weight", *matrices, *head]:
            weights = model.tensors[name].floats()
            try:
                check_finite(weights.reshape(-1, weights.shape[-1]), "f32", 0)
            except Refusal as refusal:
                raise Refusal(f"{name} {refusal}") from None
            q, scale = group_quantise(weights, group)
            file.write(q.tobytes() + scale.astype("<f4").tobytes())


# -- A Hugging Face folder --

def hf_tensors(model: Model) -> dict[str, Tensor]:
    """GGUF's tensors by Hugging Face's names, in its order of rows."""
    f, sizes, left = family_of(model), sizes_of(model), dict(model.tensors)
    tensors = {}
    for part in model_parts(f, model.value("block_count")):
        tensor = left.pop(part.gguf, None)
        if tensor is None:
            if part.needed:
                raise Refusal(f"{model.source}: tensor {part.gguf} is missing")
            continue
        check_shape(part.gguf, tensor, sizes.shape(part.shape), model.source)
        tensor = from_gguf(part, tensor, sizes)
        if part.move == "stack":
            for e in range(tensor.shape[0]):
                tensors[part.hf.format(e=e)] = tensor.then(lambda w, e=e: w[e], tensor.shape[1:])
        else:
            tensors[part.hf] = tensor
    if model.hf_config and (f.defaults | model.hf_config).get("tie_word_embeddings", False):
        tensors.pop("lm_head.weight", None)
    for name in left:
        if name not in ("rope_freqs.weight", "rope_factors_long.weight", "rope_factors_short.weight"):
            raise Refusal(f"{model.source}: tensor {name} has no place in a {f.model_type} folder")
    return tensors


def llama3_scaling(model: Model, theta: float) -> dict:
    """rope_scaling of which the factors in rope_freqs.weight come: those between 1 and the greatest say which context
    the model had before."""
    factors = model.tensors["rope_freqs.weight"].floats().astype(float)
    most, n = factors.max(), len(factors)
    between = (factors > 1.0001) & (factors < most * 0.9999)
    smooth = (1 / factors - 1 / most) / (1 - 1 / most)
    contexts = ((1 + 3 * smooth) * 2 * math.pi * theta ** (np.arange(n) / n))[between]
    scaling = {"rope_type": "llama3", "factor": round(float(most), 4), "low_freq_factor": 1.0, "high_freq_factor": 4.0,
               "original_max_position_embeddings": round(float(np.median(contexts))) if len(contexts) else 8192}
    if not np.allclose(factors, llama3_factors(scaling | {"rope_theta": theta}, 2 * n), rtol=1e-4):
        raise Refusal(f"{model.source}: rope_freqs.weight is not of LLaMA 3.1's form; config.json cannot say it")
    return scaling


def hf_scaling(model: Model, theta: float) -> dict:
    """rope_scaling of config.json: the inverse of rope_keys()."""
    def v(key: str, otherwise: Any = None) -> Any:
        return model.value(f"rope.scaling.{key}", otherwise)
    kind = v("type", "none")
    original = {"original_max_position_embeddings": v("original_context_length", model.value("context_length"))}
    if "rope_freqs.weight" in model.tensors:
        return llama3_scaling(model, theta)
    if kind == "linear":
        return {"rope_type": kind, "factor": v("factor")}
    if kind == "yarn":
        magnitude = v("attn_factor", 1.0) * yarn_magnitude(v("factor")) \
            / yarn_magnitude(v("factor"), v("yarn_log_multiplier", 0.0))
        betas = {beta: v(f"yarn_{beta}") for beta in ("beta_fast", "beta_slow") if v(f"yarn_{beta}")}
        return {"rope_type": kind, "factor": v("factor"), "attention_factor": magnitude} | original | betas
    if "rope_factors_long.weight" in model.tensors:
        factors = {f"{n}_factor": model.tensors[f"rope_factors_{n}.weight"].floats().tolist()
                   for n in ("long", "short")}
        magnitude = {"attention_factor": v("attn_factor")} if v("attn_factor") else {}
        return {"rope_type": "longrope"} | factors | original | magnitude
    return {}


def hf_rope(model: Model, f: Family) -> dict:
    """How positions are rotated in, as config.json has it; in transformers 5's form where windowed layers do not share
    the scaling."""
    theta = model.value("rope.freq_base", 10000.0)
    scaling = hf_scaling(model, theta)
    if f.model_type == "olmo3":
        plain = {"rope_type": "default", "rope_theta": theta}
        return {"rope_parameters": {"full_attention": plain | scaling, "sliding_attention": plain}}
    out = {"rope_theta": theta} | ({"rope_scaling": scaling} if scaling else {})
    if scaling.get("rope_type") == "longrope" or f.arch == "phi3":
        out["original_max_position_embeddings"] = model.value("rope.scaling.original_context_length",
                                                              model.value("context_length"))
    if "partial_rotary_factor" in f.reads:
        out["partial_rotary_factor"] = model.value("rope.dimension_count") / sizes_of(model).K
    if f.arch == "gemma3":
        out["rope_local_base_freq"] = model.value("rope.freq_base_swa", 10000.0)
    return out


def hf_window(model: Model, f: Family) -> dict:
    n_layers, window = model.value("block_count"), model.value("attention.sliding_window", 0)
    pattern = model.value("attention.sliding_window_pattern")
    if not window:
        return {"sliding_window": None} if "sliding_window" in f.reads else {}
    out = {"sliding_window": window}
    if f.model_type.startswith("qwen"):
        out |= {"use_sliding_window": True, "max_window_layers": 0}
    if f.norm_plus_one or pattern is not None:
        layers = usual_windows(f.arch, n_layers) if pattern is None else pattern
        out["layer_types"] = ["sliding_attention" if windowed else "full_attention" for windowed in layers]
    return out


def hf_own(model: Model, f: Family, s: Sizes) -> dict:
    """What only this family's config.json has."""
    has = model.tensors.__contains__
    if f.norm_plus_one:
        scale = model.value("attention.scale")
        scalar = scale ** -2 if scale else usual_scalar(f.arch, model.value("block_count"), s.D // s.H, s.K)
        return {"query_pre_attn_scalar": round(scalar)}
    if f.arch == "stablelm":
        return {"use_qkv_bias": has("blk.0.attn_q.bias"), "qk_layernorm": has("blk.0.attn_q_norm.weight"),
                "use_parallel_residual": not has("blk.0.ffn_norm.weight")}
    if "attention_bias" in f.reads:
        return {"mlp_bias": has("blk.0.ffn_gate.bias"), "attention_bias": has("blk.0.attn_output.bias")}
    return {}


def hf_config(model: Model) -> dict:
    """config.json of a model that has none."""
    f, s = family_of(model), sizes_of(model)
    config = {"architectures": [f.hf_class + "ForCausalLM"], "model_type": f.model_type,
              "tie_word_embeddings": "output.weight" not in model.tensors}
    config |= {hf: model.value(gguf, (DEFAULTS | f.defaults).get(hf))
               for hf, gguf in (INTEGERS | f.integers | f.scalars).items()}
    config |= {"vocab_size": s.V, "num_key_value_heads": s.G} | ({"head_dim": s.K} if f.any_head_dim else {})
    config |= {key: allowed[0] for key, allowed in f.demands.items()}
    for hf, gguf in (("bos", "bos"), ("eos", "eos"), ("pad", "padding")):
        config[f"{hf}_token_id"] = model.get(f"tokenizer.ggml.{gguf}_token_id")
    return config | hf_rope(model, f) | hf_window(model, f) | hf_own(model, f, s)


def write_safetensors(tensors: dict[str, tuple[Tensor, str]], path: Path, report: bool) -> None:
    names = {type_name: dtype for dtype, type_name in SAFETENSORS_TYPES.items()}
    header: dict = {"__metadata__": {"format": "pt"}}
    at = 0
    for name, (tensor, type_name) in tensors.items():
        n = stored_bytes(tensor.shape, type_name)
        header[name] = {"dtype": names[type_name], "shape": list(tensor.shape), "data_offsets": [at, at + n]}
        at += n
    packed = json.dumps(header, separators=(",", ":")).encode()
    packed += b" " * (-len(packed) % 8)
    with path.open("wb") as file:
        file.write(len(packed).to_bytes(8, "little") + packed)
        write_tensors(file, tensors, 1, report, "writing")


def hf_type(tensors: dict[str, Tensor], choice: str) -> str:
    """The type of all matrices of a folder: the one that is asked for, or the source's, or f32."""
    if choice != "keep":
        return choice
    types = {t.type for t in tensors.values() if len(t.shape) > 1}
    return types.pop() if len(types) == 1 and types <= set(FLOATS) else "f32"


def vector_type(tensor: Tensor, type_name: str) -> str:
    """A norm or a bias goes in the type of the matrices, if that loses nothing."""
    x = tensor.floats()
    with np.errstate(over="ignore"):
        narrow = decode(x.astype(np.float16) if type_name == "f16" else encode(x, type_name), type_name)
    return type_name if np.array_equal(narrow, x) else "f32"


def write_hf(model: Model, choice: str, folder: Path, report: bool) -> None:
    tensors = hf_tensors(model)
    type_name = hf_type(tensors, choice)
    types = {n: type_name if len(t.shape) > 1 else vector_type(t, type_name) for n, t in tensors.items()}
    dtype = {"f32": "float32", "f16": "float16", "bf16": "bfloat16"}[type_name]
    config = {k: v for k, v in (model.hf_config or hf_config(model)).items() if k not in ("dtype", "torch_dtype")}
    folder.mkdir()
    (folder / "config.json").write_text(json.dumps(config | {"torch_dtype": dtype}, indent=2) + "\n", "utf-8")
    write_tokenizer(model, folder)
    write_safetensors({n: (t, types[n]) for n, t in tensors.items()}, folder / "model.safetensors", report)


TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "special_tokens_map.json",
                   "added_tokens.json", "generation_config.json", "chat_template.jinja", "vocab.json", "merges.txt")


def write_tokenizer(model: Model, folder: Path) -> None:
    """The source's files, or new ones."""
    if model.hf_config:
        source = model.vocabulary
        for name in TOKENIZER_FILES:
            if (source / name).is_file():
                shutil.copyfile(source / name, folder / name)
        return
    tokens = model.get("tokenizer.ggml.tokens")
    if tokens is None:
        return
    config: dict = {"tokenizer_class": "PreTrainedTokenizerFast", "clean_up_tokenization_spaces": False}
    for hf, gguf in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
        i = model.get(f"tokenizer.ggml.{gguf}_token_id")
        if i is not None:
            config[f"{hf}_token"] = tokens[i]
    if template := model.get("tokenizer.chat_template"):
        (folder / "chat_template.jinja").write_text(template, "utf-8", "surrogateescape")
    ends = [i for name in ("eos", "eot", "eom") if (i := model.get(f"tokenizer.ggml.{name}_token_id")) is not None]
    ends += [int(i) for i in model.get("tokenizer.ggml.end_token_ids", [])]
    generation = {"eos_token_id": list(dict.fromkeys(ends))} if ends else {}
    for name, value in (("tokenizer.json", tokenizer_json(model)), ("tokenizer_config.json", config),
                        ("generation_config.json", generation)):
        encoded = json.dumps(value, ensure_ascii=False, indent=1).encode("utf-8", "surrogateescape")
        (folder / name).write_bytes(encoded + b"\n")


# ==== 11. Verification ====

N_VERIFIED = 24            # tokens
TOLERANCE = 5e-4           # of a logit, in parts of the greatest: what float32 in another order may differ by
SMALL = 1_000_000_000      # parameters up to which a model is verified unless --no-verify


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p      f64 (T, V)"""
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def divergence(p: np.ndarray, q: np.ndarray) -> float:
    """The mean over tokens of KL(p || q), in nats      p, q logits (T, V)"""
    p, q = log_softmax(p), log_softmax(q)
    return float((np.exp(p) * (p - q)).sum(-1).mean())


def result_logits(path: Path, ids: np.ndarray, n_tokens: int, o: argparse.Namespace, run: Path | None) -> np.ndarray:
    """What was written computes, f32 (T, V): by the C program, or, of what it does not open, by the pass above."""
    if not run or o.to == "hf" or (o.to == "gguf" and call(run, path.resolve(), "-m", "inspect").returncode):
        return Network(open_source(path, Choices(pre=o.pre))).logits(ids)
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits"
        done = call(run, path.resolve(), "-m", "logits", "--exact", "-c", len(ids), "--ids", " ".join(map(str, ids)),
                    "-o", out)  # -c: LongRoPE's factors go by it, above by the number of tokens
        if done.returncode:
            raise Refusal(f"verification failed: {last_line(done.stderr)}")
        return np.fromfile(out, "<f4").reshape(len(ids), n_tokens)


def sample_ids(model: Model) -> np.ndarray:
    """The tokens that a model is verified on."""
    n = min(N_VERIFIED, model.value("context_length", N_VERIFIED))
    return np.random.default_rng(1).integers(0, sizes_of(model).V, n)


def judge(model: Model) -> None:
    """Where transformers is installed, it says what a Hugging Face folder computes: its classes know which keys of
    config.json count, and the pass above must find its logits. The whole model is in memory, in float32."""
    try:
        import torch
        import transformers
    except ImportError:
        return warn("computed by this program's own reading of config.json; with torch and transformers installed, "
                    "transformers is the judge")
    if 6 * model.n_parameters() > available_memory():
        return warn(f"transformers needs {6 * model.n_parameters() >> 20} MiB to be the judge: not asked")
    with quiet(transformers):
        try:
            network, found = transformers.AutoModelForCausalLM.from_pretrained(
                model.source, dtype=torch.float32, attn_implementation="eager", local_files_only=True,
                output_loading_info=True)
            if missing := [*found["missing_keys"], *found["mismatched_keys"]]:
                return warn(f"transformers does not find {missing[0]} in {model.source}, so it is not the judge")
            ids, network = sample_ids(model), network.eval()
            with torch.no_grad():
                wanted = network(torch.tensor(ids[None])).logits[0].float().numpy()
        except Exception as error:  # transformers raises many kinds
            return warn(f"transformers does not open {model.source}, so it is not the judge: {first_line(error)}")
    if np.isfinite(wanted).all():  # else a weight is not, which the writer will name
        compare_logits(Network(model).logits(ids), wanted, "what transformers computes from the same folder")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[list]:
    """What libraries would print is caught. Gives their warnings."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        yield said


def compare_logits(made: np.ndarray, wanted: np.ndarray, what: str) -> float:
    """The greatest difference. Raises Refusal where it is more than rounding."""
    if made.shape != wanted.shape or not np.isfinite(made).all():
        raise Refusal("verification failed: the result has logits that are not finite, or of another number")
    off, scale = float(np.abs(made - wanted).max()), max(1.0, float(np.abs(wanted).max()))
    if off > TOLERANCE * scale:
        raise Refusal(f"verification failed: a logit is off by {off:.3g}, and the greatest is {scale:.3g}, compared "
                      f"with {what}")
    return off


def verify(model: Model, types: dict[str, str], path: Path, o: argparse.Namespace, run: Path | None) -> None:
    """Compares the file that was written with the source: its logits must be those of the source's weights, rounded to
    the types that they were written in. Raises Refusal if they are not, and if --verify asks for what cannot be."""
    try:
        family_of(model)
        network = Network(model)
    except Refusal as refusal:
        if o.verify:
            raise Refusal(f"cannot be verified: {refusal}") from None
        return warn(f"not verified: {refusal}")
    ids = sample_ids(model)
    source = network.logits(ids)
    exact = all(types[n] == t.type or len(t.shape) == 1 for n, t in model.tensors.items())
    rounded = source if exact else Network(model, types).logits(ids)
    made = result_logits(path, ids, source.shape[1], o, run)
    off = compare_logits(made, rounded, "the source's weights, rounded as they were written")
    change = float(np.abs(made - source).max())
    print(f"verified on {len(ids)} tokens: computed as written within {off:.2g}; to the source, greatest difference "
          f"{change:.3g}, KL {divergence(source, made):.3g}", file=sys.stderr)


# -- Tokens: the C program's, and those of the library that made the vocabulary --

N_TEXTS, N_ALONE = 2000, 40  # texts; of these, the ones that are a call each, for what holds at a text's beginning only
SAMPLES = (
    "don't you'LL it's I'M", "  two  spaces\n\nlines\t\tand tabs ", "1234567890 3.14 1,000 \u0661\u0662 \u00bd",
    "Z\u00fcrich na\u00efve \u0130stanbul \u1e9e \u01c5", "\u4f60\u597d\u4e16\u754c \u3053\u3093\u306b \uc548\ub155",
    "\u041f\u0440\u0438\u0432\u0435\u0442 \u03b3\u03b5\u03b9\u03ac",
    "\u0645\u0631\u062d\u0628\u0627 \u05e9\u05dc\u05d5\u05dd",
    "\u0928\u092e\u0938\u094d\u0924\u0947 \u0e2a\u0e27\u0e31\u0e2a", "\u2764\ufe0f \U0001f1e8\U0001f1ed \ufb01 \uff21",
    "\U0001f469\u200d\U0001f4bb\U0001f44d\U0001f3fd \U0001d400", "e\u0301 q\u0307\u0323 \u212b \u1100\u1161",
    "x=1;y+=2//z\r\n\tif(a->b){}", "\u00a0\u2003\u3000\u2028\x0b\x0c\x01\x7f", "\u2581bar \u2581\u2581", "<0x41>",
    "_snake_caseCamelCase", "http://a.b/c?d=e&f#g", "...!!??--''\"\"", "a", " ", "\n", " a", "  a", "\ta", "a ", "a  ",
    "a" * 40)


def sample_texts(tokens: list[str], added: list[str], n: int) -> list[str]:
    """Texts of all kinds: samples, pieces of the vocabulary, added tokens between this and that, characters at random.
    The same for the same vocabulary."""
    rng = random.Random(1)
    beside = ["", "", " ", "  ", "\n", "\n\n", "a", "B ", " c", "9", ".", "\u00e9", "\t"]
    letters = [*"abcdefghijklmnopqrstuvwxyzETAOIN0123456789    \n\t.,'-_/(){}", *"".join(SAMPLES)]
    texts = [*SAMPLES, *(token + " x" for token in added), *(f"a {token}" for token in added)]
    while len(texts) < n:
        kind = rng.randrange(4)
        if kind == 0 and added:
            parts = [rng.choice(beside) + rng.choice(added) + rng.choice(beside) for _ in range(rng.randint(1, 3))]
        elif kind == 1:
            parts = [rng.choice(letters) for _ in range(rng.randint(1, 30))]
        elif kind == 2:
            parts = [rng.choice(SAMPLES) for _ in range(2)]
        else:
            parts = [rng.choice(("", "", " ")) + rng.choice(tokens) for _ in range(rng.randint(1, 8))]
        texts.append("".join(parts))
    rng.shuffle(texts)
    return texts


@contextlib.contextmanager
def library_errors(what: str) -> Iterator[None]:
    """What a library raises, as a Refusal; those in Rust raise what is no Exception."""
    try:
        yield
    except (Refusal, KeyboardInterrupt, SystemExit, MemoryError):
        raise
    except BaseException as error:
        raise Refusal(f"{what} cannot use it: {first_line(error)}") from None


def library_tokenizer(model: Model) -> tuple[str, Callable[[str], list[int]], list[str]] | None:
    """Of the vocabulary's own library: its name, text -> ids with what is added, and the tokens that it finds in texts;
    None if it is not installed, or there is none. Of a folder, tokenizer.json counts; else tokenizer.model."""
    folder = model.vocabulary if model.vocabulary.is_dir() else None
    path = folder / "tokenizer.json" if folder else model.vocabulary
    get = model.get
    if path.is_file() and path.suffix == ".json" and path.name != "tekken.json":
        try:
            import tokenizers
        except ImportError:
            return warn("its tokens are not compared: python3 -m pip install tokenizers")
        with library_errors(f"{path}: tokenizers"):
            theirs = tokenizers.Tokenizer.from_file(str(path))
        tokenizer = read_json(path)
        config = read_json(folder / "tokenizer_config.json")
        added = added_tokens(tokenizer, config, read_json(folder / "added_tokens.json"))
        for t in added:
            if theirs.token_to_id(t["content"]) is None:
                flags = {key: t[key] for key in ("normalized", "lstrip", "rstrip", "single_word") if key in t}
                theirs.add_tokens([tokenizers.AddedToken(t["content"], special=t["special"], **flags)])
            if (i := theirs.token_to_id(t["content"])) != t["id"]:
                raise Refusal(f"{folder}: token {t['content']} has id {t['id']} there, tokenizers gives it {i}")
        return "tokenizers", lambda s: theirs.encode(s).ids, [t["content"] for t in added]
    path = folder / "tokenizer.model" if folder else path
    if not path.is_file() or path.suffix != ".model" or is_tiktoken(path):
        return None
    try:
        import sentencepiece
    except ImportError:
        return warn("its tokens are not compared: python3 -m pip install sentencepiece")
    no_prefix = b"\x1a\x02\x18\x00" if get("tokenizer.ggml.add_space_prefix") is False else b""  # the last one counts
    with library_errors(f"{path}: sentencepiece"):
        pieces = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + no_prefix)
    bos = [get("tokenizer.ggml.bos_token_id")] if get("tokenizer.ggml.add_bos_token") else []
    return "sentencepiece", lambda s: bos + pieces.encode(s), []


def compare_tokens(model: Model, made: Path, o: argparse.Namespace, run: Path | None) -> None:
    """The C program's tokens of many texts must be those of the vocabulary's own library. Raises Refusal with the first
    text that differs. Most texts go in one call, with a special token between them."""
    if o.to == "hf" and not model.vocabulary:
        model = replace(model, vocabulary=made)  # of which the source knows better
    if not run or not model.vocabulary or "tokenizer.ggml.tokens" not in model.keys \
            or not (found := library_tokenizer(model)):
        return
    library, encode, added = found
    tokens, types = model.get("tokenizer.ggml.tokens"), model.get("tokenizer.ggml.token_type")
    control = {token for token, kind in zip(tokens, types) if kind == CONTROL}
    outside = set(added) - set(tokens) | (control if library == "sentencepiece" else set()) | {
        token for token, kind in zip(tokens, types) if kind == UNKNOWN}  # which is no text here
    spm = model.get("tokenizer.ggml.model") == "llama"
    spelled = [piece_text(token, spm) for token, kind in zip(tokens, types) if kind == NORMAL]
    findable = [t for t in added if t not in outside]
    texts = sample_texts([s for s in spelled if s] or ["a"], findable, N_TEXTS)
    texts = [s for s in texts if not any(t in s for t in outside)]
    with tempfile.TemporaryDirectory() as folder:
        path, vocabulary = Path(folder) / "text", Path(folder) / "vocabulary.gguf"
        with vocabulary.open("wb") as file:
            file.write(gguf_header(replace(model, tensors={}), {}))
        opened = made if o.to in ("native", "gguf") and not call(run, made.resolve(), "-m", "inspect").returncode \
            else vocabulary

        def program(s: str) -> list[int]:
            path.write_bytes(s.encode())
            done = call(run, opened.resolve(), "-m", "tokenize", "--ends", "--special", "-f", path)
            if done.returncode:
                raise Refusal(f"the C program cannot tokenise: {last_line(done.stderr)}")
            return [int(i) for i in done.stdout.split()]

        def compare(s: str) -> None:
            if (got := program(s)) != (wanted := encode(s)):
                at = next((i for i, (a, b) in enumerate(zip(got, wanted)) if a != b), min(len(got), len(wanted)))
                message = f"the tokens of {json.dumps(s)} differ from {at} on: by {library} {wanted[at:at + 8]}, by " \
                          f"the C program {got[at:at + 8]}"
                if not o.pre:
                    raise Refusal(message)
                warn(f"{message} (--pre {o.pre})")
        for s in texts[:N_ALONE]:
            compare(s)
        between = next((t for t in added if t in control), "\n")
        whole = between.join(texts[N_ALONE:])
        if library == "sentencepiece" and control:
            same = compare_parts(model, texts[N_ALONE:], program, encode)
        else:
            same = program(whole) == encode(whole)
        for s in [] if same else [*texts[N_ALONE:], whole]:
            compare(s)


def compare_parts(model: Model, texts: list[str], program: Callable, encode: Callable) -> bool:
    """Whether all texts have the same tokens, where the library knows no special ones: one call, with one between."""
    tokens, types = model.get("tokenizer.ggml.tokens"), model.get("tokenizer.ggml.token_type")
    i = next(i for i, kind in enumerate(types) if kind == CONTROL)
    ends = len(encode(""))
    ids, parts = program(tokens[i].join(["", *texts, ""])), [[]]
    for token in ids[ends:]:
        parts.append([]) if token == i else parts[-1].append(token)
    return parts[1:-1] == [encode(s)[ends:] for s in texts]


def piece_text(token: str, spm: bool) -> str:
    """The text that a piece stands for; "" if it is no whole characters."""
    if spm:
        return token.replace("\u2581", " ")
    try:
        return bytes(map(BYTE_CHARACTERS.index, token)).decode()
    except ValueError:
        return ""


# -- Calibration: how far a text's predictions are from the source's --

CHUNK = 512  # tokens that are read anew each time, as by the C program's -m perplexity; the second half is scored
ROWS = 16    # positions whose logits are compared at once


@dataclass(frozen=True)
class Calibration:
    """What an export is measured by: the source as it is, as a native file, and a text."""
    source: Path
    type: str           # of most of its weights
    text: str           # its name
    chunks: np.ndarray  # ids (n, tokens of a chunk)
    n_tokens: int       # of the vocabulary


def main_type(model: Model, types: dict[str, str]) -> str:
    n = dict.fromkeys(types.values(), 0)
    for name, type_name in types.items():
        n[type_name] += math.prod(model.tensors[name].shape)
    return max(n, key=n.get)


def prepare_calibration(model: Model, o: argparse.Namespace, folder: Path, run: Path) -> Calibration:
    types = {name: planned_type(name, tensor, "keep") for name, tensor in model.tensors.items()}
    source, size = folder / "source.bin", min(CHUNK, model.value("context_length"))
    folder.mkdir()
    write_native(model, types, source, False, run)
    done = [call(run, source, "-m", "tokenize", *words) for words in (("-f", o.calibrate.resolve()), ("-i", ""))]
    if done[0].returncode:
        raise Refusal(f"--calibrate: {last_line(done[0].stderr)}")
    ids, begin = (np.array(d.stdout.split(), int) for d in done)  # of an empty text: the begin token, if one is added
    if len(ids) < size:
        raise Refusal(f"{o.calibrate}: has {len(ids)} tokens, which is less than one chunk of {size}")
    chunks = ids[:len(ids) // size * size].reshape(-1, size)
    chunks[:, :len(begin)] = begin
    return Calibration(source, main_type(model, types), o.calibrate.name, chunks,
                       model.tensors["token_embd.weight"].shape[0])


def scored_logits(run: Path, path: Path, ids: np.ndarray, n_tokens: int, *options: str) -> np.ndarray:
    """The C program's logits of the second half of ids, by way of a pipe: f32 (T, V)"""
    half = len(ids) // 2
    logits = np.empty((len(ids) - half, n_tokens), "<f4")
    words = [run, path.resolve(), "-m", "logits", "-c", len(ids), "--ids", " ".join(map(str, ids)), *options]
    with tempfile.TemporaryFile() as said:
        with subprocess.Popen([*map(str, words), "-o", "/dev/stdout"], stdout=subprocess.PIPE, stderr=said) as process:
            n = sum(process.stdout.readinto(logits[max(i - half, 0)]) for i in range(len(ids)))
        said.seek(0)
        if process.returncode or n != len(ids) * n_tokens * 4:
            raise Refusal(f"--calibrate: {last_line(said.read().decode(errors='replace'))}")
    return logits


def compare_predictions(p: np.ndarray, q: np.ndarray, followed: np.ndarray) -> np.ndarray:
    """Sums over tokens: KL(p || q), -log p and -log q of what followed, and where both find the same likeliest.
    p, q logits (T, V)   followed (T)"""
    sums = np.zeros(4)
    for i in range(0, len(followed), ROWS):
        a, b, ids = log_softmax(p[i:i + ROWS]), log_softmax(q[i:i + ROWS]), followed[i:i + ROWS, None]
        sums += (np.exp(a) * (a - b)).sum(), -np.take_along_axis(a, ids, 1).sum(), \
            -np.take_along_axis(b, ids, 1).sum(), (a.argmax(1) == b.argmax(1)).sum()
    return sums


def calibrate(c: Calibration, made: Path, target: str, run: Path) -> None:
    """Prints, in the form of the report of tensors, a line for the usual arithmetic and one for exact; the source is
    computed exactly."""
    first, n = c.chunks.shape[1] // 2, 0
    ways: dict[str, tuple] = {c.text: (), f"{c.text} --exact": ("--exact",)}
    sums = {name: np.zeros(4) for name in ways}
    progress = Progress(c.chunks.size * 12 * c.n_tokens, "calibrating")
    for ids in c.chunks:
        wanted = scored_logits(run, c.source, ids, c.n_tokens, "--exact")[:-1]
        for name, options in ways.items():
            got = scored_logits(run, made, ids, c.n_tokens, *options)[:-1]
            sums[name] += compare_predictions(wanted, got, ids[first + 1:])
        n += len(wanted)
        progress.add(len(ids) * 12 * c.n_tokens)
    for name, total in sums.items():
        kl, before, after, same = total / n
        print(f"{printable(name):32} {c.type:>5} -> {target:5} KL   {kl:9.3e}  perplexity {math.exp(before):.4f} -> "
              f"{math.exp(after):.4f}, same top-1 {same:.2%} of {n}", file=sys.stderr)


# ==== 12. The command line ====

notes: list[str] = []  # for the user, at the end: an error is one line


def warn(message: str) -> None:
    if message not in notes:
        notes.append(message)


def say(message: str) -> None:
    print("export_model.py:", printable(message), file=sys.stderr)


def parse_options(words: list[str]) -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="export_model.py", formatter_class=argparse.RawDescriptionHelpFormatter,
                                     description=(__doc__ or "").partition("\n\nIn between")[0])
    parser.add_argument("source", type=Path, help="a Hugging Face folder, Meta's folder, a llama2.c .pt, a GGUF file "
                        "or cria's own file")
    parser.add_argument("-o", "--output", type=Path, required=True, help="the file to write; with --to hf a new folder")
    parser.add_argument("--to", choices=("native", "gguf", "llama2c", "hf"), default="native",
                        help="the format to write: native")
    parser.add_argument("--type", choices=("keep", "f32", "f16", "bf16", "q8", "q4", "q4m", "mixed"), default="keep",
                        help="of the matrices: keep, as in the source; mixed: q8 where errors show most, else q4m")
    parser.add_argument("--lora", type=Path, metavar="DIR", help="a PEFT adapter to merge in")
    parser.add_argument("--tokenizer", type=Path, metavar="FILE", help="vocabulary of a Meta or llama2.c checkpoint")
    parser.add_argument("--pre", metavar="NAME", help="how texts are split before merging, where it is not recognised")
    parser.add_argument("--context", type=int, metavar="N", help="positions, where a Meta checkpoint does not say them")
    parser.add_argument("--run", type=Path, metavar="FILE", help="the C program: beside this script")
    parser.add_argument("--report", action="store_true", help="the error of each tensor that is rounded")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None,
                        help="compare the result's logits with the source's: if it has at most 10^9 parameters")
    parser.add_argument("--calibrate", type=Path, metavar="TEXT", help="how far the result's predictions are from the "
                        "source's over a text file: KL divergence, perplexities; needs room for a second file")
    return parser.parse_args(words)


def find_run(named: Path | None, needed: bool) -> Path | None:
    run = named or Path(__file__).resolve().parent / "run"
    if os.access(run, os.X_OK) and run.is_file():
        return run.resolve()
    if needed or named:
        raise Refusal(f"{run}: no such program: build it with make, or name it with --run FILE")
    return None


def check_choices(o: argparse.Namespace) -> None:
    """What can be said before anything is read."""
    if not o.source.is_file() and not o.source.is_dir():
        raise Refusal(f"{o.source}: no such file or folder")
    if not o.output.resolve().parent.is_dir():
        raise Refusal(f"{o.output}: its folder does not exist")
    if o.output.exists() and (o.to == "hf" or not o.output.is_file() or o.output.samefile(o.source)):
        raise Refusal(f"{o.output}: exists already")
    if o.calibrate and not o.calibrate.is_file():
        raise Refusal(f"{o.calibrate}: no such file")
    if o.calibrate and o.to == "hf":
        raise Refusal("--calibrate measures with the C program, which does not open a Hugging Face folder")
    if o.to == "hf" and o.type not in ("keep", *FLOATS):
        raise Refusal(f"--type {o.type} is not one of a Hugging Face folder: keep, f32, f16 or bf16")
    if o.to == "llama2c" and o.type not in ("keep", "f32", "q8"):
        raise Refusal(f"--type {o.type} is not one of llama2.c: f32 (its v0) or q8 (its v2)")


def write(model: Model, o: argparse.Namespace, types: dict[str, str], path: Path, run: Path | None) -> None:
    if o.to == "hf":
        write_hf(model, o.type, path, o.report)
    elif o.to == "llama2c":
        write_llama2c(model, path, 2 if o.type == "q8" else 0)
    elif o.to == "gguf":
        write_gguf(model, types, path, o.report)
    else:
        write_native(model, types, path, o.report, run)


def plan_types(model: Model, o: argparse.Namespace) -> dict[str, str]:
    if o.to == "hf":
        choice = hf_type(model.tensors, o.type)
    else:
        choice = {"keep": "f32"}.get(o.type, o.type) if o.to == "llama2c" else o.type
    return {name: planned_type(name, tensor, choice) for name, tensor in model.tensors.items()}


def export(o: argparse.Namespace) -> None:
    check_choices(o)
    run = find_run(o.run, o.to == "native" or o.calibrate or (o.verify and o.to == "llama2c"))
    model = open_source(o.source, Choices(o.tokenizer, o.pre, o.context))
    wanted = o.verify if o.verify is not None else model.n_parameters() <= SMALL
    adapter = open_adapter(o.lora) if o.lora else None
    if wanted and model.hf_config:
        judge(model)
    if adapter:
        merge_adapter(model, adapter)
    if o.pre and "tokenizer.ggml.pre" in model.keys:
        model.keys["tokenizer.ggml.pre"] = text(o.pre)
    types = plan_types(model, o)
    wanted &= bool(run or o.to != "llama2c") and (o.to, o.type) != ("llama2c", "q8")  # whose groups are no blocks
    with tempfile.TemporaryDirectory(".tmp", f"{o.output.name}.", o.output.absolute().parent) as folder:
        made, tokenizer = Path(folder) / o.output.name, Path(folder) / "tokenizer.bin"
        beside = Path(folder) / f"{o.output.name}.calibration"
        calibration = prepare_calibration(model, o, beside, run) if o.calibrate else None
        write(model, o, types, made, run)
        with library_errors(f"{model.vocabulary}: the library of its tokenizer"):
            compare_tokens(model, made, o, run)
        if wanted:
            verify(model, types, made, o, run)
        if calibration:
            calibrate(calibration, made, main_type(model, types), run)
        made.replace(o.output)
        if o.to == "llama2c" and (packed := llama2c_tokenizer(model)):
            tokenizer.write_bytes(packed)
            tokenizer.replace(o.output.with_suffix(".tokenizer.bin"))


def main(words: list[str]) -> int:
    options = parse_options(words)
    for number in (signal.SIGTERM, signal.SIGHUP):  # so that the temporary file goes
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, frame: sys.exit(128 + number))
    notes.clear()
    try:
        export(options)
        for note in notes:
            say(note)
        return 0
    except Refusal as refusal:
        say(str(refusal))
    except (ArithmeticError, AttributeError, LookupError, TypeError, ValueError, RecursionError, struct.error,
            re.error) as error:
        say(f"{options.source}: damaged, or not of the form that is expected here: {error!r}")
    except MemoryError:
        say("not enough memory")
    except OSError as error:
        say(f"{error.filename or options.output}: {error.strerror or error}")
    except KeyboardInterrupt:
        say("interrupted")
        return 130
    return 1


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
