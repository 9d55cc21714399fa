# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whose it is, and that nobody else writes there."""

import contextlib
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

import torch
from torch import nn

from ..files import is_leftover, lock, new_folder, read_json, recover_contents, recover_folder, write_json
from ..rollouts import float_dtype
from .config import FORMER_NAMES
from .identity import differences


_IDENTITY = "run.json"


def check_run(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Checks that a folder is empty or holds a run of the same identity. Nothing is written.

    Args:
        folder (`pathlib.Path`): the output folder.
        identity (`Mapping[str, Any]`): JSON values that the result depends on, with dotted names.

    Raises:
        ValueError: if it holds another run; names what differs.
        FileExistsError: if it holds something else.
    """
    known = read_json(folder / _IDENTITY, remedy="Choose another output folder, or delete this one.")
    if known is None:
        if folder.is_file() or (folder.is_dir() and not all(is_leftover(path) for path in folder.iterdir())):
            raise FileExistsError(f"{folder} exists and holds no distillation run. Choose another output folder.")
        return
    found = differences({_current_name(name): value for name, value in known.items()}, identity)
    if found:
        raise ValueError(
            f"{folder} holds the checkpoints of another run ({found}). Nothing was changed. Choose another output "
            "folder, delete this one, or repeat the settings it was started with."
        )


@contextlib.contextmanager
def own_run(folder: pathlib.Path, *, main_process: bool) -> Iterator[None]:
    """Keeps other distillations out of a folder until the block ends; the main process does it for all of a run.

    Raises:
        BlockingIOError: if one is using it.
    """
    with lock(folder, "another distillation") if main_process else contextlib.nullcontext():
        yield


def recover_run(folder: pathlib.Path) -> None:
    """Removes what a killed run of this folder was writing, and puts back what it was replacing."""
    recover_folder(folder)
    for part in ("", "checkpoints", "phases"):
        recover_contents(folder / part)


def start_run(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Marks the folder as this run's."""
    folder.mkdir(parents=True, exist_ok=True)
    write_json(folder / _IDENTITY, identity)


def save_student(student: nn.Module, folder: pathlib.Path) -> None:
    """Saves a packed denoiser, in place of an earlier one."""
    with new_folder(folder) as temporary:
        student.save_pretrained(temporary)  # type: ignore[operator]


def load_student(folder: pathlib.Path, teacher: nn.Module, device: torch.device) -> nn.Module:
    """A packed denoiser that computes in the dtype of its teacher."""
    student = type(teacher).from_pretrained(folder, dtype=float_dtype(teacher))  # type: ignore[attr-defined]
    return student.to(device).eval()


def _current_name(name: str) -> str:
    """What a setting is called today, of a run that may be older."""
    part, _, setting = name.rpartition(".")
    return f"{part}.{FORMER_NAMES.get(setting, setting)}" if part == "distill_config" else name
