#!/usr/bin/env python3
"""Breaks the program in one place at a time: the tests have to notice each time. Standard library and clang.

    python3 tests/mutate.py                all mutants (make mutate)
    python3 tests/mutate.py WORD ...       those whose description contains one of the words
    python3 tests/mutate.py --list         what there is

Five kinds. features: what chapter 5 does for some models only (windows, caps, biases, norms, multipliers, experts,
kinds of rotation) is not done, or a family's row lacks something. texts: what many texts in one pass, rewinding,
forking, unequal threads and the default number of threads need is left out. sessions: what makes a text the same with
a session or with guesses. ranges: a number of the configuration may
be smaller, or larger, than it may; a tensor or key that is needed need not be there. checks: each operand of each
condition that refuses a file, in chapter 10's parsers and validator and where tokenizer.c reads vocabularies, never
holds.

Each mutant is compiled as build/test is, and the groups that concern it run, up to the first failure; what is not
noticed so, more of them with the address sanitizer. What survives is listed, and the last line is the score.

Four more kinds are made by rules, one for each part of the program that chats, scripts and samplers brought: JSON,
templates, samplers, talks (12 and 12a). Each operand of a chain of && holds, each of || does not; a condition never
holds, or always; a case of a switch does nothing; a statement is left out. All of them are in one program, in which a
variable of the environment chooses one (MUTANT), since most tests take less time than the compiler. Left out are
conditions that only end the work earlier after an error, or count it, and those in SPARED, with the reason why no test
can see them. They are some 3,800, so that each fourth is taken unless --every 1 is given.
"""
import argparse
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
TREE = ROOT / "build" / "mutate"
SOURCES = ("run.c", "tokenizer.c")
FILES = ["sizes", "damaged files", "damaged vocabularies", "corpus", "goldens", "containers"]
TEXTS = ["pages", "chunks", "resting", "processors", "stops", "batches", "many texts"]
SESSIONS = ["sessions", "lookup"]
GROUPS = {"features": ["goldens", "damaged files"], "texts": TEXTS, "ranges": FILES, "checks": FILES,
          "sessions": SESSIONS}
SANITIZER = "-g -fsanitize=address,undefined,float-cast-overflow -fno-sanitize-recover=all".split()
HURRY = [  # where a mutant is compiled, so that it takes half the time
    ("tests/test.c", "if (n_failed_in_group == 20)", "fflush(stdout), _exit(1);"),
    ("tests/test.c", "/tmp/cria-test-", "./cria-test-"),  # it ends with the first failure, and leaves its files here
    ("run.c", "defined(__x86_64__)", "0"), ("run.c", "defined(__aarch64__)", "0"),  # one kernel, the definition
]
PARTS = {  # where a file is read: from a line that begins so to one that begins so, or to the end
    "run.c": [("// ---- What a model consists of", "/* ==== 11."), ("static bool check_rows(", "/* ==== 6.")],
    "tokenizer.c": [("// Fills the table for lookup()", "/* ---- Composing"),
                    ("/* ---- Opening a section", None)],
}

# What is done for some models only, as it stands in the source, and as if it were not done. A text that is there
# several times is changed in the first of these places.
FEATURES = [
    # attention
    ("a window of attention", ".window = layer->window ? (size_t)layer->window : SIZE_MAX", ".window = SIZE_MAX"),
    ("the window's size", "? seen_to(a, i) - a->window : 0", "? seen_to(a, i) - a->window + 1 : 0"),
    ("the cap of scores", ".cap = m->config.attention_cap", ".cap = 0"),
    ("the cap's size", "cap * hyperbolic_tangent(y / cap) + (y - y)", "hyperbolic_tangent(y) + (y - y)"),
    ("what a cap would hide", "cap * hyperbolic_tangent(y / cap) + (y - y)", "cap * hyperbolic_tangent(y / cap)"),
    ("what the choice of experts would hide", "sum += p[e] - p[e]", "sum += 0"),
    ("the scale of scores", ".scale = m->config.attention_scale", ".scale = 1 / sqrtf((float)head_dim)"),
    ("query heads that share a key head", ".kv_head = kv_head,", ".kv_head = 0,"),
    ("the cap of logits", "cap = m->config.logit_cap", "cap = 0"),
    ("the scale of logits", "scale = m->config.logit_scale", "scale = 1"),
    ("the scale of embeddings", "columns[i][row % 16] * m->config.embedding_scale", "columns[i][row % 16]"),
    ("the scale of what a block adds", "out[r] * m->config.residual_scale", "out[r]"),
    ("GELU", "(Activation)m->config.activation", "SILU"),
    ("a head of its own", "w->logits_stride, &m->head", "w->logits_stride, &m->embedding"),
    # biases
    ("query's bias", "&layer->query, layer->query_bias", "&layer->query, NULL"),
    ("key's bias", "&layer->key, layer->key_bias", "&layer->key, NULL"),
    ("value's bias", "&layer->value, layer->value_bias", "&layer->value, NULL"),
    ("attention's bias", "&layer->attention_out, layer->attention_out_bias", "&layer->attention_out, NULL"),
    ("gate's bias", "&layer->gate, layer->gate_bias", "&layer->gate, NULL"),
    ("up's bias", "&layer->up, layer->up_bias", "&layer->up, NULL"),
    ("down's bias", "&layer->down, layer->down_bias", "&layer->down, NULL"),
    # norms
    ("the norm before attention", "&v, layer->attention_norm,", "&v, NULL,"),
    ("the norm before the feed-forward layer", "&v, layer->ffn_norm,", "&v, NULL,"),
    ("the norm before experts", "&v, layer->ffn_norm, layer->ffn_norm_bias, FFN_NORM, l, team);\n    multiply_all(",
     "&v, NULL, NULL, FFN_NORM, l, team);\n    multiply_all("),
    ("the last norm", "&v, m->final_norm,", "&v, NULL,"),
    ("the norm after attention", "&input, layer->attention_post_norm,", "&input, NULL,"),
    ("the norm after the feed-forward layer", "&input, layer->ffn_post_norm,", "&input, NULL,"),
    ("the bias of attention's norm", "layer->attention_norm, layer->attention_norm_bias",
     "layer->attention_norm, NULL"),
    ("the bias of the feed-forward layer's norm", "layer->ffn_norm, layer->ffn_norm_bias", "layer->ffn_norm, NULL"),
    ("the last norm's bias", "m->final_norm, m->final_norm_bias", "m->final_norm, NULL"),
    ("LayerNorm subtracts the mean", "float mean = bias ? fold_lanes(of_mean) / (float)dim : 0.0f",
     "float mean = 0.0f"),
    ("LayerNorm adds the bias", "for (i = 0; bias && i < dim; i++) out[i] += bias[i];", ""),
    ("RMSNorm subtracts nothing", "of_mean[i % 16] += x[i];\n    float mean = bias ?",
     "of_mean[i % 16] += x[i];\n    for (i = 0; i < dim; i++) of_mean[i % 16] += x[i];\n    float mean = 1 ?"),
    ("the norm of query heads", "is_key ? layer->key_norm : layer->query_norm", "is_key ? layer->key_norm : NULL"),
    ("the norm of key heads", "is_key ? layer->key_norm : layer->query_norm", "is_key ? NULL : layer->query_norm"),
    ("norms of all heads at once", "if (m->config.wide_head_norms) normalise_wide(m, w, layer, l, team);", ""),
    ("the wide norm of queries", "kernels->normalise(query, query, layer->query_norm",
     "if (0) kernels->normalise(query, query, layer->query_norm"),
    ("the wide norm of keys", "kernels->normalise(key, key, layer->key_norm",
     "if (0) kernels->normalise(key, key, layer->key_norm"),
    ("wide norms take the place of those of heads", "c->wide_head_norms ? NULL : is_key", "is_key"),
    ("epsilon", "sqrtf(sum / (float)dim + eps)", "sqrtf(sum / (float)dim + 1e-5f)"),
    # experts
    ("experts are chosen by their logits", "p[e] > p[best[at - 1]]", "p[e] < p[best[at - 1]]"),
    ("how many experts", "layer->n_experts, layer->n_experts_used);\n        memset",
     "layer->n_experts, 1);\n        memset"),
    ("experts' weights", "p[best[i]] = weight[i] / sum", "p[best[i]] = 1.0f / (float)n_used"),
    ("experts' weights add up to 1", "for (int i = 0; i < n_used; i++) sum += weight[i]",
     "for (int i = n_used; i < n_experts; i++) sum += exponential(p[i] - p[best[0]]);\n    for (int i = 0; i < "
     "n_used; i++) sum += weight[i]"),
    ("the weight of each expert", "x->routes + t * x->routes_stride + visits->expert, *y",
     "x->routes + t * x->routes_stride, *y"),
    ("each expert has matrices of its own", "w->tiles + a->expert * tensor_bytes(w)", "w->tiles"),
    ("tokens go to their experts only", "if (x->routes[(size_t)t * x->routes_stride + e] != 0) x->visitors",
     "if (x->routes[(size_t)t * x->routes_stride + e] >= 0) x->visitors"),
    # rotation
    ("the pairing of neighbours", "c->rope_dim, c->pairing)", "c->rope_dim, HALVES)"),
    ("the pairing of halves", "c->rope_dim, c->pairing)", "c->rope_dim, ADJACENT)"),
    ("layers that do not rotate", "if (layer->angles)\n        kernels->rotate", "kernels->rotate"),
    ("angles of layers with a window", "(layer->angles == LOCAL) *", "0 *"),
    ("theta", "pow(c->rope_theta,", "pow(10000,"), ("local theta", "pow(c->local_theta,", "pow(20000,"),
    ("heads that are rotated in part", "-2.0 * i / c->rope_dim) / slow_down", "-2.0 * i / c->head_dim) / slow_down"),
    ("heads are rotated in part", "angles * (size_t)c->rope_dim, c->rope_dim,",
     "angles * (size_t)c->rope_dim, c->head_dim,"),
    ("the magnitude", "size = i < half ? c->rope_magnitude : 1", "size = 1"),
    ("no magnitude of local angles", "size = i < half ? c->rope_magnitude : 1", "size = c->rope_magnitude"),
    ("angles that are scaled", " / slow_down(m, context, i);", ";"),
    ("local angles are not scaled", "pow(c->local_theta, -2.0 * i / c->rope_dim);",
     "pow(c->local_theta, -2.0 * i / c->rope_dim) / slow_down(m, context, i);"),
    ("linear scaling", "double scale = c->rope_scale, ramp = 1", "double scale = 1, ramp = 1"),
    ("factors of the angles", "(own ? (double)own[pair] : 1)", "1"),
    ("LLaMA 3.1's factors", "m->rope_factors ? m->rope_factors :", ""),
    ("LongRoPE's long factors", "context > original ? m->long_factors", "0 ? m->long_factors"),
    ("LongRoPE's short factors", "context > original ? m->long_factors", "1 ? m->long_factors"),
    ("LongRoPE goes by the context in use", "context > original ? m->long_factors",
     "c->context > original ? m->long_factors"),
    ("YaRN", "if (c->yarn_fast > 0)", "if (0)"),
    ("YaRN only where it is asked for", "if (c->yarn_fast > 0)", "if (1)"),
    ("YaRN's original context", "int original = c->original_context ?", "int original = 0 ?"),
    ("YaRN's fast pairs", "once - pairs * log(c->yarn_fast)", "once - pairs * log(32)"),
    ("YaRN's slow pairs", "once - pairs * log(c->yarn_slow)", "once"),
    ("YaRN's ramp begins at a whole pair", "fmax(floor(once", "fmax((once"),
    ("YaRN's ramp ends at a whole pair", "fmin(ceil(once", "fmin((once"),
    ("YaRN's ramp begins at 0", "fmax(floor(once - pairs * log(c->yarn_fast)), 0)",
     "floor(once - pairs * log(c->yarn_fast))"),
    ("YaRN's ramp is no less than 0", "fmin(fmax((pair - first) / fmax(last - first, 0.001), 0), 1)",
     "fmin((pair - first) / fmax(last - first, 0.001), 1)"),
    ("YaRN's ramp is no more than 1", "fmin(fmax((pair - first) / fmax(last - first, 0.001), 0), 1)",
     "fmax((pair - first) / fmax(last - first, 0.001), 0)"),
    # what chapter 10 sets for a family
    ("Gemma's scale of embeddings", "c->embedding_scale = sqrtf((float)c->dim)", "c->embedding_scale = 1"),
    ("Gemma's GELU", "c->activation = GELU", "c->activation = SILU"),
    ("Gemma 2's usual cap of scores", "c->attention_cap == 0) c->attention_cap = 50", "0) c->attention_cap = 50"),
    ("Gemma 2's own cap of scores", "c->attention_cap == 0) c->attention_cap = 50", "1) c->attention_cap = 50"),
    ("Gemma 2's usual cap of logits", "c->logit_cap == 0) c->logit_cap = 30", "0) c->logit_cap = 30"),
    ("Gemma 2's own cap of logits", "c->logit_cap == 0) c->logit_cap = 30", "1) c->logit_cap = 30"),
    ("the largest Gemma 2's scale of scores", "c->n_layers == 46 ||", ""),
    ("the largest Gemma 3's scale of scores", "|| c->n_layers == 62", ""),
    ("only the largest Gemmas' scale of scores", "(c->n_layers == 46 || c->n_layers == 62)", "1"),
    ("only Gemmas' scale of scores", "f->features & GEMMA && (c->n_layers == 46", "(c->n_layers == 46"),
    ("the file's scale of scores", "if (c->attention_scale == 0) c->attention_scale", "c->attention_scale"),
    ("Granite divides logits", "c->logit_scale = 1 / c->logit_scale", "(void)0"),
    ("local theta is the usual one", "c->local_theta == 0 && f->local_theta < 0 && m->layers->window", "0"),
    ("the usual theta only where there is a window", "f->local_theta < 0 && m->layers->window)", "f->local_theta < 0)"),
    ("the family's local theta", "if (c->local_theta == 0) c->local_theta = fmax(f->local_theta, 0);", ""),
    ("the file's local theta", "if (c->local_theta == 0) c->local_theta = fmax(f->local_theta, 0);",
     "c->local_theta = fmax(f->local_theta, 0);"),
    ("windows by a pattern", "pattern ? !key_number", "0 ? !key_number"),
    ("the pattern's layers", "!key_number(pattern, (size_t)l)", "key_number(pattern, (size_t)l)"),
    ("windows of all but every n-th layer", ": every && (l + 1) % every == 0", ": 0"),
    ("windows by the family", "0, MAX_CONTEXT, family->global_every)", "0, MAX_CONTEXT, 0)"),
    ("windows by a number", "get_integer(g, name, 0, MAX_CONTEXT, family->global_every)",
     "family->global_every"),
    ("layers that do not rotate, by the family", "!f->no_rope_every || (l + 1) % f->no_rope_every", "true"),
    ("angles of a window, by the family", "layer->window && c->local_theta > 0 ? LOCAL", "0 ? LOCAL"),
    ("local angles only of layers with a window", "layer->window && c->local_theta > 0 ? LOCAL",
     "c->local_theta > 0 ? LOCAL"),
    ("local angles only where there is a theta", "layer->window && c->local_theta > 0 ? LOCAL",
     "layer->window ? LOCAL"),
    ("LayerNorm's own key of epsilon", 'layer_norm ? ".attention.layer_norm_epsilon" : f->key', "f->key"),
    # what files say of the rotation, and of sizes
    ("scaling none", "factor == 0 || none ? 1", "factor == 0 ? 1"),
    ("scaling by 0", "factor == 0 || none ? 1", "none ? 1"),
    ("the older key of linear scaling", 'get_number(g, ".rope.scale_linear", 1e-6, 1e6, 1)', "1"),
    ("YaRN's magnitude", "magnitude = (1 + x) / (1 + all * x)", "magnitude = 1"),
    ("YaRN's multiplier of the logarithm", "/ (1 + all * x)", ""),
    ("YaRN's magnitude of less than 1", "0.1 * log(fmax(factor, 1))", "0.1 * log(factor)"),
    ("YaRN's usual fast pairs", '".rope.scaling.yarn_beta_fast", 1e-6, 1e6, 32)',
     '".rope.scaling.yarn_beta_fast", 1e-6, 1e6, 16)'),
    ("YaRN's usual slow pairs", '".rope.scaling.yarn_beta_slow", 1e-6, 1e6, 1)',
     '".rope.scaling.yarn_beta_slow", 1e-6, 1e6, 2)'),
    ("LongRoPE's usual magnitude", "original > 0 && has_factors ? sqrt", "0 ? sqrt"),
    ("LongRoPE's magnitude is LongRoPE's", "original > 0 && has_factors ? sqrt", "original > 0 ? sqrt"),
    ("LongRoPE's magnitude of an unscaled context", "log(fmax(c->context / original, 1))",
     "log(c->context / original)"),
    ("the file's magnitude", "c->rope_magnitude > 0 ? c->rope_magnitude : usual", "usual"),
    ("the width of an expert", "if (y->n_experts) y->ffn_dim =", "if (0) y->ffn_dim ="),
    ("as many key heads as heads", "if (!y->n_kv_heads) y->n_kv_heads = y->n_heads;", ""),
    ("the usual width of a head", "if (!c->head_dim) c->head_dim =", "if (0) c->head_dim ="),
    ("all of a head is rotated", "if (!c->rope_dim) c->rope_dim =", "if (0) c->rope_dim ="),
    ("the embedding is the head", "if (!m->head.tiles) m->head = m->embedding;", ""),
    ("experts' tensors by name", 'by_expert ? "_exps" : ""', '""'),
    ("several in one tensor", "fused->rows > slot->rows ? fused : NULL", "0 ? fused : NULL"),
    ("up alone is not gate and up", "fused->rows > slot->rows ? fused : NULL", "1 ? fused : NULL"),
    ("places within one tensor", "slot->first_row = s->rows_used;", "slot->first_row = 0;"),
]

# Texts, threads and processors, likewise.
MACHINE = [
    # pages
    ("a page that is shared is copied", "!is_new && c->users[old] > 1", "false"),
    ("only a page that is shared is copied", "!is_new && c->users[old] > 1", "!is_new && c->users[old] > 0"),
    ("pages are copied", "memcpy(page_at(c, *page),", "memmove(page_at(c, old),"),
    ("the last number of a page is copied", "page_at(c, old), c->page_bytes);", "page_at(c, old), c->page_bytes - 1);"),
    ("a text that has its copy gives the page back", "if (is_shared) c->users[old]--;", ""),
    ("a page has one user", "c->spare[--c->n_spare]] = 1;", "c->spare[--c->n_spare]] = 2;"),
    ("pages are given back", "if (--c->users[s->pages[i]] == 0) c->spare", "if (0) c->spare"),
    ("pages that others hold are not given back", "if (--c->users[s->pages[i]] == 0) c->spare",
     "if (--c->users[s->pages[i]] >= 0) c->spare"),
    ("a page with tokens left is kept", "for (size_t i = n_pages(n); i < n_pages(s->n); i++)",
     "for (size_t i = (size_t)n / PAGE; i < n_pages(s->n); i++)"),
    ("the last page is given back too", "for (size_t i = n_pages(n); i < n_pages(s->n); i++)",
     "for (size_t i = n_pages(n); i < (size_t)s->n / PAGE; i++)"),
    ("rewinding adds nothing", "if (n < s->n) s->n = n;", "s->n = n;"),
    ("a fork gives back what it had", "rewind_sequence(to, 0);\n", ""),
    ("a fork counts as a user", "to->cache->users[to->pages[i] = from->pages[i]]++;", "to->pages[i] = from->pages[i];"),
    ("a fork has the last page", "i < n_pages(n); i++) to->cache", "i < (size_t)n / PAGE; i++) to->cache"),
    ("a fork has the tokens", "memcpy(to->ids, from->ids,", "memmove(to->ids, to->ids,"),
    # passes
    ("a pass that fails takes its tokens back", "    undo_rows(w, n);\n", ""),
    ("a row out of place takes back those before it", "            undo_rows(w, t);\n", ""),
    ("a row is at the next position", "if (rows[t].position != s->n || ", "if ("),
    ("a text ends with the context", " || s->n == s->cache->context)", ")"),
    ("not more rows than a batch", "if (n > w->settings.batch) return", "if (0) return"),
    ("new angles", "if ((size_t)s->n > new_angles.to) new_angles.to", "if (0) new_angles.to"),
    ("logits of the rows that want some", "w->wanted + job->first,", "w->wanted,"),
    ("a text's own keys", "s = &w->sequences[w->rows[first].sequence]", "s = w->sequences"),
    ("a text's own cache", "store(&w->sequences[w->rows[t].sequence],", "store(w->sequences,"),
    ("a row's own position", ".position = (size_t)w->rows[first].position", ".position = (size_t)w->rows[0].position"),
    ("a unit is of one text", " && w->rows[end].sequence == w->rows[first].sequence", ""),
    ("a unit has an end", "end < w->n && end - first < most && ", "end < w->n && "),
    ("a unit's place", "run < i / n_kv_heads; run++", "run + 1 < i / n_kv_heads; run++"),
    # one token far down a text
    ("the largest of all pages", "return of_page[likeliest(of_page,", "return of_page[0 & likeliest(of_page,"),
    ("the largest of the last page", "(int)((seen.to - 1) / PAGE - seen.from / PAGE) + 1)]",
     "(int)((seen.to - 1) / PAGE - seen.from / PAGE))]"),
    ("the largest of the first page", "+ q * n_pages + seen.from / PAGE;", "+ q * n_pages + seen.from / PAGE + 1;"),
    ("the largest of its own unit", "is_next_unit = i == r.from || i % n_pages == 0;", "is_next_unit = i == r.from;"),
    ("the largest at a chunk's beginning", "is_next_unit = i == r.from || i % n_pages == 0;",
     "is_next_unit = i % n_pages == 0;"),
    ("a window that begins within a page", "seen_from(&a, 0) > p.from ? seen_from(&a, 0) - p.from : 0", "0"),
    ("no page before the window", "q < (size_t)a.group && p.from < p.to; q++) {", "q < (size_t)a.group; q++) {"),
    ("a page's end", "if (seen.to > page * PAGE + PAGE) seen.to = page * PAGE + PAGE;", ""),
    ("weights are added from all positions", "p < seen.to; p += 16)\n            for (int j",
     "p + 16 < seen.to; p += 16)\n            for (int j"),
    ("weights are added lane by lane", "lane[j] += weights[p + (size_t)j];", "lane[0] += weights[p + (size_t)j];"),
    ("units of all rows", "unit_of(m, w, l, (int)(i / n_kv_heads), 1, i % n_kv_heads)",
     "unit_of(m, w, l, 0, 1, i % n_kv_heads)"),
    ("units of all heads", "unit_of(m, w, l, (int)(i / n_kv_heads), 1, i % n_kv_heads)",
     "unit_of(m, w, l, (int)(i / n_kv_heads), 1, 0)"),
    ("units have room of their own", "w->scratch + i * (size_t)a.group * (", "w->scratch + 0 * ("),
    ("all columns", "i * 16 % n_columns + 16 };", "i * 16 % n_columns + 8 };"),
    # chunks
    ("chunks of whole units", "(n < CHUNKS * threads), multiple)", "(n < CHUNKS * threads), 1)"),
    ("several chunks of a share", "CHUNKS = 8 }", "CHUNKS = 1 }"),
    ("chunks of the others", "team->n_helped < team->threads; team->n_helped++",
     "team->n_helped < 1; team->n_helped++"),
    ("a share's end", "if (i >= end) continue;", ""),
    ("the last share", "end = n_chunks * (owner + 1) / threads", "end = n_chunks / threads * (owner + 1)"),
    ("a share's own beginning", "size_t first = n_chunks * owner / threads, end", "size_t first = 0, end"),
    ("a share's own count", "&team->gate->seats[owner].taken[team->n_steps % 2]",
     "&team->gate->seats[team->thread].taken[team->n_steps % 2]"),
    ("the last chunk's end", "(i + 1) * size < n ? (i + 1) * size : n };", "(i + 1) * size };"),
    ("each chunk once", "first + atomic_fetch_add_explicit(taken, 1,", "first + atomic_fetch_add_explicit(taken, 0,"),
    ("counts begin anew", "seats[team->thread].taken[(team->n_steps + 1) % 2], 0,",
     "seats[team->thread].taken[(team->n_steps + 1) % 2], 1,"),
    ("counts of even and odd steps", "seats[owner].taken[team->n_steps % 2]", "seats[owner].taken[0]"),
    ("its own share first", "team->n_steps++;\n    team->n_helped = 0;", "team->n_steps++;"),
    ("one thread takes all once", "return n > 0 && team->n_helped++ == 0;", "return team->n_helped++ == 0;"),
    ("nobody goes on alone", "for (int i = 0; atomic_load(&gate->round) == round; i += i <= EAGER)",
     "for (int i = 0; 0; i += i < INT_MAX)"),
    # threads that rest
    ("a trial that is no faster ends", "if (!is_faster) r->n_resting--;", ""),
    ("a trial follows two slow passes", "&& r->n_slow >= 2 &&", "&& r->n_slow >= 1 &&"),
    ("a trial beats the faster of two", "if (r->n_slow <= 1 || is_faster) r->seconds", "r->seconds"),
    ("only like passes are compared", "is_like_last ? r->n_slow + 1 : 1", "r->n_slow + 1"),
    ("only a like trial is compared", "is_like_last && seconds < r->seconds", "seconds < r->seconds"),
    ("a rest lasts", "r->left = r->wait = r->wait < 128", "r->wait = r->wait < 128"),
    ("rests grow", "? 2 * r->wait + 8 : 256", "? 8 : 256"),
    ("no rest gets too long", "r->wait < 128 ? 2 * r->wait + 8 : 256;", "2 * r->wait + 8;"),
    ("a rest that is not needed gets shorter", "if (!is_slow && r->wait) r->wait--;", "{}"),
    ("a trial has to be faster", "bool is_faster = is_like_last && seconds < r->seconds;", "bool is_faster = true;"),
    ("a rest has an end", "else if (r->n_resting) r->n_resting--;", ""),
    ("a rest is for a reason", "bool is_slow = slept > seconds / 8", "bool is_slow = slept >= 0"),
    ("a thread works", "r->n_resting < r->threads - 1;", "r->n_resting < r->threads;"),
    # processors
    ("a list's first number", "found |= from <= cpu && cpu <= to;", "found |= cpu <= to;"),
    ("a list's last number", "found |= from <= cpu && cpu <= to;", "found |= from <= cpu;"),
    ("a number alone", "        to = from;\n", "        to = INT_MAX;\n"),
    ("what follows a range", "&to) == 1) end = fgetc(f);", "&to) == 1) end = 0;"),
    ("no list, all of them", "bool found = !f;", "bool found = false;"),
    ("a quota", "if (n > 0 && quota > 0 && period > 0) least", "if (0) least"),
    ("a quota of nothing", "if (n > 0 && quota > 0 && period > 0) least", "if (n > 0 && period > 0) least"),
    ("a period of nothing", "if (n > 0 && quota > 0 && period > 0) least", "if (n > 0 && quota > 0) least"),
    ("the quotas of groups above", "end; end = strrchr(group, '/')) {", "end; end = NULL) {"),
    ("version 1's period", "if (n == 1 && !of_memory) read_numbers", "if (0) read_numbers"),
    ("version 1's controllers", 'if (!second && !strstr(path, of_memory ? ",memory," : ",cpu,")) continue;', ""),
    ("version 1's folder", 'second ? "" : folder, group', '"", group'),
    ("at least one processor", "fmax(group_limit(false), 1)", "group_limit(false)"),
    ("the least of all quotas", "least = fmin(least, quota / period);", "least = quota / period;"),
    ("the quota by default", "if (by_default) n = (long)fmin(", "if (0) n = (long)fmin("),
    ("the quota only by default", "if (by_default) n = (long)fmin(", "n = (long)fmin("),
    ("small cores", "is_first && is_large &&", "is_first &&"),
    ("not much smaller cores", "is_large = 2 * cpu_number", "is_large = cpu_number"),
    ("a core's second thread", "bool is_first = first == cpu ||", "bool is_first = 1 ||"),
    ("a second thread whose first is not ours", "|| !CPU_ISSET_S(first, sizeof allowed, allowed);", ";"),
    ("cores of performance", '&& is_listed("/sys/devices/cpu_core/cpus", cpu);', ";"),
    ("all cores on demand", "for (int cpu = 0; by_default && cpu < MOST_CPUS; cpu++) {",
     "for (int cpu = 0; cpu < MOST_CPUS; cpu++) {"),
    ("many processors", "MOST_CPUS = 1 << 16", "MOST_CPUS = 1 << 10"),
]

# Sessions and guesses, likewise.
KEPT = [
    ("the last token of a session goes through again", "i < h.n && i + 1 < tokens->n &&",
     "i < h.n && i < tokens->n &&"),
    ("a session's tokens are the text's", "&& ids[i] == tokens->ids[i]; i++)", "; i++)"),
    ("a session's pages have a checksum", "&& stored == sum;", ";"),
    ("a session's beginning has a checksum", "&& sum_head(&h, ids) == h.head_sum;", ";"),
    ("a refused session leaves nothing", "if (!ok) rewind_sequence(s, 0);\n    free(ids", "free(ids"),
    ("a session's number of tokens", "bool ok = h.n <= MAX_CONTEXT && fread(", "bool ok = fread("),
    ("a session's beginning is whole", "fread(ids, sizeof *ids, h.n, f) == h.n &&",
     "fread(ids, sizeof *ids, h.n, f) &&"),
    ("a session's model", "else if (h.model != wanted.model)", "else if (0)"),
    ("a session's settings", "else if (h.settings != wanted.settings)", "else if (0)"),
    ("a session's rounding", "kinds = w->settings.exact + 2u *", "kinds = 2u *"),
    ("a session's type of cache", "+ 2u * w->settings.cache_f32;", ";"),
    ("a session's angles", "w->rotation.turns, (size_t)m->config.rope_dim * sizeof(double));", "w->rotation.turns, 0);"),
    ("a session's weights", "if (some) h.model = add_sum(", "if (0) h.model = add_sum("),
    ("a session's configuration", "add_sum(h.model, &(double){ get_field(m, f, l) }", "add_sum(h.model, &(double){ 0 }"),
    ("all of a page is kept in a session", "page_at(c, page), c->page_bytes)) return",
     "page_at(c, page), c->page_bytes - 2)) return"),
    ("a guess is chosen from as if it were not there", "n = s->n -= n_rows - 1 - row;",
     "n = s->n - (n_rows - 1 - row);"),
    ("a wrong guess is taken back", "rewind_sequence(s, n);\n        if (*why", "if (*why"),
    ("only the right guess counts", "n < end && s->ids[n] == c->last;", "n < end;"),
    ("guesses up to -n", "(int)(most < left ? most : left)", "(int)most"),
    ("guesses up to the context's end", "(s->cache->context - s->n - 1), left", "(s->cache->context), left"),
    ("guesses up to a pass's rows", "most = (size_t)w->settings.batch - 1;\n    s->ids", "most = 1023;\n    s->ids"),
    ("a guess fails alone", "if (n == 1) return 0;", "return 0;"),
    ("and leaves no error", ";; n = 1, e->status = DONE) {", ";; n = 1) {"),
    ("the latest of matches", "if (length > best) best = length, next = at;",
     "if (length >= best) best = length, next = at;"),
    ("a guess is no longer than its match", "most < best ? most : best;", "most;"),
]

# Checks that are no `if (...) return refuse(...)`.
CHECKS = [
    ("tokenizer.c", "c->bad || n > c->left", "c->bad"), ("tokenizer.c", "c->bad || n > c->left", "n > c->left"),
    ("run.c", "__builtin_mul_overflow(a, b, &product) ? SIZE_MAX : product", "a * b + 0 * (product = 0)"),
    ("run.c", "a > SIZE_MAX - b ? SIZE_MAX : a + b", "a + b"),
    ("run.c", "up == SIZE_MAX ? up : up / step * step", "up / step * step"),
    ("run.c", "i < k->count && !c->bad;", "i < k->count;"),
    ("run.c", "if (type != G_STRING) take(c, times(k->count,", "if (type != G_STRING) take(c, times(0,"),
    ("run.c", "if (k && !fits && !g->bad)", "if (0)"), ("run.c", "if (k && !fits && !g->bad)", "if (k && !fits)"),
    ("run.c", "if (!fits && !g->bad)", "if (!fits)"), ("run.c", "k && k->is_array == is_array &&", "k &&"),
    ("run.c", "(k->type == type || strchr(kinds, gguf_types[k->type].name[0]))", "true"),
    ("run.c", 'type == G_INTEGER ? "ui" :', 'type == G_INTEGER ? "uif" :'),
    ("run.c", 'type == G_NUMBER ? "uif" :', 'type == G_NUMBER ? "uifb" :'),
    ("run.c", "get_value(g, name, G_BOOL, 0, 1, -1)", "get_value(g, name, G_BOOL, 0, 255, -1)"),
    ("run.c", "get_value(g, name, G_INTEGER, -1, UINT32_MAX, -1)", "get_value(g, name, G_INTEGER, -9, UINT32_MAX, -1)"),
    ("run.c", "get_value(g, name, G_INTEGER, -1, UINT32_MAX, -1)", "get_value(g, name, G_INTEGER, -1, 1e18, -1)"),
    ("run.c", "id < fmin((double)n_tokens, MAX_TOKENS)", "id < 1e9"),
    ("run.c", "if (k->used || isnan(harmless)) return true;", "return true;"),
    ("run.c", "if (k->type == G_STRING) return false;", "if (k->type == G_STRING) return true;"),
    ("run.c", "if (key_number(k, i) != harmless) return false;", "if (key_number(k, i) != harmless) return true;"),
    ("run.c", "if (!set_field(m, f, l, get_field(m, f, l), e)) return false;", ";"),
    ("run.c", "if (g->bad) return false;\n    if (v.kind", "if (v.kind"),
    ("run.c", "if (g->bad) return false;\n    if (count", "if (count"),
    ("run.c", "return !g->bad;", "return true;"),
    ("run.c", "find_family(g.family, e) && read_gguf", "read_gguf"),
    ("run.c", "if (broken_row(&matrix, tile)", "if (0 && broken_row(&matrix, tile)"),
    ("run.c", "if (job.broken) return check_weights(m, e);", ""),
    ("run.c", "if (!finite && (n > 1 || team->thread == 0) && !w->broken[row])", "if (0)"),
    ("run.c", "return sum < INFINITY;", "return true;"),
    ("run.c", "& 0x7fffffff) < 0x7f800000;", "& 0x7fffffff) <= 0x7fffffff;"),
    ("run.c", "for (uint32_t i = 0; i < n_dims && i < 4; i++)", "for (uint32_t i = 0; i < n_dims; i++)"),
    ("run.c", 'refuse(e, "models of family \\"%s\\" are not supported", name);\n    return NULL;', "return families;"),
    ("run.c", "if (!version && h.n_tokens < 0 && h.n_tokens > INT32_MIN)", "if (!version && h.n_tokens < 0)"),
    ("run.c", "s->name[NAME_BYTES - 1] = 0;", ""),
    ("run.c", "qsort(sources, n, sizeof *sources, by_place);", ""),
    ("tokenizer.c", "s.n > 2 && s.n < sizeof bytes ?", "s.n < sizeof bytes ?"),
    ("tokenizer.c", "s.n > 2 && s.n < sizeof bytes ?", "s.n > 2 ?"), ("tokenizer.c", "if (!space) continue;", ""),
    ("tokenizer.c", "ids[0] >= 0 && ids[1] >= 0 && ids[2] >= 0 &&", "ids[1] >= 0 && ids[2] >= 0 &&"),
    ("tokenizer.c", "ids[0] >= 0 && ids[1] >= 0 && ids[2] >= 0 &&", "ids[0] >= 0 && ids[2] >= 0 &&"),
    ("tokenizer.c", "ids[0] >= 0 && ids[1] >= 0 && ids[2] >= 0 &&", "ids[0] >= 0 && ids[1] >= 0 &&"),
    ("tokenizer.c", "s.n == 6 && ", ""), ("tokenizer.c", '!memcmp(s.at, "<0x", 3) && ', ""),
    ("tokenizer.c", " && s.at[5] == '>'", ""), ("tokenizer.c", "return byte != NOT_UTF8;", "return true;"),
    ("tokenizer.c", "n_character <= 0 || code < 33", "code < 33"), ("tokenizer.c", "|| code < 33 ||", "||"),
    ("tokenizer.c", "|| (code > 126 && code < 161) ", ""), ("tokenizer.c", "|| code == 173 ", ""),
    ("tokenizer.c", "|| code > 323)", ")"),
    ("tokenizer.c", "bool known = id >= 0 && id < t->n_tokens;", "bool known = id >= 0;"),
    ("tokenizer.c", "bool known = id >= 0 && id < t->n_tokens;", "bool known = id < t->n_tokens;"),
]


@dataclass
class Mutant:
    kind: str
    source: str
    line: int
    what: str
    text: str  # of the whole source
    number: int = 0

    def __str__(self) -> str:
        return f"{self.kind:8} {self.source}:{self.line}: {self.what}"


def end_of(text: str, i: int) -> int:
    """Behind what begins at i: a string, a character, a bracket with all that is in it, or one letter."""
    opened = text[i]
    if opened in "\"'(":
        i += 1
        while text[i] != (")" if opened == "(" else opened):
            i = end_of(text, i) if opened == "(" else i + 1 + (text[i] == "\\")
    return i + 1


def split(text: str, begin: int, end: int, operator: str) -> list[tuple[int, int]]:
    """The operands of a chain of || or && that are not inside of brackets."""
    parts, i, start = [], begin, begin
    while i < end:
        if text[i] == "?":
            return [(begin, end)]
        if text.startswith(operator, i):
            parts.append((start, i))
            start = i = i + 2
        else:
            i = end_of(text, i)
    return parts + [(start, end)]


def operands(text: str, begin: int, end: int) -> list[tuple[int, int]]:
    """Each condition that alone can make the whole one hold."""
    while text[begin].isspace():
        begin += 1
    while text[end - 1].isspace():
        end -= 1
    if text[begin] == "(" and end_of(text, begin) == end:
        return operands(text, begin + 1, end - 1)
    parts = split(text, begin, end, "||")
    if len(parts) > 1:
        return [leaf for a, b in parts for leaf in operands(text, a, b)]
    parts = split(text, begin, end, "&&")
    inner = [operands(text, a, b) for a, b in parts if len(parts) > 1]
    return [leaf for leaves in inner if len(leaves) > 1 for leaf in leaves] or [(begin, end)]


def checks(source: str, text: str) -> list[Mutant]:
    found = []

    def mutant(begin: int, end: int, new: str) -> None:
        what = " ".join(f"{text[begin:end]} -> {new}".split())
        found.append(Mutant("checks", source, text.count("\n", 0, begin) + 1, what, text[:begin] + new + text[end:]))

    for first, last in PARTS[source]:
        low = text.index("\n" + first)
        high = text.index("\n" + last, low) if last else len(text)
        for match in re.compile(r"\brefuse(_key)?\(").finditer(text, low, high):
            at, end, before = match.start(), end_of(text, match.end() - 1), text[:match.start()]
            governed = re.search(r"\)(\s|//.*\n)*(return |ok = |g->bad = !)?$", before)
            if governed:
                opening = next(i for i in range(at, low, -1) if text.startswith("if (", i) and
                               end_of(text, i + 3) == governed.start() + 1)
                for a, b in operands(text, opening + 4, governed.start()):
                    mutant(a, b, "0")
            elif re.search(r"(\|\|\s*|return )$", before):
                mutant(at, end, "true")
            elif not before.endswith("static bool ") and "models of family" not in text[at:end]:
                sys.exit(f"{source}: not understood: {text[at:end]}")
    for name, old, new in CHECKS:
        if name == source:
            if old not in text:
                sys.exit(f"{source} has no {old}")
            at = text.index(old)
            mutant(at, at + len(old), new)
    return found


def ranges(text: str) -> list[Mutant]:
    found = []

    def mutant(begin: int, end: int, new: str, what: str) -> None:
        found.append(Mutant("ranges", "run.c", text.count("\n", 0, begin) + 1, what, text[:begin] + new + text[end:]))

    for m in re.finditer(r'\{ "(\w+)", (?:INTEGER|SINGLE|DOUBLE), \w+, offsetof\(\w+, \w+\), ([^,]+), ([^,]+),', text):
        mutant(*m.span(2), "-1e300", f"{m[1]} may be less than {m[2]}")
        mutant(*m.span(3), "1e300", f"{m[1]} may be more than {m[3]}")
    for m in re.finditer(r'get_(?:number|integer)\(g, ("[^"]+"), ([^,]+), ([^,]+),', text):
        mutant(*m.span(2), "-1e300", f"{m[1]} may be less than {m[2]}")
        mutant(*m.span(3), "1e300", f"{m[1]} may be more than {m[3]}")
    for m in re.finditer(r'\{ ("[\w.%]+"), offsetof\(\w+, \w+\), \w+, \w+, ([\w |]+), ', text):
        needed = [word for word in m[2].split(" | ") if word != "OPTIONAL"]
        if needed:
            mutant(*m.span(2), "OPTIONAL", f"{m[1]} is not needed")
    return found


def families(text: str) -> list[Mutant]:
    """Each entry of the rows of the table."""
    found = []
    begin = text.index("static const Family families[]")
    entries = r'\{ "(\w+)", (\w+), \.features = ([\w |]+)((?:,\s+\.\w+ = -?\d+)*) \}'
    for row in re.finditer(entries, text[begin:text.index("};", begin)]):
        changes = [(*row.span(2), {"ADJACENT": "HALVES", "HALVES": "ADJACENT"}[row[2]])]
        words = row[3].split(" | ")
        changes += [(*row.span(3), " | ".join(other for other in words if other != word) or "0") for word in words]
        for set_one in re.finditer(r"\.(\w+) = (-?\d+)", row[4]):  # of those that are set
            others = {"global_every": (0, 1, 5), "no_rope_every": (0, 3), "local_theta": (0, -1, 20000)}[set_one[1]]
            a, b = (row.start(4) + i for i in set_one.span(2))
            changes += [(a, b, str(other)) for other in others if set_one[2] != str(other)]
        for a, b, new in ((begin + a, begin + b, new) for a, b, new in changes):
            found.append(Mutant("features", "run.c", text.count("\n", 0, a) + 1,
                                f"{row[1]}: {text[a:b]} -> {new}", text[:a] + new + text[b:]))
    return found


def features(text: str) -> list[Mutant]:
    found = []
    for kind, table in (("features", FEATURES), ("texts", MACHINE), ("sessions", KEPT)):
        for name, old, new in table:
            if old not in text:
                sys.exit(f"run.c has no {old}")
            at = text.index(old)
            found.append(Mutant(kind, "run.c", text.count("\n", 0, at) + 1, name, text.replace(old, new, 1)))
    return found + families(text)


# ---- Mutants by rules ----

SWITCHED = {  # kind: the file, parts of it as in PARTS, and the groups of tests
    "JSON": ("tokenizer.c", [("/* ---- JSON ---", "/* ---- Chat templates ---")], ["JSON", "templates"]),
    "templates": ("tokenizer.c", [("/* ---- Chat templates ---", None)], ["templates", "chat"]),
    "samplers": ("run.c", [("/* ==== 6.", "/* ==== 7."), ("// ---- Top-k", "// ---- The memory")],
                 ["shaping", "sampler", "scripts"]),
    "talks": ("run.c", [("// A text on its way through the model", "// ---- Lossless"),
                        ("// ---- Chat templates", "// The columns of the character"),
                        ("// ---- A conversation", "/* ==== 13.")],
              ["chat", "conversations", "scripts", "templates"]),
}
SWITCH = """extern char *getenv(const char *);
extern int atoi(const char *);
static int mutant;
static int is(int number) { return mutant == number; }
__attribute__((constructor)) static void choose_mutant(void) {
    const char *number = getenv("MUTANT");
    mutant = number ? atoi(number) : 0;
}
"""
# An error ends everything a little later, work is counted elsewhere too; what refuses is false; and memory is for
# make torture.
LATER = re.compile(r"!?(\w+->)?(failed|bad)|ok|spend\(.*\)|!e->status|!?options\.quiet|!?ferror\(stdout\)|interrupted|"
                   r"(json_error|fail|refuse|stop|lacks|complain)\(.*|!(to|text|copy|p|block|items|scope)|\w+->e")
SPARED = [  # the part of a line that is changed, and why no test can see it
]


def blank(text: str) -> str:
    """The text without what stands in comments, strings and lines of the preprocessor; as long as before."""
    pattern = r"//[^\n]*|/\*.*?\*/|\"(?:\\.|[^\"\\\n])*\"|'(?:\\.|[^'\\\n])*'|(?m:^#[^\n]*)"
    return re.sub(pattern, lambda m: re.sub(r"[^\n]", "_" if m[0][0] in "\"'" else " ", m[0]), text, flags=re.DOTALL)


def bodies(plain: str, low: int, high: int) -> Iterator[tuple[int, int]]:
    """What stands between the braces of functions."""
    for match in re.compile(r"^[a-zA-Z_][^;={}]*\) \{", re.M).finditer(plain, low, high):
        end, depth = match.end(), 1
        while depth:
            depth += {"{": 1, "}": -1}.get(plain[end], 0)
            end += 1
        yield match.end(), end - 1


def conditions(plain: str, begin: int, end: int) -> Iterator[tuple[int, int, str]]:
    """Places and kinds of conditions: "if", "?", "while", "for", or "" for other chains of && and ||."""
    opened = [(begin, "")]  # where a slot, which may become a condition, begins, and what stood before its bracket
    kinds, i, last_word, chained = [], begin, "", [False]
    while i <= end:
        two, one = plain[i:i + 2], plain[i] if i < end else ";"
        word = re.compile(r"[A-Za-z_]\w*").match(plain, i)
        start, before = opened[-1]
        if word:
            if word[0] in ("return", "else", "case"):
                opened[-1] = (word.end(), before)
            last_word, i = word[0], word.end()
            continue
        if two in ("&&", "||"):
            chained[-1] = True
            i += 2
            continue
        if two in ("==", "!=", "<=", ">=", "->", "<<", ">>", "++", "--"):
            i += 2
            continue
        if one in "([{":
            opened.append((i + 1, last_word if one == "(" and plain[:i].rstrip().endswith(last_word) else ""))
            chained.append(False)
        elif one in ")]};,?:=":
            is_for = before == "for" and one == ";"
            kind = "?" if one == "?" else before if one == ")" and before in ("if", "while") else "for" if is_for else ""
            if (chained[-1] or kind) and plain[start:i].strip() and ";" not in plain[start:i]:
                if kind != "for" or plain[start - 1] == ";":
                    kinds.append((start, i, kind))
            if one in ")]}" and len(opened) > 1:
                opened.pop()
                chained.pop()
                if one == "}":
                    opened[-1], chained[-1] = (i + 1, opened[-1][1]), False
                elif before in ("if", "while", "for", "switch"):
                    opened[-1] = (i + 1, opened[-1][1])
            else:
                opened[-1], chained[-1] = (i + 1, before), False
        i += 1
    yield from kinds


def top_split(plain: str, begin: int, end: int, operator: str) -> list[tuple[int, int]]:
    parts, depth, start = [], 0, begin
    for i in range(begin, end):
        depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(plain[i], 0)
        if depth == 0 and plain.startswith(operator, i):
            parts.append((start, i))
            start = i + 2
    return parts + [(start, end)]


TYPES = "const static struct enum size_t bool int char double float unsigned long uint32_t uint64_t int64_t return break " \
        "continue case default goto if for while do else switch typedef ssize_t va_list"


def switched(kind: str, text: str) -> Iterator[tuple[int, int, str, str, str]]:
    """Begin, end, what is put before and after it (# is the mutant's number), and what that means."""
    plain, (_, parts, _) = blank(text), SWITCHED[kind]
    for first, last in parts:
        low = text.index("\n" + first)
        high = text.index("\n" + last, low) if last else len(text)
        for a, b in bodies(plain, low, high):
            for begin, end, what in conditions(plain, a, b):
                ors = top_split(plain, begin, end, "||")
                ands = [x for part in ors for x in [top_split(plain, *part, "&&")] if len(x) > 1]
                falls, holds = ("(!is(#) & !!(", "))", "0"), ("(is(#) | !!(", "))", "1")
                changes = [(*part, *falls) for part in ors if len(ors) > 1]
                changes += [(*part, *holds) for chain in ands for part in chain]
                if len(ors) == 1:
                    changes.append((begin, end, *falls))
                if what in ("if", "?") and not ands:
                    changes.append((begin, end, *holds))
                for x, y, before, after, value in changes:
                    if what == "?" and not ands and len(ors) == 1 and plain[x:y].strip() == "json":
                        continue
                    yield x, y, before, after, f"{text[x:y].strip()} -> {value}"
            for match in re.compile(r"\b(case [^:?]+|default):").finditer(plain, a, b):
                yield match.end(), match.end(), " if (is(#)) break;", "", f"{match[0]} does nothing"
            for match in re.compile(r"^ +(?=[a-z*(])", re.M).finditer(plain, a, b):
                end, depth = match.end(), 0
                word = re.compile(r"\w*").match(plain, end)[0]
                while end < b and (depth or plain[end] not in ";{}"):
                    depth += {"(": 1, "[": 1, "{": 1, ")": -1, "]": -1, "}": -1}.get(plain[end], 0)
                    end += 1
                    if depth < 0:
                        break
                before = plain[:match.start()].rstrip()
                if re.match(r"\w+ \**\w", plain[match.end():end]):  # a declaration
                    continue
                if depth == 0 and end < b and plain[end] == ";" and word not in TYPES.split() and before[-1] in ";{})":
                    statement = text[match.end():end + 1]
                    yield match.end(), end + 1, "{ if (!is(#)) ", " }", f"no {statement}"


def rules(texts: dict[str, str]) -> tuple[list[Mutant], dict[str, str]]:
    """The mutants, which have no text of their own, and the sources with all of them."""
    found, inserts = [], {name: [] for name in SOURCES}
    for kind, (source, _, _) in SWITCHED.items():
        text = texts[source]
        for begin, end, before, after, what in switched(kind, text):
            while end > begin and text[begin].isspace():
                begin += 1
            what = " ".join(what.split())
            if LATER.fullmatch(" ".join(text[begin:end].split())) or any(part in what for part, _ in SPARED):
                continue
            found.append(Mutant(kind, source, text.count("\n", 0, begin) + 1, what, "", len(found) + 1))
            number = str(len(found))
            inserts[source].append((begin, 1, end - begin and begin - end, before.replace("#", number)))
            inserts[source].append((end, 0, -begin, after))
    changed = {}
    for name, places in inserts.items():
        text, at = [], 0
        for place, _, _, new in sorted(places, key=lambda x: x[:3]):
            text += [texts[name][at:place], new]
            at = place
        changed[name] = SWITCH * (name == "run.c") + "".join(text) + texts[name][at:]
    return found, changed


def build_switched(texts: dict[str, str], compiler: str, options: list[str], name: str) -> Path:
    folder = TREE / name
    (folder / "tests").mkdir(parents=True)
    for file, old, new in [*HURRY[:2], ("tests/test_command.c", "i < 6000", "i < 600")]:
        assert old in texts[file], old
        texts = texts | {file: texts[file].replace(old, new)}
    for file, text in texts.items():
        (folder / file).write_text(text)
    for file in ("tests/golden", "tests/corpus", "README.md"):
        (folder / file).symlink_to(ROOT / file)
    for program, source in (("run", "run.c"), ("test", "tests/test.c")):
        command = [*compiler.split(), *options, "-w", source, "-pthread", "-lm", "-o", program]
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True)
        if done.returncode:
            sys.exit(f"{name}: {done.stderr[:2000]}")
    for groups in {tuple(groups) for _, _, groups in SWITCHED.values()}:
        how = run(["./test", *groups], folder, 600)
        if how:
            sys.exit(f"{name}, without a mutant: {how}")
    return folder


def noticed_switched(mutant: Mutant, folders: list[Path]) -> str:
    for folder, limit in zip(folders, (30, 120)):
        how = run(["./test", *SWITCHED[mutant.kind][2]], folder, limit, {"MUTANT": str(mutant.number)})
        if how:
            return how
    return ""


def run(command: list, folder: Path, seconds: int, more: dict[str, str] | None = None) -> str:
    """What failed, or an empty text."""
    try:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, timeout=seconds, errors="replace",
                              stdin=subprocess.DEVNULL, env=os.environ | {"OMP_WAIT_POLICY": "passive"} | (more or {}))
    except subprocess.TimeoutExpired:
        return "hangs"
    failed = [line for line in (done.stdout + done.stderr).splitlines() if "FAILED" in line or "rror: " in line]
    return (failed or [f"status {done.returncode}"])[0] if done.returncode else ""


def noticed(mutant: Mutant, texts: dict[str, str], compiler: list[str]) -> str:
    """How the tests noticed it, or an empty text."""
    folder = TREE / f"{mutant.kind} {mutant.number}"
    folder.mkdir()
    (folder / "tests").mkdir()
    files = texts | {mutant.source: mutant.text}
    for name, old, new in HURRY:
        assert old in files[name], old
        files[name] = files[name].replace(old, new)
    for name, text in files.items():
        (folder / name).write_text(text)
    for name in ("tests/golden", "tests/corpus", "README.md"):
        (folder / name).symlink_to(ROOT / name)
    how = ""
    sanitized = GROUPS[mutant.kind] if mutant.kind in ("texts", "sessions") else [*FILES, "damaged everywhere"]
    for options, groups, limit in (([], GROUPS[mutant.kind], 60), (SANITIZER, sanitized, 900)):
        build = [*compiler, *options, "-w", "tests/test.c", "-lm", "-o", "test"]
        how = how or run(build, folder, 900) and "does not compile" or run(["./test", *groups], folder, limit)
    shutil.rmtree(folder)
    return how


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("words", nargs="*")
    parser.add_argument("--list", action="store_true")
    parser.add_argument("--jobs", type=int, default=2, help="mutants at once (default: 2)")
    parser.add_argument("--compiler", default="clang -O0", help="and its options (default: clang -O0)")
    parser.add_argument("--every", type=int, default=4, help="of the mutants by rules each so many-th (default: 4)")
    parser.add_argument("--quick", action="store_true", help="mutants by rules: without the address sanitizer")
    args = parser.parse_args()
    texts = {str(path.relative_to(ROOT)): path.read_text() for path in ROOT.glob("tests/*.[ch]")}
    texts |= {name: (ROOT / name).read_text() for name in SOURCES}
    mutants = features(texts["run.c"]) + ranges(texts["run.c"])
    mutants += [m for name in SOURCES for m in checks(name, texts[name])]
    for number, m in enumerate(mutants):
        m.number = number
    by_rules, changed = rules(texts)
    mutants += by_rules[::args.every]
    if args.words:
        mutants = [m for m in mutants if any(word in str(m) for word in args.words)]
    if args.list:
        print(*mutants, len(mutants), sep="\n")
        return
    shutil.rmtree(TREE, ignore_errors=True)
    TREE.mkdir(parents=True)
    score, folders = {}, []
    if any(m.kind in SWITCHED for m in mutants):
        compiler = args.compiler.split()[0]
        folders = [build_switched(texts | changed, compiler, options, name)
                   for options, name in ((["-O1"], "all"), (["-O1", *SANITIZER], "sanitized"))[:2 - args.quick]]

    def judge(m: Mutant) -> str:
        return noticed_switched(m, folders) if m.kind in SWITCHED else noticed(m, texts, args.compiler.split())

    with ThreadPoolExecutor(args.jobs) as pool:
        for m, how in zip(mutants, pool.map(judge, mutants)):
            if how == "does not compile":
                sys.exit(f"{m} does not compile")
            n, total = score.get(m.kind, (0, 0))
            score[m.kind] = (n + bool(how), total + 1)
            print(f"{'noticed ' if how else 'SURVIVED'} {m}   {how[:150]}", flush=True)
    for kind, (n, total) in score.items():
        print(f"{kind}: {n} of {total} noticed")
    killed, total = (sum(x) for x in zip(*score.values()))
    print(f"{killed} of {total} mutants noticed, {100 * killed / total:.1f} %")
    sys.exit(killed != total)


if __name__ == "__main__":
    main()
