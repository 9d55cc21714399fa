# SPDX-License-Identifier: Apache-2.0
"""What dispatch must know of a torch device, asked once."""

import contextlib
import functools
from contextlib import AbstractContextManager

import torch
import triton

from .dispatch import Target
from .trial import Trials
from .tuning import PlanCache, Tuner, cache_file, cache_folder, measure_on_stream


# The smallest limit among the targets: a tile that fits here fits everywhere.
SMALLEST_SHARED_MEMORY = 64 * 1024


@functools.cache
def target_of(device_type: str, index: int) -> Target | None:
    """The target of a device, or `None` where Triton has nothing for it."""
    if device_type == "cuda":
        properties = torch.cuda.get_device_properties(index)
        if torch.version.hip is not None:
            return Target("hip", properties.gcnArchName.split(":")[0], SMALLEST_SHARED_MEMORY)
        shared = getattr(properties, "shared_memory_per_block_optin", SMALLEST_SHARED_MEMORY)
        return Target("cuda", 10 * properties.major + properties.minor, shared)
    if device_type == "xpu":
        return Target("xpu", "xpu", SMALLEST_SHARED_MEMORY)
    if device_type == "cpu" and triton.knobs.runtime.interpret:
        return Target("interpret", "cpu", 1 << 20)
    return None


def supported_target(device: torch.device) -> Target:
    """The target of a device.

    Raises:
        RuntimeError: if Triton cannot serve it.
    """
    target = target_of(device.type, device.index or 0)
    if target is None or not target.supported:
        raise RuntimeError(f"No Triton kernel for {device}: use the reference implementation.")
    return target


@functools.cache
def tuner_of(device_type: str, index: int) -> Tuner | None:
    """The tuner of a device; `None` under the interpreter, where time means nothing."""
    target = target_of(device_type, index)
    if target is None or target.backend == "interpret":
        return None
    device = torch.device(device_type, index)
    name = torch.get_device_module(device_type).get_device_name(index)
    return Tuner(target, PlanCache(cache_file(name, cache_folder())), measure_on_stream(device))


@functools.cache
def trials_of(device_type: str, index: int) -> Trials:
    """What became of the kernels of a device, in this process."""
    return Trials(f"{device_type}:{index}")


def is_capturing(device: torch.device) -> bool:
    """Whether a CUDA graph is being recorded on the current stream."""
    return device.type == "cuda" and torch.cuda.is_current_stream_capturing()


def current(device: torch.device) -> AbstractContextManager[object]:
    """Makes a device the current one, where Triton launches."""
    if device.type == "cpu":
        return contextlib.nullcontext()
    return torch.get_device_module(device.type).device(device)
