#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torch>=2.4", "transformers>=5.0", "gguf>=0.17", "tokenizers>=0.20", "sentencepiece",
#                 "safetensors", "jinja2", "llama-cpp-python>=0.3.36"]
# ///
"""Takes cria's own files to other engines: what llama.cpp makes of the GGUF, and transformers of the folder; and takes
files of every type that GGUF has from llama.cpp.

    python tests/test_way_out.py SOURCE.gguf MODEL.bin      MODEL: made from SOURCE; BPE, with a chat template

Logits: small random models of each family, as a native file, exported to GGUF and run by llama.cpp, against
transformers in float32. Types: a small random model, quantised by llama.cpp's own quantisers, against transformers with
the weights that gguf-py makes of the file. Text: MODEL, exported both ways, must cut 10,000 random strings as cria
itself does, and render conversations as one Jinja template does.
"""
import ctypes
import sys
import tempfile
from pathlib import Path

import gguf
import llama_cpp
import numpy as np
import torch
import transformers
from llama_cpp.llama_chat_format import Jinja2ChatFormatter

sys.path.insert(0, str(Path(__file__).resolve().parent))
import make_token_goldens as goldens  # noqa: E402
import test_export as t  # noqa: E402

STRINGS = 10_000
F32 = 0  # ggml's number of the type: the cache is to keep what it is given
# llama.cpp looks GELU up in a table of f16: each number of the feed-forward layer is off by up to 2^-11 of it, which
# leaves 1e-3 to 3e-3 in logits of up to 7; 2^-11 of the largest is 3.4e-3. Its other operations are in f32.
TOLERANCES = {"gemma2": 4e-3, "gemma3 linear": 4e-3, "gemma3 pattern": 4e-3}
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


def quantised(weights: np.ndarray, kind: gguf.GGMLQuantizationType) -> np.ndarray:
    """By ggml's own quantiser      weights (rows, cols), f32; out (rows, bytes of a row), uint8"""
    block, n_bytes = gguf.GGML_QUANT_SIZES[kind]
    out = np.zeros((len(weights), weights.shape[1] // block * n_bytes), np.uint8)
    ggml = ctypes.CDLL(str(Path(llama_cpp.__file__).parent / "lib" / "libggml-base.so"))
    ggml.ggml_quantize_chunk.restype = ctypes.c_size_t
    n = ggml.ggml_quantize_chunk(ctypes.c_int(kind), weights.ctypes.data_as(ctypes.c_void_p),
                                 out.ctypes.data_as(ctypes.c_void_p), ctypes.c_int64(0), ctypes.c_int64(len(weights)),
                                 ctypes.c_int64(weights.shape[1]), None)
    assert n == out.nbytes
    return out


NAMES = {"token_embd": "model.embed_tokens", "output": "lm_head", "attn_q": "self_attn.q_proj",
         "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
         "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj"}


def name_in_transformers(name: str) -> str:
    *layer, part, _ = name.split(".")  # blk.N.PART.weight or PART.weight
    return f"model.layers.{layer[1]}.{NAMES[part]}.weight" if layer else f"{NAMES[part]}.weight"


def test_types(folder: Path) -> None:
    plain = folder / "plain.gguf"
    network = t.make_network("qwen2", hidden_size=256, intermediate_size=512, num_attention_heads=8)
    with torch.no_grad():  # four times as many columns as elsewhere: half the spread makes vectors of the same size
        for p in network.parameters():
            p.mul_(0.5 if p.ndim == 2 else 1)
    t.exported(t.save_model(folder / "plain", network), "-o", plain, "--to", "gguf", "--type", "f32", "--no-verify")
    for number in sorted(kind.ggml for kind in t.export_model.TYPES.values()):
        kind, made = gguf.GGMLQuantizationType(number), folder / f"{number}.gguf"
        t.copy_gguf(plain, made, lambda name, data: {name: quantised(data, kind) if data.ndim == 2 else data}, kind)
        with torch.no_grad():
            for tensor in gguf.GGUFReader(made).tensors:
                if len(tensor.shape) == 2:
                    weights = gguf.dequantize(tensor.data, kind).astype(np.float32)
                    network.get_parameter(name_in_transformers(tensor.name)).copy_(torch.from_numpy(weights))
        wanted = t.reference(network)
        t.check_logits(f"{kind.name}: --exact", t.run_logits(made), wanted)
        if kind.name in ("F32", "F16", "BF16"):
            t.check_logits(f"{kind.name}", t.run_logits(made, t.TOKENS, "--kv", "f32", exact=False), wanted)
            continue
        error = np.sqrt(np.square(t.run_logits(made, exact=False) - wanted).mean() / np.square(wanted).mean())
        print(f"  {kind.name}: activations in 8 bits: {100 * error:.2f} % of the logits' spread")
        # 8 bits are 0.4 % of the largest of 32 numbers; two layers make more of it. 0: was none rounded?
        t.check(f"{kind.name}: error", 1e-4 < error < 0.03, f"{error}")


def test_text(folder: Path, source: Path, model: Path) -> None:
    gguf_file, hf = folder / "model.gguf", folder / "model"
    t.exported(model, "-o", gguf_file, "--to", "gguf")
    t.exported(model, "-o", hf, "--to", "hf", "--type", "bf16", "--no-verify")
    vocabulary = goldens.read_gguf(gguf_file)
    texts = goldens.random_strings(STRINGS + STRINGS // 10, vocabulary, 1)  # of which one in twenty is not UTF-8
    texts = [s for s in texts if goldens.as_bytes(s) == s.encode()][:STRINGS]
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
        test_types(Path(folder))
        test_text(Path(folder), *map(Path, sys.argv[1:3]))
    print(f"{t.passed} passed, {t.failed} failed")
    sys.exit(t.failed > 0)


if __name__ == "__main__":
    main()
