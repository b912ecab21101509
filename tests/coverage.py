#!/usr/bin/env python3
"""make coverage: which lines and branches of run.c and tokenizer.c the tests reach, by chapter. Needs clang and llvm.

    python3 tests/coverage.py                builds with clang's counters, runs tests and torture, prints the table
    python3 tests/coverage.py --again        the table of the last run
    python3 tests/coverage.py --missing      and every branch that was never taken, with its condition

A branch is one of the two ways that a condition in the source can come out: each part of an && counts, and code that is
compiled for several processors counts once. The counters lie in mapped files, so that what a run did before a signal
ended it counts too. The appendix is left out: its kernels are each compared with the loops that define them, on
machines that have them. The run fails where less is reached than is promised.
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
FLAGS = ["-O1", "-g", "-fopenmp", "-w", "-fcoverage-mapping", "-mllvm", "-runtime-counter-relocation"]
PROGRAMS = {"run": "run.c", "build/test": "tests/test.c", "build/torture": "tests/torture.c"}
WANTED = 95  # percent of all branches
WHOLE = ("What a model consists of", "cria's own file", "GGUF", "llama2.c", "Any of them", "Looking up",
         "Opening a section", "Making a section")  # sections that read files: all of their branches

# These say what is wrong and return false, so that `ok || fail()` has one way less.
ALWAYS_FALSE = re.compile(r"(fail|refuse|in_part)\(")
# Branches that no test can make the program take: by the file, the condition, which way it never comes out, and why.
UNREACHABLE = {
    ("tokenizer.c", "n_bytes <= MAX_TEXT", False): "a third of a gigabyte of text, and seven more to compose it",
    ("tokenizer.c", 'fail(e, NO_ROOM, "the text has %zu bytes when composed", n_bytes)', False): "likewise",
}


def tool(name: str) -> str:
    """llvm-cov or llvm-profdata as it belongs to this clang; Debian puts the version behind the names."""
    version = subprocess.run(["clang", "-dumpversion"], capture_output=True, text=True, check=True).stdout.split(".")[0]
    return shutil.which(f"{name}-{version}") or name


def raw(program: str) -> Path:
    return WORK / "raw" / program.replace("/", "-")


def measure() -> list[str]:
    """Builds and runs; says which of the runs failed."""
    shutil.rmtree(WORK, ignore_errors=True)
    (TREE / "build").mkdir(parents=True)
    for name in ("run.c", "tokenizer.c", "tests", "README.md", "Makefile"):
        (TREE / name).symlink_to(ROOT / name)
    if (ROOT.parent / "shared").exists():
        (WORK / "shared").symlink_to(ROOT.parent / "shared")
    for program, source in PROGRAMS.items():
        counters = f"-fprofile-instr-generate={raw(program)}-%c%m.profraw"
        subprocess.run(["clang", *FLAGS, counters, source, "-lm", "-o", program], cwd=TREE, check=True)
    wrong = []
    for command in (["build/test"], ["build/torture", "quick"]):
        done = subprocess.run(command, cwd=TREE, capture_output=True, text=True)
        failures = [line for line in done.stdout.splitlines() if line.startswith("FAILED")]
        print("\n".join(failures + [" ".join(command) + ": " + done.stdout.strip().rpartition("\n")[2]]), flush=True)
        wrong += [" ".join(command)] * (done.returncode != 0)
    return wrong


def line_counts(segments: list[list]) -> dict[int, int]:
    """How often each line that has code ran. A segment: line, column, count, has a count, begins a region, is a gap."""
    by_line, counts, before = defaultdict(list), {}, None
    for segment in segments:
        by_line[segment[0]].append(segment)
    for number in range(min(by_line), max(by_line) + 1) if by_line else []:
        begin = [s for s in by_line[number] if s[3] and s[4] and not s[5]]
        if begin or (before and before[3]):
            counts[number] = max([s[2] for s in begin] + ([before[2]] if before and before[3] else []))
        before = by_line[number][-1] if by_line[number] else before
    return counts


def read() -> tuple[dict, dict]:
    """Of each source: how often each line ran; and where its conditions are, how often each was true and was false."""
    lines, branches = defaultdict(lambda: defaultdict(int)), defaultdict(lambda: defaultdict(lambda: [0, 0]))
    for program in PROGRAMS:
        files = sorted(raw(program).parent.glob(raw(program).name + "-*.profraw"))
        merged = raw(program).with_suffix(".profdata")
        subprocess.run([tool("llvm-profdata"), "merge", *files, "-o", merged], check=True)
        command = [tool("llvm-cov"), "export", program, "-instr-profile", merged]
        text = subprocess.run(command, cwd=TREE, capture_output=True, text=True, check=True).stdout
        found = json.loads(text)["data"][0]
        for source in found["files"]:
            for number, count in line_counts(source["segments"]).items():
                lines[Path(source["filename"]).name][number] += count
        for function in found["functions"]:
            for *place, true, false, file, _, _ in function["branches"]:
                counts = branches[Path(function["filenames"][file]).name][tuple(place)]
                counts[0] += true
                counts[1] += false
    return lines, branches


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


def condition(source: list[str], place: tuple[int, int, int, int]) -> str:
    first, column, last, end = place
    text = source[first - 1 : last]
    text[-1] = text[-1][: end - 1]
    text[0] = text[0][column - 1 :]
    return " ".join(line.strip() for line in text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--again", action="store_true")
    parser.add_argument("--missing", action="store_true")
    args = parser.parse_args()
    wrong = [] if args.again else measure()
    lines, branches = read()
    excuses, total = dict(UNREACHABLE), [0] * 5
    print(f"\n{'chapter':45} {'lines':>6} {'ran':>8} {'branches':>9} {'taken':>8} {'unreachable':>12}")
    for name in ("run.c", "tokenizer.c"):
        begins, source, missing = parts(name), (ROOT / name).read_text().splitlines(), []
        for i, (title, first) in enumerate(begins):
            if title.startswith("Appendix"):
                continue
            last = begins[i + 1][1] if i + 1 < len(begins) else 1 << 30
            ran = [count > 0 for number, count in lines[name].items() if first <= number < last]
            taken, excused = 0, 0
            places = [place for place in sorted(branches[name]) if first <= place[0] < last]
            for place in places:
                for way, count in zip((True, False), branches[name][place]):
                    text = condition(source, place)
                    if count > 0:
                        taken += 1
                    elif excuses.pop((name, text, way), None) or (way and ALWAYS_FALSE.match(text)):
                        excused += 1
                    else:
                        missing.append(f"    {name}:{place[0]}: never {str(way).lower()}: {text}")
            sums = [len(ran), sum(ran), 2 * len(places) - excused, taken, excused]
            total = [a + b for a, b in zip(total, sums)]
            if sums[0]:
                print(row(title, sums))
            if args.missing:
                print("".join(line + "\n" for line in missing), end="")
            if title.strip() in WHOLE and taken < sums[2]:
                wrong.append(f"{title.strip()}: a branch is not reached")
            missing = []
    print(row("all but the appendix", total))
    if total[3] * 100 < total[2] * WANTED:
        wrong.append(f"less than {WANTED} % of all branches")
    wrong += [f"{name}: listed as unreachable, but reached or not there: {text}" for name, text, _ in excuses]
    print("".join(f"FAILED: {line}\n" for line in wrong), end="")
    sys.exit(bool(wrong))


def row(title: str, sums: list[int]) -> str:
    percent = [f"{100 * sums[i + 1] / sums[i]:7.1f}%" if sums[i] else "" for i in (0, 2)]
    return f"{title[:45]:45} {sums[0]:6} {percent[0]:>8} {sums[2]:9} {percent[1]:>8} {sums[4] or '':>12}"


if __name__ == "__main__":
    main()
