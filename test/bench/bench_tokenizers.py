#!/usr/bin/env python3
"""MB of text per second of CPU time that Hugging Face's tokenizers encode, on one thread: the text and
the directories of bench_text.c, in the same run of `make bench`."""
import os, sys, time

os.environ["TOKENIZERS_PARALLELISM"] = "false"
os.environ["RAYON_NUM_THREADS"] = "1"
import tokenizers

real = "../shared/real/tokenizers/"
names = [real + n for n in ("qwen2.5-0.5b-instruct", "llama-3", "gpt2", "llama-2", "mistral-7b-v0.1")]
small = ["test/fixtures/tokenizers/byte", "test/fixtures/tokenizers/spm"]
with open(sys.argv[1], encoding="utf-8", errors="replace", newline="") as f:
    text = f.read()
size = len(text.encode())
print("Hugging Face tokenizers", tokenizers.__version__)
for directory in names if os.path.exists(names[0]) else small:
    t = tokenizers.Tokenizer.from_file(os.path.join(directory, "tokenizer.json"))
    t.no_truncation()
    t.no_padding()
    for label, piece in (("4,000 characters at a time", 4000), ("400 characters at a time", 400)):
        best = 1e9
        for _ in range(2):
            start, ids = time.process_time(), 0
            for at in range(0, len(text), piece):
                ids += len(t.encode(text[at:at + piece], add_special_tokens=False).ids)
            best = min(best, time.process_time() - start)
        print("%-50s %s: %6.1f MB/s  %9d ids" % (directory, label, size * 1e-6 / best, ids), flush=True)
