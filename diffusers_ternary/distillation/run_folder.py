# SPDX-License-Identifier: Apache-2.0
"""The folder of a run: whose it is, and that nobody else writes there."""

import contextlib
import json
import pathlib
from collections.abc import Iterator, Mapping
from typing import Any

from ..files import is_leftover, lock, read_json, recover_contents, recover_folder, write_json
from .config import FORMER_NAMES


_IDENTITY = "run.json"


def check_run(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    """Checks that a folder is empty or holds a run of the same identity. Nothing is written.

    Args:
        folder (`pathlib.Path`): the output folder.
        identity (`Mapping[str, Any]`): JSON values that the result depends on.

    Raises:
        ValueError: if it holds another run; names what differs.
        FileExistsError: if it holds something else.
    """
    stored = read_json(folder / _IDENTITY, remedy="Choose another output folder, or delete this one.")
    known = {_current_name(name): value for name, value in (stored or {}).items()}
    if stored is None:
        if folder.is_file() or (folder.is_dir() and not all(is_leftover(path) for path in folder.iterdir())):
            raise FileExistsError(f"{folder} exists and holds no distillation run. Choose another output folder.")
        return
    differences = [
        f"{name}: {_brief(known.get(name))} there, {_brief(identity.get(name))} now"
        for name in sorted(known.keys() | identity.keys())
        if known.get(name) != identity.get(name)
    ]
    if differences:
        raise ValueError(
            f"{folder} holds the checkpoints of another run ({'; '.join(differences)}). Nothing was changed. Choose "
            "another output folder, delete this one, or repeat the settings it was started with."
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


def flat(settings: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Nested JSON settings as one level with dotted names, so that differences can be named."""
    found: dict[str, Any] = {}
    for name, value in json.loads(json.dumps(dict(settings))).items():
        if isinstance(value, dict) and value:
            found.update(flat(value, f"{prefix}{name}."))
        else:
            found[f"{prefix}{name}"] = value
    return found


def _current_name(name: str) -> str:
    """Of a setting, as dotted names call it today."""
    part, _, field = name.rpartition(".")
    return f"{part}.{FORMER_NAMES.get(field, field)}" if part == "distill_config" else name


def _brief(value: Any) -> str:
    text = json.dumps(value)
    return text if len(text) <= 40 else f"{text[:37]}..."
