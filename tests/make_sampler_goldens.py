#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = []
# ///
"""Writes tests/golden/samplers.txt: distributions, options, and what a plain reference in double makes of them.

The reference is written from the formulas; all is sorted, nothing is clever. With --check it compares that file with a
new one; with --n N it has `build/test FILE --samplers` look at N more cases; with --llama MODEL.gguf it compares its own
parts with llama.cpp's samplers (needs llama-cpp-python and numpy). Cases in which a rounding to float32 could change a
decision are drawn again; exact ties stay.

A line is a case, its fields are apart by spaces:
    temperature top-k top-p min-p typical xtc-probability xtc-threshold seed
    repeat-penalty repeat-last-n presence frequency dry-multiplier dry-base dry-allowed dry-last-n n-sigma ignore-eos
    n breakers..., n biases..., n end ids..., n ids..., n tokens: logit and piece of each
    the shaped logits, n kept: id and p of each in order (0: nothing is cut), the chosen token
Texts are in hexadecimal.
"""
import argparse
import collections
import math
import pathlib
import random
import subprocess
import sys
import tempfile

GOLDEN = pathlib.Path(__file__).resolve().parent / "golden" / "samplers.txt"
USUAL = {"temp": 1.0, "k": 0, "p": 1.0, "min_p": 0.0, "typical": 0.0, "xtc": 0.0, "xtc_t": 0.1, "seed": 1, "repeat": 1.0,
         "repeat_n": 64, "presence": 0.0, "frequency": 0.0, "dry": 0.0, "base": 1.75, "allowed": 2, "dry_n": 64,
         "sigmas": 0.0, "ignore_eos": 0, "breakers": [], "biases": [], "ends": [], "ids": []}


MOST_LONGER = 1000  # than allowed: DRY counts no more tokens of a repeated sequence


class Unclear(Exception):
    """Two numbers are so near that float32 may order them otherwise."""


def above(a: float, b: float) -> bool:
    """a > b"""
    if a != b and abs(a - b) < 3e-6 * max(abs(a), abs(b), 1e-6):
        raise Unclear
    if a == b and a not in (0, 1, math.inf, -math.inf):
        raise Unclear
    return a > b


# ---- What acts on logits ----

def window(ids: list, n: int) -> list:
    return ids if n < 0 else ids[len(ids) - min(n, len(ids)):]


def penalised(logits: list, ids: list, repeat: float, frequency: float, presence: float) -> list:
    logits = list(logits)
    for token, count in collections.Counter(ids).items():
        x = logits[token]
        x = x * repeat if x <= 0 else x / repeat
        logits[token] = x - count * frequency - presence
    return logits


def unbroken(ids: list, pieces: list, breakers: list) -> int:
    """How many tokens come after the last breaker."""
    text, owner = b"".join(pieces[i] for i in ids), [n for n, i in enumerate(ids) for _ in pieces[i]]
    ends = [owner[at + len(b) - 1] for b in breakers for at in range(len(text)) if text.startswith(b, at)]
    return len(ids) - 1 - max(ends) if ends else len(ids)


def dry(logits: list, ids: list, pieces: list, multiplier: float, base: float, allowed: int, breakers: list) -> list:
    logits, longest, most = list(logits), {}, min(unbroken(ids, pieces, breakers), allowed + MOST_LONGER)
    if len(ids) <= allowed or most < allowed:
        return logits
    for at in range(len(ids) - 1):  # the tokens up to here are compared with the last ones
        length = 0
        while length <= at and length < most and ids[at - length] == ids[-1 - length]:
            length += 1
        longest[ids[at + 1]] = max(length, longest.get(ids[at + 1], 0))
    for token, length in longest.items():
        if length >= allowed and not any(b in pieces[token] for b in breakers):
            logits[token] -= multiplier * base ** (length - allowed)
    return logits


def near_best(logits: list, sigmas: float) -> list:
    finite = [x for x in logits if x > -math.inf]
    if not finite:
        return list(logits)
    mean = sum(finite) / len(finite)
    least = max(finite) - sigmas * math.sqrt(sum((x - mean) ** 2 for x in finite) / len(finite))
    for x in finite:
        if x != max(finite):
            above(x, least)
    return [x if x >= least else -math.inf for x in logits]


def shaped(c: dict) -> list:
    logits = [float(x) for x in c["logits"]]
    for token, x in c["biases"]:
        logits[token] += x
    for token in c["ends"] if c["ignore_eos"] else []:
        logits[token] = -math.inf
    if (c["repeat"], c["presence"], c["frequency"]) != (1, 0, 0):
        logits = penalised(logits, window(c["ids"], c["repeat_n"]), c["repeat"], c["frequency"], c["presence"])
    if c["dry"] > 0:
        breakers = c["breakers"] or [b"\n", b":", b'"', b"*"]
        breakers = [] if breakers == [b"none"] else breakers
        logits = dry(logits, window(c["ids"], c["dry_n"]), c["pieces"], c["dry"], c["base"], c["allowed"], breakers)
    return near_best(logits, c["sigmas"]) if c["sigmas"] > 0 else logits


# ---- What acts on probabilities: lists of (p, id) ----

def softmax(logits: list, temperature: float) -> list:
    top = max(logits)
    e = [math.exp((x - top) / temperature) if x > -math.inf else 0.0 for x in logits]
    return [(x / sum(e), i) for i, x in enumerate(e)]


def by_probability(c: list) -> list:
    c = sorted(c, key=lambda x: (-x[0], x[1]))
    for a, b in zip(c, c[1:]):
        if a[0] != b[0]:
            above(a[0], b[0])
    return c


def normalised(c: list) -> list:
    total = sum(p for p, _ in c)
    return [(p / total, i) for p, i in c]


def cut_k(c: list, k: int) -> list:
    return normalised(by_probability(c)[:k])


def cut_typical(c: list, mass: float) -> list:
    entropy = -sum(p * math.log(p) for p, _ in c if p > 0)
    scored = sorted((abs(-math.log(p) - entropy) if p > 0 else math.inf, i, p) for p, i in c)
    total, kept = 0.0, []
    for n, (score, i, p) in enumerate(scored):
        total += p
        kept.append((p, i))
        if above(total, mass):
            if n + 1 < len(scored) and scored[n + 1][2] != p:
                above(scored[n + 1][0], score)
            break
    for (a, _, p), (b, _, q) in zip(scored[:len(kept)], scored[1:]):
        if p != q and b < math.inf and abs(a - b) < 1e-6:
            raise Unclear
    return normalised(kept)


def cut_p(c: list, mass: float) -> list:
    total = 0.0
    for n, (p, _) in enumerate(c := by_probability(c)):
        total += p
        if above(total, mass):
            return normalised(c[:n + 1])
    return c


def cut_min_p(c: list, least: float) -> list:
    c = by_probability(c)
    return normalised([x for x in c if x[0] == c[0][0] or above(x[0], least * c[0][0])])


def exclude_top(c: list, threshold: float) -> list:
    c, n = by_probability(c), 0
    while n < len(c) and above(c[n][0], threshold):
        n += 1
    return normalised(c[max(n - 1, 0):])


def coins(state: int):
    """xorshift*, as llama2.c has it."""
    while True:
        state ^= state >> 12
        state = (state ^ state << 25) & (1 << 64) - 1
        state ^= state >> 27
        yield ((state * 0x2545F4914F6CDD1D & (1 << 64) - 1) >> 40) / 2 ** 24


def solve(c: dict) -> tuple:
    """The shaped logits, the candidates that are left in their order (empty: nothing was cut), the choice."""
    logits = shaped(c)
    best = logits.index(max(logits))
    if any(abs(x - logits[best]) < 1e-4 and x != logits[best] for x in logits):
        raise Unclear
    if c["temp"] == 0 or not math.isfinite(logits[best]):
        return logits, [], best
    coin = coins(c["seed"])
    chance, left = next(coin), softmax(logits, c["temp"])
    has_p, has_typical = 0 < c["p"] < 1, 0 < c["typical"] < 1
    cuts = c["k"] or has_typical or has_p or c["min_p"] or c["xtc"]
    if c["k"]:
        left = cut_k(left, c["k"])
    if has_typical:
        left = cut_typical(left, c["typical"])
    if has_p:
        left = cut_p(left, c["p"])
    if cuts:
        left = cut_min_p([x for x in left if x[0] > 1e-37], c["min_p"])
    if c["xtc"] and above(c["xtc"], next(coin)):
        left = exclude_top(left, c["xtc_t"])
    running = 0.0
    for p, i in left:
        if p > 0:
            running += p
            if above(running, chance):
                return logits, left if cuts else [], i
    raise Unclear


# ---- Cases ----

def draw_case(r: random.Random, n: int) -> dict:
    """Random options on a random distribution: spread, narrow, with ties, all equal, with infinities."""
    kind, c = r.randrange(6), dict(USUAL, seed=r.randrange(1, 1 << 63))
    spread = [3, 0.3, 0, 0, 8, 3][kind]
    logits = [r.gauss(0, spread) if spread else float(r.randrange(4)) if kind == 2 else 1.0 for _ in range(n)]
    c["logits"] = [float(f"{x:.7g}") for x in logits]
    c["logits"] = [-math.inf if kind == 5 and i and r.random() < 0.3 else x for i, x in enumerate(c["logits"])]
    c["pieces"] = [bytes(r.choice(b"aab:\n c*") for _ in range(r.randrange(1, 4))) for _ in range(n)]
    some = r.sample(range(n), min(n, r.randrange(1, 6)))
    c["ids"] = [r.choice(some) for _ in range(r.choice([0, 1, 2, 5, 30, 80]))]
    if r.random() < 0.3:  # what a loop looks like
        c["ids"] = (c["ids"][:r.randrange(1, 9)] * 40)[:r.randrange(100)]
    draws = {
        "temp": lambda: r.choice([0, 0.3, 0.8, 1.5, 4]), "k": lambda: r.choice([1, 2, 5, n, 3 * n]),
        "p": lambda: round(r.uniform(0.05, 0.99), 3), "min_p": lambda: r.choice([0.02, 0.1, 0.5]),
        "typical": lambda: round(r.uniform(0.05, 0.99), 3), "xtc": lambda: r.choice([0.3, 0.5, 1]),
        "repeat": lambda: r.choice([0.5, 1.1, 1.3, 2]), "presence": lambda: r.choice([-1, 0.5, 2]),
        "frequency": lambda: r.choice([-0.5, 0.1, 1]), "sigmas": lambda: r.choice([0.2, 0.7, 1, 1.7]),
        "dry": lambda: r.choice([0.4, 0.8, 3]), "ignore_eos": lambda: 1,
    }
    for name in r.sample(sorted(draws), r.choice([1, 1, 2, 3, 5])):
        c[name] = draws[name]()
    c["xtc_t"] = r.choice([0.05, 0.1, 0.2, 0.4])
    c["repeat_n"], c["dry_n"] = r.choice([-1, 0, 3, 64]), r.choice([-1, 3, 10, 64])
    c["base"], c["allowed"] = r.choice([1, 1.2, 1.75, 4]), r.choice([0, 1, 2, 4])
    c["breakers"] = r.choice([[], [], [b"none"], [b"a"], [b"ab", b":"], [b"c* b", b"\n\n"]])
    c["ends"] = r.sample(range(n), min(n - 1, 2))
    if r.random() < 0.2:
        c["biases"] = [(r.randrange(n), r.choice([-math.inf, 0.5, -3.0, 20.0])) for _ in range(r.randrange(1, 4))]
    return c


def line(c: dict) -> str:
    logits, left, chosen = solve(c)
    names = ("temp", "k", "p", "min_p", "typical", "xtc", "xtc_t", "seed", "repeat", "repeat_n", "presence", "frequency",
             "dry", "base", "allowed", "dry_n", "sigmas", "ignore_eos")
    words = [str(c[name]) for name in names]
    words += [str(len(c["breakers"])), *(b.hex() for b in c["breakers"])]
    words += [str(len(c["biases"])), *(f"{i}{x:+g}" for i, x in c["biases"])]
    for ids in (c["ends"], c["ids"]):
        words += [str(len(ids)), *map(str, ids)]
    words += [str(len(c["logits"])), *(w for x, p in zip(c["logits"], c["pieces"]) for w in (f"{x:.9g}", p.hex()))]
    words += [f"{x:.9g}" for x in logits]
    words += [str(len(left)), *(w for p, i in left for w in (str(i), f"{p:.7g}")), str(chosen)]
    return " ".join(words) + "\n"


def make_cases(seed: int, count: int, most: int) -> str:
    r, lines = random.Random(seed), []
    while len(lines) < count:
        try:
            lines.append(line(draw_case(r, r.choice([2, 3, 5, most // 2, most]))))
        except Unclear:
            pass
    return "".join(lines)


def edge_cases() -> list:
    """Where a constant that is a little wrong would show: DRY's longest sequence, n-sigma's limit."""
    loop = dict(USUAL, temp=0, dry=1.5, base=1.001, dry_n=-1, breakers=[b"none"], ids=[0, 1, 2] * 400,
                logits=[1.0, 0.5, 0.25, -1.0], pieces=[b"a", b"b", b"c", b"d"])
    near = dict(USUAL, temp=0, sigmas=0.7, logits=[0.125 * i for i in range(20)] + [4.0, 0.0, 0.0])
    near["pieces"] = [b"a"] * len(near["logits"])
    for _ in range(100):  # the last two are 0.4 % nearer to the best and farther from it than the limit
        mean = sum(near["logits"]) / len(near["logits"])
        spread = 0.7 * math.sqrt(sum((x - mean) ** 2 for x in near["logits"]) / len(near["logits"]))
        near["logits"][-2:] = [float(f"{4 - spread * share:.7g}") for share in (0.996, 1.004)]
    return [loop, near]


# ---- llama.cpp ----

def compare_llama(model: str, count: int) -> None:
    import ctypes
    import llama_cpp as ll
    quiet = ll.llama_log_callback(lambda *_: None)
    ll.llama_log_set(quiet, None)
    parameters = ll.llama_model_default_params()
    parameters.vocab_only = True
    vocab = ll.llama_model_get_vocab(ll.llama_model_load_from_file(model.encode(), parameters))
    n, buffer = ll.llama_vocab_n_tokens(vocab), ctypes.create_string_buffer(512)
    lengths = (ll.llama_token_to_piece(vocab, i, buffer, 512, 0, True) for i in range(n))
    pieces = [buffer.raw[:length] for length in lengths]
    r, done, unclear = random.Random(7), collections.Counter(), 0

    def apply(sampler, logits: list, ids: list) -> dict:
        """What is left of the tokens, and their logits."""
        data = (ll.llama_token_data * n)(*[(i, x, 0.0) for i, x in enumerate(logits)])
        array = ll.llama_token_data_array(data, n, -1, False)
        for i in ids:
            ll.llama_sampler_accept(sampler, i)
        ll.llama_sampler_apply(sampler, ctypes.byref(array))
        left = {array.data[k].id: array.data[k].logit for k in range(array.size)}
        ll.llama_sampler_free(sampler)
        return left

    while sum(done.values()) < count:
        logits = [ctypes.c_float(r.gauss(0, 3)).value for _ in range(n)]
        some = r.sample(range(n), 12)
        ids = [r.choice(some) for _ in range(r.choice([1, 3, 40, 200]))]
        ids = (ids[:r.randrange(1, 12)] * 30)[:r.randrange(1, 200)] if r.random() < 0.6 else ids
        which = r.choice(["repeats", "dry", "sigmas", "typical", "xtc"])
        last, mass = r.choice([1, 5, 64]), r.uniform(0.1, 0.95)
        try:
            if which == "repeats":
                a = (r.choice([0.7, 1.1, 1.5]), r.choice([0, 0.3]), r.choice([0, 0.4]))
                got = apply(ll.llama_sampler_init_penalties(n, last, *a), logits, ids)
                wanted = dict(enumerate(penalised(logits, window(ids, last), *a)))
            elif which == "dry":
                breakers = r.choice([[b"\n", b":", b'"', b"*"], [b"ab"], [b"e", b"th"]])
                a = (0.8, r.choice([1.2, 1.75]), r.choice([0, 1, 2, 5]))
                texts = (ctypes.c_char_p * len(breakers))(*breakers)
                sampler = ll.llama_sampler_init_dry(vocab, 0, *a, last, texts, len(breakers)) \
                    if len(ll.llama_sampler_init_dry.argtypes) == 8 else \
                    ll.llama_sampler_init_dry(vocab, *a, last, texts, len(breakers))
                got = apply(sampler, logits, ids)
                wanted = dict(enumerate(dry(logits, window(ids, last), pieces, *a, breakers)))
            elif which == "sigmas":
                got = apply(ll.llama_sampler_init_top_n_sigma(mass), logits, [])
                wanted = dict(enumerate(near_best(logits, ctypes.c_float(mass).value)))
            else:
                sampler = ll.llama_sampler_init_typical(mass, 0) if which == "typical" else \
                    ll.llama_sampler_init_xtc(1.0, mass / 4, 0, 1)
                p = softmax(logits, 1)
                cut = cut_typical(p, mass) if which == "typical" else exclude_top(p, mass / 4)
                got = apply(sampler, logits, [])
                wanted = {i: logits[i] for _, i in cut}
        except Unclear:
            unclear += 1
            continue
        near = all(got.get(i) == x or abs(got.get(i, 1e9) - x) <= 1e-4 * max(1, abs(x)) for i, x in wanted.items())
        if got.keys() != wanted.keys() or not near:
            some = [(i, got.get(i), x) for i, x in wanted.items() if got.get(i) != x][:5]
            sys.exit(f"{which}: llama.cpp differs: {len(got)} and {len(wanted)} tokens, {some}; last {last}, ids {ids}")
        done[which] += 1
    print(f"llama.cpp: {dict(sorted(done.items()))} alike, {unclear} near a limit left out")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="compare with the golden file")
    parser.add_argument("--n", type=int, default=0, help="so many more cases, for build/test")
    parser.add_argument("--llama", metavar="GGUF", help="compare the reference with llama.cpp, by this vocabulary")
    a = parser.parse_args()
    golden = make_cases(14, 150, 24) + "".join(line(c) for c in edge_cases())
    if a.llama:
        compare_llama(a.llama, a.n or 300)
    elif a.n:
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder) / "cases"
            path.write_text(make_cases(2026, a.n, 500))
            sys.exit(subprocess.run(["build/test", str(path), "--samplers"]).returncode)
    elif not a.check:
        GOLDEN.write_text(golden)
    elif GOLDEN.read_text() != golden:
        sys.exit(f"{GOLDEN} is not what this program makes")


if __name__ == "__main__":
    main()
