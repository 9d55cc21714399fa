# SPDX-License-Identifier: Apache-2.0
"""Timing that can be trusted on a shared CPU: one thread, thread-CPU time, interleaved, minimum of the rounds."""

import os
import platform
import sys
import time
from collections.abc import Callable, Mapping
from pathlib import Path


AVX2_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx2",
    "MKL_ENABLE_INSTRUCTIONS": "AVX2",
    "ONEDNN_MAX_CPU_ISA": "AVX2",
}
AVX512_ENVIRONMENT = {
    "ATEN_CPU_CAPABILITY": "avx512",
    "MKL_ENABLE_INSTRUCTIONS": "AVX512",
    "ONEDNN_MAX_CPU_ISA": "AVX512_CORE_BF16",
}
SHORTEST_SAMPLE = 2e-3  # seconds; shorter calls are repeated inside one sample


def limited_to_avx2() -> bool:
    """Whether torch, MKL and oneDNN of this process were limited to AVX2 when they loaded."""
    return all(os.environ.get(name) == value for name, value in AVX2_ENVIRONMENT.items())


def restart_limited_to_avx2() -> None:
    """Runs the script again with torch, MKL and oneDNN limited to AVX2: they read these variables when they load."""
    if not limited_to_avx2():
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX2_ENVIRONMENT})


def restart_limited_to_avx512() -> None:
    """The same with AVX-512 and its bfloat16 instructions, but without AMX."""
    if os.environ.get("ONEDNN_MAX_CPU_ISA") != AVX512_ENVIRONMENT["ONEDNN_MAX_CPU_ISA"]:
        os.execve(sys.executable, [sys.executable, *sys.argv], {**os.environ, **AVX512_ENVIRONMENT})


def interleaved(
    candidates: Mapping[str, Callable[[], object]], rounds: int, clock: Callable[[], float] = time.thread_time
) -> dict[str, float]:
    """Least CPU seconds of each candidate over `rounds` rounds that take all candidates in turn."""
    repeats = {}
    for name, candidate in candidates.items():
        candidate()
        start = clock()
        candidate()
        repeats[name] = max(1, round(SHORTEST_SAMPLE / max(clock() - start, 1e-6)))
    best = dict.fromkeys(candidates, float("inf"))
    for _ in range(rounds):
        for name, candidate in candidates.items():
            start = clock()
            for _ in range(repeats[name]):
                candidate()
            best[name] = min(best[name], (clock() - start) / repeats[name])
    return best


def processor() -> str:
    """Name of the processor, as the system gives it."""
    path = Path("/proc/cpuinfo")
    if path.exists():
        for line in path.read_text().splitlines():
            if line.startswith("model name"):
                return line.split(":", 1)[1].strip()
    return platform.processor() or platform.machine()
