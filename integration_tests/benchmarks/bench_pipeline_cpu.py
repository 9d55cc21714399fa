# SPDX-License-Identifier: Apache-2.0
"""The embedded pipeline on the CPU: pixel people, the float teacher against the calibrated student.

    python integration_tests/benchmarks/bench_pipeline_cpu.py

One thread, thread-CPU time of the whole pipeline call as the demo makes it (8 steps: text encoder, denoiser, decoder),
eager, minimum of 9 interleaved rounds. Its layers are a few hundred features wide, so at batch size 1 it is Python
that is measured. Pictures must resemble the teacher's (PSNR), or there is no figure. Results go to
results/pipeline_cpu_<kernel>.csv; `--batch-sizes` leaves the rows of other sizes as they are.
"""

import argparse
import csv
import functools
import warnings
from pathlib import Path

import numpy as np
import torch
from cpu_timing import interleaved, processor

import diffusers_ternary
from diffusers_ternary.demo import generate, held_out_prompts
from diffusers_ternary.demo.variants import find_variant
from diffusers_ternary.kernels import cpu


RESULTS = Path(__file__).parent / "results"
ROUNDS = 9
BATCH_SIZES = (1, 16)
LEAST_PSNR = 15.0  # dB
VARIANTS = {
    "float32": ("teacher", torch.float32),
    "bfloat16": ("teacher", torch.bfloat16),
    "ternary": ("calibrated", torch.float32),
    "ternary, bfloat16 activations": ("calibrated", torch.bfloat16),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=ROUNDS)
    parser.add_argument("--batch-sizes", nargs="+", type=int, default=BATCH_SIZES)
    options = parser.parse_args()
    warnings.filterwarnings("ignore")
    torch.set_num_threads(1)
    torch.set_grad_enabled(False)
    pipelines = {name: find_variant(variant).load(dtype) for name, (variant, dtype) in VARIANTS.items()}
    for pipeline in pipelines.values():
        pipeline.set_progress_bar_config(disable=True)
    machine = {
        "kernel": cpu.kernel_name(),
        "processor": processor(),
        "torch": torch.__version__,
        "diffusers-ternary": diffusers_ternary.__version__,
        "rounds": options.rounds,
    }
    path = RESULTS / f"pipeline_cpu_{machine['kernel']}.csv"
    table: list[dict[str, object]] = []
    if path.exists():
        with open(path, newline="") as file:
            table = [row for row in csv.DictReader(file) if int(row["batch"]) not in options.batch_sizes]
    for batch_size in options.batch_sizes:
        prompts = held_out_prompts(batch_size, seed=0)

        expected = generate(pipelines["float32"], prompts)
        for name, pipeline in pipelines.items():
            error = np.square(generate(pipeline, prompts) - expected).mean()
            psnr = -10 * np.log10(max(error, 1e-12))
            if not psnr > LEAST_PSNR:
                raise SystemExit(f"{name}: {psnr:.1f} dB to the teacher; no figure.")
        calls = {name: functools.partial(generate, pipeline, prompts) for name, pipeline in pipelines.items()}
        seconds = interleaved(calls, options.rounds)
        for name, value in seconds.items():
            ratio = round(seconds["float32"] / value, 3)
            table.append(
                {"pipeline": name, "batch": batch_size, "milliseconds": round(value * 1e3, 2), "times float32": ratio}
                | machine
            )
            print(f"batch {batch_size:<3} {name:<32} {value * 1e3:9.2f} ms {ratio}x float32", flush=True)
    with open(path, "w", newline="") as file:
        writer = csv.DictWriter(file, table[0])
        writer.writeheader()
        writer.writerows(table)


if __name__ == "__main__":
    main()
