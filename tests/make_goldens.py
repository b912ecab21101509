#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torch>=2.4", "transformers>=5.0", "gguf>=0.17"]
# ///
"""Makes the small random models in tests/golden and the logits that the C program has to reproduce.

    python tests/make_goldens.py             writes tests/golden
    python tests/make_goldens.py --check     recomputes everything and compares it with tests/golden

A case NAME is NAME.gguf (or NAME.bin), NAME.ids (45 token ids) and NAME.logits (float32, 45 x vocabulary,
little-endian). mixed_fused.gguf has no logits of its own: they are those of mixed. llama2c_v0.gguf holds the weights of
llama2c_v0.bin. quantised.bin has a matrix and its blocks as -m export --type makes them.

The logits come from transformers (float32, eager attention); those of `mixed` from forward() below, since transformers
has no model whose layers differ in size. Every file is then read back by a second reader in this script, which computes
the logits again in float64. A golden is kept only if
  - transformers' float32 logits are within F32_ERROR of those float64 ones, and
  - each feature of the model, switched off or changed, moves some logit by at least 50 times TOLERANCE:
    so a C program that lacks the feature cannot pass by chance.

Sources of the formats: ggml's docs/gguf.md, llama.cpp's conversion/llama.py and src/models/llama.cpp (names, order of
the rows of q and k), llama2.c's export.py and run.c (v0, v1, v2, tokenizer.bin).

Letters in the shapes: V vocabulary, D dim, H heads, G kv heads, K head_dim, F ffn, E experts, T tokens.
"""
from __future__ import annotations

import argparse
import dataclasses
import math
import struct
import sys
import tempfile
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as QType

TOKENS = 45            # not a multiple of any tile or batch
TOLERANCE = 1e-4       # what the C program is allowed (guide: F32 weights, small models)
MIN_CHANGE = 50 * TOLERANCE
F32_ERROR = 2e-5       # what transformers' float32 may differ from float64
MAX_BYTES = 1_540_000  # of the whole folder
CONTEXT = 64
GOLDEN = Path(__file__).resolve().parent / "golden"


# ==== 1. The cases ====

@dataclass(frozen=True)
class Case:
    """One model. Sizes are odd on purpose: no multiples of the C program's tiles (16 rows x 32 columns)."""
    name: str
    seed: int
    dim: int
    heads: int
    kv_heads: int
    ffn: int
    vocab: int
    tied: bool
    arch: str = "llama"
    layers: int = 2
    head_dim: int = 0                          # 0: dim / heads
    theta: float = 1e4
    eps: float = 1e-5
    bias: bool = False                         # llama only: all seven linear maps; qwen2 always has q, k, v
    rope: dict = field(default_factory=dict)   # transformers' rope_parameters without rope_theta
    experts: int = 0                           # of each layer; 0: none
    used: int = 0                              # by each token
    types: dict = field(default_factory=dict)  # of tensors that are not float32

    @property
    def key_dim(self) -> int:
        return self.head_dim or self.dim // self.heads


# The wavelengths of llama3_rope are 6.3, 32, 168, ...: one below 16/2 (kept), one between (blended), the others above
# 16/0.25 (divided by 8).
LLAMA3 = {"rope_type": "llama3", "factor": 8.0, "low_freq_factor": 0.25, "high_freq_factor": 2.0,
          "original_max_position_embeddings": 16}
LINEAR = {"rope_type": "linear", "factor": 4.0}

CASES = [
    Case("llama_tied", 1, dim=36, heads=6, kv_heads=2, ffn=44, vocab=277, tied=True),
    Case("llama_bias", 2, dim=24, heads=4, kv_heads=2, ffn=44, vocab=131, tied=False, bias=True),
    Case("llama3_rope", 3, dim=24, heads=4, kv_heads=2, ffn=36, vocab=131, tied=True, head_dim=16, theta=5e5,
         rope=LLAMA3),
    Case("llama_linear", 4, dim=24, heads=6, kv_heads=3, ffn=36, vocab=131, tied=True, rope=LINEAR),
    Case("llama_mqa", 5, dim=30, heads=5, kv_heads=1, ffn=36, vocab=135, tied=False, theta=1e3, eps=1e-3),
    Case("qwen2", 6, dim=32, heads=4, kv_heads=2, ffn=36, vocab=267, tied=True, arch="qwen2", theta=1e6, eps=1e-6),
    Case("mixtral", 20, dim=32, heads=4, kv_heads=2, ffn=40, vocab=131, tied=True, experts=5, used=2, types={
        "blk.0.ffn_gate_exps.weight": QType.Q4_0, "blk.0.ffn_up_exps.weight": QType.Q8_0,
        "blk.0.ffn_down_exps.weight": QType.F16, "blk.1.ffn_gate_exps.weight": QType.Q8_0,
        "blk.1.ffn_up_exps.weight": QType.Q8_0, "blk.1.ffn_down_exps.weight": QType.BF16}),
    Case("qwen2_untied", 7, dim=24, heads=4, kv_heads=2, ffn=36, vocab=263, tied=False, arch="qwen2", theta=1e6,
         eps=1e-6),
]
LLAMA2C = [  # theta and eps are fixed in this format
    Case("llama2c_v0", 18, dim=24, heads=4, kv_heads=2, ffn=36, vocab=275, tied=True),
    Case("llama2c_v1", 9, dim=24, heads=4, kv_heads=2, ffn=36, vocab=275, tied=False),
    Case("llama2c_v2", 10, dim=32, heads=4, kv_heads=2, ffn=64, vocab=275, tied=True),
]
GROUP = 32  # columns that share a scale in llama2c_v2
MIXED = Case("mixed", 11, dim=64, heads=4, kv_heads=0, ffn=0, vocab=131, tied=True)  # the two zeros: see below
MIXED_KV_HEADS = [2, 1]
MIXED_FFN = [64, 32]
MIXED_TYPES = {  # q, k and v of a layer share a type, so that they can also be stored as one tensor
    "token_embd.weight": QType.Q8_0,
    "blk.0.attn_q.weight": QType.Q4_0, "blk.0.attn_k.weight": QType.Q4_0, "blk.0.attn_v.weight": QType.Q4_0,
    "blk.0.attn_output.weight": QType.F16, "blk.0.ffn_gate.weight": QType.Q4_1,
    "blk.0.ffn_up.weight": QType.BF16, "blk.0.ffn_down.weight": QType.Q8_0,
    "blk.1.attn_q.weight": QType.Q8_0, "blk.1.attn_k.weight": QType.Q8_0, "blk.1.attn_v.weight": QType.Q8_0,
    "blk.1.attn_output.weight": QType.Q4_1, "blk.1.ffn_gate.weight": QType.F16,
    "blk.1.ffn_up.weight": QType.F32, "blk.1.ffn_down.weight": QType.Q4_0,
}


# ==== 2. A model as its file describes it, and the second opinion ====

@dataclass(frozen=True)
class Model:
    """Tensors under their GGUF names, float32, shapes (rows, columns), and what else the forward pass needs."""
    tensors: dict[str, np.ndarray]
    layers: int
    heads: int
    kv_heads: list[int]       # (layers)
    head_dim: int
    theta: float
    eps: float
    adjacent: bool            # rope turns components (2i, 2i+1); else (i, i + head_dim/2)
    linear: float = 1.0       # rope: positions are divided by it
    freq_dim: int = 0         # rope: frequency i is theta^(-2i/freq_dim); 0: head_dim
    score_dim: int = 0        # attention scores are divided by its root; 0: head_dim
    grouped: bool = True      # query head h reads kv head h / (H/G); else h % G (wrong)
    causal: bool = True
    used: int = 0             # experts that a token goes to
    share: bool = True        # their weights add up to 1


def rope_angles(model: Model, tokens: int) -> np.ndarray:
    """angle[t, i] = t * theta^(-2i/K) / linear / rope_freqs[i]      (T, K/2), float64"""
    freq_dim = model.freq_dim or model.head_dim
    freq = model.theta ** (-np.arange(0, model.head_dim, 2, dtype=np.float64) / freq_dim) / model.linear
    if "rope_freqs.weight" in model.tensors:
        freq = freq / model.tensors["rope_freqs.weight"].astype(np.float64)
    return np.outer(np.arange(tokens), freq)


def rotate(x: np.ndarray, cos: np.ndarray, sin: np.ndarray, adjacent: bool) -> np.ndarray:
    """(a, b) -> (a cos - b sin, a sin + b cos)      x (heads, T, K)   cos, sin (T, K/2)"""
    half = x.shape[-1] // 2
    first, second = (slice(0, None, 2), slice(1, None, 2)) if adjacent else (slice(0, half), slice(half, None))
    out = np.empty_like(x)
    out[..., first] = x[..., first] * cos - x[..., second] * sin
    out[..., second] = x[..., first] * sin + x[..., second] * cos
    return out


def rmsnorm(x: np.ndarray, weight: np.ndarray, eps: float) -> np.ndarray:
    """x / sqrt(mean(x^2) + eps) * weight      x (T, D)   weight (D)"""
    return x / np.sqrt((x * x).mean(-1, keepdims=True) + x.dtype.type(eps)) * weight


def attention(model: Model, layer: int, q: np.ndarray, k: np.ndarray, v: np.ndarray) -> np.ndarray:
    """softmax(q k^T / sqrt(K)) v, query head h with kv head h / (H/G)      q (T, H*K)  k, v (T, G*K)  out (T, H*K)"""
    tokens, groups = q.shape[0], model.kv_heads[layer]
    angle = rope_angles(model, tokens)
    cos, sin = np.cos(angle).astype(q.dtype), np.sin(angle).astype(q.dtype)
    q, k, v = (x.reshape(tokens, -1, model.head_dim).transpose(1, 0, 2) for x in (q, k, v))
    q, k = rotate(q, cos, sin, model.adjacent), rotate(k, cos, sin, model.adjacent)
    head = np.arange(model.heads)
    source = head // (model.heads // groups) if model.grouped else head % groups
    scores = q @ k[source].transpose(0, 2, 1) * q.dtype.type(1 / math.sqrt(model.score_dim or model.head_dim))
    if model.causal:
        scores = np.where(np.tri(tokens, dtype=bool), scores, -np.inf)
    weights = np.exp(scores - scores.max(-1, keepdims=True))
    weights /= weights.sum(-1, keepdims=True)
    return (weights @ v[source]).transpose(1, 0, 2).reshape(tokens, -1)


EXPERTS = ("gate_inp", "gate_exps", "up_exps", "down_exps")


def mixture(model: Model, x: np.ndarray, router: np.ndarray, gate: np.ndarray, up: np.ndarray,
            down: np.ndarray) -> np.ndarray:
    """The likeliest experts by softmax(router x), weighted      x (T, D)  router (E, D)  gate, up (E, F, D)
    down (E, D, F)  out (T, D)    As in "Mixtral of Experts", one token and one expert after the other."""
    out = np.zeros_like(x)
    for t, row in enumerate(x):
        p = np.exp(router @ row)
        chosen = np.argsort(-p, kind="stable")[:model.used]
        for e in chosen:
            g = gate[e] @ row
            y = down[e] @ (g / (1 + np.exp(-g)) * (up[e] @ row))
            out[t] += p[e] / (p[chosen] if model.share else p).sum() * y
    return out


def forward(model: Model, ids: np.ndarray, dtype: type = np.float64) -> np.ndarray:
    """The logits at every position      ids (T)   out (T, V)
    LLaMA and Qwen2 as in "LLaMA: Open and Efficient Foundation Language Models"; absent biases count as zero."""
    def weight(name: str) -> np.ndarray:
        return model.tensors[name].astype(dtype)

    def linear(x: np.ndarray, name: str) -> np.ndarray:
        y = x @ weight(name + ".weight").T
        return y + weight(name + ".bias") if name + ".bias" in model.tensors else y

    x = weight("token_embd.weight")[ids]
    for n in range(model.layers):
        blk = f"blk.{n}."
        y = rmsnorm(x, weight(blk + "attn_norm.weight"), model.eps)
        if blk + "attn_qkv.weight" in model.tensors:
            kv_dim = model.kv_heads[n] * model.head_dim
            q, k, v = np.split(linear(y, blk + "attn_qkv"), [model.heads * model.head_dim, -kv_dim], axis=1)
        else:
            q, k, v = (linear(y, blk + "attn_" + part) for part in "qkv")
        x = x + linear(attention(model, n, q, k, v), blk + "attn_output")
        y = rmsnorm(x, weight(blk + "ffn_norm.weight"), model.eps)
        if blk + "ffn_gate_inp.weight" in model.tensors:
            x = x + mixture(model, y, *(weight(f"{blk}ffn_{name}.weight") for name in EXPERTS))
            continue
        gate = linear(y, blk + "ffn_gate")
        x = x + linear(gate / (1 + np.exp(-gate)) * linear(y, blk + "ffn_up"), blk + "ffn_down")
    x = rmsnorm(x, weight("output_norm.weight"), model.eps)
    return x @ weight("output.weight" if "output.weight" in model.tensors else "token_embd.weight").T


def variants(model: Model, types: dict[str, QType]) -> Iterator[tuple[str, Model]]:
    """(feature, the same model with that feature off or changed) for every feature that the model has.
    types: the quantised types in the file, if it has any."""
    def changed(**fields) -> Model:
        return dataclasses.replace(model, **fields)

    def edited(edit) -> Model:
        return changed(tensors={name: edit(name, value) for name, value in model.tensors.items()})

    tensors = model.tensors
    embedding = tensors["token_embd.weight"]
    dim = embedding.shape[1]
    yield "pairing", changed(adjacent=not model.adjacent)
    yield "theta", changed(theta=1e4 if model.theta != 1e4 else 1e5)
    yield "eps", changed(eps=1e-6 if math.isclose(model.eps, 1e-5, rel_tol=1e-3) else 1e-5)
    yield "causal", changed(causal=False)
    yield "norms", edited(lambda name, w: np.ones_like(w) if name.endswith("norm.weight") else w)
    if any(1 < g < model.heads for g in model.kv_heads):
        yield "grouping", changed(grouped=False)
    if "output.weight" in tensors:
        yield "untied", changed(tensors={name: w for name, w in tensors.items() if name != "output.weight"})
    else:
        yield "tied", changed(tensors={**tensors, "output.weight": np.roll(embedding, 1, axis=0)})
    swap = {a + end: b + end for end in ("", "_exps") for a, b in (("ffn_gate", "ffn_up"), ("ffn_up", "ffn_gate"))}
    yield "gate/up", changed(tensors={".".join(swap.get(part, part) for part in name.split(".")): w
                                      for name, w in tensors.items()})
    if model.used:
        yield "used", changed(used=model.used + 1)
        yield "share", changed(share=False)
        for part in EXPERTS:
            yield part, edited(lambda name, w, part=part: np.roll(w, 1, axis=0) if f"ffn_{part}." in name else w)
    if model.head_dim * model.heads != dim:
        yield "head_dim(score)", changed(score_dim=dim // model.heads)
        yield "head_dim(rope)", changed(freq_dim=dim // model.heads)
    if "rope_freqs.weight" in tensors:
        yield "rope_freqs", edited(lambda name, w: np.ones_like(w) if name == "rope_freqs.weight" else w)
    if model.linear != 1.0:
        yield "linear", changed(linear=1.0)
    for kind in sorted({name.split(".")[2] for name in tensors if name.endswith(".bias")}):
        yield kind + ".bias", edited(lambda name, w, kind=kind: 0 * w if name.endswith(kind + ".bias") else w)
    for qtype in sorted(set(types.values())):
        yield qtype.name, edited(lambda name, w, qtype=qtype:
                                 np.roll(w, 1, axis=1) if types.get(name) == qtype and w.ndim >= 2 else w)


# ==== 3. Random weights ====
# numpy's RandomState: its stream is frozen, unlike those of torch and of numpy's newer generators.

def random_tensors(case: Case) -> dict[str, np.ndarray]:
    """Weights under GGUF names, before any permutation. Matrices N(0, gain^2 / columns), gain 1.2 for q and k, 1.5 for
    the classifier, else 1; embedding N(0, 0.02^2), so small that eps shows; biases N(0, 0.5^2); norms 1 + N(0, 0.3^2);
    where the embedding is the classifier, the last norm makes up for its scale. The logits' standard deviation is then
    about 1.5."""
    rng = np.random.RandomState(case.seed)
    kv_heads = [case.kv_heads or MIXED_KV_HEADS[n] for n in range(case.layers)]
    ffns = [case.ffn or MIXED_FFN[n] for n in range(case.layers)]
    tensors: dict[str, np.ndarray] = {}

    def normal(scale: float, *shape: int) -> np.ndarray:
        return (rng.standard_normal(shape) * scale).astype(np.float32)

    def linear(name: str, rows: int, columns: int, bias: bool, gain: float = 1.0) -> None:
        tensors[name + ".weight"] = normal(gain / math.sqrt(columns), rows, columns)
        if bias:
            tensors[name + ".bias"] = normal(0.5, rows)

    tensors["token_embd.weight"] = normal(0.02, case.vocab, case.dim)
    for n in range(case.layers):
        blk, q_dim, kv_dim = f"blk.{n}.", case.heads * case.key_dim, kv_heads[n] * case.key_dim
        qkv_bias = case.bias or case.arch == "qwen2"
        tensors[blk + "attn_norm.weight"] = 1 + normal(0.3, case.dim)
        linear(blk + "attn_q", q_dim, case.dim, qkv_bias, gain=1.2)
        linear(blk + "attn_k", kv_dim, case.dim, qkv_bias, gain=1.2)
        linear(blk + "attn_v", kv_dim, case.dim, qkv_bias)
        linear(blk + "attn_output", case.dim, q_dim, case.bias)
        tensors[blk + "ffn_norm.weight"] = 1 + normal(0.3, case.dim)
        if case.experts:
            linear(blk + "ffn_gate_inp", case.experts, case.dim, False, gain=2)
            for name, rows, cols in (("gate", ffns[n], case.dim), ("up", ffns[n], case.dim),
                                     ("down", case.dim, ffns[n])):
                tensors[f"{blk}ffn_{name}_exps.weight"] = normal(1 / math.sqrt(cols), case.experts, rows, cols)
            continue
        linear(blk + "ffn_gate", ffns[n], case.dim, case.bias)
        linear(blk + "ffn_up", ffns[n], case.dim, case.bias)
        linear(blk + "ffn_down", case.dim, ffns[n], case.bias)
    last = 1.5 / (0.02 * math.sqrt(case.dim)) if case.tied else 1.0
    tensors["output_norm.weight"] = (1 + normal(0.3, case.dim)) * np.float32(last)
    if not case.tied:
        linear("output", case.vocab, case.dim, False, gain=1.5)
    return tensors


def random_ids(case: Case) -> np.ndarray:
    """TOKENS ids, among them the first and the last of the vocabulary      (T)"""
    ids = np.random.RandomState(1000 + case.seed).randint(0, case.vocab, TOKENS)
    ids[0], ids[3], ids[7] = 1, case.vocab - 1, 0
    return ids


def pair_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Hugging Face keeps the two halves of each head apart; GGUF's llama and llama2.c want partners in adjacent rows.
    Row K/2*s + i of a head becomes row 2*i + s (llama.cpp: LlamaModel.permute).      w (heads*K, ...)"""
    return w.reshape(heads, 2, w.shape[0] // heads // 2, -1).swapaxes(1, 2).reshape(w.shape)


def unpair_rows(w: np.ndarray, heads: int) -> np.ndarray:
    """Undoes pair_rows."""
    return w.reshape(heads, w.shape[0] // heads // 2, 2, -1).swapaxes(1, 2).reshape(w.shape)


def reorder(case: Case, tensors: dict[str, np.ndarray], move) -> dict[str, np.ndarray]:
    """Applies pair_rows or unpair_rows to the weights and biases of q and k."""
    heads = {"attn_q": case.heads, "attn_k": case.kv_heads}
    return {name: move(w, heads[name.split(".")[2]]) if ".attn_q." in name or ".attn_k." in name else w
            for name, w in tensors.items()}


# ==== 4. transformers ====

HF_NAMES = {"attn_norm": "input_layernorm", "ffn_norm": "post_attention_layernorm", "attn_q": "self_attn.q_proj",
            "attn_k": "self_attn.k_proj", "attn_v": "self_attn.v_proj", "attn_output": "self_attn.o_proj",
            "ffn_gate": "mlp.gate_proj", "ffn_up": "mlp.up_proj", "ffn_down": "mlp.down_proj",
            "ffn_gate_inp": "mlp.gate"}


def hf_name(name: str) -> str:
    """blk.0.attn_q.weight -> model.layers.0.self_attn.q_proj.weight"""
    top = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
    parts = name.split(".")
    if parts[0] != "blk":
        return f"{top[parts[0]]}.{parts[1]}"
    return f"model.layers.{parts[1]}.{HF_NAMES[parts[2]]}.{parts[3]}"


def hf_logits(case: Case, tensors: dict[str, np.ndarray], ids: np.ndarray) -> np.ndarray:
    """transformers' float32 logits; tensors in Hugging Face's row order      ids (T)   out (T, V) float32"""
    shape = dict(vocab_size=case.vocab, hidden_size=case.dim, intermediate_size=case.ffn, num_hidden_layers=case.layers,
                 num_attention_heads=case.heads, num_key_value_heads=case.kv_heads, max_position_embeddings=CONTEXT,
                 rms_norm_eps=case.eps, tie_word_embeddings=case.tied, attn_implementation="eager",
                 bos_token_id=None, eos_token_id=None,
                 rope_parameters={"rope_type": "default", **case.rope, "rope_theta": case.theta})
    if case.experts:
        net = transformers.MixtralForCausalLM(transformers.MixtralConfig(
            **shape, num_local_experts=case.experts, num_experts_per_tok=case.used, experts_implementation="eager"))
    elif case.arch == "llama":
        config = transformers.LlamaConfig(**shape, head_dim=case.key_dim, attention_bias=case.bias, mlp_bias=case.bias)
        net = transformers.LlamaForCausalLM(config)
    else:
        net = transformers.Qwen2ForCausalLM(transformers.Qwen2Config(**shape))
    state = {hf_name(name): torch.from_numpy(w.copy()) for name, w in tensors.items() if "_exps." not in name}
    for n in range(case.layers if case.experts else 0):  # gate and up of all experts are one tensor there
        gate, up, down = (torch.from_numpy(tensors[f"blk.{n}.ffn_{name}.weight"]) for name in EXPERTS[1:])
        state[f"model.layers.{n}.mlp.experts.gate_up_proj"] = torch.cat([gate, up], 1)
        state[f"model.layers.{n}.mlp.experts.down_proj"] = down.clone()
    if case.tied:
        state["lm_head.weight"] = state["model.embed_tokens.weight"]
    net.load_state_dict(state, strict=True)
    net = net.to(torch.float32).eval()
    with torch.no_grad():
        return net(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


# ==== 5. Tokenizers ====

SPM_MERGES = ("▁t he in er ▁a ▁the on re ▁s at en or ▁w nd ▁o is ▁c it es ou an ▁b ed ▁f ing ▁p al ▁and ar ▁m "
              "▁to ▁of ▁d ▁h ▁in ll ro as").split()
BPE_MERGES = ["Ġ t", "h e", "Ġt he", "i n", "Ġ a", "e r", "r e", "o n"]
NORMAL, UNKNOWN, CONTROL, BYTE = 1, 2, 3, 6  # GGUF's token types


def spm_vocab(size: int) -> tuple[list[str], list[float], list[int]]:
    """A SentencePiece BPE vocabulary: <unk> <s> </s>, the 256 bytes if there is room, merged pieces, characters.
    A piece's score is minus its rank, as in LLaMA's own tokenizer.      pieces, scores, types (size)"""
    pieces, types = ["<unk>", "<s>", "</s>"], [UNKNOWN, CONTROL, CONTROL]
    if size >= 259:
        pieces += [f"<0x{byte:02X}>" for byte in range(256)]
        types += [BYTE] * 256
    chars = ["▁"] + list("etahinroslduwcgfmpbyv") + [chr(c) for c in range(33, 127)]
    chars = list(dict.fromkeys(chars))
    room = size - len(pieces)
    merges = SPM_MERGES[:max(room - len(chars), 6)]
    ranked = merges + chars[:room - len(merges)]
    assert len(ranked) == room and len(set(ranked)) == room
    scores = [0.0] * len(pieces) + [-float(rank) for rank in range(room)]
    return pieces + ranked, scores, types + [NORMAL] * room


def bpe_vocab(size: int) -> tuple[list[str], list[str], list[int]]:
    """A byte-level BPE vocabulary as GPT-2's: 256 byte characters, merged pieces, three special tokens.
    pieces (size), merges, types (size)"""
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in printable]
    chars = [chr(byte) for byte in printable] + [chr(256 + n) for n in range(len(others))]
    special = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    merges = BPE_MERGES[:size - 256 - len(special)]
    pieces = chars + [merge.replace(" ", "") for merge in merges] + special
    assert len(pieces) == size
    return pieces, merges, [NORMAL] * (size - len(special)) + [CONTROL] * len(special)


def write_tokenizer_bin(path: Path, size: int) -> None:
    """llama2.c's tokenizer.bin: uint32 longest piece, then per piece float32 score, uint32 length, bytes.
    Its export puts line ends round <s> and </s>, and turns the SentencePiece space into a space."""
    pieces, scores, _ = spm_vocab(size)
    pieces[1], pieces[2] = "\n<s>\n", "\n</s>\n"
    data = [piece.replace("▁", " ").encode() for piece in pieces]
    with path.open("wb") as file:
        file.write(struct.pack("<I", max(map(len, data))))
        for score, piece in zip(scores, data):
            file.write(struct.pack("<fI", score, len(piece)) + piece)


# ==== 6. GGUF ====

def rope_factors(case: Case) -> np.ndarray:
    """What rope_freqs.weight holds: frequency i is divided by it. 1 for short wavelengths, factor for long ones,
    between them a blend (Llama 3.1; llama.cpp: LlamaModel.generate_extra_tensors).      (K/2) float32"""
    rope, factors = case.rope, []
    for i in range(case.key_dim // 2):
        wavelength = 2 * math.pi * case.theta ** (2 * i / case.key_dim)
        turns = rope["original_max_position_embeddings"] / wavelength
        blend = (turns - rope["low_freq_factor"]) / (rope["high_freq_factor"] - rope["low_freq_factor"])
        blend = min(max(blend, 0.0), 1.0)
        factors.append(1 / ((1 - blend) / rope["factor"] + blend))
    assert factors[0] == 1.0 < factors[1] < rope["factor"] == factors[-1], "want one of each kind"
    return np.array(factors, dtype=np.float32)


def write_gguf(path: Path, case: Case, tensors: dict[str, np.ndarray], types: dict[str, QType]) -> None:
    """tensors in the file's row order; float32 unless types says otherwise (then they are quantised here)."""
    writer = gguf.GGUFWriter(path, case.arch)
    writer.add_name(case.name)
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q8_0 if types else gguf.LlamaFileType.ALL_F32)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(case.vocab)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(case.dim)
    writer.add_block_count(case.layers)
    writer.add_feed_forward_length(case.ffn or MIXED_FFN)
    writer.add_head_count(case.heads)
    writer.add_head_count_kv(case.kv_heads or MIXED_KV_HEADS)
    writer.add_rope_freq_base(case.theta)
    writer.add_layer_norm_rms_eps(case.eps)
    if case.arch == "llama":
        writer.add_rope_dimension_count(case.key_dim)
    if case.experts:
        writer.add_expert_count(case.experts)
        writer.add_expert_used_count(case.used)
    if case.head_dim:
        writer.add_key_length(case.head_dim)
        writer.add_value_length(case.head_dim)
    if case.rope.get("rope_type") == "linear":
        writer.add_rope_scaling_type(gguf.RopeScalingType.LINEAR)
        writer.add_rope_scaling_factor(case.rope["factor"])
    add_tokenizer(writer, case)
    for name, w in tensors.items():
        qtype = types.get(name, QType.F32)
        writer.add_tensor(name, gguf.quantize(w, qtype), raw_dtype=qtype)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def add_tokenizer(writer: gguf.GGUFWriter, case: Case) -> None:
    """The tokenizer.ggml.* keys that llama.cpp's converter writes for a SentencePiece model and for Qwen2."""
    if case.arch == "llama":
        pieces, scores, types = spm_vocab(case.vocab)
        writer.add_tokenizer_model("llama")
        writer.add_tokenizer_pre("default")
        writer.add_token_list(pieces)
        writer.add_token_scores(scores)
        writer.add_token_types(types)
        writer.add_bos_token_id(1)
        writer.add_eos_token_id(2)
        writer.add_unk_token_id(0)
        writer.add_add_bos_token(True)
        writer.add_add_eos_token(False)
        return
    pieces, merges, types = bpe_vocab(case.vocab)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre("qwen2")
    writer.add_token_list(pieces)
    writer.add_token_types(types)
    writer.add_token_merges(merges)
    writer.add_bos_token_id(pieces.index("<|endoftext|>"))
    writer.add_eos_token_id(pieces.index("<|im_end|>"))
    writer.add_add_bos_token(False)


def read_gguf(path: Path) -> tuple[Model, dict[str, QType]]:
    """The model in a GGUF file, tensors dequantised, and the types of those that are not float32."""
    reader = gguf.GGUFReader(path)

    def value(key: str, default=None):
        return reader.fields[key].contents() if key in reader.fields else default

    arch = value("general.architecture")
    layers, heads = value(f"{arch}.block_count"), value(f"{arch}.attention.head_count")
    kv_heads = value(f"{arch}.attention.head_count_kv")
    tensors = {t.name: gguf.dequantize(t.data, t.tensor_type) for t in reader.tensors}
    types = {t.name: t.tensor_type for t in reader.tensors if t.tensor_type != QType.F32}
    head_dim = value(f"{arch}.attention.key_length", value(f"{arch}.embedding_length") // heads)
    linear = value(f"{arch}.rope.scaling.factor") if value(f"{arch}.rope.scaling.type") == "linear" else 1.0
    return Model(tensors, layers, heads, kv_heads if isinstance(kv_heads, list) else [kv_heads] * layers, head_dim,
                 value(f"{arch}.rope.freq_base"), value(f"{arch}.attention.layer_norm_rms_epsilon"),
                 adjacent=arch == "llama", linear=linear, used=value(f"{arch}.expert_used_count", 0)), types


# ==== 7. llama2.c ====
# Header: int32 dim, ffn, layers, heads, kv_heads, vocab, context. v0 is that and no more; a negative vocab means that
# the classifier comes last in the file. v1 and v2: uint32 'ak42', int32 version, header, uint8 shared classifier, in v2
# int32 group size (unaligned, at byte 37), zeros up to byte 256. Then the tensors; v2 writes each matrix as all its
# int8, then all its float32 scales.

MAGIC = 0x616B3432
EPS = float(np.float32(1e-5))  # GGUF and llama2.c both mean the float32


def llama2c_order(version: int, layers: int, tied: bool) -> list[str]:
    """The names of the tensors in the order of the file; rope_cos and rope_sin stand for v0's tables."""
    def every(kind: str) -> list[str]:
        return [f"blk.{n}.{kind}.weight" for n in range(layers)]

    attention_maps = every("attn_q") + every("attn_k") + every("attn_v") + every("attn_output")
    ffn_maps = every("ffn_gate") + every("ffn_down") + every("ffn_up")
    last = [] if tied else ["output.weight"]
    if version == 0:
        return (["token_embd.weight"] + every("attn_norm") + attention_maps + every("ffn_norm") + ffn_maps
                + ["output_norm.weight", "rope_cos", "rope_sin"] + last)
    return (every("attn_norm") + every("ffn_norm") + ["output_norm.weight", "token_embd.weight"]
            + attention_maps + ffn_maps + last)


def quantise_groups(w: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """scale = max|w| / 127 of each group, q = round(w / scale), to even
    w (n*GROUP)   q (n, GROUP) int8   scale (n, 1)"""
    groups = w.reshape(-1, GROUP)
    scale = np.abs(groups).max(axis=1, keepdims=True) / np.float32(127)
    return np.rint(groups / scale).astype(np.int8), scale


def dequantise_groups(w: np.ndarray) -> np.ndarray:
    """w as a reader of llama2c_v2 sees it, same shape; norms stay as they are."""
    if w.ndim == 1:
        return w
    q, scale = quantise_groups(w)
    return (q.astype(np.float32) * scale).reshape(w.shape)


def write_llama2c(path: Path, version: int, case: Case, tensors: dict[str, np.ndarray]) -> None:
    """tensors with adjacent pairs, as in GGUF."""
    vocab = -case.vocab if version == 0 and not case.tied else case.vocab
    header = struct.pack("<7i", case.dim, case.ffn, case.layers, case.heads, case.kv_heads, vocab, CONTEXT)
    if version > 0:
        header = struct.pack("<Ii", MAGIC, version) + header + struct.pack("<B", case.tied)
        header += struct.pack("<i", GROUP) if version == 2 else b""
        header = header.ljust(256, b"\0")
    angle = np.outer(np.arange(CONTEXT), case.theta ** (-np.arange(0, case.key_dim, 2) / case.key_dim))
    tables = {"rope_cos": np.cos(angle), "rope_sin": np.sin(angle)}
    with path.open("wb") as file:
        file.write(header)
        for name in llama2c_order(version, case.layers, case.tied):
            w = tensors[name] if name in tensors else tables[name]
            parts = quantise_groups(w) if version == 2 and w.ndim == 2 else (w.astype("<f4"),)
            file.write(b"".join(part.tobytes() for part in parts))


def read_llama2c(path: Path) -> Model:
    """The model in a llama2.c file; v2 dequantised."""
    data = path.read_bytes()
    version, at, group = 0, 0, 0
    if struct.unpack_from("<I", data)[0] == MAGIC:
        version, at = struct.unpack_from("<i", data, 4)[0], 8
    dim, ffn, layers, heads, kv_heads, vocab, context = struct.unpack_from("<7i", data, at)
    tied, at = vocab > 0, at + 28
    if version > 0:
        tied, group, at = data[at] == 1, struct.unpack_from("<i", data, at + 1)[0], 256
    head_dim, kv_dim, vocab = dim // heads, dim // heads * kv_heads, abs(vocab)
    shapes = {"token_embd": (vocab, dim), "output": (vocab, dim), "attn_norm": (dim,), "ffn_norm": (dim,),
              "output_norm": (dim,), "attn_q": (dim, dim), "attn_k": (kv_dim, dim), "attn_v": (kv_dim, dim),
              "attn_output": (dim, dim), "ffn_gate": (ffn, dim), "ffn_up": (ffn, dim), "ffn_down": (dim, ffn),
              "rope_cos": (context, head_dim // 2), "rope_sin": (context, head_dim // 2)}
    tensors = {}
    for name in llama2c_order(version, layers, tied):
        shape = shapes[name.removesuffix(".weight").split(".")[-1]]
        count = math.prod(shape)
        if version == 2 and len(shape) == 2:
            q = np.frombuffer(data, np.int8, count, at).astype(np.float32)
            scale = np.frombuffer(data, "<f4", count // group, at + count)
            tensors[name], at = (q.reshape(-1, group) * scale[:, None]).reshape(shape), at + count + count // group * 4
        else:
            tensors[name], at = np.frombuffer(data, "<f4", count, at).reshape(shape), at + count * 4
    assert at == len(data), f"{path}: {len(data) - at} bytes left over"
    return Model(tensors, layers, heads, [kv_heads] * layers, head_dim, 1e4, EPS, adjacent=True)


# ==== 8. Quantised blocks ====

F = np.float32
STARTS = {"q8": (1, 0.996, 1.004), "q4": (1, 0.93, 1.07), "q4m": ((0, 0), (0.05, 0.05), (0, 0.06), (0.06, 0))}
LIMITS = {"q8": (-127, 127), "q4": (-8, 7), "q4m": (0, 15)}


def chained_sum(x: np.ndarray) -> np.float32:
    """Of 32 numbers, added in the order that run.c promises."""
    chain = [F(0)] * 4
    for c in (12, 8, 4, 0, 28, 24, 20, 16):
        chain = [a + b for a, b in zip(chain, x[c:c + 4])]
    return (chain[0] + chain[1]) + (chain[2] + chain[3])


def quantise_block(x: np.ndarray, kind: str) -> tuple[bytes, np.ndarray]:
    """The block as GGUF has it, and what it stands for      x f32 (32)"""
    def half(value: np.float32) -> np.float32:
        return F(np.float16(value))

    def stored(scale: np.float32, least: np.float32) -> np.ndarray:
        return np.clip(np.rint((x - least) * (F(1) / scale if scale else F(0))), *LIMITS[kind])

    low, high = LIMITS[kind]
    tries = []
    for start in STARTS[kind]:
        if low < 0:
            scale, least = half(x[np.abs(x).argmax()] / F(low * start)), F(0)
        else:
            scale = half((x.max() - x.min()) * F((1 - start[0] - start[1]) / high))
            least = half(x.min() + F(start[0]) * (x.max() - x.min()))
        q = stored(scale, least)
        mean_q, mean_x = (q.mean(), x.mean()) if low == 0 else (F(0), F(0))
        square = chained_sum(q * q) - 32 * mean_q * mean_q
        fitted = half((chained_sum(q * x) - 32 * mean_q * mean_x) / square) if square else F(0)
        tries += [(scale, least), (fitted, half(mean_x - fitted * mean_q))]
    errors = [chained_sum(np.square(stored(*t) * t[0] + (t[1] - x))) for t in tries]
    scale, least = tries[int(np.argmin(errors))]
    q = stored(scale, least)
    head = np.array([scale, least][:1 + (low == 0)], "<f2").tobytes()
    if kind == "q8":
        return head + q.astype(np.int8).tobytes(), q * scale
    u = (q - low).astype(np.uint8)
    return head + (u[:16] | u[16:] << 4).tobytes(), q * scale + least


def make_quantised(folder: Path) -> None:
    """quantised.bin: f32 (20, 96); then for q8, q4, q4m its blocks, the root mean square error in parts of the root mean
    square as f64, and the worst block's."""
    rng = np.random.RandomState(77)
    x = (rng.standard_t(3, (60, 32)) * rng.lognormal(-4, 1.5, (60, 1))).astype(F)
    x[3], x[7], x[11], x[13, 5:] = 0, F(0.25), np.abs(x[11]), 0
    out = [x.tobytes()]
    for kind in STARTS:
        blocks, y = zip(*(quantise_block(block, kind) for block in x))
        error, norm = (np.square(a).sum(1) for a in (x.astype(float) - np.array(y, float), x.astype(float)))
        worst = np.sqrt(np.divide(error, norm, out=np.zeros(60), where=norm > 0)).max()
        out += [*blocks, struct.pack("<2d", math.sqrt(error.sum() / norm.sum()), worst)]
    (folder / "quantised.bin").write_bytes(b"".join(out))


# ==== 9. Making and proving ====

def save(folder: Path, name: str, ids: np.ndarray, logits: np.ndarray) -> None:
    """NAME.ids and NAME.logits      ids (T)   logits (T, V)"""
    (folder / f"{name}.ids").write_text(" ".join(map(str, ids)) + "\n")
    (folder / f"{name}.logits").write_bytes(logits.astype("<f4").tobytes())


def prove(name: str, model: Model, types: dict[str, QType], ids: np.ndarray, logits: np.ndarray) -> None:
    """Stops the script unless the golden holds what the head of this file promises. Prints its row of the table."""
    exact = forward(model, ids)
    error = np.abs(exact - logits).max()
    changes = {what: np.abs(forward(other, ids) - exact).max() for what, other in variants(model, types)}
    print(f"{name:13} {exact.std():5.2f} {error:8.1e}  " + "  ".join(f"{what} {c:.2g}" for what, c in changes.items()))
    if error > F32_ERROR:
        sys.exit(f"{name}: float32 logits differ from float64 by {error:.1e}, more than {F32_ERROR}")
    for what, change in changes.items():
        if not change >= MIN_CHANGE:
            sys.exit(f"{name}: without {what} the logits change by {change:.1e} only, wanted {MIN_CHANGE}")


def make_case(folder: Path, case: Case) -> None:
    """A GGUF with float32 tensors, or of the types that the case says."""
    tensors, ids = random_tensors(case), random_ids(case)
    for name, qtype in case.types.items():
        tensors[name] = gguf.dequantize(gguf.quantize(tensors[name], qtype), qtype)
    logits = hf_logits(case, tensors, ids)
    stored = reorder(case, tensors, pair_rows) if case.arch == "llama" else tensors
    if case.rope.get("rope_type") == "llama3":
        stored["rope_freqs.weight"] = rope_factors(case)
    write_gguf(folder / f"{case.name}.gguf", case, stored, case.types)
    save(folder, case.name, ids, logits)
    prove(case.name, *read_gguf(folder / f"{case.name}.gguf"), ids, logits)


def make_llama2c(folder: Path, version: int, case: Case) -> None:
    """A llama2.c checkpoint; v0 also as GGUF."""
    ids, path = random_ids(case), folder / f"{case.name}.bin"
    stored = reorder(case, random_tensors(case), pair_rows)
    seen = {name: dequantise_groups(w) for name, w in stored.items()} if version == 2 else stored
    logits = hf_logits(case, reorder(case, seen, unpair_rows), ids)
    write_llama2c(path, version, case, stored)
    save(folder, case.name, ids, logits)
    prove(case.name, read_llama2c(path), {}, ids, logits)
    if version == 0:
        write_gguf(path.with_suffix(".gguf"), case, stored, {})
        same = np.array_equal(forward(read_gguf(path.with_suffix(".gguf"))[0], ids), forward(read_llama2c(path), ids))
        if not same:
            sys.exit(f"{case.name}: the two containers hold different models")


def make_mixed(folder: Path, case: Case) -> None:
    """Quantised GGUFs whose layers differ in size and type; logits by forward() in float32, which the cases before this
    one have compared with transformers. q, k and v are once apart and once fused."""
    ids, tensors = random_ids(case), random_tensors(case)
    apart, fused = folder / f"{case.name}.gguf", folder / f"{case.name}_fused.gguf"
    write_gguf(apart, case, tensors, MIXED_TYPES)
    model, types = read_gguf(apart)
    logits = forward(model, ids, np.float32)
    save(folder, case.name, ids, logits)
    prove(case.name, model, types, ids, logits)

    joined, joined_types = dict(tensors), dict(MIXED_TYPES)
    for n in range(case.layers):
        parts = [f"blk.{n}.attn_{part}.weight" for part in "qkv"]
        joined[f"blk.{n}.attn_qkv.weight"] = np.concatenate([joined.pop(part) for part in parts])
        joined_types[f"blk.{n}.attn_qkv.weight"] = [joined_types.pop(part) for part in parts][0]
    write_gguf(fused, case, joined, joined_types)
    difference = np.abs(forward(read_gguf(fused)[0], ids) - forward(model, ids)).max()
    if difference > 1e-12:
        sys.exit(f"{fused.name}: differs from {apart.name} by {difference:.1e}")


def make_all(folder: Path) -> None:
    torch.set_num_threads(1)  # the same order of additions every time
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, numpy {np.__version__}")
    print("case          std   f32-f64   largest change of a logit when the feature is off or changed")
    for case in CASES:
        make_case(folder, case)
    for version, case in enumerate(LLAMA2C):
        make_llama2c(folder, version, case)
    write_tokenizer_bin(folder / "tokenizer.bin", LLAMA2C[0].vocab)
    make_mixed(folder, MIXED)
    make_quantised(folder)
    sizes = {path.name: path.stat().st_size for path in sorted(folder.iterdir())}
    print("\n".join(f"{size:8} {name}" for name, size in sizes.items() if not name.endswith(".ids")))
    print(f"{sum(sizes.values()):8} bytes in {len(sizes)} files")
    if sum(sizes.values()) > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES} bytes")


def check(made: Path, kept: Path) -> None:
    """Compares two folders: logits within F32_ERROR, everything else to the byte."""
    names = sorted(path.name for path in made.iterdir())
    others = {"chat.txt", "samplers.txt", "templates.jsonl", "tokens", "families"}  # made by other scripts
    if names != sorted({path.name for path in kept.iterdir()} - others):
        sys.exit(f"{kept}: other files than expected; wanted {' '.join(names)}")
    for name in names:
        new, old = (made / name).read_bytes(), (kept / name).read_bytes()
        if name.endswith(".logits") and len(new) == len(old):
            difference = np.abs(np.frombuffer(new, "<f4") - np.frombuffer(old, "<f4")).max()
            if not difference <= F32_ERROR:
                sys.exit(f"{kept / name}: differs by {difference:.1e}, more than {F32_ERROR}")
        elif new != old:
            sys.exit(f"{kept / name}: differs from what this script makes")
    print(f"{kept}: {len(names)} files as expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("-o", "--output", type=Path, default=GOLDEN, help="folder (default: tests/golden)")
    parser.add_argument("--check", action="store_true", help="write nothing; compare the folder")
    args = parser.parse_args()
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            make_all(Path(folder))
            check(Path(folder), args.output)
    else:
        args.output.mkdir(parents=True, exist_ok=True)
        make_all(args.output)


if __name__ == "__main__":
    main()
