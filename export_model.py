#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "gguf>=0.17", "safetensors>=0.5"]
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
it, a writer takes it; a tensor is read only when its turn to be written comes. The C program looks at GGUF and native
files first, quantises, and writes native files. What a source needs beside numpy, gguf and safetensors is said in one
line: torch for a pickle (.pth, .pt, .bin), which is opened in torch's mode for weights alone.

    1 Numbers and blocks     2 Tensors          3 GGUF               4 cria's own file      5 Families
    6 Tokenizers             7 Sources          8 LoRA               9 Writers             10 Verification
   11 The command line

Letters in the shapes: V vocabulary, D dim, H heads, G kv heads, K head_dim, R rotated part of K, F ffn, E experts,
L layers, T tokens. Shapes are outermost first.
"""
from __future__ import annotations

import argparse
import base64
import contextlib
import hashlib
import importlib
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
    import gguf
    import numpy as np
    import safetensors
    from tqdm import tqdm  # which gguf needs, too
except ImportError as error:
    sys.exit(f"export_model.py: needs {error.name}: python3 -m pip install numpy gguf safetensors")


class Refusal(Exception):
    """What cannot be exported, in one line for the user. Exit status 1."""


def printable(message: str) -> str:
    """As one line that a terminal only shows, whatever names a file has."""
    return "".join(c if c.isprintable() else "?" for c in message)


def need(what: Any, *packages: str) -> list[Any]:
    """The modules of packages that only some sources need. Raises Refusal with the command that installs them."""
    try:
        return [importlib.import_module(name) for name in packages]
    except ImportError:
        raise Refusal(f"{what}: needs {' and '.join(packages)}: python3 -m pip install {' '.join(packages)}") from None


# ==== 1. Numbers and blocks ====
# A tensor is stored in one of these types. The first three are arrays of numbers (bf16, which numpy has not, as the
# upper halves of f32 in uint16). The others are ggml's blocks, kept as bytes: uint8 (rows, bytes of a row).

@dataclass(frozen=True)
class Type:
    ggml: gguf.GGMLQuantizationType
    file_type: int = -1  # general.file_type of a GGUF file that is mostly of this type; -1: not written by this program

    @property
    def cols(self) -> int:
        """Weights of a block."""
        return gguf.GGML_QUANT_SIZES[self.ggml][0]

    @property
    def n_bytes(self) -> int:
        """Bytes of a block."""
        return gguf.GGML_QUANT_SIZES[self.ggml][1]


GGML = gguf.GGMLQuantizationType
# By their names in the option --type, and in messages.
TYPES = {"f32": Type(GGML.F32, 0), "f16": Type(GGML.F16, 1), "bf16": Type(GGML.BF16, 32), "q8": Type(GGML.Q8_0, 7),
         "q4": Type(GGML.Q4_0, 2), "q4m": Type(GGML.Q4_1, 3), "q5": Type(GGML.Q5_0), "q5m": Type(GGML.Q5_1),
         "q2k": Type(GGML.Q2_K), "q3k": Type(GGML.Q3_K), "q4k": Type(GGML.Q4_K), "q5k": Type(GGML.Q5_K),
         "q6k": Type(GGML.Q6_K), "iq4nl": Type(GGML.IQ4_NL), "iq4xs": Type(GGML.IQ4_XS), "mxfp4": Type(GGML.MXFP4)}
FLOATS = {"f32": np.dtype("<f4"), "f16": np.dtype("<f2"), "bf16": np.dtype("<u2")}
SLAB = 1 << 16  # weights that are converted at once: they stay in the processor's cache


def stored_form(shape: tuple[int, ...], type_name: str) -> tuple[np.dtype, tuple[int, ...]]:
    """How an array holds a tensor of this type: of which numbers, and of which shape."""
    if type_name in FLOATS:
        return FLOATS[type_name], shape
    kind = TYPES[type_name]
    return np.dtype(np.uint8), (*shape[:-1], shape[-1] // kind.cols * kind.n_bytes)


def stored_bytes(shape: tuple[int, ...], type_name: str) -> int:
    number, stored = stored_form(shape, type_name)
    return math.prod(stored) * number.itemsize


def encode(x: np.ndarray, type_name: str) -> np.ndarray:
    """Rows of numbers as a file stores them, each rounded to the nearest; of blocks, as gguf does it.
    x f32 (rows, cols)   out (rows, cols) of f32, f16 or uint16, or uint8 (rows, bytes of a row)
    Raises Refusal for numbers beyond the type's range."""
    with np.errstate(all="ignore"):
        stored = gguf.quantize(np.ascontiguousarray(x), TYPES[type_name].ggml)
        stored = stored.view(FLOATS["bf16"]) if type_name == "bf16" else stored
        if not np.isfinite(decode(stored, type_name)[np.isfinite(x)]).all():
            raise Refusal(f"has numbers beyond the range of {type_name}; use --type "
                          f"{'bf16 or ' if type_name == 'f16' else ''}f32")
    return stored


def decode(stored: np.ndarray, type_name: str) -> np.ndarray:
    """The inverse of encode()."""
    if type_name == "bf16":
        return (np.asarray(stored).astype(np.uint32) << 16).view(np.float32)
    if type_name in FLOATS:
        return np.asarray(stored, np.float32)
    return gguf.dequantize(np.ascontiguousarray(stored), TYPES[type_name].ggml).astype(np.float32, copy=False)


def check_finite(stored: np.ndarray, type_name: str, first: int) -> None:
    """Refuses weights that are not finite, and names the row      stored: rows from number `first` on"""
    with np.errstate(over="ignore", invalid="ignore"):
        good = np.isfinite(decode(stored, type_name)).all(1)
    if not good.all():
        raise Refusal(f"has a weight or scale in row {first + int(good.argmin())} that is not finite")


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


def mapped(path: Path, at: int, shape: tuple[int, ...], type_name: str) -> Tensor:
    """A tensor whose bytes begin at `at`, read when they are wanted."""
    number, stored = stored_form(shape, type_name)

    def read() -> np.ndarray:
        return np.fromfile(path, number, math.prod(stored), offset=at).reshape(stored)
    return Tensor(shape, type_name, read)


SAFETENSORS_TYPES = {"F32": "f32", "F16": "f16", "BF16": "bf16"}


def open_safetensors(path: Path) -> dict[str, Tensor]:
    """The package checks that the tensors fill the file, without gaps: so each begins where the one before ends."""
    try:
        with path.open("rb") as file, safetensors.safe_open(path, "numpy") as whole:
            at, tensors = 8 + int.from_bytes(file.read(8), "little"), {}
            for name in whole.offset_keys():
                part = whole.get_slice(name)
                if part.get_dtype() not in SAFETENSORS_TYPES:
                    raise Refusal(f"{path}: {name} has dtype {part.get_dtype()}, expected F32, F16 or BF16")
                tensors[name] = mapped(path, at, tuple(part.get_shape()), SAFETENSORS_TYPES[part.get_dtype()])
                at += stored_bytes(tensors[name].shape, tensors[name].type)
            return tensors
    except safetensors.SafetensorError as error:
        raise Refusal(f"{path}: not a safetensors file, or not copied whole: {error}") from None


def open_pickle(path: Path) -> dict[str, Any]:
    """A file of torch.save(), by torch's reader that makes nothing but tensors and plain containers."""
    (torch,) = need(path, "torch")
    try:
        return torch.load(path, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch raises many kinds
        raise Refusal(f"{path}: torch cannot open it: {first_line(error)}") from None


def of_torch(name: str, t: Any) -> Tensor:
    types = {"torch.float32": "f32", "torch.float16": "f16", "torch.bfloat16": "bf16"}
    found = str(getattr(t, "dtype", type(t).__name__))
    if found not in types or str(t.layout) != "torch.strided":
        raise Refusal(f"{name} has dtype {found}, expected float32, float16 or bfloat16")

    def read() -> np.ndarray:
        (torch,) = need(name, "torch")
        whole = t.detach().contiguous()
        return whole.view(torch.int16).numpy().view("<u2") if types[found] == "bf16" else whole.numpy()
    return Tensor(tuple(t.shape), types[found], read)


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

U32, I32, F32, BOOL, STRING, ARRAY = (gguf.GGUFValueType[name] for name in (
    "UINT32", "INT32", "FLOAT32", "BOOL", "STRING", "ARRAY"))
NUMBERS = {U32: "<u4", I32: "<i4", F32: "<f4", BOOL: "?"}  # the arrays that this program makes


@dataclass(frozen=True)
class Value:
    """Of a key. An array has an item kind, and its data are a list of str, or a numpy array."""
    kind: gguf.GGUFValueType
    data: Any
    item: gguf.GGUFValueType | None = None


def u32(x: int) -> Value:
    return Value(U32, int(x))


def f32(x: float) -> Value:
    return Value(F32, float(np.float32(x)))


def boolean(x: Any) -> Value:
    return Value(BOOL, bool(x))


def text(x: str) -> Value:
    return Value(STRING, x)


def array(item: gguf.GGUFValueType, values: list) -> Value:
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
    whole.keys = {key: value for key, value in whole.keys.items() if not key.startswith("split.")}
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


class Reader(gguf.GGUFReader):
    """gguf's, with a plain array in place of numpy's of a mapped file, which takes three times as long to cut up."""

    def _get(self, *words: Any, **more: Any) -> np.ndarray:
        self.data = np.asarray(self.data)
        return super()._get(*words, **more)


def open_gguf_part(path: Path) -> Model:
    try:
        reader = Reader(path)
    except (LookupError, TypeError, ValueError) as error:
        raise Refusal(f"{path}: not a GGUF file, or not copied whole: {first_line(error)}") from None
    keys = {name: gguf_value(found) for name, found in reader.fields.items() if not name.startswith("GGUF.")}
    names, tensors = {kind.ggml: name for name, kind in TYPES.items()}, {}
    for t in reader.tensors:
        if t.tensor_type not in names:
            raise Refusal(f"{path}: {t.name} is of type {t.tensor_type.name}, which is not known here")
        tensors[t.name] = mapped(path, t.data_offset, tuple(t.shape[::-1].tolist()), names[t.tensor_type])
    return Model(path, keys, tensors)


def gguf_value(found: gguf.ReaderField) -> Value:
    kind, item = found.types[0], found.types[1] if len(found.types) > 1 else None
    parts = [found.parts[i] for i in found.data]
    if STRING in (kind, item):
        texts = [part.tobytes().decode("utf-8", "surrogateescape") for part in parts]
        return Value(kind, texts if item else texts[0], item)
    if kind == ARRAY:
        return Value(kind, np.concatenate(parts) if parts else [], item)
    return Value(kind, parts[0][0].item())


def write_gguf(model: Model, types: dict[str, str], path: Path) -> None:
    """types: the type that each tensor is written in      Raises Refusal where a weight is not finite."""
    writer = gguf.GGUFWriter(path, model.arch)
    keys = {"general.type": text("model")} | model.keys
    if any(t.type != types[name] for name, t in model.tensors.items()) or "general.file_type" not in keys:
        keys["general.file_type"] = u32(file_type(list(types.values())))
    keys["general.quantization_version"] = u32(gguf.GGML_QUANT_VERSION)
    for key, value in keys.items():
        data = value.data.tolist() if isinstance(value.data, np.ndarray) else value.data
        if value.item == STRING:
            data = [s.encode("utf-8", "surrogateescape") for s in data]
        elif value.kind == STRING:
            data = data.encode("utf-8", "surrogateescape")
        if key not in ("general.architecture", "general.alignment") and (value.kind != ARRAY or data):
            writer.add_key_value(key, data, value.kind, value.item)
    for name, t in model.tensors.items():
        n_bytes = stored_bytes(t.shape, types[name])
        writer.add_tensor_info(name, t.shape, np.dtype("<f4"), n_bytes, TYPES[types[name]].ggml)
    try:
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        file = writer.fout[0]
        writer.write_padding(file, file.tell())
        write_tensors(file, {name: (t, types[name]) for name, t in model.tensors.items()}, writer.data_alignment)
    finally:
        writer.close()


def file_type(types: list[str]) -> int:
    """general.file_type: that of most matrices."""
    known = [TYPES[t].file_type for t in types if t != "f32" and TYPES[t].file_type >= 0]
    return max(sorted(set(known)), key=known.count) if known else 0


# ==== 4. cria's own file ====
# Drawn at the head of run.c's "cria's own file". A matrix lies in tiles of 16 rows x 32 columns, or 256: here they
# become GGUF's rows of blocks again, with the same bits. The C program has looked at the file before.

NATIVE_MAGIC = b"\x89cria\r\n\x1a"
NATIVE_HEADER = np.dtype([("magic", "S8"), ("layout", "<u4"), ("n_tensors", "<u4"), ("n_bytes", "<u8"),
                          ("family", "S16"), ("sections", "<u8", (5, 2)), ("zero", "<u8")])
NATIVE_TENSOR = np.dtype([("name", "S64"), ("type", "<u4"), ("rows", "<u4"), ("cols", "<u4"), ("n", "<u4"),
                          ("at", "<u8"), ("n_bytes", "<u8")])
# By its number, a matrix's type and the fields of its blocks, in ggml's order. d and m are scale and minimum, q the
# weights, s smaller scales, k those of q4k and q5k. q4:2:32 are the weights' bits from number 4 on, 2 of each weight;
# those that share a byte are 32 weights apart.
NATIVE_TYPES = (("f32", ""), ("f16", ""), ("bf16", ""), ("q8", "d q0:8:1"), ("q8f", "d q0:8:1"), ("q4", "d q0:4:16"),
                ("q4m", "d m q0:4:16"), ("q5", "d q4:1:1 q0:4:16"), ("q5m", "d m q4:1:1 q0:4:16"),
                ("q2k", "s0:8:1 q0:2:32 d m"), ("q3k", "q2:1:32 q0:2:32 s0:4:8 s4:2:4 d"), ("q4k", "d m k q0:4:32"),
                ("q5k", "d m k q4:1:32 q0:4:32"), ("q6k", "q0:4:64 q4:2:32 s0:8:1 d"), ("iq4nl", "d q0:4:16"),
                ("iq4xs", "d s4:2:1 s0:4:1 q0:4:16"), ("mxfp4", "d q0:4:16"))
NATIVE_VECTOR = 255
SCALE_BYTES = {"q8f": 4, "mxfp4": 1}  # others: 2
N_SMALL_SCALES = {"q2k": 16, "q3k": 16, "q4k": 16, "q5k": 16, "q6k": 16, "iq4xs": 8}  # of a row in a tile
NATIVE_PRE = ("gpt-2", "smollm", "llama-bpe", "dbrx", "qwen2", "deepseek-llm", "default", "mpt", "command-r", "hunyuan",
              "glm4", "qwen35", "tekken", "gpt-4o", "deepseek-v3", "deepseek-coder")


def pick_bits(x: np.ndarray, which: str) -> np.ndarray:
    """Some bits of small numbers, as many in a byte as fit, the first in its lowest bits      which: as q4:2:32"""
    shift, bits, apart = map(int, which.split(":"))
    x = (x >> shift & (1 << bits) - 1).reshape(*x.shape[:-1], -1, 8 // bits, apart)
    return np.bitwise_or.reduce(x << np.arange(0, 8, bits, np.uint8)[:, None], -2).reshape(*x.shape[:-3], -1)


def weights_of_planes(w: np.ndarray, bits: int) -> np.ndarray:
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


def untile(tiles: np.ndarray, type_name: str, layout: str) -> np.ndarray:
    """uint8 (row tiles, column tiles, bytes of a tile) -> rows as in a GGUF file; of q8f, floats"""
    r, c, _ = tiles.shape
    if type_name in FLOATS:
        numbers = tiles.reshape(r, c, -1).view(FLOATS[type_name]).reshape(r, c, 32, 16)
        return numbers.transpose(0, 3, 1, 2).reshape(r * 16, c * 32)

    def take(x: np.ndarray, n: int) -> np.ndarray:
        """What has n bytes for each of 16 rows, one row after the other, once or several times, by rows."""
        return x.reshape(r, c, -1, 16, n).transpose(0, 3, 1, 2, 4).reshape(r * 16, c, -1)
    fields, at, wide, n_small = {}, 0, SCALE_BYTES.get(type_name, 2), N_SMALL_SCALES.get(type_name, 0)
    for name, n_bytes, n in (("d", wide, wide), ("m", 2 * (" m" in layout), 2), ("s", n_small, 1)):
        fields[name] = take(tiles[..., at:at + 16 * n_bytes], n)
        at += 16 * n_bytes
    bits = sum(int(part.split(":")[1]) for part in layout.split() if part[0] == "q")
    q = weights_of_planes(tiles[..., at:].reshape(r, c, -1, 64 * bits), bits)
    fields["q"] = take(q.reshape(r, c, -1), 4)
    if type_name == "q8f":
        scale = np.ascontiguousarray(fields["d"]).view("<f4")
        return (fields["q"].view(np.int8).astype(np.float32) * scale).reshape(r * 16, -1)
    if type_name in ("q3k", "iq4xs"):  # whose smaller scales are signed in tiles
        fields["s"] = fields["s"] + np.uint8(32)
    if "k" in layout:  # of eight scales and eight minima, the upper bits of the last four go to the first four
        s = fields["s"].reshape(r * 16, c, 2, 2, 4)
        low, high = s[..., 0, :], s[..., 1, :]
        last = high[..., 0, :] & 15 | (high[..., 1, :] & 15) << 4
        fields["k"] = np.concatenate([(low | high >> 4 << 6).reshape(r * 16, c, 8), last], 2)
    parts = [pick_bits(fields[part[0]], part[1:]) if part[1:] else fields[part] for part in layout.split()]
    return np.concatenate(parts, 2).reshape(r * 16, -1)


def native_tensor(path: Path, record: np.void) -> tuple[str, Tensor]:
    """record: of NATIVE_TENSOR"""
    name = record["name"].decode("ascii", "replace")
    number, rows, cols, n, at, n_bytes = (int(record[key]) for key in NATIVE_TENSOR.names[1:])
    if number == NATIVE_VECTOR:
        return name, mapped(path, at, (cols,), "f32")
    type_name, layout = NATIVE_TYPES[number]
    grid = n * -(-rows // 16), -(-cols // (256 if type_name in N_SMALL_SCALES else 32))
    by_expert = name.endswith("_exps.weight")  # each expert's matrix begins with a tile of its own

    def read() -> np.ndarray:
        tiles = np.fromfile(path, np.uint8, n_bytes, offset=at).reshape(*grid, -1)
        stored = untile(tiles, type_name, layout).reshape(n, -(-rows // 16) * 16, -1)[:, :rows]
        stored = stored[..., :cols] if not layout or type_name == "q8f" else stored
        return np.ascontiguousarray(stored if by_expert else stored[0])
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
# At 0, they are not there.
NATIVE_OFF = ("original_context", "attention_cap", "logit_cap", "n_experts", "n_experts_used")


def native_fields(section: bytes, path: Path) -> dict[str, list[float]]:
    """Records | name[28] | u32 count | f64[count] |      out: each name's values, one or one for each layer"""
    fields, at = {}, 0
    while at < len(section):
        name, count = struct.unpack_from("<28sI", section, at)
        fields[name.rstrip(b"\0").decode("ascii", "replace")] = struct.unpack_from(f"<{count}d", section, at + 32)
        at += 32 + 8 * count
    if fields.keys() != NATIVE_CONFIG.keys():
        raise Refusal(f"{path}: its configuration has or lacks {min(fields.keys() ^ NATIVE_CONFIG.keys())}, which this "
                      "program does not expect")
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


def native_vocabulary(section: bytes) -> dict[str, Value]:
    """The tokenizer's section as GGUF's keys."""
    kind, pre, flags, bos, eos, unk, n_end, n, n_merges, n_text = struct.unpack_from("<3I3i4I", section)
    at, arrays = 40, []
    for number, count in (("<f4", n), ("<u4", n + 1), ("<u4", 3 * n_merges), ("<u4", n_end),
                          ("<i4", 8 if flags & 1024 else 0), ("<u1", n), ("<u1", n if flags & 512 else 0)):
        arrays.append(np.frombuffer(section, number, count, at))
        at += arrays[-1].nbytes
    scores, starts, merges, ends, around, types, takes = arrays
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
    with path.open("rb") as file:
        header = np.frombuffer(file.read(NATIVE_HEADER.itemsize), NATIVE_HEADER)[0]
        if header["layout"] != 2:
            raise Refusal(f"{path}: has layout {header['layout']}, expected 2: make it again from its source")
        sections = []
        for at, n_bytes in header["sections"][:4]:  # the fifth has the weights
            file.seek(at)
            sections.append(file.read(n_bytes))
    config, records, tokenizer, template = sections
    arch = header["family"].decode("ascii", "replace")
    tensors = dict(native_tensor(path, record) for record in np.frombuffer(records, NATIVE_TENSOR))
    keys = native_keys(native_fields(config, path), arch, path, "rope_factors_long.weight" in tensors)
    keys = {"general.architecture": text(arch)} | keys | native_vocabulary(tokenizer)
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
    data, at, vocabulary = path.read_bytes(), 4, Vocabulary(size)
    for i in range(size):
        score, n = struct.unpack_from("<fI", data, at)
        piece, at = data[at + 8:at + 8 + n].decode("utf-8", "surrogateescape"), at + 8 + n
        if at > len(data):
            raise Refusal(f"{path}: the file ends too early: not copied whole?")
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


# ==== 9. Writers ====

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


def slabs(tensor: Tensor, type_name: str) -> Iterator[np.ndarray]:
    """A tensor in this type, a few rows at a time."""
    stored = tensor.read()
    rows = stored.reshape(-1, stored.shape[-1])
    n_rows = max(1, SLAB // tensor.shape[-1])
    for i in range(0, len(rows), n_rows):
        slab = rows[i:i + n_rows]
        check_finite(slab, tensor.type, i)
        yield slab if type_name == tensor.type else encode(decode(slab, tensor.type), type_name)


def write_tensors(file: Any, tensors: dict[str, tuple[Tensor, str]], alignment: int = 1) -> None:
    """The data of tensors in their order, each padded with zeros      tensors: name -> tensor, type to write
    Raises Refusal where a weight is not finite."""
    total = sum(stored_bytes(t.shape, type_name) for t, type_name in tensors.values())
    with tqdm(desc="writing", total=total, unit="B", unit_scale=True, disable=None) as progress:
        for name, (tensor, type_name) in tensors.items():
            try:
                for slab in slabs(tensor, type_name):
                    file.write(slab.tobytes())
                    progress.update(slab.nbytes)
            except Refusal as refusal:
                raise Refusal(f"{name} {refusal}") from None
            file.write(bytes(-stored_bytes(tensor.shape, type_name) % alignment))


def convert(model: Model, o: argparse.Namespace, plain: Path, native: Path, run: Path) -> None:
    """The C program makes its own file of a GGUF file, rounded as --type says. Raises Refusal if it does not."""
    words = [*(["--type", o.type] if o.type != "keep" else []), *(["--report"] if o.report else [])]
    done = call(run, plain, "-m", "export", *words, "-o", native)
    if done.returncode:
        kind, reason = model.hf_config.get("model_type", model.arch), last_line(done.stderr)
        if done.returncode != 1 or "use --type" in reason:  # 1: of the model itself
            raise Refusal(reason.removeprefix("run: "))
        asked = [f"{key} = true, " for key in ("use_parallel_residual", "qk_layernorm") if model.hf_config.get(key)]
        raise Refusal(f"{model.source}: the C program does not open such a model of type {kind} yet ({''.join(asked)}"
                      f"{reason.removeprefix(f'run: {plain}: ')}); --to gguf writes it for llama.cpp")
    print(done.stderr, end="", file=sys.stderr)


def write_rounded(model: Model, tensors: dict[str, Tensor], path: Path) -> None:
    """As GGUF, with the weights that the C program has rounded."""
    keys = {key: value for key, value in model.keys.items() if key != "general.file_type"}
    rounded = replace(model, keys=keys, tensors={name: tensors[name] for name in model.tensors})
    write_gguf(rounded, {name: t.type for name, t in rounded.tensors.items()}, path)


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
    usual = {"rope.freq_base": 10000.0, "attention.key_length": sizes.D // sizes.H, "rope.dimension_count": sizes.K,
             "rope.scaling.type": "none", "attention.sliding_window": 0, "expert_count": 0}
    wrong = [f"{key} = {v(key)}" for key, value in usual.items() if v(key, value) != value]
    if abs(v("attention.layer_norm_rms_epsilon") - 1e-5) > 1e-9:
        wrong.append(f"attention.layer_norm_rms_epsilon = {v('attention.layer_norm_rms_epsilon'):g}")
    known = {f"blk.{i}.{name}.weight" for i in range(v("block_count")) for name in LLAMA2C_ORDER}
    wrong += sorted(model.tensors.keys() - known - {"token_embd.weight", "output_norm.weight", "output.weight"})
    if model.arch != "llama" or wrong:
        raise Refusal(f"{model.source}: llama2.c's format has no place for "
                      + (wrong[0] if model.arch == "llama" else f"family {model.arch}"))
    return sizes


def write_llama2c(model: Model, path: Path, version: int) -> None:
    """version: 0, all in f32, or 2: matrices as int8 with an f32 scale for each group of 64 or 32"""
    sizes, n_layers = check_llama2c(model), model.value("block_count")
    context, tied = model.value("context_length"), "output.weight" not in model.tensors
    numbers = (sizes.D, sizes.F, n_layers, sizes.H, sizes.G, sizes.V if tied or version == 2 else -sizes.V, context)
    of_layers = {name: [f"blk.{i}.{name}.weight" for i in range(n_layers)] for name in LLAMA2C_ORDER}
    norms = [*of_layers["attn_norm"], *of_layers["ffn_norm"], "output_norm.weight"]
    head = [] if tied else ["output.weight"]

    def floats(names: list[str]) -> None:
        write_tensors(file, {name: (model.tensors[name], "f32") for name in names})
    with path.open("wb") as file:
        if version == 0:
            file.write(struct.pack("<7i", *numbers))
            floats(["token_embd.weight", *sum(of_layers.values(), []), "output_norm.weight"])
            file.write(bytes(4 * context * sizes.K))  # tables of cos and sin, which nobody reads
            return floats(head)
        group = next((g for g in (64, 32) if sizes.D % g == 0 and sizes.F % g == 0 and sizes.G * sizes.K % g == 0), 0)
        if not group:
            raise Refusal(f"{model.source}: rows of {sizes.D} and {sizes.F} cannot be cut into groups of 32")
        header = b"24ka" + struct.pack("<i7iBi", 2, *numbers, tied, group)
        file.write(header.ljust(256, b"\0"))
        floats(norms)
        matrices = [name for of_kind in of_layers.values() for name in of_kind if name not in norms]
        for name in ["token_embd.weight", *matrices, *head]:
            try:
                w = np.concatenate(list(slabs(model.tensors[name], "f32"))).reshape(-1, group)
            except Refusal as refusal:
                raise Refusal(f"{name} {refusal}") from None
            scale = np.abs(w).max(1, keepdims=True) / np.float32(127)
            q = np.divide(w, scale, out=np.zeros_like(w), where=scale != 0)
            file.write(np.rint(q).astype(np.int8).tobytes() + scale.astype("<f4").tobytes())


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
        write_tensors(file, tensors)


def hf_type(tensors: dict[str, Tensor], choice: str) -> str:
    """The type of all matrices of a folder: the one that is asked for, or the source's, or f32."""
    if choice != "keep":
        return choice
    types = {t.type for t in tensors.values() if len(t.shape) > 1}
    return types.pop() if len(types) == 1 and types <= set(FLOATS) else "f32"


def vector_type(tensor: Tensor, type_name: str) -> str:
    """A norm or a bias goes in the type of the matrices, if that loses nothing."""
    x = tensor.floats()
    try:
        return type_name if np.array_equal(decode(encode(x, type_name), type_name), x) else "f32"
    except Refusal:
        return "f32"


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


# ==== 10. Verification ====

N_VERIFIED = 24            # tokens
TOLERANCE = 5e-4           # of a logit, in parts of the greatest: what float32 in another order may differ by
SMALL = 1_000_000_000      # parameters up to which a model is verified unless --no-verify


def opens(run: Path, path: Path) -> bool:
    """Whether the C program knows such models. Raises Refusal where it could not try, as without memory."""
    done = call(run, path.resolve(), "-m", "inspect")
    if done.returncode > 1 or done.returncode < 0:
        raise Refusal(last_line(done.stderr).removeprefix("run: "))
    return done.returncode == 0


def program_logits(run: Path, path: Path, ids: np.ndarray) -> np.ndarray:
    """By the C program, exactly: f32 (T, V)"""
    with tempfile.TemporaryDirectory() as folder:
        out = Path(folder) / "logits"
        done = call(run, path.resolve(), "-m", "logits", "--exact", "-c", len(ids), "--ids", " ".join(map(str, ids)),
                    "-o", out)  # -c: LongRoPE's factors go by it, transformers' by the number of tokens
        if done.returncode:
            raise Refusal(f"verification failed: {last_line(done.stderr)}")
        return np.fromfile(out, "<f4").reshape(len(ids), -1)


def library_logits(folder: Path, ids: np.ndarray) -> np.ndarray:
    """By transformers, whose classes know which keys of config.json count: f32 (T, V). The whole model is in memory, in
    float32. Raises Refusal where transformers does not open it."""
    torch, transformers = need("the comparison of logits", "torch", "transformers")
    with quiet(transformers):
        try:
            network, found = transformers.AutoModelForCausalLM.from_pretrained(
                folder, dtype=torch.float32, attn_implementation="eager", experts_implementation="eager",
                local_files_only=True, output_loading_info=True)
            if not (missing := [*found["missing_keys"], *found["mismatched_keys"]]):
                with torch.no_grad():
                    return network.eval()(torch.tensor(ids[None])).logits[0].float().numpy()
        except Exception as error:  # transformers raises many kinds
            raise Refusal(f"transformers does not open {folder}: {first_line(error)}") from None
    raise Refusal(f"transformers does not find {missing[0]} in {folder}")


@contextlib.contextmanager
def quiet(transformers: Any) -> Iterator[list]:
    """What libraries would print is caught. Gives their warnings."""
    transformers.logging.set_verbosity_error()
    transformers.utils.logging.disable_progress_bar()
    with warnings.catch_warnings(record=True) as said, contextlib.redirect_stdout(io.StringIO()):
        warnings.simplefilter("always")
        yield said


def model_logits(model: Model, ids: np.ndarray, run: Path | None, is_source: bool) -> np.ndarray:
    """What a model computes, f32 (T, V): a file, by the C program if it opens that; a folder, by transformers; else a
    folder that is made of it.      is_source: it is still what its source has. Raises Refusal if nothing opens it."""
    if is_source and run and model.source.is_file() and opens(run, model.source):
        return program_logits(run, model.source, ids)
    if 6 * model.n_parameters() > available_memory():
        raise Refusal(f"transformers needs {6 * model.n_parameters() >> 20} MiB to compute the logits")
    need("the comparison of logits", "torch", "transformers")
    if is_source and model.hf_config:
        try:
            return library_logits(model.source, ids)
        except Refusal as refusal:
            warn(f"{refusal}; compared with a folder that is made of what was read")
    with tempfile.TemporaryDirectory() as folder:
        base = Path(folder) / "base"
        words = {key: value for key, value in model.keys.items() if not key.startswith("tokenizer.")}
        write_hf(replace(model, keys=words), "keep", base, False)
        return library_logits(base, ids)


def made_logits(path: Path, ids: np.ndarray, o: argparse.Namespace, run: Path | None) -> np.ndarray:
    """What was written computes, f32 (T, V)"""
    if o.to == "hf":
        return library_logits(path, ids)
    if run and (o.to != "gguf" or opens(run, path)):
        return program_logits(run, path, ids)
    return model_logits(open_source(path, Choices(pre=o.pre)), ids, None, True)


def log_softmax(logits: np.ndarray) -> np.ndarray:
    """log p      f64 (T, V)"""
    x = logits.astype(np.float64) - logits.max(-1, keepdims=True)
    return x - np.log(np.exp(x).sum(-1, keepdims=True))


def compare_logits(made: np.ndarray, wanted: np.ndarray) -> float:
    """The greatest difference. Raises Refusal where it is more than rounding."""
    if made.shape != wanted.shape or not np.isfinite(made).all():
        raise Refusal("verification failed: the result has logits that are not finite, or of another number")
    off, scale = float(np.abs(made - wanted).max()), max(1.0, float(np.abs(wanted).max()))
    if off > TOLERANCE * scale:
        raise Refusal(f"verification failed: a logit is off by {off:.3g}, and the greatest is {scale:.3g}, compared "
                      "with what the source computes, by the C program or transformers")
    return off


def verify(model: Model, o: argparse.Namespace, made: Path, plain: Path | None, run: Path | None) -> None:
    """Compares logits of what was written with the source's: they are the same, up to the order of sums, before weights
    were rounded. Raises Refusal if they are not, and if --verify asks for what cannot be.
    plain: the file of which `made` is the rounded one; `made` itself if it is not; None: there is no such file"""
    try:
        family_of(model)
        ids = np.random.default_rng(1).integers(
            0, sizes_of(model).V, min(N_VERIFIED, model.value("context_length", N_VERIFIED)))
        wanted = model_logits(model, ids, run, not o.lora)
        got = made_logits(made, ids, o, run)
        before = got if plain in (made, None) else program_logits(run, plain, ids)
    except Refusal as refusal:
        if o.verify or "verification failed" in str(refusal):
            raise Refusal(f"cannot be verified: {refusal}") from None
        return warn(f"not verified: {refusal}")
    said = f"computed as written within {compare_logits(before, wanted):.2g}" if plain else "rounded"
    p, q = log_softmax(wanted), log_softmax(got)
    print(f"verified on {len(ids)} tokens: {said}; to the source, greatest difference "
          f"{np.abs(got - wanted).max():.3g}, KL {(np.exp(p) * (p - q)).sum(-1).mean():.3g}", file=sys.stderr)


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
        path, opened = Path(folder) / "text", made
        if o.to not in ("native", "gguf") or not opens(run, made):
            opened = Path(folder) / "vocabulary.gguf"
            write_gguf(replace(model, tensors={}), {}, opened)

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


# ==== 11. The command line ====

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
    parser.add_argument("--report", action="store_true", help="the error of each tensor that the C program rounds")
    parser.add_argument("--verify", action=argparse.BooleanOptionalAction, default=None,
                        help="compare the result's logits with the source's: if it has at most 10^9 parameters")
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
    if o.to == "hf" and o.type not in ("keep", *FLOATS):
        raise Refusal(f"--type {o.type} is not one of a Hugging Face folder: keep, f32, f16 or bf16")
    if o.to == "llama2c" and o.type not in ("keep", "f32", "q8"):
        raise Refusal(f"--type {o.type} is not one of llama2.c: f32 (its v0) or q8 (its v2)")


def is_written_here(source: Path) -> bool:
    """Whether it is a GGUF or a native file."""
    if not source.is_file():
        return False
    with source.open("rb") as file:
        return file.read(4) in (b"GGUF", NATIVE_MAGIC[:4])


def look(source: Path, run: Path) -> None:
    """The C program sees a GGUF or native file first: its parsers are made for files of strangers. What it has against
    the names of tensors is not the end: single experts are joined here, and more of StableLM is known."""
    done = call(run, source.resolve(), "-m", "inspect")
    if done.returncode and not re.search(r" is missing|, or no \w+ has it", done.stderr):
        raise Refusal(last_line(done.stderr).removeprefix("run: "))


def write(model: Model, o: argparse.Namespace, made: Path, run: Path | None) -> Path | None:
    """Writes the model, and returns the file that has the source's own weights, or wider ones: `made`; or, where that
    one is rounded, the GGUF file that the C program made it of, if it did."""
    wider = all(len(t.shape) == 1 or o.type in ("keep", "f32", t.type) for t in model.tensors.values())
    if o.to == "hf":
        write_hf(model, o.type, made, o.report)
        return made if wider else None
    if o.to == "llama2c":
        write_llama2c(model, made, 2 if o.type == "q8" else 0)
        return made if o.type != "q8" else None
    plain = made if o.to == "gguf" and o.type == "keep" else made.parent.with_name("plain.gguf")
    write_gguf(model, {name: planned_type(name, t, "keep") for name, t in model.tensors.items()}, plain)
    if o.to == "native":
        convert(model, o, plain, made, run)
    elif plain != made and opens(run, plain):
        native = made.parent.with_name("rounded.bin")
        convert(model, o, plain, native, run)
        write_rounded(model, open_native(native).tensors, made)
        native.unlink()
    elif plain != made:
        warn("the C program does not open it: rounded to the nearest, as gguf does")
        write_gguf(model, {name: planned_type(name, t, o.type) for name, t in model.tensors.items()}, made)
        return None
    return made if wider else plain


def export(o: argparse.Namespace) -> None:
    check_choices(o)
    of_program = is_written_here(o.source)
    run = find_run(o.run, of_program or o.to == "native" or (o.to == "gguf" and o.type != "keep")
                   or bool(o.verify and o.to == "llama2c"))
    if of_program:
        look(o.source, run)
    model = open_source(o.source, Choices(o.tokenizer, o.pre, o.context))
    wanted = o.verify if o.verify is not None else model.n_parameters() <= SMALL
    if o.lora:
        merge_adapter(model, open_adapter(o.lora))
    if o.pre and "tokenizer.ggml.pre" in model.keys:
        model.keys["tokenizer.ggml.pre"] = text(o.pre)
    with tempfile.TemporaryDirectory(".tmp", f"{o.output.name}.", o.output.absolute().parent) as folder:
        made, tokenizer = Path(folder) / "made" / o.output.name, Path(folder) / "tokenizer.bin"
        made.parent.mkdir()
        plain = write(model, o, made, run)
        with library_errors(f"{model.vocabulary}: the library of its tokenizer"):
            compare_tokens(model, made, o, run)
        if wanted and (run or o.to != "llama2c"):
            verify(model, o, made, plain, run)
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
