#!/usr/bin/env python3
# /// script
# requires-python = ">=3.10"
# dependencies = ["numpy>=1.26", "torch>=2.4", "transformers>=5.0", "gguf>=0.17", "tokenizers>=0.20",
#                 "sentencepiece", "protobuf", "safetensors"]
# ///
"""Tests of export_model.py.

    python tests/test_export.py              all; needs ./run, which make builds
    python tests/test_export.py NAME         those whose names contain NAME

Tiny random models of every family are made with transformers, exported, and read back with gguf-py; where the C program
has the family, its logits from GGUF and from native files are compared with transformers' in float32. The weights are
larger than usual, so that every feature moves the logits. LoRA is compared with PEFT's merge if that is installed.
"""
from __future__ import annotations

import base64
import contextlib
import io
import json
import math
import struct
import subprocess
import sys
import tempfile
from pathlib import Path

import gguf
import numpy as np
import tokenizers
import torch
import transformers
from safetensors.torch import load_file, save, save_file
from tokenizers import Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

ROOT = Path(__file__).resolve().parent.parent
sys.path[:0] = [str(ROOT), str(ROOT / "tests")]
import export_model  # noqa: E402
from make_unicode import CASED  # noqa: E402

RUN = ROOT / "run"
TOKENS = 45          # not a multiple of any tile or batch
TOLERANCE = 2e-4     # of a logit
VOCAB = 320
PLAINLY = {"attn_implementation": "eager", "experts_implementation": "eager"}  # others want widths of certain multiples
torch.set_num_threads(1)
transformers.logging.set_verbosity_error()
transformers.utils.logging.disable_progress_bar()


# ==== Tiny models ====

COMMON = dict(vocab_size=VOCAB, hidden_size=64, intermediate_size=96, num_hidden_layers=2, num_attention_heads=4,
              num_key_value_heads=2, max_position_embeddings=128, bos_token_id=0, eos_token_id=1, pad_token_id=None,
              tie_word_embeddings=False)
LLAMA3 = {"rope_type": "llama3", "rope_theta": 1e4, "factor": 8.0, "low_freq_factor": 1.0, "high_freq_factor": 4.0,
          "original_max_position_embeddings": 64}
ORIGINAL = 20  # the context before the rotation was scaled: TOKENS is more than twice as many
YARN = {"rope_type": "yarn", "rope_theta": 1e4, "factor": 4.0, "original_max_position_embeddings": ORIGINAL}
LONGROPE = {"rope_type": "longrope", "rope_theta": 1e4, "original_max_position_embeddings": ORIGINAL,
            "short_factor": [1 + i / 4 for i in range(4)], "long_factor": [2 + i for i in range(4)]}
GEMMA_LINEAR = {"full_attention": {"rope_type": "linear", "rope_theta": 1e6, "factor": 8.0},
                "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
QWEN3_MOE = dict(num_experts_per_tok=2, head_dim=16, norm_topk_prob=True, mlp_only_layers=[])
YARN_FULL = {"full_attention": YARN, "sliding_attention": {"rope_type": "default", "rope_theta": 1e4}}
# name -> transformers' configuration class, what differs from COMMON, and GGUF keys that must be there
CASES = {
    "llama": ("Llama", {}, {"rope.dimension_count": 16}),
    "llama tied": ("Llama", dict(tie_word_embeddings=True), {}),
    "llama bias": ("Llama", dict(attention_bias=True, mlp_bias=True), {}),
    "llama head_dim": ("Llama", dict(head_dim=24), {"attention.key_length": 24}),
    "llama linear": ("Llama", dict(rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}),
                     {"rope.scaling.type": "linear", "rope.scaling.factor": 4.0}),
    "llama llama3": ("Llama", dict(rope_parameters=LLAMA3), {}),
    "llama yarn": ("Llama", dict(rope_parameters=YARN), {"rope.scaling.type": "yarn", "rope.scaling.factor": 4.0,
                                                         "rope.scaling.original_context_length": ORIGINAL}),
    "llama longrope": ("Llama", dict(rope_parameters=LONGROPE, num_attention_heads=8, tie_word_embeddings=True),
                       {"rope.scaling.type": "longrope", "rope.scaling.original_context_length": ORIGINAL,
                        "rope.scaling.attn_factor": (1 + math.log(128 / ORIGINAL) / math.log(ORIGINAL)) ** 0.5}),
    "mistral yarn": ("Mistral", dict(sliding_window=11, rope_parameters=YARN | {"mscale": 1.0, "mscale_all_dim": 0.4}),
                     {"rope.scaling.attn_factor": 1 / (1 + 0.04 * math.log(4))}),
    "qwen2 yarn": ("Qwen2", dict(num_attention_heads=2, rope_parameters=YARN | {
        "attention_factor": 1.3, "beta_fast": 1.0, "beta_slow": 0.25}),
                   {"rope.scaling.attn_factor": 1.3 / (1 + 0.1 * math.log(4)), "rope.scaling.yarn_beta_slow": 0.25}),
    "mistral": ("Mistral", dict(sliding_window=None), {}),
    "mistral window": ("Mistral", dict(sliding_window=7), {"attention.sliding_window": 7}),
    "mixtral": ("Mixtral", dict(num_local_experts=4, num_experts_per_tok=2),
                {"expert_count": 4, "expert_used_count": 2}),
    "mixtral odd": ("Mixtral", dict(num_local_experts=5, num_experts_per_tok=3, intermediate_size=40,
                                    tie_word_embeddings=True), {"expert_count": 5, "expert_used_count": 3}),
    "qwen2": ("Qwen2", {}, {}),
    "qwen2 tied": ("Qwen2", dict(tie_word_embeddings=True), {}),
    "qwen2 window": ("Qwen2", dict(use_sliding_window=True, sliding_window=7, max_window_layers=1),
                     {"attention.sliding_window": 7, "attention.sliding_window_pattern": [False, True]}),
    "qwen3": ("Qwen3", dict(head_dim=24), {"attention.key_length": 24}),
    "qwen3_moe": ("Qwen3Moe", QWEN3_MOE | dict(num_experts=4, moe_intermediate_size=48, tie_word_embeddings=True),
                  {"expert_count": 4, "expert_used_count": 2, "expert_feed_forward_length": 48}),
    "qwen3_moe odd": ("Qwen3Moe", QWEN3_MOE | dict(num_experts=7, moe_intermediate_size=37),
                      {"expert_count": 7, "expert_used_count": 2, "expert_feed_forward_length": 37}),
    "phi3": ("Phi3", dict(sliding_window=9), {"attention.sliding_window": 9}),
    "phi3 longrope": ("Phi3", dict(rope_parameters=LONGROPE | {"partial_rotary_factor": 0.5, "attention_factor": 1.2},
                                   original_max_position_embeddings=ORIGINAL),
                      {"rope.dimension_count": 8, "rope.scaling.original_context_length": ORIGINAL,
                       "rope.scaling.attn_factor": 1.2}),
    "granite": ("Granite", dict(attention_multiplier=0.3, embedding_multiplier=3.0, residual_multiplier=0.7,
                                logits_scaling=1.75),
                {"attention.scale": 0.3, "embedding_scale": 3.0, "residual_scale": 0.7, "logit_scale": 1.75}),
    "smollm3": ("SmolLM3", dict(num_hidden_layers=5), {}),
    "olmo2": ("Olmo2", {}, {}),
    "olmo2 tied": ("Olmo2", dict(tie_word_embeddings=True), {}),
    "olmo3": ("Olmo3", dict(sliding_window=9, num_hidden_layers=5), {"attention.sliding_window": 9}),
    "olmo3 yarn": ("Olmo3", dict(sliding_window=30, num_hidden_layers=4, rope_parameters=YARN_FULL),
                   {"attention.sliding_window": 30, "rope.scaling.type": "yarn"}),
    "stablelm": ("StableLm", dict(use_qkv_bias=True), {"use_parallel_residual": False, "rope.dimension_count": 4}),
    "stablelm tied": ("StableLm", dict(rope_parameters={"rope_theta": 1e4, "partial_rotary_factor": 0.5},
                                       tie_word_embeddings=True, hidden_size=80, layer_norm_eps=1e-3),
                      {"attention.layer_norm_epsilon": 1e-3}),
    "stablelm 12b": ("StableLm", dict(qk_layernorm=True, use_parallel_residual=True), {"use_parallel_residual": True}),
    "gemma2": ("Gemma2", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=9, attn_logit_softcapping=5.0,
                              final_logit_softcapping=6.0, tie_word_embeddings=True, num_hidden_layers=4),
               {"attention.sliding_window": 9, "attn_logit_softcapping": 5.0, "final_logit_softcapping": 6.0}),
    "gemma3": ("Gemma3Text", dict(head_dim=16, query_pre_attn_scalar=10, sliding_window=9, tie_word_embeddings=True,
                                  num_hidden_layers=7),
               {"attention.sliding_window": 9, "rope.freq_base_swa": 1e4, "rope.freq_base": 1e6,
                "attention.scale": 10 ** -0.5}),
    "gemma3 linear": ("Gemma3Text", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=9, num_hidden_layers=7,
                                         tie_word_embeddings=True, rope_parameters=GEMMA_LINEAR),
                      {"rope.scaling.type": "linear", "rope.scaling.factor": 8.0, "rope.freq_base_swa": 1e4}),
    "gemma3 pattern": ("Gemma3Text", dict(head_dim=16, query_pre_attn_scalar=16, sliding_window=9, num_hidden_layers=2,
                                          layer_types=["full_attention", "sliding_attention"],
                                          tie_word_embeddings=True),
                       {"attention.sliding_window_pattern": [False, True]}),
}
# What the C program does not open yet, and the word by which it says so.
UNOPENED = {"stablelm 12b": "use_parallel_residual = true, qk_layernorm = true, "}
BY_PROGRAM = [case for case in CASES if case not in UNOPENED]


def make_network(case: str, **more):
    """A random model: weights of spread 0.15, norms around 1."""
    name, differs, _ = CASES[case]
    config = getattr(transformers, name + "Config")(**(COMMON | differs | more))
    torch.manual_seed(1)
    network = getattr(transformers, name.removesuffix("Text") + "ForCausalLM")._from_config(
        config, **PLAINLY).eval()
    with torch.no_grad():
        for key, p in network.named_parameters():
            p.normal_(0, 0.3 if key.endswith("bias") or "norm" in key else 0.15)
            if "norm" in key and not key.endswith("bias") and "gemma" not in config.model_type:
                p.add_(1)
    return network


def byte_tokenizer() -> Tokenizer:
    """Byte-level BPE: two special tokens, the bytes, some merges."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    merges = [("\u0120", "t"), ("h", "e"), ("\u0120t", "he"), ("i", "n"), ("a", "n"), ("\u0120", "a")]
    tokens = ["<|begin|>", "<|end|>", *alphabet, *("".join(m) for m in merges)]
    tokenizer = Tokenizer(models.BPE({t: i for i, t in enumerate(tokens)}, merges))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|begin|>", "<|end|>"])
    tokenizer.add_tokens(["<tool>"])
    tokenizer.post_processor = processors.TemplateProcessing(single="<|begin|> $A", pair="<|begin|> $A $B",
                                                             special_tokens=[("<|begin|>", 0)])
    return tokenizer


def save_tokenizer(folder: Path) -> None:
    byte_tokenizer().save(str(folder / "tokenizer.json"))
    config = {"bos_token": "<|begin|>", "eos_token": {"content": "<|end|>"}, "tokenizer_class": "PreTrainedTokenizer"}
    (folder / "tokenizer_config.json").write_text(json.dumps(config))
    (folder / "chat_template.jinja").write_text("{{ messages }}")


def save_model(folder: Path, network, dtype: torch.dtype = torch.float32) -> Path:
    network.to(dtype).save_pretrained(folder)
    network.to(torch.float32)
    save_tokenizer(folder)
    return folder


IDS = np.random.default_rng(7).integers(0, VOCAB, TOKENS)


def reference(network, n: int = TOKENS) -> np.ndarray:
    """transformers' logits of the first n of IDS      out (n, VOCAB)"""
    with torch.no_grad():
        return network(torch.tensor(IDS[None, :n])).logits[0].float().numpy()


# ==== Helpers ====

passed = failed = 0


def check(what: str, holds: bool, more: str = "") -> None:
    global passed, failed
    if holds:
        passed += 1
    else:
        failed += 1
        print(f"    FAILED {what} {more}")


def export(*words) -> tuple[int, str]:
    """Exit status and stderr."""
    with contextlib.redirect_stderr(io.StringIO()) as stderr:
        try:
            status = export_model.main([str(w) for w in words])
        except SystemExit as leaving:
            status = leaving.code
    return status, stderr.getvalue()


def exported(*words) -> str:
    status, stderr = export(*words)
    check(" ".join(map(str, words)), status == 0, stderr)
    return stderr


def run_logits(path: Path, n: int = TOKENS, *more, exact: bool = True) -> np.ndarray:
    """The C program's, of the first n of IDS      out (n, VOCAB)"""
    out, ids = path.with_suffix(".logits"), " ".join(map(str, IDS[:n]))
    more = [*(["--exact"] if exact else []), *map(str, more)]
    subprocess.run([RUN, path, "-m", "logits", "--ids", ids, "-o", out, *more], check=True)
    return np.fromfile(out, "<f4").reshape(n, -1)


def check_logits(what: str, got: np.ndarray, wanted: np.ndarray, tolerance: float = TOLERANCE) -> None:
    difference = np.abs(got - wanted).max()
    same = (got.argmax(1) == wanted.argmax(1)).sum()
    print(f"  {what:44} max difference {difference:.1e} of {np.abs(wanted).max():5.1f}, top-1 {same}/{len(wanted)}")
    check(what, difference <= tolerance and same == len(wanted), f"{difference}")


def gguf_tensors(path: Path) -> dict[str, np.ndarray]:
    return {t.name: t for t in gguf.GGUFReader(path).tensors}


def same_weights(a: Path, b: Path) -> bool:
    first, second = gguf_tensors(a), gguf_tensors(b)
    return first.keys() == second.keys() and all(
        t.tensor_type == second[n].tensor_type and np.array_equal(t.data, second[n].data) for n, t in first.items())


# ==== Tests ====

def test_families(folder: Path) -> None:
    """Each family: the C program's logits from GGUF and native files against transformers'; keys by gguf-py."""
    for case, (_, _, keys) in CASES.items():
        network = make_network(case)
        wanted, source = reference(network), save_model(folder / case, network)
        made = folder / f"{case}.gguf"
        stderr = exported(source, "-o", made, "--to", "gguf")
        check(f"{case}: verified", "verified on" in stderr, stderr)
        fields = gguf.GGUFReader(made).fields
        arch = fields["general.architecture"].contents()
        for key, value in keys.items():
            got = fields[f"{arch}.{key}"].contents() if f"{arch}.{key}" in fields else None
            check(f"{case}: {key}", got is not None and np.allclose(got, value, 1e-6) if not isinstance(value, str)
                  else got == value, f"is {got}, expected {value}")
        native = folder / f"{case}.bin"
        if case in UNOPENED:
            status, stderr = export(source, "-o", native)
            check(f"{case}: native is refused", status == 1 and stderr.count("\n") == 1 and UNOPENED[case] in stderr
                  and not native.exists(), stderr)
            continue
        exported(source, "-o", native)
        check_logits(f"{case}: the C program, gguf", run_logits(made), wanted)
        check_logits(f"{case}: the C program, native", run_logits(native), wanted)
        exported(native, "-o", folder / f"{case} again.gguf", "--to", "gguf")
        check(f"{case}: native and back to GGUF", same_weights(made, folder / f"{case} again.gguf"))
        again = gguf.GGUFReader(folder / f"{case} again.gguf").fields
        lost = [key for key, f in fields.items() if key.startswith((arch, "tokenizer."))
                and key != "qwen3moe.feed_forward_length"  # of layers without experts, which there are none of
                and (key not in again or again[key].contents() != f.contents())]
        check(f"{case}: its keys", not lost, str(lost))
        check_halves(folder, case, network)


def check_halves(folder: Path, case: str, network) -> None:
    """The same in bf16: transformers, in float32, with weights that are rounded so."""
    with torch.no_grad():  # not the whole network, whose angles would be rounded too
        for p in network.parameters():
            p.copy_(p.bfloat16().float())
    wanted, source = reference(network), save_model(folder / f"{case} bf16", network, torch.bfloat16)
    exported(source, "-o", folder / "bf16.gguf", "--to", "gguf", "--no-verify")
    exported(source, "-o", folder / "bf16.bin", "--no-verify")
    for made in (folder / "bf16.gguf", folder / "bf16.bin"):
        check_logits(f"{case}: bf16{made.suffix}", run_logits(made), wanted)


def test_stablelm_12b(folder: Path) -> None:
    """What it has and the smaller ones have not, each and both: converted for llama.cpp, refused by the key's name for
    a native file, and by the C program in one line."""
    for name, keys in (("norms", ["qk_layernorm"]), ("parallel", ["use_parallel_residual"]),
                       ("both", ["use_parallel_residual", "qk_layernorm"])):
        network = make_network("stablelm", **dict.fromkeys(keys, True))
        check(f"{name}: it matters", np.abs(reference(network) - reference(make_network("stablelm"))).max() > 0.01)
        source, made = save_model(folder / name, network), folder / f"{name}.gguf"
        exported(source, "-o", made, "--to", "gguf")
        exported(made, "-o", folder / f"{name} again", "--to", "hf")
        check_logits(f"{name}: transformers, of the GGUF file", theirs(folder / f"{name} again"), reference(network))
        status, stderr = export(source, "-o", folder / "no.bin")
        check(f"{name}: the exporter", status == 1 and all(f"{key} = true" in stderr for key in keys)
              and stderr.count("\n") == 1 and stderr.count("= true") == len(keys), stderr)
        done = export_model.call(RUN, made, "-m", "inspect")
        check(f"{name}: the program", done.returncode == 1 and done.stderr.count("\n") == 1
              and ("ffn_norm.weight is missing" if "use_parallel_residual" in keys else "attn_k_norm.weight")
              in done.stderr, done.stderr)
    left = {p.name for p in folder.glob("no*")}
    check("no file is left", left == {"norms", "norms.gguf", "norms again"}, str(left))


def test_scaled_rotation(folder: Path) -> None:
    """LongRoPE has factors for short and for long texts: transformers chooses by the text's length, cria by -c, once.
    And each number of a scaling shows in the logits: else no test of it could fail."""
    for case in ("llama longrope", "phi3 longrope"):
        network = make_network(case)
        long, short = reference(network), reference(network, ORIGINAL)
        check(f"{case}: the two differ", np.abs(long[:ORIGINAL] - short).max() > 50 * TOLERANCE)
        source = save_model(folder / case, network)
        for form in ("gguf", "native"):
            made = folder / f"{case}.{form}"
            exported(source, "-o", made, "--to", form)
            for n, context, wanted in ((ORIGINAL, ORIGINAL, short), (5, ORIGINAL - 1, short[:5]), (TOKENS, 128, long),
                                       (TOKENS, TOKENS, long), (5, ORIGINAL + 1, long[:5])):
                check_logits(f"{case}: {n} tokens, -c {context}, {form}", run_logits(made, n, "-c", context), wanted)
    network = make_network("mistral yarn")  # the other way to say its magnitude; and to say another one
    model = export_model.open_source(save_model(folder / "mistral yarn", network), export_model.Choices())
    del model.keys["llama.rope.scaling.attn_factor"]
    types, made = {n: t.type for n, t in model.tensors.items()}, folder / "multiplier.gguf"
    model.keys["llama.rope.scaling.yarn_log_multiplier"] = export_model.f32(0.4)
    export_model.write_gguf(model, types, made)
    check_logits("mistral yarn: yarn_log_multiplier", run_logits(made), reference(network))
    exported(made, "-o", folder / "multiplier", "--to", "hf")
    check_logits("mistral yarn: yarn_log_multiplier, to a folder", theirs(folder / "multiplier"), reference(network))
    for key, value in (("attn_factor", 1.3), ("ext_factor", 0.5), ("beta_fast", 0), ("log_multiplier", -1)):
        kept = dict(model.keys)
        model.keys[f"llama.rope.scaling.yarn_{key}"] = export_model.f32(value)
        export_model.write_gguf(model, types, made)
        done = export_model.call(RUN, made, "-m", "inspect")
        check(f"yarn_{key} = {value} is refused", done.returncode == 1 and f"yarn_{key}" in done.stderr, done.stderr)
        model.keys = kept
    for case, key, value in (("llama yarn", "factor", 8.0), ("llama yarn", "original_max_position_embeddings", 99),
                             ("qwen2 yarn", "beta_fast", 9.0), ("qwen2 yarn", "beta_slow", 1.0),
                             ("qwen2 yarn", "attention_factor", 1.0), ("mistral yarn", "mscale", 2.0),
                             ("llama longrope", "attention_factor", 1.0)):
        rope = CASES[case][1]["rope_parameters"]
        other = make_network(case, rope_parameters=rope | {key: value})
        difference = np.abs(reference(other) - reference(make_network(case))).max()
        check(f"{case}: {key} matters", difference > 50 * TOLERANCE, f"{difference}")


def test_formats_of_folders(folder: Path) -> None:
    """Sharded safetensors and pytorch_model.bin give what one file of safetensors gives."""
    network = make_network("llama")
    whole = save_model(folder / "whole", network)
    network.save_pretrained(folder / "sharded", max_shard_size="100KB")
    save_tokenizer(folder / "sharded")
    (folder / "pickled").mkdir()
    (folder / "pickled/config.json").write_bytes((whole / "config.json").read_bytes())
    save_tokenizer(folder / "pickled")
    torch.save(network.state_dict(), folder / "pickled/pytorch_model.bin")
    check("several shards", len(list((folder / "sharded").glob("*.safetensors"))) > 2)
    for name in ("whole", "sharded", "pickled"):
        exported(folder / name, "-o", folder / f"{name}.gguf", "--to", "gguf")
        check(f"{name}: weights", same_weights(folder / f"{name}.gguf", folder / "whole.gguf"))


def test_fused_experts(folder: Path) -> None:
    """As transformers 5 has them in memory: all experts in one tensor, gate and up together."""
    for case, block, names in (("mixtral", "block_sparse_moe", ("w1", "w3", "w2")),
                               ("qwen3_moe", "mlp", ("gate_proj", "up_proj", "down_proj"))):
        source = save_model(folder / case, make_network(case))
        exported(source, "-o", folder / f"{case}.gguf", "--to", "gguf")
        tensors = load_file(source / "model.safetensors")
        for layer in range(2):
            prefix = f"model.layers.{layer}."
            parts = [torch.stack([tensors.pop(f"{prefix}{block}.experts.{e}.{n}.weight") for e in range(4)])
                     for n in names]
            tensors[f"{prefix}mlp.experts.gate_up_proj"] = torch.cat(parts[:2], 1)
            tensors[f"{prefix}mlp.experts.down_proj"] = parts[2]
            tensors[f"{prefix}mlp.gate.weight"] = tensors.pop(f"{prefix}{block}.gate.weight")
        save_file(tensors, source / "model.safetensors")
        exported(source, "-o", folder / f"{case} fused.gguf", "--to", "gguf")
        check(f"{case}: the same weights", same_weights(folder / f"{case}.gguf", folder / f"{case} fused.gguf"))


def test_experts_alone_and_together(folder: Path) -> None:
    """A token gets the same bits by itself and beside others that go to the same experts or to other ones."""
    for case, choice in (("mixtral", "f32"), ("mixtral", "q4"), ("qwen3_moe odd", "q8"), ("mixtral odd", "f16")):
        source = save_model(folder / f"{case} {choice}", make_network(case))
        made = [folder / f"{case} {choice}.{form}" for form in ("gguf", "native")]
        seen = set()
        for path in made:
            exported(source, "-o", path, "--to", path.suffix[1:], "--type", choice)
            for how in ("-b 1", "-b 1 -j 1", "-b 2 -j 1", "-b 7", "-b 45", "-b 64 -j 1", "-b 16 --kernel scalar"):
                out = path.with_suffix(".logits")
                subprocess.run([RUN, path, "-m", "logits", *how.split(), "--ids", " ".join(map(str, IDS)), "-o", out],
                               check=True)
                seen.add(out.read_bytes())
        check(f"{case} {choice}: the same bits", len(seen) == 1, f"{len(seen)} results")


def test_gemma3_that_sees(folder: Path) -> None:
    """Of a model with a vision tower, the part that reads and writes text."""
    source = save_model(folder / "model", make_network("gemma3 pattern"))
    exported(source, "-o", folder / "text.gguf", "--to", "gguf")
    config = json.loads((source / "config.json").read_text())
    outer = {"model_type": "gemma3", "architectures": ["Gemma3ForConditionalGeneration"], "text_config": config,
             "vision_config": {"hidden_size": 8}, "mm_tokens_per_image": 4}
    (source / "config.json").write_text(json.dumps(outer))
    tensors = {f"language_model.{n}": t for n, t in load_file(source / "model.safetensors").items()}
    save_file(tensors | {"vision_tower.x.weight": torch.zeros(3, 4)}, source / "model.safetensors")
    stderr = exported(source, "-o", folder / "seeing.gguf", "--to", "gguf")
    check("the same weights", same_weights(folder / "text.gguf", folder / "seeing.gguf"))
    check("it says so", "vision tower is left out" in stderr)


def test_round_trips(folder: Path) -> None:
    for dtype in (torch.float32, torch.bfloat16):
        for case in ("llama bias", "qwen2 tied"):
            network = make_network(case)
            name = f"{case} {dtype}"
            source = save_model(folder / name, network, dtype)
            exported(source, "-o", folder / f"{name}.bin")
            exported(folder / f"{name}.bin", "-o", folder / f"{name} again", "--to", "hf")
            before, after = (load_file(f / "model.safetensors") for f in (source, folder / f"{name} again"))
            check(f"{name}: native and back", before.keys() == after.keys() and all(
                t.dtype == after[n].dtype and torch.equal(t, after[n]) for n, t in before.items()))
            again = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{name} again", dtype=torch.float32,
                                                                      **PLAINLY).eval()
            check_logits(f"{name}: transformers on it", reference(again), run_logits(folder / f"{name}.bin"))
    golden = ROOT / "tests/golden"
    for name in ("mixed", "llama3_rope", "qwen2_untied", "mixtral"):
        exported(golden / f"{name}.gguf", "-o", folder / f"{name}.bin")
        exported(folder / f"{name}.bin", "-o", folder / f"{name}.gguf", "--to", "gguf")
        check(f"{name}: GGUF, native, GGUF", same_weights(golden / f"{name}.gguf", folder / f"{name}.gguf"))


def copy_gguf(source: Path, made: Path, change=lambda name, data: {name: data}, matrices=None, **how) -> None:
    """A GGUF written anew by gguf-py, in parts if `how` says so      change: a tensor -> those in its place
    matrices: the type of all matrices, if they are given another one"""
    reader = gguf.GGUFReader(source)
    writer = gguf.GGUFWriter(made, reader.fields["general.architecture"].contents(), **how)
    for key, field in reader.fields.items():
        if not key.startswith(("GGUF.", "general.architecture")):
            kind, item = field.types[0], field.types[-1] if len(field.types) > 1 else None
            writer.add_key_value(key, field.contents(), kind, item)
    for t in reader.tensors:
        for name, data in change(t.name, t.data).items():
            writer.add_tensor(name, data, raw_dtype=t.tensor_type if matrices is None or len(t.shape) < 2 else matrices)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()


def write_split(source: Path, made: Path, **how) -> list[Path]:
    copy_gguf(source, made, **how)
    return sorted(made.parent.glob(f"{made.stem}-*-of-*.gguf"))


def test_single_experts(folder: Path) -> None:
    """Files of a time when llama.cpp wrote a tensor for each expert: joined by export_model.py, refused by the program,
    which names that command."""
    def apart(name: str, data: np.ndarray) -> dict[str, np.ndarray]:
        single = {name.replace("_exps.", f".{e}."): x for e, x in enumerate(data)}
        return single if "_exps." in name else {name: data}
    for choice in ("f16", "q4"):
        source = save_model(folder / choice, make_network("mixtral"))
        now, old, again = (folder / f"{choice} {name}.gguf" for name in ("now", "old", "again"))
        exported(source, "-o", now, "--to", "gguf", "--type", choice)
        copy_gguf(now, old, apart)
        check(f"{choice}: single tensors", "blk.1.ffn_down.3.weight" in gguf_tensors(old))
        exported(old, "-o", again, "--to", "gguf")
        check(f"{choice}: the same weights", same_weights(now, again))
        exported(old, "-o", folder / f"{choice}.bin")
        check(f"{choice}: the same bits", np.array_equal(run_logits(folder / f"{choice}.bin"), run_logits(now)))
        done = export_model.call(RUN, old, "-m", "inspect")
        check(f"{choice}: run names the command", done.returncode == 1 and done.stderr.count("\n") == 1
              and "export_model.py FILE -o NEW" in done.stderr, done.stderr)
    for what, change in (("missing", lambda n, x: apart(n, x[1:] if "blk.1.ffn_up" in n else x)),
                         ("shape", lambda n, x: apart(n, x) | ({"blk.1.ffn_up.2.weight": x[2, :64]} if "blk.1.ffn_up_"
                                                               in n else {})),
                         ("twice", lambda n, x: apart(n, x) | {n: x})):
        copy_gguf(folder / "f16 now.gguf", folder / "bad.gguf", change)
        if what == "missing":
            damaged = (folder / "bad.gguf").read_bytes().replace(b"blk.1.ffn_up.0.w", b"blk.1.ffn_up.9.w")
            (folder / "bad.gguf").write_bytes(damaged)
        status, stderr = export(folder / "bad.gguf", "-o", folder / "no.gguf", "--to", "gguf")
        check(f"an expert: {what}", status == 1 and "an expert is missing" in stderr, stderr)


def test_split_files(folder: Path) -> None:
    """What gguf-py has split opens by any part, and makes the native file of the whole one, to the byte."""
    golden = ROOT / "tests/golden"
    for name, n_parts, how in (("mixed", 7, dict(split_max_tensors=3)), ("qwen2", 3, dict(split_max_size=31000)),
                               ("llama_tied", 3, dict(split_max_tensors=10, small_first_shard=True))):
        parts = write_split(golden / f"{name}.gguf", folder / f"{name}.gguf", **how)
        check(f"{name}: {n_parts} parts", len(parts) == n_parts, f"{len(parts)}")
        natives = []
        for source in (golden / f"{name}.gguf", *parts):
            made = folder / f"{source.name}.bin"
            done = export_model.call(RUN, source, "-m", "export", "-o", made)
            check(f"{source.name}: opens", done.returncode == 0, done.stderr)
            natives.append(made.read_bytes() if made.is_file() else b"")
        check(f"{name}: one native file", len(natives[0]) > 1000 and len(set(natives)) == 1)
        exported(parts[1], "-o", folder / f"{name} whole.gguf", "--to", "gguf")
        check(f"{name}: export_model.py", same_weights(golden / f"{name}.gguf", folder / f"{name} whole.gguf"))
    kept = parts[1].read_bytes()
    for damaged, word, of_run in (  # run tells part 1 in the place of part 2 by its tensors
            (None, "No such file", ["part 2: ", "No such file"]),
            (parts[0].read_bytes(), "says 20", ["key split.tensors.count says 20"]),
            (kept[:-40], "not copied whole", ["part 2: ", "not copied whole"])):
        parts[1].unlink()
        if damaged:
            parts[1].write_bytes(damaged)
        done = export_model.call(RUN, parts[0], "-m", "inspect")
        status, stderr = export(parts[0], "-o", folder / "no.gguf", "--to", "gguf")
        for what, words, code, text in (("run", of_run, done.returncode, done.stderr),
                                        ("export_model.py", [word], status, stderr)):
            check(f"{what}: {word}", code == 1 and all(w in text for w in words) and text.count("\n") == 1, text)
        parts[1].write_bytes(kept)


def test_native_types(folder: Path) -> None:
    """All types of blocks, most of which export_model does not make: from GGUF to native tiles and back."""
    save_model(folder / "model", make_network("llama", hidden_size=256, intermediate_size=512))
    rng = np.random.default_rng(6)
    # the highest bytes of weights or scales, which must be finite
    highest = {"f32": [3], "q2k": [81, 83], "q3k": [109], "q6k": [209], "mxfp4": [0]}
    highest |= dict.fromkeys(("q4m", "q5m", "q4k", "q5k"), [1, 3])
    for name, kind in export_model.TYPES.items():
        model = export_model.open_source(folder / "model", export_model.Choices())
        for key, tensor in list(model.tensors.items()):
            if len(tensor.shape) == 2:
                rows, n = tensor.shape[0], tensor.shape[1] // kind.cols * kind.n_bytes
                blocks = rng.integers(0, 256, (rows, n)).astype(np.uint8)
                blocks.reshape(-1, kind.n_bytes)[:, highest.get(name, [1])] &= 0xBF
                blocks = blocks.view(export_model.FLOATS.get(name, np.uint8))
                model.tensors[key] = export_model.Tensor(tensor.shape, name, lambda blocks=blocks: blocks)
        types = {key: t.type for key, t in model.tensors.items()}
        made, native, again = (folder / f"{name}{end}" for end in (".gguf", ".bin", " again.gguf"))
        export_model.write_gguf(model, types, made)
        exported(made, "-o", native, "--no-verify")
        exported(native, "-o", again, "--to", "gguf", "--no-verify")
        first, second = gguf_tensors(made), gguf_tensors(again)
        check(f"{name}: GGUF, native, GGUF", first.keys() == second.keys() and all(
            t.tensor_type == second[n].tensor_type and t.data.tobytes() == second[n].data.tobytes()
            for n, t in first.items()))


def test_back_to_transformers(folder: Path) -> None:
    """GGUF and native to a folder, whose config.json is made from the keys: transformers computes the same."""
    for case in CASES:
        wanted = reference(network := make_network(case))
        source = save_model(folder / case, network)
        for form in ("gguf", "native")[:1 + (case in BY_PROGRAM)]:
            made, again = folder / f"{case}.{form}", folder / f"{case} {form} again"
            exported(source, "-o", made, "--to", form)
            exported(made, "-o", again, "--to", "hf")
            loaded = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, **PLAINLY).eval()
            check_logits(f"{case}: transformers on the new folder, {form}", reference(loaded), wanted)


def test_types(folder: Path) -> None:
    network = make_network("llama")
    wanted, source = reference(network), save_model(folder / "model", network)
    limits = {"f16": 0.02, "bf16": 0.2, "q8": 0.3, "q4": 6, "q4m": 5, "mixed": 5}
    for name, limit in limits.items():
        stderr = exported(source, "-o", folder / f"{name}.bin", "--type", name, "--report")
        difference = np.abs(run_logits(folder / f"{name}.bin") - wanted).max()
        print(f"  {name:6} max difference {difference:.2e};{stderr.splitlines()[-1].split(';')[-1]}")
        check(f"{name}: error", difference < limit, f"{difference}")
        check(f"{name}: report", stderr.count("RMSE") == 16 and "verified" in stderr, stderr)
    exported(source, "-o", folder / "mixed.gguf", "--type", "mixed", "--to", "gguf")
    types = {n: t.tensor_type.name for n, t in gguf_tensors(folder / "mixed.gguf").items()}
    for name, kind in (("token_embd", "Q8_0"), ("output", "Q8_0"), ("blk.0.attn_v", "Q8_0"), ("blk.1.ffn_down", "Q8_0"),
                       ("blk.0.attn_q", "Q4_1"), ("blk.1.ffn_up", "Q4_1"), ("blk.0.attn_norm", "F32")):
        check(f"mixed: {name}", types[f"{name}.weight"] == kind, types[f"{name}.weight"])
    exported(source, "-o", folder / "q4.gguf", "--type", "q4", "--to", "gguf")
    exported(folder / "q4.gguf", "-o", folder / "kept.gguf", "--to", "gguf")
    check("q4 is kept", same_weights(folder / "q4.gguf", folder / "kept.gguf"))


def log_probabilities(network, chunks: torch.Tensor) -> torch.Tensor:
    """Of what follows the tokens of each chunk's second half      out f64 (chunks, T, VOCAB)"""
    with torch.no_grad():
        logits = network(chunks).logits[:, chunks.shape[1] // 2:-1]
    return torch.log_softmax(logits.double(), -1)


def test_calibration(folder: Path) -> None:
    """tests/calibrate.py: KL, perplexities and likeliest tokens over a text are transformers', of the source and of the
    rounded weights."""
    network = make_network("llama")
    source, text = save_model(folder / "model", network), folder / "text.txt"
    text.write_bytes((ROOT / "LICENSE").read_bytes()[:1200])
    ids = torch.tensor(byte_tokenizer().encode(text.read_text()).ids)
    chunks = ids[:len(ids) // 128 * 128].reshape(-1, 128)  # the model has 128 positions
    chunks[:, 0] = 0  # the begin token
    check("several chunks, and some of another", len(chunks) > 2 and len(ids) > chunks.numel(), f"{len(ids)}")
    p = log_probabilities(network, chunks)
    before = (-p.gather(2, chunks[:, 65:, None])).mean().exp()
    plain, said = folder / "plain.bin", [sys.executable, ROOT / "tests/calibrate.py"]
    exported(source, "-o", plain)

    def calibrated(*words) -> subprocess.CompletedProcess:
        return subprocess.run([*said, *map(str, words), "-c", "128"], capture_output=True, text=True)
    for form, choice in (("native", "q8"), ("gguf", "q4")):
        made = folder / f"{form}.made"
        exported(source, "-o", made, "--to", form, "--type", choice)
        done = calibrated(plain, made, "-f", text)
        lines = done.stdout.splitlines()
        check(f"{form}: calibrated", done.returncode == 0 and len(lines) == 2, done.stderr)
        exported(made, "-o", folder / f"{form} again", "--to", "hf")
        got = float(lines[1].split(" perplexity ")[1].split()[0])
        check(f"{form}: perplexity of the source", abs(got - before) <= TOLERANCE * before, f"{before} {lines}")
        done = export_model.call(RUN, made, "-m", "perplexity", "-f", text)
        after = done.stdout.split("PPL = ")[-1].split()[0]
        check(f"{form}: perplexity as by -m perplexity", f" -> {after}, " in lines[0], f"{done} {lines}")
        rounded = transformers.AutoModelForCausalLM.from_pretrained(folder / f"{form} again", dtype=torch.float32,
                                                                    **PLAINLY).eval()
        q = log_probabilities(rounded, chunks)
        kl, same = (p.exp() * (p - q)).sum(-1).mean(), (p.argmax(-1) == q.argmax(-1)).double().mean()
        print(f"  {form}, {choice}: KL {kl:.3e};{lines[0]};{lines[1]}")
        got = float(lines[1].split(" KL ")[1].split()[0])
        check(f"{form}: KL", abs(got - kl) <= 1e-3 * kl, f"{got} {kl}")  # as printed
        n, found = p[..., 0].numel(), float(lines[1].split("same top-1 ")[1].split("%")[0]) / 100
        check(f"{form}: same top-1", abs(found - same) <= 1.1 / n and lines[1].endswith(f" of {n}"), f"{same} {lines}")
        check(f"{form}: the line", lines[1].startswith("text.txt --exact"), f"{lines}")
    short = folder / "short.txt"
    short.write_text("too short")
    left = sorted(folder.iterdir())
    for words, word in (([plain, made, "-f", short], "less than one chunk of 128"),
                        ([plain, made, "-f", folder / "none"], "no such file"),
                        ([short, made, "-f", text], "not a model")):
        done = calibrated(*words)
        check(f"calibration: {word}", done.returncode == 2 and word in done.stderr and done.stderr.count("\n") == 1,
              done.stderr)
    check("no file is left", sorted(folder.iterdir()) == left)


META_PARTS = {"wq": 0, "wk": 0, "wv": 0, "w1": 0, "w3": 0, "output": 0, "wo": 1, "w2": 1, "tok_embeddings": 1}


def meta_state(network) -> dict[str, torch.Tensor]:
    """A LLaMA's tensors as Meta names and orders them."""
    names = {v: k for k, v in export_model.META_NAMES.items()} | {v: k for k, v in export_model.META_WHOLE.items()}
    config, state = network.config, network.state_dict()
    out = {}
    for part in export_model.model_parts(export_model.FAMILIES["llama"], config.num_hidden_layers):
        if part.hf in state:
            w = state[part.hf].numpy()
            heads = {"q": config.num_attention_heads, "k": config.num_key_value_heads}.get(part.move)
            if heads:  # rows of a head: 0, K/2, 1, K/2+1, ...
                K = len(w) // heads
                order = np.arange(K).reshape(2, K // 2).T.ravel()
                w = w.reshape(heads, K, -1)[:, order].reshape(w.shape)
            layer, _, rest = part.gguf.removeprefix("blk.").partition(".")
            out[f"layers.{layer}.{names[rest]}" if layer.isdigit() else names[part.gguf]] = torch.tensor(w)
    return out


def save_meta(folder: Path, state: dict, n_parts: int, embedding_axis: int = 1, **params) -> None:
    folder.mkdir()
    for i in range(n_parts):
        part = {}
        for name, w in state.items():
            kind = name.split(".")[-2]
            axis = META_PARTS.get(kind)
            axis = embedding_axis if kind == "tok_embeddings" else axis
            part[name] = w if axis is None else w.chunk(n_parts, axis)[i].clone()
        torch.save(part, folder / f"consolidated.{i:02}.pth")
    (folder / "params.json").write_text(json.dumps(params))


def train_sentencepiece(folder: Path, size: int, **options) -> Path:
    import sentencepiece
    text = [f"the {a} {b} of {c}, 12a" for a in ("sea", "moon", "ship") for b in ("east", "sun")
            for c in ("Zürich", "Rome")]
    if size > 400:  # more letters than the small vocabulary has room for
        text += (ROOT / "LICENSE").read_text().split("\n")
    usual = dict(model_type="bpe", byte_fallback=True, normalization_rule_name="identity", add_dummy_prefix=True,
                 remove_extra_whitespaces=False, minloglevel=2, character_coverage=1.0)
    sentencepiece.SentencePieceTrainer.train(sentence_iterator=iter(text), model_prefix=str(folder / "tokenizer"),
                                             vocab_size=size, **(usual | options))
    return folder / "tokenizer.model"


def save_tiktoken(path: Path) -> None:
    """The bytes, then three merges."""
    tokens = [*(bytes([b]) for b in range(256)), b"he", b" t", b" the"]
    path.write_text("".join(f"{base64.b64encode(t).decode()} {i}\n" for i, t in enumerate(tokens)))


def test_meta(folder: Path) -> None:
    network = make_network("llama")
    wanted, state = reference(network), meta_state(network)
    params = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=-1, multiple_of=32, norm_eps=1e-6)
    vocabulary = train_sentencepiece(folder, VOCAB)
    for n, axis in ((1, 1), (2, 1), (4, 1), (2, 0)):
        name = f"meta {n} {axis}"
        save_meta(folder / name, state, n, axis, **params)
        exported(folder / name, "-o", folder / f"{name}.gguf", "--to", "gguf", "--tokenizer", vocabulary)
        check(f"{name}: the bits of one part", same_weights(folder / f"{name}.gguf", folder / "meta 1 1.gguf"))
    check_logits("meta: the C program", run_logits(folder / "meta 1 1.gguf"), wanted)
    save_meta(folder / "scaled", state, 2, 0, **params, use_scaled_rope=True, rope_theta=500000.0)
    save_tiktoken(folder / "scaled/tokenizer.model")
    status, stderr = export(folder / "scaled", "-o", folder / "scaled.bin")
    check("meta: a vocabulary that is too large", status == 1 and "vocab_size = 320" in stderr, stderr)


def test_tiktoken(folder: Path) -> None:
    """LLaMA 3's: merges worked out from ranks; its special tokens."""
    save_tiktoken(folder / "tokenizer.model")
    keys = export_model.tiktoken_keys(folder / "tokenizer.model", 600, True)
    tokens = keys["tokenizer.ggml.tokens"].data
    ranks = {bytes([b]): b for b in range(256)} | {b"bc": 256, b"ab": 257, b"abc": 258, b"abcd": 300, b"cd": 301}
    check("tiktoken: the last two parts", export_model.merge_of(b"abc", ranks) == (b"a", b"bc"))
    check("tiktoken: no way to it", export_model.merge_of(b"wxyz", ranks | {b"wxyz": 400}) is None)
    check("tiktoken: by earlier merges", export_model.merge_of(b"abcd", ranks) == (b"abc", b"d"))
    later = ranks | {b"xyz": 400, b"yz": 401}
    check("tiktoken: by a later merge", export_model.merge_of(b"xyz", later) == (b"x", b"yz"))
    check("tiktoken: merges", keys["tokenizer.ggml.merges"].data == ["h e", "\u0120 t", "\u0120t he"],
          str(keys["tokenizer.ggml.merges"].data))
    check("tiktoken: special", tokens[259] == "<|begin_of_text|>" and tokens[259 + 9] == "<|eot_id|>"
          and tokens[259 + 255] == "<|reserved_special_token_247|>", str(tokens[-90:-80]))


    path = folder / "llama4.model"
    path.write_text("".join(f"{base64.b64encode(i.to_bytes(3, 'big')).decode()} {i}\n" for i in range(200_000)))
    try:
        export_model.tiktoken_keys(path, 300_000, True)
        refused = ""
    except export_model.Refusal as refusal:
        refused = str(refusal)
    check("tiktoken: LLaMA 4's", "LLaMA 4" in refused, refused)


def test_tekken(folder: Path) -> None:
    """Mistral's: special tokens first, the merges of ranks, no more tokens than the model has."""
    network = make_network("mistral")
    source = save_model(folder / "model", network)
    for name in ("tokenizer.json", "tokenizer_config.json"):
        (source / name).unlink()
    tokens = [*(bytes([b]) for b in range(256)), b"he", b" t", b" the", *(b"%03d" % i for i in range(100))]
    content = {"config": {"pattern": export_model.PRE_TOKENIZERS["tekken"][0], "default_num_special_tokens": 30,
                          "version": "v3"},
               "vocab": [{"rank": i, "token_bytes": base64.b64encode(t).decode()} for i, t in enumerate(tokens)]}
    path = source / "tekken.json"
    path.write_text(json.dumps(content))
    exported(source, "-o", folder / "model.bin")
    for text, wanted in (("The the<s>", [1, 30 + ord("T"), 286, 288, *(30 + ord(c) for c in "<s>")]), ("aB", None)):
        got = tokenize(folder / "model.bin", text)
        wanted = wanted or [1, 30 + ord("a"), 30 + ord("B")]
        check(f"tekken: {text!r}", got == wanted, f"{got} {wanted}")
    keys = export_model.tekken_keys(path, VOCAB)
    names = keys["tokenizer.ggml.tokens"].data
    check("tekken: special", names[:4] == ["<unk>", "<s>", "</s>", "[INST]"] and names[29] == "<SPECIAL_29>"
          and len(names) == VOCAB and keys["tokenizer.ggml.add_bos_token"].data, str(names[:30]))
    named = content | {"special_tokens": [{"rank": 0, "token_str": "<unk>"}, {"rank": 1, "token_str": "<s>"},
                                          {"rank": 2, "token_str": "</s>"}, {"rank": 3, "token_str": "[NEW]"}]}
    others = [content | {"config": content["config"] | change} for change in ({"pattern": "\\S+"}, {"version": "v11"})]
    long = content | {"vocab": [{"rank": 0, "token_bytes": base64.b64encode(b"a" * 513).decode()}]}
    for change, word in ((named, "[NEW]"), (others[0], "\\S+"), (others[1], "v11"), ({"vocab": []}, "config"),
                         (long, "513 bytes, more than 512")):
        path.write_text(json.dumps(change))
        try:
            found = " ".join(export_model.tekken_keys(path, VOCAB)["tokenizer.ggml.tokens"].data[:5])
        except export_model.Refusal as refusal:
            found = str(refusal)
        check(f"tekken: {word}", word in found, found)


def test_nfc(folder: Path) -> None:
    """Whether a text is composed, tokenizer.json says, whatever is usual with its way to cut words: it is kept by the C
    program, in GGUF and in a folder made anew."""
    source = save_model(folder / "model", make_network("llama"))
    for name, rule in (("gpt-2", pre_tokenizers.ByteLevel(False)), ("qwen2", None)):
        for normalizer in (normalizers.NFC(), normalizers.Sequence([normalizers.NFC()]), None):
            theirs = byte_tokenizer()
            if normalizer:
                theirs.normalizer = normalizer
            regex = tokenizers.Regex(export_model.PRE_TOKENIZERS["qwen2"][0])
            theirs.pre_tokenizer = rule or pre_tokenizers.Sequence(
                [pre_tokenizers.Split(regex, "isolated"), pre_tokenizers.ByteLevel(False, use_regex=False)])
            theirs.save(str(source / "tokenizer.json"))
            made = [folder / f"model.{kind}" for kind in ("native", "gguf")]
            again = []
            for path in made:
                exported(source, "-o", path, "--to", path.suffix[1:])
                exported(path, "-o", folder / f"{name} {path.suffix} {normalizer}", "--to", "hf")
                again.append(Tokenizer.from_file(str(folder / f"{name} {path.suffix} {normalizer}/tokenizer.json")))
            pre = gguf.GGUFReader(made[1]).fields["tokenizer.ggml.pre"].contents()
            check(f"NFC: {name}", pre == name, pre)
            for text in ("e\u0301 \u1100\u1161\u11a8", "q\u0307\u0323", "\u212b\u0344"):
                wanted, plain = (t.encode(text).ids for t in (theirs, byte_tokenizer()))
                got = [tokenize(path, text) for path in made] + [t.encode(text).ids for t in again]
                check(f"NFC: {name}, {normalizer}, {text!r}", got == [wanted] * 4
                      and (wanted != plain) == bool(normalizer), f"{got} {wanted}")


def test_llama2c(folder: Path) -> None:
    network = make_network("llama")
    network.model.norm.variance_epsilon = 1e-5
    for layer in network.model.layers:
        layer.input_layernorm.variance_epsilon = layer.post_attention_layernorm.variance_epsilon = 1e-5
    wanted = reference(network)
    arguments = dict(dim=64, n_layers=2, n_heads=4, n_kv_heads=2, vocab_size=VOCAB, multiple_of=32, max_seq_len=128,
                     dropout=0.0)
    state = {f"_orig_mod.{n}": t for n, t in meta_state(network).items()}
    torch.save({"model": state, "model_args": arguments, "iter_num": 3}, folder / "model.pt")
    train_sentencepiece(folder, VOCAB)
    exported(folder / "model.pt", "-o", folder / "model.bin")
    check_logits("llama2.c .pt: native", run_logits(folder / "model.bin"), wanted)
    exported(folder / "model.bin", "-o", folder / "v0.bin", "--to", "llama2c")
    check_logits("llama2.c v0", run_logits(folder / "v0.bin"), wanted)
    exported(folder / "model.bin", "-o", folder / "v2.bin", "--to", "llama2c", "--type", "q8")
    check("llama2.c v2", 1e-4 < np.abs(run_logits(folder / "v2.bin") - wanted).max() < 0.3)
    text = "the moon of Zürich, 12a \u2603"
    ids = [tokenize(folder / name, text, *more) for name, *more in
           (("model.bin",), ("v0.bin", "-z", folder / "v0.tokenizer.bin"))]
    check("llama2.c: tokenizer.bin", ids[0] == ids[1], f"{ids}")
    exported(folder / "model.pt", "-o", folder / "again.bin", "--tokenizer", folder / "v0.tokenizer.bin")
    check("llama2.c: tokenizer.bin is read", tokenize(folder / "again.bin", text) == ids[0])


def test_lora(folder: Path) -> None:
    try:
        import peft
    except ImportError:
        return print("  skipped: peft is not installed")
    base = {"alpha": dict(r=4, lora_alpha=6, target_modules=["q_proj", "down_proj"]),
            "rslora": dict(r=4, lora_alpha=6, use_rslora=True, target_modules=["k_proj", "v_proj", "gate_proj"]),
            "patterns": dict(r=4, lora_alpha=6, target_modules=["q_proj", "k_proj", "up_proj"],
                             rank_pattern={"k_proj": 2, "layers.1.mlp.up_proj": 8}, alpha_pattern={"q_proj": 20})}
    for case in ("llama", "qwen2", "phi3"):
        save_model(folder / case, make_network(case))
        exported(folder / case, "-o", folder / f"{case}.gguf", "--to", "gguf")
        for name, options in base.items():
            if case == "phi3":
                options = options | {"target_modules": ["qkv_proj", "down_proj"]}
            network = peft.get_peft_model(make_network(case), peft.LoraConfig(**options))
            torch.manual_seed(4)
            with torch.no_grad():
                for key, p in network.named_parameters():
                    if "lora_" in key:
                        p.normal_(0, 0.1)
            network.save_pretrained(folder / f"{case} {name}")
            wanted = reference(network.merge_and_unload())
            for source in (folder / case, folder / f"{case}.gguf"):
                made = folder / f"{case} {name} {source.suffix}.gguf"
                exported(source, "--lora", folder / f"{case} {name}", "-o", made, "--to", "gguf")
                check_logits(f"{case}: LoRA {name} into {source.suffix or 'folder'}", run_logits(made), wanted)
    adapter = folder / "llama alpha/adapter_config.json"
    config = json.loads(adapter.read_text())
    for key, value in (("fan_in_fan_out", True), ("modules_to_save", ["lm_head"]), ("use_dora", True), ("bias", "all"),
                       ("something_new", 1)):
        adapter.write_text(json.dumps(config | {key: value}))
        status, stderr = export(folder / "llama", "--lora", folder / "llama alpha", "-o", folder / "no.bin")
        check(f"LoRA: {key} is refused", status == 1 and key in stderr and not (folder / "no.bin").exists(), stderr)


def test_modules_to_save(folder: Path) -> None:
    """What PEFT saved as a whole replaces the base's, as its merge_and_unload() does: both big matrices or one, which
    parts them where they were one; norms and a matrix with its bias; a longer vocabulary with the adapter's tokens."""
    try:
        import peft
    except ImportError:
        return print("  skipped: peft is not installed")
    both, few = ["embed_tokens", "lm_head"], ["norm", "k_proj"]
    for case, saved, rows in (("llama", both, 13), ("llama", few, 0), ("llama tied", both, 13), ("olmo2", both, 5),
                              ("llama tied", ["embed_tokens"], 0), ("qwen2 tied", ["lm_head"], 0), ("qwen2", few, 0),
                              ("gemma3", both + ["norm"], 7)):
        name = f"{case} {' '.join(saved)}"
        source = save_model(folder / f"{name} base", make_network(case))
        exported(source, "-o", folder / f"{name}.gguf", "--to", "gguf")
        network = make_network(case)
        if rows:
            network.resize_token_embeddings(VOCAB + rows)
        network = peft.get_peft_model(network, peft.LoraConfig(r=4, lora_alpha=6, target_modules=["q_proj"],
                                                               modules_to_save=saved))
        with torch.no_grad():
            for key, p in network.named_parameters():
                if "lora_" in key or "modules_to_save" in key:
                    p.add_(torch.randn_like(p) * 0.1)
        adapter = folder / name
        with contextlib.redirect_stderr(io.StringIO()):  # that they are no longer tied
            network.save_pretrained(adapter)
            wanted = reference(network.merge_and_unload())
        if rows:
            longer = byte_tokenizer()
            longer.add_tokens([f"<more{i}>" for i in range(longer.get_vocab_size(), VOCAB + rows)])
            longer.save(str(adapter / "tokenizer.json"))
        for base in (source, folder / f"{name}.gguf"):
            made = folder / f"{name} {base.suffix}.made"
            exported(base, "--lora", adapter, "-o", made)
            check_logits(f"{name}, {rows} rows more, {base.suffix or 'folder'}", run_logits(made), wanted)
            if rows:
                last = tokenize(made, f"<more{VOCAB + rows - 1}>")
                check(f"{name}: its last token", last[-1] == VOCAB + rows - 1, str(last))
            again = folder / f"{name} {base.suffix} again"
            exported(base, "--lora", adapter, "-o", again, "--to", "hf")
            theirs = transformers.AutoModelForCausalLM.from_pretrained(again, dtype=torch.float32, **PLAINLY).eval()
            check_logits(f"{name}: transformers on a folder", reference(theirs), wanted)
            n = Tokenizer.from_file(str(again / "tokenizer.json")).get_vocab_size()
            check(f"{name}: the folder's tokenizer", (n == VOCAB + rows) == bool(rows), f"{n}")
    adapter, base = folder / "llama embed_tokens lm_head", folder / "llama embed_tokens lm_head.gguf"
    kept, config = load_file(adapter / "adapter_model.safetensors"), (adapter / "adapter_config.json").read_text()
    head, embedding = ("base_model.model." + key for key in ("lm_head.weight", "model.embed_tokens.weight"))
    for what, change, word in (("lm_head alone", {embedding: None}, "modules_to_save names embed_tokens"),
                               ("rows differ", {head: kept[head][:-1].clone()}, "lm_head.weight 332"),
                               ("fewer rows", {h: kept[h][:99].clone() for h in (head, embedding)}, "the base has 320"),
                               ("columns", {h: kept[h][:, :60].clone() for h in (head, embedding)}, "[333, 60]"),
                               ("unnamed", {"base_model.model.model.norm.weight": torch.ones(64)}, "model.norm.weight"),
                               ("no tokenizer", {}, "neither tokenizer.json")):
        tensors = {key: t for key, t in (kept | change).items() if t is not None}
        save_file(tensors, adapter / "adapter_model.safetensors")
        if what == "no tokenizer":
            (adapter / "tokenizer.json").unlink()
        status, stderr = export(base, "--lora", adapter, "-o", folder / "no.bin")
        check(f"modules_to_save: {what}", status == 1 and word in stderr and stderr.count("\n") == 1
              and not (folder / "no.bin").exists(), stderr)
    import sentencepiece  # and as Chinese-LLaMA's adapters are: a pickle, with SentencePiece's tokens beside it
    theirs = sentencepiece.SentencePieceProcessor(str(train_sentencepiece(adapter, VOCAB)))
    torch.save(kept, adapter / "adapter_model.bin")
    (adapter / "adapter_model.safetensors").unlink()
    old = {"enable_lora": None, "merge_weights": False, "lora_alpha": 6.0}
    (adapter / "adapter_config.json").write_text(json.dumps(json.loads(config) | old))
    (adapter / "tokenizer_config.json").write_text(json.dumps({"bos_token": {"content": "<s>"}, "add_bos_token": True}))
    exported(base, "--lora", adapter, "-o", folder / "pickled.bin")
    check_logits("a pickled adapter", run_logits(folder / "pickled.bin"), run_logits(folder / f"{base.stem} .made"), 0)
    got, wanted = tokenize(folder / "pickled.bin", "the moon of Rome"), theirs.encode("the moon of Rome")
    check("a pickled adapter: tokens", got == [theirs.bos_id(), *wanted], f"{got} {wanted}")


# -- Tokenizers --

TEXTS = ("the man and the thin hat", "  two  spaces\n\nlines\t", "Zürich, 1234 \u2603 don't", "a<tool>b", "")


def tokenize(path: Path, text: str, *more) -> list[int]:
    done = subprocess.run([RUN, path, "-m", "tokenize", "-i", text, *more], capture_output=True, check=True)
    return [int(i) for i in done.stdout.split()]


def test_byte_level(folder: Path) -> None:
    source = save_model(folder / "model", make_network("llama"))
    exported(source, "-o", folder / "model.bin")
    exported(folder / "model.bin", "-o", folder / "again", "--to", "hf")
    theirs, again = byte_tokenizer(), Tokenizer.from_file(str(folder / "again/tokenizer.json"))
    for text in TEXTS:
        wanted = theirs.encode(text).ids
        check(f"the C program: {text!r}", tokenize(folder / "model.bin", text) == wanted,
              f"{tokenize(folder / 'model.bin', text)} {wanted}")
        check(f"tokenizer.json made anew: {text!r}", again.encode(text).ids == wanted, str(again.encode(text).ids))
    exported(source, "-o", folder / "model.gguf", "--to", "gguf")
    fields = {n: f.contents() for n, f in gguf.GGUFReader(folder / "model.gguf").fields.items() if "token" in n}
    types = fields["tokenizer.ggml.token_type"]
    check("types", types[:3] == [3, 3, 1] and types[264:266] == [4, 5], f"{types[:3]} {types[262:268]}")
    check("keys", fields["tokenizer.ggml.pre"] == "gpt-2" and fields["tokenizer.ggml.add_bos_token"]
          and fields["tokenizer.ggml.eos_token_id"] == 1 and fields["tokenizer.chat_template"] == "{{ messages }}")
    check("the template comes back", (folder / "again/chat_template.jinja").read_text() == "{{ messages }}")


def test_sentencepiece(folder: Path) -> None:
    import sentencepiece
    source = save_model(folder / "model", make_network("llama", vocab_size=700))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    theirs = sentencepiece.SentencePieceProcessor(str(train_sentencepiece(source, 690)))
    exported(source, "-o", folder / "model.bin")
    exported(folder / "model.bin", "-o", folder / "again", "--to", "hf")
    again = Tokenizer.from_file(str(folder / "again/tokenizer.json"))
    fast = folder / "fast"
    fast.mkdir()
    for name in ("config.json", "model.safetensors", "tokenizer_config.json"):
        (fast / name).write_bytes((source / name).read_bytes())
    (fast / "tokenizer.json").write_bytes((folder / "again/tokenizer.json").read_bytes())
    exported(fast, "-o", folder / "fast.bin")
    for text in (*TEXTS[:-1], "\U0001f600", *(ROOT / "README.md").read_text().split("\n")[:40:3]):
        wanted = [theirs.bos_id(), *theirs.encode(text)]
        check(f"the C program: {text!r}", tokenize(folder / "model.bin", text) == wanted,
              f"{tokenize(folder / 'model.bin', text)} {wanted}")
        check(f"tokenizer.json made anew: {text!r}", again.encode(text).ids == wanted, str(again.encode(text).ids))
        check(f"tokenizer.json read: {text!r}", tokenize(folder / "fast.bin", text) == wanted)


def split(regex: str) -> dict:
    return {"type": "Split", "pattern": {"Regex": regex}, "behavior": "Isolated", "invert": False}


def test_pre_tokenizers(folder: Path) -> None:
    """The forms in which published checkpoints have them (as llama.cpp quotes them)."""
    words = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
    bytes_only = words | {"use_regex": False}
    digits = {"type": "Digits", "individual_digits": True}
    llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|"
              r"\s+(?!\S)|\s+")
    upper, lower = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
    tekken = (rf"[^\r\n\p{{L}}\p{{N}}]?{upper}*{lower}+|[^\r\n\p{{L}}\p{{N}}]?{upper}+{lower}*|\p{{N}}|"
              r" ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
    suffix = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?"
    gpt4o = tekken.replace("+|[^", f"+{suffix}|[^", 1).replace(r"*|\p{N}|", rf"*{suffix}|\p{{N}}{{1,3}}|", 1)
    deepseek3 = (r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"""
                 r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+").replace(r"\r\n", "\r\n")  # as it is published
    chinese = "[\u4e00-\u9fa5\u0800-\u4e00\uac00-\ud7ff]+"
    letters = "\\s?[" + "".join("-".join(chr(int(end, 16)) for end in item.split("-")) for item in CASED.split()) + "]+"
    marks = "\\s?[!-/:-~\uff01-\uff0f\uff1a-\uff5e\u2018-\u201f\u3000-\u3002]+"
    deepseek = [split("[\r\n]"), split(letters), split(marks), split(r"\s+$"), split(chinese), digits, bytes_only]
    coder = [split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split(chinese), digits, bytes_only]
    v3 = [split(r"\p{N}{1,3}"), split("[\u4e00-\u9fa5\u3040-\u309f\u30a0-\u30ff]+"), split(deepseek3), bytes_only]
    qwen35 = llama3.replace("{1,3}", "").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+").replace(r"s\p{L}", r"s\p{L}\p{M}")
    cases = {"gpt-2": words, "smollm": [digits, words], "llama-bpe": [split(llama3), bytes_only],
             "dbrx": [split(llama3), bytes_only], "qwen2": [split(llama3.replace("{1,3}", "")), bytes_only],
             "qwen35": [split(qwen35), bytes_only], "tekken": [split(tekken), bytes_only],
             "gpt-4o": [split(gpt4o), bytes_only], "deepseek-llm": deepseek, "deepseek-coder": coder, "deepseek-v3": v3}
    check("all of them", cases.keys() == export_model.PRE_TOKENIZERS.keys(), str(export_model.PRE_TOKENIZERS.keys()))
    for name, steps in cases.items():
        pre = {"type": "Sequence", "pretokenizers": steps} if isinstance(steps, list) else steps
        tokenizer = {"pre_tokenizer": pre, "model": {"ignore_merges": name == "llama-bpe"}}
        check(name, export_model.recognise_pre_tokenizer(tokenizer, folder) == name)
        made = {"pre_tokenizer": export_model.pre_tokenizer_json(name, folder), "model": tokenizer["model"]}
        check(f"{name} made", export_model.recognise_pre_tokenizer(made, folder) == name)
    # What is a little different is another one.
    for name, change in (("llama-bpe", "{1,2}"), ("gpt-4o", "{1,4}"), ("deepseek-v3", "{2,3}")):
        other = json.loads(json.dumps(cases[name]).replace("{1,3}", change))
        try:
            found = export_model.recognise_pre_tokenizer({"pre_tokenizer": {"type": "Sequence", "pretokenizers": other},
                                                          "model": {}}, folder)
        except export_model.Refusal as refusal:
            found = str(refusal)
        check(f"{name} with {change}", change in found and "--pre NAME" in found, found)


# -- Keys of config.json that a family does not read --

# case, what is added to config.json, the key that a line must name ("" none)
UNREAD_KEYS = (
    ("llama", {"sliding_window": 8}, "sliding_window"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor"),
    ("llama", {"layer_types": ["sliding_attention"] * 2, "sliding_window": 5}, "layer_types"),
    ("llama", {"use_qkv_bias": True, "num_local_experts": 4}, "num_local_experts"),
    ("llama", {"query_pre_attn_scalar": 3, "final_logit_softcapping": 2.0}, "final_logit_softcapping"),
    ("llama", {"logits_scaling": 7.0, "embedding_multiplier": 2.0}, "logits_scaling"),
    ("llama", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "factor": 8.0}}, "factor"),
    ("llama", {"quantization_config": None, "rope_scaling": None, "sliding_window": None, "made_up": None}, ""),
    ("mistral window", {"use_sliding_window": False, "max_window_layers": 9}, "max_window_layers"),
    ("mistral", {"attention_bias": True, "mlp_bias": True}, "attention_bias"),
    ("qwen2", {"rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "partial_rotary_factor": 0.5}},
     "partial_rotary_factor"),
    ("qwen2", {"attention_bias": False, "no_rope_layers": [0, 0]}, "no_rope_layers"),
    ("qwen2", {"sliding_window": 7, "max_window_layers": 0, "use_sliding_window": False}, ""),
    ("qwen3", {"qk_layernorm": True, "rope_local_base_freq": 5.0}, "rope_local_base_freq"),
    ("qwen3_moe", {"max_window_layers": 3, "rope_local_base_freq": 9.0, "mlp_bias": True}, "max_window_layers"),
    ("phi3", {"attention_bias": False, "use_sliding_window": False, "no_rope_layers": [0, 1]}, "no_rope_layers"),
    ("granite", {"sliding_window": 4, "query_pre_attn_scalar": 2}, "sliding_window"),
    ("smollm3", {"attention_multiplier": 0.1, "partial_rotary_factor": 0.5}, "attention_multiplier"),
    ("olmo2", {"sliding_window": 6, "layer_types": ["sliding_attention"] * 2}, "sliding_window"),
    ("stablelm", {"rms_norm_eps": 0.5, "head_dim": 16}, "rms_norm_eps"),
    ("gemma2", {"sliding_window_size": 3, "hidden_act": "relu"}, "sliding_window_size"),
    ("gemma2", {"sliding_window_pattern": 3, "rope_local_base_freq": 10.0}, "sliding_window_pattern"),
    ("gemma3", {"attention_multiplier": 3.0, "sliding_window_size": 3}, "sliding_window_size"))


def edit_json(path: Path, change: dict, drop: tuple = ()) -> None:
    values = json.loads(path.read_text()) | change
    path.write_text(json.dumps({key: value for key, value in values.items() if key not in drop}))


def theirs(source: Path) -> np.ndarray:
    """The logits of IDS that transformers computes from a folder."""
    network = transformers.AutoModelForCausalLM.from_pretrained(source, dtype=torch.float32, **PLAINLY).eval()
    return reference(network)


def test_unread_keys(folder: Path) -> None:
    """They change nothing, as transformers shows on the same folder, and a line names them."""
    for i, (case, change, key) in enumerate(UNREAD_KEYS):
        source, made = save_model(folder / f"{i}", make_network(case)), folder / f"{i}.bin"
        edit_json(source / "config.json", change)
        stderr = exported(source, "-o", made)
        what = f"{case} with {', '.join(change)}"
        check(f"{what}: a line", f"{key}" in stderr and ("without effect" in stderr) == bool(key), stderr)
        check(f"{what}: verified", "verified on" in stderr, stderr)
        check_logits(what, run_logits(made), theirs(source))
    source = save_model(folder / "partly", make_network("llama"))
    edit_json(source / "config.json", {"rope_parameters": {"rope_type": "linear", "factor": 2.0, "rope_theta": 1e4,
                                                           "partial_rotary_factor": 0.5}})
    status, stderr = export(source, "-o", folder / "no.bin")  # which transformers' own code cannot run
    check("a part rotated, scaled", status == 1 and "partial_rotary_factor = 0.5" in stderr, stderr)


def config_of(model_type: str):
    return transformers.CONFIG_MAPPING[model_type]


def test_keys_of_families(folder: Path) -> None:
    """Each family's table of keys and of defaults against transformers' classes and the source of its models."""
    import importlib
    import inspect
    import re
    harmless = export_model.Config.HARMLESS | export_model.Config.NEUTRAL.keys() | {"text_config", "vision_config"}
    for name, f in export_model.FAMILIES.items():
        usual, read = config_of(name)(), export_model.keys_read(f)
        module = name.removesuffix("_text")
        source = inspect.getsource(importlib.import_module(f"transformers.models.{module}.modeling_{module}"))
        found = set(re.findall(r"config\.(\w+)", source)) | set(re.findall(r'getattr\(config, "(\w+)"', source))
        found = {key for key in found if key in export_model.KNOWN_KEYS}
        if module == name:  # the other is beside a vision model
            check(f"{name}: keys that its code reads", found <= read | harmless, f"{found - read - harmless}")
        mixed = inspect.getsource(config_of(name)) + inspect.getsource(transformers.modeling_rope_utils)
        lost = [key for key in f.reads.split() if not re.search(rf"\b{key}\b", mixed)]
        check(f"{name}: no key beside its class", not lost, str(lost))
        for key, value in (export_model.DEFAULTS | f.defaults).items():
            if key in read and key not in ("rope_theta", "rope_local_base_freq", "partial_rotary_factor") \
                    and not (key == "sliding_window" and "use_sliding_window" in read):
                check(f"{name}: {key}", getattr(usual, key) == value, f"{getattr(usual, key)}, not {value}")
        rope = usual.rope_parameters
        full = rope.get("full_attention", rope)
        usual_theta = (export_model.DEFAULTS | f.defaults)["rope_theta"]
        check(f"{name}: rope_theta", full["rope_theta"] == usual_theta, str(rope))
        check(f"{name}: part", full.get("partial_rotary_factor", 1.0) == f.defaults.get("partial_rotary_factor", 1.0))


def test_silent_configurations(folder: Path) -> None:
    """Where config.json is silent, transformers' defaults hold."""
    for case, drop, change in (("llama", ("max_position_embeddings", "head_dim", "rope_parameters"), {}),
                               ("llama", ("rms_norm_eps", "hidden_act", "tie_word_embeddings"), {}),
                               ("mistral window", ("sliding_window", "max_position_embeddings"), {}),
                               ("mistral", ("rope_parameters", "head_dim"), {"rope_theta": 5e5}),
                               ("mixtral", ("rope_parameters", "num_experts_per_tok", "rms_norm_eps"), {}),
                               ("qwen2", ("max_position_embeddings", "max_window_layers", "layer_types"), {}),
                               ("qwen2 window", ("layer_types", "sliding_window"), {"max_window_layers": 1}),
                               ("phi3", ("rms_norm_eps", "rope_parameters", "sliding_window"), {}),
                               ("smollm3", ("rope_parameters", "no_rope_layers", "tie_word_embeddings"), {}),
                               ("olmo3", ("rope_parameters", "layer_types", "rms_norm_eps"), {}),
                               ("stablelm", ("rope_parameters", "layer_norm_eps"), {}),
                               ("gemma2", ("layer_types", "final_logit_softcapping", "rope_parameters"), {}),
                               ("gemma3", ("layer_types", "rope_parameters", "query_pre_attn_scalar"), {})):
        source = save_model(folder / f"{case} {drop}", make_network(case))
        edit_json(source / "config.json", change, drop)
        exported(source, "-o", folder / "made.bin")
        check_logits(f"{case} without {', '.join(drop)}"[:44], run_logits(folder / "made.bin"), theirs(source))


# -- Files that contradict each other --

def test_contradictions(folder: Path) -> None:
    """What transformers makes of them, and a line that says so."""
    def save(case: str, tensors: dict, source: Path) -> None:
        save_file(tensors, source / "model.safetensors", {"format": "pt"})
    rng = torch.manual_seed(3)
    embedding, head = "model.embed_tokens.weight", "lm_head.weight"
    other = torch.randn(VOCAB, 64, generator=rng) * 0.1
    biases = {f"model.layers.{i}.{part}_proj.bias": torch.ones(n) for i in range(2)
              for part, n in (("self_attn.q", 64), ("self_attn.k", 32), ("mlp.up", 96))}
    cases = {  # case, tensors -> tensors, the line
        "tied, another head": ("llama tied", lambda t: t | {head: other}, "differs from model.embed_tokens.weight"),
        "tied, the same head": ("llama tied", lambda t: t | {head: t[embedding].clone()}, ""),
        "tied, only the head": ("llama tied", lambda t: {head if n == embedding else n: x for n, x in t.items()},
                                "only lm_head.weight"),
        "gemma, another head": ("gemma2", lambda t: t | {head: other}, "differs from"),
        "gemma, only the head": ("gemma2", lambda t: {head if n == embedding else n: x for n, x in t.items()},
                                 "only lm_head.weight"),
        "qwen2 tied, another head": ("qwen2 tied", lambda t: t | {head: other}, "both are used"),
        "no prefix": ("llama", lambda t: {n.removeprefix("model."): x for n, x in t.items()}, "lack the prefix"),
        "no prefix, tied": ("qwen2 tied", lambda t: {n.removeprefix("model."): x for n, x in t.items()},
                            "lack the prefix"),
        "biases that no key names": ("llama", lambda t: t | biases, "attention_bias is not true"),
        "mistral with biases": ("mistral", lambda t: t | biases, "are not read"),
        "angles stored": ("llama", lambda t: t | {"model.layers.0.self_attn.rotary_emb.inv_freq": torch.ones(8)}, "")}
    for name, (case, change, line) in cases.items():
        source, made = save_model(folder / name, make_network(case)), folder / f"{name}.bin"
        save(case, change(load_file(source / "model.safetensors")), source)
        stderr = exported(source, "-o", made)
        check(f"{name}: a line", line in stderr and bool(line) == (stderr.count("\n") > 1), stderr)
        check_logits(name, run_logits(made), theirs(source))
        exported(source, "-o", folder / f"{name} again", "--to", "hf")
        check_logits(f"{name}: folder", theirs(folder / f"{name} again"), theirs(source))
    for whole, kind in (("model.safetensors", "safetensors"), ("pytorch_model.bin", "bin")):
        source = folder / f"stale {kind}"
        stale, network = make_network("llama"), make_network("llama")
        with torch.no_grad():
            stale.lm_head.weight.mul_(3)
        stale.save_pretrained(source, max_shard_size="100KB")
        save_tokenizer(source)
        names = {n: n.replace(".safetensors", ".bin").replace("model-", "pytorch_model-") if kind == "bin" else n
                 for n in {p.name for p in source.glob("*.safetensors")}}
        index = json.loads((source / "model.safetensors.index.json").read_text())
        index["weight_map"] = {n: names[file] for n, file in index["weight_map"].items()}
        (source / "model.safetensors.index.json").unlink()
        (source / f"{whole}.index.json").write_text(json.dumps(index))
        for old, new in names.items():
            if kind == "bin":
                torch.save(load_file(source / old), source / new)
                (source / old).unlink()
        if kind == "bin":
            torch.save(network.state_dict(), source / whole)
        else:
            save_file(network.state_dict(), source / whole, {"format": "pt"})
        stderr = exported(source, "-o", folder / "stale.bin")
        check(f"stale {kind}: a line", "index.json: not read" in stderr, stderr)
        check_logits(f"stale index, {kind}", run_logits(folder / "stale.bin"), reference(network))
    network = make_network("llama")
    state = network.state_dict()
    for name, content, word in (("state_dict", {"state_dict": state, "epoch": 3}, "those of state_dict"),
                                ("model", {"model": state, "optimizer": {"step": 1}}, "those of model"),
                                ("module", {f"module.{n}": t for n, t in state.items()}, ""),
                                ("compiled", {"model": {f"_orig_mod.{n}": t for n, t in state.items()}}, "of model"),
                                ("two", {"model": state, "ema": state}, "model, ema"), ("none", {"epoch": 3}, "none"),
                                ("number", state | {"steps": 3}, "steps has dtype int")):
        source = save_model(folder / name, network)
        (source / "model.safetensors").unlink()
        torch.save(content, source / "pytorch_model.bin")
        status, stderr = export(source, "-o", folder / f"{name}.bin")
        check(f"nested: {name}", (status == 1) == (name in ("two", "none", "number")) and word in stderr, stderr)
        if status == 0:
            check_logits(f"nested: {name}", run_logits(folder / f"{name}.bin"), reference(network))
    missing = save_model(folder / "promised", network)
    edit_json(missing / "config.json", {"attention_bias": True})
    status, stderr = export(missing, "-o", folder / "no.bin")
    check("biases that are missing", status == 1 and "attention_bias is true, but" in stderr, stderr)


# -- Adapters --

# Every field of PEFT's LoraConfig: options that use it, and whether it is "merged", or refused by its name ("refused"),
# or says nothing about the result ("idle").
LORA_FIELDS = {
    "r": ({"r": 3}, "merged"), "lora_alpha": ({"lora_alpha": 5}, "merged"),
    "lora_dropout": ({"lora_dropout": 0.5}, "idle"),
    "target_modules": ({"target_modules": "all-linear"}, "merged"),
    "exclude_modules": ({"target_modules": "all-linear", "exclude_modules": ["down_proj"]}, "idle"),
    "fan_in_fan_out": ({"fan_in_fan_out": True}, "refused"), "bias": ({"bias": "lora_only"}, "merged"),
    "use_rslora": ({"use_rslora": True}, "merged"), "modules_to_save": ({"modules_to_save": ["norm"]}, "merged"),
    "init_lora_weights": ({"init_lora_weights": "pissa"}, "merged"),
    "layers_to_transform": ({"layers_to_transform": [1]}, "idle"),
    "layers_pattern": ({"layers_to_transform": [0], "layers_pattern": "layers"}, "idle"),
    "rank_pattern": ({"rank_pattern": {"^model.layers.1.self_attn.q_proj": 2, "v_proj": 6}}, "merged"),
    "alpha_pattern": ({"alpha_pattern": {r"^model\.layers\.0\..*": 9, "q_proj": 3}}, "merged"),
    "megatron_config": ({"megatron_config": {"a": 1}}, "refused"), "megatron_core": ({}, "idle"),
    "trainable_token_indices": ({"trainable_token_indices": [3, 5, 7]}, "merged"),
    "loftq_config": ({}, "idle"), "eva_config": ({}, "idle"), "corda_config": ({}, "idle"),
    "lora_ga_config": ({}, "idle"), "use_dora": ({"use_dora": True}, "merged"),
    "velora_config": ({"velora_config": {"num_groups": 2}}, "refused"),
    "alora_invocation_tokens": ({"alora_invocation_tokens": [3]}, "refused"),
    "use_qalora": ({"use_qalora": True}, "refused"), "qalora_group_size": ({}, "idle"),
    "monteclora_config": ({"monteclora_config": {"a": 1}}, "refused"),
    "layer_replication": ({"layer_replication": [[0, 2], [1, 2]]}, "refused"), "runtime_config": ({}, "idle"),
    "lora_bias": ({"lora_bias": True}, "merged"), "target_parameters": ({}, "merged"),
    "use_bdlora": ({"use_bdlora": {"a": 1}}, "refused"), "arrow_config": ({"arrow_config": {"a": 1}}, "refused"),
    "kasa_config": ({"kasa_config": {"a": 1}}, "refused"),
    "ensure_weight_tying": ({"ensure_weight_tying": True}, "merged")}
# What all kinds of adapters have.
PEFT_FIELDS = {"task_type", "peft_type", "auto_mapping", "peft_version", "base_model_name_or_path", "revision",
               "inference_mode"}
# Further ways to begin, and targets. The bases: llama, "llama bias", "llama tied".
LORA_CASES = (("llama", "olora", {"init_lora_weights": "olora"}),
              ("llama", "gaussian", {"init_lora_weights": "gaussian"}),
              ("llama", "orthogonal", {"init_lora_weights": "orthogonal"}),
              ("llama", "no start", {"init_lora_weights": False}),
              ("llama", "pissa rslora", {"init_lora_weights": "pissa", "use_rslora": True}),
              ("llama", "head", {"target_modules": ["q_proj", "lm_head"]}),
              ("llama", "embedding", {"target_modules": ["q_proj", "embed_tokens"]}),
              ("llama tied", "tied head", {"target_modules": ["q_proj", "lm_head"]}),
              ("llama", "dora rslora", {"use_dora": True, "use_rslora": True, "target_modules": "all-linear"}),
              ("llama bias", "all biases", {"bias": "all"}),
              ("qwen2", "bias and dora", {"bias": "all", "use_dora": True}),
              ("olmo2", "pissa", {"init_lora_weights": "pissa"}), ("gemma2", "dora", {"use_dora": True}))


def make_adapter(peft, case: str, folder: Path, options: dict) -> np.ndarray:
    """Saves an adapter of random numbers; the logits after PEFT has read it again and merged it."""
    options = {"r": 4, "lora_alpha": 6, "target_modules": ["q_proj", "v_proj"]} | options
    torch.manual_seed(5)
    network = peft.get_peft_model(make_network(case), peft.LoraConfig(**options))
    with torch.no_grad():
        for key, p in network.named_parameters():
            if any(part in key for part in ("lora_", "modules_to_save", "token_adapter")) or (
                    p.requires_grad and "bias" in key):
                p.add_(torch.randn_like(p) * 0.1)
    network.save_pretrained(folder)
    return reference(peft.PeftModel.from_pretrained(make_network(case), folder).merge_and_unload().eval())


def test_adapters(folder: Path) -> None:
    """Each field of PEFT's configuration: merged as PEFT does, or refused by its name."""
    try:
        import peft
    except ImportError:
        return print("  skipped: peft is not installed")
    import dataclasses
    import warnings
    warnings.simplefilter("ignore")
    fields = {f.name for f in dataclasses.fields(peft.LoraConfig)} - PEFT_FIELDS
    check("every field of LoraConfig", fields == LORA_FIELDS.keys(), str(fields ^ LORA_FIELDS.keys()))
    bases = {case: save_model(folder / case, make_network(case))
             for case in ("llama", "llama bias", "llama tied", "qwen2", "olmo2", "gemma2", "mixtral")}
    by_field = [("llama bias" if name in ("bias", "lora_bias") else "llama", name, options)
                for name, (options, happens) in LORA_FIELDS.items() if happens != "refused" and options]
    by_field += [("mixtral", "target_parameters", {"target_modules": [],
                                                   "target_parameters": ["mlp.experts.down_proj"]})]
    for case, name, options in (*by_field, *LORA_CASES):
        adapter, made = folder / f"{case} {name} adapter", folder / f"{case} {name}.bin"
        try:
            wanted = make_adapter(peft, case, adapter, options)
        except Exception as error:
            check(f"LoRA: {case}, {name}: PEFT", False, repr(error))
            continue
        plain = reference(make_network(case))
        check(f"LoRA: {case}, {name} matters", np.abs(wanted - plain).max() > 50 * TOLERANCE)
        exported(bases[case], "--lora", adapter, "-o", made)
        if made.exists():
            check_logits(f"LoRA: {case}, {name}", run_logits(made), wanted)
    make_adapter(peft, "llama", folder / "refused", {})
    config = json.loads((folder / "refused/adapter_config.json").read_text())
    others = {"init_lora_weights": "corda", "peft_type": "LOHA"}  # which PEFT cannot merge either
    refused = {n: o[n] for n, (o, happens) in LORA_FIELDS.items() if happens == "refused"}
    for name, value in (refused | others).items():
        (folder / "refused/adapter_config.json").write_text(json.dumps(config | {name: value}))
        status, stderr = export(bases["llama"], "--lora", folder / "refused", "-o", folder / "no.bin")
        check(f"LoRA: {name} is refused", status == 1 and name in stderr and stderr.count("\n") == 1, stderr)


# -- Tokenizers: every part that the libraries have --

BAR = "\u2581"
LEGACY = {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": BAR}, {
    "type": "Replace", "pattern": {"String": " "}, "content": BAR}]}
BARS = LEGACY["normalizers"][1]


def metaspace(scheme: str, split: bool = False) -> dict:
    return {"type": "Metaspace", "replacement": BAR, "prepend_scheme": scheme, "split": split}


def token(content: str, **flags) -> dict:
    return {"content": content, "special": False, "single_word": False, "lstrip": False, "rstrip": False,
            "normalized": False} | flags


def template(*pieces: str, **ids) -> dict:
    single = [{"Sequence": {"id": "A", "type_id": 0}} if p == "A" else {"SpecialToken": {"id": p, "type_id": 0}}
              for p in pieces]
    return {"type": "TemplateProcessing", "single": single, "pair": single + [{"Sequence": {"id": "B", "type_id": 1}}],
            "special_tokens": {p: {"id": p, "ids": [ids[p.strip("<>|")]], "tokens": [p]} for p in pieces if p != "A"}}


# What is changed in tokenizer.json, further added tokens, and the word of the refusal ("": it is exported).
SPM_CASES = {
    "legacy": ({}, [], ""), "no prefix": ({"normalizer": BARS}, [], ""),
    "Metaspace never": ({"normalizer": None, "pre_tokenizer": metaspace("never")}, [], ""),
    "Metaspace always": ({"normalizer": None, "pre_tokenizer": metaspace("always")}, [], ""),
    "Metaspace first": ({"normalizer": None, "pre_tokenizer": metaspace("first")}, [], ""),
    "Metaspace of old": ({"normalizer": None, "pre_tokenizer": {
        "type": "Metaspace", "replacement": BAR, "add_prefix_space": True, "split": False}}, [], ""),
    "Metaspace split": ({"normalizer": None, "pre_tokenizer": metaspace("never", True)}, [], ""),
    "split, inner bars": ({"normalizer": None, "pre_tokenizer": metaspace("never", True), "model.vocab": lambda v: v | {
        f"a{BAR}b": 650}}, [], "split = true"),
    "ids with holes": ({"model.vocab": lambda v: {t: i + 50 * (i > 580) for t, i in v.items()}}, [], ""),
    "Metaspace _": ({"normalizer": None, "pre_tokenizer": metaspace("never") | {"replacement": "_"}}, [], "Metaspace"),
    "both": ({"pre_tokenizer": metaspace("always")}, [], ""),
    "nothing": ({"normalizer": None}, [], "U+2581"),
    "Prepend x": ({"normalizer": {"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "x"}, BARS]}}, [],
                  "Prepend"),
    "Replace more": ({"normalizer": {"type": "Sequence", "normalizers": [BARS, {
        "type": "Replace", "pattern": {"String": "a"}, "content": "b"}]}}, [], "Replace"),
    "special": ({}, [token("<|x|>", special=True)], ""), "normalized": ({}, [token("hello", normalized=True)], ""),
    "raw, no prefix": ({"normalizer": BARS}, [token("<tool>")], ""),
    "raw, Metaspace never": ({"normalizer": None, "pre_tokenizer": metaspace("never")}, [token("<tool>")], ""),
    "normalized, no prefix": ({"normalizer": BARS}, [token("two words", normalized=True)], ""),
    "raw, prefix": ({}, [token("<tool>")], ""),
    "raw and normalized": ({}, [token("<tool>"), token("hello", normalized=True)], "normalized"),
    "special, lstrip": ({}, [token("<m>", special=True, lstrip=True)], ""),
    "special, rstrip": ({}, [token("<m>", special=True, rstrip=True)], ""),
    "raw, both sides": ({}, [token("<m>", lstrip=True, rstrip=True), token("<n>")], ""),
    "no prefix, both sides": ({"normalizer": BARS}, [token("<m>", special=True, lstrip=True, rstrip=True)], ""),
    "Metaspace, rstrip": ({"normalizer": None, "pre_tokenizer": metaspace("first")}, [token("<m>", rstrip=True)], ""),
    "late lstrip": ({}, [token("<m>", normalized=True, lstrip=True)], "lstrip"),
    "single_word": ({"normalizer": BARS}, [token("word", single_word=True)], "single_word"),
    "another id": ({}, [token("<|x|>", special=True, id=699)], "gives it 600"),
    "beyond": ({"model.vocab": lambda v: v | {f"zz{i}": 600 + i for i in range(100)}}, [token("<|x|>")], ""),
    "bos and eos": ({"post_processor": template("<s>", "A", "</s>", s=1, **{"/s": 2})}, [], ""),
    "ignore_merges": ({"model.ignore_merges": True}, [], "ignore_merges"),
    "dropout": ({"model.dropout": 0.5}, [], "dropout")}
BYTE_CASES = {
    "plain": ({}, [], ""), "NFC": ({"normalizer": {"type": "NFC"}}, [token("[cafe]", normalized=True)], ""),
    "NFC, early": ({"normalizer": {"type": "NFC"}}, [token("cafe", normalized=True)], "in NFC"),
    "NFC, late": ({"normalizer": {"type": "NFC"}}, [token("caf\u00e9", normalized=True)], "in NFC"),
    "NFC, never found": ({"normalizer": {"type": "NFC"}}, [token("cafe\u0301", normalized=True)], "in NFC"),
    "user-defined": ({}, [token("<call>"), token("<call><call>"), token(f"a{BAR}b")], ""),
    "overlapping": ({}, [token("ab"), token("abc"), token("<|s|>", special=True)], ""),
    "in two rounds": ({}, [token("ab"), token("abc", normalized=True)], "is never found"),
    "normal lstrip": ({}, [token("<m>", lstrip=True)], ""), "normal rstrip": ({}, [token("<m>", rstrip=True)], ""),
    "special, both sides": ({}, [token("<m>", special=True, lstrip=True, rstrip=True), token("<n>", rstrip=True)], ""),
    "NFC, rstrip": ({"normalizer": {"type": "NFC"}}, [token("<m>", normalized=True, rstrip=True)], ""),
    "single_word": ({}, [token("the", single_word=True)], "single_word"),
    "prefix of two": ({"post_processor": template("<|begin|>", "<|end|>", "A", begin=0, end=1)}, [], ""),
    "prefix of two, another first": ({"post_processor": template("<|end|>", "<|begin|>", "A", begin=0, end=1)}, [], ""),
    "two last": ({"post_processor": template("A", "<|end|>", "<|begin|>", begin=0, end=1)}, [], ""),
    "prefix of three, two last": ({"post_processor": template(
        *["<|begin|>"] * 3, "A", *["<|end|>"] * 2, begin=0, end=1)}, [], ""),
    "five first": ({"post_processor": template(*["<|begin|>"] * 5, "A", begin=0)}, [], "at most 4"),
    "two steps": ({"post_processor": {"type": "Sequence", "processors": [
        template("<|begin|>", "A", begin=0), template("A", "<|end|>", end=1)]}}, [], "several steps"),
    "none": ({"post_processor": None}, [], ""), "end": ({"post_processor": template("A", "<|end|>", end=1)}, [], ""),
    "no text": ({"post_processor": template("<|begin|>", begin=0)}, [], "0 times"),
    "twice": ({"post_processor": template("A", "A")}, [], "2 times"),
    "prefix": ({"pre_tokenizer": {"type": "ByteLevel", "add_prefix_space": True, "use_regex": True}}, [],
               "add_prefix_space"),
    "unk": ({"model.unk_token": "<|end|>"}, [], ""), "dropout": ({"model.dropout": 0.1}, [], "dropout"),
    "prefixes": ({"model.continuing_subword_prefix": "##"}, [], "continuing_subword_prefix"),
    "suffixes": ({"model.end_of_word_suffix": "</w>"}, [], "end_of_word_suffix")}
BYTES = {"add_prefix_space": True, "trim_offsets": True, "use_regex": True}
# The parts that tokenizers has, by kind: those that byte-level vocabularies may have.
PARTS = {"normalizers": {"NFC": ({}, ""), "Sequence": ({"normalizers": [{"type": "NFC"}]}, "")},
         "pre_tokenizers": {"ByteLevel": ({"add_prefix_space": False, "use_regex": True, "trim_offsets": False}, ""),
                            "Sequence": ({"pretokenizers": [{"type": "Digits", "individual_digits": True}, {
                                "type": "ByteLevel", "add_prefix_space": False, "use_regex": True,
                                "trim_offsets": True}]}, "")},
         "processors": {"ByteLevel": ({"trim_offsets": True, "add_prefix_space": False, "use_regex": True}, ""),
                        "BertProcessing": ({"sep": ["<|end|>", 1], "cls": ["<|begin|>", 0]}, ""),
                        "RobertaProcessing": ({"sep": ["<|end|>", 1], "cls": ["<|begin|>", 0], "trim_offsets": True,
                                               "add_prefix_space": False}, ""),
                        "TemplateProcessing": (template("<|begin|>", "A", "<|end|>", begin=0, end=1), ""),
                        "Sequence": ({"processors": [
                            {"type": "ByteLevel", "trim_offsets": True, "add_prefix_space": False, "use_regex": True},
                            template("<|begin|>", "A", "<|end|>", begin=0, end=1)]}, "")},
         "decoders": {"ByteLevel": (BYTES, ""), "Sequence": ({"decoders": [{"type": "ByteLevel"} | BYTES]}, "")}}


def check_tokens(what: str, source: Path, made: Path, word: str, vocabulary: int) -> None:
    """The C program's tokens are those of tokenizers; or the refusal has this word."""
    status, stderr = export(source, "-o", made, "--no-verify")
    if word:
        return check(f"{what}: is refused", status == 1 and word in stderr and stderr.count("\n") == 1, stderr)
    check(f"{what}: is exported", status == 0, stderr)
    if "normal" in what or "prefix" in what or "Metaspace" in what:  # and a tokenizer.json of it, made anew
        again = made.parent / f"again {what}".replace("/", " ")
        exported(made, "-o", again, "--to", "hf", "--no-verify")
        before, after = (Tokenizer.from_file(str(f / "tokenizer.json")).encode("the a").ids for f in (source, again))
        check(f"{what}: a folder of it", before == after, f"{after} {before}")
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    added = [t.content for i, t in own.get_added_tokens_decoder().items() if i < vocabulary and t.content != "<unk>"]
    around = [s for t in added for s in (t, f"a{t}b", f"a {t} b", f" {t}  {t}\n{t}", f"a\u3000\n {t}\t\u00a0 {t} ")]
    for text in (*TEXTS[:3], "hello", "say hello there", "xhello", " hello", "  a", "two words", "abcabab",
                 "cafe\u0301", *around):
        wanted = own.encode(text).ids
        if max(wanted, default=0) < vocabulary:
            got = tokenize(made, text, "--special", "--ends")
            check(f"{what}: {text!r}", got == wanted, f"{got} {wanted}")


def put_tokenizer(source: Path, base: dict, change: dict, added: list[dict]) -> None:
    made = json.loads(json.dumps(base))
    for key, value in change.items():
        value = value(made["model"][key.split(".")[1]]) if callable(value) else value
        made["model" if "." in key else key] = made["model"] | {key.split(".")[1]: value} if "." in key else value
    first = 1 + max(made["model"]["vocab"].values())
    first = max(first, *(t["id"] + 1 for t in made["added_tokens"]))
    made["added_tokens"] += [{"id": first + i} | t for i, t in enumerate(added)]
    (source / "tokenizer.json").write_text(json.dumps(made))


def test_parts_of_tokenizers(folder: Path) -> None:
    """Each option of tokenizers: the same tokens, or refused by its name."""
    source = save_model(folder / "spm", make_network("llama", vocab_size=700))
    (source / "tokenizer.json").unlink()
    (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
    train_sentencepiece(source, 600)
    exported(source, "-o", folder / "again.bin", "--no-verify")
    exported(folder / "again.bin", "-o", folder / "again", "--to", "hf", "--no-verify")
    base = json.loads((folder / "again/tokenizer.json").read_text())
    base["model"]["vocab"] = {t: i for t, i in base["model"]["vocab"].items() if not t.startswith("[PAD")}
    (source / "tokenizer.model").unlink()
    for name, (change, added, word) in SPM_CASES.items():
        put_tokenizer(source, base, change, added)
        check_tokens(f"spm: {name}", source, folder / "made.bin", word, 700)
    source = save_model(folder / "bytes", make_network("llama"))
    base = json.loads((source / "tokenizer.json").read_text())
    for name, (change, added, word) in BYTE_CASES.items():
        put_tokenizer(source, base, change, added)
        check_tokens(f"bytes: {name}", source, folder / "made.bin", word, VOCAB)
    kinds = {"normalizers": "normalizer", "pre_tokenizers": "pre_tokenizer", "processors": "post_processor",
             "decoders": "decoder"}
    for module, key in kinds.items():
        parent = getattr(tokenizers, module)
        names = [n for n, x in vars(parent).items() if isinstance(x, type) and n not in (
            key.title(), "Normalizer", "PreTokenizer", "PostProcessor", "Decoder", "DecodeStream")]
        check(f"{module}: a list", len(names) > 4, str(names))
        for name in names:
            options, word = PARTS[module].get(name, ({}, name))
            put_tokenizer(source, base, {key: {"type": name} | options}, [])
            check_tokens(f"{module}: {name}", source, folder / "made.bin", word, VOCAB)


def test_phi3_by_name(folder: Path) -> None:
    """GGUF has no key for rstrip: what llama.cpp does by the model's name (llama-vocab.cpp), for special tokens and
    </s> but not for <unk>, <s> and <|endoftext|>, against tokenizers with these flags; in a chat too, whose messages
    are joined to the template's tokens before white space is taken."""
    source = save_model(folder / "Tiny-model", make_network("llama"))
    base = json.loads((source / "tokenizer.json").read_text())
    names = ("<|user|>", "</s>", "<unk>", "<s>", "<|endoftext|>")
    tokens = [token(name, special=name != "</s>", rstrip=name in names[:2]) for name in names]
    put_tokenizer(source, base, {"post_processor": None}, tokens)
    own = Tokenizer.from_file(str(source / "tokenizer.json"))
    own.add_tokens([tokenizers.AddedToken("<tool>", rstrip=True, normalized=False)])
    plain = json.loads((source / "tokenizer.json").read_text())
    plain["added_tokens"] = [t | {"rstrip": False} for t in plain["added_tokens"]]
    (source / "tokenizer.json").write_text(json.dumps(plain))
    without = Tokenizer.from_file(str(source / "tokenizer.json"))
    exported(source, "-o", folder / "model.gguf", "--to", "gguf", "--no-verify")
    content = (folder / "model.gguf").read_bytes()
    for name, known in (("Tiny Phi-3", True), ("small phi3", True), ("my PHI-3.5", True), ("Tiny Phi 3", False),
                        ("3-phi--phi", False)):
        made = folder / f"{name}.gguf"
        made.write_bytes(content.replace(b"Tiny-model", name.encode()))
        for text in [f"a {t} \n b" for t in names] + ["<tool>  x", "the man"]:
            got, wanted = tokenize(made, text, "--special"), (own if known else without).encode(text).ids
            check(f"Phi-3: {name}: {text!r}", got == wanted, f"{got} {wanted}")
        (folder / "template").write_text("<|user|>{{ messages[0].content }}</s>{{ messages[0].content }}<s>")
        for said in ("  x", " \n", "x  ", "\u3000x"):
            (folder / "messages").write_text(json.dumps([{"role": "user", "content": said}]))
            done = subprocess.run([ROOT / "run", made, "-m", "render", "--pieces", "--template", folder / "template",
                                   "--messages", folder / "messages"], capture_output=True, text=True, check=True)
            got = [int(line.split()[0]) for line in done.stdout.splitlines()]
            wanted = (own if known else without).encode(f"<|user|>{said}</s>{said}<s>").ids
            check(f"Phi-3: {name}: a chat with {said!r}", got == wanted, f"{got} {wanted}")
    source = source.rename(folder / "Phi-3")  # a folder's own flags count
    exported(source, "-o", folder / "folder.bin", "--no-verify")
    got, wanted = tokenize(folder / "folder.bin", "a <|user|> b", "--special"), without.encode("a <|user|> b").ids
    check("Phi-3: a folder", got == wanted, f"{got} {wanted}")


def test_special_tokens(folder: Path) -> None:
    """Which file names the begin and end tokens, and whether they are added: as transformers has it."""
    source = save_model(folder / "model", make_network("llama", bos_token_id=None, eos_token_id=None))
    base, plain = json.loads((source / "tokenizer.json").read_text()), {"tokenizer_class": "PreTrainedTokenizerFast"}
    (source / "generation_config.json").unlink(missing_ok=True)
    named = {"bos_token": "<|begin|>", "eos_token": "<|end|>"}
    for name, config, special, post in (
            ("map alone", {}, named, None), ("map and template", {}, named, template("<|begin|>", "A", begin=0)),
            ("map of objects", {}, {k: {"content": v} for k, v in named.items()}, None),
            ("config wins", {"eos_token": "<|end|>", "bos_token": "<|begin|>"}, {"eos_token": "<|begin|>"}, None),
            ("explicitly none", named | {"add_bos_token": False}, {}, template("<|begin|>", "A", begin=0)),
            ("explicitly one", named | {"add_bos_token": True}, {}, None),
            ("explicitly both", named | {"add_bos_token": True, "add_eos_token": True}, {}, None),
            ("an end alone", named | {"add_eos_token": True}, {}, template("<|begin|>", "A", begin=0)),
            ("null in config", {"eos_token": None}, named, None)):
        (source / "tokenizer_config.json").write_text(json.dumps(plain | config))
        (source / "special_tokens_map.json").write_text(json.dumps(special))
        put_tokenizer(source, base, {"post_processor": post}, [])
        exported(source, "-o", folder / "made.gguf", "--to", "gguf", "--no-verify")
        usual = transformers.AutoTokenizer.from_pretrained(source)
        got = tokenize(folder / "made.gguf", "the man", "--ends")
        check(f"special tokens: {name}", got == usual("the man")["input_ids"], f"{got} {usual('the man')['input_ids']}")
        fields = gguf.GGUFReader(folder / "made.gguf").fields
        for key, wanted in (("bos", usual.bos_token_id), ("eos", usual.eos_token_id)):
            field = fields.get(f"tokenizer.ggml.{key}_token_id")
            check(f"special tokens: {name}: {key}", (field and field.contents()) == wanted, f"{field} {wanted}")


def test_sentencepiece_options(folder: Path) -> None:
    """What SentencePiece's trainer can be told: the same tokens, or refused by its name."""
    import sentencepiece
    source = save_model(folder / "model", make_network("llama", vocab_size=700))
    (source / "tokenizer.json").unlink()
    for name, options, config, word in (
            ("usual", {}, {}, ""), ("no prefix", {"add_dummy_prefix": False}, {}, ""),
            ("no prefix asked for", {}, {"add_prefix_space": False}, ""),
            ("suffix", {"treat_whitespace_as_suffix": True}, {}, ""),
            ("suffix, no prefix", {"treat_whitespace_as_suffix": True, "add_dummy_prefix": False}, {}, ""),
            ("extra spaces", {"remove_extra_whitespaces": True}, {}, "remove_extra_whitespaces"),
            ("nfkc", {"normalization_rule_name": "nmt_nfkc"}, {}, "precompiled_charsmap"),
            ("digits", {"split_digits": True}, {}, ""), ("no bytes", {"byte_fallback": False}, {}, ""),
            ("spaces", {"allow_whitespace_only_pieces": True}, {}, ""),
            ("numbers", {"split_by_number": False, "split_by_whitespace": False}, {}, ""),
            ("user-defined", {"user_defined_symbols": ["<tool>", "hello"]}, {}, ""),
            ("control", {"control_symbols": ["<sep>"]}, {}, ""),
            ("unigram", {"model_type": "unigram"}, {}, "model_type is 1")):
        path = train_sentencepiece(source, 450, **options)
        (source / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"} | config))
        status, stderr = export(source, "-o", folder / "made.bin", "--no-verify")
        if word:
            found = status == 1 and word in stderr and stderr.count("\n") == 1
            check(f"sentencepiece: {name} is refused", found, stderr)
            continue
        check(f"sentencepiece: {name}", status == 0, stderr)
        more = b"\x1a\x02\x18\x00" if config else b""  # normalizer_spec.add_dummy_prefix = false
        own = sentencepiece.SentencePieceProcessor(model_proto=path.read_bytes() + more)
        for text in (*TEXTS, "hello", "say hello  <tool>there", "\u00e9\u4f60 x\U0001f600", "12a34"):
            got, wanted = tokenize(folder / "made.bin", text), [own.bos_id(), *own.encode(text)]
            check(f"sentencepiece: {name}: {text!r}", got == wanted, f"{got} {wanted}")


def test_judges(folder: Path) -> None:
    """An exporter that reads a key that transformers does not, or forgets how texts begin, is found out."""
    source = save_model(folder / "model", make_network("llama"))
    edit_json(source / "config.json", {"sliding_window": 8})
    read, prefix = export_model.keys_read, export_model.spm_prefix
    try:
        export_model.keys_read = lambda f: read(f) | {"sliding_window"}
        status, stderr = export(source, "-o", folder / "no.bin")
        check("a key that transformers does not read", status == 1 and "verification failed" in stderr
              and "transformers" in stderr, stderr)
        export_model.keys_read = read
        spm = save_model(folder / "spm", make_network("llama", vocab_size=700))
        (spm / "tokenizer.json").unlink()
        (spm / "tokenizer_config.json").write_text(json.dumps({"bos_token": "<s>", "eos_token": "</s>"}))
        train_sentencepiece(spm, 600)
        exported(spm, "-o", folder / "spm.bin")
        exported(folder / "spm.bin", "-o", folder / "again", "--to", "hf")
        (spm / "tokenizer.json").write_bytes((folder / "again/tokenizer.json").read_bytes())
        for what, form in (("", "native"), ("", "gguf"), ("", "hf"), ("prepend", "native")):
            export_model.spm_prefix = lambda t, where, what=what: what
            status, stderr = export(spm, "-o", folder / f"x.{form}{what}", "--to", form)
            check(f"a prefix lost: {form} {what}", status == (0 if what else 1)
                  and ("the tokens of" in stderr) != bool(what), stderr)
    finally:
        export_model.keys_read, export_model.spm_prefix = read, prefix
    names = {p.name for p in folder.iterdir()}
    check("no file is left", names == {"model", "spm", "spm.bin", "again", "x.nativeprepend"}, str(names))


# -- What is refused --

def test_refusals(folder: Path) -> None:
    """Each says what it is by name, in one line, and leaves no file."""
    source = save_model(folder / "model", make_network("llama"))
    config = json.loads((source / "config.json").read_text())
    weights, tokenizer = (source / "model.safetensors").read_bytes(), (source / "tokenizer.json").read_text()
    tensors = load_file(source / "model.safetensors")
    spaced = json.loads(tokenizer)
    spaced["pre_tokenizer"] = {"type": "Whitespace"}
    dynamic = {"rope_type": "dynamic", "factor": 2.0, "rope_theta": 1e4}
    n = struct.unpack("<Q", weights[:8])[0]
    header = json.loads(weights[8:8 + n])
    norm = header["model.norm.weight"]
    longer = norm | {"data_offsets": [0, 260]}

    def with_header(change: dict) -> bytes:
        packed = json.dumps({k: v for k, v in (header | change).items() if v is not None}).encode()
        return struct.pack("<Q", len(packed)) + packed + weights[8 + n:]
    cases = [("config.json", json.dumps(config | change), word) for change, word in (
        ({"new_feature": 1}, "new_feature"), ({"model_type": "rwkv"}, "model_type"),
        ({"rope_parameters": dynamic}, "dynamic"), ({"rope_parameters": LLAMA3 | {"twist": 2}}, "twist"),
        ({"hidden_act": "relu"}, "hidden_act"), ({"quantization_config": {"bits": 4}}, "quantization_config"),
        ({"add_cross_attention": True}, "add_cross_attention"), ({"num_attention_heads": 0}, "num_attention_heads"),
        ({"hidden_size": "64"}, "hidden_size"), ({"vocab_size": 321}, "embed_tokens"),
        ({"num_hidden_layers": 3}, "layers.2."), ({"num_hidden_layers": 1}, "layers.1."),
        ({"architectures": ["LlamaForSequenceClassification"]}, "architectures"),
        ({"rms_norm_eps": None, "norm_eps": 1e-5}, "norm_eps"))]
    at = 8 + n + header["model.layers.1.mlp.gate_proj.weight"]["data_offsets"][0] + 4 * (17 * 64 + 63)
    broken = weights[:at] + struct.pack("<f", float("nan")) + weights[at + 4:]
    moe = config | {"model_type": "qwen3_moe", "num_experts": 4, "moe_intermediate_size": 32, "norm_topk_prob": True,
                    "num_experts_per_tok": 2, "attention_bias": False, "mlp_bias": False}
    cases += [("config.json", json.dumps(moe | change), word) for change, word in (
        ({"norm_topk_prob": False}, "norm_topk_prob"), ({"decoder_sparse_step": 2}, "decoder_sparse_step"),
        ({"mlp_only_layers": [1]}, "mlp_only_layers"), ({"num_experts_per_tok": 5}, "num_experts_per_tok"),
        ({"shared_expert_intermediate_size": 32}, "shared_expert_intermediate_size"), ({}, "q_norm"))]
    cases += [("config.json", "{", "not JSON"), ("config.json", "[]", "expected an object"),
              ("tokenizer.json", json.dumps(spaced), "--pre NAME"), ("tokenizer.json", "{}", "tokenizer"),
              ("model.safetensors", weights[:-4], "not copied whole"),
              ("model.safetensors", weights[:50], "not copied whole"),
              ("model.safetensors", broken, "blk.1.ffn_gate.weight has a weight or scale in row 17 that is not finite"),
              ("model.safetensors", with_header({"model.norm.weight": longer}), "not a safetensors file"),
              ("model.safetensors", save({n: t for n, t in tensors.items() if n != "lm_head.weight"}), "lm_head.weight"),
              ("model.safetensors", save(tensors | {"model.extra": torch.zeros(64)}), "model.extra"),
              ("model.safetensors", save(tensors | {"lm_head.weight": torch.zeros(320, 64).to(torch.float8_e4m3fn)}),
               "F8_E4M3")]
    for name, content, word in cases:
        kept = (source / name).read_bytes()
        (source / name).write_bytes(content if isinstance(content, bytes) else content.encode())
        status, stderr = export(source, "-o", folder / "no.bin")
        check(f"{name}: {word}", status == 1 and word in stderr and stderr.count("\n") == 1, f"{status} {stderr}")
        (source / name).write_bytes(kept)
    (source / "model.safetensors").write_bytes(broken)
    (source / "config.json").write_text(json.dumps(config | {"rms_norm_eps": 1e-5}))  # which llama2.c's format has
    for words in (["--to", "gguf", "--type", "q8"], ["--to", "hf"], ["--to", "llama2c", "--type", "q8"]):
        status, stderr = export(source, "-o", folder / "no", *words)
        check(f"NaN {words}", status == 1 and "row 17" in stderr and stderr.count("\n") == 1, stderr)
    (source / "model.safetensors").write_bytes(weights)
    (source / "config.json").write_text(json.dumps(config))
    for type_name, row, size, bad, largest in (
            ("f32", 256, 4, 0x7f800000, 0x7f7fffff), ("f16", 256, 2, 0xfc01, 0x7bff), ("bf16", 256, 2, 0xff80, 0x7f7f),
            ("q8", 8 * 34, 2, 0x7c00, 0x7bff), ("q4m", 8 * 20, 2, 0x7e00, 0xfbff), ("mxfp4", 8 * 17, 1, 253, 252),
            ("q4k", 144, 2, 0x7c00, 0x7bff), ("q6k", 210, 2, 0xfe00, 0x7bff)):
        for number in (bad, largest):
            stored = bytearray(5 * row * (size if type_name in export_model.FLOATS else 1))
            if type_name == "mxfp4":
                stored[:] = b"\x77" * len(stored)  # the greatest weights
                stored[::17] = bytes(len(stored[::17]))
            place = 3 * len(stored) // 5 + (208 if type_name == "q6k" else 0)
            stored[place:place + size] = number.to_bytes(size, "little")
            rows = np.frombuffer(stored, export_model.FLOATS.get(type_name, np.uint8)).reshape(5, -1)
            try:
                export_model.check_finite(rows, type_name, 10)
                said = ""
            except export_model.Refusal as refusal:
                said = str(refusal)
            check(f"{type_name} {number:x}", "row 13 " in said if number == bad else not said, said)
    exported(source, "-o", folder / "yes.gguf", "--to", "gguf", "--pre", "olmo")
    pre = gguf.GGUFReader(folder / "yes.gguf").fields["tokenizer.ggml.pre"].contents()
    check("--pre", pre == "olmo", pre)
    for words, status_wanted in ((["nothing", "-o", folder / "no.bin"], 1), ([source], 2),
                                 ([source, "-o", folder / "no.bin", "--type", "q9"], 2),
                                 ([source, "-o", folder / "model", "--to", "hf"], 1),
                                 ([folder / "yes.gguf", "-o", folder / "yes.gguf", "--to", "gguf"], 1),
                                 ([source, "-o", folder / "no.bin", "--run", folder / "norun"], 1)):
        status, stderr = export(*words)
        check(f"{words[1:]}", status == status_wanted and "Traceback" not in stderr, f"{status} {stderr}")
    damaged = (folder / "yes.gguf").read_bytes()
    for n in (3, 20, 200, 5000, len(damaged) - 8):
        (folder / "short.gguf").write_bytes(damaged[:n])
        status, stderr = export(folder / "short.gguf", "-o", folder / "no.bin")
        check(f"GGUF of {n} bytes", status == 1 and stderr.count("\n") == 1, stderr)
    exported(source, "-o", folder / "yes.bin")
    native = (folder / "yes.bin").read_bytes()
    at = native.index(b"local_theta")
    for name, place, new, word in (("layout", 8, b"\3", "layout 3"), ("family", 24, b"mamba\0", "mamba"),
                                   ("field", at, b"global", "globaltheta"), ("value", at + 32, struct.pack("<d", 7),
                                                                              "local_theta"),
                                   ("tiles", native.index(b"output.weight") + 64, b"\x42", "is of type unknown")):
        (folder / "short.gguf").write_bytes(native[:place] + new + native[place + len(new):])
        status, stderr = export(folder / "short.gguf", "-o", folder / "no.gguf", "--to", "gguf")
        check(f"native: {name}", status == 1 and word in stderr and stderr.count("\n") == 1, stderr)
    check("no file is left", {p.name for p in folder.iterdir()} == {"model", "yes.gguf", "yes.bin", "short.gguf"},
          str(list(folder.iterdir())))


def test_verification_fails(folder: Path) -> None:
    """A writer that errs is found out: rows of the key in the wrong order, a scale a little off."""
    source = save_model(folder / "model", make_network("llama", rms_norm_eps=1e-5))  # which llama2.c's format has
    pair_rows, slabs = export_model.pair_rows, export_model.slabs
    try:
        export_model.pair_rows = lambda w, heads: pair_rows(w, 2 * heads)
        status, stderr = export(source, "-o", folder / "no.bin")
        check("wrong order of rows", status == 1 and "verification failed" in stderr, stderr)
        export_model.pair_rows = pair_rows
        export_model.slabs = lambda t, name: (s * np.float32(1 + (s.ndim > 1) / 64) for s in slabs(t, name))
        for words in (["--type", "f16"], ["--to", "gguf"], ["--to", "llama2c"], ["--to", "hf"]):
            status, stderr = export(source, "-o", folder / "no", *words)
            check(f"a wrong scale: {words}", status == 1 and "verification failed" in stderr, stderr)
    finally:
        export_model.pair_rows, export_model.slabs = pair_rows, slabs
    check("no file is left", [p.name for p in folder.iterdir()] == ["model"])


def main() -> None:
    chosen = sys.argv[1] if len(sys.argv) > 1 else ""
    for name, test in list(globals().items()):
        if name.startswith("test_") and chosen in name:
            print(name.removeprefix("test_").replace("_", " "))
            with tempfile.TemporaryDirectory() as folder:
                test(Path(folder))
    print(f"{passed} passed, {failed} failed")
    sys.exit(failed > 0)


if __name__ == "__main__":
    main()
