# SPDX-License-Identifier: Apache-2.0
"""The repeated blocks of a denoiser: which they are, and what comes out of them."""

import contextlib
import re
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn


_FIRST_NUMBER = re.compile(r"^(.*?\.\d+)(\.|$)")


def block_names(layers: Iterable[str]) -> tuple[str, ...]:
    """Names of the outermost numbered modules that hold the given layers, e.g. `transformer_blocks.0`."""
    found = (_FIRST_NUMBER.match(name) for name in layers)
    return tuple(dict.fromkeys(match.group(1) for match in found if match))


class _Interrupted(Exception):  # noqa: N818 - no error: the rest of the forward is not needed
    pass


@contextlib.contextmanager
def recorded_blocks(
    model: nn.Module, names: Iterable[str], *, stop_after: str | None = None
) -> Iterator[dict[str, tuple[torch.Tensor, ...]]]:
    """Keeps the outputs of blocks while the model runs inside, in the order in which they run.

    Hooks are gone afterward: gradient checkpointing runs the blocks again, and those outputs are not wanted.

    Args:
        model (`nn.Module`): the denoiser.
        names (`Iterable[str]`): blocks to record.
        stop_after (`str`, *optional*): end what runs inside when this block is done.
    """
    outputs: dict[str, tuple[torch.Tensor, ...]] = {}

    def record(name: str, output: Any) -> None:
        parts = output if isinstance(output, (tuple, list)) else (output,)
        outputs[name] = tuple(part for part in parts if isinstance(part, torch.Tensor))
        if name == stop_after:
            raise _Interrupted

    handles = [
        model.get_submodule(name).register_forward_hook(lambda _, args, output, name=name: record(name, output))
        for name in names
    ]
    try:
        yield outputs
    except _Interrupted:
        pass
    finally:
        for handle in handles:
            handle.remove()
