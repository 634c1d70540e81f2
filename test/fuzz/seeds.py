#!/usr/bin/env python3
"""Writes a small seed corpus for each target of fuzz.c: seeds.py OUT (OUT/json/..., ...).

Everything is made here or taken from test/fixtures; nothing is downloaded."""
import json, os, struct, sys

out = sys.argv[1]
root = os.path.join(os.path.dirname(os.path.abspath(__file__)), "..")


def put(target, *items):
    os.makedirs(os.path.join(out, target), exist_ok=True)
    for i, item in enumerate(items):
        data = item.encode("utf-8", "surrogatepass") if isinstance(item, str) else item
        with open(os.path.join(out, target, "seed-%02d" % i), "wb") as f:
            f.write(data)


def dump(x):
    return json.dumps(x, ensure_ascii=False)


put("json", "[]", "{}", '{"a":[1,-0.5e+3,true,false,null,"x\\n\\u00e9\\ud83d\\ude00"],"b":{"c":""}}',
    '["é€😀"]', "1e9", ' {"k" : [ [ ] , { } ] }\n', "-0", '"\\"\\\\\\/\\b\\f\\n\\r\\t"')

gpt2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
llama3 = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+"
          r"[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+")
o200k = (r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+"
         r"(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+")
text = "Hello, WORLD's  123\n\n\t 你好 e\u0301 x"
put("regex", *[p + "\0" + text for p in (
    gpt2, llama3, o200k, "[一-龥]+", r"(?:ab|a)+?c|(?=x).|(?>a+)b|^x|y$|\w*+\d", "a{2,3}|[^a-c]{1,}",
    r" ?[^(\s|[.,!?…。，、।۔،])]+", r"[!-/:-~]|\S+|\D\W|.")])

bytes_alphabet = [c for c in list(range(33, 127)) + list(range(161, 173)) + list(range(174, 256))]
letters = [chr(c) for c in bytes_alphabet] + [chr(256 + i) for i in range(68)]


def model(vocab, merges, **more):
    return dict({"type": "BPE", "vocab": vocab, "merges": merges}, **more)


def tokenizer(normalizer, pre, post, decoder, bpe, added=()):
    return dump({"version": "1.0", "added_tokens": list(added), "normalizer": normalizer,
                 "pre_tokenizer": pre, "post_processor": post, "decoder": decoder, "model": bpe})


def added(i, text, **more):
    return dict({"id": i, "content": text, "single_word": False, "lstrip": False, "rstrip": False,
                 "normalized": False, "special": True}, **more)


few = {c: i for i, c in enumerate("abHelo,WrdĠ123Ċ")}
few.update({"ll": 20, "Hell": 21, "He": 22})
merges = ["H e", "l l", "He ll"]
byte_level = {"type": "ByteLevel", "add_prefix_space": False, "trim_offsets": True, "use_regex": True}
split = {"type": "Split", "pattern": {"Regex": llama3}, "behavior": "Isolated", "invert": False}
template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "<s>", "type_id": 0}},
            {"Sequence": {"id": "A", "type_id": 0}}], "pair": [],
            "special_tokens": {"<s>": {"id": "<s>", "ids": [30], "tokens": ["<s>"]}}}
spm = {c: i for i, c in enumerate(["<unk>", "<s>", "</s>"] + ["<0x%02X>" % b for b in range(256)]
                                  + ["▁", "a", "x", "▁x", "l", "o", "lo"])}
replace = {"type": "Replace", "pattern": {"String": " "}, "content": "▁"}
config = dump({"bos_token": "<s>", "eos_token": {"content": "</s>"}, "legacy": False,
               "chat_template": "{{ bos_token }}"})
put("tokenizer_json",
    tokenizer({"type": "NFC"}, {"type": "Sequence", "pretokenizers": [split, dict(byte_level,
              use_regex=False)]}, None, byte_level, model(few, [m.split() for m in merges],
              ignore_merges=True), [added(23, "<|a|>"), added(24, "xx", lstrip=True, rstrip=True,
              single_word=True, normalized=True, special=False)]) + "\0\0" + config,
    tokenizer(None, byte_level, byte_level, byte_level, model(few, merges), [added(30, "<s>")]),
    tokenizer({"type": "Sequence", "normalizers": [{"type": "Prepend", "prepend": "▁"}, replace]},
              None, template | {"special_tokens": {"<s>": {"id": "<s>", "ids": [1], "tokens": ["<s>"]}}},
              {"type": "Sequence", "decoders": [{"type": "Replace", "pattern": {"String": "▁"},
               "content": " "}, {"type": "ByteFallback"}, {"type": "Fuse"},
               {"type": "Strip", "content": " ", "start": 1, "stop": 0}]},
              model(spm, ["▁ x", "l o"], byte_fallback=True, fuse_unk=True, unk_token="<unk>"),
              [added(0, "<unk>"), added(1, "<s>"), added(2, "</s>")]) + "\0\0" + config,
    tokenizer({"type": "Sequence", "normalizers": [{"type": "NFKC"}, {"type": "Lowercase"},
               {"type": "Strip", "strip_left": True, "strip_right": True}, {"type": "NFD"},
               {"type": "StripAccents"}, {"type": "NFKD"}]},
              {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first", "split": False},
              None, {"type": "Metaspace", "replacement": "▁", "prepend_scheme": "first"},
              model(spm, ["▁ x"], byte_fallback=True)),
    tokenizer(None, {"type": "Sequence", "pretokenizers": [{"type": "Digits",
              "individual_digits": True}, {"type": "Punctuation", "behavior": "Contiguous"},
              {"type": "Split", "pattern": {"String": " "}, "behavior": "MergedWithPrevious"},
              {"type": "WhitespaceSplit"}, {"type": "Whitespace"}]}, None, None, model(few, merges)),
    tokenizer(None, {"type": "Sequence", "pretokenizers": [{"type": "Split", "pattern": {"Regex":
              "\\s+"}, "behavior": "MergedWithNext"}, {"type": "Split", "pattern": {"Regex":
              "l"}, "behavior": "Contiguous"}, {"type": "Split", "pattern": {"Regex": "\\w+"},
              "behavior": "Removed", "invert": True}]}, {"type": "Sequence", "processors": [
              byte_level]}, None, model(few, merges, unk_token="a", fuse_unk=False)),
    dump({"model": {"type": "WordPiece", "vocab": {}}}))
put("vocab_json", dump(few) + "\0\0#version: 0.2\n" + "\n".join(merges) + "\n", "{}\0\0")


def varint(n):
    s = b""
    while n > 127:
        s, n = s + bytes([n & 127 | 128]), n >> 7
    return s + bytes([n])


def field(number, value):
    if isinstance(value, bytes):
        return varint(number << 3 | 2) + varint(len(value)) + value
    if isinstance(value, float):
        return varint(number << 3 | 5) + struct.pack("<f", value)
    return varint(number << 3) + varint(value)


def piece(text, score, kind):
    return field(1, field(1, text.encode()) + field(2, score) + (field(3, kind) if kind > 1 else b""))


pieces = (piece("<unk>", 0.0, 2) + piece("<s>", 0.0, 3) + piece("</s>", 0.0, 3)
          + b"".join(piece("<0x%02X>" % b, 0.0, 6) for b in range(0, 256, 3))
          + b"".join(piece(t, -float(i), 1) for i, t in enumerate(
              ["lo", "ll", "Hel", "He", "▁x", "▁", "H", "e", "l", "o", "x", "a", "aa", "aaaa"]))
          + piece("xx", 0.0, 4) + piece("yy", 0.0, 5))
trainer = field(3, 2) + field(35, 1)
put("tokenizer_model",
    pieces + field(2, trainer) + field(3, field(1, b"identity") + field(3, 1) + field(4, 0)),
    pieces + field(2, field(3, 2)) + field(3, field(1, b"identity") + field(3, 0) + field(4, 1)),
    pieces + field(2, trainer) + b"\0\0" + config.encode(), field(2, field(3, 1)))

put("encode", text, "\xff\xfe", "aaaaaaaa    \n\n  <|im_start|>user\n1234567 </s><s>", "▁▁x e\u0301\u0323",
    "👩‍💻가각 각\x00<0x41>", b"\xe4\xbd \xf0\x9f\x91")


def safetensors(header, data):
    text = header.encode()
    return struct.pack("<Q", len(text)) + text + data


one = '{"a":{"dtype":"F32","shape":[1,2],"data_offsets":[0,8]}}'
two = ('{"__metadata__":{"format":"pt"},"w":{"dtype":"BF16","shape":[2],"data_offsets":[0,4]},'
       '"b":{"dtype":"U8","shape":[],"data_offsets":[4,5]},"e":{"dtype":"I64","shape":[0],'
       '"data_offsets":[5,5]}}   ')
put("safetensors", safetensors(one, b"12345678"), safetensors(two, b"12345"), safetensors("{}", b""),
    b'{"weight_map":{"a":"s"}}\0\0' + safetensors(one, b"12345678"))

with open(os.path.join(root, "fixtures/tokenizers/byte/tokenizer_config.json"), encoding="utf-8") as f:
    chatml = json.load(f)["chat_template"]
plain = ("{% for m in messages %}{{'<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' "
         "+ '\\n'}}{% endfor %}{% if add_generation_prompt %}{{'<|im_start|>assistant\\n'}}{% endif %}")
put("chat_template", chatml, plain, "[INST] <<SYS>>", "<|start_header_id|>", "<|user|>", "")

put("dataset", dump({"messages": [{"role": "user", "content": "a"},
                                  {"role": "assistant", "content": "b"}]}) + "\n",
    '[{"instruction":"a","input":"b","output":"c","history":[["d","e"]]}]',
    '{"prompt":"a","completion":"b"}\r\n\r\n{"messages":["a","b"]}',
    '{"instruction":"a","context":"b","response":"c"}',
    '{"conversations":[{"from":"human","value":"a"},{"from":"gpt","value":"b"}]}',
    '{"text":"abc"}\n{"tools":[1]}', "\ufeff[]", "[1,")
