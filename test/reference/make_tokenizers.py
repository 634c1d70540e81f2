#!/usr/bin/env python3
"""Writes test/fixtures/tokenizers/variants.json, vocab_merges/ and sentencepiece/.

    make_tokenizers.py [--out DIR]        with the packages of requirements.txt and sentencepiece

variants.json: what check_tokenizers.py puts around a vocabulary, here around those of the fixtures
byte and spm. A list of {base, name, changes, texts: [[text, ids, decoded], ...]}; no texts where the
variant is refused by qlora.c. `changes` are members of tokenizer.json ("model.x" of its model;
flags of its added tokens) and "config", the tokenizer_config.json. ids are with what the
post-processor adds, decoded is without.

vocab_merges: the vocabulary of byte as vocab.json and merges.txt, ids by transformers.
sentencepiece: a tokenizer.model trained on made-up text by the library, ids by the library.
"""
import argparse, json, os, random, tempfile

import check_tokenizers as check
import sentencepiece

REFUSED = ("Whitespace", "BertPreTokenizer", "UnicodeScripts", "CharDelimiterSplit", "Lowercase",
           "StripAccents", "Nmt", "BertNormalizer")
# tokenizers counts punctuation by an older Unicode; these texts have none that is newer.
TEXTS = ["Hello, world! It's 12345 o'clock...", "  two  spaces \n\n\t tab\r\n", "don't I'LL we\u017fve",
         "\u4f60\u597d\uff0c\u4e16\u754c\u3002\u65e5\u672c\u8a9e \ud55c\uad6d\uc5b4", "e\u0301\u0323 \u212b \ufb01 \u2460 x\u00b2 \uff21\uff22 \u1e9b\u0323",
         "\U0001f469\u200d\U0001f4bb \U0001f1e9\U0001f1ea \u2764\ufe0f", "a<|im_start|> b <|im_end|>\n<s>x</s> <unk>", "", " ",
         "\u2581x \u2581\u2581 y", "\x00\x7f\u0085\u00a0\u3000\u2028\ufffd", "(x+1)*[y]{z} #!/bin/sh --a_b", "aaaaaaaaaaaaaaaaaaaaaaaaaaaa"]


def results(hf, texts):
    """[text, ids, decoded] of each."""
    n = hf.num_special_tokens_to_add(False)
    out = []
    for text, e in zip(texts, hf.encode_batch_fast(texts)):
        plain = [i for i, s in zip(e.ids, e.special_tokens_mask) if not s] if n else e.ids
        out.append([text, e.ids, hf.decode(plain, skip_special_tokens=False)])
    return out


def write(path, value):
    os.makedirs(os.path.dirname(path), exist_ok=True)
    with open(path, "w", encoding="utf-8") as f:
        f.write(value if isinstance(value, str) else json.dumps(value, ensure_ascii=False, separators=(",", ":")) + "\n")


def make_variants(out):
    rows = []
    for base in ("byte", "spm"):
        with open(os.path.join(out, base, "tokenizer.json"), encoding="utf-8") as f:
            original = f.read()
        for style, name, changes in check.variants(original):
            if style != check.style_of(original):
                continue
            refused = any(word in json.dumps(changes) for word in ['"%s"' % w for w in REFUSED])
            with tempfile.TemporaryDirectory() as place:
                check.write_variant(place, original, changes)
                texts = [] if refused else results(check.reference(place), TEXTS)
            rows.append({"base": base, "name": name, "changes": changes, "texts": texts})
    write(os.path.join(out, "variants.json"),
          "[\n" + ",\n".join(json.dumps(r, ensure_ascii=False, separators=(",", ":")) for r in rows) + "\n]\n")


def as_ids(rows, n):
    return [{"text": text, "ids": ids, "ids_plain": ids[n:], "decoded": decoded} for text, ids, decoded in rows]


def make_texts():
    r = random.Random(5)
    return TEXTS + [check.generated(r, [])[:26] for _ in range(92)]


def make_vocab_merges(out):
    with open(os.path.join(out, "byte", "tokenizer.json"), encoding="utf-8") as f:
        t = json.load(f)
    with open(os.path.join(out, "byte", "tokenizer_config.json"), encoding="utf-8") as f:
        config = json.load(f)
    config["tokenizer_class"] = "Qwen2Tokenizer"
    place = os.path.join(out, "vocab_merges")
    write(os.path.join(place, "vocab.json"), t["model"]["vocab"])
    write(os.path.join(place, "merges.txt"), "#version: 0.2\n" + "\n".join(
        m if isinstance(m, str) else " ".join(m) for m in t["model"]["merges"]) + "\n")
    write(os.path.join(place, "tokenizer_config.json"), config)
    hf = check.AutoTokenizer.from_pretrained(place)._tokenizer
    write(os.path.join(place, "ids.json"), as_ids(results(hf, make_texts()), 0))


def make_sentencepiece(out):
    r = random.Random(7)
    syllables = ["ka", "to", "re", "mi", "lu", "sen", "dor", "the", "in", "er", "\u4e2d", "\u6587", "1", "20"]
    place = os.path.join(out, "sentencepiece")
    os.makedirs(place, exist_ok=True)
    with tempfile.TemporaryDirectory() as folder:
        text = os.path.join(folder, "text")
        with open(text, "w", encoding="utf-8") as f:
            for _ in range(2000):
                f.write(" ".join("".join(r.choice(syllables) for _ in range(r.randrange(1, 4))) for _ in range(8)) + "\n")
        sentencepiece.SentencePieceTrainer.train(
            input=text, model_prefix=os.path.join(folder, "m"), vocab_size=480, model_type="bpe", byte_fallback=True,
            normalization_rule_name="identity", remove_extra_whitespaces=False, user_defined_symbols=["<sep>"],
            minloglevel=2)
        with open(os.path.join(folder, "m.model"), "rb") as f, open(os.path.join(place, "tokenizer.model"), "wb") as g:
            g.write(f.read())
    write(os.path.join(place, "tokenizer_config.json"), {"tokenizer_class": "LlamaTokenizer", "legacy": True})
    hf = check.Sentencepiece(os.path.join(place, "tokenizer.model"))
    texts = [t for t in make_texts() if "<s>" not in t and "\0" not in t] + ["a<sep> b<sep><sep>", "kato  remi \u4e2d\u6587"]
    write(os.path.join(place, "ids.json"), as_ids(results(hf, texts), 1))


def main():
    p = argparse.ArgumentParser()
    p.add_argument("--out", default=os.path.join(check.root, "test/fixtures/tokenizers"))
    out = p.parse_args().out
    make_variants(out)
    make_vocab_merges(out)
    make_sentencepiece(out)


if __name__ == "__main__":
    main()
