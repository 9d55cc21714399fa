# SPDX-License-Identifier: Apache-2.0
"""Rows of a benchmark to a CSV file that names the device and the versions."""

import csv
import importlib.metadata
import platform
from collections.abc import Sequence
from pathlib import Path

import torch


PACKAGES = ("torch", "triton", "diffusers", "torchao", "bitsandbytes", "gemlite", "sdnq")


def device_name(device: torch.device) -> str:
    """Name of the GPU, or of the processor in a dry run."""
    return torch.cuda.get_device_name(device) if device.type == "cuda" else f"cpu-{platform.machine()}"


def versions() -> str:
    """Versions of the packages that matter, those that are installed."""
    found = []
    for name in PACKAGES:
        try:
            found.append(f"{name} {importlib.metadata.version(name)}")
        except importlib.metadata.PackageNotFoundError:
            continue
    return ", ".join([*found, f"CUDA {torch.version.cuda}"])


class Table:
    """A CSV file that has each row as soon as it is known, with the device and the versions in it.

    Args:
        path (`Path`): the file; an older one is replaced.
        header (`Sequence[str]`): names of the columns.
        device (`torch.device`): what was measured.
    """

    def __init__(self, path: Path, header: Sequence[str], device: torch.device) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        self.path, self._origin = path, (device_name(device), versions())
        self._write("w", [*header, "device", "versions"])

    def add(self, *row: object) -> None:
        """Appends a row; it is on the disk on return."""
        self._write("a", [*row, *self._origin])

    def _write(self, mode: str, row: Sequence[object]) -> None:
        with self.path.open(mode, newline="", encoding="utf-8") as file:
            csv.writer(file).writerow(row)
