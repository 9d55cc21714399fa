# SPDX-License-Identifier: Apache-2.0
"""Peak memory of the running process, split into what it allocated and what it has mapped from files (Linux)."""

import contextlib
import dataclasses
import os
import threading
from collections.abc import Iterator
from pathlib import Path


SAMPLE_SECONDS = 0.01
STATUS = Path("/proc/self/status")


@dataclasses.dataclass
class Peak:
    """Bytes; filled when the block of [`measure_peak`] ends.

    Args:
        before (`int`): resident when the block began: interpreter and libraries.
        resident (`int`): highest resident size in the block (`VmHWM`, exact).
        anonymous (`int`): highest allocated part of it (`RssAnon`, sampled): what cannot be dropped by the kernel.
        mapped (`int`): highest part mapped from files (`RssFile`, sampled): the page cache's, reclaimable.
    """

    before: int = 0
    resident: int = 0
    anonymous: int = 0
    mapped: int = 0


def status(field: str) -> int:
    """A field of /proc/self/status in bytes, e.g. `VmRSS`, `RssAnon`, `RssFile`."""
    for line in STATUS.read_text().splitlines():
        if line.startswith(f"{field}:"):
            return int(line.split()[1]) * 1024
    raise KeyError(field)


@contextlib.contextmanager
def measure_peak() -> Iterator[Peak]:
    """Measures the block it surrounds."""
    peak = Peak(before=status("VmRSS"))
    Path("/proc/self/clear_refs").write_text("5")  # sets VmHWM back to the current resident size
    done = threading.Event()

    def sample() -> None:
        while not done.wait(SAMPLE_SECONDS):
            peak.anonymous = max(peak.anonymous, status("RssAnon"))
            peak.mapped = max(peak.mapped, status("RssFile"))

    sampler = threading.Thread(target=sample, daemon=True)
    sampler.start()
    try:
        yield peak
    finally:
        done.set()
        sampler.join()
        peak.resident = status("VmHWM")


def drop_from_page_cache(folder: Path) -> None:
    """Makes the next read of the files of `folder` come from the disk."""
    for file in folder.iterdir():
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.posix_fadvise(descriptor, 0, 0, os.POSIX_FADV_DONTNEED)
        os.close(descriptor)
