#!/usr/bin/env python3
"""Compares ids and decoded text with Hugging Face's tokenizers, text by text.

    check_tokenizers.py [--code-points] [--mb 1.2] [--variants] [--vectors DIR] DIRECTORY ...

Each DIRECTORY is a model directory; a tokenizer.json in it is read by `tokenizers` as transformers'
AutoTokenizer hands it over (which may change its post-processor); a directory that has only a
tokenizer.model by the library `sentencepiece`, on texts without control tokens; others by
AutoTokenizer alone. --variants puts many normalizers, pre-tokenizers and decoders around the vocabulary of each
directory. --vectors reads the texts and ids recorded by llama.cpp and tokenizers.js. The texts are
code, Chinese and English of the files given by --text, and generated ones: emoji, marks, controls,
runs of spaces, random characters, special tokens, broken UTF-8. Exit status 1 if anything differs.
build/tokenize_many is built from tokenize_many.c beside this file (make build/tokenize_many).
"""
import argparse, glob, json, os, random, struct, subprocess, sys, tempfile, unicodedata

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")
import tokenizers
from transformers import AutoTokenizer, PreTrainedTokenizerFast

here = os.path.dirname(os.path.abspath(__file__))
root = os.path.join(here, "..", "..")


def ours(directory, texts):
    """Yields (ids, decoded) for each text (bytes), or (None, message)."""
    data = b"".join(struct.pack("<I", len(t)) + t for t in texts)
    run = subprocess.run([os.path.join(root, "build/tokenize_many"), directory], input=data,
                         stdout=subprocess.PIPE, stderr=subprocess.PIPE)
    if run.returncode:
        raise RuntimeError(run.stderr.decode("utf-8", "replace").strip())
    out, at = run.stdout, 0
    for _ in texts:
        n = struct.unpack_from("<i", out, at)[0]
        ids = None if n < 0 else list(struct.unpack_from("<%di" % n, out, at + 4))
        at += 4 + 4 * max(n, 0)
        m = struct.unpack_from("<i", out, at)[0]
        yield ids, out[at + 4:at + 4 + m].decode("utf-8", "replace")
        at += 4 + m


class Sentencepiece:
    """The library behind tokenizer.model, looking as much like a tokenizers.Tokenizer as is needed."""

    class Encoded:
        def __init__(self, ids):
            self.ids, self.special_tokens_mask = ids, [1] + [0] * (len(ids) - 1)

    def __init__(self, path):
        import sentencepiece
        self.model = sentencepiece.SentencePieceProcessor(model_file=path)

    def get_added_tokens_decoder(self):
        return {}

    def num_special_tokens_to_add(self, pair):
        return 1

    def encode_batch_fast(self, texts):
        return [self.Encoded([self.model.bos_id()] + self.model.encode(t)) for t in texts]

    def decode(self, ids, skip_special_tokens):
        return self.model.decode(ids)


def reference(directory):
    """A tokenizers.Tokenizer, or what can stand for it."""
    if not glob.glob(os.path.join(directory, "*.json")) or (
            os.path.exists(os.path.join(directory, "tokenizer.model"))
            and not os.path.exists(os.path.join(directory, "tokenizer.json"))):
        return Sentencepiece(os.path.join(directory, "tokenizer.model"))
    if os.path.exists(os.path.join(directory, "tokenizer_config.json")):
        t = AutoTokenizer.from_pretrained(directory)._tokenizer
    else:
        t = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    t.no_truncation()
    t.no_padding()
    return t


# ------------------------------------------------------------------------------------------- texts

def cut(text, size, r):
    """Texts of very different lengths that together are the text."""
    at = 0
    while at < len(text):
        n = r.choice([1, 3, 10, 30, 100, 300, 1000, size])
        yield text[at:at + n]
        at += n


def random_char(r):
    while True:
        c = r.choice([r.randrange(0x80), r.randrange(0x250), r.randrange(0x300, 0x370),
                      r.randrange(0x3000), r.randrange(0x10000), r.randrange(0x110000),
                      r.randrange(0x4E00, 0x9FFF), r.randrange(0xAC00, 0xD7A4),
                      r.randrange(0x1F300, 0x1FA00), r.choice([0x20, 0x0A, 0x0D, 0x09, 0xA0, 0x85,
                      0x3000, 0x200B, 0x200C, 0x200D, 0xFE0F, 0x2028, 0xFEFF, 0xFFFD, 0x2581])])
        if not 0xD800 <= c < 0xE000:
            return chr(c)


def generated(r, special):
    """One odd text."""
    marks = [chr(c) for c in range(0x300, 0x370)] + ["\u05b0", "\u0651", "\u093c", "\u3099", "\u1161"]
    emoji = ["👩", "👨", "💻", "🏳", "🌈", "🇩", "🇪", "👍", "🏽", "❤", "\ufe0f", "\u200d", "🤦", "♂", "1\ufe0f\u20e3"]
    words = ["the", "The", "don't", "I'LL", "we've", "x", "HTTPServer", "naïve", "straße", "ſ", "K",
             "İstanbul", "ΑΣ", "привет", "你好", "日本語", "한국어", "नमस्ते", "สวัสดี", "العربية", "שלום",
             "ﬁ", "Å", "①", "½", "x²", "12345", "3.14159", "１２３", "٣٤", "Ⅷ", "_a_b", "<|a|>", "<s>", "#!/"]
    kind = r.randrange(9)
    if kind == 0:
        return "".join(r.choice(words) + r.choice([" ", "  ", "\n", "", "\t", ". ", ","]) for _ in range(30))
    if kind == 1:
        return "".join(r.choice(emoji) for _ in range(r.randrange(1, 40)))
    if kind == 2:
        return "".join(r.choice("aeouAEnс가あ") + "".join(r.choice(marks) for _ in range(r.randrange(4)))
                       for _ in range(30))
    if kind == 3:
        return "".join(chr(r.randrange(0xA0)) for _ in range(40))
    if kind == 4:
        return "".join(r.choice(words + [""]) + r.choice(" \n\t\r\u00a0\u3000\u2581") * r.choice([1, 2, 3, 7, 40, 200])
                       for _ in range(8))
    if kind == 5:
        return "".join(random_char(r) for _ in range(r.randrange(1, 60)))
    if kind == 6 and special:
        return "".join(r.choice([r.choice(special), r.choice(words), " ", "  ", "\n", r.choice(special)[:-1]])
                       for _ in range(20))
    if kind == 7:
        return r.choice("a0 =-\n.!我") * r.randrange(1, 600)
    return "".join(r.choice("'sStTrReEvVmMlLdDkKſK  12\n\r.") for _ in range(40))


def broken(r):
    """Bytes that are no UTF-8 in places."""
    data = bytearray("".join(random_char(r) for _ in range(30)).encode())
    for _ in range(r.randrange(1, 6)):
        at = r.randrange(len(data))
        what = r.randrange(3)
        if what == 0:
            data[at] = r.randrange(256)
        elif what == 1:
            del data[at:at + 1]
        else:
            data[at:at] = r.choice([b"\xff", b"\xc0\x80", b"\xed\xa0\x80", b"\xf4\x90\x80\x80", b"\xe2\x82", b"\xf0\x9f"])
        if not data:
            data = bytearray(b"\x80")
    return bytes(data)


def file_texts(paths, most, r):
    for path in paths:
        with open(path, encoding="utf-8", errors="replace", newline="") as f:
            text = f.read(most)
        yield from (t.encode() for t in cut(text, 5000, r))


def all_texts(args, tokenizer, r):
    special = [t.content for t in tokenizer.get_added_tokens_decoder().values()]
    texts = list(file_texts(args.text, int(args.mb * 1e6 / 2 / max(len(args.text), 1)), r))
    size = 0
    while size < args.mb * 1e6 / 2:
        text = generated(r, special).encode() if r.randrange(6) else broken(r)
        texts.append(text)
        size += len(text)
    texts.append(b"")
    if isinstance(tokenizer, Sentencepiece):
        texts = [t for t in texts if b"<s>" not in t and b"</s>" not in t and b"<unk>" not in t]
    if args.code_points:
        texts += [chr(c).encode() for c in range(0x110000) if not 0xD800 <= c < 0xE000]
    return texts


# --------------------------------------------------------------------------------------- comparing

def compare(name, directory, args, decode=True):
    try:
        hf = reference(directory)
    except Exception as error:
        print("%-34s not read by the reference: %s" % (name, str(error)[:150]))
        hf = None
    if not hf:
        try:
            list(ours(directory, [b"x"]))
        except RuntimeError as error:
            print("%34s nor by qlora: %s" % ("", error))
        return 0
    r = random.Random(args.seed)
    texts = all_texts(args, hf, r)
    try:
        answers = ours(directory, texts)
        first = next(answers)
    except RuntimeError as error:
        print("%-34s REFUSED: %s" % (name, error))
        return 1
    wrong = wrong_text = same = done = ids_total = 0
    n_special = hf.num_special_tokens_to_add(False)
    for start in range(0, len(texts), 4096):
        block = [t.decode("utf-8", "replace") for t in texts[start:start + 4096]]
        for text, expected in zip(block, hf.encode_batch_fast(block)):
            got, decoded = first if done == 0 else next(answers)
            done += 1
            ids_total += len(expected.ids)
            if got != expected.ids:
                wrong += 1
                if wrong <= args.show:
                    at = next((i for i, (a, b) in enumerate(zip(got or [], expected.ids)) if a != b), -1)
                    print("  %r\n    ours %s (%d)\n    ref  %s (%d)" % (text[:80], got and got[max(at - 3, 0):at + 9],
                          len(got or []), expected.ids[max(at - 3, 0):at + 9], len(expected.ids)))
            if not decode or got is None:
                continue
            same += decoded == text
            plain = [i for i, s in zip(expected.ids, expected.special_tokens_mask) if not s] \
                if n_special else expected.ids
            if hf.decode(plain, skip_special_tokens=False) != decoded and got == expected.ids:
                wrong_text += 1
                if wrong_text <= args.show:
                    print("  decode %r\n    ours %r\n    ref  %r" % (text[:60], decoded[:60],
                          hf.decode(plain, skip_special_tokens=False)[:60]))
    print("%-34s %8d texts %6.2f MB %8d ids: %d differ, %d decode otherwise, %d decode to the text" %
          (name, done, sum(map(len, texts)) / 1e6, ids_total, wrong, wrong_text, same), flush=True)
    return wrong + wrong_text


# ---------------------------------------------------------------------------------------- variants

def variants(original):
    """(name, changes to tokenizer.json) for byte-level and for sentencepiece-style vocabularies."""
    def byte_level(prefix=False, regex=False):
        return {"type": "ByteLevel", "add_prefix_space": prefix, "trim_offsets": True, "use_regex": regex}

    def sequence(*steps):
        return {"type": "Sequence", "pretokenizers": list(steps)}

    def split(pattern, behavior="Isolated", invert=False, kind="Regex"):
        return {"type": "Split", "pattern": {kind: pattern}, "behavior": behavior, "invert": invert}

    def replace(pattern, content, kind="Regex"):
        return {"type": "Replace", "pattern": {kind: pattern}, "content": content}

    def metaspace(scheme, cut):
        return {"type": "Metaspace", "replacement": "▁", "prepend_scheme": scheme, "split": cut}

    contractions = r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|"
    patterns = {
        "cl100k": contractions + r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "cl100k+": r"'(?i:[sdmt]|ll|ve|re)|[^\r\n\p{L}\p{N}]?+\p{L}+|\p{N}{1,3}| ?[^\s\p{L}\p{N}]++[\r\n]*|\s*[\r\n]|\s+(?!\S)|\s+",
        "o200k": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+(?i:'s|'t|'re|'ve|'m|'ll|'d)?|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*(?i:'s|'t|'re|'ve|'m|'ll|'d)?|\p{N}{1,3}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "tekken": r"[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]*[\p{Ll}\p{Lm}\p{Lo}\p{M}]+|[^\r\n\p{L}\p{N}]?[\p{Lu}\p{Lt}\p{Lm}\p{Lo}\p{M}]+[\p{Ll}\p{Lm}\p{Lo}\p{M}]*|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n/]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "qwen3.5": contractions + r"[^\r\n\p{L}\p{N}]?[\p{L}\p{M}]+|\p{N}| ?[^\s\p{L}\p{M}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+",
        "bloom": r" ?[^(\s|[.,!?…。，、।۔،])]+",
        "poro": r" ?[^(\s|.,!?…。，、।۔،)]+",
        "starcoder2": r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+",
        "exaone": r"\p{N}| ?\p{L}+|[^\s\p{L}\p{N}]+|\s",
        "viking": r" ?[^(\s|.,!?…。，、।۔،)]+|\p{N}",
    }
    for name, pattern in patterns.items():
        yield "byte", "split " + name, {"pre_tokenizer": sequence(split(pattern), byte_level())}
    yield "byte", "split removed invert", {"pre_tokenizer": sequence(
        split(patterns["cl100k"], "Removed", True), byte_level())}
    for behavior in ("Isolated", "Removed", "MergedWithPrevious", "MergedWithNext", "Contiguous"):
        for invert in (False, True):
            yield "byte", "%s%s" % (behavior, " invert" if invert else ""), {"pre_tokenizer": sequence(
                split(r"\s|[,.l]", behavior, invert), byte_level())}
        yield "byte", "Punctuation " + behavior, {"pre_tokenizer": sequence(
            {"type": "Punctuation", "behavior": behavior}, byte_level(regex=True))}
    yield "byte", "falcon", {"pre_tokenizer": sequence(
        {"type": "Punctuation", "behavior": "Contiguous"}, byte_level(regex=True),
        {"type": "Digits", "individual_digits": False}, split("[0-9][0-9][0-9]"))}
    yield "byte", "starcoder", {"pre_tokenizer": sequence(
        {"type": "Digits", "individual_digits": True}, byte_level(regex=True))}
    yield "byte", "deepseek-llm", {"pre_tokenizer": sequence(
        split("[\r\n]"), split(r"\s?[A-Za-zµÀ-ÖØ-öø-ƺƼ-ƿǄ-ʓʕ-ʯͰ-ͳͶͷͻ-ͽͿΆΈ-ΊΌΎ-ΡΣ-ϵϷ-ҁҊ-ԯԱ-Ֆ]+"),
        split(r"\s?[!-/:-~！-／：-～‘-‟　-。]+"), split(r"\s+$"), split("[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True}, byte_level())}
    yield "byte", "deepseek-coder", {"pre_tokenizer": sequence(
        split("[\r\n]"), split(r"\s?\p{L}+"), split(r"\s?\p{P}+"), split("[一-龥ࠀ-一가-퟿]+"),
        {"type": "Digits", "individual_digits": True}, byte_level())}
    yield "byte", "deepseek-v3", {"pre_tokenizer": sequence(
        split(r"\p{N}{1,3}"), split("[一-龥぀-ゟ゠-ヿ]+"), split(
            r"[!\"#$%&'()*+,\-./:;<=>?@\[\\\]^_`{|}~][A-Za-z]+|[^\r\n\p{L}\p{P}\p{S}]?[\p{L}\p{M}]+|"
            r" ?[\p{P}\p{S}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"), byte_level())}
    for name in ("Whitespace", "WhitespaceSplit", "BertPreTokenizer", "UnicodeScripts"):
        yield "byte", name, {"pre_tokenizer": sequence({"type": name}, byte_level())}
    yield "byte", "CharDelimiterSplit", {"pre_tokenizer": sequence(
        {"type": "CharDelimiterSplit", "delimiter": "a"}, byte_level())}
    yield "byte", "prefix space", {"pre_tokenizer": byte_level(True, True)}
    yield "byte", "prefix space, digits", {"pre_tokenizer": sequence(
        {"type": "Digits", "individual_digits": False}, byte_level(True, True))}
    normalizers = [{"type": t} for t in ("NFC", "NFD", "NFKC", "NFKD", "Lowercase", "StripAccents", "Nmt")]
    normalizers += [{"type": "Strip", "strip_left": a, "strip_right": b} for a in (False, True) for b in (False, True)]
    normalizers += [replace(r"\s{2,}", " "), replace("l", "LL", "String"), {"type": "Prepend", "prepend": "x"},
                    {"type": "BertNormalizer", "clean_text": True, "handle_chinese_chars": True,
                     "strip_accents": None, "lowercase": True}]
    for n in normalizers:
        yield "byte", "normalizer %s" % " ".join(str(v) for v in n.values())[:40], {"normalizer": n}
    yield "byte", "NFD StripAccents Lowercase", {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFD"}, {"type": "StripAccents"}, {"type": "Lowercase"}]}}
    yield "byte", "NFKC, added tokens normalised", {"normalizer": {"type": "NFKC"}, "normalized": True}
    yield "byte", "added tokens: lstrip", {"lstrip": True}
    yield "byte", "added tokens: rstrip", {"rstrip": True}
    yield "byte", "added tokens: both", {"rstrip": True, "lstrip": True}
    yield "byte", "added tokens: single word", {"single_word": True}
    yield "byte", "RobertaProcessing", {"post_processor": {"type": "RobertaProcessing", "sep": ["!", 0],
          "cls": ["\"", 1], "trim_offsets": True, "add_prefix_space": True}}
    yield "byte", "BertProcessing", {"post_processor": {"type": "BertProcessing", "sep": ["!", 0],
          "cls": ["\"", 1]}}
    template = {"type": "TemplateProcessing", "single": [{"SpecialToken": {"id": "x", "type_id": 0}},
                {"Sequence": {"id": "A", "type_id": 0}}, {"SpecialToken": {"id": "x", "type_id": 0}}],
                "pair": [], "special_tokens": {"x": {"id": "x", "ids": [1, 2], "tokens": ["\"", "#"]}}}
    yield "byte", "Sequence of processors", {"post_processor": {"type": "Sequence", "processors": [
        byte_level(), template]}}
    for ignore in (False, True):
        yield "byte", "ignore_merges %s" % ignore, {"model.ignore_merges": ignore}
    # What transformers takes from tokenizer_config.json.
    def decoder(i, content, **more):
        return {"added_tokens_decoder": {str(i): dict({"content": content, "lstrip": False, "rstrip": False,
                "single_word": False, "normalized": False, "special": True}, **more)}}

    vocab, tokens = json.loads(original)["model"]["vocab"], json.loads(original)["added_tokens"]
    n = max([max(vocab.values()) + 1] + [t["id"] + 1 for t in tokens])
    one, two = [t for t in vocab if len(t) == 2 and t.isalpha() and t.isascii()][:2]
    fast = {"tokenizer_class": "PreTrainedTokenizerFast"}
    yield "byte", "config: prefix space off", {"pre_tokenizer": byte_level(True, True), "config": fast}
    yield "byte", "config: prefix space on", {"pre_tokenizer": byte_level(False, True),
          "config": {**fast, "add_prefix_space": True}}
    yield "byte", "config: prefix space, in sequence", {"pre_tokenizer": sequence(byte_level(True, True)),
          "config": fast}
    yield "byte", "config: one more token", {"config": {**fast, **decoder(n, "the@")}}
    yield "byte", "config: one of the vocabulary", {"config": {**fast, **decoder(vocab[one], one)}}
    yield "byte", "config: special token of the vocabulary", {"config": {**fast, "bos_token": one, "pad_token": two}}
    yield "byte", "config: other flags", {"config": {**fast, **decoder(tokens[0]["id"], tokens[0]["content"], lstrip=True)}}
    for name, style, bos, eos in (("LlamaTokenizer", "spm", "<s>", "</s>"), ("GPTNeoXTokenizer", "byte", one, two)):
        for flags in ({}, {"add_bos_token": False}, {"add_bos_token": True, "add_eos_token": True}):
            yield style, "config: %s %s" % (name, " ".join("%s" % v for v in flags.values())), {"config": {
                "tokenizer_class": name, "bos_token": bos, "eos_token": eos, "unk_token": "<unk>" if style == "spm" else bos, **flags}}
    for scheme in ("first", "always", "never"):
        for split_it in (False, True):
            yield "spm", "Metaspace %s %s" % (scheme, split_it), {
                "normalizer": None, "pre_tokenizer": metaspace(scheme, split_it), "decoder": metaspace(scheme, split_it)}
    yield "spm", "gemma", {"normalizer": replace(" ", "▁", "String"),
                           "pre_tokenizer": split(" ", "MergedWithPrevious", False, "String"),
                           "decoder": {"type": "Sequence", "decoders": [replace("▁", " ", "String"),
                                       {"type": "ByteFallback"}, {"type": "Fuse"}]}}
    yield "spm", "digits", {"pre_tokenizer": {"type": "Digits", "individual_digits": True}}
    yield "spm", "yi", {"normalizer": {"type": "Sequence", "normalizers": [replace(" ", "▁", "String")]}}
    yield "spm", "NFKC first", {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "NFKC"}, {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁", "String")]}}
    yield "spm", "Strip and runs", {"normalizer": {"type": "Sequence", "normalizers": [
        {"type": "Strip", "strip_left": True, "strip_right": True}, replace(" {2,}", "▁"),
        {"type": "Prepend", "prepend": "▁"}, replace(" ", "▁", "String")]}}
    yield "spm", "no byte_fallback, fuse_unk", {"model.byte_fallback": False, "model.fuse_unk": True}
    yield "spm", "no byte_fallback", {"model.byte_fallback": False, "model.fuse_unk": False}
    yield "spm", "no unk", {"model.byte_fallback": False, "model.unk_token": None}
    yield "spm", "ignore_merges", {"model.ignore_merges": True}
    yield "spm", "rstrip", {"rstrip": True}
    yield "spm", "normalized added tokens", {"normalized": True}


def style_of(original):
    return "spm" if "<0x0A>" in json.loads(original)["model"]["vocab"] else "byte"


def write_variant(place, original, changes):
    """Writes the changed tokenizer.json, and tokenizer_config.json where the variant has one."""
    t = json.loads(original)
    for key, value in changes.items():
        if key in ("lstrip", "rstrip", "single_word", "normalized"):
            for token in t["added_tokens"]:
                token[key] = value
        elif key.startswith("model."):
            t["model"][key[6:]] = value
        elif key != "config":
            t[key] = value
    with open(os.path.join(place, "tokenizer.json"), "w", encoding="utf-8") as f:
        json.dump(t, f, ensure_ascii=False)
    if "config" in changes:
        with open(os.path.join(place, "tokenizer_config.json"), "w", encoding="utf-8") as f:
            json.dump(changes["config"], f)


def compare_variants(directory, args):
    with open(os.path.join(directory, "tokenizer.json"), encoding="utf-8") as f:
        original = f.read()
    wrong = 0
    for style, name, changes in variants(original):
        if style == style_of(original) and args.only in name:
            with tempfile.TemporaryDirectory() as place:
                write_variant(place, original, changes)
                wrong += compare("  " + name, place, args)
    return wrong


# ----------------------------------------------------------------------------------------- vectors

def compare_vectors(directory, args):
    """Vectors of llama.cpp (without special tokens) and tokenizers.js (with) for known directories."""
    tokenizer_of = {"gpt-2": "gpt2", "llama-spm": "llama-2", "llama-bpe": "llama-3", "qwen2": "qwen2.5-0.5b-instruct",
                    "phi-2": "phi-2", "Xenova/gpt2": "gpt2", "openai-community/gpt2": "gpt2",
                    "Xenova/Qwen1.5-0.5B-Chat": "qwen2.5-0.5b-instruct",
                    "Xenova/llama-tokenizer": "llama-2", "Xenova/llama3-tokenizer-new": "llama-3"}
    wrong = 0
    for path in sorted(glob.glob(os.path.join(directory, "*", "*"))):
        name = os.path.basename(path)
        cases = []                                    # (model, text, ids)
        if path.endswith(".inp"):
            key = name[len("ggml-vocab-"):-len(".gguf.inp")]
            with open(path, encoding="utf-8", newline="") as f, open(path[:-3] + "out") as g:
                cases = [(key, text, [int(x) for x in line.split()]) for text, line in
                         zip(f.read().split("\n__ggml_vocab_test__\n"), g)]
        elif path.endswith(".json"):
            with open(path, encoding="utf-8") as f:
                cases = [(key, c["text"], c["ids"]) for key, model in json.load(f).items() for c in model.values()]
        for key in sorted({key for key, _, _ in cases}):
            own = [(text, ids) for k, text, ids in cases if k == key]
            place = os.path.join(args.tokenizers, tokenizer_of.get(key, key))
            title = "%s %s" % (os.path.relpath(path, directory), key if path.endswith(".json") else "")
            if not os.path.isdir(place):
                print("%-60s %3d cases of a vocabulary that is not here" % (title, len(own)))
                continue
            added = reference(place).num_special_tokens_to_add(False) if path.endswith(".inp") else 0
            passed = 0
            for (text, ids), (got, _) in zip(own, ours(place, [text.encode() for text, _ in own])):
                passed += got[added:] == ids
                if got[added:] != ids:
                    print("  %r\n    ours     %s\n    recorded %s" % (text[:100], got[:20], ids[:20]))
            print("%-60s %3d tried, %3d passed" % (title, len(own), passed))
            wrong += len(own) - passed
    return wrong


def main():
    p = argparse.ArgumentParser()
    p.add_argument("directories", nargs="*")
    p.add_argument("--code-points", action="store_true")
    p.add_argument("--variants", action="store_true")
    p.add_argument("--only", default="")
    p.add_argument("--vectors")
    p.add_argument("--tokenizers", default=os.path.join(root, "../shared/real/tokenizers"))
    p.add_argument("--mb", type=float, default=1.2)
    p.add_argument("--seed", type=int, default=1)
    p.add_argument("--show", type=int, default=3)
    p.add_argument("--text", nargs="*", default=None)
    args = p.parse_args()
    data = os.path.join(root, "../shared/real/datasets")
    if args.text is None:
        args.text = [os.path.join(root, "qlora.c"), os.path.join(data, "huanhuan/huanhuan.jsonl"),
                     os.path.join(data, "lawyer-llama/legal_counsel_with_article_v2.json"),
                     os.path.join(data, "gsm8k/test.jsonl"), os.path.join(data, "llama-factory/alpaca_zh_demo.json")]
        args.text = [t for t in args.text if os.path.exists(t)]
    wrong = compare_vectors(args.vectors, args) if args.vectors else 0
    for d in args.directories:
        if args.variants:
            print(d)
        wrong += compare_variants(d, args) if args.variants else compare(os.path.basename(d.rstrip("/")), d, args)
    sys.exit(1 if wrong else 0)


if __name__ == "__main__":
    main()
