#!/usr/bin/env python3
"""The training step and the decoding of bench_gpu.cu in transformers + peft, for comparison.

    python3 test/bench/peer_gpu.py [--quant nf4|none] [--device cuda|cpu] [CONFIG_DIRECTORY ...]

A CONFIG_DIRECTORY holds a config.json; bench_gpu leaves one for each model in build/bench-gpu/*-config,
the default. Weights are random. The step: 4 x 2048 tokens, every one supervised, LoRA r 16 alpha 32 on
all linears of the layers, bf16, AdamW on the adapter alone, clipping at 1. Prints tokens/s (median of 8
steps after 3) and peak memory, without and with gradient checkpointing, then greedy decode tokens/s.
nf4 needs bitsandbytes; where it cannot be imported the base stays in bf16, and the line says so.
What does not fit into memory is reported and passed over.
"""
import argparse
import gc
import glob
import json
import statistics
import time

import peft
import torch
import transformers

try:
    import bitsandbytes
except Exception:  # a broken installation fails in many ways
    bitsandbytes = None

TARGETS = ["q_proj", "k_proj", "v_proj", "o_proj", "gate_proj", "up_proj", "down_proj"]


def to_nf4(module):
    """Every linear of the layers becomes bitsandbytes' NF4 with double quantisation."""
    for name, child in module.named_children():
        if isinstance(child, torch.nn.Linear) and name in TARGETS:
            new = bitsandbytes.nn.Linear4bit(child.in_features, child.out_features,
                                             bias=child.bias is not None, quant_type="nf4",
                                             compute_dtype=torch.bfloat16, compress_statistics=True)
            new.weight = bitsandbytes.nn.Params4bit(child.weight.data.cpu(), requires_grad=False,
                                                    quant_type="nf4", compress_statistics=True)
            if child.bias is not None:
                new.bias = torch.nn.Parameter(child.bias.data, requires_grad=False)
            setattr(module, name, new.to("cuda"))
        else:
            to_nf4(child)


def make_model(directory, args, quantised):
    config = transformers.AutoConfig.from_pretrained(directory)
    torch.manual_seed(1)
    torch.set_default_dtype(torch.bfloat16)
    with torch.device(args.device):
        try:
            model = transformers.AutoModelForCausalLM.from_config(config,
                                                                  attn_implementation="sdpa")
        finally:
            torch.set_default_dtype(torch.float32)
    if quantised:
        to_nf4(model)
    model.requires_grad_(False)
    adapter = peft.LoraConfig(r=16, lora_alpha=32, lora_dropout=0, target_modules=TARGETS,
                              task_type="CAUSAL_LM")
    return peft.get_peft_model(model, adapter), config


def synchronise(args):
    if args.device == "cuda":
        torch.cuda.synchronize()


def peak(args):
    return torch.cuda.max_memory_allocated() / 1e9 if args.device == "cuda" else 0


def train(model, config, args, checkpointing):
    """Tokens per second and peak memory in GB of the training step."""
    if args.device == "cuda":
        torch.cuda.empty_cache()
        torch.cuda.reset_peak_memory_stats()
    model.train()
    if checkpointing:
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    else:
        model.gradient_checkpointing_disable()
    learnt = [p for p in model.parameters() if p.requires_grad]
    for p in learnt:
        p.data = p.data.float()
    optimiser = torch.optim.AdamW(learnt, lr=2e-4, weight_decay=0)
    seconds = []
    for step in range(args.steps + 3):
        ids = torch.randint(0, config.vocab_size, (args.batch, args.length), device=args.device)
        synchronise(args)
        start = time.perf_counter()
        with torch.autocast(args.device, dtype=torch.bfloat16):
            loss = model(input_ids=ids, labels=ids, use_cache=False).loss
        loss.backward()
        torch.nn.utils.clip_grad_norm_(learnt, 1.0)
        optimiser.step()
        optimiser.zero_grad(set_to_none=True)
        synchronise(args)
        if step >= 3:
            seconds.append(time.perf_counter() - start)
    return args.batch * args.length / statistics.median(seconds), peak(args)


@torch.no_grad()
def decode(model, config, args):
    """Greedy tokens per second after a prompt of 16, the prompt's own time taken off."""
    model.eval()
    model.gradient_checkpointing_disable()
    ids = torch.arange(10, 26, device=args.device)[None] % config.vocab_size

    def generate(n):
        synchronise(args)
        start = time.perf_counter()
        model.generate(input_ids=ids, attention_mask=torch.ones_like(ids), max_new_tokens=n,
                       min_new_tokens=n, do_sample=False, pad_token_id=0)
        synchronise(args)
        return time.perf_counter() - start

    generate(4)
    return args.tokens / statistics.median(generate(args.tokens + 16) - generate(16)
                                           for _ in range(3))


def main():
    parser = argparse.ArgumentParser()
    parser.add_argument("--quant", choices=["nf4", "none"], default="nf4")
    parser.add_argument("--device", default="cuda")
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--length", type=int, default=2048)
    parser.add_argument("--steps", type=int, default=8)
    parser.add_argument("--tokens", type=int, default=128)
    parser.add_argument("config", nargs="*", default=sorted(glob.glob("build/bench-gpu/*-config")))
    args = parser.parse_args()
    quantised = args.quant == "nf4" and bitsandbytes is not None and args.device == "cuda"
    base = "nf4" if quantised else "bf16"
    if args.quant == "nf4" and not quantised:
        print("bitsandbytes cannot be used here: the base stays in bf16")
    print(f"torch {torch.__version__}, transformers {transformers.__version__}, peft "
          f"{peft.__version__}, bitsandbytes {getattr(bitsandbytes, '__version__', 'none')}, "
          f"{torch.cuda.get_device_name() if args.device == 'cuda' else 'CPU'}")
    for directory in args.config:
        name = directory.rstrip("/").split("/")[-1].removesuffix("-config")
        try:
            model, config = make_model(directory, args, quantised)
        except torch.OutOfMemoryError:
            print(f"{name}: does not fit into memory")
            continue
        for checkpointing in (False, True):
            result = {"model": name, "base": base, "recompute": checkpointing}
            try:
                rate, memory = train(model, config, args, checkpointing)
                result.update(train_tokens_per_s=round(rate, 1), peak_gb=round(memory, 2))
            except torch.OutOfMemoryError:
                result.update(train_tokens_per_s=None, peak_gb=None)
            print(json.dumps(result), flush=True)
        rate = decode(model, config, args)
        print(json.dumps({"model": name, "base": base, "decode_tokens_per_s": round(rate, 1)}),
              flush=True)
        del model
        gc.collect()
        if args.device == "cuda":
            torch.cuda.empty_cache()


if __name__ == "__main__":
    main()
