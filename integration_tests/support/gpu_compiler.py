# SPDX-License-Identifier: Apache-2.0
"""What the host code would launch on a GPU that is not there, compiled for it and read.

The host code runs on fake tensors, which have shapes and no values: reading a value (a hidden synchronization) raises.
Each launch goes through Triton's own specialization of arguments and through its compiler, and not to a device.
"""

import contextlib
import dataclasses
import os
import re
import subprocess
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import triton
from torch._subclasses import FakeTensorMode
from triton.backends.compiler import GPUTarget
from triton.runtime import driver
from triton.runtime.jit import JITFunction, MockTensor

from diffusers_ternary.kernels.triton.dispatch import Target


NVIDIA_TOOLS = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
# Bytes of shared memory per program, from the vendors' programming guides.
TARGETS = {
    "sm_80": Target("cuda", 80, 163 * 1024),
    "sm_86": Target("cuda", 86, 99 * 1024),
    "sm_89": Target("cuda", 89, 99 * 1024),
    "sm_90": Target("cuda", 90, 227 * 1024),
    "sm_120": Target("cuda", 120, 99 * 1024),
    "gfx942": Target("hip", "gfx942", 64 * 1024),
}


@dataclasses.dataclass(frozen=True)
class Compiled:
    """A launch, and what the compiler made of it."""

    name: str
    grid: tuple[int, ...]
    text: str = ""  # PTX or amdgcn
    shared: int = 0
    spills: int = 0
    cubin: bytes | None = None
    specialization: tuple[Any, ...] = ()  # what its code depends on, where it was not compiled


def _specialization(kernel: JITFunction, args: tuple[Any, ...], options: dict[str, Any]) -> tuple[Any, ...]:
    """Dtypes of pointers, and of integers whether Triton compiles them in (1) or knows them to be aligned (16)."""
    fixed = {parameter.num for parameter in kernel.params if parameter.do_not_specialize}

    def kind(index: int, value: Any) -> Any:
        if isinstance(value, torch.Tensor):
            return value.dtype
        if isinstance(value, int) and index not in fixed:
            return 1 if value == 1 else value % 16 == 0
        return type(value)

    return (*(kind(index, value) for index, value in enumerate(args)), *sorted(options.items()))


class _Driver:
    """Names a device to Triton, and has none."""

    def __init__(self, name: str) -> None:
        target = TARGETS[name]
        warp = 64 if target.backend == "hip" else 32
        self._target = GPUTarget(target.backend, target.arch, warp)
        self._device = list(TARGETS).index(name)  # Triton remembers compiled kernels by device

    def get_current_target(self) -> GPUTarget:
        return self._target

    def get_current_device(self) -> int:
        return self._device

    def get_current_stream(self, device: int) -> int:
        return 0


@contextlib.contextmanager
def launches_on(name: str, *, compiles: bool = True) -> Iterator[list[Compiled]]:
    """Inside, tensors are fake; launches are compiled for the named target, unless told not to, and listed."""
    launches: list[Compiled] = []
    original = JITFunction.run

    def run(kernel: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> Any:
        if not compiles:
            specialization = _specialization(kernel, args, options)
            launches.append(Compiled(kernel.fn.__name__, tuple(grid), specialization=specialization))
            return None
        values = [MockTensor(a.dtype, list(a.shape)) if isinstance(a, torch.Tensor) else a for a in args]
        compiled = original(kernel, *values, grid=grid, warmup=True, **options)
        cubin = compiled.asm.get("cubin")
        launches.append(
            Compiled(
                kernel.fn.__name__,
                tuple(grid),
                compiled.asm["ptx" if cubin else "amdgcn"],
                compiled.metadata.shared,
                _local_bytes(cubin) if cubin else _amd_spills(compiled.asm["amdgcn"]),
                cubin,
            )
        )
        return compiled

    with (
        mock.patch.object(JITFunction, "run", run),
        mock.patch.object(driver, "_active", _Driver(name)),
        FakeTensorMode(),
    ):
        yield launches


def _amd_spills(text: str) -> int:
    return sum(int(count) for count in re.findall(r"\.[vs]gpr_spill_count:\s+(\d+)", text))


def _local_bytes(cubin: bytes) -> int:
    """Bytes of stack and local memory per thread, which spilled registers take."""
    return sum(int(count) for count in re.findall(r"(?:STACK|LOCAL):(\d+)", _cuobjdump("-res-usage", cubin)))


def _cuobjdump(option: str, cubin: bytes) -> str:
    path = Path(os.environ.get("TMPDIR", "/tmp")) / f"ternary-{os.getpid()}.cubin"
    path.write_bytes(cubin)
    try:
        command = [NVIDIA_TOOLS / "cuobjdump", option, path]
        return subprocess.run(command, capture_output=True, text=True, check=True).stdout
    finally:
        path.unlink()


@dataclasses.dataclass(frozen=True)
class Loop:
    """An innermost loop of machine code that multiplies matrices."""

    instructions: int
    matrix_instructions: int


def matrix_loops(cubin: bytes) -> list[Loop]:
    """The innermost loops with matrix instructions, in the order of the code."""
    code = re.findall(r"^\s+/\*([0-9a-f]{4,})\*/\s+(.*?)\s*;", _cuobjdump("-sass", cubin), re.MULTILINE)
    lines = [(int(address, 16), text) for address, text in code]
    spans = []
    for address, text in lines:
        branch = re.search(r"\bBRA\S* (?:\S+, )?0x([0-9a-f]+)", text)
        if branch and int(branch[1], 16) <= address:
            spans.append((int(branch[1], 16), address))
    loops = []
    for first, last in spans:
        if any(first <= a and b <= last and (a, b) != (first, last) for a, b in spans):
            continue
        inside = [text for address, text in lines if first <= address <= last]
        matrix = sum(bool(re.search(r"\b(?:IMMA|HMMA|QMMA|[HIQ]GMMA)\.", text)) for text in inside)
        if matrix:
            loops.append(Loop(sum("NOP" not in text for text in inside), matrix))
    return loops
