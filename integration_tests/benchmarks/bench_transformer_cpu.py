# SPDX-License-Identifier: Apache-2.0
"""Block stacks of diffusion transformers on the CPU, at 1,024 image tokens: float32, bfloat16, and ternary linears.

    python integration_tests/benchmarks/bench_transformer_cpu.py           # the best kernel of this machine
    python integration_tests/benchmarks/bench_transformer_cpu.py --avx2    # everything limited to AVX2

Two blocks of each model with random weights (of FLUX.1, a double and a single one), whole forward (attention, norms
and embeddings included), one thread, thread-CPU time, minimum of 9 interleaved rounds (bfloat16: 2 where the CPU has
no instructions for it). The ternary output is checked against the float32 model with the same dequantized weights.
Results go to results/transformer_cpu_<set>.csv; `--models` leaves the rows of other models as they are.
"""

import argparse
import copy
import csv
import functools
import warnings
from collections.abc import Callable
from pathlib import Path

import torch
from cpu_timing import interleaved, processor, restart_limited_to_avx2
from diffusers import FluxTransformer2DModel, PixArtTransformer2DModel, SanaTransformer2DModel
from torch import nn

import diffusers_ternary
from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend.dequantize import dequantize_layers as dense_layers
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.cpu import native
from diffusers_ternary.kernels.cpu import prepared as cpu_call
from diffusers_ternary.kernels.cpu import products as cpu_linear


RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
SLOW_ROUNDS = 2  # bfloat16 takes seconds per call where the CPU has no instructions for it
LAYERS = 2
GROUP = 128
TOLERANCE = 0.05  # of the output, from int8 activations


def pixart() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = PixArtTransformer2DModel(
        num_attention_heads=16, attention_head_dim=72, num_layers=LAYERS, sample_size=64, caption_channels=4096
    )
    inputs = {
        "hidden_states": torch.randn(1, 4, 64, 64),  # 32 x 32 tokens
        "encoder_hidden_states": torch.randn(1, 120, 4096),
        "timestep": torch.tensor([500]),
        "added_cond_kwargs": {"resolution": None, "aspect_ratio": None},
    }
    return model, inputs


def sana() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = SanaTransformer2DModel(
        num_attention_heads=70,
        attention_head_dim=32,
        num_cross_attention_heads=20,
        cross_attention_head_dim=112,
        cross_attention_dim=2240,
        num_layers=LAYERS,
        sample_size=32,
        caption_channels=2304,
    )
    inputs = {
        "hidden_states": torch.randn(1, 32, 32, 32),  # 32 x 32 tokens
        "encoder_hidden_states": torch.randn(1, 300, 2304),
        "timestep": torch.tensor([500]),
    }
    return model, inputs


def flux() -> tuple[nn.Module, dict[str, torch.Tensor]]:
    model = FluxTransformer2DModel(num_layers=1, num_single_layers=1)
    inputs = {
        "hidden_states": torch.randn(1, 1024, 64),
        "encoder_hidden_states": torch.randn(1, 512, 4096),
        "pooled_projections": torch.randn(1, 768),
        "timestep": torch.tensor([0.5]),
        "img_ids": torch.cartesian_prod(torch.zeros(1), torch.arange(32.0), torch.arange(32.0)),
        "txt_ids": torch.zeros(512, 3),
    }
    return model, inputs


MODELS = {"PixArt-XL": pixart, "SANA-1.6B": sana, "FLUX.1": flux}


def ternary(model: nn.Module, group_size: int | None, *, convolutions: bool) -> nn.Module:
    """A ternary copy, with or without its 1x1 convolutions."""
    sana = isinstance(model, SanaTransformer2DModel)
    keep = {"*.conv_inverted": "keep", "*.conv_point": "keep"} if sana and not convolutions else {}
    config = TernaryConfig(group_size=group_size, overrides=keep, rounding="twn", activation_dtype="int8")
    return quantize(copy.deepcopy(model), config)


def forward(model: nn.Module, inputs: dict[str, torch.Tensor], dtype: torch.dtype) -> Callable[[], torch.Tensor]:
    cast = {k: v.to(dtype) if torch.is_tensor(v) and v.is_floating_point() else v for k, v in inputs.items()}
    return lambda: model(**cast, return_dict=False)[0]


def stored_bytes(model: nn.Module) -> int:
    blocks = nn.ModuleList([*model.transformer_blocks, *getattr(model, "single_transformer_blocks", ())])
    return sum(t.numel() * t.element_size() for t in (*blocks.parameters(), *blocks.buffers()))


def fast_bfloat16() -> bool:
    """Whether the kernel of this run is one beside which bfloat16 is worth interleaving in every round."""
    return cpu.kernel_name() in ("amx-int8", "avx512-vnni")


def measure(model: nn.Module, inputs: dict[str, torch.Tensor], *, rounds: int) -> list[dict[str, object]]:
    model.eval().requires_grad_(False)
    half = copy.deepcopy(model).bfloat16()
    models = {"float32": model, "bfloat16": half}
    large = isinstance(model, FluxTransformer2DModel)  # in the layout that is the default, alone
    for group_size in (GROUP,) if large else (None, GROUP):
        for with_convolutions in (False, True) if isinstance(model, SanaTransformer2DModel) else (False,):
            name = f"ternary, {'row' if group_size is None else f'group {group_size}'}"
            name += ", 1x1 convolutions too" if with_convolutions else ""
            models[name] = ternary(model, group_size, convolutions=with_convolutions)
            dense = copy.deepcopy(models[name])
            dense_layers(dense)
            expected = forward(dense, inputs, torch.float32)()
            error = (forward(models[name], inputs, torch.float32)() - expected).norm() / expected.norm()
            if not error < TOLERANCE:
                raise SystemExit(f"{name}: relative error {error:.2g}; no figure.")
            # Everything between the layers in bfloat16: faster where the CPU has instructions for it.
            name += ", bfloat16 activations"
            models[name] = ternary(half, group_size, convolutions=with_convolutions)
            error = (forward(models[name], inputs, torch.bfloat16)().float() - expected).norm() / expected.norm()
            if not error < TOLERANCE:
                raise SystemExit(f"{name}: relative error {error:.2g}; no figure.")
    calls = {
        name: forward(m, inputs, torch.bfloat16 if "bfloat16" in name else torch.float32) for name, m in models.items()
    }
    slow = [name for name in calls if "bfloat16" in name and not fast_bfloat16()]
    seconds = interleaved({name: calls.pop(name) for name in slow}, SLOW_ROUNDS)
    seconds.update(interleaved(calls, rounds))
    return [
        {
            "linears": name,
            "milliseconds": round(seconds[name] * 1e3, 2),
            "times float32": round(seconds["float32"] / seconds[name], 3),
            "times bfloat16": round(seconds["bfloat16"] / seconds[name], 3),
            "MiB of the blocks": round(stored_bytes(m) / 2**20, 2),
        }
        for name, m in models.items()
    ]


@torch.no_grad()
def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="limit torch, MKL, oneDNN and the kernel to AVX2")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--models", nargs="+", choices=MODELS, default=list(MODELS))
    options = parser.parse_args()
    if options.avx2:
        restart_limited_to_avx2()
        cpu_linear.load = cpu_call.load = functools.partial(native.load, "avx2")
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.manual_seed(0)
    machine = {
        "kernel": cpu.kernel_name(),
        "processor": processor(),
        "torch": torch.__version__,
        "torch instructions": torch.backends.cpu.get_cpu_capability(),
        "diffusers-ternary": diffusers_ternary.__version__,
    }
    print(machine)
    RESULTS.mkdir(exist_ok=True)
    path = RESULTS / f"transformer_cpu_{machine['kernel']}.csv"
    table = []
    for name, build in MODELS.items():
        title = f"{name}, {LAYERS} blocks"
        if name not in options.models:
            table.extend(row for row in rows_of(path) if row["model"] == title)
            continue
        model, inputs = build()
        for row in measure(model, inputs, rounds=options.rounds):
            table.append({"model": title, **row, **machine, "rounds": options.rounds})
            print(
                f"{name:<10} {row['linears']:<40} {row['milliseconds']:>9} ms {row['times float32']:>7}x float32 "
                f"{row['times bfloat16']:>7}x bfloat16 {row['MiB of the blocks']:>8} MiB",
                flush=True,
            )
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0], restval="")
        writer.writeheader()
        writer.writerows(table)


def rows_of(path: Path) -> list[dict[str, str]]:
    """What an earlier run wrote."""
    if not path.exists():
        return []
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


if __name__ == "__main__":
    main()
