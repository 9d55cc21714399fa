# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the training: complete or absent, free of pickles, bit-exact."""

import contextlib
import dataclasses
import json
import os
import pathlib
import shutil
import tempfile
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.checkpoint.state_dict import (
    StateDictOptions,
    get_model_state_dict,
    get_optimizer_state_dict,
    set_model_state_dict,
    set_optimizer_state_dict,
)


_TENSORS, _PROGRESS = "state.safetensors", "progress.json"
_MODEL, _OPTIMIZER = "model.", "optimizer."
_PREFIX = "step-"


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """Where a run stands.

    Args:
        folder (`pathlib.Path`): of the checkpoint.
        step (`int`): updates done, over all phases.
        progress (`Mapping[str, Any]`): JSON values of the run.
    """

    folder: pathlib.Path
    step: int
    progress: Mapping[str, Any]


def latest_checkpoint(folder: pathlib.Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder."""
    found = [path for path in folder.glob(f"{_PREFIX}*") if (path / _PROGRESS).is_file()]
    if not found:
        return None
    newest = max(found, key=lambda path: path.name)
    with open(newest / _PROGRESS, encoding="utf-8") as file:
        return Checkpoint(newest, int(newest.name.removeprefix(_PREFIX)), json.load(file))


def save_checkpoint(
    folder: pathlib.Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    *,
    main_process: bool,
) -> None:
    """Writes what is trained and the optimiser's state; older checkpoints go when the new one is complete.

    All processes have to call; sharded states are gathered, and the main process writes.
    """
    tensors = _state(model, optimizer)
    if not main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with new_folder(folder / f"{_PREFIX}{step:08d}") as temporary:
        save_file(tensors, temporary / _TENSORS)
        write_json(temporary / _PROGRESS, progress)
    for old in folder.glob(f"{_PREFIX}*"):
        if old.name != f"{_PREFIX}{step:08d}":
            shutil.rmtree(old, ignore_errors=True)


def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's state into a model and an optimiser made like those it was saved from."""
    stored = load_file(checkpoint.folder / _TENSORS)
    weights: dict[str, Any] = {
        name.removeprefix(_MODEL): tensor for name, tensor in stored.items() if name.startswith(_MODEL)
    }
    set_model_state_dict(model, weights, options=_options(strict=False))
    # Hyperparameters come with the run's settings; only the tensors are restored.
    flattened = _options(flatten_optimizer_state_dict=True)
    state: dict[str, Any] = get_optimizer_state_dict(model, optimizer, options=flattened)
    for name in state:
        if f"{_OPTIMIZER}{name}" in stored:
            state[name] = stored[f"{_OPTIMIZER}{name}"]
    set_optimizer_state_dict(model, optimizer, state, options=flattened)


def _options(**options: Any) -> StateDictOptions:
    distributed = torch.distributed.is_available() and torch.distributed.is_initialized()
    return StateDictOptions(full_state_dict=True, cpu_offload=True, broadcast_from_rank0=distributed, **options)


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    gathered = StateDictOptions(full_state_dict=True, cpu_offload=True, flatten_optimizer_state_dict=True)
    weights = get_model_state_dict(model, options=dataclasses.replace(gathered, ignore_frozen_params=True))
    moments = get_optimizer_state_dict(model, optimizer, options=gathered)
    named: dict[str, Any] = {f"{_MODEL}{name}": value for name, value in weights.items()}
    named.update({f"{_OPTIMIZER}{name}": value for name, value in moments.items()})
    return {name: value.contiguous() for name, value in named.items() if isinstance(value, torch.Tensor)}


@contextlib.contextmanager
def new_folder(target: pathlib.Path) -> Iterator[pathlib.Path]:
    """A temporary folder beside `target` that replaces it when the block ends without an error."""
    temporary = pathlib.Path(tempfile.mkdtemp(prefix=f".{target.name}.", dir=target.parent))
    try:
        yield temporary
        for path in temporary.rglob("*"):
            if path.is_file():
                with open(path, "rb") as file:
                    os.fsync(file.fileno())  # a name must never be there before its content
        umask = os.umask(0)
        os.umask(umask)
        temporary.chmod(0o777 & ~umask)
        if target.exists():
            old = temporary.with_name(f"{temporary.name}.old")
            target.rename(old)
            temporary.rename(target)
            shutil.rmtree(old)
        else:
            temporary.rename(target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def write_json(path: pathlib.Path, content: Mapping[str, Any]) -> None:
    """Writes JSON so that the file is the old one or the new one, never a part."""
    temporary = path.with_name(f".{path.name}.partial")
    with open(temporary, "w", encoding="utf-8") as file:
        file.write(json.dumps(content, indent=2, ensure_ascii=False) + "\n")
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
