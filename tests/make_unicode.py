#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tokenizers>=0.21"]
# ///
"""Prints tokenizer.c's tables of Unicode, or with --check compares them with those that tokenizer.c holds.

All of the first is asked of the `tokenizers` package, because its regular expressions and its NFC are what tokenizer.c has to
equal. In version 0.23.3 they are of different age: its regular expressions (Oniguruma's) know Unicode 16.0; its NFC
(a crate of Rust's) knows Unicode 9.0, so that younger marks neither move nor compose; and its pre-tokenizer Digits
(Rust's own), which some models have in place of \\p{N}, knows 17.0 with 13 more numbers, which are none here. Where
Python's own unicodedata has version 16.0 (3.14 has), the kinds are compared with it. How characters come apart never
changes once it is given, so any version of unicodedata will do, and `tokenizers` says what it knows of it. The second,
how wide characters are on a screen, is unicodedata's of version 14.0 (Python 3.11); others leave that table out.
"""
import argparse
import itertools
import pathlib
import sys
import unicodedata

from tokenizers import Regex, normalizers, pre_tokenizers

TOKENIZER_C = pathlib.Path(__file__).resolve().parent.parent / "tokenizer.c"
UNICODE = "16.0.0"
WIDTHS_UNICODE = "14.0.0"
# The table's order is that of the code points, but U+E0000 follows U+33FFF: nothing between is of any kind.
ORDER = [*range(0x34000), *range(0xE0000, 0xE01F0)]
LINE = 110
# The letters that deepseek-llm's pre-tokenizer names range by range (from its tokenizer.json): those that have a case.
CASED = """
41-5A 61-7A B5 C0-D6 D8-F6 F8-1BA 1BC-1BF 1C4-293 295-2AF 370-373 376 377 37B-37D 37F 386 388-38A 38C
38E-3A1 3A3-3F5 3F7-481 48A-52F 531-556 10A0-10C5 13A0-13F5 13F8-13FD 1C90-1CBA 1CBD-1CBF 1D00-1D2B
1D6B-1D77 1D79-1D9A 1E00-1F15 1F18-1F1D 1F20-1F45 1F48-1F4D 1F50-1F57 1F59 1F5B 1F5D 1F5F-1F7D 1F80-1FB4
1FB6-1FBC 1FBE 1FC2-1FC4 1FC6-1FCC 1FD0-1FD3 1FD6-1FDB 1FE0-1FEC 1FF2-1FF4 1FF6-1FFC 2102 2107 210A-2113
2115 2119-211D 2124 2126 2128 212A-212D 212F-2134 2139 213C-213F 2145-2149 214E 2183 2184 2C00-2C7B
2C7E-2CE4 2CEB-2CEE 2CF2 2CF3 A640-A66D A680-A69B A722-A76F A771-A787 A78B-A78E AB70-ABBF FB00-FB06
FB13-FB17 FF21-FF3A FF41-FF5A 10400-1044F 104B0-104D3 104D8-104FB 10C80-10CB2 10CC0-10CF2 118A0-118DF
1E900-1E943
"""
# Kinds of characters, by letter, and what they are; a character is of the first kind that has it. Those of ASCII come
# first, as single models' expressions name some of them alone. _ is all the rest.
KINDS = {
    "r": r"[\r\n]", "b": " ", "h": "/", "t": "`", "d": "[0-9]", "A": "[A-Z]", "a": "[a-z]", "y": r"[$+<=>^|~]",
    "q": r"[!-/:-@\[-`{-~]", "s": r"\s", "n": r"\p{N}", "m": r"\p{M}", "p": r"\p{P}", "z": r"\p{S}",
    "U": r"[\p{Lu}\p{Lt}]", "L": r"\p{Ll}", "o": r"[\p{Lm}\p{Lo}]",
}
UNCASED = {"U": "u", "L": "l"}  # in place of these for letters that CASED lacks

NFC, NFD = normalizers.NFC().normalize_str, normalizers.NFD().normalize_str
HANGUL = range(0xAC00, 0xAC00 + 11172)  # composed by arithmetic


def cased() -> set:
    """The code points of CASED."""
    ends = [[int(end, 16) for end in item.split("-")] for item in CASED.split()]
    return {c for item in ends for c in range(item[0], item[-1] + 1)}


def code_points() -> list:
    return [c for c in range(0x110000) if not 0xD800 <= c < 0xE000]


def members(pattern: str) -> set:
    """The code points that a regular expression of `tokenizers` matches."""
    split = pre_tokenizers.Split(Regex(pattern), behavior="removed", invert=True)
    found, all_points = set(), code_points()
    for i in range(0, len(all_points), 65536):
        for run, _ in split.pre_tokenize_str("".join(map(chr, all_points[i:i + 65536]))):
            found.update(map(ord, run))
    return found


def kinds() -> list:
    """Each code point and the letter of its kind."""
    result, has_case = {}, cased()
    for letter, pattern in KINDS.items():
        for c in members(pattern + "+"):
            result.setdefault(c, letter if c in has_case else UNCASED.get(letter, letter))
    assert result.keys() <= set(ORDER) and all(result[c] in "AaUL" for c in has_case)
    if unicodedata.unidata_version == UNICODE:
        known = {**dict.fromkeys("AaUuLlo", "L"), **dict.fromkeys("dn", "N"), **dict.fromkeys("hqp", "P"), "m": "M",
                 **dict.fromkeys("ytz", "S")}
        for c in code_points():
            category = unicodedata.category(chr(c))[0]
            assert known.get(result.get(c), "") == (category if category in "LMNPS" else ""), hex(c)
    return [(c, result.get(c, "_")) for c in ORDER]


def combining_class(c: int) -> int:
    """0 where NFD leaves the character behind a mark of every class: then it is no mark, or not known as one."""
    claimed, iota = unicodedata.combining(chr(c)), "\u0345"  # the one mark of the highest class, 240
    if not claimed or (chr(c) != iota and NFD("a" + iota + chr(c)) != NFD("a" + chr(c)) + iota):
        return 0
    for other, text in ((1, "\u0334"), (220, "\u0323"), (230, "\u0301"), (232, "\u0315")):
        moves = NFD("a" + text + chr(c)) != "a" + text + NFD(chr(c))
        assert moves == (claimed < other), (hex(c), claimed, other)
    return claimed


def decompositions() -> list:
    """(code point, first part, second part or 0, whether the two parts compose to it again), in order."""
    found = []
    for c in code_points():
        parts = unicodedata.decomposition(chr(c)).split()
        if not parts or parts[0].startswith("<") or NFD(chr(c)) == chr(c) or c in HANGUL:
            continue
        first, second = int(parts[0], 16), int(parts[1], 16) if len(parts) > 1 else 0
        assert NFD(chr(c)) == NFD(chr(first)) + (chr(second) if second else ""), hex(c)  # one step; the rest in `first`
        assert c < 0x34000 and (not second or NFD(chr(second)) == chr(second)), hex(c)
        composes = bool(second) and NFC(chr(first) + chr(second)) == chr(c)
        n_bytes = len(chr(c).encode())  # how large tokenizer.c's buffers are
        assert len(NFD(chr(c)).encode()) <= 3 * n_bytes and len(NFD(chr(c))) <= 2 * n_bytes
        assert not composes or n_bytes <= len((chr(first) + chr(second)).encode())
        found.append((c, first, second, composes))
    assert len({(first, second) for _, first, second, composes in found if composes}) == sum(f[3] for f in found)
    return found


def words() -> list:
    """The table: a number (none stands for 1) and a letter each. So many characters of a kind; k: what follows of m has
    this combining class. Then c: the code point that is decomposed next; f: its first part; + its second part, - the
    same where the two do not compose to it again, = its only part. After these the code point is one more."""
    def word(number: int, letter: str) -> str:
        return f"{number if number != 1 else ''}{letter}"
    classed = [(kind, combining_class(c) if kind == "m" else 0) for c, kind in kinds()]
    found, last = [], 0
    for (kind, combining), run in itertools.groupby(classed):
        if kind == "m" and combining != last:
            found.append(word(combining, "k"))
            last = combining
        found.append(word(len(list(run)), kind))
    code = last_first = 0
    for c, first, second, composes in decompositions():
        if c != code:
            found.append(word(c, "c"))
        if second and first != last_first:
            found.append(word(first, "f"))
            last_first = first
        found.append(word(second, "+" if composes else "-") if second else word(first, "="))
        code = c + 1
    return found


def width(c: int) -> str:
    """How many columns of a screen a character has: w two (East Asian, emoji), m none (marks), _ one."""
    category = unicodedata.category(chr(c))
    if c >= 160 and c != 0xAD and (category in ("Mn", "Me", "Cf") or 0x1160 <= c < 0x1200):  # vowels that join Hangul
        return "m"
    if any(c in plane for plane in (range(0x20000, 0x2FFFE), range(0x30000, 0x3FFFE))):
        return "w"  # characters that are not assigned yet, too
    return "w" if category != "Cn" and unicodedata.east_asian_width(chr(c)) in "WF" else "_"


def widths() -> list:
    return [f"{n if n != 1 else ''}{letter}" for letter, run in itertools.groupby(map(width, range(0xE01F0)))
            for n in [len(list(run))]]


def table(words: list) -> str:
    """The C text."""
    lines, line = [], ""
    for word in words:
        if len(line) + len(word) > LINE:
            lines.append(line)
            line = ""
        line += word
    return "".join(f'    "{text}"\n' for text in lines + [line])[:-1] + ";\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with tokenizer.c; status 1 if they differ")
    tables = {"unicode_data": table(words())}
    if unicodedata.unidata_version == WIDTHS_UNICODE:
        tables["unicode_widths"] = table(widths())
    made = [f"static const char {name}[] =\n{text}" for name, text in tables.items()]
    if not parser.parse_args().check:
        print("\n".join(made), end="")
        return 0
    held = TOKENIZER_C.read_text(encoding="utf-8")
    if all(text in held for text in made):
        print(f"make_unicode.py: tokenizer.c holds these tables: {', '.join(tables)}")
        return 0
    print("make_unicode.py: tokenizer.c holds other tables", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
