# SPDX-License-Identifier: Apache-2.0
"""Compiles every kernel of every plan that dispatch can pick, for GPUs that need not be there.

    python integration_tests/compile_every_plan.py --jobs 2                       # minutes per target
    PYTHONPATH=/tmp/triton-3.6.0 python integration_tests/compile_every_plan.py   # with another Triton

Requests are layers of FLUX, SANA and an odd size, in every layout of scales, dtype and bucket of rows; kernels
that differ in nothing the compiler sees are compiled once. Prints the slowest ones and fails where one does not
compile, spills registers or needs more shared memory than the target has. The test suite compiles a part of this
(`kernels/triton/test_compile.py`).
"""

import argparse
import collections
import contextlib
import itertools
import multiprocessing
import sys
import time
import warnings
from collections.abc import Iterator
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "integration_tests")]

import torch  # noqa: E402
import triton  # noqa: E402

from diffusers_ternary.kernels.triton import launch, product  # noqa: E402
from diffusers_ternary.kernels.triton.dispatch import Plan, Request, candidates  # noqa: E402
from diffusers_ternary.kernels.triton.weights import PackedWeight  # noqa: E402
from integration_tests.support.gpu_compiler import TARGETS, Compiled, launches_on  # noqa: E402


# N and K of layers: planes of whole blocks (FLUX, SD3.5), planes that end inside one (SANA), rows not aligned.
LAYERS = ((3072, 3072), (2240, 2240), (37, 250))
ROWS = (1, 12, 40, 300, 1024, 4096)  # one for each choice of tiles
GROUPS = ((None, False), (128, True), (128, False))  # columns per scale, and whether multipliers are stored
ROTATION = 128
Job = tuple[str, Request, Plan, bool, int]


def fake_weight(request: Request, multipliers: bool, hadamard: int) -> PackedWeight:
    n, k = request.out_features, request.in_features
    groups = -(-k // request.group_size)
    packed = torch.empty(n, -(-k // 4), dtype=torch.int8, device="cuda")
    multiplier = torch.empty(n, groups, dtype=torch.int8, device="cuda") if multipliers else None
    scale = torch.empty(n, 1 if multipliers else groups, dtype=torch.float16, device="cuda")
    return PackedWeight(packed, scale, multiplier, k, request.group_size, hadamard)


def launched(job: Job, *, compiles: bool) -> list[Compiled]:
    """What a job launches; a library's product, for which no fake device exists, is left out."""
    name, request, plan, multipliers, hadamard = job
    with launches_on(name, compiles=compiles) as launches:
        weight = fake_weight(request, multipliers, hadamard)
        x = torch.empty(request.rows, request.in_features, dtype=request.dtype, device="cuda")
        bias = torch.empty(request.out_features, dtype=request.dtype, device="cuda")
        with contextlib.suppress(RuntimeError) if plan.path == "library" else contextlib.nullcontext():
            product.run(plan, x, weight, bias, request.activation_dtype, TARGETS[name])
        launch.unpack_float(weight, request.dtype, inline_ptx=TARGETS[name].inline_ptx)
    return launches


def jobs(name: str) -> Iterator[Job]:
    """Every product of a target that launches a kernel which those before do not."""
    seen: set[object] = set()
    target = TARGETS[name]
    # Other outputs change a cast at the end.
    products = [(torch.bfloat16, *rest) for rest in itertools.product(LAYERS, GROUPS, ROWS)]
    products += [(dtype, LAYERS[0], GROUPS[1], rows) for dtype in (torch.float16, torch.float32) for rows in ROWS]
    for dtype, (n, k), (size, multipliers), rows in products:
        for activation_dtype in ("none", *target.activation_dtypes):
            request = Request(rows, n, k, size or k, size is None, dtype, activation_dtype)
            offered = [(plan, 0) for plan in candidates(target, request, activation_dtype)]
            for plan, hadamard in [*offered, (offered[0][0], ROTATION)]:
                job = (name, request, plan, multipliers, hadamard)
                new = {(each.name, each.specialization) for each in launched(job, compiles=False)} - seen
                if new:
                    seen |= new
                    yield job


def compile_job(job: Job) -> tuple[Job, float, list[str], list[tuple[str, int]]]:
    """Seconds, problems, and the kernels with the instructions of their text."""
    warnings.simplefilter("ignore")
    torch.set_num_threads(1)
    start = time.monotonic()
    try:
        kernels = launched(job, compiles=True)
    except Exception as error:
        return job, time.monotonic() - start, [f"{type(error).__name__}: {str(error)[-400:]}"], []
    limit = TARGETS[job[0]].shared_memory
    problems = [f"{each.name} spills {each.spills} bytes" for each in kernels if each.spills]
    problems += [f"{each.name} takes {each.shared} bytes of {limit}" for each in kernels if each.shared > limit]
    return job, time.monotonic() - start, problems, [(each.name, each.text.count("\n")) for each in kernels]


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--targets", nargs="+", choices=TARGETS, default=list(TARGETS))
    parser.add_argument("--jobs", type=int, default=2, help="processes")
    options = parser.parse_args()
    start = time.monotonic()
    todo = [job for name in options.targets for job in jobs(name)]
    print(f"Triton {triton.__version__}, torch {torch.__version__}: {len(todo)} products", flush=True)
    results: list[Any] = []
    with multiprocessing.get_context("spawn").Pool(options.jobs) as pool:
        for result in pool.imap_unordered(compile_job, todo):
            results.append(result)
            for problem in result[2]:
                print("PROBLEM", *result[0], problem, flush=True)
            if len(results) % 50 == 0:
                print(f"{len(results)} of {len(todo)}, {time.monotonic() - start:.0f} s", flush=True)
    for job, seconds, _, kernels in sorted(results, key=lambda result: -result[1])[:5]:
        print(f"{seconds:6.1f} s", *job, kernels)
    failed = sum(bool(result[2]) for result in results)
    by_target = collections.Counter(job[0] for job in todo)
    print(f"{len(todo) - failed} of {len(todo)} are right {dict(by_target)}, {time.monotonic() - start:.0f} s")
    return 1 if failed else 0


if __name__ == "__main__":
    sys.exit(main())
