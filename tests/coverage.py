#!/usr/bin/env python3
"""make coverage: which lines and branches of run.c and tokenizer.c the tests reach, by chapter. Standard library and gcc.

    python3 tests/coverage.py                builds with gcc --coverage, runs the tests and tests/torture.c, prints the table
    python3 tests/coverage.py --again        the table of the last run
    python3 tests/coverage.py --missing      and every branch that was never taken, by its line

A branch is one of a condition's two ways, or a case of a switch, as gcov counts them without optimisation. The appendix
is left out: its kernels are each compared with the loops that define them, on machines that have them.
"""
import argparse
import json
import re
import shutil
import subprocess
import sys
from collections import defaultdict
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "coverage"
TREE = WORK / "tree"  # a repository whose ./run counts
FLAGS = ["-O0", "-g", "--coverage", "-fprofile-update=atomic", "-fopenmp", "-w"]
PROGRAMS = {"run": "run.c", "tokenizer": "tokenizer.c", "build/test": "tests/test.c", "build/torture": "tests/torture.c"}


def measure() -> None:
    shutil.rmtree(WORK, ignore_errors=True)
    (TREE / "build").mkdir(parents=True)
    for name in ("run.c", "tokenizer.c", "tests", "README.md", "Makefile"):
        (TREE / name).symlink_to(ROOT / name)
    if (ROOT.parent / "shared").exists():
        (WORK / "shared").symlink_to(ROOT.parent / "shared")
    for program, source in PROGRAMS.items():
        command = ["gcc", *FLAGS, "-c", source, "-o", f"{program}.o"]
        subprocess.run(command, cwd=TREE, check=True)
        subprocess.run(["gcc", *FLAGS, f"{program}.o", "-lm", "-o", program], cwd=TREE, check=True)
    for command in (["build/test"], ["build/torture", "quick"]):
        done = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
        print(" ".join(command) + ": " + done.stdout.strip().rpartition("\n")[2], flush=True)


def read() -> dict[str, dict[int, tuple[int, list[int]]]]:
    """Of each source: the lines, how often each ran, and how often each of its branches was taken, in all programs."""
    found = defaultdict(dict)
    for program in PROGRAMS:
        command = ["gcov", "--json-format", "--stdout", "--branch-probabilities", f"{program}.gcda"]
        text = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True).stdout
        for source in json.loads(text)["files"]:
            name = Path(source["file"]).name
            if name not in ("run.c", "tokenizer.c"):
                continue
            own = defaultdict(lambda: [0, []])  # a line may belong to several functions: a kernel is compiled twice
            for line in source["lines"]:
                entry = own[line["line_number"]]
                entry[0] += line["count"]
                taken = [branch["count"] for branch in line["branches"]]
                entry[1] = merge(entry[1], taken)
            for number, (count, taken) in own.items():
                before = found[name].get(number, (0, []))
                found[name][number] = (before[0] + count, merge(before[1], taken))
    return found


def merge(a: list[int], b: list[int]) -> list[int]:
    if len(a) == len(b):
        return [x + y for x, y in zip(a, b)]
    return max(a, b, key=len)


def parts(name: str) -> list[tuple[str, int]]:
    """The chapters, and the sections of those that read files, and where each begins."""
    begins, chapter = [("0. Preface", 1)] if name == "run.c" else [], ""
    for number, line in enumerate((ROOT / name).read_text().splitlines(), 1):
        if match := re.match(r"/\* ==== (.+?) =+$", line):
            chapter = match[1]
            begins.append((chapter, number))
        elif match := re.match(r"(?://|/\*) ---- (.+?) -+(?: \*/)?$", line):
            if chapter.startswith(("2.", "9.")):
                begins.append((f"   {match[1]}", number))
    return begins


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--missing", action="store_true")
    args = parser.parse_args()
    if not args.again:
        measure()
    found, total = read(), [0, 0, 0, 0]
    print(f"\n{'chapter':50} {'lines':>6} {'ran':>8} {'branches':>9} {'taken':>8}")
    for name in ("run.c", "tokenizer.c"):
        begins = parts(name)
        for i, (title, first) in enumerate(begins):
            last = begins[i + 1][1] if i + 1 < len(begins) else 1 << 30
            if title.startswith("Appendix"):
                break
            lines = [entry for number, entry in found[name].items() if first <= number < last]
            taken = [count for _, counts in lines for count in counts]
            sums = [len(lines), sum(count > 0 for count, _ in lines), len(taken), sum(count > 0 for count in taken)]
            total = [a + b for a, b in zip(total, sums)]
            if sums[0]:
                print(row(title, sums))
            for number in sorted(found[name]) if args.missing else []:
                count, counts = found[name][number]
                if first <= number < last and (count == 0 or 0 in counts):
                    way = " ".join("-" if c else str(k) for k, c in enumerate(counts)) if count else "never ran"
                    print(f"    {name}:{number}: {way}")
    print(row("all but the appendix", total))


def row(title: str, sums: list[int]) -> str:
    percent = [f"{100 * sums[i + 1] / sums[i]:7.1f}%" if sums[i] else "" for i in (0, 2)]
    return f"{title[:50]:50} {sums[0]:6} {percent[0]:>8} {sums[2]:9} {percent[1]:>8}"


if __name__ == "__main__":
    main()
