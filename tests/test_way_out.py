#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torch>=2.4", "transformers>=5.0", "gguf>=0.17", "tokenizers>=0.20", "sentencepiece",
#                 "safetensors", "jinja2", "llama-cpp-python>=0.3.36"]
# ///
"""Takes cria's own files to other engines: what llama.cpp makes of the GGUF, and transformers of the folder.

    python tests/test_way_out.py SOURCE.gguf MODEL.bin      MODEL: made from SOURCE; BPE, with a chat template

Logits: small random models of each family, as a native file, exported to GGUF and run by llama.cpp, against
transformers in float32. Text: MODEL, exported both ways, must cut 10,000 random strings as cria itself does, and render
conversations as one Jinja template does.
"""
import sys
import tempfile
from pathlib import Path

import llama_cpp
import numpy as np
import transformers
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_token_goldens as goldens  # noqa: E402
import test_export as t  # noqa: E402

STRINGS = 10_000
F32 = 0  # ggml's number of the type: the cache is to keep what it is given
# llama.cpp looks GELU up in a table of f16, whose steps of 2^-11 are relative to each number of the feed-forward layer;
# its other operations are in f32.
TOLERANCES = {"gemma2": 2e-2, "gemma3": 2e-2, "gemma3 linear": 2e-2, "gemma3 pattern": 2e-2}
# What llama.cpp does not do. It has no window in these, so that only the positions before its end are the same; and it
# goes by the width of a head where Gemma 3's own scale of scores is another, and by YaRN's usual limits in Qwen 2.
POSITIONS = {"mistral yarn": 11, "mistral window": 7, "qwen2 window": 7, "phi3": 9, "gemma3": 0, "qwen2 yarn": 0}
CONVERSATIONS = [
    [{"role": "user", "content": "Hello"}],
    [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "1 < 2 & \"3\"?"}],
    [{"role": "system", "content": ""}, {"role": "user", "content": "  two\n\n lines \n"},
     {"role": "assistant", "content": "<|im_end|>\u00e4\u4f60"}, {"role": "user", "content": "{{ messages }}"}],
]


def load(path: Path, **how) -> llama_cpp.Llama:
    return llama_cpp.Llama(str(path), n_ctx=64, n_threads=2, n_threads_batch=2, type_k=F32, type_v=F32, verbose=False,
                           **how)


def test_logits(folder: Path) -> None:
    for case in t.BY_PROGRAM:
        network = t.make_network(case)
        source, native, made = t.save_model(folder / case, network), folder / f"{case}.bin", folder / f"{case}.gguf"
        t.exported(source, "-o", native, "--type", "f32")
        t.exported(native, "-o", made, "--to", "gguf")
        llama, n = load(made, logits_all=True), POSITIONS.get(case, t.TOKENS)
        llama.eval(t.IDS.tolist())
        if n:
            t.check_logits(f"{case}: llama.cpp", np.array(llama.scores[:n]), t.reference(network, n),
                           TOLERANCES.get(case, t.TOLERANCE))
        llama.close()


def test_text(folder: Path, source: Path, model: Path) -> None:
    gguf_file, hf = folder / "model.gguf", folder / "model"
    t.exported(model, "-o", gguf_file, "--to", "gguf")
    t.exported(model, "-o", hf, "--to", "hf", "--type", "bf16", "--no-verify")
    vocabulary = goldens.read_gguf(gguf_file)
    texts = [s for s in goldens.random_strings(STRINGS + STRINGS // 10, vocabulary, 1) if goldens.as_bytes(s) == s.encode()]
    texts = texts[:STRINGS]
    wanted = goldens.run_tokenizer(t.ROOT / "build" / "test", model, texts, ["--special"])
    llama, tokenizer = load(gguf_file, vocab_only=True), transformers.AutoTokenizer.from_pretrained(hf)
    by_llama, by_source = ([engine.tokenize(s.encode(), add_bos=False, special=True) for s in texts]
                           for engine in (llama, load(source, vocab_only=True)))
    by_transformers = tokenizer(texts, add_special_tokens=False)["input_ids"]
    # llama.cpp joins some bytes of unassigned characters in another order than transformers does: 5 strings of these
    different = sum(a != b for a, b in zip(by_llama, wanted))
    print(f"  {len(texts)} strings: {different} cut otherwise by llama.cpp, from whichever file")
    t.check("as many strings", len(texts) == len(wanted) == len(by_llama) == len(by_transformers) == STRINGS)
    t.check("llama.cpp, from both files", by_llama == by_source)
    t.check("llama.cpp", different <= STRINGS // 1000, f"{different}")
    t.check("transformers", by_transformers == wanted)
    named = {name: llama.metadata[f"tokenizer.ggml.{name}_token_id"] for name in ("bos", "eos")}
    bos, eos = (tokenizer.convert_ids_to_tokens(int(named[name])) for name in ("bos", "eos"))
    formatter = Jinja2ChatFormatter(llama.metadata["tokenizer.chat_template"], eos_token=eos, bos_token=bos)
    for messages in CONVERSATIONS:
        a = formatter(messages=messages).prompt
        b = tokenizer.apply_chat_template(messages, tokenize=False, add_generation_prompt=True)
        t.check("a conversation", a == b and messages[-1]["content"].strip() in a, f"{a!r} {b!r}")


def main() -> None:
    with tempfile.TemporaryDirectory() as folder:
        test_logits(Path(folder))
        test_text(Path(folder), *map(Path, sys.argv[1:3]))
    print(f"{t.passed} passed, {t.failed} failed")
    sys.exit(t.failed > 0)


if __name__ == "__main__":
    main()
