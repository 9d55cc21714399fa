# SPDX-License-Identifier: Apache-2.0
"""Compiles, in all cores, the kernels that the benchmarks will launch: Triton's own cache has them then.

    python integration_tests/benchmarks/gpu/compile_ahead.py                       # for the GPU that is here
    python integration_tests/benchmarks/gpu/compile_ahead.py --target sm_90        # for another, before a session

Needs no GPU: the cache depends on the kernels' text, Triton's files and ptxas, so the folder (`TRITON_CACHE_DIR`) can
be carried to the machine with the GPU.
"""

import argparse
import itertools
import multiprocessing
import os
import sys
import time
from collections.abc import Iterator
from pathlib import Path


sys.path.insert(0, str(Path(__file__).parents[3]))
import torch
from bench_linear import DRY_SHAPES, GROUP, SHAPES, Shape

from diffusers_ternary.kernels.triton.dispatch import Request, candidates
from integration_tests.compile_every_plan import Job, compile_job, launched
from integration_tests.support.gpu_compiler import TARGETS


def jobs(name: str, shapes: tuple[Shape, ...]) -> Iterator[Job]:
    """One product for every kernel, those of large products first."""
    seen: set[object] = set()
    target = TARGETS[name]
    for shape, (size, multipliers) in itertools.product(shapes, ((GROUP, True), (None, False))):
        for activation_dtype in ("none", *target.activation_dtypes):
            request = Request(
                shape.m, shape.n, shape.k, size or shape.k, size is None, torch.bfloat16, activation_dtype
            )
            for plan in candidates(target, request, activation_dtype):
                job = (name, request, plan, multipliers, 0)
                new = {(each.name, each.specialization) for each in launched(job, compiles=False)} - seen
                if new:
                    seen |= new
                    yield job


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--target", choices=TARGETS, help="default: the GPU that is here")
    parser.add_argument("--jobs", type=int, default=os.cpu_count() or 1, help="processes")
    parser.add_argument("--seconds", type=float, default=90, help="no kernel is waited for longer than this")
    parser.add_argument("--dry-run", action="store_true", help="two tiny shapes, for sm_80")
    options = parser.parse_args()
    name = "sm_80" if options.dry_run else options.target
    if name is None:
        if not torch.cuda.is_available():
            parser.error("no GPU: --target names one.")
        major, minor = torch.cuda.get_device_capability()
        name = f"sm_{major}{minor}"
        if name not in TARGETS:
            print(f"{name} is not among {', '.join(TARGETS)}: kernels are compiled when they are called.")
            return 0
    start = time.monotonic()
    todo = list(jobs(name, DRY_SHAPES if options.dry_run else SHAPES))
    if options.dry_run:
        todo = todo[:1]
    done, failed = 0, 0
    with multiprocessing.get_context("spawn").Pool(min(options.jobs, len(todo))) as pool:
        results = pool.imap_unordered(compile_job, todo)
        for _ in todo:
            try:
                job, _, problems, _ = results.next(timeout=max(0.1, options.seconds - (time.monotonic() - start)))
            except multiprocessing.TimeoutError:
                print(f"Time is up after {done} of {len(todo)} products.")
                break
            done += 1
            failed += bool(problems)
            for problem in problems:
                print("PROBLEM", *job, problem, flush=True)
        pool.terminate()
    print(
        f"{done} of {len(todo)} products compiled for {name}, {failed} with problems, {time.monotonic() - start:.0f} s"
    )
    return 0


if __name__ == "__main__":
    sys.exit(main())
