#!/usr/bin/env python3
"""Train data/tiny, the small base model of the tests and tutorials, from nothing.

    python data/make_tiny.py [--output data/tiny] [--steps N]

Text from make_text.py, a byte-level BPE tokenizer learnt on it, a Qwen2 of 2.5 million parameters,
AdamW with a cosine schedule: a plain language model, which has never seen a chat.

Took 19 minutes on two cores with AVX-512 bf16 while other programs ran on them, with Python 3.11,
torch 2.9.1, transformers 4.57.6, tokenizers 0.22.2. Seeds and algorithms are fixed: short runs
repeated on one machine gave the same bytes; another processor or version gives a model like it.
"""
import argparse
import json
import math
import pathlib
import shutil
import time

import numpy
import torch
from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers
from tokenizers import pre_tokenizers, processors, trainers
from transformers import Qwen2Config, Qwen2ForCausalLM

import make_text

SEED = 1
VOCABULARY = 2560
SPECIAL = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
CHARACTERS = 12_000_000
CONTEXT, BATCH = 256, 8
PEAK_RATE, LAST_RATE, WARMUP = 3e-3, 1e-4, 50

# Qwen2's own way to cut text into words, before byte pairs are merged inside each of them.
WORDS = (r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*"
         r"|\s*[\r\n]+|\s+(?!\S)|\s+")
CHATML = ("{% for message in messages %}{{ '<|im_start|>' + message['role'] + '\n' + "
          "message['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
          "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")


def make_tokenizer(texts):
    tokenizer = Tokenizer(models.BPE())
    tokenizer.normalizer = normalizers.NFC()
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence([
        pre_tokenizers.Split(Regex(WORDS), behavior="isolated"),
        pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.post_processor = processors.ByteLevel(trim_offsets=False)
    tokenizer.train_from_iterator(texts, trainers.BpeTrainer(
        vocab_size=VOCABULARY - len(SPECIAL), show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    tokenizer.add_special_tokens([AddedToken(text, normalized=False) for text in SPECIAL])
    return tokenizer


def write_json(path, value):
    path.write_text(json.dumps(value, indent=2, ensure_ascii=False) + "\n", encoding="utf-8")


def save_tokenizer(tokenizer, output):
    tokenizer.save(str(output / "tokenizer.json"))
    flags = {"lstrip": False, "normalized": False, "rstrip": False, "single_word": False}
    write_json(output / "tokenizer_config.json", {
        "add_bos_token": False,
        "add_prefix_space": False,
        "added_tokens_decoder": {str(tokenizer.token_to_id(text)):
                                 {"content": text} | flags | {"special": True}
                                 for text in SPECIAL},
        "bos_token": None,
        "chat_template": CHATML,
        "clean_up_tokenization_spaces": False,
        "eos_token": "<|endoftext|>",
        "errors": "replace",
        "model_max_length": 2048,
        "pad_token": "<|endoftext|>",
        "tokenizer_class": "Qwen2Tokenizer",
        "unk_token": None})


def make_model(tokenizer, unseen):
    torch.manual_seed(SEED)
    model = Qwen2ForCausalLM(Qwen2Config(
        vocab_size=tokenizer.get_vocab_size(), hidden_size=192, intermediate_size=512,
        num_hidden_layers=5, num_attention_heads=6, num_key_value_heads=2,
        max_position_embeddings=2048, rope_theta=10000.0, rms_norm_eps=1e-6,
        tie_word_embeddings=True, use_sliding_window=False, bos_token_id=None,
        eos_token_id=tokenizer.token_to_id("<|endoftext|>")))
    # A row of the (tied) output matrix bounds its token's logit by its own length. These two will
    # not grow in training, so they start about as long as the others end, or no adapter could
    # ever make the model sure of its end token.
    with torch.no_grad():
        model.model.embed_tokens.weight[unseen] *= 5
    return model


def rate(step, steps):
    if step < WARMUP:
        return PEAK_RATE * (step + 1) / WARMUP
    done = (step - WARMUP) / max(1, steps - WARMUP)
    return LAST_RATE + (PEAK_RATE - LAST_RATE) * 0.5 * (1 + math.cos(math.pi * done))


def train(model, ids, unseen, steps):
    matrices = [p for p in model.parameters() if p.dim() == 2]
    vectors = [p for p in model.parameters() if p.dim() == 1]
    optimizer = torch.optim.AdamW([{"params": matrices, "weight_decay": 0.05},
                                   {"params": vectors, "weight_decay": 0.0}], betas=(0.9, 0.95))
    pick = numpy.random.default_rng(SEED)
    started, mean = time.time(), None
    for step in range(steps):
        places = pick.integers(0, len(ids) - CONTEXT - 1, BATCH)
        batch = torch.from_numpy(numpy.stack([ids[p:p + CONTEXT + 1] for p in places]))
        with torch.autocast("cpu", dtype=torch.bfloat16):
            logits = model(input_ids=batch[:, :-1]).logits.float()
        loss = torch.nn.functional.cross_entropy(logits.flatten(0, 1), batch[:, 1:].flatten())
        optimizer.zero_grad()
        loss.backward()
        # The chat tokens never occur. Left alone, both would only be pushed down, in the same
        # direction, until no adapter could tell them apart; so they stay where they started.
        model.model.embed_tokens.weight.grad[unseen] = 0
        torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        for group in optimizer.param_groups:
            group["lr"] = rate(step, steps)
        optimizer.step()
        mean = loss.item() if mean is None else 0.95 * mean + 0.05 * loss.item()
        if step % 50 == 0 or step == steps - 1:
            print(f"step {step:5d}  loss {mean:.3f}  {time.time() - started:5.0f} s", flush=True)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    here = pathlib.Path(__file__).parent
    parser.add_argument("--output", type=pathlib.Path, default=here / "tiny")
    parser.add_argument("--steps", type=int, default=2400)
    options = parser.parse_args()
    torch.set_num_threads(2)
    torch.use_deterministic_algorithms(True)

    texts = list(make_text.documents(CHARACTERS, SEED))
    tokenizer = make_tokenizer(texts)
    end, *unseen = (tokenizer.token_to_id(text) for text in SPECIAL)
    ids = numpy.concatenate([numpy.array(coded.ids + [end], dtype=numpy.int64)
                             for coded in tokenizer.encode_batch(texts)])
    model = make_model(tokenizer, unseen)
    print(f"{len(texts)} documents, {len(ids)} tokens, {tokenizer.get_vocab_size()} entries, "
          f"{model.num_parameters()} parameters", flush=True)
    train(model, ids, unseen, options.steps)

    shutil.rmtree(options.output, ignore_errors=True)
    model.to(torch.bfloat16).save_pretrained(options.output)
    save_tokenizer(tokenizer, options.output)
    write_json(options.output / "generation_config.json", {
        "eos_token_id": [tokenizer.token_to_id("<|im_end|>"), end], "pad_token_id": end})


if __name__ == "__main__":
    main()
