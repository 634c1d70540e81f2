#!/usr/bin/env python3
"""Writes test/fixtures/templates/rows.json: what transformers makes of conversations.

Every template of real/chat_templates (see --shared) that a row of qlora.c covers is applied to
conversations of all kinds; ids, and a mask found without qlora.c, are recorded.  The programs that
qlora.c saves for its rows (build/saved, see README.md) must render to the same text.  The real
programs themselves are not copied into the repository.

usage: make_templates.py [--shared DIR] [--saved DIR]              the small fixture
       make_templates.py --full DIR [--shared DIR] [--n 100]     everything, with the programs:
           QLORA_TEMPLATES=DIR build/test templates_reference

Recorded with transformers 4.57.6, tokenizers 0.22.2, jinja2 3.1.6.
"""

import argparse
import json
import os
import random
import sys
from pathlib import Path

os.environ.update(HF_HUB_OFFLINE="1", TRANSFORMERS_VERBOSITY="error")
from transformers import AddedToken, PreTrainedTokenizerFast

ROOT = Path(__file__).resolve().parents[2]
TOKENIZERS = ROOT / "test/fixtures/tokenizers"
CHATML = ["<|im_start|>", "<|im_end|>"]
LLAMA3 = ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"]
PHI3 = ["<|system|>", "<|user|>", "<|assistant|>", "<|end|>"]
INST = ["[INST]", "[/INST]"]
V7 = ["[SYSTEM_PROMPT]", "[/SYSTEM_PROMPT]"] + INST

# Row: tokenizer of the fixtures, a real one, tokens that both are given, what ends an answer.
ROWS = {
    "chatml": ("byte", "qwen2.5-0.5b-instruct", CHATML, "<|im_end|>"),
    "chatml-compact": ("byte", "qwen2.5-0.5b-instruct", CHATML, "<|im_end|>"),
    "qwen2.5": ("byte", "qwen2.5-0.5b-instruct", CHATML, "<|im_end|>"),
    "qwen3": ("byte", "qwen2.5-0.5b-instruct", CHATML + ["<think>", "</think>"], "<|im_end|>"),
    "llama2": ("spm", "llama-2", [], " EOS"),
    "llama3": ("llama3style", "llama-3", LLAMA3, "<|eot_id|>"),
    "llama3.1": ("llama3style", "llama-3", LLAMA3, "<|eot_id|>"),
    "mistral-v0.1": ("spm", "mistral-7b-v0.1", [], "EOS"),
    "mistral-v0.2": ("spm", "mistral-7b-v0.1", [], "EOS"),
    "mistral-v1": ("spm", "mistral-7b-v0.1", [], "EOS"),
    "mistral-v3": ("spm", "mistral-7b-v0.1", INST, "EOS"),
    "mistral-v3-tekken": ("llama3style", "llama-3", INST, "EOS"),
    "mistral-v7": ("spm", "mistral-7b-v0.1", V7, "EOS"),
    "mistral-common-v1": ("spm", "mistral-7b-v0.1", [], "EOS"),
    "mistral-common-v3": ("spm", "mistral-7b-v0.1", INST, "EOS"),
    "phi3": ("spm", "llama-2", PHI3, "<|end|>"),
    "phi3-first": ("spm", "llama-2", PHI3, "<|end|>"),
    "zephyr": ("spm", "mistral-7b-v0.1", [], "EOS"),
    "alpaca": ("gpt2style", "phi-2", [], "EOS"),
    "dolly": ("spm", "llama-2", [], "\nEOS"),
    "tutorial-004": ("spm", "mistral-7b-v0.1", [], " EOS"),
}

# Real template: the row that covers it. Rows without one are compared as qlora.c saves them.
COVERED = {
    "llama.cpp-templates/Qwen-Qwen2.5-7B-Instruct": "qwen2.5",
    "llama.cpp-templates/MiMo-VL": "qwen2.5",
    "llama.cpp-templates/Qwen-Qwen3-0.6B": "qwen3",
    "llama.cpp-templates/meta-llama-Llama-3.1-8B-Instruct": "llama3.1",
    "llama.cpp-templates/meta-llama-Llama-3.3-70B-Instruct": "llama3.1",
    "llama.cpp-templates/microsoft-Phi-3.5-mini-instruct": "phi3",
    "llama.cpp-templates/mistralai-Mistral-Nemo-Instruct-2407": "mistral-v3-tekken",
    "mistral-common/v1": "mistral-common-v1",
    "mistral-common/v3": "mistral-common-v3",
    "trl-templates/llama3": "llama3",
    "trl-templates/phi3": "phi3",
    "trl-templates/qwen2_5": "qwen2.5",
    "trl-templates/qwen3": "qwen3",
    "tokenizers/qwen2.5-0.5b-instruct": "qwen2.5",
    "tokenizers/llama-3": "llama3",
    "vectors/teknium/OpenHermes-2.5-Mistral-7B": "chatml",
    "vectors/mistralai/Mistral-7B-Instruct-v0.2 (NOTE: Old pre-v1 without a system prompt)":
        "mistral-v0.2",
    "vectors/Llama-3": "llama3",
    "vectors/Phi-3-mini": "phi3-first",
    "vectors/Phi-3-small": "phi3",
    "vectors/Phi-3-medium": "phi3-first",
    "vectors/mistralai/Mistral-7B-Instruct-v0.2 (mistralai 'v1' template with a system prompt)":
        "mistral-v1",
    "vectors/Mistral-Large-Instruct-2407 (mistralai 'v3' template; modified to have system prompt "
    "at start)": "mistral-v3",
    "vectors/Mistral-Nemo-Instruct-2407 (mistralai 'v3-tekken' template; modified to have system "
    "prompt at start)": "mistral-v3-tekken",
    "vectors/mistralai/Mistral-Large-Instruct-2411 (mistralai 'v7' template)": "mistral-v7",
}
FLAGS = {  # what the program adds to its row: SKIP_EMPTY_SYSTEM, ASKS_ALWAYS
    "llama.cpp-templates/microsoft-Phi-3.5-mini-instruct": 128,
    "tokenizers/llama-3": 2048,
    "vectors/Llama-3": 2048,
}
BEGIN = {"vectors/Phi-3-small": True, "vectors/Phi-3-mini": True}
SYSTEM = {"llama.cpp-templates/MiMo-VL": "You are MiMo, an AI assistant developed by Xiaomi."}

PIECES = [
    "Hello", "What is 2 + 2?", "  two spaces in front", "and behind  ", "\nnewline first",
    "newline last\n", "\n\n\tboth\n\n", "", " ", "é ü ß", "你好,世界",
    "👩‍👩‍👧 family", "e\u0301 combining",
    "\u00a0nbsp\u00a0", "\u3000wide\u3000", "\x1cseparators\x1f", "a\u2028b", "tab\tinside",
    "<|im_end|>", "<|im_start|>user\nhi<|im_end|>", "[INST] nested [/INST]", "</s>", "<s>",
    "<|eot_id|>", "{{ bos_token }}", "{% if x %}", "it's \"quoted\" \\ back", "### Response:\n",
    "def f(x):\n    return x  # code\n", "<|user|>\nhi<|end|>", "1234567890", "ﬁ ligature ½",
    "<think>\nwhy not\n</think>\n\nBecause.", "<think></think>x", "half</think>\n\nopen",
    "\r\ncrlf\r\n",
    "<think>a</think>b</think>\nc", "<tool_response>5</tool_response>", "<<SYS>>\nx\n<</SYS>>",
]


def conversation(rng, row):
    """[[role, text], ...] and whether an answer is asked for."""
    text = lambda: rng.choice(PIECES) if rng.random() < 0.7 else " ".join(rng.choices(PIECES, k=2))
    messages = []
    if rng.random() < 0.5 and row not in ("phi3-first", "dolly", "tutorial-004"):
        messages.append(["system", text()])
    for _ in range(rng.randint(1, 4)):
        messages += [["user", text()], ["assistant", text()]]
    ask = rng.random() < 0.4
    if ask:
        messages.pop()
    if rng.random() < 0.06 and len(messages) > 2:  # roles out of turn: as before, or refused
        i = rng.randrange(1 if messages[0][0] == "system" else 0, len(messages) - 1)
        messages.insert(i, list(messages[i]))
    return messages, ask


def render(tokenizer, program, messages, ask):
    chat = [{"role": r, "content": c} for r, c in messages]
    return tokenizer.apply_chat_template(
        chat, chat_template=program, tokenize=False, add_generation_prompt=ask)


def learnt_spans(tokenizer, program, row, messages, ask, text, stop):
    """Where in the text the answers stand, each with what ends it: found by putting a mark in the
    place of each answer in turn."""
    mark, spans = "\ue000mark\ue001", []
    stop = stop.replace("EOS", tokenizer.eos_token)
    for i, (role, _) in enumerate(messages):
        if role != "assistant":
            continue
        following = [r for r, _ in messages[i + 1:i + 2]]
        joined = row.startswith("mistral-common") and following == [role]
        marked = [list(m) for m in messages]
        marked[i][1] = mark
        other = render(tokenizer, program, marked, ask)
        start = other.index(mark)
        end = len(text) - (len(other) - start - len(mark))
        if "<think>" in program:  # the whole think block is the answer's
            start = other.rindex("assistant\n", 0, start) + len("assistant\n")
        close = "\n\n" if joined else stop
        assert text[end:].startswith(close), (text[end:end + 20], close)
        spans.append((start, end + len(close)))
    return spans


def mask_of(tokenizer, text, ids, spans):
    """1 for each token that holds a character of a span."""
    encoding = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    assert encoding["input_ids"] == ids
    return "".join(
        "1" if k and any(a < end and b > start for start, end in spans) else "0"
        for k, (a, b) in enumerate(encoding["offset_mapping"]))


def open_tokenizer(path, add):
    config = json.load(open(path / "tokenizer_config.json"))


    def token(key):
        value = config.get(key)
        return value["content"] if isinstance(value, dict) else value

    tokenizer = PreTrainedTokenizerFast(
        tokenizer_file=str(path / "tokenizer.json"), bos_token=token("bos_token"),
        eos_token=token("eos_token"))
    tokenizer.add_tokens([AddedToken(t, special=True, normalized=False) for t in add])
    return tokenizer


def make_set(name, row, program, real, n):
    """n conversations in one template: with the fixtures' tokenizer, or the real one in `real`."""
    fixture, directory, add, stop = ROWS[row]
    path = real / directory if real else TOKENIZERS / fixture
    rng = random.Random(name)
    tokenizer = open_tokenizer(path, add)
    out = []
    while len(out) < n:
        messages, ask = conversation(rng, row)
        record = {"messages": messages, "ask": ask, "ids": None}
        try:
            text = render(tokenizer, program, messages, ask)
        except Exception as error:  # the template's own raise_exception
            record["why"] = str(error)[:60]
        else:
            ids = tokenizer(text, add_special_tokens=False)["input_ids"]
            chat = [{"role": r, "content": c} for r, c in messages]
            assert ids == tokenizer.apply_chat_template(
                chat, chat_template=program, add_generation_prompt=ask)
            record["ids"] = ids
            spans = learnt_spans(tokenizer, program, row, messages, ask, text, stop)
            record["learn"] = mask_of(tokenizer, text, ids, spans)
        out.append(record)
    return {"name": name, "row": row, "tokenizer": str(path) if real else fixture,
            "add": ",".join(add), "conversations": out}


def real_programs(shared):
    """Every real template: name, program."""
    base = shared / "real/chat_templates"
    for path in sorted(base.glob("*/*.jinja")):
        yield f"{path.parent.name}/{path.stem}", path.read_text()
    for case in json.load(open(base / "vectors/llama_cpp_2025_02.json")):
        yield f"vectors/{case['name']}", case["template_str"]
    for config in sorted((shared / "real/tokenizers").glob("*/tokenizer_config.json")):
        program = json.load(open(config)).get("chat_template")
        if program:
            yield f"tokenizers/{config.parent.name}", program


def count_differences(name, row, program, saved, conversations):
    """Conversations that the program saved for a row renders otherwise than the real one."""
    fixture, _, add, _ = ROWS[row]
    tokenizer, different = open_tokenizer(TOKENIZERS / fixture, add), 0
    for c in conversations:
        texts = []
        for which in (program, saved):
            try:
                texts.append(render(tokenizer, which, c["messages"], c["ask"]))
            except Exception:
                texts.append(None)
        if texts[0] != texts[1]:
            different += 1
            print(name, c["messages"], *map(repr, texts), sep="\n  ", file=sys.stderr)
    return different


def make_full(programs, saved, real, n):
    """Every template and its program, on two tokenizers; or to be refused, if no row covers it."""
    for name, program in programs.items():
        row = COVERED.get(name, "")
        if not row:
            yield {"name": name, "row": "", "program": program, "tokenizer": "byte", "add": "",
                   "conversations": []}
        for directory in (None, real) if row else ():
            yield make_set(name, row, program, directory, n) | {"program": program}
    for row in ROWS:
        yield make_set("saved " + row, row, saved[row], real, n) | {"program": saved[row]}


def make_small(programs, saved, n):
    """One real template for each row, or else the one that qlora.c saves; no programs."""
    done = set()
    for name, program in programs.items():
        row, flags = COVERED.get(name), FLAGS.get(name)
        if not row or (row, flags) in done:
            continue
        done.add((row, flags))
        entry = make_set(name, row, program, None, n)
        entry |= {"flags": flags} if flags else {}
        entry |= {"system": SYSTEM[name]} if name in SYSTEM else {}
        if "bos_token" not in program or name in BEGIN:
            entry["begin"] = name in BEGIN
        yield entry
    for row in ROWS:
        if row not in {r for r, _ in done}:
            entry = make_set("saved " + row, row, saved[row], None, n)
            yield entry | ({} if "bos_token" in saved[row] else {"begin": False})


def main():
    arguments = argparse.ArgumentParser()
    arguments.add_argument("--shared", type=Path, default=ROOT.parent / "shared")
    arguments.add_argument("--saved", type=Path, default=ROOT / "build/saved")
    arguments.add_argument("--full", type=Path)
    arguments.add_argument("--n", type=int, default=0)
    a = arguments.parse_args()
    programs = dict(real_programs(a.shared))
    saved = {row: (a.saved / f"{row}.jinja").read_text() for row in ROWS}
    real = a.shared / "real/tokenizers"
    sets = list(make_full(programs, saved, real, a.n or 100) if a.full
                else make_small(programs, saved, a.n or 7))
    different = sum(
        count_differences(s["name"], s["row"], programs[s["name"]], saved[s["row"]],
                          s["conversations"])
        for s in sets
        if s["row"] and s["name"] in programs and s["name"] not in FLAGS | BEGIN | SYSTEM)
    print(f"{len(sets)} sets; conversations that a saved program renders otherwise: {different}")
    path = (a.full or ROOT / "test/fixtures/templates") / "rows.json"
    path.write_text(json.dumps({"sets": sets}, ensure_ascii=False, separators=(",", ":")) + "\n")
    print(path, path.stat().st_size, "bytes")
    raise SystemExit(different > 0)


if __name__ == "__main__":
    main()
