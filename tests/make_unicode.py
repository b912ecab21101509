#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["tokenizers>=0.21"]
# ///
"""Prints tokenizer.c's table of character classes, or with --check compares it with the one that tokenizer.c holds.

The classes are asked of the `tokenizers` package, code point by code point, because its regular expressions are what
tokenizer.c has to equal; version 0.23.3 has those of Unicode 16.0. Where Python's own unicodedata has that version too
(3.14 has), the two are compared.
"""
import argparse
import itertools
import pathlib
import sys
import unicodedata

from tokenizers import Regex, pre_tokenizers

TOKENIZER_C = pathlib.Path(__file__).resolve().parent.parent / "tokenizer.c"
UNICODE = "16.0.0"
END = 0x323B0  # one more than the last code point that has a class
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


def classes() -> list:
    """One letter for each code point: c cased letter, l other letter, n number, p punctuation, s space, _ the rest."""
    letters, numbers, marks, spaces = (members(p) for p in (r"\p{L}+", r"\p{N}+", r"\p{P}+", r"\s+"))
    assert cased() <= letters and max(letters | numbers | marks | spaces) < END
    assert not (letters & numbers or letters & marks or numbers & marks or spaces & (letters | numbers | marks))
    kinds = (("c", cased()), ("l", letters), ("n", numbers), ("p", marks), ("s", spaces))
    result = [next((kind for kind, points in kinds if c in points), "_") for c in range(END)]
    if unicodedata.unidata_version == UNICODE:
        for c in code_points():
            category = unicodedata.category(chr(c))[0]
            got = result[c] if c < END else "_"
            if category in "LNP" or got in "clnp":
                assert category == {"c": "L", "l": "L", "n": "N", "p": "P"}.get(got), hex(c)
    return result


def table() -> str:
    """The C text: runs of a class, a count (none stands for 1) and the class's letter."""
    counted = [(kind, len(list(group))) for kind, group in itertools.groupby(classes())]
    runs = [f"{n if n > 1 else ''}{kind}" for kind, n in counted]
    lines, line = [], ""
    for run in runs:
        if len(line) + len(run) > LINE:
            lines.append(line)
            line = ""
        line += run
    return "".join(f'    "{text}"\n' for text in lines + [line])[:-1] + ";\n"


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="compare with tokenizer.c; status 1 if they differ")
    made = table()
    if not parser.parse_args().check:
        print(made, end="")
        return 0
    if f"character_classes[] =\n{made}" in TOKENIZER_C.read_text(encoding="utf-8"):
        print(f"make_unicode.py: tokenizer.c holds this table ({len(made.splitlines())} lines)")
        return 0
    print("make_unicode.py: tokenizer.c holds another table", file=sys.stderr)
    return 1


if __name__ == "__main__":
    sys.exit(main())
