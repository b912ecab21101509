#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["torch>=2.4", "transformers>=5.0", "gguf>=0.17", "accelerate", "tokenizers>=0.20"]
# ///
"""Compares -m score, --choose and --logprobs with Hugging Face transformers, and parses all JSON with Python's json.

    python tests/test_scores.py model.gguf ./run        for example the demo's model

transformers reads the GGUF file's own weights, dequantised, in float32; the program multiplies with --exact. Exit
status: 0 all agree, 1 one does not.
"""
import json
import math
import subprocess
import sys

import torch
from transformers import AutoModelForCausalLM

TOLERANCE = 2e-3  # of a log-probability, as the logits of tests/reference.py
TEXTS = ["The capital of France is Paris.", "def add(a, b):\n    return a + b\n", "\u65e5\u672c\u8a9e and caf\u00e9", "a b"]
CHOICES = [("The capital of France is", [" Paris", " London", " the city of Paris", "Rome"]), ("2 + 2 =", [" 4", " 5", "4"]),
           ("Once upon a t", ["ime", "able", "ree stood"])]
n_failed = 0


def run(*arguments: str) -> list:
    done = subprocess.run([sys.argv[2], sys.argv[1], "-q", "--exact", *arguments], capture_output=True, check=True)
    return [json.loads(line) for line in done.stdout.decode().splitlines()]


def check(what: str, got: float, wanted: float) -> None:
    global n_failed
    if not math.isclose(got, wanted, abs_tol=TOLERANCE, rel_tol=1e-4):
        n_failed += 1
        print(f"{what}: got {got}, wanted {wanted}")


def main() -> None:
    folder, name = sys.argv[1].rsplit("/", 1)
    model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=name, dtype=torch.float32).eval()

    def tokens(text: str) -> list:
        command = [sys.argv[2], sys.argv[1], "-m", "tokenize", "-i", text]
        return [int(i) for i in subprocess.run(command, capture_output=True, check=True).stdout.split()]

    def log_probabilities(ids: list) -> torch.Tensor:
        with torch.no_grad():
            return torch.log_softmax(model(torch.tensor([ids])).logits[0].double(), -1)

    for text in TEXTS:
        ids, got = tokens(text), run("-m", "score", "--json", "--logprobs", "5", "-i", text)[0]
        wanted = log_probabilities(ids)
        check(f"{text!r}: tokens", len(got["scores"]), len(ids) - 1)
        for i, score in enumerate(got["scores"]):
            check(f"{text!r} {i}: id", score["id"], ids[i + 1])
            check(f"{text!r} {i}: logprob", score["logprob"], wanted[i, ids[i + 1]].item())
            for place, top in enumerate(score["top"]):
                check(f"{text!r} {i}: place {place}", top["logprob"], wanted[i].topk(5).values[place].item())
                check(f"{text!r} {i}: token at {place}", top["logprob"], wanted[i, top["id"]].item())
        total = sum(wanted[i, ids[i + 1]].item() for i in range(len(ids) - 1))
        n_bytes = len(text.encode()) - len(subprocess.run(
            [sys.argv[2], sys.argv[1], "-m", "detokenize", "--ids", str(ids[0])], capture_output=True).stdout)
        check(f"{text!r}: total", got["total"], total)
        check(f"{text!r}: bits per byte", got["bits_per_byte"], -total / math.log(2) / n_bytes)
    for prompt, choices in CHOICES:
        got = run("-m", "score", "--json", "-i", prompt, "--choose", "|".join(choices))[0]["choices"]
        all_ids, common = [tokens(prompt + c) for c in choices], len(tokens(prompt))
        for ids in all_ids:
            while ids[:common] != tokens(prompt)[:common]:
                common -= 1
        wanted = [sum(log_probabilities(ids)[k - 1, ids[k]].item() for k in range(common, len(ids))) for ids in all_ids]
        shares = torch.softmax(torch.tensor(wanted), 0)
        for i, choice in enumerate(choices):
            check(f"{prompt!r} + {choice!r}", got[i]["logprob"], wanted[i])
            check(f"{prompt!r} + {choice!r}: p", got[i]["p"], shares[i].item())
            check(f"{prompt!r} + {choice!r}: per byte", got[i]["logprob_per_byte"], wanted[i] / len(choice.encode()))
    written = run("-t", "0", "-n", "8", "--json", "--logprobs", "1", "-i", TEXTS[0])[0]
    wanted = log_probabilities(tokens(TEXTS[0]) + written["ids"])[-9:-1]
    for i, token in enumerate(written["logprobs"]):
        check(f"written token {i}", token["logprob"], wanted[i, written["ids"][i]].item())
    print("failed:", n_failed)
    sys.exit(n_failed > 0)


if __name__ == "__main__":
    main()
