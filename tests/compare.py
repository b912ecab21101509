#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Compares the speed of cria with llama.cpp's on this machine: that of `make bench`.

    make bench                               or: python3 tests/compare.py
    make bench BENCH="--kernel avx2"         as on a laptop without AVX-512: both engines use AVX2
    make bench BENCH="--models smollm2 --long"

Builds llama.cpp (from PyPI's package llama-cpp-python, which has its source), gets SmolLM2-135M-Instruct as `make demo`
does, and makes files with random weights in the shapes of other models; all but the first in build/bench, which takes
5 GB. Then it runs cria, llama.cpp, cria, llama.cpp, ..., one process for each measurement: whatever slows the machine
down for a while hits both. It prints a table in Markdown, and keeps it in build/bench/result.md.

It needs python3 with pip and venv, cmake, a C++ compiler and a network, each the first time only: a step is skipped
where a run before this one has finished it, and nothing has its final name before it is complete. So an interrupted run
is simply started again; the table of what it had measured is there too. Nothing else should run meanwhile.
What fails is told in one line; exit status 1.
"""
from __future__ import annotations

import argparse
import dataclasses
import datetime
import json
import os
import pathlib
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tarfile
import textwrap
import time
from dataclasses import dataclass
from typing import Callable, Optional

from get_demo_model import has_digest

ROOT = pathlib.Path(__file__).resolve().parent.parent  # main() works here
BENCH = pathlib.Path("build/bench")
SMOLLM2 = pathlib.Path("models/SmolLM2-135M-Instruct.Q4_1.gguf")
SMOLLM2_NATIVE = pathlib.Path("models/smollm2-135m-instruct.bin")

PACKAGE = "llama-cpp-python==0.3.36"
ARCHIVE = "llama_cpp_python-0.3.36.tar.gz"
ARCHIVE_SHA256 = "832db0699007f1be95a7e41ef12e88926b02ba836461e36a36372db2760c1a2e"
PROGRAMS = ["llama-bench", "llama-completion"]
CMAKE = ["-DCMAKE_BUILD_TYPE=Release", "-DBUILD_SHARED_LIBS=OFF", "-DLLAMA_CURL=OFF", "-DLLAMA_BUILD_TESTS=OFF",
         "-DLLAMA_BUILD_SERVER=OFF"]
BUILDS = {  # by the folder's name
    "llama-native": ["-DGGML_NATIVE=ON"],
    "llama-avx2": ["-DGGML_NATIVE=OFF", "-DGGML_AVX512=OFF", "-DGGML_AVX=ON", "-DGGML_AVX2=ON", "-DGGML_FMA=ON",
                   "-DGGML_F16C=ON", "-DGGML_BMI2=ON"],
}
PYTHON_PACKAGES = ["numpy>=1.26", "gguf==0.19.0"]

VOCAB = 32000
BLOCK_ROWS = 256  # so many rows of a matrix are random; they are repeated
PROMPT = "Once upon a time"


class Failure(Exception):
    """What went wrong, in a few words."""


@dataclass(frozen=True)
class Shape:
    """The sizes of a model of the family llama; its head width is dim / heads."""
    dim: int
    layers: int
    heads: int
    kv_heads: int
    ffn: int
    context: int
    tied: bool


@dataclass(frozen=True)
class Model:
    """A model and its tests: a prompt of pp tokens, and tg tokens one by one."""
    name: str                # in --models
    title: str               # in the table
    pp: int
    tg: int
    shape: Optional[Shape] = None  # None: SmolLM2, whose weights are real
    qtype: str = ""          # of every matrix; Q4_K_M: Q4_K, and Q6_K for some
    file: Optional[pathlib.Path] = None  # the user's own

    @property
    def path(self) -> pathlib.Path:
        return self.file or (BENCH / f"{self.name}.gguf" if self.shape else SMOLLM2)


TINYLLAMA = Shape(dim=2048, layers=22, heads=32, kv_heads=4, ffn=5632, context=2048, tied=False)
STORIES_15M = Shape(dim=288, layers=6, heads=6, kv_heads=6, ffn=768, context=1024, tied=True)
STORIES_110M = Shape(dim=768, layers=12, heads=12, kv_heads=12, ffn=2048, context=1024, tied=True)
MODELS = [
    Model("smollm2", "SmolLM2 135M Q4_1", 512, 64),
    Model("1.1b-q4_0", "1.1B Q4_0", 256, 32, TINYLLAMA, "Q4_0"),
    Model("1.1b-q8_0", "1.1B Q8_0", 256, 32, TINYLLAMA, "Q8_0"),
    Model("1.1b-f16", "1.1B F16", 256, 32, TINYLLAMA, "F16"),
    Model("1.1b-q4_k_m", "1.1B Q4_K_M", 256, 32, TINYLLAMA, "Q4_K_M"),
    Model("1.1b-q6_k", "1.1B Q6_K", 256, 32, TINYLLAMA, "Q6_K"),
    Model("110m", "110M Q8_0", 256, 128, STORIES_110M, "Q8_0"),
    Model("15m", "15M Q8_0", 256, 128, STORIES_15M, "Q8_0"),
]
LONG = dataclasses.replace(MODELS[0], pp=4096, tg=0)


# ==== 1. Files and programs ====

def say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)


def last_error(output: str) -> str:
    """The last of a program's lines that names an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    return ([line for line in lines if "error" in line.lower()] or lines)[-1][:160]


def first_error(output: str) -> str:
    """The same of cmake and a compiler, of whose errors the first counts."""
    found = re.search(r"^.*(?:CMake Error|\berror:).*", output, re.M)
    return found[0].strip()[:160] if found else last_error(output)


def call(command: list, what: str, log: Optional[pathlib.Path] = None) -> str:
    """What a program writes to stdout; what it says otherwise goes to nobody, or all of it to a log."""
    words = [str(word) for word in command]
    if log:
        with log.open("a") as file:
            status = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=file, stderr=file).returncode
        if status:
            raise Failure(f"{what}: {first_error(log.read_text(errors='replace'))} (more in {log})")
        return ""
    done = subprocess.run(words, stdin=subprocess.DEVNULL, stdout=subprocess.PIPE, stderr=subprocess.PIPE,
                          encoding="utf-8", errors="replace")
    if done.returncode:
        raise Failure(f"{what}: {last_error(done.stderr or done.stdout)}")
    return done.stdout


def runs(command: list) -> bool:
    """Whether a program is there, whole, and content."""
    try:
        return subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                              stderr=subprocess.DEVNULL).returncode == 0
    except OSError:
        return False


def get_smollm2() -> None:
    if not runs(["./run", "--version"]):
        raise Failure("there is no ./run: make it first")
    if not SMOLLM2.is_file() or not runs(["./run", SMOLLM2_NATIVE, "-m", "inspect"]):
        say("Getting SmolLM2-135M-Instruct, 98 MB, once ...")
        call([sys.executable, "tests/get_demo_model.py", SMOLLM2_NATIVE], f"there is no {SMOLLM2}")


# ==== 2. llama.cpp ====

def get_source() -> pathlib.Path:
    """llama.cpp's source, downloaded and unpacked."""
    source, archive, part = BENCH / "llama.cpp", BENCH / ARCHIVE, BENCH / "unpacking"
    if source.is_dir():
        return source
    if not has_digest(archive, ARCHIVE_SHA256):
        archive.unlink(missing_ok=True)  # pip would take it for the package
        if not runs([sys.executable, "-c", "import pip"]):
            raise Failure("this python3 has no pip to get llama.cpp's source with")
        say("Downloading llama.cpp's source, 77 MB, once ...")
        call([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "2", "--no-deps",
              "--no-binary", "llama-cpp-python", "-d", BENCH, PACKAGE],
             f"pip cannot download {PACKAGE} (is there a network?)")
        if not has_digest(archive, ARCHIVE_SHA256):
            raise Failure(f"pip brought another {ARCHIVE} than expected: its SHA-256 does not begin with "
                          f"{ARCHIVE_SHA256[:12]}")
    shutil.rmtree(part, ignore_errors=True)
    with tarfile.open(archive) as file:
        wanted = [member for member in file if "/vendor/llama.cpp/" in member.name]
        safe = {"filter": "data"} if hasattr(tarfile, "data_filter") else {}
        file.extractall(part, wanted, **safe)
    os.replace(part / ARCHIVE[:-len(".tar.gz")] / "vendor/llama.cpp", source)
    shutil.rmtree(part)
    archive.unlink()
    return source


def build_llama(name: str) -> pathlib.Path:
    """The folder of llama.cpp's programs."""
    folder, log = BENCH / name, BENCH / f"{name}.log"
    programs = [folder / "bin" / program for program in PROGRAMS]
    if all(runs([program, "--version"]) for program in programs):
        return folder / "bin"
    if not shutil.which("cmake"):
        raise Failure("building llama.cpp needs cmake and a C++ compiler: there is no cmake")
    if not any(map(shutil.which, filter(None, [os.environ.get("CXX"), "c++", "g++", "clang++"]))):
        raise Failure("building llama.cpp needs cmake and a C++ compiler: there is no C++ compiler")
    source, jobs = get_source(), os.cpu_count() or 1
    for program in programs:
        program.unlink(missing_ok=True)  # make would take a broken one for finished
    log.unlink(missing_ok=True)
    say(f"Building {name}, once; about {max(1, round(12 / jobs))} minutes (log: {log}) ...")
    try:
        call(["cmake", "-S", source, "-B", folder, *CMAKE, *BUILDS[name]], "cmake cannot configure llama.cpp", log)
        call(["cmake", "--build", folder, "--target", *PROGRAMS, "--parallel", jobs], "llama.cpp cannot be built", log)
        for program in programs:
            call([program, "--version"], f"{program} was built but does not run here")
    except Failure:  # whatever was wrong in the folder, the next run has a new one; after Ctrl-C it goes on
        shutil.rmtree(folder, ignore_errors=True)
        raise
    return folder / "bin"


# ==== 3. Models with random weights ====

def get_models(models: list[Model], llama: pathlib.Path) -> None:
    """Makes those files that are missing. Each has its name only after both engines have opened it."""
    python = BENCH / "venv/bin/python"
    for model in models:
        if model.path.is_file():
            continue
        if not runs([python, "-c", "import numpy, gguf"]):
            say("Installing numpy and gguf in build/bench/venv, once ...")
            call([sys.executable, "-m", "venv", "--clear", BENCH / "venv"], "python3 cannot make a venv")
            call([python, "-m", "pip", "install", "--disable-pip-version-check", *PYTHON_PACKAGES],
                 "pip cannot install numpy and gguf (is there a network?)")
        say(f"Making {model.path}, once ...")
        part = model.path.with_name(model.path.name + ".part")
        call([python, "tests/compare.py", "--write", model.name, "-o", part], f"{part} cannot be made")
        call(["./run", part, "-m", "inspect"], "./run does not accept it")
        call([llama / "llama-bench", "-m", part, "-o", "json", "-r", "1", "-p", "1", "-n", "0"],
             f"llama-bench does not accept {part}")
        os.replace(part, model.path)


def vocabulary() -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece vocabulary: <unk> <s> </s>, the 256 bytes, characters, and pieces that no text leads to.
    pieces, scores, GGUF's token types      (VOCAB)"""
    special = ["<unk>", "<s>", "</s>"] + [f"<0x{byte:02X}>" for byte in range(256)]
    types = [2, 3, 3] + [6] * 256
    pieces = ["▁"] + [chr(c) for c in range(33, 127)]
    pieces += [f"▁piece{n}" for n in range(VOCAB - len(special) - len(pieces))]
    scores = [0.0] * len(special) + [-float(rank) for rank in range(len(pieces))]
    return special + pieces, scores, types + [1] * len(pieces)


def tensor_shapes(shape: Shape) -> list[tuple[str, int, int]]:
    """name, rows, columns of each tensor in the order of the file; a vector has 0 rows."""
    kv_dim = shape.dim // shape.heads * shape.kv_heads
    tensors = [("token_embd", VOCAB, shape.dim), ("output_norm", 0, shape.dim)]
    tensors += [] if shape.tied else [("output", VOCAB, shape.dim)]
    for n in range(shape.layers):
        tensors += [(f"blk.{n}.{name}", rows, columns) for name, rows, columns in [
            ("attn_norm", 0, shape.dim), ("attn_q", shape.dim, shape.dim), ("attn_k", kv_dim, shape.dim),
            ("attn_v", kv_dim, shape.dim), ("attn_output", shape.dim, shape.dim), ("ffn_norm", 0, shape.dim),
            ("ffn_gate", shape.ffn, shape.dim), ("ffn_up", shape.ffn, shape.dim), ("ffn_down", shape.dim, shape.ffn)]]
    return [(f"{name}.weight", rows, columns) for name, rows, columns in tensors]


def type_of(model: Model, name: str) -> str:
    """The type of a matrix. Q4_K_M has Q6_K where llama.cpp's llama_tensor_get_type() puts it."""
    if model.qtype != "Q4_K_M":
        return model.qtype
    layer, n = int(name.split(".")[1]) if name.startswith("blk.") else 0, model.shape.layers
    more_bits = layer < n // 8 or layer >= 7 * n // 8 or (layer - n // 8) % 3 == 2
    return "Q6_K" if name == "output.weight" or (more_bits and re.search("attn_v|ffn_down", name)) else "Q4_K"


def random_rows(qtype: str, columns: int, random):
    """Rows of weights whose standard deviation is about 0.02 (0.1 of Q6_K, since no scale is a subnormal number): (BLOCK_ROWS, bytes of a row), or floats."""
    import gguf
    import numpy as np
    kind = gguf.GGMLQuantizationType[qtype]
    if not qtype.endswith("_K"):
        return gguf.quantize(random.normal(0, 0.02, (BLOCK_ROWS, columns)).astype(np.float32), kind)
    block_cols, block_bytes = gguf.GGML_QUANT_SIZES[kind]
    blocks = random.integers(0, 256, (BLOCK_ROWS, columns // block_cols, block_bytes), dtype=np.uint8)
    at, scales = {"Q4_K": (0, [8e-5, 6e-4]), "Q6_K": (208, [7e-5])}[qtype]  # d, and dmin where there is one
    blocks[:, :, at:at + 2 * len(scales)] = np.frombuffer(np.float16(scales).tobytes(), np.uint8)
    return blocks.reshape(BLOCK_ROWS, -1)


def write_model(model: Model, path: pathlib.Path) -> None:
    """A GGUF file: norms are 1, all else is normal with standard deviation 0.02. Runs in the venv."""
    import gguf
    import numpy as np
    shape = model.shape
    assert shape
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_name(f"random {model.name}")
    writer.add_file_type(gguf.LlamaFileType[f"MOSTLY_{model.qtype}"])
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(VOCAB)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.dim)
    writer.add_block_count(shape.layers)
    writer.add_feed_forward_length(shape.ffn)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_rope_freq_base(1e4)
    writer.add_rope_dimension_count(shape.dim // shape.heads)
    writer.add_layer_norm_rms_eps(1e-5)
    pieces, scores, types = vocabulary()
    writer.add_tokenizer_model("llama")
    writer.add_tokenizer_pre("default")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    writer.add_unk_token_id(0)
    writer.add_add_bos_token(True)

    random = np.random.default_rng(1)
    tensors = tensor_shapes(shape)
    kinds = sorted({(type_of(model, name), columns) for name, rows, columns in tensors if rows})
    blocks = {kind: random_rows(*kind, random) for kind in kinds}
    for name, rows, columns in tensors:
        if rows:
            qtype = gguf.GGMLQuantizationType[type_of(model, name)]
            block = blocks[qtype.name, columns]
            writer.add_tensor_info(name, (rows, block.shape[1]), block.dtype, rows * block[0].nbytes, qtype)
        else:
            writer.add_tensor_info(name, (columns,), np.dtype(np.float32), columns * 4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    for n, (name, rows, columns) in enumerate(tensors):
        if rows:  # no two layers begin with the same row
            block = np.roll(blocks[type_of(model, name), columns], n, axis=0)
            writer.write_tensor_data(np.resize(block, (rows, block.shape[1])))
        else:
            writer.write_tensor_data(np.ones(columns, np.float32))
    writer.close()


# ==== 4. Measuring ====

@dataclass
class Row:
    """One test of one model: cria's results and llama.cpp's tokens per second, pair by pair."""
    title: str
    test: str
    threads: int
    cria: list[dict]
    llama: list[float]

    def ratios(self) -> list[float]:
        return [a["tok_per_s"] / b for a, b in zip(self.cria, self.llama)]


@dataclass
class Start:
    """What it takes to start and write a token: seconds and peak bytes of each run, cria's and llama.cpp's."""
    cria: list[tuple[float, int]]
    llama: list[tuple[float, int]]


def tests_of(model: Model) -> list[str]:
    return [f"{kind}{count}" for kind, count in (("pp", model.pp), ("tg", model.tg)) if count]


def tests_among(found: dict, model: Model, program: str) -> dict:
    missing = [test for test in tests_of(model) if test not in found]
    if missing:
        raise Failure(f"{program} has no result for {missing[0]} of {model.path}")
    return {test: found[test] for test in tests_of(model)}


def bench_cria(model: Model, threads: int, kernel: Optional[str]) -> dict[str, dict]:
    """By the test's name: what `./run -m bench --json` says."""
    command = ["./run", model.path, "-m", "bench", "--json", "--pp", model.pp, "--tg", model.tg, "-j", threads,
               "--reps", "1", *(["--kernel", kernel] if kernel else [])]
    found = {result["test"]: result for result in json.loads(call(command, f"./run {model.path} -m bench"))}
    return tests_among(found, model, "./run -m bench")


def bench_llama(model: Model, threads: int, llama: pathlib.Path) -> dict[str, float]:
    """By the same names: tokens per second."""
    command = [llama / "llama-bench", "-m", model.path, "-o", "json", "-r", "1", "-p", model.pp, "-n", model.tg,
               "-t", threads]
    found = {f"tg{result['n_gen']}" if result["n_gen"] else f"pp{result['n_prompt']}": result["avg_ts"]
             for result in json.loads(call(command, f"llama-bench -m {model.path}"))}
    return tests_among(found, model, "llama-bench")


def busy_cores() -> float:
    """How many cores others keep busy, during one second; 0 where there is no /proc."""
    def ticks() -> list[int]:  # user, nice, system, idle, waiting for a disk, ...
        return [int(word) for word in pathlib.Path("/proc/stat").read_text().split("\n")[0].split()[1:]]

    try:
        before = ticks()
        time.sleep(1)
        spent = [b - a for a, b in zip(before, ticks())]
    except OSError:
        return 0
    return (1 - sum(spent[3:5]) / max(sum(spent), 1)) * (os.cpu_count() or 1)


def measure_model(model: Model, threads: int, pairs: int, kernel: Optional[str], llama: pathlib.Path) -> list[Row]:
    rows = [Row(model.title, test, threads, [], []) for test in tests_of(model)]
    busy = busy_cores()
    if busy > 0.2:
        say(f"Other programs keep {busy:.1f} cores busy: the figures will be off.")
    for pair in range(1, pairs + 1):
        ours = bench_cria(model, threads, kernel)
        theirs = bench_llama(model, threads, llama)
        for row in rows:
            row.cria.append(ours[row.test])
            row.llama.append(theirs[row.test])
        say(f"{model.title}, {threads} thread{'s' * (threads > 1)}, pair {pair} of {pairs}: " + "; ".join(
            f"{row.test} {row.cria[-1]['tok_per_s']:.5g} / {row.llama[-1]:.5g} = {row.ratios()[-1]:.2f}"
            for row in rows))
    return rows


def run_once(command: list) -> tuple[float, int]:
    """Seconds and peak resident bytes of a program. (Linux counts what this script had when it started the program,
    some 20 MB: a smaller peak than that cannot be seen.)"""
    start = time.perf_counter()
    child = subprocess.Popen([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.DEVNULL,
                             stderr=subprocess.DEVNULL)
    try:
        _, status, usage = os.wait4(child.pid, 0)
    except KeyboardInterrupt:
        child.kill()
        child.wait()
        raise
    seconds = time.perf_counter() - start
    child.returncode = os.waitstatus_to_exitcode(status)  # so that Popen does not wait for it again
    if child.returncode:
        raise Failure(f"{' '.join(map(str, command))}: exit status {child.returncode}")
    return seconds, usage.ru_maxrss * (1 if sys.platform == "darwin" else 1024)


def measure_start(pairs: int, kernel: Optional[str], llama: pathlib.Path) -> Start:
    ours = ["./run", SMOLLM2_NATIVE, "-i", PROMPT, "-n", 1, "-t", 0, "-q", *(["--kernel", kernel] if kernel else [])]
    theirs = [llama / "llama-completion", "-m", SMOLLM2, "-p", PROMPT, "-n", 1, "-no-cnv", "--temp", 0]
    start = Start([], [])
    for pair in range(pairs + 1):
        both = run_once(ours), run_once(theirs)
        if pair:  # the first reads the files from the disk
            start.cria.append(both[0])
            start.llama.append(both[1])
    say(f"start-up, the last of {pairs}: {both[0][0]:.3f} s / {both[1][0]:.3f} s")
    return start


# ==== 5. The table ====

def first_line(command: list, default: str = "unknown") -> str:
    try:
        done = subprocess.run([str(word) for word in command], stdin=subprocess.DEVNULL, stdout=subprocess.PIPE,
                              stderr=subprocess.STDOUT, encoding="utf-8", errors="replace")
        return done.stdout.splitlines()[0].strip() if done.returncode == 0 else default
    except (OSError, IndexError):
        return default


def cpu() -> str:
    """The CPU's name and the number of its cores."""
    try:
        text = pathlib.Path("/proc/cpuinfo").read_text()
    except OSError:
        text = ""
    name = re.search(r"^model name\s*: (.*)", text, re.M)
    cores = {tuple(re.findall(r"^(?:physical id|core id)\s*: (\d+)", part, re.M)) for part in text.split("\n\n")} - {()}
    logical = os.cpu_count() or 1
    title = name[1].strip() if name else first_line(["sysctl", "-n", "machdep.cpu.brand_string"], platform.machine())
    threads = f" ({logical} hardware threads)" if cores and len(cores) != logical else ""
    return f"{title}, {len(cores) or logical} cores{threads}"


def describe(args: argparse.Namespace, llama: pathlib.Path) -> str:
    """What stands above the table."""
    compilers = " / ".join(first_line([os.environ.get(variable) or default, "--version"])
                           for variable, default in (("CC", "cc"), ("CXX", "c++")))
    version = re.sub(r"^version: *| *\(.*", "", first_line([llama / "llama-bench", "--version"]))
    opponent = "AVX2, FMA, F16C and BMI2" if args.kernel else "this CPU (GGML_NATIVE)"
    text = (f"{first_line(['./run', '--version'])} {f'with --kernel {args.kernel} ' if args.kernel else ''}against "
            f"llama.cpp {version} (the source in {PACKAGE}), built for {opponent}; "
            f"{args.pairs} pair{'s' * (args.pairs > 1)} of runs, the two in turn, both with their usual settings. "
            "t/s: medians. Ratio: cria / llama.cpp, the median of the pairs, with the least and the most. "
            "Of ceiling: how much cria makes of what bounds it on this machine; weights that fit the cache can be read "
            "faster than memory's ceiling. SmolLM2 is real; the others have "
            "random weights in the shapes of TinyLlama, stories110M and stories15M.")
    return f"{cpu()}; {compilers}; {datetime.date.today()}.\n\n{textwrap.fill(text, 120)}\n"


def number(x: float) -> str:
    return f"{x:.0f}" if x >= 100 else f"{x:.1f}" if x >= 10 else f"{x:.2f}"


def table(rows: list[Row], start: Optional[Start]) -> str:
    """Both tables in Markdown; a row without a finished pair is not there."""
    lines = []
    if rows:
        lines += ["| model | test | threads | cria t/s | llama.cpp t/s | ratio | of ceiling | memory ceiling |",
                  "|---|---|---|---|---|---|---|---|"]
    for row in rows:
        def median(key: str) -> float:
            return statistics.median(result[key] for result in row.cria)

        ratios = row.ratios()
        lines.append(
            f"| {row.title} | {row.test} | {row.threads} | {number(median('tok_per_s'))} "
            f"| {number(statistics.median(row.llama))} "
            f"| **{statistics.median(ratios):.2f}** ({min(ratios):.2f} to {max(ratios):.2f}) "
            f"| {median('percent_of_ceiling'):.0f} % of {statistics.mode(r['bound_by'] for r in row.cria)} "
            f"| {median('ceiling_gb_per_s'):.1f} GB/s |")
    if start:
        lines += ["", f'From start to the first token after "{PROMPT}", SmolLM2, its file in memory: ratio is '
                  "llama.cpp / cria.", "", "| | cria | llama.cpp | ratio |", "|---|---|---|---|"]
        for what, at, unit, scale in ("time", 0, "ms", 1e3), ("peak memory", 1, "MB", 1e-6):
            ours, theirs = ([one[at] * scale for one in runs] for runs in (start.cria, start.llama))
            ratios = [b / a for a, b in zip(ours, theirs)]
            lines.append(f"| {what} | {number(statistics.median(ours))} {unit} "
                         f"| {number(statistics.median(theirs))} {unit} "
                         f"| **{statistics.median(ratios):.1f}** ({min(ratios):.1f} to {max(ratios):.1f}) |")
    return "\n".join(lines) + "\n"


def save(path: pathlib.Path, text: str) -> None:
    part = path.with_name(path.name + ".part")
    part.write_text(text, encoding="utf-8")
    os.replace(part, path)


# ==== 6. The command ====

def shortened(model: Model) -> Model:
    """For --quick."""
    return dataclasses.replace(model, pp=model.pp // 8, tg=model.tg // 8)


def compare(args: argparse.Namespace) -> None:
    BENCH.mkdir(parents=True, exist_ok=True)
    get_smollm2()
    if args.kernel:
        call(["./run", SMOLLM2, "-m", "inspect", "--kernel", args.kernel], "cria cannot do that here")
    llama = build_llama("llama-avx2" if args.kernel else "llama-native")
    models = [model for model in MODELS if model.name in args.models]
    get_models(models, llama)

    plan: list[Model] = models + ([LONG] if args.long else [])
    plan += [Model(path.name, path.name, 512, 64, file=path) for path in args.gguf]
    plan = [shortened(model) for model in plan] if args.quick else plan
    head, rows, start = describe(args, llama), [], None
    if any(model.name == "smollm2" for model in plan):
        start = measure_start(args.pairs, args.kernel, llama)
    try:
        for model in plan:
            for threads in args.threads:
                rows += measure_model(model, threads, args.pairs, args.kernel, llama)
                save(args.output, head + "\n" + table(rows, start))
    finally:  # also after Ctrl-C
        if rows:
            print(head + "\n" + table(rows, start), end="", flush=True)
            say(f"It is in {args.output} too.")


def words_of(known: Callable[[str], bool], what: str) -> Callable[[str], list[str]]:
    """A reader of an option's value: words with commas between them."""
    def read(text: str) -> list[str]:
        words = [word for word in text.lower().split(",") if word]
        unknown = [word for word in words if not known(word)]
        if unknown or not words:
            raise argparse.ArgumentTypeError(f"{', '.join(unknown) or 'nothing'}: {what}")
        return words
    return read


def positive(text: str) -> int:
    if not text.isdigit() or int(text) < 1:
        raise argparse.ArgumentTypeError(f"{text}: a number from 1 is wanted")
    return int(text)


def main() -> int:
    names = [model.name for model in MODELS]
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", type=words_of(names.__contains__, "the models are " + ",".join(names)),
                        metavar="NAMES", help=f"some of {','.join(names)} (default: all, or none with --gguf)")
    parser.add_argument("--gguf", type=pathlib.Path, metavar="FILE", action="append", default=[],
                        help="a model of your own")
    parser.add_argument("--threads", type=words_of(lambda word: word.isdigit() and int(word) > 0,
                                                   "numbers from 1 are wanted"),
                        default=["1", "2"], metavar="N,N,...", help="default: 1,2")
    parser.add_argument("--pairs", type=positive, metavar="N", help="of runs (default: 5; with --quick 1)")
    parser.add_argument("--kernel", choices=["avx2"], help="cria's kernel; then llama.cpp is built for AVX2, too")
    parser.add_argument("--long", action="store_true", help=f"SmolLM2 with a prompt of {LONG.pp} tokens, too")
    parser.add_argument("--quick", action="store_true", help="tests an eighth as long, to see whether it all works")
    parser.add_argument("-o", "--output", type=pathlib.Path, metavar="FILE", default=ROOT / BENCH / "result.md",
                        help=f"default: {BENCH / 'result.md'}")
    parser.add_argument("--write", choices=[model.name for model in MODELS if model.shape],
                        help=argparse.SUPPRESS)  # within the venv: makes one file
    args = parser.parse_args()
    args.threads = [int(word) for word in args.threads]
    args.pairs = args.pairs or (1 if args.quick else 5)
    args.models = args.models or ([] if args.gguf else names)
    args.gguf = [path.resolve() for path in args.gguf]
    args.output = args.output.resolve()
    os.chdir(ROOT)
    try:
        if args.write:
            write_model(next(model for model in MODELS if model.name == args.write), args.output)
        else:
            compare(args)
    except KeyboardInterrupt:
        return 130
    except (Failure, OSError, tarfile.TarError, ValueError) as error:
        print(f"compare.py: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
