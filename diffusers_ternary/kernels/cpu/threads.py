# SPDX-License-Identifier: Apache-2.0
"""Threads for native calls: as many as torch uses, idle while torch's own pool works, and safe to fork."""

import functools
import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor


@functools.cache
def _pool(process: int, workers: int) -> ThreadPoolExecutor:
    # The process is part of the key because threads do not survive a fork.
    return ThreadPoolExecutor(workers, thread_name_prefix="diffusers-ternary")


def run(task: Callable[[int, int], int | None], parts: Sequence[tuple[int, int]]) -> int:
    """Runs `task(first, last)` for every part, the first one in the calling thread; returns the sum of the results."""
    if len(parts) == 1:
        return task(*parts[0]) or 0
    # One worker per part: a call never waits for a thread that another call keeps busy.
    futures = [_pool(os.getpid(), len(parts) - 1).submit(task, *part) for part in parts[1:]]
    total = task(*parts[0]) or 0
    return total + sum(future.result() or 0 for future in futures)


def split(size: int, parts: int, multiple: int) -> list[tuple[int, int]]:
    """Cuts `[0, size)` into at most `parts` ranges of nearly equal length that begin at a multiple of `multiple`."""
    units = -(-size // multiple)
    parts = min(parts, units)
    edges = [min(size, units * i // parts * multiple) for i in range(parts + 1)]
    return [(edges[i], edges[i + 1]) for i in range(parts)]
