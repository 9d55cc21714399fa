# SPDX-License-Identifier: Apache-2.0
"""Checkpoints of the training: complete or absent, free of pickles, bit-exact."""

import dataclasses
import pathlib
import shutil
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from safetensors.torch import load_file, save_file
from torch import nn
from torch.distributed.tensor import DTensor, distribute_tensor
from torch.nn.parallel import DistributedDataParallel

from ..files import file_sha256, new_folder, read_json, write_json
from ..files.seals import is_sealed, seal
from .trainable import whole


_TENSORS, _PROGRESS = "state.safetensors", "progress.json"
_MODEL, _OPTIMIZER, _NUMBER = "model.", "optimizer.", "number:"
_PREFIX = "step-"
_REMEDY = "Delete the checkpoints (or the whole folder of the run) to train from the start."


@dataclasses.dataclass(frozen=True)
class Checkpoint:
    """What lies in the folder of a checkpoint.

    Args:
        folder (`pathlib.Path`): of the checkpoint.
        step (`int`): updates done, over all phases.
        progress (`Mapping[str, Any]`): JSON values of the run.
        state_sha256 (`str`): hash of the file with the tensors.
    """

    folder: pathlib.Path
    step: int
    progress: Mapping[str, Any]
    state_sha256: str


def latest_checkpoint(folder: pathlib.Path) -> Checkpoint | None:
    """The newest complete checkpoint in a folder.

    Raises:
        ValueError: if it is not as it was written; names the file.
    """
    found = [path for path in folder.glob(f"{_PREFIX}*") if (path / _PROGRESS).is_file()]
    if not found:
        return None
    newest = max(found, key=lambda path: path.name)
    record = read_json(newest / _PROGRESS, remedy=_REMEDY) or {}
    if not is_sealed(record):
        raise ValueError(f"{newest / _PROGRESS} is not as it was written. {_REMEDY}")
    if newest.name != _folder_name(record["step"]):
        raise ValueError(f"{newest} is the checkpoint of step {record['step']} under another name. {_REMEDY}")
    return Checkpoint(newest, record["step"], record["progress"], record["state_sha256"])


def _folder_name(step: int) -> str:
    return f"{_PREFIX}{step:08d}"


def save_checkpoint(
    folder: pathlib.Path,
    step: int,
    model: nn.Module,
    optimizer: torch.optim.Optimizer,
    progress: Mapping[str, Any],
    *,
    main_process: bool,
) -> None:
    """Writes what is trained and the optimizer's state; older checkpoints go when the new one is complete.

    All processes have to call; sharded states are gathered, and the main process writes.
    """
    tensors = _state(model, optimizer)
    if not main_process:
        return
    folder.mkdir(parents=True, exist_ok=True)
    with new_folder(folder / _folder_name(step)) as temporary:
        save_file(tensors, temporary / _TENSORS)
        record = {"step": step, "progress": dict(progress), "state_sha256": file_sha256(temporary / _TENSORS)}
        write_json(temporary / _PROGRESS, seal(record))
    for old in folder.glob(f"{_PREFIX}*"):
        if old.name != _folder_name(step):
            shutil.rmtree(old, ignore_errors=True)


@torch.no_grad()
def load_checkpoint(checkpoint: Checkpoint, model: nn.Module, optimizer: torch.optim.Optimizer) -> None:
    """Puts a checkpoint's state into a model and an optimizer made like those it was saved from.

    Every process reads the file. Learning rates and the like come with the run's settings, not from here.

    Raises:
        ValueError: if the file is not as it was written; names it.
    """
    path = checkpoint.folder / _TENSORS
    if not path.is_file() or file_sha256(path) != checkpoint.state_sha256:
        raise ValueError(f"{path} is missing or not as it was written. {_REMEDY}")
    stored, parameters = load_file(path), dict(_trained(model))
    missing = sorted(name for name in parameters if f"{_MODEL}{name}" not in stored)
    if missing:
        raise ValueError(f"{path} holds no {missing[0]}, which is trained now. {_REMEDY}")
    for key, tensor in stored.items():
        if key.startswith(_MODEL):
            parameter = parameters[key.removeprefix(_MODEL)]
            parameter.copy_(_like(parameter, tensor))
            continue
        field, _, name = key.removeprefix(_OPTIMIZER).partition(".")
        value = _like(parameters[name], tensor)
        state = optimizer.state[parameters[name]]
        if field.startswith(_NUMBER):
            state[field.removeprefix(_NUMBER)] = value.item()
        else:
            state[field] = value


def _like(parameter: torch.Tensor, stored: torch.Tensor) -> torch.Tensor:
    """A stored tensor as the parameter is: sharded over the same processes, on the same device."""
    if stored.dim() == 0:
        return stored.clone()  # the count of steps, which AdamW keeps on the CPU
    if isinstance(parameter, DTensor) and stored.shape == parameter.shape:
        return distribute_tensor(stored.to(parameter.device), parameter.device_mesh, parameter.placements)
    # Out of the file's memory, whose alignment changes the last bit of sums.
    return stored.to(parameter.device).clone()


def _trained(model: nn.Module) -> Iterator[tuple[str, nn.Parameter]]:
    inner = model.module if isinstance(model, DistributedDataParallel) else model
    for name, parameter in inner.named_parameters():
        if parameter.requires_grad:
            yield name, parameter


def _state(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, torch.Tensor]:
    tensors = {}
    for name, parameter in _trained(model):
        tensors[f"{_MODEL}{name}"] = whole(parameter).cpu().contiguous()
        for field, value in optimizer.state[parameter].items():
            if isinstance(value, torch.Tensor):
                tensors[f"{_OPTIMIZER}{field}.{name}"] = whole(value).cpu().contiguous()
            elif isinstance(value, int):
                tensors[f"{_OPTIMIZER}{_NUMBER}{field}.{name}"] = torch.tensor(value)
    return tensors
