#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torch>=2.4", "transformers>=5.0", "gguf>=0.17"]
# ///
"""Makes the models in tests/golden/families: one of each family beside those of make_goldens.py, and of each way to
scale the rotation, and their logits.

    python tests/make_family_goldens.py             writes tests/golden/families
    python tests/make_family_goldens.py --check     makes everything again and compares

As in make_goldens.py, NAME is NAME.gguf, NAME.ids and NAME.logits. The models are transformers' own, of random weights
that float16 can hold, which the file keeps them in; the logits are transformers' in float32; the GGUF files have
gguf-py's names of tensors and keys. A golden proves itself: each of its twins, which lack a feature of the family or
have another number for it, must differ by MIN_CHANGE in some logit.
"""
from __future__ import annotations

import argparse
import copy
import sys
import tempfile
from dataclasses import dataclass, field
from pathlib import Path

import gguf
import numpy as np
import torch
import transformers
from gguf import GGMLQuantizationType as QType

from make_goldens import CONTEXT, F32_ERROR, GOLDEN, MIN_CHANGE, TOKENS, pair_rows, save, spm_vocab

MAX_BYTES = 400_000  # of the folder
VOCAB = 37
PLAINLY = dict(attn_implementation="eager", experts_implementation="eager")
COMMON = dict(vocab_size=VOCAB, hidden_size=24, intermediate_size=20, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=CONTEXT, bos_token_id=1, eos_token_id=2, pad_token_id=None,
              tie_word_embeddings=True, rms_norm_eps=0.01)
NARROW = dict(hidden_size=16, intermediate_size=12, num_attention_heads=2, num_key_value_heads=1)  # for many layers


def rope(kind: str = "default", theta: float = 1e3, **more) -> dict:
    """Angles are unlike those of a program that does not read theta."""
    return {"rope_type": kind, "rope_theta": theta, **more}


ORIGINAL = 20  # positions before the rotation was scaled: TOKENS are more than twice as many
YARN = rope("yarn", factor=4.0, original_max_position_embeddings=ORIGINAL)
# With 8 pairs and theta 100, 1 and 1/4 turns of the original context are pairs 2.01 and 4.4: the ramp is from 2 to 5.
STEEP = YARN | rope("yarn", 100.0, beta_fast=1.0, beta_slow=0.25)
YARN_KEYS = {".rope.scaling.type": "yarn", ".rope.scaling.factor": 4.0,
             ".rope.scaling.original_context_length": ORIGINAL}
LONGROPE = rope("longrope", partial_rotary_factor=0.5, short_factor=[1.25, 2.0], long_factor=[2.0, 5.0])
SHORTER = 48  # an original context that TOKENS fit, smaller than CONTEXT


@dataclass(frozen=True)
class Case:
    """One model. `differs` is what its configuration has otherwise than COMMON; a twin has these on top."""
    config: str                                    # transformers' class, without its end
    arch: str                                      # GGUF's family
    differs: dict = field(default_factory=dict)
    keys: dict = field(default_factory=dict)       # that say so; of the family
    twins: list[dict] = field(default_factory=list)
    theta: float = 1e3


CASES = {
    "mistral": Case("Mistral", "llama", dict(sliding_window=7), {".attention.sliding_window": 7},
                    [dict(sliding_window=8), dict(sliding_window=6)]),
    "mistral_yarn": Case(
        "Mistral", "llama", dict(sliding_window=None, head_dim=16, num_attention_heads=2, num_key_value_heads=1,
                                 rope_parameters=STEEP | {"mscale": 1.0, "mscale_all_dim": 0.4}),
        YARN_KEYS | {".attention.key_length": 16, ".rope.scaling.yarn_beta_fast": 1.0,
                     ".rope.scaling.yarn_beta_slow": 0.25, ".rope.scaling.yarn_log_multiplier": 0.4},
        [dict(rope_parameters=STEEP), dict(rope_parameters=STEEP | {"beta_fast": 32.0}),
         dict(rope_parameters=STEEP | {"beta_slow": 1.0}), dict(rope_parameters=STEEP | {"factor": 3.0})], 100.0),
    "qwen2_window": Case(
        "Qwen2", "qwen2", NARROW | dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
        {".attention.sliding_window": 7, ".attention.sliding_window_pattern": [False, True]},
        [dict(max_window_layers=0), dict(max_window_layers=2), dict(sliding_window=8)]),
    "qwen3": Case("Qwen3", "qwen3", dict(head_dim=10), {".attention.key_length": 10}),
    "qwen3moe": Case(
        "Qwen3Moe", "qwen3moe", NARROW | dict(head_dim=8, num_experts=4, num_experts_per_tok=2, norm_topk_prob=True,
                                              moe_intermediate_size=10, mlp_only_layers=[]),
        {".attention.key_length": 8, ".expert_count": 4, ".expert_used_count": 2, ".expert_feed_forward_length": 10},
        [dict(num_experts_per_tok=1), dict(num_experts_per_tok=3), dict(norm_topk_prob=False)]),
    "phi3": Case("Phi3", "phi3", dict(sliding_window=9, tie_word_embeddings=False, intermediate_size=12),
                 {".attention.sliding_window": 9}, [dict(sliding_window=8)]),
    "phi3_long": Case(
        "Phi3", "phi3", NARROW | dict(rope_parameters=LONGROPE, original_max_position_embeddings=ORIGINAL),
        {".rope.dimension_count": 4, ".rope.scaling.original_context_length": ORIGINAL},
        [dict(rope_parameters=LONGROPE | {"long_factor": [1.25, 2.0]}), dict(rope_parameters=LONGROPE | {
            "attention_factor": 1.0}), dict(rope_parameters=rope(partial_rotary_factor=0.5))]),
    "phi3_short": Case(  # of its 64 positions 48 are to be used
        "Phi3", "phi3", NARROW | dict(rope_parameters=LONGROPE | {"attention_factor": 1.2},
                                      original_max_position_embeddings=SHORTER),
        {".rope.dimension_count": 4, ".rope.scaling.original_context_length": SHORTER,
         ".rope.scaling.attn_factor": 1.2},
        [dict(rope_parameters=LONGROPE | {"attention_factor": 1.2, "short_factor": [2.0, 5.0]}),
         dict(rope_parameters=LONGROPE)]),
    "granite": Case("Granite", "granite", dict(attention_multiplier=0.3, embedding_multiplier=3.0,
                                               residual_multiplier=0.7, logits_scaling=1.75),
                    {".attention.scale": 0.3, ".embedding_scale": 3.0, ".residual_scale": 0.7, ".logit_scale": 1.75},
                    [dict(attention_multiplier=6 ** -0.5), dict(embedding_multiplier=1.0),
                     dict(residual_multiplier=1.0), dict(logits_scaling=1.0)]),
    "smollm3": Case("SmolLM3", "smollm3", NARROW | dict(num_hidden_layers=5), {},
                    [dict(no_rope_layers=[1] * 5), dict(no_rope_layers=[1, 1, 1, 0, 0])]),
    "olmo2": Case("Olmo2", "olmo2"),
    "olmo3": Case(
        "Olmo3", "olmo2", NARROW | dict(num_hidden_layers=5, sliding_window=9, rope_parameters={
            "full_attention": YARN, "sliding_attention": rope()}), YARN_KEYS | {".attention.sliding_window": 9},
        [dict(sliding_window=10), dict(rope_parameters={"full_attention": rope(), "sliding_attention": rope()}),
         dict(rope_parameters={"full_attention": YARN, "sliding_attention": YARN}),
         dict(rope_parameters={"full_attention": YARN | {"attention_factor": 1.0}, "sliding_attention": rope()}),
         dict(layer_types=["sliding_attention"] * 5), dict(layer_types=["sliding_attention"] * 3 + [
             "full_attention"] * 2)]),
    "stablelm": Case(
        "StableLm", "stablelm", dict(num_attention_heads=3, num_key_value_heads=1, use_qkv_bias=True,
                                     layer_norm_eps=0.01, rope_parameters=rope(partial_rotary_factor=0.5)),
        {".rope.dimension_count": 4, ".use_parallel_residual": False},
        [dict(rope_parameters=rope(partial_rotary_factor=1.0)), dict(rope_parameters=rope(partial_rotary_factor=0.25)),
         dict(layer_norm_eps=1e-5)]),
    "gemma2": Case(
        "Gemma2", "gemma2", dict(head_dim=8, query_pre_attn_scalar=8, sliding_window=9, num_hidden_layers=3,
                                 attn_logit_softcapping=5.0, final_logit_softcapping=6.0, intermediate_size=12),
        {".attention.key_length": 8, ".attention.value_length": 8, ".attention.sliding_window": 9,
         ".attn_logit_softcapping": 5.0, ".final_logit_softcapping": 6.0},
        [dict(sliding_window=10), dict(attn_logit_softcapping=None), dict(final_logit_softcapping=None),
         dict(query_pre_attn_scalar=6), dict(hidden_activation="silu"), dict(layer_types=["sliding_attention"] * 3)]),
    "gemma3": Case(
        "Gemma3Text", "gemma3", NARROW | dict(
            head_dim=8, query_pre_attn_scalar=10, sliding_window=9, num_hidden_layers=7, rope_parameters={
                "full_attention": rope("linear", factor=8.0), "sliding_attention": rope(theta=1e4)}),
        {".attention.key_length": 8, ".attention.value_length": 8, ".attention.sliding_window": 9,
         ".attention.scale": 10 ** -0.5, ".rope.scaling.type": "linear", ".rope.scaling.factor": 8.0},
        [dict(sliding_window=10), dict(query_pre_attn_scalar=8), dict(layer_types=["sliding_attention"] * 7),
         dict(layer_types=["sliding_attention"] * 5 + ["full_attention"] * 2),
         dict(rope_parameters={"full_attention": rope("linear", factor=8.0), "sliding_attention": rope()}),
         dict(rope_parameters={"full_attention": rope(), "sliding_attention": rope(theta=1e4)}),
         dict(rope_parameters={"full_attention": rope("linear", factor=8.0), "sliding_attention": rope(
             "linear", 1e4, factor=8.0)})]),
}
PAIRED = {"llama", "granite", "smollm3"}  # GGUF has their rows of q and k in pairs


# ==== Models ====

def parameters(network) -> list[tuple[str, torch.Tensor]]:
    """By name, so that they do not depend on their order in a version of transformers."""
    return sorted(network.named_parameters())


def is_gemma(network) -> bool:
    return "gemma" in network.config.model_type  # its norms' weights are added to 1


def make_network(case: Case, **more):
    """Weights N(0, 0.3^2), norms around 1."""
    made = copy.deepcopy(COMMON | dict(rope_parameters=rope()) | case.differs | more)  # transformers writes into it
    config = getattr(transformers, case.config + "Config")(**made)
    network = getattr(transformers, case.config.removesuffix("Text") + "ForCausalLM")._from_config(config, **PLAINLY)
    rng = np.random.RandomState(1)  # its stream is frozen
    with torch.no_grad():
        for key, p in parameters(network.eval()):
            around = 1.0 if "norm" in key and key.endswith("weight") and not is_gemma(network) else 0.0
            w = (around + 0.3 * rng.standard_normal(p.shape)).astype(np.float16)
            p.copy_(torch.from_numpy(w.astype(np.float32)))
    return network


def logits_of(network, ids: np.ndarray) -> np.ndarray:
    """float32      ids (T)   out (T, VOCAB)"""
    with torch.no_grad():
        return network(torch.from_numpy(ids)[None], use_cache=False).logits[0].numpy()


def without_norms(network, kind: str, ending: str) -> None:
    for key, p in parameters(network):
        if key.endswith(f"{kind}.{ending}"):
            p.fill_(1.0 if ending == "weight" and not is_gemma(network) else 0.0)


def unpaired(network) -> None:
    """Rows of q and k as if other numbers of a head were rotated together."""
    config, size = network.config, 0
    for key, p in parameters(network):
        if "self_attn.q_proj.weight" in key or "qkv_proj" in key:
            size = getattr(config, "head_dim", None) or config.hidden_size // config.num_attention_heads
            rows = p[:config.num_attention_heads * size]
            rows.copy_(torch.from_numpy(pair_rows(rows.numpy().copy(), config.num_attention_heads)))
    assert size


def rolled(network, name: str) -> None:
    for key, p in parameters(network):
        if name in key:
            p.copy_(p.roll(1, 0))


def twins(case: Case):
    """(what differs, a model that differs so)"""
    for twin in case.twins:
        yield " ".join(f"{key}={value}" for key, value in twin.items()), make_network(case, **twin)
    if "layer_norm_eps" not in case.differs:
        yield "eps", make_network(case, rms_norm_eps=1e-5)
    if "rope_parameters" not in case.differs:
        yield "theta", make_network(case, rope_parameters=rope(theta=1e4))
    changes = [("pairing", unpaired, ())]
    plain = make_network(case)
    for kind in sorted({tuple(key.split(".")[-2:]) for key, _ in parameters(plain) if "norm" in key or "bias" in key}):
        changes.append((".".join(kind), without_norms, kind))
    if any("experts" in key for key, _ in parameters(plain)):
        changes += [(name, rolled, (name,)) for name in ("mlp.gate.weight", "gate_up_proj", "down_proj")]
    if is_gemma(plain):
        changes.append(("embedding's scale", lambda network: network.model.embed_tokens.embed_scale.fill_(1.0), ()))
    for what, change, more in changes:
        network = make_network(case)
        with torch.no_grad():
            change(network, *more)
        yield what, network


def prove(name: str, case: Case, ids: np.ndarray, logits: np.ndarray) -> None:
    assert np.abs(logits).max() < 30, "larger than what 2^-24 of it allows"
    print(f"{name}: logits of spread {logits.std():.2f}, which change by")
    for what, network in twins(case):
        change = np.abs(logits_of(network, ids) - logits).max()
        print(f"    {change:8.2g}  {what}")
        if not change >= MIN_CHANGE:
            sys.exit(f"{name}: {what} changes the logits by {change:.1e} only, wanted {MIN_CHANGE}")


# ==== Files ====

def tensors_of(case: Case, network):
    """GGUF's name and the numbers of each tensor."""
    config = network.config
    arch = next(arch for arch, name in gguf.MODEL_ARCH_NAMES.items() if name == case.arch)
    names = gguf.get_tensor_name_map(arch, config.num_hidden_layers)
    for key, p in parameters(network):
        w = p.detach().numpy()
        if "norm" in key and is_gemma(network):
            w = w + np.float32(1)
        if case.arch in PAIRED and (".q_proj." in key or ".k_proj." in key):
            w = pair_rows(w, config.num_attention_heads if ".q_proj." in key else config.num_key_value_heads)
        if ".experts." in key:  # which have no name of their own; gate and up are one tensor
            block, part = f"blk.{key.split('.')[2]}.ffn", key.split(".")[-1]
            halves = {"gate": w[:, :w.shape[1] // 2], "up": w[:, w.shape[1] // 2:]} if "gate" in part else {"down": w}
            yield from ((f"{block}_{name}_exps.weight", half) for name, half in halves.items())
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        assert name, key
        yield name, w
    for side in ("long", "short"):
        if factors := network.config.rope_parameters.get(f"{side}_factor"):
            yield f"rope_factors_{side}.weight", np.array(factors, np.float32)


def write_gguf(path: Path, case: Case, network) -> None:
    config = network.config
    writer = gguf.GGUFWriter(path, case.arch)
    writer.add_context_length(CONTEXT)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    if case.arch == "stablelm":
        writer.add_layer_norm_eps(config.layer_norm_eps)
    else:
        writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_freq_base(case.theta)
    kinds = {bool: writer.add_bool, int: writer.add_uint32, float: writer.add_float32, str: writer.add_string,
             list: writer.add_array}
    for key, value in case.keys.items():
        kinds[type(value)](case.arch + key, value)
    pieces, scores, types = spm_vocab(VOCAB)
    writer.add_tokenizer_model("llama")
    writer.add_token_list(pieces)
    writer.add_token_scores(scores)
    writer.add_token_types(types)
    for name, w in tensors_of(case, network):
        writer.add_tensor(name, np.ascontiguousarray(w if w.ndim == 1 else w.astype(np.float16)))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def make_all(folder: Path) -> None:
    torch.set_num_threads(1)  # the same order of additions every time
    transformers.logging.set_verbosity_error()
    ids = np.random.RandomState(7).randint(0, VOCAB, TOKENS)
    for name, case in CASES.items():
        network = make_network(case)
        logits = logits_of(network, ids)
        prove(name, case, ids, logits)
        write_gguf(folder / f"{name}.gguf", case, network)
        save(folder, name, ids, logits)
    n = sum(path.stat().st_size for path in folder.iterdir())
    print(f"{n} bytes")
    if n > MAX_BYTES:
        sys.exit(f"more than {MAX_BYTES} bytes")


def check(made: Path, kept: Path) -> None:
    names = sorted(path.name for path in made.iterdir())
    if names != sorted(path.name for path in kept.iterdir()):
        sys.exit(f"{kept}: other files than expected; wanted {' '.join(names)}")
    for name in names:
        new, old = (made / name).read_bytes(), (kept / name).read_bytes()
        if name.endswith(".logits") and len(new) == len(old):
            difference = np.abs(np.frombuffer(new, "<f4") - np.frombuffer(old, "<f4")).max()
            if not difference <= F32_ERROR:
                sys.exit(f"{kept / name}: differs by {difference:.1e}")
        elif new != old:
            sys.exit(f"{kept / name}: differs from what this script makes")
    print(f"{kept}: {len(names)} files as expected")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--check", action="store_true", help="write nothing; compare the folder")
    args = parser.parse_args()
    kept = GOLDEN / "families"
    if args.check:
        with tempfile.TemporaryDirectory() as folder:
            make_all(Path(folder))
            check(Path(folder), kept)
    else:
        kept.mkdir(parents=True, exist_ok=True)
        make_all(kept)


if __name__ == "__main__":
    main()
