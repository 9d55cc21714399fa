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


def write_csv(path: Path, header: Sequence[str], rows: Sequence[Sequence[object]], device: torch.device) -> None:
    """Writes rows with the device and the versions in each."""
    path.parent.mkdir(parents=True, exist_ok=True)
    name, software = device_name(device), versions()
    with path.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow([*header, "device", "versions"])
        writer.writerows([*row, name, software] for row in rows)
