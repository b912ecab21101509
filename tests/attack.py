#!/usr/bin/env python3
"""The attack suite: damaged files, absurd options and hostile circumstances. Python's standard library only.

    make attack                          all rows; prints a table and ends with status 1 if one of them fails
    make attack ATTACK="--rows 1-20,36"  some of them
    make attack ATTACK=--full            the sweeps with every step on every file, and what needs gigabytes

A row is one kind of attack; its number is that of the list that README's section on safety describes. Most cases run
./run in a process of its own, and of each is demanded: no signal; the exit status that README names; where it is not 0,
exactly one line on stderr, which names the program; no control characters in it; less than two seconds; and at most the
size of its files and 64 MiB of memory. The sweeps over headers (rows 7, 13, 14) run in build/attack, which is compiled
with the address and undefined-behaviour sanitizers; so do the files that the other rows make, once more.
"""
from __future__ import annotations

import argparse
import array
import ctypes
import errno
import io
import json
import math
import os
import random
import resource
import shutil
import signal
import socket
import stat
import struct
import subprocess
import sys
import tempfile
import threading
import time
import traceback
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
GOLDEN = ROOT / "tests" / "golden"
RUN, SWEEP, TEST = ROOT / "run", ROOT / "build" / "attack", ROOT / "build" / "test"
SECONDS, MEMORY = 2.0, 64 << 20
SPM, BPE, Q = GOLDEN / "llama_linear.gguf", GOLDEN / "qwen2.gguf", GOLDEN / "mixed.gguf"
V0, V1, V2, Z = (GOLDEN / name for name in ("llama2c_v0.bin", "llama2c_v1.bin", "llama2c_v2.bin", "tokenizer.bin"))
GENERATE = ("-q", "-t", "0", "-n", "2", "-i", "Once")
TOKENIZE = ("-m", "tokenize", "-f", "-")
FOLDER = Path("/")  # where files are made; main() sets it


# ==== 1. One process ====

class Outcome:
    """How a process ended."""

    def __init__(self, words: list[str], status: int, out: bytes, err: bytes, seconds: float, peak: int):
        self.words, self.status, self.out, self.err, self.seconds, self.peak = words, status, out, err, seconds, peak

    def __str__(self) -> str:
        shown = " ".join(w if len(w) < 60 else w[:40] + "..." for w in self.words[:12])
        return (f"{shown}: status {self.status}, {self.seconds:.2f} s, {self.peak >> 20} MiB, stderr "
                f"{self.err[:300]!r}, stdout {self.out[:60]!r}")


def prepare(closed: Iterable[int], limits: dict[int, int], nobody: bool, before: Callable[[], None] | None) -> None:
    """In the child, before it becomes the program."""
    for number, limit in limits.items():
        resource.setrlimit(number, (limit, limit))
    if nobody:
        os.setgroups([])
        os.setgid(65534)
        os.setuid(65534)
    if before:
        before()
    for descriptor in closed:
        os.close(descriptor)


running: list[subprocess.Popen] = []


def start(words: list, *, stdin=subprocess.DEVNULL, stdout=None, env: dict[str, str] | None = None,
          closed: Iterable[int] = (), limits: dict[int, int] | None = None, nobody: bool = False,
          before: Callable[[], None] | None = None) -> tuple:
    out, err = tempfile.TemporaryFile(), tempfile.TemporaryFile()
    to_err = err
    if resource.RLIMIT_FSIZE in (limits or {}):  # which is not to hold for messages
        reader, writer = os.pipe()
        err, to_err = os.fdopen(reader, "rb"), os.fdopen(writer, "wb")
    special = closed or limits or nobody or before
    process = subprocess.Popen([os.fsencode(w) for w in words], stdin=stdin, stdout=out if stdout is None else stdout,
                               stderr=to_err, env=None if env is None else os.environ | env, cwd=FOLDER,
                               preexec_fn=(lambda: prepare(closed, limits or {}, nobody, before)) if special else None)
    if to_err is not err:
        to_err.close()
    running.append(process)
    return process, out, err, time.monotonic(), words


def has_ended(process: subprocess.Popen) -> bool:
    """Leaves its status to finish(), as poll() would not."""
    return os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None


def finish(started: tuple, timeout: float = 30) -> Outcome:
    process, out, err, begin, words = started
    timer = threading.Timer(timeout, process.kill)
    timer.start()
    _, status, usage = os.wait4(process.pid, 0)
    timer.cancel()
    running.remove(process)
    process.returncode = os.waitstatus_to_exitcode(status)
    seconds = time.monotonic() - begin
    text = []
    for file in (out, err):
        if file.seekable():
            file.seek(0)
        text.append(file.read())
        file.close()
    return Outcome([os.fsdecode(os.fsencode(w)) for w in words], process.returncode, *text, seconds,
                   usage.ru_maxrss * 1024)


def run(*words, program: Path = RUN, input: bytes | None = None, timeout: float = 30, **how) -> Outcome:
    if input is not None:
        file = tempfile.TemporaryFile()
        file.write(input)
        file.seek(0)
        how["stdin"] = file
    return finish(start([program, *words], **how), timeout)


# ==== 2. What is demanded ====

class Row:
    def __init__(self, number: int, what: str, make: Callable):
        self.number, self.what, self.make = number, what, make
        self.cases = 0
        self.faults: list[str] = []
        self.note = ""

    def demand(self, holds: bool, fault: str) -> None:
        self.cases += 1
        if not holds:
            self.faults.append(fault)

    def skip(self, why: str) -> None:
        self.note = why


rows: list[Row] = []
now: Row  # the one that is running


def row(number: int, what: str) -> Callable:
    def keep(make: Callable) -> Callable:
        rows.append(Row(number, what, make))
        return make
    return keep


def is_control(c: str) -> bool:
    """C0, C1, and bytes that are no UTF-8."""
    return ord(c) < 32 or 127 <= ord(c) < 160 or 0xdc00 <= ord(c) < 0xe000


def complaints(o: Outcome, statuses: Iterable[int], size: int, word: str, slow: bool,
               lines: int | None) -> Iterator[str]:
    """What is wrong with how a process ended."""
    if o.status not in statuses:
        yield f"wanted status {' or '.join(map(str, statuses))}"
    text = o.err.decode("utf-8", "surrogateescape")
    if any(is_control(c) for c in text if c != "\n"):
        yield "control characters on stderr"
    name = "export_model.py: " if "export_model.py" in " ".join(o.words) else f"{Path(o.words[0]).name}: "
    wanted = lines if lines is not None else 1 if o.status in (1, 2, 3, 4, 5) else None
    if wanted is not None and (text.count("\n") != wanted or (wanted == 1 and not text.startswith(name))):
        yield f"wanted {wanted} line{'s' if wanted != 1 else ''} on stderr"
    if word not in text:
        yield f"wanted {word!r} on stderr"
    if not slow and o.seconds > SECONDS:
        yield "too slow"
    if o.peak > size + MEMORY:
        yield f"too much memory for files of {size} bytes"


def size_of(words: list[str]) -> int:
    """Of the files that a command names, as far as they take place on the disk."""
    total = 256 << 20 if "bench" in words else 0  # whose measure of the memory takes so much
    for w in words:
        try:
            info = os.stat(FOLDER / w) if len(w) < 4096 and "\0" not in w else None
        except (OSError, ValueError):
            continue
        if info and stat.S_ISREG(info.st_mode):
            total += min(info.st_size, max(info.st_blocks * 512, 1 << 20)) if info.st_size > 1 << 30 else info.st_size
    return total


def expect(status: int | tuple[int, ...], *words, word: str = "", slow: bool = False, lines: int | None = None,
           out: bytes | None = None, **how) -> Outcome:
    """Runs ./run with these words. A run that took too long is given a second chance: the machine may be busy."""
    statuses = status if isinstance(status, tuple) else (status,)
    for attempt in range(2):
        o = run(*words, **how)
        size = size_of(o.words[1:])
        found = list(complaints(o, statuses, size, word, slow, lines))
        if found != ["too slow"]:
            break
    if out is not None and o.out != out:
        found.append(f"wanted {out[:60]!r} on stdout")
    now.demand(not found, f"{o}: {', '.join(found)}")
    return o


made: list[Path] = []  # the files of all rows, for the sanitizers


def put(name: str, data: bytes) -> Path:
    path = FOLDER / f"{now.number}-{name}"
    path.write_bytes(data)
    made.append(path)
    return path


def in_child(make: Callable[[], object]) -> None:
    """Makes large files, for what this process takes itself counts as the memory of what it starts, too."""
    pid = os.fork()
    if pid == 0:
        try:
            make()
            os._exit(0)
        finally:
            os._exit(1)
    if os.waitpid(pid, 0)[1]:
        sys.exit("attack.py: a large file could not be made")


def refused(name: str, data: bytes, word: str = "", *more) -> None:
    """A model's file that must be refused."""
    path = put(name, data)
    expect(1, path.name, *GENERATE, *more, word=word)
    path.unlink() if len(data) > 1 << 20 else None


def opens(name: str, data: bytes, *more) -> Outcome:
    return expect(0, put(name, data).name, *GENERATE, *more)


def either(name: str, data: bytes, *more, status: tuple[int, ...] = (0, 1)) -> Outcome:
    return expect(status, put(name, data).name, *GENERATE, *more)


# ==== 3. Files ====

U8, I8, U16, I16, U32, I32, F32, BOOL, STRING, ARRAY, U64, I64, F64 = range(13)
FORMATS = {U8: "B", I8: "b", U16: "H", I16: "h", U32: "I", I32: "i", F32: "f", BOOL: "B", U64: "Q", I64: "q", F64: "d"}


def string(s: str | bytes) -> bytes:
    data = s.encode() if isinstance(s, str) else s
    return struct.pack("<Q", len(data)) + data


def value(kind: int, x) -> bytes:
    """A value with its type before it."""
    if kind == STRING:
        return struct.pack("<I", kind) + string(x)
    return struct.pack("<I" + FORMATS[kind], kind, x)


def values(kind: int, items: list, count: int | None = None) -> bytes:
    data = b"".join(string(x) for x in items) if kind == STRING else struct.pack(f"<{len(items)}{FORMATS[kind]}",
                                                                                 *items)
    return struct.pack("<IIQ", ARRAY, kind, len(items) if count is None else count) + data


class Gguf:
    """A GGUF file in parts; pack() puts them together, whatever they say."""

    def __init__(self, data: bytes):
        self.version, self.n_tensors, self.n_keys = struct.unpack_from("<IQQ", data, 4)
        self.data, self.at = data, 24
        self.keys: list[list] = []     # name, value with its type
        self.tensors: list[list] = []  # name, n_dims, dims, type, offset
        for _ in range(self.n_keys):
            name, begin = self.take_string(), self.at
            kind = self.take("<I")
            item, count = (self.take("<I"), self.take("<Q")) if kind == ARRAY else (kind, 1)
            for _ in range(count):
                self.take_string() if item == STRING else self.take("<" + FORMATS[item])
            self.keys.append([name, data[begin:self.at]])
        for _ in range(self.n_tensors):
            name, n_dims = self.take_string(), self.take("<I")
            dims = [self.take("<Q") for _ in range(n_dims)]
            self.tensors.append([name, n_dims, dims, self.take("<I"), self.take("<Q")])
        self.weights = bytearray(data[self.at + -self.at % 32:])

    def take(self, form: str):
        x, = struct.unpack_from(form, self.data, self.at)
        self.at += struct.calcsize(form)
        return x

    def take_string(self) -> str:
        n = self.take("<Q")
        self.at += n
        return self.data[self.at - n:self.at].decode("utf-8", "surrogateescape")

    def set(self, key: str, new: bytes | None) -> Gguf:
        """Another value, a new key, or (None) no such key."""
        kept = [k for k in self.keys if k[0] != key]
        place = next((i for i, k in enumerate(self.keys) if k[0] == key), len(kept))
        self.keys = kept if new is None else kept[:place] + [[key, new]] + kept[place:]
        self.n_keys = len(self.keys)
        return self

    def tensor(self, name: str) -> list:
        return next(t for t in self.tensors if t[0] == name)

    def header(self) -> bytes:
        out = b"GGUF" + struct.pack("<IQQ", self.version, self.n_tensors, self.n_keys)
        for name, content in self.keys:
            out += string(name.encode("utf-8", "surrogateescape") if isinstance(name, str) else name) + content
        for name, n_dims, dims, kind, offset in self.tensors:
            out += string(name) + struct.pack(f"<I{len(dims)}QIQ", n_dims, *dims, kind, offset)
        return out

    def pack(self) -> bytes:
        out = self.header()
        return out + bytes(-len(out) % 32) + self.weights


def gguf(path: Path = SPM) -> Gguf:
    return Gguf(path.read_bytes())


def with_key(key: str, new: bytes | None, path: Path = SPM) -> bytes:
    return gguf(path).set(key, new).pack()


def with_tensor(name: str, change: Callable[[list], None], path: Path = SPM) -> bytes:
    g = gguf(path)
    change(g.tensor(name))
    return g.pack()


def key_value(key: str, path: Path = SPM) -> bytes:
    return next(v for name, v in gguf(path).keys if name == key)


def number_of_tokens(path: Path = SPM) -> int:
    return gguf(path).tensor("token_embd.weight")[2][1]


def patched(data: bytes, at: int, new: bytes) -> bytes:
    return data[:at] + new + data[at + len(new):]


def llama2c(path: Path = V0, **numbers: int) -> bytes:
    """A checkpoint of llama2.c with other numbers in its header."""
    data = path.read_bytes()
    begin = 0 if path == V0 else 8
    places = {name: begin + 4 * i for i, name in enumerate(
        ("dim", "ffn", "layers", "heads", "kv_heads", "tokens", "context"))}
    for name, x in numbers.items():
        if name == "shared":
            data = patched(data, 36, struct.pack("<B", x))
        elif name in ("version", "group"):
            data = patched(data, 4 if name == "version" else 37, struct.pack("<I", x & 0xffffffff))
        else:
            data = patched(data, places[name], struct.pack("<I", x & 0xffffffff))
    return data


_native: dict[Path, bytes] = {}


def native(path: Path = SPM) -> bytes:
    """The file that -m export makes of another."""
    if path not in _native:
        target = FOLDER / "exported.bin"
        done = run(path, "-m", "export", "-o", target.name, *(("-z", Z) if path.suffix == ".bin" else ()))
        if done.status:
            sys.exit(f"attack.py: {done}")
        _native[path] = target.read_bytes()
        target.unlink()
    return _native[path]


def native_tensor(data: bytes, name: str) -> tuple[int, int]:
    """Where a tensor of a native file begins, and how many bytes it has."""
    n, = struct.unpack_from("<I", data, 12)
    records, = struct.unpack_from("<Q", data, 56)
    for i in range(n):
        found, _, _, _, _, at, n_bytes = struct.unpack_from("<64sIIIIQQ", data, records + 96 * i)
        if found.rstrip(b"\0").decode() == name:
            return at, n_bytes
    raise KeyError(name)


CONTAINERS: dict[str, Callable[[], bytes]] = {
    "gguf": SPM.read_bytes, "native": native, "v0": V0.read_bytes, "v1": V1.read_bytes, "v2": V2.read_bytes,
}


def more_for(container: str) -> tuple:
    return ("-z", Z) if container[0] == "v" else ()


# ==== 4. A. Any file ====

@row(1, "does not exist")
def _():
    expect(1, "nowhere.gguf", word="No such file")
    expect(1, V0, "-z", "nowhere.bin", word="No such file")
    expect(3, SPM, "-f", "nowhere.txt", word="No such file")
    expect(3, SPM, "-m", "export", "-o", "nowhere/x", word="No such file")
    expect(1, "nowhere", *TOKENIZE, word="No such file")


@row(2, "no permission")
def _():
    file = put("secret.gguf", SPM.read_bytes())
    file.chmod(0)
    FOLDER.chmod(0o755)
    if os.getuid():
        expect(1, file.name, word="Permission denied")
        return
    program = FOLDER / "run"
    shutil.copy(RUN, program)
    expect(1, file.name, program=program, nobody=True, word="Permission denied")
    expect(3, put("m.gguf", SPM.read_bytes()).name, "-m", "export", "-o", "x.bin", program=program, nobody=True,
           word="Permission denied")
    expect(3, "2-m.gguf", "-f", file.name, program=program, nobody=True, word="Permission denied")
    made.remove(file)


@row(3, "a directory")
def _():
    expect(1, FOLDER, word="a directory")
    expect(1, V0, "-z", FOLDER, word="a directory")
    expect(3, SPM, "-f", FOLDER, word="directory")
    expect(3, SPM, "-m", "export", "-o", FOLDER)
    expect(3, SPM, "-m", "logits", "-i", "a", "-o", FOLDER)


@row(4, "a pipe, a device, a socket")
def _():
    os.mkfifo(FOLDER / "fifo")
    server = socket.socket(socket.AF_UNIX)
    server.bind(str(FOLDER / "socket"))
    for path in ("fifo", "socket", "/dev/zero", "/dev/null", "/dev/random", "/dev/full", "/dev/tty", "/proc/self/mem"):
        expect(1, path, *GENERATE)
        expect(1, V0, "-z", path, *GENERATE)
        expect(1, path, *TOKENIZE)
    server.close()


@row(5, "an empty file")
def _():
    empty = put("empty", b"")
    expect(1, empty.name, word="an empty file")
    expect(1, V0, "-z", empty.name, word="an empty file")
    expect(1, empty.name, *TOKENIZE, word="an empty file")
    made.remove(empty)


@row(6, "1 to 64 bytes")
def _():
    starts = {name: make()[:64] for name, make in CONTAINERS.items()}
    starts |= {"z": Z.read_bytes()[:64], "zeros": bytes(64), "ones": b"\xff" * 64,
               "random": random.Random(6).randbytes(64)}
    for name, start_bytes in starts.items():
        for n in range(1, 65):
            path = put(f"{name}-{n}{'-tokenizer.bin' if name == 'z' else ''}", start_bytes[:n])
            if n in (1, 3, 4, 7, 8, 24, 28, 63, 64):
                expect(1, path.name)
                expect(1, V0, "-z", path.name)


def sweep_files() -> list[Path]:
    files = [SPM, V0, V1, V2, Z]
    for name in ("llama_linear", "qwen2_untied", "mixed"):
        path = FOLDER / f"{name}-native.bin"
        path.write_bytes(native(GOLDEN / f"{name}.gguf"))
        files.append(path)
    others = sorted(p for p in [*GOLDEN.glob("*.gguf"), *(GOLDEN / "tokens").glob("*.gguf")] if p != SPM)
    return files + [p for p in others if p.parent == GOLDEN]


_sweeps: dict[str, list[list[str]]] = {}
SANITIZERS = {"ASAN_OPTIONS": "allocator_may_return_null=1:max_allocation_size_mb=512:detect_leaks=1"}


def sweep(kind: str) -> None:
    """One of the three sweeps over all files, each in steps: every place of the small and of one large header."""
    for path in sweep_files():
        whole = FULL or path in (SPM, V0, V1, V2) or (path.name == "llama_linear-native.bin" and kind != "words")
        step = 1 if whole else {"cut": 7, "bits": 97, "words": 61}[kind]
        step = step if path != Z or FULL else {"cut": 1, "bits": 5, "words": 7}[kind]
        if kind == "words" and path.name.endswith("native.bin"):
            step = 4 if whole else 28  # its numbers lie at multiples of four
        if kind == "words" and path == SPM and not FULL:
            step = 5
        steps = [str(step if kind == k else 0) for k in ("cut", "bits", "words")]
        o = run(*steps, path, program=SWEEP, env=SANITIZERS, timeout=3000)
        lines = [line.split("\t") for line in o.out.decode(errors="replace").splitlines()]
        now.cases += sum(int(line[2]) for line in lines)
        if o.status or o.err or not lines:
            now.faults.append(f"{path.name}: status {o.status}, {o.err[-1500:].decode(errors='replace')}")
        now.faults += [f"{line[0]}, {line[1]}: {line[5]} wrong, the first: {line[6]}" for line in lines if int(line[5])]


@row(7, "cut at every byte of the header, at every tensor's edge and beside it")
def _():
    sweep("cut")
    for container, make in CONTAINERS.items():
        data = make()
        for n in sorted({*range(0, 200, 23), *(len(data) * i // 9 for i in range(9)), len(data) - 4}):
            if n:
                refused(f"{container}-{n}", data[:n], "", *more_for(container))


@row(8, "cut by one byte in the last tensor")
def _():
    for container, make in CONTAINERS.items():
        data = make()
        if container == "gguf":
            g = gguf()
            last = max(g.tensors, key=lambda t: t[4])
            data = data[:len(data) - len(g.weights) + last[4] + 4 * math.prod(last[2])]
            opens("gguf-whole", data)
        refused(container, data[:-1], "left" if container == "v0" else "not copied whole", *more_for(container))


@row(9, "bytes behind the end")
def _():
    refused("native", native() + b"\0", "not copied whole")
    refused("native64", native() + bytes(64), "not copied whole")
    for path in (V0, V1, V2):
        for n in (1, 4, 1000):
            refused(f"{path.stem}-{n}", path.read_bytes() + bytes(n), "left", "-z", Z)
    for n in (1, 3, 7):
        expect(1, V0, "-z", put(f"z-{n}-tokenizer.bin", Z.read_bytes() + bytes(n)).name)
    wanted = run(SPM, *GENERATE).out
    expect(0, put("gguf", SPM.read_bytes() + b"\xff" * 1000).name, *GENERATE, out=wanted)  # as llama.cpp has it


@row(10, "other kinds of file")
def _():
    for name, data, word in (
            ("program", RUN.read_bytes()[:100000], "a program"), ("zip", b"PK\3\4" + bytes(96), "PyTorch"),
            ("html", b"<!DOCTYPE html><html><title>404</title></html>", "web page"), ("html2", b"<html>", "web page"),
            ("lfs", b"version https://git-lfs.github.com/spec/v1\noid sha256:00\nsize 1\n", "git lfs pull"),
            ("safetensors", struct.pack("<Q", 100) + b'{"a":{}}' + bytes(100), "safetensors"),
            ("text", b"Once upon a time " * 9, ""), ("json", b'{"a": 1}' * 9, ""),
                             ("gzip", b"\x1f\x8b\x08" + bytes(99), ""),
            ("magic", b"GGUG" + SPM.read_bytes()[4:], ""), ("crlf", native().replace(b"\r\n", b"\n", 1), "")):
        refused(name, data, word)
        expect(1, V0, "-z", f"10-{name}")


@row(11, "big-endian files")
def _():
    data = SPM.read_bytes()
    refused("FUGG", b"FUGG" + data[4:], "big-endian")
    refused("version", patched(data, 4, struct.pack(">I", 3)), "version")
    refused("ak42", patched(V1.read_bytes(), 0, b"ak42"))
    refused("v0", struct.pack(">7i", *struct.unpack("<7i", V0.read_bytes()[:28])) + V0.read_bytes()[28:])


@row(12, "versions to come, and none")
def _():
    for version in (0, 1, 4, 5, 256, 1 << 31, (1 << 32) - 1):
        refused(f"gguf-{version}", patched(SPM.read_bytes(), 4, struct.pack("<I", version)), "version")
        refused(f"native-{version}", patched(native(), 8, struct.pack("<I", version)), "layout")
        if version != 1:
            refused(f"v1-{version}", llama2c(V1, version=version), "version", "-z", Z)


@row(13, "every bit of the header flipped")
def _():
    sweep("bits")


@row(14, "every word of 4 and 8 bytes set to each extreme")
def _():
    sweep("words")


def sparse(name: str, data: bytes, size: int) -> Path | None:
    path = FOLDER / f"{now.number}-{name}"
    path.write_bytes(data)
    try:
        os.truncate(path, size)
    except OSError:
        now.skip("the file system has no files of a terabyte")
        return None
    return path


def large_model(ffn: int, layers: int = 1) -> tuple[bytes, int]:
    """The header of a GGUF with a vocabulary and large matrices, and the size that the file must have."""
    g = gguf()
    dim, vocabulary = 65536 if ffn == 1 << 20 else 1024, number_of_tokens()
    for key, x in (("embedding_length", dim), ("feed_forward_length", ffn), ("block_count", layers),
                   ("attention.head_count", 16), ("attention.head_count_kv", 16)):
        g.set(f"llama.{key}", value(U32, x))
    for key in ("rope.dimension_count", "attention.key_length", "attention.value_length"):
        g.set(f"llama.{key}", None)
    head = 64 if dim == 1024 else 1024
    g.set("llama.attention.key_length", value(U32, head)).set("llama.attention.value_length", value(U32, head))
    shapes = {"attn_norm": [dim], "ffn_norm": [dim], "attn_q": [dim, 16 * head], "attn_k": [dim, 16 * head],
              "attn_v": [dim, 16 * head], "attn_output": [16 * head, dim], "ffn_gate": [dim, ffn], "ffn_up": [dim, ffn],
              "ffn_down": [ffn, dim]}
    tensors = {"token_embd.weight": [dim, vocabulary], "output_norm.weight": [dim]}
    tensors |= {f"blk.{i}.{name}.weight": shape for i in range(layers) for name, shape in shapes.items()}
    at, g.tensors = 0, []
    for name, dims in tensors.items():
        g.tensors.append([name, len(dims), dims, 0, at])
        at += 4 * math.prod(dims)
    g.n_tensors = len(g.tensors)
    header = g.header()
    header += bytes(-len(header) % 32)
    return header, len(header) + at


@row(15, "a file of a terabyte with holes")
def _():
    tail = sparse("tail.gguf", SPM.read_bytes(), 1 << 40)
    if tail:
        expect(0, tail.name, *GENERATE, out=run(SPM, *GENERATE).out)
        tail.unlink()
    grown = sparse("native.bin", native(), 1 << 40)
    if grown:
        expect(1, grown.name, *GENERATE, word="not copied whole")
        whole = patched(native(), 16, struct.pack("<Q", 1 << 40))
        grown.write_bytes(whole)
        os.truncate(grown, 1 << 40)
        expect((0, 1), grown.name, *GENERATE)
        grown.unlink()
    header, size = large_model(1 << 20)
    huge = sparse("huge.gguf", header, size)
    if huge:
        expect(4, huge.name, *GENERATE, word="no memory")
        expect(0, huge.name, *TOKENIZE)
        huge.unlink()


@row(16, "names of 5,000 bytes, and with control characters")
def _():
    for name in ("x" * 5000, "a\nb", "a\x1b]0;title\x07b", "a\x1b[31mb", "\x9b31m", "a\x7fb", "\u202eabc", "a\rb",
                 "\t"):
        expect(1, name)
        expect(1, V0, "-z", name)
        expect(3, SPM, "-f", name)
        expect(3, SPM, "-m", "export", "-o", "nowhere/" + name)
        expect(2, SPM, "-m", name)
        expect(2, SPM, "--" + name)
        expect(2, SPM, "-n", name)
        expect(2, SPM, "--kernel", name)
        expect(2, SPM, "-m", "chat", "--template", name)
        expect(2, SPM, "--ids", name)
    for name in (b"\xff\xfe", b"a\x80b", b"\xc3", b"\xed\xa0\x80", b"\x9b31m"):
        expect(1, os.fsdecode(name))
        expect(3, SPM, "-f", os.fsdecode(name))


def wait_until(holds: Callable[[], bool], seconds: float = 10) -> bool:
    end = time.monotonic() + seconds
    while not holds():
        if time.monotonic() > end:
            return False
        time.sleep(0.002)
    return True


def while_running(words: list, do: Callable[[subprocess.Popen], None], statuses: tuple[int, ...], *, word: str = "",
                  lines: int | None = None, until: Callable[[], bool] | None = None, size: int = 0, **how) -> Outcome:
    """Starts ./run and, when it has written 30 bytes (or `until` holds), does something to it. `size`: the bytes of a
    sparse file that it may well read whole."""
    started, size = start([RUN, *words], **how), size or size_of(words)
    process, out = started[:2]
    begun = wait_until(until or (lambda: os.fstat(out.fileno()).st_size >= 30 or has_ended(process)))
    do(process)
    o = finish(started)
    found = list(complaints(o, statuses, size, word, True, lines))
    now.demand(begun and not found, f"{o}: {', '.join(found) or 'it did not begin'}")
    return o


def long_model() -> Path:
    """A native file with room for 2^20 positions."""
    path = FOLDER / "long.bin"
    if not path.exists():
        source = FOLDER / "long.gguf"
        source.write_bytes(with_key("llama.context_length", value(U32, 1 << 20)))
        if run(source.name, "-m", "export", "-o", path.name).status:
            sys.exit("attack.py: no long model")
    return path


_letter = ""


def endless(path: Path) -> list:
    """Words with which long_model() writes on and on: a prompt, found by trying some."""
    global _letter
    words = ["-q", "-t", "0", "-c", "0", "-n", "-1", "-i"]
    for letter in "abcdefghijklmnopqrstuvwxyz" if not _letter else "":
        o = run(long_model().name, *words, letter, "-n", "2000", "-c", "4000")
        if o.status == 0 and len(o.out) > 2000:
            _letter = letter
            break
    if not _letter:
        sys.exit("attack.py: every text ends early")
    return [path.name, *words, _letter]


@row(17, "a file that becomes shorter while it is mapped")
def _():
    whole = long_model().read_bytes()
    for threads in ("1", "2"):
        for size in (0, 4096, len(whole) // 2):
            path = put("cut.bin", whole)
            while_running([*endless(path), "-j", threads], lambda p: os.truncate(path, size), (3,),
                          word="became shorter")
    text = put("text.txt", b"Once upon a time there was a child. " * 2000)
    for words in (["-m", "logits", "-o", "x.out"], ["-m", "perplexity", "-c", "20000"]):
        path = put("cut.bin", whole)
        while_running([path.name, "-q", "-c", "0", "-f", text.name, "-j", "2", *words], lambda p: os.truncate(path, 0),
                      (3,),
                      word="became shorter", until=lambda: not time.sleep(0.2) or True)
    path = put("cut.bin", whole)
    reader, writer = os.pipe()
    os.write(writer, b"a\n")

    def cut(process: subprocess.Popen) -> None:
        os.truncate(path, 0)
        os.write(writer, b"b\n")
        os.close(writer)
    while_running([path.name, "-q", "-m", "chat", "-t", "0", "-n", "40", "--template", "zephyr"], cut, (3,),
                  word="became shorter", stdin=reader)
    header, size = large_model(1 << 16, 2)  # a GGUF while it is packed
    path = FOLDER / "17-packed.gguf"
    path.write_bytes(header)
    os.truncate(path, size)
    while_running([path.name, *GENERATE], lambda p: os.truncate(path, 100000), (3,), word="became shorter",
                  until=lambda: not time.sleep(0.15) or True, size=size)
    path.unlink()
    made[:] = [p for p in made if p.name != "17-cut.bin"]


@row(18, "a file that is rewritten while it is mapped")
def _():
    whole = long_model().read_bytes()
    begin, _ = native_tensor(whole, "token_embd.weight")
    for byte in (0, 0xff, 0x41):
        path = put("rewritten.bin", whole)

        def rewrite(process: subprocess.Popen) -> None:
            with path.open("r+b") as file:
                file.seek(begin)
                file.write(bytes([byte]) * (len(whole) - begin))
            time.sleep(0.1)
            os.kill(process.pid, signal.SIGINT)
        while_running(endless(path), rewrite, (130, 1, 0))
    made.remove(path)
    made[:] = [p for p in made if p.name != "18-rewritten.bin"]


@row(19, "reading fails in the middle")
def _():
    expect(3, SPM, "-f", "/proc/self/mem", word="reading failed")  # EIO at its first byte
    expect(3, SPM, "-f", "-", closed=[0], word="reading failed")
    expect(3, SPM, *TOKENIZE, closed=[0], word="reading failed")
    expect(3, SPM, "-m", "export", "-o", "/dev/full", word="No space")
    now.note = "a mapped file's read error is a SIGBUS, as in row 17"


@row(20, "one file as model and tokenizer")
def _():
    path = put("native.bin", native())
    wanted = run(path.name, *GENERATE).out
    expect(0, path.name, "-z", path.name, *GENERATE, out=wanted)
    expect(0, SPM, "-z", SPM, *GENERATE, out=wanted)
    for old in (V0, V1, V2):
        expect(1, old, "-z", old, *GENERATE)
    expect(1, Z, "-z", Z, *GENERATE)
    expect(0, path.name, "-m", "export", "-o", path.name)
    now.demand(path.read_bytes() == native(), "a file exported over itself is another")


# ==== 5. B. llama2.c's headers ====

def numbers_refused(path: Path, name: str, numbers: Iterable[int], word: str = "") -> None:
    for x in numbers:
        refused(f"{path.stem}-{name}-{x}", llama2c(path, **{name: x}), word, "-z", Z)


EXTREMES = (0, -1, -2**31, 2**31 - 1)


@row(21, "dim 0, negative, 2^31 - 1")
def _():
    for path in (V0, V1, V2):
        numbers_refused(path, "dim", (*EXTREMES, 1, 65537, 1 << 30))


@row(22, "dim that the heads do not divide")
def _():
    for path in (V0, V1, V2):
        dim, = struct.unpack_from("<i", path.read_bytes(), 0 if path == V0 else 8)
        numbers_refused(path, "dim", (dim - 1, dim + 1, dim + 2, dim * 2 + 1))


@row(23, "heads 0, negative, more than dim")
def _():
    for path in (V0, V1, V2):
        numbers_refused(path, "heads", (*EXTREMES, 7, 1000, 1025, 65536))


@row(24, "key/value heads 0, negative, too many, no divisor")
def _():
    for path in (V0, V1, V2):
        heads, = struct.unpack_from("<i", path.read_bytes(), (0 if path == V0 else 8) + 12)
        numbers_refused(path, "kv_heads", (*EXTREMES, heads + 1, 2 * heads, heads - 1 if heads > 2 else 1025))


@row(25, "heads of odd width")
def _():
    dim, _, _, heads = struct.unpack_from("<4i", V0.read_bytes())
    for h in range(1, dim + 1):
        if dim % h == 0 and dim // h % 2:
            refused(f"{h}", llama2c(heads=h, kv_heads=h), "", "-z", Z)
    refused("dim", llama2c(dim=heads * 3), "", "-z", Z)


@row(26, "layers 0, negative, 2^31 - 1")
def _():
    for path in (V0, V1, V2):
        numbers_refused(path, "layers", (*EXTREMES, 1, 3, 1024, 1025, 1 << 20))


@row(27, "hidden_dim 0, negative, 2^30")
def _():
    for path in (V0, V1, V2):
        numbers_refused(path, "ffn", (*EXTREMES, 1, 1 << 20, 1 << 30, (1 << 20) + 1))


@row(28, "vocab_size 0, INT_MIN, of another sign, 1, not the tokenizer's")
def _():
    tokens, = struct.unpack_from("<i", V0.read_bytes(), 20)
    for path in (V0, V1, V2):
        numbers_refused(path, "tokens", (*EXTREMES, -tokens, 1, 2, tokens - 1, tokens + 1, 1 << 20, (1 << 20) + 1))


@row(29, "seq_len 0, negative, 2^31 - 1")
def _():
    for path in (V0, V1, V2):
        numbers_refused(path, "context", (*EXTREMES, (1 << 20) + 1))
    for path in (V1, V2):  # the largest that there may be costs nothing before it is used
        data = llama2c(path, context=1 << 20)
        opens(path.stem, data, "-z", Z)
        expect((0, 4), f"29-{path.stem}", "-z", Z, *GENERATE, "-c", "0")


@row(30, "products that wrap to the file's size")
def _():
    for i, numbers in enumerate(({"dim": 65536, "tokens": 65536}, {"dim": 65536, "ffn": 65536, "tokens": 65536},
                                 {"dim": 32768, "ffn": 1 << 20, "layers": 1024},
                                 {"dim": 65536, "layers": 1024, "ffn": 1 << 20},
                                 {"dim": 1 << 16, "heads": 1 << 10, "kv_heads": 1 << 10, "ffn": 1 << 20,
                                  "layers": 1 << 10,
                                  "tokens": 1 << 20, "context": 1 << 20})):
        for path in (V0, V1, V2):
            for size in (28, 256, 512, 4096, 65536):
                refused(f"{path.stem}-{i}-{size}", (llama2c(path, **numbers) + bytes(65536))[:size], "", "-z", Z)


@row(31, "a header of 256 bytes whose padding is not zero")
def _():
    for path, end in ((V1, 37), (V2, 41)):
        data = path.read_bytes()
        expect(0, put(path.name, data[:end] + b"\xff" * (256 - end) + data[256:]).name, "-z", Z, *GENERATE,
               out=run(path, "-z", Z, *GENERATE).out)


@row(32, "groups of 0, negative, no divisor")
def _():
    numbers_refused(V2, "group", (*EXTREMES, 1, 7, 16, 31, 33, 48, 1 << 20))


@row(33, "a shared-classifier byte that is neither 0 nor 1")
def _():
    for path in (V1, V2):
        numbers_refused(path, "shared", (2, 3, 127, 128, 255), "shared")


@row(34, "a v0 file as long as a v1 file")
def _():
    v0, v1 = V0.read_bytes(), V1.read_bytes()
    refused("longer", v0 + bytes(len(v1) - len(v0)), "left", "-z", Z)
    refused("shorter", v1[:len(v0)], "", "-z", Z)
    refused("v0 header", v0[:28] + v1[28:], "", "-z", Z)


@row(35, "a v0 file whose dim is the magic of v1")
def _():
    for i in range(4):
        refused(f"{i}", b"24ka" + struct.pack("<i", i) + V0.read_bytes()[8:], "", "-z", Z)


# ==== 6. C. GGUF ====

@row(36, "more keys or tensors than bytes")
def _():
    for n in (1 << 63, 1 << 32, (1 << 64) - 1, 1 << 31, 65537, 65536, 5000, 0):
        refused(f"tensors-{n}", patched(SPM.read_bytes(), 8, struct.pack("<Q", n)))
        refused(f"keys-{n}", patched(SPM.read_bytes(), 16, struct.pack("<Q", n)))


@row(37, "lengths of keys that wrap, or are too long")
def _():
    data = SPM.read_bytes()
    for n in ((1 << 64) - 1, (1 << 64) - 8, 1 << 63, 1 << 32, len(data), len(data) - 24, 0):
        refused(f"{n}", patched(data, 24, struct.pack("<Q", n)))
    g = gguf()
    g.keys.insert(0, ["", value(U32, 1)])
    g.n_keys += 1
    either("no name", g.pack())


@row(38, "a key twice")
def _():
    for i in range(gguf().n_keys):
        g = gguf()
        g.keys.append(list(g.keys[i]))
        g.n_keys += 1
        refused(f"{i}", g.pack(), "twice")

    def many() -> None:  # whose names differ only at their ends: to compare each with each would take long
        g = gguf()
        g.keys[-1][1] += b"".join(string(b"x" * 16376 + b"%08d" % i) + value(U8, 0) for i in range(4000))
        g.n_keys += 4000
        put("many", g.pack())
    in_child(many)
    expect(0, "38-many", *GENERATE)
    (FOLDER / "38-many").unlink()


@row(39, "types of values that do not exist")
def _():
    for kind in (13, 14, 99, 0x7fffffff, 0x80000000, 0xffffffff):
        for key in ("general.name", "llama.context_length", "tokenizer.ggml.tokens"):
            refused(f"{key}-{kind}", with_key(key, struct.pack("<I", kind) + key_value(key)[4:]))
        refused(f"item-{kind}", with_key("tokenizer.ggml.scores", struct.pack("<II", ARRAY, kind) +
                                         key_value("tokenizer.ggml.scores")[8:]))


@row(40, "a bool of 2")
def _():
    for key in ("tokenizer.ggml.add_bos_token", "tokenizer.ggml.add_eos_token", "tokenizer.ggml.add_space_prefix",
                "llama.attention.causal"):
        for x in (2, 255):
            refused(f"{key}-{x}", with_key(key, value(BOOL, x)))


@row(41, "arrays of arrays, a million deep; counts of 2^63")
def _():
    in_child(lambda: put("deep", with_key("general.name", struct.pack("<I", ARRAY) * 1_000_000 + bytes(100))))
    expect(1, "41-deep", *GENERATE)
    refused("nested", with_key("general.name", struct.pack("<IIQIQ", ARRAY, ARRAY, 1, U8, 1) + b"x"))
    for kind in (U8, STRING, U64, F32):
        for count in (1 << 63, (1 << 64) - 1, 1 << 61, 1 << 62, 1 << 32, 100000):
            refused(f"{kind}-{count}", with_key("general.name", values(kind, [], count)))


HEADER_KEYS = ("embedding_length", "block_count", "feed_forward_length", "attention.head_count", "context_length",
               "attention.layer_norm_rms_epsilon")


@row(42, "scalars of the wrong type, and numbers beyond theirs")
def _():
    for key in HEADER_KEYS:
        for i, new in enumerate((value(STRING, "6"), value(U64, (1 << 32) + 6), value(I32, -1), value(F64, math.nan),
                                 value(F64, math.inf), value(F64, 1e300), value(I64, -1 << 63),
                                 value(U64, (1 << 64) - 1),
                                 value(F32, -1.0), value(BOOL, 0),
                                 value(F32, 0.5) if "eps" not in key else value(F32, 2.0))):
            refused(f"{key}-{i}", with_key(f"llama.{key}", new), key.replace("_length", "")[:4] if i == 0 else "")
    for key in ("general.architecture", "tokenizer.ggml.model", "tokenizer.chat_template"):
        for kind in (U32, F32, BOOL):
            refused(f"{key}-{kind}", with_key(key, value(kind, 1)), key)
    for kind, x in ((U8, 24), (I64, 24), (U64, 24)):  # any integer that is the right one will do
        opens(f"dim-{kind}", with_key("llama.embedding_length", value(kind, x)))
    refused("dim-float", with_key("llama.embedding_length", value(F64, 24.0)), "expected an integer")


@row(43, "an array for a scalar, and a scalar for an array")
def _():
    for key in HEADER_KEYS:
        for n in (0, 1, 3, 1000):
            refused(f"{key}-{n}", with_key(f"llama.{key}", values(U32, [6] * n)))
    for key in ("tokens", "scores", "token_type"):
        for new in (value(U32, 1), value(STRING, "a"), value(F32, 1.0)):
            refused(f"{key}-{new[0]}", with_key(f"tokenizer.ggml.{key}", new), key)
    for key, x in (("attention.head_count", 6), ("attention.head_count_kv", 3), ("feed_forward_length", 36)):
        opens(f"{key}-each", with_key(f"llama.{key}", values(U32, [x, x])))  # one for each layer is right
        refused(f"{key}-zero", with_key(f"llama.{key}", values(U32, [x, 0])))


@row(44, "alignments of 0, 1, 3, 2^31, as text")
def _():
    for x in (0, 1, 2, 3, 4, 7, 24, 33, 48, 1 << 20 | 1, 1 << 21, 1 << 31, (1 << 32) - 1):
        refused(f"{x}", with_key("general.alignment", value(U32, x)), "alignment")
    for new in (value(STRING, "32"), value(U64, 1 << 63), value(U64, (1 << 64) - 1), value(F64, math.nan),
                value(I32, -32)):
        refused(f"type-{new[0]}-{len(new)}", with_key("general.alignment", new), "alignment")
    opens("u64", with_key("general.alignment", value(U64, 32)))


@row(45, "each key missing in turn")
def _():
    needed = {"general.architecture", "tokenizer.ggml.model", "tokenizer.ggml.tokens",
              *(f"llama.{k}" for k in HEADER_KEYS)}
    for path in (SPM, BPE):
        for key, _ in gguf(path).keys:
            data = with_key(key, None, path)
            if key in needed or key.replace("qwen2.", "llama.") in needed:
                refused(f"{path.stem}-{key}", data)
            else:
                either(f"{path.stem}-{key}", data)


@row(46, "architectures unknown, empty, a million letters long")
def _():
    for name in ("", "llama2", "LLAMA", "llama\0", "gpt2", "a" * 64, "a" * 1_000_000, "\x1b[31m", "%s%n", "llama."):
        refused(f"{len(name)}-{name[:3].isalnum()}", with_key("general.architecture", value(STRING, name)))


TENSOR = "blk.0.attn_q.weight"


def tensors_refused(field: int, news: Iterable, word: str = TENSOR) -> None:
    def change(t: list, new) -> None:
        t[field] = new
    for new in news:
        refused(f"{field}-{new}".replace(" ", ""), with_tensor(TENSOR, lambda t: change(t, new)), word)


@row(47, "tensors of 0, 5, 2^32 - 1 dimensions")
def _():
    tensors_refused(1, (0, 5, 64, 1 << 31, (1 << 32) - 1), "")
    for n in (1, 3, 4):
        refused(f"{n}", with_tensor(TENSOR, lambda t: t.__setitem__(slice(1, 3), [n, [24] * n])), "")
    opens("3 of 1", with_tensor(TENSOR, lambda t: t.__setitem__(slice(1, 3), [3, [24, 24, 1]])))


@row(48, "dimensions of 0, negative, whose products wrap")
def _():
    for dims in ([0, 24], [24, 0], [0, 0], [1 << 63, 24], [24, 1 << 63], [(1 << 64) - 1, 24], [24, (1 << 64) - 1],
                 [1 << 32, 1 << 32], [1 << 62, 4], [24, 1 << 62], [(1 << 64) - 16, 1], [1 << 61, 24], [3 << 62, 8],
                 [24, 24 + (1 << 62)], [24 + (1 << 62), 24], [24 + (1 << 32), 24]):
        refused(f"{dims}".replace(" ", ""), with_tensor(TENSOR, lambda t: t.__setitem__(2, dims)), TENSOR)
    for dims in ([0], [1 << 62], [(1 << 64) - 1], [24 + (1 << 62)]):
        refused(f"v{dims}", with_tensor("output_norm.weight", lambda t: t.__setitem__(2, dims)), "output_norm")


@row(49, "rows that are no whole blocks")
def _():
    for kind in (2, 3, 6, 7, 8, 10, 11, 12, 13, 14, 20, 23, 39):
        refused(f"{kind}", with_tensor(TENSOR, lambda t: t.__setitem__(3, kind)), TENSOR)
        refused(f"q-{kind}", with_tensor("blk.0.ffn_up.weight", lambda t: t.__setitem__(2, [48, t[2][1]]), Q), "")


@row(50, "types that were removed, that do not exist, that are not supported")
def _():
    for kind in (4, 5, 9, 15, 16, 17, 18, 19, 21, 22, 24, 25, 26, 27, 28, 29, 31, 32, 33, 34, 35, 36, 37, 38, 40, 41,
                 99,
                 0x7fffffff, 0x80000000, 0xffffffff):
        refused(f"{kind}", with_tensor(TENSOR, lambda t: t.__setitem__(3, kind)), f"type {kind}")


@row(51, "offsets that are not aligned")
def _():
    tensors_refused(4, (1, 2, 4, 8, 16, 31, 33, 65))


@row(52, "offsets behind the file, that wrap, at its very end")
def _():
    end = len(gguf().weights)
    tensors_refused(4, (end, end + 32, end - 32, end // 32 * 32, 1 << 40, 1 << 63, (1 << 64) - 32, (1 << 64) - 4096,
                        (1 << 64) - end // 32 * 32))


@row(53, "tensors that overlap, ten thousand in one place")
def _():
    tensors_refused(4, (0, 32, 64), "overlap")
    g = gguf()
    one = g.tensor("output_norm.weight")
    g.tensors += [[f"x.{i}", 1, [8], 0, one[4]] for i in range(10000)]
    g.n_tensors = len(g.tensors)
    refused("many", g.pack(), "overlap")
    for i, t in enumerate(gguf().tensors):
        g = gguf()
        g.tensors[i][4] = g.tensors[i - 1][4]
        refused(f"{i}", g.pack())


@row(54, "fewer bytes than a type needs, the rest its neighbour's")
def _():
    for path, names in ((SPM, [t[0] for t in gguf().tensors]), (Q, [t[0] for t in gguf(Q).tensors])):
        g = gguf(path)
        order = sorted(g.tensors, key=lambda t: t[4])
        for t in order[:-1]:
            if t[0] in names:
                refused(f"{path.stem}-{t[0]}", with_tensor(order[order.index(t) + 1][0],
                                                           lambda x: x.__setitem__(4, x[4] - 32), path))


@row(55, "names twice, of 64 bytes, with NUL, empty")
def _():
    for name in ("", "x" * 63, "x" * 64, "x" * 65, "x" * 100000, "blk.0.attn_q.weight\0", "a\0b", "blk.1.attn_q.weight",
                 "token_embd.weight", "\x1b[31m", "\u202e", TENSOR + " "):
        refused(f"{len(name)}-{name[:9].isprintable()}", with_tensor(TENSOR, lambda t: t.__setitem__(0, name)))


@row(56, "each tensor missing in turn; tensors that nobody knows")
def _():
    for path in (SPM, BPE, Q):
        for t in gguf(path).tensors:
            g = gguf(path)
            g.tensors.remove(g.tensor(t[0]))
            g.n_tensors -= 1
            refused(f"{path.stem}-{t[0]}", g.pack())
    for name in ("blk.0.attn_q_norm.weight", "blk.0.attn_q.bias", "rope_freqs.weight", "blk.2.attn_q.weight",
                 "something.weight",
                 "blk.0.ffn_gate_exps.weight", "blk.0.attn_sinks.weight", "output.bias", "cls.weight"):
        g = gguf()
        g.tensors.append([name, 1, [8], 0, len(g.weights)])
        g.n_tensors += 1
        g.weights += bytes(32)
        refused(name, g.pack(), name.split(".weight")[0] if "_q.bias" not in name else "")


@row(57, "shapes with the right number of bytes")
def _():
    for t in gguf().tensors:
        if len(t[2]) == 2 and t[2][0] != t[2][1]:
            refused(t[0], with_tensor(t[0], lambda x: x.__setitem__(2, x[2][::-1])))
            refused(f"{t[0]}-1", with_tensor(t[0], lambda x: x.__setitem__(2, [x[2][0] * x[2][1], 1])))


@row(58, "norms of another type; types that differ by layer")
def _():
    for name in ("output_norm.weight", "blk.0.attn_norm.weight", "blk.1.ffn_norm.weight"):
        for kind in (1, 2, 8, 30):
            refused(f"{name}-{kind}", with_tensor(name, lambda t: t.__setitem__(3, kind)), name)
    expect(0, Q, *GENERATE)  # mixed types are as they should be


@row(59, "numbers of heads, rope, norms, context beyond what they may be")
def _():
    for key, news in (
            ("attention.head_count_kv", [value(U32, x) for x in (0, 4, 7, 12, 1 << 31)] + [values(U32, [3, 4]),
                                                                                           values(U32, [3])]),
            ("rope.dimension_count", [value(U32, x) for x in (0, 1, 3, 6, 1 << 31)] + [value(I32, -2)]),
            ("rope.freq_base", [value(F32, x) for x in (0.0, -1.0, math.nan, math.inf, 0.5)]),
            ("attention.layer_norm_rms_epsilon", [value(F32, x) for x in (0.0, -1.0, math.nan, math.inf, 1e30)]),
            ("context_length", [value(U32, x) for x in (0, (1 << 32) - 1, (1 << 20) + 1)]),
            ("rope.scaling.type", [value(STRING, x) for x in ("dynamic", "longrope", "", "LINEAR", "a" * 1000,
                                                              "\x1b[1m")]),
            ("rope.scaling.factor", [value(F32, x) for x in (-1.0, math.nan, math.inf, 1e9)]),
            ("attention.key_length", [value(U32, x) for x in (3, 8, 1025, 1 << 31)]),
            ("attention.value_length", [value(U32, x) for x in (3, 8, 1 << 31)])):
        for i, new in enumerate(news):
            refused(f"{key}-{i}", with_key(f"llama.{key}", new))


@row(60, "features that are not there")
def _():
    for key, new in (("expert_count", value(U32, 8)), ("expert_used_count", value(U32, 2)),
                     ("attn_logit_softcapping", value(F32, -1)),
                     ("attention.causal", value(BOOL, 0)), ("attention.clamp_kqv", value(F32, 8)),
                     ("attention.max_alibi_bias", value(F32, 8)), ("use_parallel_residual", value(BOOL, 1)),
                     ("something.new", value(U32, 1)), ("rope.scaling.yarn_ext_factor", value(F32, 2)),
                     ("logit_scale", value(F32, 2))):
        refused(key, with_key(f"llama.{key}", new))
    refused("window", with_key("llama.attention.sliding_window", value(F32, math.nan)))
    refused("charsmap", with_key("tokenizer.ggml.precompiled_charsmap", values(U8, [1, 2, 3])))


@row(61, "one part of a file that was split")
def _():
    for n in (2, 3, 65535, 65536):
        refused(f"{n}", gguf().set("split.count", value(U16 if n < 65536 else U32, n)).set("split.no",
                                                                                           value(U16, 1)).pack(),
                "split")
    opens("of one", with_key("split.count", value(U16, 1)))


@row(62, "numbers in names that are none")
def _():
    for name in ("blk.4294967295.attn_q.weight", "blk.-1.attn_q.weight", "blk.00.attn_q.weight",
                 "blk.0x0.attn_q.weight",
                 "blk..attn_q.weight", "blk.18446744073709551616.attn_q.weight", "blk. 0.attn_q.weight",
                 "blk.0.0.attn_q.weight",
                 "blk.+0.attn_q.weight", "BLK.0.attn_q.weight"):
        refused(name, with_tensor(TENSOR, lambda t: t.__setitem__(0, name)), TENSOR)


# ==== 7. D. Vocabularies ====

def tokens_of(path: Path) -> list[bytes]:
    data, at, out = key_value("tokenizer.ggml.tokens", path), 16, []
    while at < len(data):
        n, = struct.unpack_from("<Q", data, at)
        out.append(data[at + 8:at + 8 + n])
        at += 8 + n
    return out


def types_of(path: Path) -> list[int]:
    data = key_value("tokenizer.ggml.token_type", path)
    return list(struct.unpack_from(f"<{(len(data) - 16) // 4}i", data, 16))


def with_tokens(tokens: list, path: Path = SPM) -> bytes:
    return with_key("tokenizer.ggml.tokens", values(STRING, tokens), path)


@row(63, "as many tokens as rows, scores and types, or not")
def _():
    n = number_of_tokens()
    tokens = tokens_of(SPM)
    for m in (0, 1, n - 1, n + 1, 2 * n):
        refused(f"tokens-{m}", with_tokens((tokens * 2)[:m]))
        refused(f"scores-{m}", with_key("tokenizer.ggml.scores", values(F32, [0.0] * m)), "scores")
        refused(f"types-{m}", with_key("tokenizer.ggml.token_type", values(I32, [1] * m)), "types")
    for m in (n - 1, n + 1):
        opens(f"vocab-{m}", with_key("llama.vocab_size", value(U32, m)))  # published files pad the rows, or do not


@row(64, "scores and types of other types")
def _():
    n = number_of_tokens()
    for kind in (U8, I8, U16, I32, F64, U64, BOOL):
        refused(f"scores-{kind}", with_key("tokenizer.ggml.scores", values(kind, [1] * n)), "scores")
    for kind in (U8, F32, U64, U32, BOOL):
        refused(f"types-{kind}", with_key("tokenizer.ggml.token_type", values(kind, [1] * n)), "token_type")
    refused("strings", with_key("tokenizer.ggml.token_type", values(STRING, ["1"] * n)), "token_type")
    refused("numbers", with_key("tokenizer.ggml.tokens", values(U32, [1] * n)), "tokens")


@row(65, "lengths of tokens: 0, negative, 2^31 - 1, 2^63")
def _():
    tokens = tokens_of(SPM)
    for i in (0, 3, 130):
        place = 16 + sum(8 + len(t) for t in tokens[:i])
        for n in (1 << 63, (1 << 64) - 1, 1 << 31, 1 << 32, 4097, 100000):
            refused(f"{i}-{n}", with_key("tokenizer.ggml.tokens", patched(key_value("tokenizer.ggml.tokens"), place,
                                                                          struct.pack("<Q", n))))
        either(f"{i}-empty", with_tokens([b"" if k == i else t for k, t in enumerate(tokens)]))
        refused(f"{i}-long", with_tokens([b"x" * 5000 if k == i else t for k, t in enumerate(tokens)]))
    for n in (-1, 2**31 - 1, -2**31, 5000, 0, 1):
        for at in (8, 8 + 8 + 5):
            path = put(f"z-{at}-{n}-tokenizer.bin", patched(Z.read_bytes(), at, struct.pack("<i", n)))
            expect(1, V0, "-z", path.name, *GENERATE)
            expect(1, path.name, *TOKENIZE)


@row(66, "max_token_length 0, negative, too small, 2^31 - 1")
def _():
    wanted = run(V0, "-z", Z, *GENERATE).out
    for n in (0, -1, 1, 2**31 - 1, -2**31):
        expect(0, V0, "-z", put(f"{n}-tokenizer.bin", patched(Z.read_bytes(), 0, struct.pack("<i", n))).name,
               *GENERATE, out=wanted)


@row(67, "equal tokens; tokens with NUL, of invalid UTF-8")
def _():
    for path in (SPM, BPE):
        tokens = tokens_of(path)
        for name, token in (("same", b"a"), ("nul", b"a\0b"), ("bytes", b"\xff\xfe"), ("cut", b"\xe2\x96"),
                            ("space", b" "),
                            ("bar", b"\xe2\x96\x81"), ("long", b"y" * 4096)):
            either(f"{path.stem}-{name}-all", with_tokens([token] * len(tokens), path), status=(0, 1, 2))
            either(f"{path.stem}-{name}-some", with_tokens([token if i > 100 else t for i, t in enumerate(tokens)],
                                                           path))


@row(68, "no space, no bytes, bytes that are none")
def _():
    tokens, types = tokens_of(SPM), types_of(SPM)
    for i, spelling in enumerate((b"<0x-1>", b"<0xZZ>", b"<0x1", b"<0x100>", b"<0x>", b"", b"<0x 1>", b"<0x+1>",
                                  b"0x01")):
        data = [spelling if t == 6 and tokens[k] == b"<0x01>" else tokens[k] for k, t in enumerate(types)]
        if data == tokens:
            data = [spelling if k == 4 else t for k, t in enumerate(tokens)]
            refused(f"{i}", gguf().set("tokenizer.ggml.tokens", values(STRING, data)).set(
                "tokenizer.ggml.token_type", values(I32, [6 if k == 4 else t for k, t in enumerate(types)])).pack())
        else:
            refused(f"{i}", with_tokens(data))
    either("no space", with_tokens([b"x" if t in (b"\xe2\x96\x81", b" ") else t for t in tokens]))
    either("no bytes", with_key("tokenizer.ggml.token_type", values(I32, [1 if t == 6 else t for t in types])))
    either("all bytes", gguf().set("tokenizer.ggml.tokens", values(STRING, [b"<0x41>"] * len(tokens))).set(
        "tokenizer.ggml.token_type", values(I32, [6] * len(tokens))).pack())
    for kind in (-1, 0, 7, 1 << 30, -1 << 31):
        either(f"type-{kind}", with_key("tokenizer.ggml.token_type", values(I32, [kind] * len(tokens))))


@row(69, "special tokens beyond the vocabulary, or absent")
def _():
    n = number_of_tokens()
    for name in ("bos", "eos", "eot", "eom", "unknown", "padding"):
        for kind, x in ((U64, 1 << 63), (F32, math.nan), (STRING, "1")):
            data = with_key(f"tokenizer.ggml.{name}_token_id", value(kind, x))
            (either if name == "padding" else refused)(f"{name}-{kind}-{x}", data)
        for kind, x in ((U32, n), (U32, 32000), (U32, (1 << 32) - 1), (I32, -1), (U32, 1 << 31)):  # stands for none
            opens(f"{name}-{kind}-{x}", with_key(f"tokenizer.ggml.{name}_token_id", value(kind, x)))
    g = gguf()
    for name in ("bos", "eos", "unknown"):
        g.set(f"tokenizer.ggml.{name}_token_id", None)
    either("absent", g.set("tokenizer.ggml.tokens", values(STRING, [f"t{i}" for i in range(n)])).pack(),
           status=(0, 1, 2))


@row(70, "merges of every kind of nonsense")
def _():
    tokens = tokens_of(BPE)
    a, b = next(t for t in tokens if len(t) == 1), tokens[-1]
    long = b"a" * 4096
    for name, merges in (("empty", [b""]), ("no space", [b"ab"]), ("two", [b"a b c"]), ("only space", [b" "]),
                         ("spaces", [b"   "]),
                         ("absent", [b"qqq zzz"]), ("same", [a + b" " + a] * 10000), ("self", [b + b" " + b]),
                         ("nul", [b"a\0 b"]),
                         ("utf8", [b"\xff \xfe"]), ("long", [long + b" " + long]),
                         ("longer", [long * 4 + b" " + long * 4]), ("none", [])):
        either(name, with_key("tokenizer.ggml.merges", values(STRING, merges), BPE))
    million = values(STRING, [], 1_000_000)
    in_child(lambda: put("million", with_key("tokenizer.ggml.merges", million + string(b"a b") * 1_000_000, BPE)))
    expect(0, "70-million", *GENERATE)
    refused("numbers", with_key("tokenizer.ggml.merges", values(U32, [1, 2]), BPE), "merges")
    refused("count", with_key("tokenizer.ggml.merges", values(STRING, [b"a b"], 1 << 62), BPE), "merges")


@row(71, "scores that are not finite, or all the same")
def _():
    n = number_of_tokens()
    for x in (math.nan, math.inf, -math.inf):
        for i in (0, n - 1):
            refused(f"{x}-{i}", with_key("tokenizer.ggml.scores",
                                         values(F32, [x if k == i else 0.0 for k in range(n)])), "score")
        expect(1, V0, "-z", put(f"z{x}-tokenizer.bin", patched(Z.read_bytes(), 4, struct.pack("<f", x))).name,
               word="score")
    texts = {opens(f"same-{x}", with_key("tokenizer.ggml.scores", values(F32, [x] * n))).out for x in (0.0, -0.0, 1e38,
                                                                                                       -1e38)}
    now.demand(len(texts) == 1, f"equal scores give different texts: {texts}")


def on_terminal(words: list, input: bytes | None = None) -> tuple[int, bytes]:
    """What ./run writes to a terminal."""
    master, slave = os.openpty()
    started = start([RUN, *words], stdout=slave)
    os.close(slave)
    out = b""
    try:
        while chunk := os.read(master, 65536):
            out += chunk
    except OSError as error:
        if error.errno != errno.EIO:
            raise
    os.close(master)
    return finish(started).status, out


@row(72, "tokens that steer a terminal")
def _():
    evil = b"\x1b]0;owned\x07\x1b[2J\xc2\x9b31m\x7f\b\r"
    tokens = tokens_of(SPM)
    path = put("evil.gguf", with_tokens([evil if t == 1 else tokens[i] for i, t in enumerate(types_of(SPM))]))
    for words in (["-i", "a"], ["-i", evil.decode()], ["-m", "tokenize", "--pieces", "-i", "abc"], ["-m", "inspect"],
                  ["-m", "chat", "--template", "zephyr", "-i", "a"], ["-m", "inspect", "--json"]):
        status, out = on_terminal([path.name, "-q", "-t", "0", "-n", "5", *words])
        text = out.replace(b"\r\n", b"\n").decode("utf-8", "surrogateescape")
        bad = [c for c in text if c not in "\n\t" and is_control(c)]
        now.demand(status == 0 and not bad, f"{words} on a terminal: status {status}, {bad[:5]!r} in {out[:100]!r}")
    o = expect(0, path.name, "-q", "-t", "0", "-n", "5", "-i", "a")
    now.demand(evil in o.out, f"into a file the bytes come as they are: {o}")


@row(73, "chat templates: bytes of a stranger that are run")
def _():
    for name, template, status, word in (
            ("code", "{% for i in range(1000000000) %}{{ i }}{% endfor %}", 2, "range"),
            ("loop", "{% for i in range(99999) %}{% for k in range(99999) %}a{% endfor %}{% endfor %}", 5, "too long"),
            ("text", "{% set ns = namespace(s='ab') %}{% for i in range(64) %}{% set ns.s = ns.s + ns.s %}{% endfor %}", 5,
             "too long"),
            ("macro", "{% macro f() %}{{ f() }}{% endmacro %}{{ f() }}", 1, "deep"),
            ("nested", "{{ " + "(" * 100000, 1, "deep"), ("lists", "{{ " + "[" * 100000, 1, "deep"),
            ("import", "{{ ''.__class__.__mro__ }}", 2, "line 1"), ("open", "{{ messages", 1, "line 1"),
            ("none", "{% include 'x' %}", 1, "not supported"), ("raise", "\n{{ raise_exception('no\x1b[31m') }}", 2, "line 2")):
        path = put(name, with_key("tokenizer.chat_template", value(STRING, template)))
        expect(status, path.name, "-q", "-m", "chat", "-i", "a", word=word)
        expect(0, path.name, "-q", "-t", "0", "-n", "3", "-m", "chat", "-i", "a", "--template", "chatml")
        expect(0, path.name, "-m", "inspect")
    for name, template in (("long", "{{ x }}" * 100000), ("nul", "{{ '\0' }}"), ("bytes", b"\xff\xfe")):
        path = put(name, with_key("tokenizer.chat_template", value(STRING, template)))
        expect((0, 1, 2, 5), path.name, "-q", "-t", "0", "-n", "3", "-m", "chat", "-i", "a")
    path = put("empty", with_key("tokenizer.chat_template", value(STRING, "")))
    expect(2, path.name, "-q", "-m", "chat", "-i", "a", word="--template")
    in_child(lambda: put("large", with_key("tokenizer.chat_template", value(STRING, "<" * (256 << 20)))))
    expect((1, 2, 5), "73-large", "-q", "-m", "chat", "-i", "a", word="template")
    (FOLDER / "73-large").unlink()


# ==== 8. E. Weights ====

def fill(name: str | None, x: float, count: int | None = None) -> bytes:
    """llama_linear with the numbers of one tensor, or of all matrices, set to x."""
    g = gguf()
    for t in g.tensors:
        if t[0] == name or (name is None and len(t[2]) == 2):
            n = math.prod(t[2]) if count is None else count
            g.weights[t[4]:t[4] + 4 * n] = struct.pack("<f", x) * n
    return g.pack()


def set_row(name: str, r: int, x: float) -> bytes:
    g = gguf()
    t = g.tensor(name)
    struct.pack_into("<f", g.weights, t[4] + 4 * (r * t[2][0] + 5), x)
    return g.pack()


@row(74, "NaN and Inf among the weights")
def _():
    for x in (math.nan, math.inf, -math.inf):
        for t in gguf().tensors:
            r = (t[2][1] if len(t[2]) == 2 else 1) - 1
            data = set_row(t[0], r, x)
            refused(f"{t[0]}-{x}", data,
                    f"{t[0]}: {'row' if len(t[2]) == 2 else 'number'} {r if len(t[2]) == 2 else 5} ")
        refused(f"all-{x}", fill(None, x), "row 0 ")
        data = native()
        for t in gguf().tensors:
            at, n = native_tensor(data, t[0])
            path = put("native", patched(data, at, struct.pack("<f", x) * (n // 4)))
            expect(1, path.name, *GENERATE, word="finite")
            expect(1, path.name, "-m", "inspect", "--check", word=t[0])
            expect(1, path.name, "-m", "export", "-o", "x.bin", word=t[0])
            expect(1, path.name, "-m", "export", "--type", "q8", "-o", "x.bin", word=t[0])
            expect(1, path.name, "-q", "-m", "perplexity", "-f",
                   "17-text.txt" if (FOLDER / "17-text.txt").exists() else SPM,
                   "-c", "16", word="finite")


@row(75, "scales that are not finite")
def _():
    half = {2: 0, 3: 0, 6: 0, 7: 0, 8: 0, 10: 80, 11: 108, 12: 0, 13: 0, 14: 208, 20: 0,
            23: 0}  # type -> place of the scale
    sizes = {2: 18, 3: 20, 6: 22, 7: 24, 8: 34, 10: 84, 11: 110, 12: 144, 13: 176, 14: 210, 20: 18, 23: 136}
    seen = set()
    for path in (Q, GOLDEN / "mixed_fused.gguf"):
        for t in gguf(path).tensors:
            if t[3] not in half:
                continue
            seen.add(t[3])
            for bits in (0x7c00, 0xfc00, 0x7e00, 0x7c01):
                g = gguf(path)
                block = t[2][0] // (256 if t[3] in (10, 11, 12, 13, 14, 23) else 32)
                struct.pack_into("<H", g.weights, t[4] + block * sizes[t[3]] * (t[2][1] - 1) + half[t[3]], bits)
                refused(f"{path.stem}-{t[0]}-{bits:x}", g.pack(), "is not finite")
    now.demand(len(seen) >= 2, f"only the types {seen} were met")
    data = V2.read_bytes()
    for x in (math.nan, math.inf):
        refused(f"v2-{x}", data[:-4] + struct.pack("<f", x), "is not finite", "-z", Z)


@row(76, "numbers that are nearly nothing")
def _():
    for x in (1e-40, -1e-40, 1e-45, 1e-38):
        opens(f"{x}", fill(None, x))
    data = native()
    at, n = native_tensor(data, "token_embd.weight")
    opens("native", patched(data, at, struct.pack("<f", 1e-41) * (n // 4)))


@row(77, "zeros alone")
def _():
    path = put("zeros", fill(None, 0.0))
    for t in ("0", "1"):
        texts = {expect(0, path.name, "-q", "-t", t, "-s", "7", "-n", "20", "-i", "a", "-j", j).out for j in ("1", "2",
                                                                                                              "1")}
        now.demand(len(texts) == 1, f"zeros with -t {t} give different texts: {texts}")


@row(78, "weights of 1e38")
def _():
    for t in gguf().tensors:
        if len(t[2]) == 2:
            either(t[0], fill(t[0], 1e38))
    expect(1, put("all", fill(None, 1e38)).name, *GENERATE, word="finite")


# ==== 9. F. Prompts ====

VOCABULARIES = (("spm", GOLDEN / "llama_tied.gguf"), ("bpe", BPE), ("tokenizer.bin", V0))


def prompt(text: bytes, path: Path, *more, status: int | tuple[int, ...] = 0, **how) -> Outcome:
    file = FOLDER / "prompt.txt"
    file.write_bytes(text)
    return expect(status, path, *(("-z", Z) if path == V0 else ()), "-q", "-f", file.name, *more, **how)


@row(79, "empty prompts")
def _():
    for _, path in VOCABULARIES:
        prompt(b"", path, "-n", "1", "-t", "0", status=(0, 2))
        expect((0, 2), path, *(("-z", Z) if path == V0 else ()), "-q", "-n", "1", "-t", "0", "-i", "")
        prompt(b"", path, "-m", "tokenize")
        prompt(b"", path, "-m", "perplexity", status=5)


@row(80, "white space alone, and at the ends")
def _():
    for _, path in VOCABULARIES:
        for text in (b" ", b"\n", b"\t", b"   ", b" a", b"a ", b"  a  b  ", b"\r\n\r\n", b"\xc2\xa0", b"\xe2\x96\x81"):
            o = prompt(text, path, "-n", "0", "-t", "0")
            same = text.replace(b"\xe2\x96\x81", b" ") if path != BPE else text
            same = same[:-2] if same.endswith(b"\r\n") else same.removesuffix(b"\n")  # one newline at a file's end goes
            now.demand(o.out == same + b"\n", f"{text!r} came back as {o.out!r}")


@row(81, "bytes that are no UTF-8")
def _():
    for _, path in VOCABULARIES:
        for text in (b"\x80", b"\xbf\xbf", b"\xc0\xaf", b"\xe0\x80\xaf", b"\xed\xa0\x80", b"\xed\xbf\xbf",
                     b"\xf4\x90\x80\x80", b"\xff",
                     b"\xfe\xfe", b"a\xe2\x96", b"\xf0\x9f\x98", b"\xf8\x88\x80\x80\x80", b"a\xc3", b"\xe2\x28\xa1",
                     bytes(range(1, 60))):
            o = prompt(text, path, "-n", "0", "-t", "0", "-c", "64")
            now.demand(o.out == text + b"\n", f"{text!r} came back as {o.out!r} from {path.name}")
            prompt(text, path, "-n", "2", "-t", "0")


@row(82, "NUL in prompts")
def _():
    for _, path in VOCABULARIES:
        for text in (b"\0", b"a\0b", b"\0\0\0a", b"a\0"):
            o = prompt(text, path, "-n", "0", "-t", "0")
            now.demand(o.out == text + b"\n", f"{text!r} came back as {o.out!r}")


@row(83, "a megabyte of one byte, of words, of one word, of spaces, of emoji; twice of it")
def _():
    patterns = {"a": b"a", "a b": b"a b ", "word": b"abcdefghijklm", "spaces": b" ", "newlines": b"\n",
                "digits": b"1234567890",
                "emoji": "\U0001F468\u200D\U0001F469\u200D\U0001F467".encode(), "apostrophes": b"'",
                "bytes": b"\xff\x80", "nul": b"\0"}
    for name, path in VOCABULARIES:
        for what, pattern in patterns.items():
            seconds = []
            for n in (1 << 20, 1 << 21):
                text = (pattern * (n // len(pattern) + 1))[:n]
                tries = []
                for _ in range(3 if n > 1 << 20 else 1):
                    with open(os.devnull, "wb") as null:  # it would take too much memory here
                        tries.append(prompt(text, path, "-m", "tokenize", slow=n > 1 << 20, stdout=null,
                                            lines=0 if name != "bpe" else None).seconds)
                    if n > 1 << 20 and tries[-1] < 2.3 * seconds[0] + 0.1:
                        break
                seconds.append(min(tries))
            now.demand(seconds[1] < 2.3 * seconds[0] + 0.1,
                       f"{name}, {what}: {seconds[0]:.2f} s, twice as much {seconds[1]:.2f} s")
    if FULL:
        for what in ("a b", "newlines", "emoji"):
            with (FOLDER / "100MB").open("wb") as file:
                for _ in range(100):
                    file.write(patterns[what] * (1_000_000 // len(patterns[what])))
            o = run(BPE, "-m", "tokenize", "-f", "100MB", timeout=600)
            now.demand(o.status == 0, str(o))


# 83's memory is the text's, many times over: 64 MiB do for a megabyte of it.

@row(84, "prompts of a token less than the context, as many, one more")
def _():
    path = GOLDEN / "llama_tied.gguf"
    for context in (1, 2, 8, 63, 64):
        for n in (context - 1, context, context + 1):
            if n:
                expect(0 if n <= context else 5, path, "-q", "-t", "0", "-n", "3", "-c", str(context), "--ids",
                       " ".join(["5"] * n))
    for n in (63, 64, 65):
        expect(0 if n <= 64 else 5, path, "-q", "-m", "logits", "-o", "x.out", "--ids", " ".join(["5"] * n))


@row(85, "special tokens spelled in a text")
def _():
    for path, spelling, token in ((GOLDEN / "llama_tied.gguf", "</s>", b"2"), (SPM, "<s>", b"1")):
        plain = expect(0, path, "-m", "tokenize", "--no-bos", "-i", f"a{spelling}b").out.split()
        special = expect(0, path, "-m", "tokenize", "--no-bos", "--special", "-i", f"a{spelling}b").out.split()
        now.demand(token not in plain and token in special, f"{spelling}: {plain}, {special}")


@row(86, "prompt files that are missing, folders, binary")
def _():
    expect(3, SPM, "-f", "nowhere", word="No such file")
    expect(3, SPM, "-f", FOLDER, word="directory")
    expect((0, 5), SPM, "-q", "-n", "1", "-f", RUN, lines=None)
    expect((0, 3), SPM, "-q", "-n", "1", "-f", "/dev/null")
    expect(3, SPM, "-f", "/proc/self/mem")


@row(87, "CR LF, and a byte order mark")
def _():
    for _, path in VOCABULARIES:
        for text in (b"a\r\nb", b"\xef\xbb\xbfa", b"\xff\xfea\0", b"\r"):
            o = prompt(text, path, "-n", "0", "-t", "0")
            now.demand(o.out == text + b"\n", f"{text!r} came back as {o.out!r}")


@row(88, "prompts without an end")
def _():
    expect(5, GOLDEN / "llama_tied.gguf", "-n", "1", "-f", "/dev/zero", word="see -c")
    available = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_AVPHYS_PAGES")
    if not FULL and available < 4 << 30:
        return now.skip("less than 4 GB of memory are free")
    o = run(SPM, "-m", "tokenize", "-f", "/dev/zero", timeout=120)
    now.demand(o.status == 5 and o.err.count(b"\n") == 1 and o.peak < 3 << 30, str(o))


# ==== 10. G. Options ====

OPTIONS = ("-m", "-i", "-f", "--ids", "-n", "-t", "-p", "-k", "--min-p", "-s", "-c", "-j", "-b", "-z", "-y",
           "--template", "-o",
           "--pp", "--tg", "--depth", "--reps", "--svg", "--kv", "--kernel", "--pre")


@row(89, "options unknown, without value, with an empty one")
def _():
    for word in ("--nonsense", "-x", "-", "--", "---", "-tt", "--quiet=1", "-q5", "-n=5", "--id=1", "-\n", "--\x1b[31m", "-é"):
        expect(2, SPM, word)
    for word in OPTIONS:
        expect(2, SPM, word, word="needs a value")
        expect((0, 1, 2, 3), SPM, "-q", word, "", "-i" if word not in ("-i", "-f", "--ids") else "-y", "a",
               "-n" if word != "-n" else "-y", "1")
    expect(2, word="no model given")
    expect(2, SPM, "a", "b", word="two prompts")
    expect(2, SPM, "--=1")


def option_cases(option: str, wrong: Iterable[str], right: Iterable[str]) -> None:
    for x in wrong:
        expect(2, SPM, "-q", "-i", "a", "-n", "1", option, x)
    for x in right:
        expect(0, SPM, "-q", "-i", "a", "-n", "1", option, x, "-s", "1", lines=None)


NUMBERS_OF_NOBODY = ("", "abc", "nan", "inf", "-inf", "1.0x", " 1", "1 ", "+1", "1e999", "--", "1,5", "٣", "1\n")


@row(90, "temperatures")
def _():
    option_cases("-t", (*NUMBERS_OF_NOBODY, "-1", "-0.1", "101", "1e30", "0,7"),
                 ("0", "1e-40", "1e-30", "100", "0.7", ".5"))


@row(91, "top-p, top-k, min-p")
def _():
    option_cases("--top-p", (*NUMBERS_OF_NOBODY, "1.5", "-0.1", "Once upon"), ("0", "1", "1e-9", "0.999999999"))
    option_cases("-p", ("", "nan", "inf", "-inf", "1.0x", " 1", "1,5", "1.5"), ("0", "1", "Once upon", "abc", "\n"))
    option_cases("--min-p", (*NUMBERS_OF_NOBODY, "1.5", "-0.1"), ("0", "1", "1e-9"))
    option_cases("-k", (*NUMBERS_OF_NOBODY, "-1", "1.5", "99999999999"), ("0", "1", "100000", "1000000000"))


@row(92, "numbers of tokens")
def _():
    option_cases("-n", (*NUMBERS_OF_NOBODY, "-2", "1.5", str(1 << 31), str(10**18), str(10**30)),
                 ("0", "1", "-1", "1000000000"))
    option_cases("-c", (*NUMBERS_OF_NOBODY, "-1", "1.5", "1048577", str(1 << 63)), ("0", "16"))
    option_cases("-b", (*NUMBERS_OF_NOBODY, "-1", "0", "4097"), ("1", "4096"))
    option_cases("--reps", (*NUMBERS_OF_NOBODY, "-1", "0", "65"), ("1",))


@row(93, "seeds")
def _():
    option_cases("-s", (*NUMBERS_OF_NOBODY, "-2", "1.5", str(1 << 64), str(10**30)),
                 ("-1", "0", "1", str((1 << 64) - 1)))
    texts = [run(SPM, "-q", "-n", "9", "-s", "0").out for _ in range(2)]
    now.demand(texts[0] == texts[1], f"seed 0 gives {texts}")


@row(94, "numbers of threads")
def _():
    option_cases("-j", (*(x for x in NUMBERS_OF_NOBODY if x != "1,5"), "0", "-1", "4097", "100000", "1,", ",1", "1,,2",
                        ",".join(["1"] * 17)),
                 ("1", "2", "3", "1024", "1,2"))
    texts = {expect(0, SPM, "-q", "-n", "9", "-s", "3", "-j", j).out for j in ("1", "2", "3", "64")}
    now.demand(len(texts) == 1, f"threads give different texts: {texts}")


@row(95, "an option twice")
def _():
    wanted = run(SPM, "-q", "-n", "5", "-t", "0", "-i", "a").out
    expect(0, SPM, "-q", "-n", "9", "-n", "5", "-t", "1", "-t", "0", "-i", "b", "-i", "a", out=wanted)
    expect(0, SPM, "-q", "-q", "-q", "-n", "5", "-t", "0", "-i", "a", out=wanted)
    expect(2, SPM, "-i", "a", "--ids", "1", word="more than one prompt")
    expect(2, SPM, *["-f", "x"] * 100, word="more than 64")


@row(96, "a hundred thousand arguments")
def _():
    expect(2, *["a"] * 100_000)
    expect(2, SPM, *["-x"] * 100_000)
    expect(0, SPM, *["-q"] * 100_000, "-n", "1", "-i", "a")
    expect(2, *["-"] * 100_000)
    expect((0, 2, 5), SPM, "-q", "-n", "1", "-i", "a" * 130_000)


@row(97, "no argv[0]")
def _():
    pid = os.fork()
    if pid == 0:
        library = ctypes.CDLL(None)
        no_words, no_environment = (ctypes.c_char_p * 1)(None), (ctypes.c_char_p * 1)(None)
        null = os.open("/dev/null", os.O_RDWR)
        os.dup2(null, 2)
        library.execve(os.fsencode(RUN), no_words, no_environment)
        os._exit(99)
    status = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
    now.demand(status == 2, f"argc 0: status {status}, wanted 2")


# ==== 11. H. The environment ====

MODES = (["-i", "a", "-n", "3"], ["-m", "tokenize", "-i", "a"], ["-m", "detokenize", "--ids", "5"],
         ["-m", "inspect"], ["-m", "inspect", "--json"],
         ["-m", "chat", "--template", "zephyr", "-i", "a", "-n", "3"], ["-m", "perplexity", "-c", "8", "-f", V0],
         ["-m", "bench", "--pp", "4", "--tg", "2", "--reps", "1", "-j", "1"], ["--help"], ["--version"])


@row(98, "stdout closed")
def _():
    for mode in MODES:
        expect(3, SPM, "-q", *mode, closed=[1], word="stdout", slow="bench" in mode)
    expect(3, SPM, *TOKENIZE, closed=[1], input=b"a", word="stdout")
    expect(0, SPM, "-m", "export", "-o", "x.bin", closed=[1])
    now.demand((FOLDER / "x.bin").read_bytes() == native(), "a file exported without stdout is another")


@row(99, "stdout on a full disk")
def _():
    for mode in MODES:
        with open("/dev/full", "wb") as full:
            expect(3, SPM, "-q", *mode, stdout=full, word="No space", slow="bench" in mode)
    with open("/dev/full", "wb") as full:
        expect(3, *endless(long_model()), stdout=full, word="No space")
        expect(3, SPM, *TOKENIZE, stdout=full, input=b"a", word="No space")


@row(100, "the reader goes away")
def _():
    for ignored in (False, True):
        reader, writer = os.pipe()
        started = start([RUN, *endless(long_model())], stdout=writer,
                        before=lambda: signal.signal(signal.SIGPIPE, signal.SIG_IGN if ignored else signal.SIG_DFL))
        os.close(writer)
        os.read(reader, 10)
        os.close(reader)
        o = finish(started)
        now.demand(o.status == (3 if ignored else -signal.SIGPIPE) and o.err.count(b"\n") == ignored, f"{o}")


@row(101, "stdin closed, or at its end, in a chat")
def _():
    chat = (SPM, "-q", "-t", "0", "-n", "3", "-m", "chat", "--template", "zephyr")
    expect(0, *chat, closed=[0], out=b"")
    expect(0, *chat, out=b"")
    for text in (b"a", b"a\n", b"\n\n\n", b"\0\n", b"\xff\n", b"a" * 30 + b"\r\n"):
        expect((0, 5), *chat, input=text)
    expect((0, 5), *chat, input=b"a\n" * 100)
    expect(5, *chat, input=b"a" * 1_000_000)


@row(102, "stderr closed, and all three")
def _():
    wanted = run(SPM, *GENERATE).out
    for closed in ([2], [0, 2], [0]):
        expect(0, SPM, *GENERATE, closed=closed, out=wanted)
    for closed in ([2], [0, 1, 2], [1, 2]):
        expect(0, SPM, "-m", "export", "-o", "x.bin", closed=closed)
        now.demand((FOLDER / "x.bin").read_bytes() == native(), f"a file exported without {closed} is another")
        expect(1, "nowhere", closed=closed, lines=0)
    started = start([RUN, *endless(long_model())], closed=[0, 2])
    process, out = started[:2]
    begun = wait_until(lambda: os.fstat(out.fileno()).st_size > 30)
    if Path("/proc/self/fd").exists():
        taken = [os.readlink(p) if os.path.islink(p := f"/proc/{process.pid}/fd/{i}") else None for i in (0, 2)]
        now.demand(begun and taken == ["/dev/null", "/"], f"descriptors 0 and 2 are {taken}")
    os.kill(process.pid, signal.SIGTERM)
    finish(started)


@row(103, "Ctrl-C and other signals at every time")
def _():
    header, size = large_model(1 << 16, 2)
    path = FOLDER / "103-large.gguf"
    path.write_bytes(header)
    os.truncate(path, size)
    text = put("long.txt", b"Once upon a time there was a child. " * 3000)
    model = long_model().name
    jobs = {"load": [path.name, "-q", "-m", "inspect"], "prompt": [model, "-q", "-c", "0", "-f", text.name, "-n", "1"],
            "logits": [model, "-q", "-c", "0", "-f", text.name, "-m", "logits", "-o", "103.out"],
            "text": endless(long_model()),
            "perplexity": [model, "-q", "-c", "0", "-f", text.name, "-m", "perplexity", "-c", "512"]}
    for name, words in jobs.items():
        for number in (signal.SIGINT, signal.SIGTERM, signal.SIGHUP, signal.SIGQUIT):
            for delay in (0.0, 0.01, 0.03, 0.1, 0.2):
                started = start([RUN, *words])
                time.sleep(delay)
                os.kill(started[0].pid, number)
                o = finish(started)
                allowed = (0, -number) + ((130,) if number == signal.SIGINT else ())
                left = [p.name for p in FOLDER.glob("103.out*")]
                fault = o.status not in allowed or o.err or (left and o.status != 0)
                now.demand(not fault, f"{name}, signal {number} after {delay} s: {o}, left {left}")
                for p in left:
                    (FOLDER / p).unlink()
    path.unlink()


@row(104, "address space from 10 MB to enough")
def _():
    statuses = []
    for i in range(20):
        o = run(SPM, *GENERATE, "-j", "2", limits={resource.RLIMIT_AS: (10 << 20) + i * (4 << 20)})
        statuses.append(o.status)
        loader = o.status == 127 or b"error while loading" in o.err
        now.demand(loader or o.status in (0, 4), str(o))
    o = run(SPM, *GENERATE, "-j", "2", limits={resource.RLIMIT_AS: 1 << 31})
    now.demand(o.status == 0, str(o))
    header, size = large_model(1 << 16, 2)
    path = FOLDER / "104-large.gguf"
    path.write_bytes(header)
    os.truncate(path, size)
    for limit in (100 << 20, size // 2, size, size + (100 << 20)):
        expect(4, path.name, *GENERATE, limits={resource.RLIMIT_AS: limit}, word="memory")
    path.unlink()


@row(105, "the n-th allocation fails, for every n, once and for ever")
def _():
    o = run("failing calls", program=TEST, timeout=600, before=lambda: os.chdir(ROOT))
    counts = [line for line in o.out.decode().splitlines() if line.startswith("failing calls")]
    now.demand(o.status == 0 and len(counts) == 1, f"{o}")
    now.cases += int(counts[0].split()[2]) - 1 if counts else 0
    now.note = "build/test's group \"failing calls\""


@row(106, "little stack, few descriptors, no room for files")
def _():
    for kilobytes in (64, 128, 8192):
        for words in ((*GENERATE,), ("-q", "-n", "1", "-c", "64", "-f", V0), ("-m", "tokenize", "-f", V0),
                      ("-m", "export", "-o", "x.bin")):
            expect((0, 5), SPM, *words, limits={resource.RLIMIT_STACK: kilobytes << 10})
    expect((1, 127), SPM, *GENERATE, limits={resource.RLIMIT_NOFILE: 3}, lines=None)
    expect((0, 1, 3), SPM, "-m", "export", "-o", "x.bin", limits={resource.RLIMIT_NOFILE: 4})
    for limit in (0, 4096, 60000):
        expect(3, SPM, "-m", "export", "-o", "106.bin", limits={resource.RLIMIT_FSIZE: limit}, word="too large")
        expect(3, SPM, "-q", "-m", "logits", "--ids", " ".join(["1"] * 60), "-o", "106.bin",
               limits={resource.RLIMIT_FSIZE: min(limit, 9000)},
               word="too large")
        now.demand(not list(FOLDER.glob("106.bin*")), "a file is left that did not fit")


@row(107, "languages")
def _():
    wanted = run(SPM, "-q", "-s", "3", "-t", "0.7", "-n", "20", "-i", "Once").out
    for name in ("C", "de_DE.UTF-8", "tr_TR.UTF-8", "zh_CN.GB18030", "ar_EG.UTF-8", "nonsense", ""):
        for variable in ("LC_ALL", "LC_NUMERIC", "LANG"):
            expect(0, SPM, "-q", "-s", "3", "-t", "0.7", "-n", "20", "-i", "Once", env={variable: name}, out=wanted)


@row(108, "OpenMP's variables; threads that cannot be started")
def _():
    model, text = long_model().name, put("text.txt", b"Once upon a time there was a child. " * 20)
    words = [model, "-q", "-t", "0", "-n", "3", "-f", text.name, "-j", "2"]
    wanted = run(*words).out
    variables = {"OMP_NUM_THREADS": ("0", "-1", "1", "3", "64", "100000", "1,2"), "OMP_DYNAMIC": ("true", "x"),
                 "OMP_SCHEDULE": ("dynamic", "nonsense", "static,0"),
                 "OMP_STACKSIZE": ("1k", "16k", "17k", "64k", "1g", "x"),
                 "OMP_THREAD_LIMIT": ("1", "0", "2"), "OMP_WAIT_POLICY": ("active", "passive"), "OMP_NESTED": ("true",),
                 "OMP_PROC_BIND": ("true", "spread"), "OMP_CANCELLATION": ("true",),
                 "GOMP_SPINCOUNT": ("0", "infinity")}
    if b"libomp" not in subprocess.run(["ldd", RUN], capture_output=True).stdout:
        variables["OMP_NUM_THREADS"] += ("abc",)  # LLVM's OpenMP 14 ends the program for it
    for name, settings in variables.items():
        for setting in settings:
            expect(0, *words, env={name: setting}, out=wanted, lines=None)
    if os.getuid():
        return now.skip("ulimit -u is not tested: it does not stop this user alone")
    for folder, file in ((FOLDER, FOLDER / "run"), (FOLDER, long_model())):
        folder.chmod(0o755)
        if not file.exists():
            shutil.copy(RUN, file)
        file.chmod(0o755)
    text.chmod(0o644)
    for n in (1, 2, 3):
        for j in ("2", "1"):
            expect(0, *words[:-1], j, program=FOLDER / "run", nobody=True, limits={resource.RLIMIT_NPROC: n},
                   out=wanted)


@row(109, "less memory than the model")
def _():
    roots = ((Path("/sys/fs/cgroup"), "memory.max", "memory.events"),  # version 2, and version 1
             (Path("/sys/fs/cgroup/memory"), "memory.limit_in_bytes", "memory.failcnt"))
    for root, limit, hits in roots:
        group = root / f"cria-{os.getpid()}"
        try:
            group.mkdir()
        except OSError:
            continue
        if (group / limit).exists():
            break
        group.rmdir()
    else:
        return now.skip("no group of processes with a limit of memory can be made here")
    try:
        header, size = large_model(1 << 14, 1)  # 200 MB
        path, packed = FOLDER / "109-large.gguf", FOLDER / "109-large.bin"
        path.write_bytes(header)
        os.truncate(path, size)
        done = run(path.name, "-m", "export", "-o", packed.name)
        wanted = run(packed.name, *GENERATE, timeout=300)
        with packed.open("rb") as file:  # the group has to read the file itself: what is in memory counts elsewhere
            os.fsync(file.fileno())
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)
        (group / limit).write_text(str(64 << 20))
        o = run(packed.name, *GENERATE, before=lambda: (group / "cgroup.procs").write_text(str(os.getpid())),
                timeout=300)
        now.demand(done.status == wanted.status == o.status == 0 and o.out == wanted.out, f"{done}, {wanted} and {o}")
        words = (group / hits).read_text().split()
        n_hits = int(words[words.index("max") + 1] if "max" in words else words[0])
        now.demand(n_hits > 0, f"{packed.name} fits in 64 MiB: the limit was not met")
        path.unlink()
        packed.unlink()
    finally:
        group.rmdir()


@row(110, "a processor without AVX2")
def _():
    wanted = run(SPM, *GENERATE).out
    for kernel in ("scalar",):
        expect(0, SPM, *GENERATE, "--kernel", kernel, out=wanted)
    emulator = shutil.which("qemu-x86_64-static") or shutil.which("qemu-x86_64")
    if not emulator or os.uname().machine != "x86_64":
        return now.skip("no qemu-x86_64 here: only --kernel scalar")
    for cpu in ("qemu64", "Nehalem", "SandyBridge", "Haswell"):
        for path in (SPM, Q):
            o = run("-cpu", cpu, RUN, path, *GENERATE, program=Path(emulator), timeout=120)
            now.demand(o.status == 0 and o.out == run(path, *GENERATE).out, f"{cpu}: {o}")


def python_of_exporter() -> str | None:
    for python in (sys.executable, str(ROOT / "build" / "ci" / "venv" / "bin" / "python"),
                   os.environ.get("CRIA_PYTHON", "")):
        if python and subprocess.run([python, "-c", "import gguf, numpy, safetensors"], capture_output=True).returncode == 0:
            return python
    return None


def safetensors(tensors: dict[str, tuple[tuple[int, ...], array.array]]) -> bytes:
    """A file of f32: name -> shape and numbers."""
    header, data = {}, b""
    for n, (shape, numbers) in tensors.items():
        header[n] = {"dtype": "F32", "shape": list(shape), "data_offsets": [len(data), len(data) + 4 * len(numbers)]}
        data += numbers.tobytes()
    packed = json.dumps(header).encode()
    return struct.pack("<Q", len(packed)) + packed + data


def hf_folder(name: str, change: Callable[[dict, dict], None] | None = None, shard: bool = False) -> Path:
    """A tiny LLaMA of Hugging Face's, of random numbers. change() gets its configuration and its tensors."""
    folder = FOLDER / f"{now.number}-{name}"
    folder.mkdir()
    D, F, V, L = 32, 64, 300, 1
    config = {"architectures": ["LlamaForCausalLM"], "model_type": "llama", "hidden_size": D, "intermediate_size": F,
              "num_hidden_layers": L, "num_attention_heads": 4, "num_key_value_heads": 2, "vocab_size": V,
              "rms_norm_eps": 1e-5,
              "max_position_embeddings": 64, "tie_word_embeddings": False, "hidden_act": "silu", "rope_theta": 10000.0,
              "bos_token_id": 1, "eos_token_id": 2}
    random_numbers = random.Random(1)
    shapes = {"model.embed_tokens.weight": (V, D), "model.norm.weight": (D,), "lm_head.weight": (V, D)}
    for i in range(L):
        for part, shape in (("input_layernorm", (D,)), ("post_attention_layernorm", (D,)), ("self_attn.q_proj", (D, D)),
                            ("self_attn.k_proj", (D // 2, D)), ("self_attn.v_proj", (D // 2, D)),
                            ("self_attn.o_proj", (D, D)),
                            ("mlp.gate_proj", (F, D)), ("mlp.up_proj", (F, D)), ("mlp.down_proj", (D, F))):
            shapes[f"model.layers.{i}.{part}.weight"] = shape
    tensors = {n: (s, array.array("f", (random_numbers.uniform(-0.1, 0.1) for _ in range(math.prod(s))))) for n,
               s in shapes.items()}
    if change:
        change(config, tensors)
    (folder / "config.json").write_text(json.dumps(config))
    characters = [chr(c) for c in (*range(33, 127), *range(161, 173), *range(174, 256))]
    characters += [chr(256 + i) for i in range(256 - len(characters))]
    vocabulary = {c: i for i, c in enumerate(characters)} | {f"<|{i}|>": 256 + i for i in range(V - 256)}
    pre = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    (folder / "tokenizer.json").write_text(json.dumps({
        "version": "1.0", "added_tokens": [], "normalizer": None, "pre_tokenizer": pre, "post_processor": None,
        "decoder": pre, "model": {"type": "BPE", "vocab": vocabulary, "merges": [], "dropout": None,
                                                    "unk_token": None, "byte_fallback": False,
                                                    "ignore_merges": False}}))
    file = "model-00001-of-00002.safetensors" if shard else "model.safetensors"
    (folder / file).write_bytes(safetensors(tensors))
    if shard:
        (folder / "model.safetensors.index.json").write_text(json.dumps(
            {"weight_map": dict.fromkeys(tensors, file) | {"lm_head.weight": "model-00002-of-00002.safetensors"}}))
    return folder


def export(python: str, *words, status: int, word: str = "", **how) -> Outcome:
    how.setdefault("timeout", 120)  # transformers, the judge where it is installed, takes long to load
    o = run(ROOT / "export_model.py", *words, program=Path(python), **how)
    lines = o.err.decode(errors="replace").splitlines()
    found = o.status != status or (status and len(lines) != 1) or word not in o.err.decode(errors="replace") or \
        any(is_control(c) for line in lines for c in line)
    now.demand(not found, f"{o}: wanted status {status} and {word!r}")
    return o


def nothing_left(name: str) -> None:
    left = [p.name for p in FOLDER.glob(f"{name}*")]
    now.demand(not left, f"{left} is left")


@row(111, "export_model.py without room, or permission, to write")
def _():
    python = python_of_exporter()
    if not python:
        return now.skip("no Python with numpy, gguf and safetensors here")
    model = hf_folder("model")
    for to in ("native", "gguf", "llama2c", "hf"):
        export(python, model, "-o", FOLDER / f"111-good.{to}", "--to", to, status=0)
        for limit in (0, 4096, 60000):
            export(python, model, "-o", FOLDER / f"111-out.{to}", "--to", to, "--no-verify", status=1,
                   limits={resource.RLIMIT_FSIZE: limit},
                   before=lambda: signal.signal(signal.SIGXFSZ, signal.SIG_IGN))
            nothing_left("111-out")
        export(python, model, "-o", FOLDER / "nowhere" / "x", "--to", to, status=1, word="does not exist")
        started = start([python, ROOT / "export_model.py", model, "-o", FOLDER / f"111-killed.{to}", "--to", to,
                         "--no-verify"])
        wait_until(lambda: has_ended(started[0]) or any(FOLDER.glob(f"111-killed.{to}.*")))
        os.kill(started[0].pid, signal.SIGHUP if to == "gguf" else signal.SIGTERM)
        o = finish(started)
        left, good = list(FOLDER.glob("111-killed*")), FOLDER / f"111-good.{to}"
        whole = FOLDER / f"111-killed.{to}"  # it may have been done, or nearly
        now.demand(set(left) <= {whole, whole.with_suffix(".tokenizer.bin")} and
                   (not whole.is_file() or whole.read_bytes() == good.read_bytes()), f"{to}, a signal: {o}, {left}")
        for p in FOLDER.glob("111-killed*"):
            shutil.rmtree(p) if p.is_dir() else p.unlink()
    ignores = FOLDER / "111-ignores"  # under nohup the C program has to go on as well
    ignores.write_text(f"#!/bin/sh\ngrep -q 'SigIgn:.*[13579bdf]$' /proc/self/status || exit 9\nexec {RUN} \"$@\"\n")
    ignores.chmod(0o755)
    export(python, model, "-o", FOLDER / "111-nohup", "--run", ignores, status=0,
           before=lambda: signal.signal(signal.SIGHUP, signal.SIG_IGN))


@row(112, "export_model.py and sources that it must refuse")
def _():
    python = python_of_exporter()
    if not python:
        return now.skip("no Python with numpy, gguf and safetensors here")

    def nan(config: dict, tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"][1][5 * 32 + 1] = math.nan

    def infinite(config: dict, tensors: dict) -> None:
        tensors["model.norm.weight"][1][3] = math.inf

    def untied(config: dict, tensors: dict) -> None:
        del tensors["lm_head.weight"]

    def missing(config: dict, tensors: dict) -> None:
        del tensors["model.layers.0.self_attn.q_proj.weight"]

    def extra(config: dict, tensors: dict) -> None:
        tensors["model.extra.weight"] = ((32,), array.array("f", [0.0] * 32))

    def shape(config: dict, tensors: dict) -> None:
        tensors["model.layers.0.mlp.up_proj.weight"] = ((32, 64), tensors["model.layers.0.mlp.up_proj.weight"][1])
    for name, change, word in (("nan", nan, "row 5"), ("inf", infinite, "norm.weight"), ("untied", untied, "lm_head"),
                               ("missing", missing, "q_proj"), ("extra", extra, "model.extra"),
                               ("shape", shape, "up_proj")):
        for to in ("native", "gguf", "hf"):
            export(python, hf_folder(f"{name}-{to}", change), "-o", FOLDER / f"112-out-{name}.{to}", "--to", to,
                   status=1, word=word)
    for name, setting in (("rope", {"rope_scaling": {"rope_type": "dynamic", "factor": 2.0}}),
                          ("bias", {"attention_bias": True}),
                          ("act", {"hidden_act": "relu"}), ("unknown", {"something_new": 7}),
                          ("kind", {"model_type": "mamba"}),
                          ("heads", {"num_attention_heads": 3}), ("layers", {"num_hidden_layers": 2}),
                          ("more", {"num_hidden_layers": 2_000_000_000}), ("wide", {"head_dim": 1 << 30}),
                          ("vocab", {"vocab_size": 299}),
                          ("text", {"hidden_size": "32"}), ("negative", {"num_hidden_layers": -1}),
                          ("huge", {"hidden_size": 1 << 40})):
        export(python, hf_folder(name, lambda c, t: c.update(setting)), "-o", FOLDER / f"112-out-{name}", "--to",
               "gguf", status=1)
    export(python, hf_folder("shard", shard=True), "-o", FOLDER / "112-out-shard", "--to", "gguf", status=1,
           word="model-00002-of-00002.safetensors")
    for name, data in (("config.json", b"{"), ("config.json", b"[" * 100000), ("tokenizer.json", b"{}"),
                       ("config.json", b"\xff\xfe"),
                       ("model.safetensors", b"\xff" * 8), ("model.safetensors", b""),
                       ("model.safetensors", struct.pack("<Q", 1 << 63) + b"{}")):
        folder = hf_folder(f"damaged-{name}-{len(data)}-{data[:1].hex()}")
        (folder / name).write_bytes(data)
        export(python, folder, "-o", FOLDER / "112-out-damaged", "--to", "gguf", status=1)
    folder = hf_folder("endless-number")
    (folder / "tokenizer.json").unlink()
    (folder / "tokenizer.model").write_bytes(b"\xff" * 400_000)
    export(python, folder, "-o", FOLDER / "112-out-number", "--to", "gguf", status=1, word="a SentencePiece model")
    folder = hf_folder("pipe")
    (folder / "model.safetensors").unlink()
    os.mkfifo(folder / "model.safetensors")
    export(python, folder, "-o", FOLDER / "112-out-pipe", "--to", "gguf", status=1, word="no file")
    export(python, folder / "model.safetensors", "-o", FOLDER / "112-out-pipe", "--to", "gguf", status=1)
    base, adapter = hf_folder("base"), FOLDER / "112-adapter"
    adapter.mkdir()
    for pattern, word in (("([a-z_.0-9]+)+X", "repeats"), (".*.*.*.*.*X", "repeats"),
                          ("(?x:([a-z_.0-9]+) +X)", "repeats"), ("(", "unterminated")):
        (adapter / "adapter_config.json").write_text(json.dumps({
            "peft_type": "LORA", "r": 1, "lora_alpha": 1, "bias": "none", "rank_pattern": {pattern: 1}}))
        module, ones = "base_model.model.model.layers.0.self_attn.q_proj", array.array("f", [1.0] * 32)
        (adapter / "adapter_model.safetensors").write_bytes(safetensors(
            {f"{module}.lora_A.weight": ((1, 32), ones), f"{module}.lora_B.weight": ((32, 1), ones)}))
        export(python, base, "--lora", adapter, "-o", FOLDER / "112-out-lora", "--to", "gguf", status=1,
               word=word)
    g = gguf()
    g.keys.append(list(g.keys[3]))
    g.n_keys += 1
    (FOLDER / "112-twice.gguf").write_bytes(g.pack())
    export(python, FOLDER / "112-twice.gguf", "-o", FOLDER / "112-out-twice", "--to", "gguf", status=1, word="twice")
    nothing_left("112-out")


# ==== 12. Files of texts ====

CHAT = ("--template", "chatml")
BAD_LINES = (b'{"prompt": 5}', b'{"prompt": "a"', b'{"promt": "a"}', b"{}", b'{"messages": {}}', b'{"messages": [1]}',
             b'{"messages": [{"role": 1, "content": "a"}]}', b'{"prompt": "a", "seed": 1e400}', b'{"prompt": "\\ud800"}',
             b'{"prompt": "a", "n_predict": -7}', b'{"prompt": "a", "n_predict": 99999999999999999999}',
             b'{"prompt": "a", "temp": "NaN"}', b'{"prompt": "a", "stop": [""]}', b'{"prompt": "a", "stop": ' +
             b"[" * 5000 + b"]" * 5000 + b"}", b'{"prompt": "a"} b', b'{"prompt": "\xff"}', b'{"prompt": "\x01"}',
             b'{"prompt": "a", "id": {"x": [null, 1e308]}}', b'{"prompt": "' + b"ab " * 20000 + b'"}',
             b'{"prompt": "a", "messages": [{"role": "user", "content": "b"}]}')
GOOD_LINES = (b"a", b'{"prompt": "a"}', b'{"prompt": ""}', b'{"prompt": "\\u0000a"}', b'{"prompt": "a", "prompt": "b"}',
              b'{"messages": []}', b'{"messages": [{"role": "user", "content": "<|im_end|>\\n"}]}',
              b'{"prompt": "a", "id": "\\ud83d\\ude00"}', b'{"prompt": "a", "stop": ["b", "cc"]}',
              b"\xff\xfe[", b'"a', b"[1]")


@row(113, "prompts in JSON lines: each line an answer or an error, in their order")
def _():
    lines = [line for pair in zip(BAD_LINES, GOOD_LINES * 2) for line in pair]
    for name, end, joined in (("lf", b"\n", b"\n"), ("crlf", b"\r\n", b"\r\n"), ("no-end", b"", b"\n")):
        path = put(f"{name}.txt", joined.join(lines) + end)
        o = expect(1, SPM, "-q", "-t", "0", "-n", "3", *CHAT, "--json", "--prompts", path, lines=1)
        answers = [json.loads(line) for line in o.out.decode().splitlines()]
        kinds = ["error" if i % 2 == 0 else "text" for i in range(len(lines))]
        now.demand([next(k for k in ("error", "text") if k in a) for a in answers] == kinds,
                   f"{name}: {[a.get('error', a.get('text')) for a in answers]}")
        now.demand([a["line"] for a in answers if "error" in a] == list(range(1, len(lines) + 1, 2)), f"{name}: {o.out}")
    for line in BAD_LINES:
        expect((1, 2, 5), SPM, "-q", "-n", "3", *CHAT, "--prompts", put(f"one-{len(line)}.txt", line), lines=2)
    expect(0, SPM, "-q", "-n", "1", "--prompts", put("empty.txt", b""))
    expect(5, SPM, "-q", "-n", "1", "--prompts", put("long.txt", b"ab " * (1 << 18)), lines=2)
    for mode in ("score", "eval"):
        for line in BAD_LINES + (b"[", b"\0", b'{"question": [], "answer": {}}', b'{"question": "a", "choices": []}',
                                 b'{"question": "a", "answer": "b", "choices": ["c"]}'):
            path = put(f"{mode}-{len(line)}.txt", line)
            o = run(SPM, "-q", "-m", mode, "-f" if mode == "eval" else "--prompts", path)
            now.demand(o.status in (0, 1, 2, 5) and o.err.count(b"\n") <= 2, str(o))


@row(114, "messages of a conversation")
def _():
    for name, data, status in (
            ("none", b"[]", 0), ("object", b'{"messages": [{"role": "user", "content": "a"}]}', 0), ("empty", b"", 1),
            ("number", b"1", 1), ("open", b'[{"role": "user", "content": "a"', 1), ("deep", b"[" * 100000, 1),
            ("role", b'[{"role": 1, "content": "a"}]', 1), ("text", b'[{"role": "user", "content": 1}]', (0, 1, 2)),
            ("no-content", b'[{"role": "user"}]', (0, 1, 2)),
            ("bytes", b'[{"role": "user", "content": "\xc3"}]', 1),
            ("special", b'[{"role": "<|im_end|>", "content": "<|im_start|>"}]', (0, 1)),
            ("nul", b'[{"role": "user", "content": "\\u0000"}]', 0),
            ("twice", b'[{"role": "user", "content": "a", "content": "b"}]', 0),
            ("keys", b'[{' + b",".join(b'"%d": 1' % i for i in range(5000)) + b"}]", 1)):
        path = put(f"{name}.json", data)
        expect(status, SPM, "-q", "-m", "render", *CHAT, "--messages", path)
        expect(status or (0, 2), SPM, "-q", "-t", "0", "-n", "2", "-m", "chat", *CHAT, "-st", "-i", "a",
               "--messages", path, lines=None)
    in_child(lambda: put("large.json", b'[{"role": "user", "content": "' + b"a" * (64 << 20) + b'"}]'))
    expect((1, 2, 5), SPM, "-q", "-m", "chat", *CHAT, "-st", "-i", "a", "--messages", FOLDER / "114-large.json")
    (FOLDER / "114-large.json").unlink()


# ==== 13. All of it ====

def sanitized() -> Row:
    """The files that the rows have made, in build/attack: they are opened and used there as they are, and not swept."""
    last = Row(0, "the files of all rows again, with sanitizers", sanitized)
    files = [p for p in made if p.exists() and p.stat().st_size and not p.name.endswith(".txt")]
    for i in range(0, len(files), 200):
        o = run("0", "0", "0", *files[i:i + 200], program=SWEEP, env=SANITIZERS, timeout=600)
        last.cases += len(files[i:i + 200])
        if o.status or o.err:
            last.faults.append(f"status {o.status}, {o.err[-1500:].decode(errors='replace')}")
        last.faults += [line for line in o.out.decode(errors="replace").splitlines() if line.split("\t")[5] != "0"]
    return last


def show(r: Row, seconds: float) -> None:
    result = "FAILED" if r.faults else "not run" if not r.cases else "ok"
    note = f" ({r.note})" if r.note else ""
    print(f"{r.number or '':>4}  {r.cases:>7}  {result:<7} {seconds:6.1f} s  {r.what}{note}", flush=True)
    for fault in r.faults[:5]:
        print(f"        {fault}".replace("\n", "\n        "))
    if len(r.faults) > 5:
        print(f"        and {len(r.faults) - 5} more")


def main() -> int:
    global FOLDER, FULL, now
    parser = argparse.ArgumentParser(description="The attack suite.")
    parser.add_argument("--rows", help="only these: 1-20,36")
    parser.add_argument("--full", action="store_true", help="every step of the sweeps on every file; gigabytes of text")
    options = parser.parse_args()
    FULL = options.full
    wanted = {n for part in (options.rows or "1-114").split(",") for n in
              range(int(part.split("-")[0]), int(part.split("-")[-1]) + 1)}
    signal.signal(signal.SIGPIPE, signal.SIG_IGN)
    begin = time.monotonic()
    done = []
    print(" row    cases  result      time  what")
    with tempfile.TemporaryDirectory(prefix="cria-attack-") as folder:
        FOLDER = Path(folder)
        for r in rows:
            if r.number not in wanted:
                continue
            now, start_of_row = r, time.monotonic()
            try:
                r.make()
            except Exception:
                r.faults.append(traceback.format_exc())
            while running:
                os.kill(running[0].pid, signal.SIGKILL)
                finish((running[0], io.BytesIO(), io.BytesIO(), 0.0, []))
            show(r, time.monotonic() - start_of_row)
            done.append(r)
        start_of_row = time.monotonic()
        done.append(sanitized())
        show(done[-1], time.monotonic() - start_of_row)
    own = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024  # which counts for what this process starts, too
    if own > MEMORY * 3 // 4:
        sys.exit(f"attack.py: took {own >> 20} MiB itself, so that nothing is known of ./run's memory")
    failed, skipped = [r for r in done if r.faults], [r for r in done if not r.cases]
    in_process = sum(r.cases for r in done if r.number in (0, 7, 13, 14, 105))
    print(f"{len(done) - 1} rows, {sum(r.cases for r in done) - in_process} cases in processes of their own and "
          f"{in_process} in one, {time.monotonic() - begin:.0f} s; {len(failed)} rows failed, {len(skipped)} not run")
    return bool(failed)


FULL = False

if __name__ == "__main__":
    sys.exit(main())
