# SPDX-License-Identifier: Apache-2.0
"""The repeated blocks of a denoiser: which they are, and what comes out of them."""

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn


_FIRST_NUMBER = re.compile(r"^(.*?\.\d+)(\.|$)")


def block_names(layers: Iterable[str]) -> tuple[str, ...]:
    """Names of the outermost numbered modules that hold the given layers, e.g. `transformer_blocks.0`."""
    found = (_FIRST_NUMBER.match(name) for name in layers)
    return tuple(dict.fromkeys(match.group(1) for match in found if match))


class Interrupted(Exception):  # noqa: N818 - no error: the rest of the forward is not needed
    """Raised by a [`BlockRecorder`] after its last block."""


class BlockRecorder:
    """Keeps the outputs of blocks during one forward, in the order in which they run.

    Args:
        model (`nn.Module`): the denoiser.
        names (`Iterable[str]`): blocks to record.
        stop_after (`str`, *optional*): raise [`Interrupted`] when this block is done.
    """

    def __init__(self, model: nn.Module, names: Iterable[str], *, stop_after: str | None = None) -> None:
        self.outputs: dict[str, tuple[torch.Tensor, ...]] = {}
        self._stop_after = stop_after
        self._recording = False
        self._handles = [model.get_submodule(name).register_forward_hook(self._hook(name)) for name in names]

    def __enter__(self) -> "BlockRecorder":
        self.outputs = {}
        self._recording = True
        return self

    def __exit__(self, *error: object) -> None:
        # Gradient checkpointing runs the blocks again in the backward: those outputs are not wanted.
        self._recording = False

    def close(self) -> None:
        """Takes the hooks off the model."""
        for handle in self._handles:
            handle.remove()

    def _hook(self, name: str) -> Any:
        def record(module: nn.Module, args: Any, output: Any) -> None:
            if not self._recording:
                return
            parts = output if isinstance(output, (tuple, list)) else (output,)
            self.outputs[name] = tuple(part for part in parts if isinstance(part, torch.Tensor))
            if name == self._stop_after:
                raise Interrupted

        return record
