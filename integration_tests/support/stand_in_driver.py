# SPDX-License-Identifier: Apache-2.0
"""A GPU's driver that lists launches instead of making them: everything before that last step is the real code.

Tensors are on the CPU, so addresses are real; kernels are compiled for a named GPU; nothing is computed.
"""

import contextlib
from collections.abc import Iterator
from types import SimpleNamespace
from typing import Any, ClassVar, NamedTuple
from unittest import mock

import torch
from triton.backends.compiler import GPUTarget
from triton.runtime import driver

from diffusers_ternary.kernels.triton import prepared, product
from diffusers_ternary.kernels.triton.dispatch import Target


class Launch(NamedTuple):
    """What the launcher of a compiled kernel was called with; tensors as their addresses."""

    kernel: str
    grid: tuple[int, int, int]
    arguments: tuple[Any, ...]


class _Driver:
    # Of the class: compiled kernels, and their launchers with them, outlive a stand-in.
    launches: ClassVar[list[Launch] | None] = None

    def __init__(self, target: Target) -> None:
        self._target = target
        self.utils = SimpleNamespace(
            get_device_properties=lambda _: {"max_shared_mem": target.shared_memory},
            load_binary=lambda *_: (object(), 1, 32, 0, 1024),
            unload_module=lambda _: None,
        )

    def get_current_target(self) -> GPUTarget:
        return GPUTarget(self._target.backend, self._target.arch, 64 if self._target.backend == "hip" else 32)

    def get_current_device(self) -> int:
        return 1000 + hash(self._target) % 1000  # Triton remembers compiled kernels by device

    def get_current_stream(self, device: int) -> int:
        return 0

    def launcher_cls(self, source: Any, metadata: Any) -> Any:
        name = metadata.name

        def launch(grid_0: int, grid_1: int, grid_2: int, *rest: Any) -> None:
            if _Driver.launches is not None:
                # stream, function, packed metadata, launch metadata, two hooks, then the kernel's own arguments
                arguments = tuple(v.data_ptr() if isinstance(v, torch.Tensor) else v for v in rest[6:])
                _Driver.launches.append(Launch(name, (grid_0, grid_1, grid_2), arguments))

        return launch


@contextlib.contextmanager
def standing_in(target: Target, *, noted: bool = True) -> Iterator[list[Launch]]:
    """Inside, tensors on the CPU are served as if they were on the target; yields the launches, if they are noted."""
    launches: list[Launch] = []
    with (
        mock.patch.object(_Driver, "launches", launches if noted else None),
        mock.patch.object(driver, "_active", _Driver(target)),
        mock.patch.object(product, "supported_target", return_value=target),
        mock.patch.object(product, "tuner_of", return_value=None),
        mock.patch.object(product, "passes", return_value=True),  # nothing is computed that could be compared
        mock.patch.object(prepared, "is_capturing", return_value=False),
    ):
        yield launches
