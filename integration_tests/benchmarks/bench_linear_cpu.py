# SPDX-License-Identifier: Apache-2.0
"""One linear layer on the CPU: packed ternary with int8 activations against F.linear and other low-bit layers.

    python integration_tests/benchmarks/bench_linear_cpu.py           # the best kernel of this machine
    python integration_tests/benchmarks/bench_linear_cpu.py --avx512  # without AMX
    python integration_tests/benchmarks/bench_linear_cpu.py --avx2    # everything limited to AVX2

One thread, CPU time of the process, minimum of 9 interleaved rounds; quantization of the activations and decoding
included. Every output is checked before its figure is printed; a peer whose error is larger than its bits excuse has
no figure. FBGEMM, ONNX Runtime, OpenVINO and bitsandbytes choose their instructions by themselves, --avx2 does not
limit them. Results go to results/linear_cpu_<set>.csv and .png.
"""

import argparse
import csv
import subprocess
import sys
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F
from cpu_timing import interleaved, processor, restart_limited_to_avx2, restart_limited_to_avx512
from linear_peers import peers

import diffusers_ternary
from diffusers_ternary.format import expand_scales, group_scales, pack_planes
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.cpu import fallback, native
from diffusers_ternary.kernels.operands import PackedWeight
from diffusers_ternary.kernels.ops import ternary_linear
from integration_tests.support.operands import of_parts


RESULTS = Path(__file__).parent / "results"
SHAPES = [(n, k) for n, k in ((1152, 1152), (4608, 1152), (1152, 4608), (2240, 2240), (3072, 3072))]
ROWS = (1, 4, 16, 256, 1024)
ROUNDS = 9
SLOW_ROUNDS = 3  # for baselines that take a second per call
GROUP = 128
MOST_WITHOUT_ONEDNN = 1 << 16  # numbers of x; it would take many seconds


@dataclass(frozen=True)
class Candidate:
    """A layer, the dense weight it stands for, and the error its activations may add."""

    call: Callable[[torch.Tensor], torch.Tensor]
    dense: torch.Tensor
    tolerance: float
    dtype: torch.dtype = torch.float32  # of the activations, in and out
    peer: bool = False  # whose error is reported, and does not stop the run


def ternary(
    columns: int, in_features: int, group_size: int, library: native.NativeLibrary | None
) -> dict[str, Candidate]:
    codes = torch.randint(-1, 2, (columns, in_features), dtype=torch.int8)
    groups = -(-in_features // group_size)
    scale = (torch.rand(columns, groups) * 0.02 + 0.01).half()
    weight, dense = pack_planes(codes), codes * expand_scales(scale.float(), group_size, in_features)
    options = {"in_features": in_features, "group_size": group_size}
    name = "row" if groups == 1 else f"group {group_size}"

    def int8(x: torch.Tensor) -> torch.Tensor:
        return of_parts(cpu.linear_int8)(x, weight, scale, None, None, **options, library=library)

    def torch_only(x: torch.Tensor) -> torch.Tensor:
        return fallback.linear_int8(x, PackedWeight(weight, scale, None, in_features, group_size), None)[0]

    def exact(x: torch.Tensor) -> torch.Tensor:
        return of_parts(cpu.linear_exact)(x, weight, scale, None, None, **options)

    def operator(x: torch.Tensor) -> torch.Tensor:
        return ternary_linear(x, weight, scale, None, None, in_features, group_size, "int8")

    candidates = {f"ternary, torch only, {name}": Candidate(torch_only, dense, 0.02)}
    if library is not None:
        candidates[f"ternary, {name}"] = Candidate(int8, dense, 0.02)
    candidates[f"ternary, float32 activations, {name}"] = Candidate(exact, dense, 1e-4)
    if library is not None:
        candidates[f"ternary, {name}, bfloat16 in and out"] = Candidate(int8, dense, 0.02, torch.bfloat16)
        if groups > 1:
            multiplier = torch.randint(1, 64, (columns, groups), dtype=torch.uint8)
            row_scale = scale[:, :1].contiguous()
            folded = codes * expand_scales(group_scales(row_scale, multiplier), group_size, in_features).float()

            def double(x: torch.Tensor) -> torch.Tensor:
                return of_parts(cpu.linear_int8)(x, weight, row_scale, multiplier, None, **options, library=library)

            name = f"ternary, {name} with multipliers"
            candidates[name] = Candidate(double, folded, 0.02)
            candidates[f"{name}, bfloat16 in and out"] = Candidate(double, folded, 0.02, torch.bfloat16)
    if library is not None and library.variant == cpu.kernel_name() and groups == 1:
        candidates[f"ternary operator, {name}"] = Candidate(operator, dense, 0.02)
    return candidates


def floats(columns: int, in_features: int) -> dict[str, Candidate]:
    dense = torch.randn(columns, in_features) * 0.02
    half = dense.bfloat16()

    def bfloat16_without_onednn(x: torch.Tensor) -> torch.Tensor:
        with warnings.catch_warnings(), torch.backends.mkldnn.flags(enabled=False):
            return F.linear(x.bfloat16(), half)

    return {
        "float32": Candidate(lambda x: F.linear(x, dense), dense, 1e-4),
        "bfloat16": Candidate(lambda x: F.linear(x.bfloat16(), half), dense, 0.02),
        "bfloat16 in and out": Candidate(lambda x: F.linear(x, half), dense, 0.02, torch.bfloat16),
        # What torch does on a CPU without AVX-512, where it does not ask oneDNN.
        "bfloat16, no oneDNN": Candidate(bfloat16_without_onednn, dense, 0.02),
    }


def is_slow(name: str) -> bool:
    """Whether a candidate may take a second per call: bfloat16 by a CPU or a torch that has no instructions for it."""
    return name == "bfloat16, no oneDNN" or (name.startswith("bfloat16") and cpu.kernel_name() != "amx-int8")


def measure(candidates: dict[str, Candidate], rows: int, in_features: int, rounds: int) -> list[dict[str, object]]:
    inputs = {dtype: torch.randn(rows, in_features).to(dtype) for dtype in (torch.float32, torch.bfloat16)}
    if rows * in_features > MOST_WITHOUT_ONEDNN:
        candidates = {name: candidate for name, candidate in candidates.items() if name != "bfloat16, no oneDNN"}
    errors, wrong = {}, set()
    for name, candidate in candidates.items():
        x = inputs[candidate.dtype]
        expected = F.linear(x.float(), candidate.dense)
        errors[name] = float((candidate.call(x).float() - expected).norm() / expected.norm())
        if not errors[name] <= candidate.tolerance:
            wrong.add(name)
            print(f"{name}: relative error {errors[name]:.2g} at M={rows}, K={in_features}; no figure.", flush=True)
            if not candidate.peer:
                raise SystemExit(1)
    calls = {
        name: (lambda candidate=candidate: candidate.call(inputs[candidate.dtype]))
        for name, candidate in candidates.items()
        if name not in wrong
    }
    slow = {name for name in calls if rows * candidates[name].dense.numel() > 4e9 and is_slow(name)}
    seconds = interleaved({name: call for name, call in calls.items() if name not in slow}, rounds, time.process_time)
    seconds.update(interleaved({name: calls[name] for name in slow}, min(rounds, SLOW_ROUNDS), time.process_time))
    seconds.update(dict.fromkeys(wrong, float("nan")))
    return [
        {
            "layer": name,
            "milliseconds": round(seconds[name] * 1e3, 4),
            "times float32": round(seconds["float32"] / seconds[name], 3),
            "times bfloat16": round(seconds["bfloat16"] / seconds[name], 3),
            "times bfloat16 in and out": round(seconds["bfloat16 in and out"] / seconds[name], 3),
            "times bfloat16, no oneDNN": round(seconds.get("bfloat16, no oneDNN", float("nan")) / seconds[name], 3),
            "relative error": f"{errors[name]:.1e}",
        }
        for name in candidates
    ]


def peak_growth(kind: str) -> int:
    """KiB by which one forward of a 3072 x 3072 layer on 2,048 tokens raises the peak, its output included."""

    def status(field: str) -> int:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) for line in lines if line.startswith(field))

    x = torch.randn(2048, 3072)
    weight = pack_planes(torch.randint(-1, 2, (3072, 3072), dtype=torch.int8))
    scale, dense = torch.rand(3072, 24).half(), torch.randn(3072, 3072)

    def forward(x: torch.Tensor) -> torch.Tensor:
        if kind == "float32":
            return F.linear(x, dense)
        return of_parts(cpu.linear_int8)(x, weight, scale, None, None, in_features=3072, group_size=GROUP)

    forward(x[:32])
    Path("/proc/self/clear_refs").write_text("5")  # the peak starts again from here
    before = status("VmRSS:")
    forward(x)
    return status("VmHWM:") - before


def plot(rows: list[dict[str, object]], title: str, path: Path) -> None:
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    names = list(dict.fromkeys(row["layer"] for row in rows if row["layer"] != "float32"))
    figure, axes = plt.subplots(1, 2, figsize=(12, 0.34 * len(names) + 2.2), sharey=True)
    for axis, tokens in zip(axes, (1, 1024), strict=True):
        for i, name in enumerate(names):
            values = [row["times float32"] for row in rows if row["layer"] == name and row["M"] == tokens]
            color = "tab:green" if name.startswith("ternary") else "tab:grey"
            axis.plot([min(values), max(values)], [i, i], color=color, linewidth=6, alpha=0.35)
            axis.plot(values, [i] * len(values), "o", color=color, markersize=4)
        axis.axvline(1, color="black", linewidth=0.8)
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: f"{value:g}")
        axis.set_title(f"{tokens} token{'s' if tokens > 1 else ''}")
        axis.set_xlabel("speed, times float32 F.linear")
        axis.grid(axis="x", alpha=0.3, which="both")
    axes[0].set_yticks(range(len(names)), names)
    axes[0].invert_yaxis()
    figure.suptitle(title)
    figure.tight_layout()
    figure.savefig(path, dpi=120)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--avx2", action="store_true", help="limit torch, MKL, oneDNN and the kernel to AVX2")
    parser.add_argument("--avx512", action="store_true", help="limit them to AVX-512, with its bfloat16, without AMX")
    parser.add_argument("--shape", type=int, nargs=2, action="append", metavar=("N", "K"), help="instead of all")
    parser.add_argument("--tokens", type=int, nargs="+", default=ROWS, metavar="M")
    parser.add_argument(
        "--skip", nargs="+", default=[], metavar="NAME", help="beginnings of the names of peers left out"
    )
    parser.add_argument("--name", help="of the files in results/, after linear_cpu_; default: the kernel")
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--quick", action="store_true", help="one shape, nothing written")
    parser.add_argument("--peak", choices=("float32", "ternary"), help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.avx2:
        restart_limited_to_avx2()
    if options.avx512:
        restart_limited_to_avx512()
    torch.set_num_threads(1)
    torch.manual_seed(0)
    if options.peak:
        print(peak_growth(options.peak))
        return
    library = native.load("avx2" if options.avx2 else "avx512-vnni" if options.avx512 else None)
    kernel = library.variant if library else cpu.kernel_name()
    warnings.filterwarnings("ignore")
    torch.set_grad_enabled(False)
    machine = {
        "kernel": kernel,
        "processor": processor(),
        "torch": torch.__version__,
        "torch instructions": torch.backends.cpu.get_cpu_capability(),
        "diffusers-ternary": diffusers_ternary.__version__,
        "rounds": options.rounds,
    }
    print(machine)
    table = []
    for columns, in_features in SHAPES[:1] if options.quick else options.shape or SHAPES:
        candidates = {
            **floats(columns, in_features),
            **ternary(columns, in_features, in_features, library),
            **ternary(columns, in_features, GROUP, library),
            **{
                name: Candidate(call, dense, tolerance, peer=True)
                for name, (call, dense, tolerance) in peers(columns, in_features, options.skip).items()
            },
        }
        for rows in options.tokens:
            for row in measure(candidates, rows, in_features, options.rounds):
                table.append({"M": rows, "N": columns, "K": in_features, **row, **machine})
                print(
                    f"M={rows:<5} N={columns:<5} K={in_features:<5} {row['layer']:<40} {row['milliseconds']:>10} ms",
                    f"{row['times float32']:>8}x float32 {row['times bfloat16 in and out']:>8}x bfloat16 in and out",
                    flush=True,
                )
    for kind in ("float32", "ternary") if Path("/proc/self/clear_refs").exists() else ():
        command = [sys.executable, __file__, "--peak", kind, *(["--avx2"] if options.avx2 else [])]
        growth = int(subprocess.run(command, capture_output=True, text=True, check=True).stdout)
        print(f"peak memory of one forward, 2048 x 3072 x 3072, {kind}: {growth / 1024:.1f} MiB")
    if options.quick:
        return
    RESULTS.mkdir(exist_ok=True)
    name = f"linear_cpu_{options.name or kernel}"
    with open(RESULTS / f"{name}.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)
    plot(table, f"One linear layer, {kernel}, one thread, {machine['processor']}", RESULTS / f"{name}.png")


if __name__ == "__main__":
    main()
