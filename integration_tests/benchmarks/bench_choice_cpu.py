# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves which layout and number of rows best: the figures behind kernels/cpu/choice.py.

    python integration_tests/benchmarks/bench_choice_cpu.py

One thread, thread-CPU time, minimum of interleaved rounds; every output is checked in the run. Times are relative to
the better of float32 and bfloat16 F.linear. Results go to results/choice_cpu.csv.
"""

import argparse
import csv
import sys
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[2]))
import torch
import torch.nn.functional as F
from cpu_timing import interleaved, processor

import diffusers_ternary
from diffusers_ternary.format import expand_scales, group_scales, pack_planes
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.cpu import native
from integration_tests.support.operands import of_parts


SIZE = 1536
ROWS = (1, 4, 8, 16, 32, 64, 128, 256, 1024)
# group size, whether groups have multipliers
LAYOUTS = ((SIZE, False), (128, True), (128, False), (64, False), (32, False), (16, False))
ROUNDS = 9


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    options = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    codes = torch.randint(-1, 2, (SIZE, SIZE), dtype=torch.int8)
    weight = pack_planes(codes)
    variants = [name for name in native.variants() if name not in ("scalar", "avx-vnni")]
    table = []
    for rows in ROWS:
        for group_size, double in LAYOUTS:
            groups = SIZE // group_size
            scale = (torch.rand(SIZE, 1 if double else groups) + 0.1).half()
            multiplier = torch.randint(1, 64, (SIZE, groups), dtype=torch.uint8) if double else None
            dense = codes * expand_scales(group_scales(scale, multiplier), group_size, SIZE).float()
            half, x = dense.bfloat16(), torch.randn(rows, SIZE).bfloat16()
            wide = x.float()
            shape = {"in_features": SIZE, "group_size": group_size}
            calls = {
                "float32": lambda: F.linear(wide, dense),  # noqa: B023
                "bfloat16": lambda: F.linear(x, half),  # noqa: B023
                "auto": lambda: of_parts(cpu.linear_int8)(x, weight, scale, multiplier, None, **shape, dense=True),  # noqa: B023
            }
            for name in variants:
                library = native.load(name)
                calls[name] = lambda library=library: of_parts(cpu.linear_int8)(
                    x,  # noqa: B023
                    weight,
                    scale,  # noqa: B023
                    multiplier,  # noqa: B023
                    None,
                    **shape,  # noqa: B023
                    library=library,
                )
            expected = F.linear(x.double(), dense.double())
            for name, call in calls.items():
                error = float((call().double() - expected).norm() / expected.norm())
                if not error < 0.02:
                    raise SystemExit(f"{name}: relative error {error:.2g}; no figure.")
            seconds = interleaved(calls, options.rounds)
            best = min(seconds["float32"], seconds["bfloat16"])
            for name, value in seconds.items():
                table.append(
                    {
                        "rows": rows,
                        "N": SIZE,
                        "K": SIZE,
                        "group_size": group_size,
                        "multipliers": double,
                        "kernel": name,
                        "milliseconds": round(value * 1e3, 4),
                        "times the better F.linear": round(best / value, 3),
                        "processor": processor(),
                        "best variant": native.variants()[0],
                        "torch": torch.__version__,
                        "diffusers-ternary": diffusers_ternary.__version__,
                    }
                )
            print(
                f"{rows=} {group_size=} {double=}",
                {name: round(best / value, 2) for name, value in seconds.items()},
                flush=True,
            )
    with open(Path(__file__).parent / "results/choice_cpu.csv", "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
