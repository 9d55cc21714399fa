# SPDX-License-Identifier: Apache-2.0
"""What an active LoRA costs on the CPU: forwards with and without it, on a ternary, a float32 and a bfloat16 base.

    python integration_tests/benchmarks/bench_lora_cpu.py           # the best kernel of this machine
    python integration_tests/benchmarks/bench_lora_cpu.py --avx2    # everything limited to AVX2

Two blocks of PixArt-XL at 1,024 tokens, an adapter of rank 16 on every linear layer of the blocks, one thread,
thread-CPU time, minimum of 9 interleaved rounds (bfloat16: 2). The output with the adapter is checked against the
dequantized model with the same adapter. Results go to results/lora_cpu_<set>.csv.
"""

import argparse
import copy
import csv
import functools
import warnings

import torch
from bench_transformer_cpu import RESULTS, ROUNDS, SLOW_ROUNDS, TOLERANCE, forward, pixart, ternary
from cpu_timing import interleaved, processor, restart_limited_to_avx2
from peft import LoraConfig, inject_adapter_in_model
from torch import nn

import diffusers_ternary
from diffusers_ternary.backend.dequantize import dequantize_layers
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.cpu import native
from diffusers_ternary.kernels.cpu import prepared as cpu_call
from diffusers_ternary.kernels.cpu import products as cpu_linear


RANK = 16
GROUP = 128
TARGETS = ["to_q", "to_k", "to_v", "to_out.0", "ff.net.0.proj", "ff.net.2"]


def with_adapter(model: nn.Module) -> nn.Module:
    """A copy with an active adapter; the same one for every base."""
    config = LoraConfig(r=RANK, lora_alpha=RANK, target_modules=TARGETS)
    adapted = inject_adapter_in_model(config, copy.deepcopy(model))
    generator = torch.Generator().manual_seed(0)
    for name, parameter in adapted.named_parameters():
        if "lora_" in name:
            noise = torch.randn(parameter.shape, generator=generator) / parameter.shape[1] ** 0.5
            parameter.data = (0.6 * noise).to(parameter)
    return adapted.requires_grad_(False)


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="limit torch, MKL, oneDNN and the kernel to AVX2")
    if parser.parse_args().avx2:
        restart_limited_to_avx2()
        cpu_linear.load = cpu_call.load = functools.partial(native.load, "avx2")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    model, inputs = pixart()
    model.eval().requires_grad_(False)
    packed = ternary(model, GROUP, convolutions=True)
    dense = with_adapter(packed)
    dequantize_layers(dense)
    adapted = with_adapter(packed)
    expected = forward(dense, inputs, torch.float32)()
    error = (forward(adapted, inputs, torch.float32)() - expected).norm() / expected.norm()
    effect = (expected - forward(packed, inputs, torch.float32)()).norm() / expected.norm()
    if not error < min(TOLERANCE, 0.2 * effect):
        raise SystemExit(f"relative error {error:.2g}, effect of the adapter {effect:.2g}; no figure.")
    bases = {"ternary": (packed, torch.float32), "float32": (model, torch.float32)}
    half = {"bfloat16": (copy.deepcopy(model).bfloat16(), torch.bfloat16)}
    machine = {
        "kernel": cpu.kernel_name(),
        "processor": processor(),
        "torch": torch.__version__,
        "torch instructions": torch.backends.cpu.get_cpu_capability(),
        "diffusers-ternary": diffusers_ternary.__version__,
    }
    print(machine)
    table = []
    for part, rounds in ((bases, ROUNDS), (half, SLOW_ROUNDS)):
        calls = {}
        for name, (base, dtype) in part.items():
            calls[name] = forward(base, inputs, dtype)
            calls[f"{name}, adapter"] = forward(with_adapter(base), inputs, dtype)
        seconds = interleaved(calls, rounds)
        for name in part:
            cost = seconds[f"{name}, adapter"] / seconds[name] - 1
            row = {
                "base": name,
                "milliseconds": round(1e3 * seconds[name], 2),
                "with an adapter": round(1e3 * seconds[f"{name}, adapter"], 2),
                "cost in percent": round(100 * cost, 1),
            }
            table.append({**row, "rank": RANK, **machine})
            print(f"{name:<10} {row['milliseconds']:>9} ms, {row['with an adapter']:>9} with it: {100 * cost:+.1f} %")
    RESULTS.mkdir(exist_ok=True)
    with open(RESULTS / f"lora_cpu_{machine['kernel']}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
