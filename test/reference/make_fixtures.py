#!/usr/bin/env python3
"""Writes every file under test/fixtures: the numbers qlora.c is compared with.

The fixtures come from the reference implementations (torch, transformers, peft, bitsandbytes,
tokenizers) on tiny models with random weights, so no download is needed and a rerun with the
versions of requirements.txt gives the same bytes.  README.md says what each file holds.

usage: make_fixtures.py [--only tokenizers|nf4|models] [--out DIR]
"""

import os

# Fix everything that lets results depend on the machine, before any library is loaded.
os.environ.update(
    ATEN_CPU_CAPABILITY="avx2",  # the same vector width (and so summation order) everywhere
    ONEDNN_MAX_CPU_ISA="AVX2",
    MKL_CBWR="AVX2",
    OMP_NUM_THREADS="1",
    HF_HUB_OFFLINE="1",
    TOKENIZERS_PARALLELISM="false",
    BITSANDBYTES_NOWELCOME="1",
)

import argparse
import json
import logging
import math
import random
import shutil
import unicodedata
import warnings
from pathlib import Path

logging.disable(logging.WARNING)
warnings.filterwarnings("ignore")

import bitsandbytes as bnb
import bitsandbytes.functional as bnbf
import peft
import safetensors
import tokenizers
import torch
import torch.nn.functional as F
import transformers
from safetensors.torch import load_file, save_file
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers
from tokenizers import processors, trainers

torch.set_num_threads(1)
torch.use_deterministic_algorithms(True)
transformers.utils.logging.disable_progress_bar()

if tuple(map(int, bnb.__version__.split(".")[:2])) < (0, 50):
    raise SystemExit("bitsandbytes 0.50 or later is needed, see README.md")

FIXTURES = Path(__file__).resolve().parents[1] / "fixtures"
VERSIONS = {
    m.__name__: m.__version__
    for m in (torch, transformers, peft, bnb, tokenizers, safetensors)
}
QUANTS = ("none", "nf4", "nf4dq")


def save(path, tensors):
    """Writes a safetensors file with the metadata that transformers and peft look for."""
    plain = {name: t.detach().contiguous().clone() for name, t in tensors.items()}
    save_file(plain, path, metadata={"format": "pt"})
    path.chmod(0o644)


def save_json(path, value, ascii_only=False):
    """Writes JSON; lists of numbers and the entries of a top-level list take one line each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(layout_json(value, ascii_only) + "\n", encoding="utf-8")


def layout_json(value, ascii_only, indent=""):
    flat = json.dumps(value, ensure_ascii=ascii_only)
    deeper = indent + " "
    if isinstance(value, dict) and len(flat) > 90:
        items = [
            f"{deeper}{json.dumps(k)}: {layout_json(v, ascii_only, deeper)}"
            for k, v in value.items()
        ]
        return "{\n" + ",\n".join(items) + "\n" + indent + "}"
    holds_objects = isinstance(value, list) and any(isinstance(v, (dict, list)) for v in value)
    if holds_objects:
        rows = [deeper + json.dumps(v, ensure_ascii=ascii_only) for v in value]
        return "[\n" + ",\n".join(rows) + "\n" + indent + "]"
    return flat


# ---------------------------------------------------------------------------------------------
# Tokenizers
# ---------------------------------------------------------------------------------------------

QWEN2_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
LLAMA3_REGEX = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}|"
    r" ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)

# Qwen2.5's own template without its branches for tools.
CHATML_TEMPLATE = """\
{%- if messages[0]['role'] == 'system' %}
    {{- '<|im_start|>system\\n' + messages[0]['content'] + '<|im_end|>\\n' }}
{%- else %}
    {{- '<|im_start|>system\\nYou are Qwen, created by Alibaba Cloud. \
You are a helpful assistant.<|im_end|>\\n' }}
{%- endif %}
{%- for message in messages %}
    {%- if (message.role == "user") or (message.role == "system" and not loop.first) \
or (message.role == "assistant") %}
        {{- '<|im_start|>' + message.role + '\\n' + message.content + '<|im_end|>' + '\\n' }}
    {%- endif %}
{%- endfor %}
{%- if add_generation_prompt %}
    {{- '<|im_start|>assistant\\n' }}
{%- endif %}
"""


def training_text():
    """Original text with enough repetition to give merges in several scripts."""
    rng = random.Random(1)
    parts = [choices.split("|") for choices in (
        "the small model|a tired student|my neighbour|the old compiler|our teacher|nobody",
        "reads|writes|forgets|quantises|measures|explains|doesn't like|can't find",
        "the matrix|a short letter|every number|the weights|its own output|two lines of code",
        "in the morning|before lunch|after training|at night|while it's raining|today",
    )]
    other = [
        "for (int i = 0; i < n; i++) {\n    sum += w[i] * x[i];\n}\n",
        "def mean(values):\n\treturn sum(values) / len(values)\n",
        "if (x == NULL) return -1; // we'll never get here\n",
        "今天天气很好，我们在训练一个小模型。",
        "这个模型很小，但是它会说中文。",
        "Der Käfer läuft über die Straße, où l'été a déjà commencé, señor.\n",
        "I'm sure they're done, we've seen it and she'd agree; he'll say it isn't.\n",
        "In 2024 the loss fell from 3.14159 to 0.25, i.e. by 92%.\n",
        "Well done 🙂 👍🏽 🎉!\n",
        "The   table\thas  spaces\r\nand two kinds of line ends.\n\n",
    ]
    lines = []
    for _ in range(600):
        sentence = " ".join(map(rng.choice, parts))
        lines.append(sentence[0].upper() + sentence[1:] + rng.choice((".", "!", "?", ";")) + "\n")
        if rng.random() < 0.3:
            lines.append(rng.choice(other))
    return lines


def train_byte_bpe(size, pre_tokenizer, normalizer=None):
    tok = Tokenizer(models.BPE())
    tok.pre_tokenizer = pre_tokenizer
    if normalizer:
        tok.normalizer = normalizer
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=size, initial_alphabet=alphabet, show_progress=False
    )
    tok.train_from_iterator(training_text(), trainer)
    tok.decoder = decoders.ByteLevel()
    return tok


def split_then_bytes(regex):
    return pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(regex), "isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
    ])


def special(*contents):
    return [tokenizers.AddedToken(c, special=True, normalized=False) for c in contents]


def merges_as_strings(tok):
    """The tokenizer.json of older releases, with merges "a b" in place of ["a", "b"]."""
    data = json.loads(tok.to_str())
    data["model"]["merges"] = [" ".join(pair) for pair in data["model"]["merges"]]
    return data


def make_byte():
    """Like Qwen2: NFC, one digit per piece, the special tokens after the vocabulary."""
    tok = train_byte_bpe(509, split_then_bytes(QWEN2_REGEX), normalizers.NFC())
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.add_special_tokens(special("<|endoftext|>", "<|im_start|>", "<|im_end|>"))
    config = {
        "bos_token": None, "eos_token": "<|im_end|>", "pad_token": "<|endoftext|>",
        "additional_special_tokens": ["<|im_start|>", "<|im_end|>"],
        "add_bos_token": False, "chat_template": CHATML_TEMPLATE,
    }
    return json.loads(tok.to_str()), config


def make_llama3style():
    """Like Llama-3: ignore_merges, so a whole piece of the vocabulary needs no merge path."""
    tok = train_byte_bpe(373, split_then_bytes(LLAMA3_REGEX))
    data = merges_as_strings(tok)
    vocab = data["model"]["vocab"]
    # No merge leads to these entries: only ignore_merges can find them.
    for word in ("Ġquantum", "zebra", "ĠKÃ¤fer", "202", "ĠĠĠĠĠĠ"):
        assert word not in vocab
        vocab[word] = len(vocab)
    data["model"]["ignore_merges"] = True
    tok = Tokenizer.from_str(json.dumps(data))
    tok.add_special_tokens(special(
        "<|begin_of_text|>", "<|end_of_text|>", "<|start_header_id|>", "<|end_header_id|>",
        "<|eot_id|>", "<|finetune_right_pad_id|>"))
    bos = tok.token_to_id("<|begin_of_text|>")
    tok.post_processor = processors.Sequence([
        processors.ByteLevel(trim_offsets=False),
        processors.TemplateProcessing(
            single="<|begin_of_text|> $A",
            pair="<|begin_of_text|> $A <|begin_of_text|>:1 $B:1",
            special_tokens=[("<|begin_of_text|>", bos)]),
    ])
    config = {
        "bos_token": "<|begin_of_text|>", "eos_token": "<|eot_id|>",
        "pad_token": "<|finetune_right_pad_id|>",
    }
    return merges_as_strings(tok), config


def make_gpt2style():
    """Like GPT-2 and Phi-2: the regex is implied; added tokens with every matching flag."""
    tok = train_byte_bpe(376, pre_tokenizers.ByteLevel(add_prefix_space=False))
    tok.post_processor = processors.ByteLevel(trim_offsets=False)
    tok.add_special_tokens(special("<|endoftext|>"))
    tok.add_tokens([
        # runs of spaces as in Phi-2: longest first, not special, matched after normalising
        tokenizers.AddedToken("    ", normalized=True),
        tokenizers.AddedToken("   ", normalized=True),
        tokenizers.AddedToken("  ", normalized=True),
        tokenizers.AddedToken("<mask>", lstrip=True, normalized=False),
        tokenizers.AddedToken("<trim>", rstrip=True, normalized=False),
        tokenizers.AddedToken("qlora", single_word=True, normalized=False),
        tokenizers.AddedToken("<|end", normalized=False),  # a prefix of a longer one
    ])
    config = {
        "bos_token": "<|endoftext|>", "eos_token": "<|endoftext|>",
        "unk_token": "<|endoftext|>",
    }
    return merges_as_strings(tok), config


def make_spm():
    """Like Llama-2: sentencepiece BPE; ids are <unk> <s> </s>, bytes, merges, characters."""
    pieces = Tokenizer(models.BPE())
    pieces.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="always", split=True)
    trainer = trainers.BpeTrainer(vocab_size=512 - 259, show_progress=False)
    # '\n', '\t' and '\r' are bytes in sentencepiece, never characters of the vocabulary
    pieces.train_from_iterator([" ".join(line.split()) for line in training_text()], trainer)
    model = json.loads(pieces.to_str())["model"]
    merges = [" ".join(pair) for pair in model["merges"]]
    merged = ["".join(pair) for pair in model["merges"]]
    characters = [p for p in model["vocab"] if p not in set(merged)]
    entries = ["<unk>", "<s>", "</s>"] + [f"<0x{b:02X}>" for b in range(256)]
    entries += list(dict.fromkeys(merged)) + characters
    flags = {"single_word": False, "lstrip": False, "rstrip": False, "normalized": False}
    start = {"SpecialToken": {"id": "<s>", "type_id": 0}}
    data = {
        "version": "1.0", "truncation": None, "padding": None,
        "added_tokens": [
            {"id": i, "content": c, **flags, "special": True}
            for i, c in enumerate(entries[:3])
        ],
        "normalizer": {"type": "Sequence", "normalizers": [
            {"type": "Prepend", "prepend": "▁"},
            {"type": "Replace", "pattern": {"String": " "}, "content": "▁"},
        ]},
        "pre_tokenizer": None,
        "post_processor": {
            "type": "TemplateProcessing",
            "single": [start, {"Sequence": {"id": "A", "type_id": 0}}],
            "pair": [
                start, {"Sequence": {"id": "A", "type_id": 0}},
                {"SpecialToken": {"id": "<s>", "type_id": 1}},
                {"Sequence": {"id": "B", "type_id": 1}},
            ],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}},
        },
        "decoder": {"type": "Sequence", "decoders": [
            {"type": "Replace", "pattern": {"String": "▁"}, "content": " "},
            {"type": "ByteFallback"}, {"type": "Fuse"},
            {"type": "Strip", "content": " ", "start": 1, "stop": 0},
        ]},
        "model": {
            "type": "BPE", "dropout": None, "unk_token": "<unk>",
            "continuing_subword_prefix": None, "end_of_word_suffix": None,
            "fuse_unk": True, "byte_fallback": True,
            "vocab": {piece: i for i, piece in enumerate(entries)}, "merges": merges,
        },
    }
    config = {
        "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>", "pad_token": None,
        "add_bos_token": True, "add_eos_token": False, "legacy": True,
    }
    return data, config


TOKENIZERS = {
    "byte": make_byte, "llama3style": make_llama3style, "spm": make_spm,
    "gpt2style": make_gpt2style,
}


def random_unicode(rng, length):
    """Characters whose category never changed since Unicode 3.2, so that no table disagrees."""
    out = []
    while len(out) < length:
        plane = rng.choice((0x80, 0x250, 0x800, 0x3000, 0x10000, 0x20000))
        c = chr(rng.randrange(0x20, plane))
        category = unicodedata.category(c)
        if category not in ("Cn", "Cs", "Co") and category == unicodedata.ucd_3_2_0.category(c):
            out.append(c)
    return "".join(out)


def token_texts():
    """About 120 texts that together reach the corner cases of the four tokenizers."""
    mixed = "".join(training_text())[:1600] + "漢字かな交じり文。 " * 10 + "🙂🏳️‍🌈 naïve ﬁn " * 22
    texts = [
        "", " ", "  ", "   ", "     ", " " * 6, " " * 17, "\n", "\n\n", "\n\n\n", "\t",
        "\t\t x", "\r\n", "\r\n\r\n", "\r", " \n", "\n ", " \n \n ", "a\r\nb\r\n",
        "line one\nline two\n", "a  b", "a   b    c", "trailing space ", "  leading",
        "tab\tseparated\tvalues", "  indented\n    more\n\tmixed \n", "Hello, world!", "hello",
        " hello", "Hello", "HELLO", "The small model reads the matrix.",
        "I'm you're he's she'd we've they'll isn't",
        "I'M YOU'RE HE'S SHE'D WE'VE THEY'LL ISN'T", "'s't're've'm'll'd", "don''t",
        "it’s ‘quoted’", "rock 'n' roll's", "'S", "ſ's 'ſ", "0", "7 8 9", "12", "123", "1234",
        "1234567890", "3.14159", "1,000,000.50", "2024-11-20", "x86_64", "v1.2.3-rc4",
        "²³¹ ½ Ⅷ ٣٤٥ १२३", "50% of $20",
        "for (int i = 0; i < n; i++) {\n    sum += w[i] * x[i];\n}\n",
        "def mean(values):\n\treturn sum(values) / len(values)\n",
        "#include <stdio.h>\nint main(void) { return 0; }", "a+=b;c--;d<<=1;e->f", "{}[]()<>",
        "https://example.org/a?b=c&d=%20e#f", "name@example.org", "C:\\temp\\new",
        "/* c */ // d", "<p class=\"x\">y</p>", "{\"key\": [1, 2.5, null]}", "!!!???...",
        "—–-‐", "___", "a_b__c", "今天天气很好，我们在训练一个小模型。", "这个模型很小", "今天 天气", "漢字かな交じり文",
        "カタカナ ﾊﾝｶｸ", "ガギグ が ぱ", "か\u3099は\u309a", "한국어 문장입니다",
        "\u1112\u1161\u11ab\u1100\u116e\u11a8", "각 \u1100\u1161\u11a8", "مرحبا بالعالم",
        "العَرَبِيَّة", "שלום עולם", "नमस्ते दुनिया", "क\u093c क़", "สวัสดีชาวโลก",
        "Привет, мир!", "Γειά σου Κόσμε", "Tiếng Việt", "naïve café", "nai\u0308ve cafe\u0301",
        "Straße ÄÖÜ", "ﬁ ﬂ Ⅳ ① Å \u212b \u2126", "q\u0307\u0323 q\u0323\u0307",
        "a\u0315\u0300\u05ae\u0062", "e\u0301\u0302 \u0301x", "s\u0323\u0307 ṩ",
        "\u0344 \u0958 \u2adc", "🙂", "🙂🙂 👍🏽", "👩‍👩‍👧‍👦 👨‍💻", "🏳️‍🌈🏴‍☠️", "🇩🇪🇫🇷 🇯🇵", "❤️ ☺︎",
        "1️⃣", "𝒳 𝟙𝟚 𐍈", "\U0001e900\U0001e922 \u1c90ა", "\u0000", "a\u0000b",
        "\u0001\u0002\u001f\u007f", "\u0085x\u0085\u0085", "\u001b[0m", "\u200b\u200d\ufeff",
        "\u00a0", "a\u00a0b \u00a0 c", "\u2028a\u2029\u2028", "\u3000x\u3000\u3000y",
        "\u2003\u2009\u202f\u205f\u1680z", "\ufffd\ufffe", "\U0010ffff", "\ue000", "▁",
        "a▁b ▁c", "Ġ Ċ Ã", "<0x41><0x0A>",
        "<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n",
        "<|im_start|><|im_end|><|endoftext|>", "a <|im_end|> b", "x<|endoftext|>y",
        "<|im_start", "|im_end|>", "<|endoftext|><|endoftext|> <|end", "<s>", "<s> a</s>",
        "</s></s> <unk> x", " <s> ", "[INST] hi [/INST]",
        "<|begin_of_text|><|start_header_id|>user<|end_header_id|>\n\nHi<|eot_id|>",
        "<|begin_of_text|> <|begin_of_text|>", "a <mask> b", "<mask>\n <mask>", "a <trim> \n b",
        "a<trim>b", "qlora qlora.c qloras aqlora QLORA qlora",
        " quantum zebra zebras Käfer 2024 202", "zebra", "zebra zebra\nzebras", mixed,
    ]
    rng = random.Random(3)
    texts += [random_unicode(rng, n) for n in (1, 2, 3, 5, 8, 13, 21, 34, 55, 89, 120, 200)]
    return texts


def write_tokenizers(out):
    shutil.rmtree(out, ignore_errors=True)
    for name, make in TOKENIZERS.items():
        data, config = make()
        folder = out / name
        folder.mkdir(parents=True)
        (folder / "tokenizer.json").write_text(
            json.dumps(data, ensure_ascii=False, indent=1) + "\n", encoding="utf-8")
        tok = Tokenizer.from_file(str(folder / "tokenizer.json"))
        added = {str(t.pop("id")): t for t in data["added_tokens"]}
        config |= {
            "added_tokens_decoder": added, "clean_up_tokenization_spaces": False,
            "model_max_length": 128, "tokenizer_class": "PreTrainedTokenizerFast",
        }
        (folder / "tokenizer_config.json").write_text(
            json.dumps(config, ensure_ascii=False, indent=2, sort_keys=True) + "\n",
            encoding="utf-8")
        rows = []
        for text in token_texts():
            plain = tok.encode(text, add_special_tokens=False).ids
            rows.append({
                "text": text, "ids": tok.encode(text).ids, "ids_plain": plain,
                "decoded": tok.decode(plain, skip_special_tokens=False),
            })
        save_json(folder / "ids.json", rows, ascii_only=True)
    write_chat(out / "byte")


def write_chat(folder):
    """What apply_chat_template makes of a few dialogues."""
    tok = transformers.AutoTokenizer.from_pretrained(folder)
    user, answer = {"role": "user", "content": "Hi there"}, {"role": "assistant", "content": "Yes."}
    system = {"role": "system", "content": "Be brief."}
    rows = []
    for messages in ([user], [system, user], [user, answer], [system, user, answer, user]):
        for prompt in (False, True):
            text = tok.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=prompt)
            rows.append({
                "messages": messages, "add_generation_prompt": prompt, "text": text,
                "ids": tok.encode(text, add_special_tokens=False),
            })
    save_json(folder / "chat.json", rows)


# ---------------------------------------------------------------------------------------------
# 4-bit quantisation
# ---------------------------------------------------------------------------------------------


def nearest_codes(values, absmax, code, blocksize=256):
    """Index of the map's entry nearest to values / absmax of their block.

    The rule of bitsandbytes' CUDA kernel and of its generic one. Its CPU kernel instead looks the
    value up on a grid of about 2^-15, which moves one code in a thousand to the neighbour.
    """
    scale = absmax.repeat_interleave(blocksize)[:values.numel()]
    scaled = torch.clamp(values * (1 / scale.clamp(min=1e-38)), -1, 1)
    codes = torch.bucketize(scaled, (code[:-1] + code[1:]) / 2).to(torch.uint8)
    return torch.where(scale > 0, codes, torch.zeros_like(codes))


def quantise(weight, quant_type="nf4", nested=False):
    """bitsandbytes' own quantiser; returns the packed bytes and the quantisation state."""
    def quantize(double):
        return bnbf.quantize_4bit(weight.contiguous(), blocksize=64, quant_type=quant_type,
                                  compress_statistics=double)

    packed, state = quantize(nested)
    if nested:
        scales = quantize(False)[1].absmax - state.offset
        codes = nearest_codes(scales, state.state2.absmax, state.state2.code)
        state.absmax = codes.reshape(state.absmax.shape)
    return packed, state


def block_scales(state):
    """The float32 absmax of every block, undoing double quantisation where there is one."""
    if not state.nested:
        return state.absmax
    return bnbf.dequantize_blockwise(state.absmax, state.state2) + state.offset


def dequantise(packed, state):
    """codebook[index] * absmax in float32.

    Not bitsandbytes' CPU kernel: with AVX-512 that one takes wrong scales for rows whose
    length is no multiple of the block size (see README.md).  Where it is sound, the two agree.
    """
    n = math.prod(state.shape)
    indices = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), 1).reshape(-1)
    scales = block_scales(state).repeat_interleave(state.blocksize)[:n]
    result = (state.code[indices[:n].long()] * scales).reshape(state.shape)
    if state.shape[-1] % state.blocksize == 0 and state.dtype == torch.float32:
        assert torch.equal(result, bnbf.dequantize_4bit(packed, state).reshape(state.shape))
    return result


def decision_points():
    """Values on, just below and just above every NF4 threshold, for three block maxima.

    CUDA's constant for the last threshold is one ulp below the midpoint that the CPU takes, so
    it puts elements 14, 78 and 142 (bytes 7, 39, 71) one code higher.
    """
    code = bnbf.get_4bit_type("nf4", device="cpu")
    mid = (code[1:] + code[:-1]) / 2
    up, down = torch.tensor(math.inf), torch.tensor(-math.inf)
    rest = torch.tensor([1.0, -0.0, 0.0])
    block = torch.cat((mid, mid.nextafter(up), mid.nextafter(down), code, rest))
    return torch.stack([block * scale for scale in (1.0, 4.0, 3.0)])


def nf4_cases():
    """name -> (tensor, also as FP4, what it is for)"""
    rng = torch.Generator().manual_seed(4)

    def normal(*shape):
        return torch.randn(*shape, generator=rng)

    zero_block, zero_tail = normal(5, 64), normal(70)
    zero_block[2] = 0
    zero_tail[64:] = 0
    ties = normal(2, 64).clamp(-0.9, 0.9)
    ties[0, 3], ties[0, 40], ties[1, 0], ties[1, 63] = 1.5, -1.5, -2.25, 2.25
    half = torch.tensor(torch.finfo(torch.float16).smallest_normal)
    return {
        "size_1": (normal(1), False, "one element: the low nibble is padding"),
        "size_63": (normal(63), False, "short odd block"),
        "size_64": (normal(64), False, "one full block"),
        "size_65": (normal(65), True, "a full block and one element"),
        "bf16_4096": (normal(4096).bfloat16(), False, "bfloat16 source"),
        "odd_33x50": (normal(33, 50), False, "short last block, rows cross blocks"),
        "f16_172x64": ((0.05 * normal(172, 64)).half(), False, "float16 source"),
        "f16_short": (normal(3, 50).half(), False, "float16 with a short block"),
        "f16_subnormal": (
            (normal(4, 64) * half * 0.3).half(), False, "float16 subnormals only"),
        "bf16_48x112": (normal(48, 112).bfloat16(), True, "rows of 112 cross blocks"),
        "zeros": (torch.zeros(4, 64), True, "all zero"),
        "zero_block": (zero_block, False, "one zero block among others"),
        "zero_tail": (zero_tail, False, "zero short block: absmax is clamped to 1e-38"),
        "huge": (normal(2, 64) * 1e30, False, "up to 1e30"),
        "tiny": (normal(2, 64) * 1e-38, False, "around 1e-38, part of it denormal"),
        "denormal": (normal(2, 64) * 1e-41, False, "absmax below the 1e-38 clamp"),
        "midpoints": (
            decision_points(), True,
            "on and one ulp beside every threshold; CUDA differs in bytes 7, 39, 71"),
        "constant": (torch.full((4, 64), -2.5), False, "constant: nested absmax is 0"),
        "ties": (ties, False, "+absmax and -absmax in one block, both orders"),
        "nested_256x130": (0.02 * normal(256, 130), False, "520 blocks: 3 nested blocks"),
    }


def zero_sign_like_cuda(packed, source):
    """FP4 has two zeros, which CPU and CUDA swap; CUDA's code is 8 for x < 0 only."""
    index = torch.stack((packed.reshape(-1) >> 4, packed.reshape(-1) & 15), 1).reshape(-1)
    negative = torch.zeros(index.numel(), dtype=torch.bool)
    negative[:source.numel()] = source.reshape(-1) < 0
    zero = (index == 0) | (index == 8)
    index = torch.where(zero, torch.where(negative, 8, 0).to(torch.uint8), index)
    return ((index[::2] << 4) | index[1::2]).reshape(packed.shape)


def write_nf4(out):
    tensors, notes = {}, []
    for kind in ("nf4", "fp4"):
        tensors[f"code.{kind}"] = bnbf.get_4bit_type(kind, device="cpu")
    for name, (source, with_fp4, purpose) in nf4_cases().items():
        tensors[f"{name}.source"] = source
        note = {"name": name, "shape": list(source.shape), "dtype": str(source.dtype)[6:],
                "fp4": with_fp4, "purpose": purpose}
        for kind in ("nf4", "fp4") if with_fp4 else ("nf4",):
            for nested in (False, True):
                key = f"{name}.{kind}{'dq' if nested else ''}"
                packed, state = quantise(source, kind, nested)
                tensors[f"{key}.packed"] = packed
                tensors[f"{key}.absmax"] = state.absmax
                tensors[f"{key}.dequant"] = dequantise(packed, state)
                if kind == "fp4":
                    tensors[f"{key}.packed_cuda"] = zero_sign_like_cuda(packed, source)
                if nested:
                    tensors[f"{key}.nested_absmax"] = state.state2.absmax
                    tensors[f"{key}.nested_offset"] = state.offset
                    tensors["code.nested"] = state.state2.code
                    note[f"{kind}_codes_moved_by_exact_mean"] = moved_codes(source, kind)
        notes.append(note)
    save(out / "nf4.safetensors", tensors)
    save_json(out / "nf4.json", {"versions": VERSIONS, "blocksize": 64, "tensors": notes})
    write_bnb_linear(out)


def moved_codes(source, kind="nf4"):
    """How many 8-bit scale codes change if the mean is summed in double and rounded once.

    torch's float32 mean depends on its summation order; a code that moves with the last bit of
    it is nothing another implementation could reproduce.
    """
    _, plain = quantise(source, kind)
    _, nested = quantise(source, kind, nested=True)
    exact = plain.absmax.double().mean().float()
    centred = plain.absmax - exact
    groups = [group.abs().max() for group in centred.split(256)]
    codes = nearest_codes(centred, torch.stack(groups), nested.state2.code)
    return int((codes != nested.absmax.reshape(-1)).sum())


def write_bnb_linear(out):
    """A serialised 4-bit linear: 17,280 weights, so 270 scales and two nested blocks."""
    rng = torch.Generator().manual_seed(5)
    weight = (0.04 * torch.randn(144, 120, generator=rng)).bfloat16()
    bias = (0.1 * torch.randn(144, generator=rng)).bfloat16()
    x = torch.randn(5, 120, generator=rng)
    linear = bnb.nn.Linear4bit(
        120, 144, bias=True, compute_dtype=torch.bfloat16, compress_statistics=True,
        quant_type="nf4")
    linear.weight = bnb.nn.Params4bit(
        weight.clone(), requires_grad=False, compress_statistics=True, quant_type="nf4")
    linear.bias = torch.nn.Parameter(bias.clone(), requires_grad=False)
    linear = linear.to("cpu")  # quantises
    save(out / "bnb_linear.safetensors", linear.state_dict())
    dequant = dequantise(linear.weight.data, linear.weight.quant_state)
    save(out / "bnb_linear_ref.safetensors", {
        "source": weight, "dequant": dequant, "x": x,
        "y": F.linear(x, dequant, bias.float()),
    })


# ---------------------------------------------------------------------------------------------
# Models and adapters
# ---------------------------------------------------------------------------------------------

LLAMA_LINEARS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]
# Not quantised: the output head, and Mixtral's router (llm_int8_skip_modules ["gate", "lm_head"]).
SKIPPED = ("lm_head", "gate")


def model_specs():
    """name -> what to build

    The lengths are those of the reference sequences; the seeds are the first ones (of 10,
    20, ...) that pass every assertion on near ties below.
    """
    llama = dict(hidden_size=64, num_hidden_layers=2, num_attention_heads=4,
                 max_position_embeddings=128)
    return {
        "llama": dict(
            seed=40, tokenizer="spm", config=transformers.LlamaConfig, dtype=torch.float32,
            targets=LLAMA_LINEARS, lengths=(7, 17, 12), arguments=dict(
                **llama, intermediate_size=172, num_key_value_heads=2, rms_norm_eps=1e-5)),
        "qwen2": dict(
            seed=10, tokenizer="byte", config=transformers.Qwen2Config, dtype=torch.float32,
            targets=LLAMA_LINEARS, lengths=(7, 17, 12), arguments=dict(
                hidden_size=48, intermediate_size=112, num_hidden_layers=2,
                num_attention_heads=6, num_key_value_heads=2, tie_word_embeddings=True,
                rope_theta=1e6, rms_norm_eps=1e-6, max_position_embeddings=128)),
        "llama31": dict(
            seed=10, tokenizer="llama3style", config=transformers.LlamaConfig, dtype=torch.bfloat16,
            targets=LLAMA_LINEARS, lengths=(5, 14, 9), shards="96KB", arguments=dict(
                **llama, intermediate_size=112, num_key_value_heads=2, head_dim=24,
                tie_word_embeddings=True, rope_theta=10000.0, rope_scaling=dict(
                    rope_type="llama3", factor=8.0, low_freq_factor=1.0,
                    high_freq_factor=4.0, original_max_position_embeddings=32))),
        "mistral": dict(
            seed=10, tokenizer="spm", config=transformers.MistralConfig, dtype=torch.float16,
            targets=LLAMA_LINEARS, lengths=(5, 14, 9), arguments=dict(
                **llama, intermediate_size=96, num_key_value_heads=1, sliding_window=8,
                rms_norm_eps=1e-5)),
        "phi": dict(
            seed=10, tokenizer="gpt2style", config=transformers.PhiConfig, dtype=torch.float32,
            targets=["q_proj", "k_proj", "v_proj", "dense", "fc1", "fc2"],
            lengths=(5, 14, 9), arguments=dict(
                hidden_size=40, intermediate_size=80, num_hidden_layers=2,
                num_attention_heads=2, partial_rotary_factor=0.4,
                max_position_embeddings=128)),
        "mixtral": dict(
            seed=10, tokenizer="spm", config=transformers.MixtralConfig, dtype=torch.float32,
            targets=["q_proj", "k_proj", "v_proj", "o_proj", "w1", "w2", "w3"],
            lengths=(5, 14, 9), arguments=dict(
                hidden_size=32, intermediate_size=48, num_hidden_layers=2,
                num_attention_heads=2, num_key_value_heads=1, num_local_experts=4,
                num_experts_per_tok=2, sliding_window=None, rope_theta=1e6,
                max_position_embeddings=128)),
    }


def randomise(model, rng):
    """Weights large enough that logits differ clearly and attention is not uniform."""
    with torch.no_grad():
        for name, p in sorted(model.named_parameters()):
            noise = torch.randn(p.shape, generator=rng)
            if name.endswith("bias"):
                p.copy_(0.1 * noise)
            elif p.dim() == 1:
                p.copy_(1 + 0.1 * noise)
            elif name.endswith("block_sparse_moe.gate.weight"):
                p.copy_(0.5 * noise)  # clear decisions between experts
            else:
                p.copy_(0.13 * noise)


def create_model(name, spec, folder, tokenizer_folder):
    shutil.copytree(
        tokenizer_folder, folder, ignore=shutil.ignore_patterns("ids.json", "chat.json"))
    tok = transformers.AutoTokenizer.from_pretrained(tokenizer_folder)
    config = spec["config"](
        vocab_size=len(tok), bos_token_id=tok.bos_token_id, eos_token_id=tok.eos_token_id,
        pad_token_id=tok.pad_token_id, **spec["arguments"])
    config._attn_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config)
    randomise(model, torch.Generator().manual_seed(spec["seed"]))
    model.generation_config = transformers.GenerationConfig(
        bos_token_id=tok.bos_token_id, eos_token_id=[tok.eos_token_id],
        pad_token_id=tok.pad_token_id)
    model.to(spec["dtype"]).save_pretrained(folder, max_shard_size=spec.get("shards", "5GB"))


def load_base(folder):
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager")
    return model.eval().requires_grad_(False)


def linears(model, skip=SKIPPED):
    return [
        module for name, module in model.named_modules()
        if isinstance(module, torch.nn.Linear) and name.split(".")[-1] not in skip
    ]


def quantise_linears(model, quant, skip=SKIPPED):
    """Replaces the weight of every linear but those in skip by its 4-bit approximation."""
    if quant == "none":
        return
    for module in linears(model, skip):
        module.weight.data = dequantise(*quantise(module.weight.data, nested=quant == "nf4dq"))


def create_adapter(folder, name, spec, head):
    """A LoRA adapter with both factors random, written by peft."""
    rng = torch.Generator().manual_seed(spec["seed"] + 1 + head)
    lora = peft.LoraConfig(
        r=4, lora_alpha=8, lora_dropout=0.0, bias="none", task_type="CAUSAL_LM",
        target_modules=spec["targets"] + (["lm_head"] if head else []))
    model = peft.get_peft_model(load_base(folder), lora)
    with torch.no_grad():
        for key, p in sorted(lora_parameters(model).items()):
            noise = torch.randn(p.shape, generator=rng)
            p.copy_(noise / math.sqrt(p.shape[1]) if ".lora_A." in key else 0.05 * noise)
    lora_config = model.peft_config["default"]
    lora_config.base_model_name_or_path = "../"
    target = folder / ("adapter_head" if head else "adapter")
    # With a targeted head peft also stores the embedding and head weights.  Keep that for one
    # model; for the other, store the LoRA tensors alone.
    embeddings = {} if name == "llama" else {"save_embedding_layers": False}
    model.save_pretrained(target, **embeddings)
    (target / "README.md").unlink()  # an empty model card
    # peft writes target_modules in the order of a Python set, which differs between runs
    path = target / "adapter_config.json"
    stored = json.loads(path.read_text())
    stored["target_modules"].sort()
    path.write_text(json.dumps(stored, indent=2, sort_keys=True))
    return target


def lora_parameters(model):
    """The trainable tensors under the names they have in adapter_model.safetensors."""
    return {
        name.replace(".default.", "."): p
        for name, p in model.named_parameters() if ".lora_" in name
    }


def load_adapter(folder, quant, adapter="adapter", skip=SKIPPED):
    """The base model as training sees it, with the adapter as it is on disk."""
    model = load_base(folder)
    quantise_linears(model, quant, skip)
    return peft.PeftModel.from_pretrained(model, folder / adapter, is_trainable=True).eval()


def random_sequence(rng, length, vocab):
    """ids and labels; a masked prefix and, in longer sequences, holes in the middle."""
    ids = [rng.randrange(vocab) for _ in range(length)]
    labels = list(ids)
    prefix = rng.randrange(1, 1 + length // 3)
    labels[:prefix] = [-100] * prefix
    if length >= 12:
        hole = rng.randrange(prefix + 1, length - 4)
        labels[hole:hole + 3] = [-100] * 3
    return {"ids": ids, "labels": labels}


def logits_of(model, ids):
    return model(input_ids=torch.tensor([ids]), use_cache=False).logits[0]


def token_losses(logits, labels):
    """Cross entropy of every supervised position p >= 1, predicted by logits[p - 1]."""
    labels = torch.tensor(labels)[1:]
    chosen = labels != -100
    return F.cross_entropy(logits[:-1][chosen].float(), labels[chosen], reduction="none")


def supervised(sequences):
    return sum(label != -100 for s in sequences for label in s["labels"][1:])


def references(model, sequences, base=True):
    """Logits, losses and gradients of the loss over all sequences together."""
    out, total = {}, 0
    for i, s in enumerate(sequences):
        if base:
            with torch.no_grad(), model.disable_adapter():
                out[f"logits_base.{i}"] = logits_of(model, s["ids"])
        out[f"logits.{i}"] = logits_of(model, s["ids"])
        out[f"nll.{i}"] = token_losses(out[f"logits.{i}"], s["labels"])
        total = total + out[f"nll.{i}"].sum()
    out["loss"] = total / supervised(sequences)
    parameters = lora_parameters(model)
    gradients = torch.autograd.grad(out["loss"], list(parameters.values()))
    out |= {f"grad.{name}": g for name, g in zip(parameters, gradients)}
    return out


def bfloat16_logits(model, sequences):
    """The same model rounded to bfloat16.  Buffers (rotary frequencies) stay float32."""
    for p in model.parameters():
        p.data = p.data.bfloat16()
    with torch.no_grad():
        return {
            f"bf16.logits.{i}": logits_of(model, s["ids"]).float()
            for i, s in enumerate(sequences)
        }


def greedy(model, ids, count=20):
    """Greedy continuation without a stop token; refuses near ties, which noise could flip."""
    ids = list(ids)
    with torch.no_grad():
        for _ in range(count):
            last = logits_of(model, ids)[-1]
            best = last.topk(2)
            assert best.values[0] - best.values[1] > 1e-3, "near tie: choose another seed"
            ids.append(int(best.indices[0]))
    return ids[-count:]


def write_model(name, spec, out, tokenizer_root):
    folder = out / name
    shutil.rmtree(folder, ignore_errors=True)
    create_model(name, spec, folder, tokenizer_root / spec["tokenizer"])
    create_adapter(folder, name, spec, head=False)
    plain = load_base(folder)
    assert not any(moved_codes(module.weight) for module in linears(plain))
    vocab = plain.config.vocab_size
    rng = random.Random(spec["seed"] + 3)
    sequences = [random_sequence(rng, n, vocab) for n in spec["lengths"]]
    info = {
        "versions": VERSIONS, "vocab_size": vocab, "sequences": sequences,
        "supervised": supervised(sequences), "loss": {}, "bf16_max_rel_error": {},
    }
    for quant in QUANTS:
        model = load_adapter(folder, quant)
        check_routing(model, sequences)
        tensors = references(model, sequences)
        info["loss"][quant] = tensors["loss"].item()
        if quant == "none":
            with model.disable_adapter():
                base = greedy(model, sequences[0]["ids"])
            info["greedy"] = {"base": base, "adapter": greedy(model, sequences[0]["ids"])}
        if name == "mixtral" and quant == "nf4":
            # transformers 4 quantises the router too unless told otherwise
            gate = references(load_adapter(folder, quant, skip=("lm_head",)), sequences)
            tensors |= {f"gate_nf4.{k}": v for k, v in gate.items() if k.startswith("logits.")}
        if quant != "nf4dq":
            rounded = bfloat16_logits(model, sequences)
            tensors |= rounded
            info["bf16_max_rel_error"][quant] = max(
                relative_error(rounded[f"bf16.logits.{i}"], tensors[f"logits.{i}"])
                for i in range(len(sequences)))
        save(folder / f"ref_{quant}.safetensors", tensors)
    save_json(folder / "ref.json", info)
    if name in ("llama", "qwen2"):
        write_head(name, spec, folder, sequences)
        write_training(folder, spec, vocab)


def relative_error(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


def check_routing(model, sequences):
    """Mixtral: the second and third expert must differ clearly, or noise could swap them."""
    if model.config.model_type != "mixtral":
        return
    with torch.no_grad():
        for s in sequences:
            inputs = torch.tensor([s["ids"]])
            for router in model(input_ids=inputs, output_router_logits=True).router_logits:
                best = router.topk(3).values
                assert (best[:, 1] - best[:, 2]).min() > 1e-3, "near tie: choose another seed"


def write_head(name, spec, folder, sequences):
    """The same with a LoRA adapter on lm_head too (for qwen2 the tied one)."""
    create_adapter(folder, name, spec, head=True)
    model = load_adapter(folder, "none", "adapter_head")
    save(folder / "ref_head_none.safetensors", references(model, sequences, base=False))


STEPS, WARMUP, PEAK_LR, MAX_NORM = 10, 3, 1e-2, 0.5


def learning_rate(t):
    if t < WARMUP:
        return PEAK_LR * (t + 1) / WARMUP
    return PEAK_LR * 0.5 * (1 + math.cos(math.pi * (t - WARMUP) / (STEPS - WARMUP)))


def train(model, steps):
    parameters = lora_parameters(model)
    optimizer = torch.optim.AdamW(
        parameters.values(), lr=PEAK_LR, betas=(0.9, 0.999), eps=1e-8, weight_decay=0.01)
    log = []
    for t, micro_batches in enumerate(steps):
        for group in optimizer.param_groups:
            group["lr"] = learning_rate(t)
        optimizer.zero_grad()
        count, loss = supervised(micro_batches), 0.0
        for s in micro_batches:
            part = token_losses(logits_of(model, s["ids"]), s["labels"]).sum() / count
            part.backward()
            loss += part.item()
        norm = torch.nn.utils.clip_grad_norm_(parameters.values(), MAX_NORM).item()
        optimizer.step()
        log.append({"lr": learning_rate(t), "loss": loss, "grad_norm": norm})
    return {k: p.detach().float() for k, p in parameters.items()}, log


def write_training(folder, spec, vocab):
    rng = random.Random(spec["seed"] + 4)
    steps = [
        [random_sequence(rng, rng.randrange(lo, lo + 8), vocab) for lo in (5, 14)]
        for _ in range(STEPS)
    ]
    info = {
        "versions": VERSIONS, "adapter": "adapter", "accumulation": 2, "steps": STEPS,
        "warmup": WARMUP, "peak_lr": PEAK_LR, "max_grad_norm": MAX_NORM,
        "adamw": {"beta1": 0.9, "beta2": 0.999, "eps": 1e-8, "weight_decay": 0.01},
        "micro_batches": [s for step in steps for s in step], "log": {},
        "float64_max_abs_diff": {},
    }
    for quant in ("none", "nf4"):
        final, log = train(load_adapter(folder, quant), steps)
        assert sum(entry["grad_norm"] > MAX_NORM for entry in log) > STEPS // 2
        # How far rounding alone moves the result: a bound for what a comparison can ask for.
        precise, _ = train(load_adapter(folder, quant).double(), steps)
        info["float64_max_abs_diff"][quant] = max(
            (final[k] - precise[k]).abs().max().item() for k in final)
        assert info["float64_max_abs_diff"][quant] < 1e-5, "ill-conditioned: choose another seed"
        info["log"][quant] = log
        save(folder / f"ref_train_{quant}.safetensors", final)
    save_json(folder / "ref_train.json", info)


def check_linear4bit(folder):
    """Dequantised linears equal bitsandbytes' own 4-bit layers, loaded by transformers.

    Without double quantisation, for there its CPU kernel confuses codes (see nearest_codes).
    """
    sequence = json.loads((folder / "ref.json").read_text())["sequences"][1]["ids"]
    settings = transformers.BitsAndBytesConfig(
        load_in_4bit=True, bnb_4bit_quant_type="nf4", bnb_4bit_compute_dtype=torch.float32)
    model = transformers.AutoModelForCausalLM.from_pretrained(
        folder, dtype=torch.float32, attn_implementation="eager", device_map="cpu",
        quantization_config=settings)
    assert isinstance(model.model.layers[0].mlp.down_proj, bnb.nn.Linear4bit)
    model.train()  # in eval mode bitsandbytes' CPU path computes in bfloat16
    with torch.no_grad():
        logits = logits_of(model, sequence)
    expected = load_file(folder / "ref_nf4.safetensors")["logits_base.1"]
    error = relative_error(logits, expected)
    assert error < 1e-6, error
    print(f"{folder.name} nf4: Linear4bit differs by {error:.1e}")


def check_window(folder):
    """The sliding window must matter from position 8 on, and only there."""
    info = json.loads((folder / "ref.json").read_text())
    ids = info["sequences"][1]["ids"]
    model = load_base(folder)
    with torch.no_grad():
        windowed = logits_of(model, ids)
        model.config.sliding_window = None
        full = logits_of(model, ids)
    change = (windowed - full).abs().amax(1)
    assert change[:8].max() < 1e-5 and change[8:].min() > 1e-2, change


def write_models(out, tokenizer_root):
    for name, spec in model_specs().items():
        write_model(name, spec, out, tokenizer_root)
        print(f"wrote {name}", flush=True)
    check_linear4bit(out / "llama")
    check_window(out / "mistral")


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--only", choices=("tokenizers", "nf4", "models"))
    parser.add_argument("--out", type=Path, default=FIXTURES)
    args = parser.parse_args()
    if args.only in (None, "tokenizers"):
        write_tokenizers(args.out / "tokenizers")
    if args.only in (None, "nf4"):
        write_nf4(args.out)
    if args.only in (None, "models"):
        write_models(args.out / "models", args.out / "tokenizers")


if __name__ == "__main__":
    main()
