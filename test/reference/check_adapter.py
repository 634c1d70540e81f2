#!/usr/bin/env python3
"""Compares logits written by qlora.c with those of transformers + peft for the same adapter.

usage: check_adapter.py MODEL_DIR ADAPTER_DIR LOGITS.safetensors IDS [--quant Q] [--tol T]

IDS is a comma-separated list of token ids; LOGITS.safetensors holds them run as one sequence in
a float tensor "logits" of shape [ids, vocab].  ADAPTER_DIR "-" means the model alone (to check a
merged one).  The base is loaded in float32; with --quant nf4 or nf4dq its linears, except lm_head
and Mixtral's router, are replaced by bitsandbytes' 4-bit approximation of them.
Exit status: 0 if max|a-b| / max|b| <= T, else 1.
"""

import argparse
import sys
from pathlib import Path

import make_fixtures as reference  # first: it fixes the threading before torch is loaded
import peft
import torch
from safetensors.torch import load_file


def main():
    usage, details = __doc__.split("\n\n", 1)
    parser = argparse.ArgumentParser(
        description=usage, epilog=details, formatter_class=argparse.RawTextHelpFormatter)
    parser.add_argument("model", type=Path)
    parser.add_argument("adapter")
    parser.add_argument("logits", type=Path)
    parser.add_argument("ids", type=lambda text: [int(part) for part in text.split(",")])
    parser.add_argument("--quant", choices=reference.QUANTS, default="none")
    parser.add_argument("--tol", type=float, default=1e-5)
    args = parser.parse_args()

    model = reference.load_base(args.model)
    reference.quantise_linears(model, args.quant)
    if args.adapter != "-":
        model = peft.PeftModel.from_pretrained(model, args.adapter).eval()
    with torch.no_grad():
        expected = reference.logits_of(model, args.ids)

    actual = load_file(args.logits)["logits"].float()
    if actual.shape != expected.shape:
        sys.exit(f"shape {list(actual.shape)}, expected {list(expected.shape)}")
    error = reference.relative_error(actual, expected)
    print(f"max|a-b|/max|b| = {error:.3e} (tolerance {args.tol:g})")
    return 0 if error <= args.tol else 1  # false for NaN, so that fails


if __name__ == "__main__":
    sys.exit(main())
