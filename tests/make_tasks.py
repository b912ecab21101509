#!/usr/bin/env python3
# /// script
# requires-python = ">=3.8"
# ///
"""Makes the tasks that ./run -m eval is measured with: three files of 8 exemplars and 200 tasks each.

    python3 tests/make_tasks.py FOLDER      writes FOLDER/arithmetic.jsonl, choice.jsonl and copying.jsonl

arithmetic: sums and differences, with their steps (for --cot); the answer is a number.
choice: which of four words is of a kind; four choices.
copying: a pattern of three letters is repeated; the answer is the next letter.
The tasks depend on the seed of a kind alone, so every run writes the same files.
"""
import argparse
import json
import pathlib
import random

KINDS = {
    "animal": "horse cow dog cat lion tiger rabbit sheep goat wolf bear fox".split(),
    "colour": "red blue green yellow purple orange brown black white grey pink violet".split(),
    "fruit": "apple banana cherry grape pear peach plum melon lemon mango kiwi fig".split(),
    "metal": "iron gold silver copper lead tin zinc nickel steel bronze brass aluminium".split(),
    "tool": "hammer saw drill wrench chisel spade axe shovel rake pliers screwdriver file".split(),
    "vehicle": "car bus train bicycle lorry ship plane tram van boat taxi motorcycle".split(),
}


def arithmetic(rng: random.Random) -> dict:
    name, thing = rng.choice("Anna Ben Carla David Emma Felix".split()), rng.choice("apples books coins stamps".split())
    a, b = rng.randint(2, 20), rng.randint(1, 9)
    if rng.random() < 0.5 and a > b:
        return {"question": f"{name} has {a} {thing} and gives away {b}. How many {thing} does {name} have?",
                "solution": f"{name} had {a} and gave away {b}. {a} - {b} = {a - b}.", "answer": a - b}
    return {"question": f"{name} has {a} {thing} and gets {b} more. How many {thing} does {name} have?",
            "solution": f"{name} had {a} and got {b}. {a} + {b} = {a + b}.", "answer": a + b}


def choice(rng: random.Random) -> dict:
    kind = rng.choice(sorted(KINDS))
    choices = [rng.choice(KINDS[other]) for other in rng.sample(sorted(set(KINDS) - {kind}), 3)]
    answer = rng.randrange(4)
    choices.insert(answer, rng.choice(KINDS[kind]))
    article = "an" if kind[0] in "aeiou" else "a"
    return {"question": f"Which of these is {article} {kind}: {', '.join(choices)}?", "choices": choices, "answer": answer}


def copying(rng: random.Random) -> dict:
    pattern = rng.sample("ABCDEFGHIJKLMNOPQRSTUVWXYZ", 3)
    n = rng.randint(7, 11)
    shown = [pattern[i % 3] for i in range(n)]
    return {"question": f"What comes next: {' '.join(shown)}", "answer": pattern[n % 3]}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=pathlib.Path)
    args = parser.parse_args()
    args.folder.mkdir(parents=True, exist_ok=True)
    for make in (arithmetic, choice, copying):
        rng = random.Random(make.__name__)
        lines = [json.dumps(make(rng)) for _ in range(208)]
        (args.folder / f"{make.__name__}.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
