# SPDX-License-Identifier: Apache-2.0
"""The teacher's data without a disk: a pool of finished trajectories, and one that is advanced step by step."""

import copy
import io
import pathlib
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline

from ..files import write_bytes
from ..files.seals import is_sealed, seal
from ..rollouts import RolloutBatch, make_rollouts, prepared
from .batch import TeacherBatch
from .layout import InputLayout, Path, TeacherRow, assemble
from .recording import TeacherRecorder
from .stepped import SteppedCall


_RESTART = "The run cannot go on as it was: start it in another folder."


class TeacherPool:
    """A pool of trajectories that the teacher renews while the student trains, in memory only.

    Gives rows like a [`TeacherCache`]. Every batch that is taken advances one pipeline call by a scheduler step; when
    it is done, its rows replace the oldest of the pool. Prompts come in a new order in every round, each time with
    other noise, so that no row is seen for long. All of it follows from `seed`; after [`~TeacherPool.load_state_dict`]
    the pool goes on with the same bits.

    Args:
        pipeline (`DiffusionPipeline`): the teacher. Its denoiser may be called by others between two batches.
        prompts (`Sequence[str]`): to draw.
        call_kwargs (`Mapping[str, Any]`, *optional*): arguments of the pipeline call (steps, guidance, size, ...).
        seed (`int`, *optional*, defaults to 0): of the order of the prompts and of the noise.
        size (`int`, *optional*, defaults to 256): rows that the pool holds.
        batch_size (`int`, *optional*, defaults to 1): prompts per pipeline call.
        rollout_states (`int`, *optional*, defaults to 4): states x_t of each trajectory to keep; 0 = none.
        component (`str`, *optional*): the denoiser; default: `transformer` or `unet`.

    Raises:
        TypeError: if a prompt is not a string.
        ValueError: for bad prompts, call arguments or sizes.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        prompts: Sequence[str],
        *,
        call_kwargs: Mapping[str, Any] | None = None,
        seed: int = 0,
        size: int = 256,
        batch_size: int = 1,
        rollout_states: int = 4,
        component: str | None = None,
    ) -> None:
        for name, value, least in (
            ("size", size, 1),
            ("batch_size", batch_size, 1),
            ("rollout_states", rollout_states, 0),
        ):
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not an integer of {least} or more.")
        if size % batch_size:
            raise ValueError(f"size={size} is not a multiple of batch_size={batch_size}.")
        own = copy.copy(pipeline)
        own.scheduler = copy.deepcopy(pipeline.scheduler)  # stopped in the middle of a schedule, most of the time
        self._rollouts = make_rollouts(own, prompts, seed=seed, batch_size=batch_size, call_kwargs=call_kwargs)
        self._recorder = TeacherRecorder(own, self._rollouts, rollout_states=rollout_states, component=component)
        self._size = size
        self._layout: InputLayout | None = None
        self._rows: list[TeacherRow] = []
        self._drawn = 0
        self._call: SteppedCall | None = None

    def __len__(self) -> int:
        return self._size

    @property
    def prompts(self) -> tuple[str, ...]:
        """All prompts, in the order that they were given in."""
        return self._rollouts.prompts

    @property
    def prompts_sha256(self) -> str:
        """Hash of the prompts, in order."""
        return self._rollouts.sha256()

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
        return assemble(self.layout, [self._rows[int(index)] for index in indices], generator)

    def close(self) -> None:
        """Abandons the trajectory that is under way; a later batch starts it again."""
        if self._call is not None:
            self._call.close()
            self._call = None

    def state_dict(self) -> dict[str, Any]:
        """Everything to go on from, as plain values and tensors that `torch.save` keeps."""
        return {
            "prompts_sha256": self.prompts_sha256,
            "seed": self._rollouts.seed,
            "size": self._size,
            "drawn": self._drawn,
            "steps": 0 if self._call is None else self._call.steps,
            "rows": [_row_state(row) for row in self._rows],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Goes on from a state; the trajectory that was under way is run again up to its step.

        Raises:
            ValueError: if the state is of other prompts, another seed or another size.
        """
        ours = {"prompts_sha256": self.prompts_sha256, "seed": self._rollouts.seed, "size": self._size}
        for name, value in ours.items():
            if state[name] != value:
                raise ValueError(f"The state is of a pool with {name}={state[name]!r}; this one has {value!r}.")
        self.close()
        self._rows = [_row_from_state(row) for row in state["rows"]]
        self._drawn = state["drawn"]
        if state["steps"]:
            self._call = self._start()
            for _ in range(state["steps"]):
                self._call.advance()

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
        count, seed = len(self.prompts), self._rollouts.seed
        orders: dict[int, torch.Tensor] = {}
        prompts = []
        for number in numbers:
            rounds, place = divmod(number, count)
            if rounds not in orders:
                orders[rounds] = torch.randperm(count, generator=torch.Generator().manual_seed(seed + rounds))
            prompts.append(self.prompts[int(orders[rounds][place])])
        return RolloutBatch(tuple(prompts), tuple(seed + number for number in numbers))


def save_pool(data: Any, folder: pathlib.Path, step: int, process: int) -> None:
    """Keeps a pool's state for the checkpoint of a step, and none older than the checkpoint before it.

    Data that is not a pool needs no state.
    """
    if not isinstance(data, TeacherPool):
        return
    folder.mkdir(parents=True, exist_ok=True)
    older = sorted(folder.glob(_pool_name("*", process)))
    buffer = io.BytesIO()
    torch.save(data.state_dict(), buffer)
    name = _pool_name(f"{step:08d}", process)
    state = torch.frombuffer(bytearray(buffer.getvalue()), dtype=torch.uint8)
    sealed = io.BytesIO()
    torch.save({"record": seal({"pool": name}, {"state": state}), "state": state}, sealed)
    write_bytes(folder / name, sealed.getvalue())
    for path in older[:-1]:  # the last one belongs to the checkpoint that is there until the new one is complete
        path.unlink(missing_ok=True)


def load_pool(data: Any, folder: pathlib.Path, step: int, process: int) -> None:
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
        stored = torch.load(path, weights_only=True)
        intact = is_sealed(stored["record"], {"state": stored["state"]}) and stored["record"]["pool"] == path.name
    except Exception as error:  # a damaged pickle can raise anything
        raise ValueError(f"{path} cannot be read ({error}). {_RESTART}") from error
    if not intact:
        raise ValueError(f"{path} is not as it was written, or of another step. {_RESTART}")
    data.load_state_dict(torch.load(io.BytesIO(stored["state"].numpy().tobytes()), weights_only=True))


def _pool_name(step: str, process: int) -> str:
    return f"pool-{step}-process-{process}.pt"


def _row_state(row: TeacherRow) -> dict[str, Any]:
    inputs = {"/".join(path): tensor for path, tensor in row.inputs.items()}
    return {"sample": row.sample, "inputs": inputs, "states": row.states, "timesteps": row.timesteps}


def _row_from_state(state: Mapping[str, Any]) -> TeacherRow:
    inputs: dict[Path, torch.Tensor] = {tuple(name.split("/")): tensor for name, tensor in state["inputs"].items()}
    return TeacherRow(state["sample"], inputs, state["states"], state["timesteps"])
