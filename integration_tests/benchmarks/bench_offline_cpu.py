# SPDX-License-Identifier: Apache-2.0
"""CPU time of what is done to a model once: solving a layer, rounding and reading codes, exports with their proof.

    python integration_tests/benchmarks/bench_offline_cpu.py [--shapes 3072x3072 ...] [--only solve codes export]

One thread, CPU time; what is short is the minimum of several rounds. A layer is synthetic: Gaussian weights,
correlated inputs, groups of 128 with multipliers. Exports are of a FLUX.1 with one double and two single blocks (0.6 G
weights of 11.9 G) in groups of 256. Results go to results/offline_cpu.csv. Correctness is checked in the run: the
solver in C leaves no larger error than in torch, codes come back as they were, no exported weight differs.
"""

import argparse
import csv
import sys
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
from cpu_timing import interleaved, processor
from diffusers import FluxTransformer2DModel
from process_memory import measure_peak

import diffusers_ternary
from diffusers_ternary import TernaryConfig, convert, quantize
from diffusers_ternary.calibration.hessian import InputMoments
from diffusers_ternary.calibration.solver import solve_layer
from diffusers_ternary.format import TernarySpec, pack_base3, pack_planes
from diffusers_ternary.kernels.cpu import coding, native
from diffusers_ternary.kernels.cpu.base3 import base3_to_planes, planes_to_base3
from diffusers_ternary.ternarize import ternarize


PARTS = ("solve", "codes", "export")
SHAPES = ("3072x3072", "3072x12288")
CHECKED = (512, 768)  # of the layer that is solved in C and in torch
GROUP = 128
CODES = (2240, 5600)
EXPORTS = ({"to": "gguf", "runtime": "sdcpp-cpu"}, {"to": "gguf", "runtime": "sdcpp-gpu"}, {"to": "mflux"})
ROUNDS = 9

Row = dict[str, object]


def problem(rows: int, columns: int) -> tuple[torch.Tensor, InputMoments, TernarySpec]:
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator)
    mixing = torch.randn(columns, 256, generator=generator) / 16
    tokens, second = 2 * columns, torch.zeros(columns, columns)
    for start in range(0, tokens, 1024):
        size = min(1024, tokens - start)
        x = torch.randn(size, 256, generator=generator) @ mixing.T + torch.randn(size, columns, generator=generator)
        second.addmm_(x.T, x, alpha=1 / tokens)
    moments = InputMoments(second, torch.zeros(columns), tokens)
    return weight, moments, TernarySpec(rows, columns, GROUP, "double", 0, 0)


def solving(shapes: list[str]) -> Iterator[Row]:
    checked, serves = problem(*CHECKED), coding.serves
    compiled = solve_layer(*checked).report.error
    coding.serves = lambda values: False
    plain = solve_layer(*checked).report.error
    coding.serves = serves
    if not compiled <= plain * 1.001:
        raise SystemExit(f"relative error {compiled} in C, {plain} in torch; no figure.")
    for shape in shapes:
        rows, columns = map(int, shape.split("x"))
        given = problem(rows, columns)
        start = time.thread_time()
        with measure_peak() as peak:
            report = solve_layer(*given, correct_bias=True).report
        seconds = time.thread_time() - start
        yield {
            "what": "solve a layer",
            "size": shape,
            "CPU seconds": round(seconds, 2),
            "peak MB": round((peak.resident - peak.before) / 2**20),
            "relative error": round(report.error, 6),
        }


def coding_speeds() -> Iterator[Row]:
    rows, columns = CODES
    codes = torch.randint(-1, 2, CODES, dtype=torch.int8)
    planes, weight = pack_planes(codes), torch.randn(CODES).bfloat16()
    packed = pack_base3(codes)
    if not torch.equal(base3_to_planes(packed, rows, columns), planes):
        raise SystemExit("codes differ after decoding; no figure.")
    if not torch.equal(planes_to_base3(planes, columns), packed):
        raise SystemExit("codes differ after encoding; no figure.")
    copy = torch.empty_like(packed)
    seconds = interleaved(
        {
            "base-3 to planes": lambda: base3_to_planes(packed, rows, columns),
            "planes to base-3": lambda: planes_to_base3(planes, columns),
            "copy of the base-3 bytes": lambda: copy.copy_(packed),
            "round by TWN": lambda: ternarize(weight, group_size=GROUP),
        },
        ROUNDS,
    )
    for name, value in seconds.items():
        rate = codes.numel() / value / 1e9
        yield {
            "what": name,
            "size": f"{rows}x{columns}",
            "CPU seconds": round(value, 5),
            "G weights/s": round(rate, 2),
        }


def exporting() -> Iterator[Row]:
    with torch.device("meta"):
        model = FluxTransformer2DModel(num_layers=1, num_single_layers=2, guidance_embeds=True).bfloat16()
    model.to_empty(device="cpu")
    noise = torch.randn(1 << 22) * 0.02
    for parameter in model.parameters():
        flat = parameter.data.view(-1)
        for part in flat.split(len(noise)):
            part.copy_(noise[: len(part)])
    with tempfile.TemporaryDirectory() as folder:
        quantize(model, TernaryConfig(group_size=256, scale_layout="group"))
        model.save_pretrained(f"{folder}/packed")
        del model, parameter, flat, part
        for number, options in enumerate(EXPORTS):
            start = time.thread_time()
            with measure_peak() as peak:
                report = convert(f"{folder}/packed", f"{folder}/{number}", **options)
            seconds = time.thread_time() - start
            if report.differing:
                raise SystemExit(f"{report.proof()}; no figure.")
            yield {
                "what": f"export to {' for '.join(options.values())}, proof included",
                "size": f"{report.weights / 1e9:.2f} G weights",
                "CPU seconds": round(seconds, 2),
                "peak MB": round(peak.anonymous / 2**20),
                "G weights/s": round(report.weights / seconds / 1e9, 3),
            }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", nargs="*", default=SHAPES, help="rows x columns of the layers that are solved")
    parser.add_argument("--only", nargs="*", choices=PARTS, default=PARTS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    if not native.variants():
        raise SystemExit("The package was installed without its compiled library.")
    parts = {"solve": lambda: solving(options.shapes), "codes": coding_speeds, "export": exporting}
    names = (
        "what",
        "size",
        "CPU seconds",
        "G weights/s",
        "peak MB",
        "relative error",
        "processor",
        "torch",
        "version",
    )
    path = Path(__file__).parent / "results/offline_cpu.csv"
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, names)
        writer.writeheader()
        for part in options.only:
            for row in parts[part]():
                print(row, flush=True)
                machine = {"processor": processor(), "torch": torch.__version__}
                writer.writerow({**row, **machine, "version": diffusers_ternary.__version__})
                file.flush()


if __name__ == "__main__":
    main()
