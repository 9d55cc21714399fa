# SPDX-License-Identifier: Apache-2.0
"""The teacher's latents and text embeddings on disk: drawn once, trained on for many runs."""

import contextlib
import logging
import os
import pathlib
import shutil
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import tqdm
from safetensors import safe_open
from safetensors.torch import load_file
from torch import nn

from ..files import lock, recover_folder, write_text
from ..rollouts import RolloutBatch, Rollouts, make_rollouts, prepared, weights_sha256
from .batch import TeacherBatch
from .layout import InputLayout, TeacherRow, assemble
from .manifest import Manifest, find_differences, join, json_values, read_manifest, split
from .recording import TeacherRecorder, find_denoiser
from .shards import find_fault, hash_path, write_tensors


logger = logging.getLogger(__name__)
_MANIFEST = "manifest.json"
_SHARED = "shared.safetensors"
_SHARD_PROMPTS = 64
_SAMPLE, _STATES, _TIMESTEPS, _INPUT = "sample", "states", "timesteps", "input"


class TeacherCache:
    """What a teacher drew for a list of prompts, in a folder of safetensors shards. Read-only once built.

    Make one with [`TeacherCache.build`] or [`TeacherCache.open`].

    Args:
        folder (`os.PathLike`): where it lies.
        manifest ([`Manifest`]): of that folder.
    """

    def __init__(self, folder: str | os.PathLike[str], manifest: Manifest) -> None:
        self.folder = pathlib.Path(folder)
        self._manifest = manifest
        self._files: dict[int, Any] = {}

    @classmethod
    def build(
        cls,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        folder: str | os.PathLike[str],
        call_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        batch_size: int = 1,
        rollout_states: int = 4,
        component: str | None = None,
        process: int = 0,
        processes: int = 1,
    ) -> "TeacherCache":
        """Draws what is missing, and opens the cache.

        The pipeline runs with its own scheduler, guidance and resolution. An interrupted build goes on where it
        stopped and ends with the same bytes as an uninterrupted one; a complete cache is only checked.

        Args:
            pipeline (`DiffusionPipeline`): the teacher.
            prompts (`Sequence[str]`): a row each.
            folder (`os.PathLike`): where the cache is, or is to be.
            call_kwargs (`Mapping[str, Any]`, *optional*): arguments of the pipeline call (steps, guidance, size, ...).
            seed (`int`, *optional*, defaults to 0): prompt i starts from the noise of seed + i.
            batch_size (`int`, *optional*, defaults to 1): prompts per pipeline call.
            rollout_states (`int`, *optional*, defaults to 4): states x_t of each trajectory to keep; 0 = none.
            component (`str`, *optional*): the denoiser; default: `transformer` or `unet`.
            process (`int`, *optional*, defaults to 0): this process draws every `processes`-th shard, from this one.
            processes (`int`, *optional*, defaults to 1): processes that build the same folder. Each returns when its
                own shards are done, so wait for all before reading.

        Raises:
            TypeError: if a prompt is not a string.
            ValueError: for bad prompts or call arguments, or if the folder holds a cache made from something else
                (nothing is overwritten; the message names what differs).
            BlockingIOError: if another run is drawing it.
            OSError: if the disk is full.
        """
        for name, value, least in (("rollout_states", rollout_states, 0), ("batch_size", batch_size, 1)):
            if not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not an integer of {least} or more.")
        rollouts = make_rollouts(pipeline, prompts, seed=seed, batch_size=batch_size, call_kwargs=call_kwargs)
        target = pathlib.Path(folder)
        identity = teacher_identity(pipeline, rollouts, rollout_states=rollout_states, component=component)
        _check_same(target, identity)
        complete = _complete(target, process, processes)
        if complete is not None:
            return complete
        recorder = TeacherRecorder(pipeline, rollouts, rollout_states=rollout_states, component=component)
        with prepared(pipeline), _writing(target, process=process):
            manifest = _read(target) or _start(target, identity, recorder, write=process == 0)
            cache = cls(target, manifest)
            _draw(cache, recorder, process, processes)
        return cache

    @classmethod
    def open(cls, folder: str | os.PathLike[str], expected_fingerprint: str | None = None) -> "TeacherCache":
        """Opens a complete cache, after checking every file's SHA-256.

        Raises:
            FileNotFoundError: if there is no cache.
            ValueError: if it is of another fingerprint, incomplete or corrupted (the message names the file).
        """
        target = pathlib.Path(folder)
        manifest = _read(target)
        if manifest is None:
            raise FileNotFoundError(f"{target} holds no teacher cache ({_MANIFEST} is missing).")
        if expected_fingerprint is not None and manifest.fingerprint != expected_fingerprint:
            raise ValueError(
                f"{target} was made from something else than expected: its fingerprint is {manifest.fingerprint}, not "
                f"{expected_fingerprint}. Use another folder, or the teacher, scheduler, call and prompts it is of."
            )
        cache = cls(target, manifest)
        for number in range(cache.shards):
            fault = find_fault(cache.shard_path(number))
            if fault is not None:
                raise ValueError(
                    f"{cache.shard_path(number)} {fault}. Build the cache again with the same teacher: what is "
                    "missing or damaged is drawn anew, the rest is kept."
                )
        return cache

    def __len__(self) -> int:
        return len(self._manifest.prompts)

    @property
    def fingerprint(self) -> str:
        """SHA-256 of everything that the content depends on."""
        return self._manifest.fingerprint

    @property
    def prompts(self) -> tuple[str, ...]:
        """The prompts, one per row."""
        return self._manifest.prompts

    @property
    def prompts_sha256(self) -> str:
        """Hash of the prompts, in order."""
        return str(self._manifest.identity["prompts_sha256"])

    @property
    def layout(self) -> InputLayout:
        """How the pipeline calls its denoiser."""
        return self._manifest.layout

    @property
    def shards(self) -> int:
        """Number of shards."""
        return -(-len(self) // self._manifest.shard_prompts)

    def shard_path(self, number: int) -> pathlib.Path:
        """File of a shard."""
        return self.folder / f"shard-{number:05d}.safetensors"

    def shard_rows(self, number: int) -> range:
        """Rows in a shard."""
        size = self._manifest.shard_prompts
        return range(number * size, min((number + 1) * size, len(self)))

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> TeacherBatch:
        """Rows of the cache.

        Args:
            indices (`Sequence[int]`): which rows.
            generator (`torch.Generator`, *optional*): draws the step of each row's rollout state.

        Raises:
            IndexError: if there is no such row.
        """
        return assemble(self.layout, [self._row(int(index)) for index in indices], generator)

    def _row(self, index: int) -> TeacherRow:
        if not 0 <= index < len(self):
            raise IndexError(f"Row {index} is not between 0 and {len(self) - 1}.")
        number = index // self._manifest.shard_prompts
        if number not in self._files:
            file = safe_open(self.shard_path(number), framework="pt")
            self._files[number] = (file, _keys_by_row(file.keys()))
        file, keys = self._files[number]
        tensors = {path: file.get_tensor(key) for path, key in keys[index].items()}
        return TeacherRow(
            sample=tensors.pop((_SAMPLE,)),
            states=tensors.pop((_STATES,), None),
            timesteps=tensors.pop((_TIMESTEPS,), None),
            inputs={path[1:]: tensor for path, tensor in tensors.items()},
        )


def teacher_identity(
    pipeline: DiffusionPipeline, rollouts: Rollouts, *, rollout_states: int, component: str | None = None
) -> dict[str, Any]:
    """Everything that a cache's content depends on, as JSON values."""
    denoiser = find_denoiser(pipeline, component)
    modules = {name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)}
    scheduler = pipeline.scheduler
    settings = {name: value for name, value in scheduler.config.items() if not name.startswith("_")}
    return json_values(
        {
            "pipeline": type(pipeline).__name__,
            "component": next(name for name, part in modules.items() if part is denoiser),
            "weights_sha256": weights_sha256(modules),
            "scheduler": {"class": type(scheduler).__name__, **settings},
            "call_kwargs": dict(rollouts.call_kwargs),
            "prompts_sha256": rollouts.sha256(),
            "seed": rollouts.seed,
            "batch_size": rollouts.batch_size,
            "rollout_states": rollout_states,
        }
    )


def _check_same(folder: pathlib.Path, identity: Mapping[str, Any]) -> None:
    if not (folder / _MANIFEST).is_file():
        return
    differences = find_differences(read_manifest(folder / _MANIFEST)["identity"], identity)
    if differences:
        raise ValueError(
            f"{folder} holds a teacher cache made from something else ({'; '.join(differences)}). Nothing was "
            "changed. Use another folder, or delete this one."
        )


def _read(folder: pathlib.Path) -> Manifest | None:
    if not (folder / _MANIFEST).is_file():
        return None
    fault = find_fault(folder / _SHARED)
    if fault is not None:
        raise ValueError(f"{folder / _SHARED} {fault}. Delete {folder} and cache again.")
    return Manifest.from_files(folder / _MANIFEST, load_file(folder / _SHARED))


def _complete(folder: pathlib.Path, process: int, processes: int) -> TeacherCache | None:
    """The cache, if nothing is missing of what this process would draw."""
    manifest = _read(folder)
    if manifest is None:
        return None
    cache = TeacherCache(folder, manifest)
    faults = (find_fault(cache.shard_path(number)) for number in range(process, cache.shards, processes))
    return cache if all(fault is None for fault in faults) else None


@contextlib.contextmanager
def _writing(folder: pathlib.Path, *, process: int) -> Iterator[None]:
    """Keeps other runs from drawing the same cache; the first process does it for all of a run."""
    with lock(folder, "another run, which is drawing it") if process == 0 else contextlib.nullcontext():
        yield


def _start(folder: pathlib.Path, identity: Mapping[str, Any], recorder: TeacherRecorder, *, write: bool) -> Manifest:
    # Whole batches in a shard, so that a shard's content does not depend on where an interrupted build went on.
    size = -(-_SHARD_PROMPTS // recorder.rollouts.batch_size) * recorder.rollouts.batch_size
    manifest = Manifest(identity, recorder.rollouts.prompts, size, recorder.find_layout())
    if write:
        folder.mkdir(parents=True, exist_ok=True)
        text, tensors = manifest.to_files()
        for path in (folder / _SHARED, hash_path(folder / _SHARED), folder / _MANIFEST):
            recover_folder(path)
        write_tensors(folder / _SHARED, tensors)
        write_text(folder / _MANIFEST, text)
    return manifest


def _draw(cache: TeacherCache, recorder: TeacherRecorder, process: int, processes: int) -> None:
    """Draws the shards of this process that are not there."""
    cache.folder.mkdir(parents=True, exist_ok=True)
    missing = list(_missing_shards(cache, range(process, cache.shards, processes)))
    batch_size = recorder.rollouts.batch_size
    done = sum(len(cache.shard_rows(number)) for number in range(process, cache.shards, processes)) - sum(
        len(cache.shard_rows(number)) for number in missing
    )
    if missing and done:
        logger.info("%s: %d prompts were cached already.", cache.folder, done)
    total = sum(len(cache.shard_rows(number)) for number in missing)
    with tqdm(total=total, desc="Caching the teacher", leave=False, disable=not total) as progress:
        for position, number in enumerate(missing):
            tensors: dict[str, torch.Tensor] = {}
            indices = cache.shard_rows(number)
            for start in range(indices.start, indices.stop, batch_size):
                part = range(start, min(start + batch_size, indices.stop))
                batch = RolloutBatch(
                    tuple(cache.prompts[i] for i in part), tuple(recorder.rollouts.seed + i for i in part)
                )
                for index, row in zip(part, recorder.record(cache.layout, batch), strict=True):
                    tensors.update(_row_tensors(index, row))
                progress.update(len(part))
            if position == 0:
                _check_space(cache.folder, tensors, rows=len(indices), total=total)
            write_tensors(cache.shard_path(number), tensors)


def _missing_shards(cache: TeacherCache, numbers: range) -> Iterator[int]:
    for number in numbers:
        path = cache.shard_path(number)
        fault = find_fault(path)
        if fault is None:
            continue
        for file in (path, hash_path(path)):  # of this process alone: others may be writing theirs
            recover_folder(file)
        if path.exists():
            logger.warning("%s %s; it is drawn again.", path, fault)
        yield number


def _check_space(folder: pathlib.Path, tensors: Mapping[str, torch.Tensor], *, rows: int, total: int) -> None:
    """Refuses a cache that cannot fit after its first shard, not after hours."""
    needed = sum(tensor.numel() * tensor.element_size() for tensor in tensors.values()) / rows * total
    free = shutil.disk_usage(folder).free
    if needed > free:
        raise OSError(
            f"The teacher cache needs {needed / 1e9:.2f} GB more in {folder}, where {free / 1e9:.2f} GB are free. "
            "Use another folder, fewer prompts or rollout_states, or the online mode, which keeps nothing on disk."
        )


def _row_tensors(index: int, row: TeacherRow) -> Iterator[tuple[str, torch.Tensor]]:
    name = f"{index:06d}"
    yield join(name, (_SAMPLE,)), row.sample
    for path, tensor in row.inputs.items():
        yield join(name, (_INPUT, *path)), tensor
    if row.states is not None and row.timesteps is not None:
        yield join(name, (_STATES,)), row.states
        yield join(name, (_TIMESTEPS,)), row.timesteps


def _keys_by_row(keys: Sequence[str]) -> dict[int, dict[tuple[str, ...], str]]:
    found: dict[int, dict[tuple[str, ...], str]] = {}
    for key in keys:
        name, path = split(key)
        found.setdefault(int(name), {})[path] = key
    return found
