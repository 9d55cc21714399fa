# SPDX-License-Identifier: Apache-2.0
"""The teacher's latents and text embeddings on disk: drawn once, trained on for many runs."""

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from safetensors import safe_open

from ..files import lock, recover_folder
from ..progress import Bar
from ..rollouts import prepared
from .identity import differences
from .layout import InputLayout, TeacherBatch, TeacherRow, keys_by_name
from .manifest import Manifest
from .recording import TeacherRecorder
from .shards import find_fault, hash_path, write_tensors


logger = logging.getLogger(__name__)
_SHARD_PROMPTS = 64


class TeacherCache:
    """What a teacher drew for a list of prompts, in a folder of safetensors shards. Read-only once built.

    Make one with [`TeacherCache.build`] or [`TeacherCache.open`].

    Args:
        folder (`os.PathLike`): where it lies.
        manifest ([`Manifest`]): of that folder.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest) -> None:
        self.folder = pathlib.Path(folder)
        self.manifest = manifest
        self._files: dict[int, Any] = {}

    @classmethod
    def build(
        cls, recorder: TeacherRecorder, folder: str | os.PathLike[str], *, process: int = 0, processes: int = 1
    ) -> "TeacherCache":
        """Draws what is missing, and opens the cache.

        The pipeline runs with its own scheduler, guidance and resolution. An interrupted build goes on where it
        stopped and ends with the same bytes as an uninterrupted one; a complete cache is only checked.

        Args:
            recorder ([`TeacherRecorder`]): draws the prompts, a row each.
            folder (`os.PathLike`): where the cache is, or is to be.
            process (`int`, *optional*, defaults to 0): this process draws every `processes`-th shard, from this one.
            processes (`int`, *optional*, defaults to 1): processes that build the same folder. Each returns when its
                own shards are done, so wait for all before reading.

        Raises:
            ValueError: if the folder holds a cache made from something else (nothing is overwritten; the message
                names what differs), and see [`TeacherRecorder`].
            BlockingIOError: if another run is drawing it.
            OSError: if the disk is full.
        """
        target = pathlib.Path(folder)
        identity = recorder.identity()
        manifest = Manifest.read(target)
        if manifest is not None:
            found = differences(manifest.identity, identity)
            if found:
                raise ValueError(
                    f"{target} holds a teacher cache made from something else ({found}). Nothing was changed. Use "
                    "another folder, or delete this one."
                )
            cache = cls(target, manifest)
            if not any(cache.faults(process, processes).values()):
                return cache
        # The first process keeps other runs from drawing the same cache, for all of its run.
        locked = lock(target, "another run, which is drawing it") if process == 0 else contextlib.nullcontext()
        with prepared(recorder.pipeline), locked:
            manifest = Manifest.read(target)
            if manifest is None:
                manifest = _new_manifest(identity, recorder)
                if process == 0:
                    manifest.write(target)
            cache = cls(target, manifest)
            cache._draw(recorder, process, processes)
        return cache

    @classmethod
    def open(cls, folder: str | os.PathLike[str], expected_fingerprint: str | None = None) -> "TeacherCache":
        """Opens a complete cache, after checking every file's SHA-256.

        Raises:
            FileNotFoundError: if there is no cache.
            ValueError: if it is of another fingerprint, incomplete or corrupted (the message names the file).
        """
        target = pathlib.Path(folder)
        manifest = Manifest.read(target)
        if manifest is None:
            raise FileNotFoundError(f"{target} holds no teacher cache (its manifest is missing).")
        if expected_fingerprint is not None and manifest.fingerprint != expected_fingerprint:
            raise ValueError(
                f"{target} was made from something else than expected: its fingerprint is {manifest.fingerprint}, not "
                f"{expected_fingerprint}. Use another folder, or the teacher, scheduler, call and prompts it is of."
            )
        cache = cls(target, manifest)
        for number, fault in cache.faults().items():
            if fault is not None:
                raise ValueError(
                    f"{cache.shard_path(number)} {fault}. Build the cache again with the same teacher: what is "
                    "missing or damaged is drawn anew, the rest is kept."
                )
        return cache

    def __len__(self) -> int:
        return len(self.manifest.prompts)

    @property
    def layout(self) -> InputLayout:
        """How the pipeline calls its denoiser."""
        return self.manifest.layout

    def faults(self, process: int = 0, processes: int = 1) -> dict[int, str | None]:
        """What is wrong with each shard of a process; `None` where nothing is."""
        shards = -(-len(self) // self.manifest.shard_prompts)
        return {number: find_fault(self.shard_path(number)) for number in range(process, shards, processes)}

    def shard_path(self, number: int) -> pathlib.Path:
        """File of a shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def shard_rows(self, number: int) -> range:
        """Rows in a shard."""
        size = self.manifest.shard_prompts
        return range(number * size, min((number + 1) * size, len(self)))

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> TeacherBatch:
        """Rows of the cache.

        Args:
            indices (`Sequence[int]`): which rows.
            generator (`torch.Generator`, *optional*): draws the step of each row's rollout state.

        Raises:
            IndexError: if there is no such row.
        """
        return self.layout.assemble([self._row(int(index)) for index in indices], generator)

    def _row(self, index: int) -> TeacherRow:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} is not between 0 and {len(self) - 1}.")
        number = index // self.manifest.shard_prompts
        if number not in self._files:
            file = safe_open(self.shard_path(number), framework="pt")
            self._files[number] = (file, keys_by_name(file.keys()))
        file, keys = self._files[number]
        return TeacherRow.of({path: file.get_tensor(key) for path, key in keys[_row_name(index)].items()})

    def _draw(self, recorder: TeacherRecorder, process: int, processes: int) -> None:
        """Draws the shards of this process that are not there."""
        self.folder.mkdir(parents=True, exist_ok=True)
        faults = self.faults(process, processes)
        missing = [number for number, fault in faults.items() if fault is not None]
        done, total = (
            sum(len(self.shard_rows(number)) for number, fault in faults.items() if (fault is None) == intact)
            for intact in (True, False)
        )
        if missing and done:
            logger.info("%s: %d prompts were cached already.", self.folder, done)
        batches, batch_size = list(recorder.rollouts.batches()), recorder.rollouts.batch_size
        with Bar(None, "Caching the teacher", total=total, visible=bool(total)) as progress:
            for number in missing:
                path, indices = self.shard_path(number), self.shard_rows(number)
                for file in (path, hash_path(path)):  # of this process alone: others may be writing theirs
                    recover_folder(file)
                if path.exists():
                    logger.warning("%s %s; it is drawn again.", path, faults[number])
                tensors: dict[str, torch.Tensor] = {}
                for start in indices[::batch_size]:
                    rows = recorder.record(self.layout, batches[start // batch_size])
                    for index, row in enumerate(rows, start):
                        tensors.update(row.tensors(_row_name(index)))
                    progress.update(len(rows))
                if number == missing[0]:
                    _check_space(self.folder, tensors, shards=total / len(indices))
                write_tensors(path, tensors)


def _new_manifest(identity: Mapping[str, Any], recorder: TeacherRecorder) -> Manifest:
    # Whole batches in a shard, so that a shard's content does not depend on where an interrupted build went on.
    size = -(-_SHARD_PROMPTS // recorder.rollouts.batch_size) * recorder.rollouts.batch_size
    return Manifest(identity, recorder.rollouts.prompts, size, recorder.find_layout())


def _row_name(index: int) -> str:
    return f"{index:06d}"


def _check_space(folder: pathlib.Path, tensors: Mapping[str, torch.Tensor], *, shards: float) -> None:
    """Refuses a cache that cannot fit after its first shard, not after hours; `shards` of its size are to come."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) * shards
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The teacher cache needs {needed / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} GB are free. "
            "Use another folder, fewer prompts or rollout_states, or the online mode, which keeps nothing on disk."
        )
