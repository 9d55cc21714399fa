# SPDX-License-Identifier: Apache-2.0
"""Timing on a GPU that can be trusted: device events, candidates interleaved, cold caches, median and spread."""

import statistics
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch


WARMUP = 3  # the first call compiles and tunes
L2_BYTES = 256 << 20  # written between calls: more than any L2, so that weights come from memory as in a model
SLEEP_CYCLES = 800_000  # about half a millisecond
HOST_CALLS = 40


@dataclass(frozen=True)
class Timing:
    """Seconds of a call: the median over all samples, and the relative spread of the rounds' medians."""

    seconds: float
    spread: float


class Stopwatch:
    """Times calls on a device; on the CPU, for dry runs, with the wall clock.

    Args:
        device (`torch.device`): where the calls run.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self._flush = torch.empty(L2_BYTES if device.type == "cuda" else 1, dtype=torch.int8, device=device)

    def _samples(self, call: Callable[[], object], count: int) -> list[float]:
        if self.device.type != "cuda":
            start = time.perf_counter()
            call()
            return [time.perf_counter() - start]
        pairs = []
        for _ in range(count):
            self._flush.zero_()
            torch.cuda._sleep(SLEEP_CYCLES)  # the host enqueues meanwhile: its time is measured by itself
            start, end = torch.cuda.Event(enable_timing=True), torch.cuda.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            pairs.append((start, end))
        torch.cuda.synchronize()
        return [start.elapsed_time(end) / 1e3 for start, end in pairs]

    def host_microseconds(self, call: Callable[[], object], *, calls: int = HOST_CALLS) -> float:
        """Host time to enqueue a call, the mean of some; the device is idle before."""
        synchronize(self.device)
        calls = calls if self.device.type == "cuda" else 1
        start = time.perf_counter()
        for _ in range(calls):
            call()
        elapsed = time.perf_counter() - start
        synchronize(self.device)
        return elapsed / calls * 1e6

    def interleaved(
        self, candidates: Mapping[str, Callable[[], object]], *, rounds: int = 3, samples: int = 20
    ) -> dict[str, Timing]:
        """Times the candidates in turn, `rounds` times over, `samples` calls each."""
        for call in candidates.values():
            for _ in range(WARMUP if self.device.type == "cuda" else 0):
                call()
        measured: dict[str, list[list[float]]] = {name: [] for name in candidates}
        for _ in range(rounds if self.device.type == "cuda" else 1):
            for name, call in candidates.items():
                measured[name].append(self._samples(call, samples))
        return {name: _summary(series) for name, series in measured.items()}


def synchronize(device: torch.device) -> None:
    """Waits for a GPU."""
    if device.type == "cuda":
        torch.cuda.synchronize()


def _summary(series: list[list[float]]) -> Timing:
    medians = [statistics.median(samples) for samples in series]
    middle = statistics.median([sample for samples in series for sample in samples])
    return Timing(middle, (max(medians) - min(medians)) / middle)
