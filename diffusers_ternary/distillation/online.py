# SPDX-License-Identifier: Apache-2.0
"""The teacher's data without a disk: a pool of finished trajectories, and one that is advanced step by step."""

import copy
import dataclasses
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..files.seals import read_sealed, write_sealed
from ..rollouts import RolloutBatch, prepared
from .layout import InputLayout, TeacherBatch, TeacherRow, keys_by_name
from .recording import TeacherRecorder
from .stepped import SteppedCall


_METADATA_KEY = "diffusers_ternary_pool"


class TeacherPool:
    """A pool of trajectories that the teacher renews while the student trains, in memory only.

    Gives rows like a [`TeacherCache`]. Every batch that is taken advances one pipeline call by a scheduler step; when
    it is done, its rows replace the oldest of the pool. Prompts come in a new order in every round, each time with
    other noise, so that no row is seen for long. All of it follows from the seed of the rollouts; after
    [`~TeacherPool.load_state_dict`] the pool goes on with the same bits.

    Args:
        recorder ([`TeacherRecorder`]): draws the prompts. Its denoiser may be called by others between two batches.
        size (`int`, *optional*, defaults to 256): rows that the pool holds.

    Raises:
        ValueError: for an impossible size.
    """

    def __init__(self, recorder: TeacherRecorder, size: int = 256) -> None:
        rollouts = recorder.rollouts
        if isinstance(size, bool) or not isinstance(size, int) or size < 1:
            raise ValueError(f"size={size!r} is not an integer of 1 or more.")
        if size % rollouts.batch_size:
            raise ValueError(f"size={size} is not a multiple of batch_size={rollouts.batch_size}.")
        own = copy.copy(recorder.pipeline)
        own.scheduler = copy.deepcopy(own.scheduler)  # stopped in the middle of a schedule, most of the time
        self._recorder = dataclasses.replace(recorder, pipeline=own)
        self._rollouts = rollouts
        self._size = size
        self._layout: InputLayout | None = None
        self._rows: list[TeacherRow] = []
        self._drawn = 0
        self._call: SteppedCall | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def layout(self) -> InputLayout:
        """How the pipeline calls its denoiser."""
        if self._layout is None:
            with prepared(self._recorder.pipeline):
                self._layout = self._recorder.find_layout()
        return self._layout

    def batch(self, indices: Sequence[int], generator: torch.Generator | None = None) -> TeacherBatch:
        """Rows of the pool, which is filled first and advanced by a step of the teacher.

        Args:
            indices (`Sequence[int]`): places in the pool, below its length.
            generator (`torch.Generator`, *optional*): draws the step of each row's rollout state.

        Raises:
            IndexError: if there is no such place.
        """
        wrong = [index for index in indices if not 0 <= index < self._size]
        if wrong:
            raise IndexError(f"Row {wrong[0]} is not between 0 and {self._size - 1}.")
        while len(self._rows) < self._size:
            self._advance()
        self._advance()
        return self.layout.assemble([self._rows[int(index)] for index in indices], generator)

    def close(self) -> None:
        """Abandons the trajectory that is under way; a later batch starts it again."""
        if self._call is not None:
            self._call.close()
            self._call = None

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from: JSON values, and the tensors of the rows by name under `"rows"`."""
        rows = [row.tensors(f"{number:06d}") for number, row in enumerate(self._rows)]
        return {
            **self._identity(),
            "drawn": self._drawn,
            "steps": 0 if self._call is None else self._call.steps,
            "rows": {key: tensor for row in rows for key, tensor in row.items()},
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the trajectory that was under way is run again up to its step.

        Raises:
            ValueError: if the state is of other prompts, another seed or another size.
        """
        for name, value in self._identity().items():
            if state[name] != value:
                raise ValueError(f"The state is of a pool with {name}={state[name]!r}; this one has {value!r}.")
        self.close()
        rows = keys_by_name(state["rows"])
        self._rows = [
            TeacherRow.of({path: state["rows"][key] for path, key in rows[name].items()}) for name in sorted(rows)
        ]
        self._drawn = state["drawn"]
        if state["steps"]:
            self._call = self._start()
            for _ in range(state["steps"]):
                self._call.advance()

    def _identity(self) -> dict[str, Any]:
        return {"prompts_sha256": self._rollouts.sha256(), "seed": self._rollouts.seed, "size": self._size}

    def _advance(self) -> None:
        """One step of the teacher."""
        if self._call is None:
            self._call = self._start()
        if not self._call.finished:
            self._call.advance()
        if self._call.latents is None:
            return
        # The last step was done before: this advance only ended the call, so the next one takes its first step.
        for row in self._recorder.rows(self.layout, self._call.batch, self._call.calls, self._call.latents):
            if len(self._rows) < self._size:
                self._rows.append(row)
            else:
                self._rows[self._drawn % self._size] = row
            self._drawn += 1
        self._call = self._start()
        self._call.advance()

    def _start(self) -> SteppedCall:
        assert self.layout  # found before the scheduler is stopped in the middle of a call
        return SteppedCall(self._recorder, self._next_batch())

    def _next_batch(self) -> RolloutBatch:
        numbers = range(self._drawn, self._drawn + self._rollouts.batch_size)
        prompts, seed = self._rollouts.prompts, self._rollouts.seed
        orders: dict[int, torch.Tensor] = {}
        chosen = []
        for number in numbers:
            rounds, place = divmod(number, len(prompts))
            if rounds not in orders:
                orders[rounds] = torch.randperm(len(prompts), generator=torch.Generator().manual_seed(seed + rounds))
            chosen.append(prompts[int(orders[rounds][place])])
        return RolloutBatch(tuple(chosen), tuple(seed + number for number in numbers))


def save_pool(data: object, folder: pathlib.Path, step: int, process: int) -> None:
    """Keeps a pool's state for the checkpoint of a step, and none older than the checkpoint before it.

    Data that is not a pool needs no state.
    """
    if not isinstance(data, TeacherPool):
        return
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob(_pool_name("*", process)))
    path = folder / _pool_name(f"{step:08d}", process)
    state = data.state_dict()
    rows = state.pop("rows")
    write_sealed(path, {"pool": path.name, **state}, rows, metadata_key=_METADATA_KEY)
    for file in older[:-1]:  # the last one belongs to the checkpoint that is there until the new one is complete
        file.unlink(missing_ok=True)


def load_pool(data: object, folder: pathlib.Path, step: int, process: int) -> None:
    """Puts a pool back to the checkpoint of a step.

    Raises:
        FileNotFoundError: if the checkpoint has no state of the pool.
        ValueError: if that is not as it was written.
    """
    if not isinstance(data, TeacherPool):
        return
    path = folder / _pool_name(f"{step:08d}", process)
    if not path.is_file():
        raise FileNotFoundError(f"{path} is missing, so the run cannot go on as it was. Start it in another folder.")
    try:
        record, rows = read_sealed(path, metadata_key=_METADATA_KEY)
        if record.get("pool") != path.name:
            raise ValueError(f"{path} is of another step")
    except ValueError as error:
        raise ValueError(f"{error}. The run cannot go on as it was: start it in another folder.") from error
    data.load_state_dict({**record, "rows": rows})


def _pool_name(step: str, process: int) -> str:
    return f"pool-{step}-process-{process}.safetensors"
