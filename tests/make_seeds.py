#!/usr/bin/env python3
"""Writes the files that fuzzing begins with: models as small as they can be, one of every family, type and container,
and texts. Python's standard library and ./run, which makes the native ones.

    python3 tests/make_seeds.py FOLDER      FOLDER/files, FOLDER/texts, FOLDER/sessions, templates and lines
"""
import json
import random
import struct
import subprocess
import sys
from pathlib import Path

VOCABULARY = ["<unk>", "<s>", "</s>", "<0x0A>", "\u2581", "a", "b", "ab", "\u2581a", "<t>"]
TYPES = [2, 3, 3, 6, 1, 1, 1, 1, 1, 4]
BPE = ["a", "b", "\u0120", "ab", "\u0120a", "<|im_end|>", "<t>", "c"]
BPE_TYPES = [1, 1, 1, 1, 1, 3, 4, 1]
MERGES = ["a b", "\u0120 a"]
FAMILIES = {  # what is more than in llama
    "llama": "", "qwen2": "bias", "qwen3": "norm", "phi3": "fused", "granite": "scale", "smollm3": "",
    "olmo2": "wide post bare", "gemma2": "post", "gemma3": "norm post",
}
# GGUF's number: columns and bytes of a block
BLOCKS = {0: (1, 4), 1: (1, 2), 30: (1, 2), 8: (32, 34), 2: (32, 18), 3: (32, 20), 6: (32, 22), 7: (32, 24),
          10: (256, 84), 11: (256, 110), 12: (256, 144), 13: (256, 176), 14: (256, 210), 20: (32, 18),
          23: (256, 136), 39: (32, 17)}


def string(text: str) -> bytes:
    return struct.pack("<Q", len(text.encode())) + text.encode()


def value(x) -> bytes:
    """A key's type and value: u32, f32, bool, string, or an array of one of these."""
    if isinstance(x, list):
        kind = value(x[0])[:4]
        return struct.pack("<I", 9) + kind + struct.pack("<Q", len(x)) + b"".join(value(item)[4:] for item in x)
    if isinstance(x, bool):
        return struct.pack("<IB", 7, x)
    if isinstance(x, int):
        return struct.pack("<II", 4, x)
    if isinstance(x, float):
        return struct.pack("<If", 6, x)
    return struct.pack("<I", 8) + string(x)


def as_i32(values: list[int]) -> bytes:
    return struct.pack(f"<IIQ{len(values)}i", 9, 5, len(values), *values)


def numbers(kind: int, count: int) -> bytes:
    """Weights of one row: small floats, or blocks with a small scale."""
    cols, size = BLOCKS[kind]
    if kind == 0:
        return struct.pack(f"<{count}f", *(random.gauss(0, 0.5) for _ in range(count)))
    if kind == 1:
        return struct.pack(f"<{count}e", *(random.gauss(0, 0.5) for _ in range(count)))
    row = bytearray(random.randbytes(count // cols * size))
    scales = {10: (80, 82), 11: (108,), 12: (0, 2), 13: (0, 2), 14: (208,), 23: (0,)}.get(kind, (0,))
    for block in range(0, len(row), size):
        for at in scales if kind not in (3, 7) else (0, 2):
            row[block + at:block + at + 2] = struct.pack("<e", 0.01)
        if kind == 39:
            row[block] = 118
    if kind == 30:
        return struct.pack(f"<{count}H", *(0x3f00 + random.randrange(64) for _ in range(count)))
    return bytes(row)


def gguf(family: str, kind: int = 0, layers: int = 1, bpe: str = "", extra: dict | None = None, tied: bool = True,
         square: bool = False) -> bytes:
    """square: the width of a block wherever a matrix has columns, so that all of them are of that type."""
    more = FAMILIES[family].split()
    dim = max(4, BLOCKS[kind][0])
    heads, groups, width, ffn = (2, 1, dim // 2, dim) if square else (2, 1, 2, 2)
    vocabulary = BPE if bpe else VOCABULARY
    keys = {f"{family}.block_count": layers, f"{family}.embedding_length": dim, f"{family}.context_length": 8,
            f"{family}.attention.layer_norm_rms_epsilon": 1e-5, f"{family}.attention.head_count": heads,
            f"{family}.attention.head_count_kv": groups, f"{family}.attention.key_length": width,
            f"{family}.feed_forward_length": ffn, "tokenizer.ggml.model": "gpt2" if bpe else "llama",
            "tokenizer.ggml.tokens": vocabulary}
    if bpe:
        keys |= {"tokenizer.ggml.pre": bpe, "tokenizer.ggml.merges": MERGES, "tokenizer.ggml.eos_token_id": 5}
    else:
        keys |= {"tokenizer.ggml.scores": [-float(i) for i in range(len(vocabulary))]}
    if "scale" in more:
        scales = ("embedding_scale", "residual_scale", "attention.scale", "logit_scale")
        keys |= {f"{family}.{name}": 2.0 for name in scales}
    keys |= extra or {}
    packed = [string("general.architecture") + value(family)] + [string(k) + value(x) for k, x in keys.items()]
    packed.append(string("tokenizer.ggml.token_type") + as_i32(BPE_TYPES if bpe else TYPES))
    tensors = {"token_embd.weight": (dim, len(vocabulary)), "output_norm.weight": (dim,)}
    if not tied:
        tensors["output.weight"] = (dim, len(vocabulary))
    for layer in range(layers):
        q, kv = heads * width, groups * width
        own = {"attn_output.weight": (q, dim), "ffn_down.weight": (ffn, dim)}
        if "fused" in more:
            own |= {"attn_qkv.weight": (dim, q + 2 * kv), "ffn_up.weight": (dim, 2 * ffn)}
        else:
            own |= {"attn_q.weight": (dim, q), "attn_k.weight": (dim, kv), "attn_v.weight": (dim, kv),
                    "ffn_gate.weight": (dim, ffn), "ffn_up.weight": (dim, ffn)}
        if "bare" not in more:
            own |= {"attn_norm.weight": (dim,), "ffn_norm.weight": (dim,)}
        if "bias" in more:
            own |= {"attn_q.bias": (q,), "attn_k.bias": (kv,), "attn_v.bias": (kv,)}
        if "norm" in more:
            own |= {"attn_q_norm.weight": (width,), "attn_k_norm.weight": (width,)}
        if "wide" in more:
            own |= {"attn_q_norm.weight": (q,), "attn_k_norm.weight": (kv,)}
        if "post" in more:
            own |= {"post_attention_norm.weight": (dim,), "post_ffw_norm.weight": (dim,)}
        tensors |= {f"blk.{layer}.{name}": shape for name, shape in own.items()}
    table, data = b"", b""
    for name, shape in tensors.items():
        fits = kind if len(shape) == 2 and shape[0] % BLOCKS[kind][0] == 0 else int(len(shape) == 2 and dim == 256)
        table += string(name) + struct.pack(f"<I{len(shape)}QIQ", len(shape), *shape, fits, len(data))
        rows = shape[1] if len(shape) == 2 else 1
        data += b"".join(numbers(fits, shape[0]) for _ in range(rows))
        data += bytes(-len(data) % 32)
    head = b"GGUF" + struct.pack("<IQQ", 3, len(tensors), len(packed)) + b"".join(packed) + table
    return head + bytes(-len(head) % 32) + data


def llama2c(version: int, shared: bool) -> bytes:
    layers, tokens, context = 1 if version == 2 else 2, 4, 4
    dim, ffn, heads, groups = (32, 32, 16, 8) if version == 2 else (4, 2, 2, 1)
    count = tokens if shared or version else -tokens
    head = struct.pack("<7i", dim, ffn, layers, heads, groups, count, context)
    if version:
        head = b"24ka" + struct.pack("<i", version) + head + struct.pack("<B", shared)
        head += struct.pack("<i", 32) if version == 2 else b""
        head += bytes(256 - len(head))
    kv = dim // heads * groups
    norms = dim * (2 * layers + 1)
    matrices = tokens * dim * (1 if shared else 2) + layers * (2 * dim * dim + 2 * dim * kv + 3 * dim * ffn)
    floats = norms + matrices + (0 if version else context * (dim // heads))
    if version < 2:
        return head + numbers(0, floats)
    return head + numbers(0, norms) + b"".join(
        random.randbytes(n) + struct.pack("<f", 0.01) * (n // 32)
        for n in [tokens * dim] + [dim * dim, dim * kv, dim * kv, dim * dim] + [dim * ffn] * 3)


def tokenizer_bin() -> bytes:
    pieces = ["<unk>", "\n<s>\n", "\n</s>\n"] + ["x"] * 256 + [" ", "a", "b", "ab", " a"]
    return struct.pack("<I", 9) + b"".join(struct.pack("<fI", -i, len(p)) + p.encode() for i, p in enumerate(pieces))


def texts() -> dict[str, bytes]:
    words = ["Once upon a time", "  two  spaces\n\n x", "it's I'LL 'ſ 12345", "<s>a</s><|im_start|>user",
             "äöü 你好 👩‍🔬 é", "\xff\xc3(", "a\u2581b \u2581\u2581", "=== <tool> !!\r\n\t.", "\u3000\u00a0 x\u0301",
             "fn(x){return x+1;}"]
    made = {}
    for which in range(10):
        for i, word in enumerate(words):
            made[f"text-{which}-{i}"] = bytes([which, i]) + word.encode("utf-8" if i != 5 else "latin-1")
    for name, kind, pre, flags in (("spm", 1, 0, 4), ("spm-plain", 1, 0, 0), ("bpe", 2, 0, 8), ("bpe-qwen2", 2, 4, 0)):
        pieces = [b"<unk>", b"<s>", b"a", b"b", b"ab", b" ", b" a", b"<t>", b"aba", b"\n"]
        kinds = [2, 3, 1, 1, 1, 1, 1, 4, 1, 6 if kind == 1 else 1]
        merges = [(2, 3, 4), (5, 2, 6), (4, 2, 8)] if kind == 2 else []
        starts = [sum(map(len, pieces[:i])) for i in range(len(pieces) + 1)]
        unknown = 0 if kind == 1 else -1
        section = struct.pack("<3I3i4I", kind, pre, flags, 1, -1, unknown, 1, len(pieces), len(merges), starts[-1])
        section += struct.pack("<10f", *(-float(i) for i in range(10))) + struct.pack("<11I", *starts)
        section += b"".join(struct.pack("<3I", *m) for m in merges) + struct.pack("<I", 1) + bytes(kinds)
        section += b"".join(pieces)
        section += bytes(-len(section) % 4)
        text = b"ab aba<t>ba <s>ab\n\xff a"
        made[f"section-{name}"] = bytes([255, 10]) + struct.pack("<H", len(text)) + text + section
    return made


LINES = (  # of prompts and of tasks
    '{"prompt": "Once", "id": 7, "n_predict": 2, "temp": 0.5, "top_k": 3, "top_p": 0.9, "min_p": 0.1, "seed": 1}',
    '{"prompt": "a\\u00e9\\ud83d\\ude00", "id": "x", "stop": ["b", "cc"]}', '{"prompt": "a", "stop": "b"}',
    '{"messages": [{"role": "user", "content": "a<|im_end|>"}, {"role": "assistant", "content": "b"}]}',
    '{"question": "a?", "answer": "b", "solution": "c"}', '{"question": "a?", "answer": 1, "choices": ["a", "b"]}',
    '{"question": "a?", "answer": "a", "choices": ["a", "b"]}', '{"question": "2 + 2", "answer": 4.0}',
    '{"prompt": "a", "choices": ["x", "y z"]}',
)


def main() -> None:
    folder = Path(sys.argv[1])
    files, texts_folder, sessions = folder / "files", folder / "texts", folder / "sessions"
    for path in (files, texts_folder, sessions):
        path.mkdir(parents=True, exist_ok=True)
    random.seed(1)
    made = {f"{family}.gguf": gguf(family) for family in FAMILIES}
    made |= {f"type-{kind}.gguf": gguf("llama", kind, tied=kind > 2) for kind in BLOCKS if kind}
    made |= {f"{pre}.gguf": gguf("qwen2", bpe=pre, layers=2) for pre in ("gpt-2", "llama-bpe", "qwen2")}
    made["scaled.gguf"] = gguf("llama", extra={"llama.rope.scaling.type": "linear", "llama.rope.scaling.factor": 2.0,
                                               "llama.rope.dimension_count": 2, "tokenizer.chat_template": "<s>",
                                               "llama.rope.freq_base": 1e4, "general.alignment": 32})
    made["layers.gguf"] = gguf("gemma3", layers=3, extra={"gemma3.attention.sliding_window": 2, "gemma3.vocab_size": 10,
                                                          "gemma3.attention.head_count_kv": [1, 1, 1]})
    made["caps.gguf"] = gguf("gemma2", layers=2, extra={"gemma2.attn_logit_softcapping": 5.0,
                                                        "gemma2.final_logit_softcapping": 3.0,
                                                        "gemma2.attention.sliding_window": 4})
    for version, shared in ((0, True), (0, False), (1, False), (2, True)):
        made[f"llama2c-v{version}-{int(shared)}.bin"] = llama2c(version, shared)
    made["tokenizer.bin"] = tokenizer_bin()
    for name, data in made.items():
        (files / name).write_bytes(data)
    for name, data in texts().items():
        (texts_folder / name).write_bytes(data)
    (folder / "templates").mkdir(exist_ok=True)
    goldens = Path(__file__).parent / "golden" / "templates.jsonl"
    for i, line in enumerate(goldens.read_text().splitlines()):  # the first is JSON, the others have templates
        text = "\0" + line if i == 0 else json.loads(line)[0]
        (folder / "templates" / str(i)).write_text(text)
    (folder / "lines").mkdir(exist_ok=True)
    for i, line in enumerate(LINES):
        for kind in range(4):
            (folder / "lines" / f"{i}-{kind}").write_bytes(bytes([kind + 4]) + b"a\n" + line.encode() + b"\nb c")
    small = {"kind": 2, "square": True}  # a tile of 16 x 32 weights of 4 bits has 288 bytes
    for name, data in {"llama": gguf("llama", 1), "qwen2": gguf("qwen2", bpe="qwen2", **small),
                       "q4": gguf("llama", **small), "olmo2": gguf("olmo2", **small),
                       "gemma3": gguf("gemma3", extra={"gemma3.attention.sliding_window": 2}, **small)}.items():
        (files / "source").write_bytes(data)
        subprocess.run(["./run", files / "source", "-m", "export", "-q", "-o", files / f"{name}.native"], check=True)
    (files / "source").unlink()
    for n in (1, 5, 64):
        ids = " ".join(str(i * 7 % 135) for i in range(n))  # as in fuzz.c; llama_mqa has 135 tokens
        subprocess.run(["./run", "tests/golden/llama_mqa.gguf", "-q", "-n", "0", "--kv", "f16", "--ids", ids,
                        "--session", sessions / f"tokens-{n}"], check=True, stdout=subprocess.DEVNULL)
    opened = 0
    for path in sorted(files.iterdir()):  # all but the tokenizer are models that open
        done = subprocess.run(["./run", path, "-m", "inspect", "-q"], capture_output=True, text=True)
        opened += done.returncode == 0
        if done.returncode and path.name != "tokenizer.bin":
            sys.exit(done.stderr.strip())
    print(f"{opened} models, {len(texts())} texts in {folder}")


if __name__ == "__main__":
    main()
