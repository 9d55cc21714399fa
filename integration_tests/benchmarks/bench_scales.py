# SPDX-License-Identifier: Apache-2.0
"""What the `double` scale layout costs against `group`: SNR of the weight, and stored bits.

Run from the repository root:

    python integration_tests/benchmarks/bench_scales.py [FOLDER]

FOLDER is a float diffusers model whose block weights are measured beside the synthetic matrices; by default the
transformer of the embedded teacher, if it is there. Prints a table and writes results/scales.csv.
"""

import csv
import math
import re
import sys
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open

from diffusers_ternary.format import double_quantize, expand_scales, group_scales
from diffusers_ternary.ternarize import TernaryWeight, ternarize


ROOT = Path(__file__).parents[2]
TEACHER = ROOT / "diffusers_ternary" / "demo" / "data" / "teacher" / "transformer"
RESULTS = Path(__file__).parent / "results" / "scales.csv"
GROUP_SIZES = (32, 64, 128)
REAL_MATRICES = 8
COLUMNS = (
    "matrix",
    "shape",
    "group_size",
    "snr_group_db",
    "snr_double_db",
    "loss_db",
    "layout_error_db",
    "bits_group",
    "bits_double",
)


def decibel(signal: torch.Tensor, error: torch.Tensor) -> float:
    return 10 * float(torch.log10(signal.double().square().sum() / error.double().square().sum()))


def synthetic_matrices(seed: int = 0) -> Iterator[tuple[str, torch.Tensor]]:
    generator = torch.Generator().manual_seed(seed)
    shape = (768, 3072)

    def normal() -> torch.Tensor:
        return torch.randn(shape, generator=generator)

    yield "gaussian", normal()
    for freedom in (5, 3):
        chi_squared = sum(normal().square() for _ in range(freedom))
        yield f"student-t {freedom}", normal() * (freedom / chi_squared).sqrt()
    # Columns of unequal size, as outlier channels make them: the groups of a row differ most here.
    column_sizes = torch.randn(shape[1], generator=generator).mul(0.7).exp()
    yield "unequal columns", normal() * column_sizes
    yield "unequal groups", normal() * column_sizes[: shape[1] // 128].repeat_interleave(128)


def real_matrices(folder: Path) -> Iterator[tuple[str, torch.Tensor]]:
    """One matrix of each of the largest kinds of layers inside the blocks of a float model."""
    for file in sorted(folder.glob("*.safetensors")):
        with safe_open(file, framework="pt") as handle:
            names = [name for name in handle.keys() if "blocks." in name and name.endswith(".weight")]  # noqa: SIM118
            shapes = {name: handle.get_slice(name).get_shape() for name in names}
            kinds: dict[str, str] = {}
            for name in sorted(names, key=lambda name: -math.prod(shapes[name])):
                if len(shapes[name]) == 2:
                    kinds.setdefault(re.sub(r"\d+", "#", name), name)
            for name in list(kinds.values())[:REAL_MATRICES]:
                yield name.removesuffix(".weight"), handle.get_tensor(name).float()


def stored_bits(packed: TernaryWeight) -> float:
    tensors = [packed.scale, *([] if packed.multiplier is None else [packed.multiplier])]
    return 1.6 + 8 * sum(tensor.numel() * tensor.element_size() for tensor in tensors) / packed.spec.weights


def measure(name: str, weight: torch.Tensor, group_size: int) -> dict[str, str]:
    group = ternarize(weight, group_size=group_size, scales="group")
    double = ternarize(weight, group_size=group_size, scales="double")
    exact = expand_scales(group.scale.float(), group.spec.group_size, weight.shape[1]) * group.codes()
    row, multiplier = double_quantize(group.scale.float())
    layout = expand_scales(group_scales(row, multiplier), group.spec.group_size, weight.shape[1]) * group.codes()
    snr_group = decibel(weight, weight - group.dequantize())
    snr_double = decibel(weight, weight - double.dequantize())
    layout_error = f"{-decibel(exact, exact - layout):.1f}" if bool((exact != layout).any()) else "exact"
    values = (
        name,
        f"{weight.shape[0]}x{weight.shape[1]}",
        str(group_size),
        f"{snr_group:.3f}",
        f"{snr_double:.3f}",
        f"{snr_group - snr_double:.4f}",
        layout_error,
        f"{stored_bits(group):.3f}",
        f"{stored_bits(double):.3f}",
    )
    return dict(zip(COLUMNS, values, strict=True))


def main(arguments: list[str]) -> None:
    folder = Path(arguments[0]) if arguments else TEACHER
    matrices = [*synthetic_matrices(), *real_matrices(folder)]
    rows = [measure(name, weight, group_size) for name, weight in matrices for group_size in GROUP_SIZES]
    widths = {column: max(len(column), *(len(row[column]) for row in rows)) for column in COLUMNS}
    for row in [dict(zip(COLUMNS, COLUMNS, strict=True)), *rows]:
        print("  ".join(row[column].ljust(widths[column]) for column in COLUMNS))
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("w", newline="") as file:
        writer = csv.DictWriter(file, COLUMNS, lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main(sys.argv[1:])
