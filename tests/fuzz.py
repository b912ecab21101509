#!/usr/bin/env python3
"""make fuzz: builds tests/fuzz.c with clang's libFuzzer, lets each target run, and counts. Standard library only.

    python3 tests/fuzz.py [--seconds N] [--targets files texts models sessions templates lines]
                                                                                   it goes on from what build/fuzz has
    python3 tests/fuzz.py --minimise         tests/corpus anew: fewest inputs that reach what all found so far reach
    python3 tests/fuzz.py --afl              the same with AFL++ (afl-clang-fast, afl-fuzz)

What crashes, hangs or leaks, or is wrong as tests/fuzz.c says, is kept in build/fuzz/found.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
WORK = ROOT / "build" / "fuzz"
TARGETS = {"files": 1, "texts": 2, "models": 3, "sessions": 4, "templates": 5, "lines": 6}  # as in tests/fuzz.c
LONGEST = {"files": 12000, "texts": 128, "models": 12000, "sessions": 12000, "templates": 400,
           "lines": 400}  # bytes of an input
FLAGS = ["-O1", "-g", "-fno-omit-frame-pointer", "-fno-sanitize-recover=all"]
SANITIZERS = "address,undefined,float-cast-overflow"
LIMITS = ["-rss_limit_mb=1024", "-malloc_limit_mb=64", "-timeout=5"]
ENVIRONMENT = os.environ | {"ASAN_OPTIONS": "allocator_may_return_null=1:quarantine_size_mb=8:"
                                            "thread_local_quarantine_size_kb=64:malloc_context_size=4"}


def build(target: str, afl: bool) -> Path:
    program = WORK / f"{target}{'-afl' if afl else ''}"
    sources = [ROOT / "run.c", ROOT / "tokenizer.c", ROOT / "tests" / "fuzz.c"]
    if program.exists() and program.stat().st_mtime > max(path.stat().st_mtime for path in sources):
        return program
    if afl:  # its driver calls LLVMFuzzerTestOneInput; the mutator is libFuzzer's
        how = ["afl-clang-fast", f"-DFUZZ={TARGETS[target]}", "-DFUZZ_WITHOUT_MUTATOR", "-fsanitize=fuzzer"]
    else:  # the mutator and the dictionary know more than traces of comparisons, which take a third of the time
        how = ["clang", f"-DFUZZ={TARGETS[target]}", f"-fsanitize=fuzzer,{SANITIZERS}",
               "-fno-sanitize-coverage=trace-cmp", "-Wl,--wrap=__sanitizer_cov_8bit_counters_init"]
    print(f"building {program.relative_to(ROOT)}", flush=True)
    subprocess.run([*how, *FLAGS, "tests/fuzz.c", "-lm", "-o", program], cwd=ROOT, check=True)
    return program


def inputs(target: str) -> list[Path]:
    """What there is to begin with: the models' inputs are files too."""
    names = ["files", "models"] if target == "models" else [target]
    paths = [ROOT / "tests" / "corpus" / name for name in names] + [WORK / "seeds" / names[0]]
    return [path for path in paths if path.is_dir()]


def run(target: str, seconds: int) -> bool:
    own, log = WORK / "corpus" / target, WORK / f"{target}.log"
    own.mkdir(parents=True, exist_ok=True)
    command = [build(target, False), f"-max_len={LONGEST[target]}", f"-max_total_time={seconds}", *LIMITS,
               "-print_final_stats=1", "-mutate_depth=2", "-dict=tests/fuzz.dict",
               f"-artifact_prefix={WORK / 'found'}/", own, *inputs(target)]
    with log.open("w") as out:
        status = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=out, stderr=out).returncode
    text = log.read_text(errors="replace")
    figures = dict(re.findall(r"stat::(\w+): +(\d+)", text))
    runs = int(figures.get("number_of_executed_units", 0))
    line = f"{target}: {runs:,} runs, {figures.get('average_exec_per_sec', 0)}/s"
    if "models_that_ran" in figures:
        line += f", {int(figures['models_that_ran']):,} of them with forward passes"
    print(line + (f": FAILED, see {log.relative_to(ROOT)}" if status else ""), flush=True)
    return status == 0


def afl_figures(out: Path) -> dict[str, str]:
    stats = out / "default" / "fuzzer_stats"
    return dict(re.findall(r"(\w+) +: ([\d.]+)", stats.read_text())) if stats.exists() else {}


def run_afl(target: str, seconds: int) -> bool:
    """AFL++ goes on from its own last run, without sanitizers; what it keeps then goes through the other's program."""
    program, seeds, out = build(target, True), WORK / "afl-seeds" / target, WORK / "afl" / target
    shutil.rmtree(seeds, ignore_errors=True)
    seeds.mkdir(parents=True)
    out.parent.mkdir(exist_ok=True)
    for folder in inputs(target):
        for path in folder.iterdir():
            shutil.copy(path, seeds / path.name)
    settings = dict.fromkeys(("AFL_SKIP_CPUFREQ", "AFL_I_DONT_CARE_ABOUT_MISSING_CRASHES", "AFL_NO_UI",
                              "AFL_AUTORESUME", "AFL_NO_AFFINITY"), "1")
    before, log_path = int(afl_figures(out).get("execs_done", 0)), WORK / f"{target}-afl.log"
    with log_path.open("w") as log:
        command = ["afl-fuzz", "-i", seeds, "-o", out, "-V", str(seconds), "-x", "tests/fuzz.dict",
                   "-G", str(LONGEST[target]), "--", program]
        subprocess.run(command, cwd=ROOT, env=os.environ | settings, stdout=log, stderr=log, check=True)
        command = [build(target, False), "-runs=0", f"-max_len={LONGEST[target]}", *LIMITS,
                   f"-artifact_prefix={WORK / 'found'}/", out / "default" / "queue"]
        status = subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, stdout=log, stderr=log).returncode
    found = sum(1 for kind in ("crashes", "hangs") for path in (out / "default" / kind).glob("id*"))
    figures, kept = afl_figures(out), len(list((out / "default" / "queue").glob("id*")))
    runs = int(figures["execs_done"]) - before
    print(f"{target}: {runs:,} runs of AFL++, {runs / seconds:.0f}/s, {found} found; with sanitizers {kept} inputs"
          + (f": FAILED, see {log_path.relative_to(ROOT)}" if status else ""), flush=True)
    return found == 0 and status == 0


def minimise(target: str) -> None:
    """Of files only the edges of the program's graph count, not how often each was passed: a tenth of them is enough.
    The models are those that reach what the files do not."""
    kept, new, known = ROOT / "tests" / "corpus" / target, WORK / "minimised" / target, []
    shutil.rmtree(new, ignore_errors=True)
    new.mkdir(parents=True)
    if target == "models":
        known = [shutil.copy(path, new) for path in (ROOT / "tests" / "corpus" / "files").iterdir()]
    sources = [WORK / "corpus" / target, *inputs(target)]
    command = [build(target, False), "-merge=1", f"-use_counters={int(target == 'texts')}",
               f"-max_len={LONGEST[target]}", new, *sources]
    subprocess.run(command, cwd=ROOT, env=ENVIRONMENT, check=True, stderr=subprocess.DEVNULL)
    for path in known:
        Path(path).unlink()
    shutil.rmtree(kept, ignore_errors=True)
    shutil.copytree(new, kept)
    sizes = [path.stat().st_size for path in kept.iterdir()]
    print(f"{kept.relative_to(ROOT)}: {len(sizes)} inputs, {sum(sizes):,} bytes")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=int, default=60, help="for each target (default: 60)")
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--minimise", action="store_true")
    parser.add_argument("--afl", action="store_true")
    args = parser.parse_args()
    (WORK / "found").mkdir(parents=True, exist_ok=True)
    if not (WORK / "seeds").exists():
        subprocess.run([sys.executable, "tests/make_seeds.py", WORK / "seeds"], cwd=ROOT, check=True)
    if args.minimise:
        for target in args.targets:
            minimise(target)
        return
    results = [(run_afl if args.afl else run)(target, args.seconds) for target in args.targets]
    sys.exit(not all(results))


if __name__ == "__main__":
    main()
