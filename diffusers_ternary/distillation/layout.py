# SPDX-License-Identifier: Apache-2.0
"""Takes the denoiser's inputs apart into rows (one per prompt), and puts rows together to a batch again."""

import dataclasses
from collections.abc import Iterable, Iterator, Mapping, Sequence
from typing import Any

import torch


Path = tuple[str, ...]
# How an input is made of rows: a tensor [rows, ...], a list with a tensor per row (of any length each), a list that
# repeats one constant, a padding mask that is left out where nothing is padded, or the same for all rows.
STACKED, LISTED, REPEATED, MASK, SHARED = KINDS = ("stacked", "listed", "repeated", "mask", "shared")
_SAMPLE, _STATES, _TIMESTEPS, _INPUT = "sample", "states", "timesteps", "input"


@dataclasses.dataclass(frozen=True)
class TeacherBatch:
    """B rows of the teacher's own data, on the CPU. No real image is in them.

    Args:
        sample (`torch.Tensor`): float32 [B, ...], x0: clean latents that the teacher drew, in the denoiser's own
            input layout (Flux: packed tokens [B, tokens, channels]).
        conditioning (`Mapping[str, Any]`): the denoiser's other keyword arguments as the pipeline passes them (text
            embeddings, pooled embeddings, guidance, position ids, ...), without the sample and the timestep. Tensors
            with a row per prompt are stacked to [B, ...]; what all prompts share (`txt_ids`, `img_ids`) is as the
            pipeline passes it.
        null_conditioning (`Mapping[str, Any]`, *optional*): the same for the unconditional branch, if the pipeline
            runs classifier-free guidance.
        rollout (`tuple[torch.Tensor, torch.Tensor]`, *optional*): true states of the teacher's trajectories, one
            random step per row: x_t float32 [B, ...] and the timestep [B] as the denoiser receives it.
        listed (`bool`): whether the denoiser takes the sample as a list with a tensor per row.
    """

    sample: torch.Tensor
    conditioning: Mapping[str, Any]
    null_conditioning: Mapping[str, Any] | None = None
    rollout: tuple[torch.Tensor, torch.Tensor] | None = None
    listed: bool = False


@dataclasses.dataclass(frozen=True)
class TeacherRow:
    """What the teacher made of one prompt.

    Args:
        sample (`torch.Tensor`): float32, x0 in the denoiser's input layout.
        inputs (`Mapping[tuple[str, ...], torch.Tensor]`): the prompt's part of the denoiser's inputs.
        states (`torch.Tensor`, *optional*): [S, ...], x_t at S steps as the denoiser received it.
        timesteps (`torch.Tensor`, *optional*): [S], of these states.
    """

    sample: torch.Tensor
    inputs: Mapping[Path, torch.Tensor]
    states: torch.Tensor | None = None
    timesteps: torch.Tensor | None = None

    def tensors(self, name: str) -> dict[str, torch.Tensor]:
        """All of it under keys that begin with a name, for a file."""
        found = {join(name, (_INPUT, *path)): tensor for path, tensor in self.inputs.items()}
        own = {_SAMPLE: self.sample, _STATES: self.states, _TIMESTEPS: self.timesteps}
        return {**found, **{join(name, (part,)): tensor for part, tensor in own.items() if tensor is not None}}

    @classmethod
    def of(cls, tensors: Mapping[Path, torch.Tensor]) -> "TeacherRow":
        """The row in tensors of a file, by their keys' paths."""
        return cls(
            sample=tensors[_SAMPLE,],
            inputs={path[1:]: tensor for path, tensor in tensors.items() if path[0] == _INPUT},
            states=tensors.get((_STATES,)),
            timesteps=tensors.get((_TIMESTEPS,)),
        )


@dataclasses.dataclass(frozen=True)
class Branch:
    """The inputs of one guidance branch beside sample and timestep.

    Args:
        kinds (`Mapping[tuple[str, ...], str]`): how each input is made of rows, by its path through dictionaries.
        shared (`Mapping[tuple[str, ...], Any]`): what all prompts have in common, by path; the element of repeated
            inputs.
    """

    kinds: Mapping[Path, str]
    shared: Mapping[Path, Any]

    def rows(self, inputs: Mapping[str, Any], start: int, stop: int) -> list[dict[Path, torch.Tensor]]:
        """The rows `start` to `stop` of a denoiser call, each without what is shared.

        Raises:
            ValueError: if an input that is shared has changed.
        """
        found: list[dict[Path, torch.Tensor]] = [{} for _ in range(start, stop)]
        for path, value in leaves(inputs):
            kind = self.kinds.get(path)
            if kind in (STACKED, LISTED) or (kind == MASK and value is not None):
                for row, part in zip(found, value[start:stop], strict=True):
                    row[path] = part
                continue
            if kind == MASK:
                continue
            expected = [self.shared[path]] * len(value) if kind == REPEATED else self.shared.get(path)
            if kind is None or not same(value, expected):
                raise ValueError(
                    f"The denoiser's input {'.'.join(path)} changes from step to step or from prompt to prompt: "
                    f"{_brief(expected)}, then {_brief(value)}. distill needs it to stay the same."
                )
        return found

    def assemble(self, rows: Sequence[Mapping[Path, torch.Tensor]]) -> dict[str, Any]:
        """The denoiser's inputs for these rows. Rows of unequal length are padded with zeros, and masked.

        Raises:
            ValueError: if lengths differ in an input that has no mask.
        """
        inputs: dict[str, Any] = {}
        for path, kind in self.kinds.items():
            place = inputs
            for name in path[:-1]:
                place = place.setdefault(name, {})
            if kind == SHARED:
                value = self.shared[path]
            elif kind == REPEATED:
                value = [self.shared[path]] * len(rows)
            elif kind == LISTED:
                value = [row[path] for row in rows]
            elif kind == MASK:
                value = self._mask(path, rows)
            else:
                value = self._stack(path, rows)
            place[path[-1]] = value
        return inputs

    def _stack(self, path: Path, rows: Sequence[Mapping[Path, torch.Tensor]]) -> torch.Tensor:
        tensors = [row[path] for row in rows]
        shapes = sorted({tuple(tensor.shape) for tensor in tensors})
        masked = any(kind == MASK and _masked(other) == path for other, kind in self.kinds.items())
        if len(shapes) > 1 and not masked:
            raise ValueError(
                f"{'.'.join(path)} has rows of shapes {shapes} and no mask, so they do not go into one batch. Let the "
                "pipeline pad to a fixed length (max_sequence_length)."
            )
        return torch.nn.utils.rnn.pad_sequence(tensors, batch_first=True) if tensors[0].dim() else torch.stack(tensors)

    def _mask(self, path: Path, rows: Sequence[Mapping[Path, torch.Tensor]]) -> torch.Tensor | None:
        lengths = {row[_masked(path)].shape[0] for row in rows}
        given = [row[path] for row in rows if path in row]
        if len(lengths) == 1 and not given:
            return None
        dtype = given[0].dtype if given else torch.bool
        masks = [row[path] if path in row else torch.ones(row[_masked(path)].shape[0], dtype=dtype) for row in rows]
        return torch.nn.utils.rnn.pad_sequence(masks, batch_first=True)


@dataclasses.dataclass(frozen=True)
class InputLayout:
    """How a pipeline calls its denoiser.

    Args:
        sample (`str`): name of the argument that is denoised.
        timestep (`str`): name of the timestep.
        listed (`bool`): whether the sample is a list with a tensor per row (Z-Image).
        conditional ([`Branch`]): inputs of the prompts.
        unconditional ([`Branch`], *optional*): inputs of the negative prompt, where the pipeline guides.
        null_row (`Mapping`, *optional*): the negative prompt's row, the same for all prompts.
        position (`int`): of the prompts' branch among the branches of a step.
    """

    sample: str
    timestep: str
    listed: bool
    conditional: Branch
    unconditional: Branch | None = None
    null_row: Mapping[Path, torch.Tensor] | None = None
    position: int = 0

    def assemble(self, rows: Sequence[TeacherRow], generator: torch.Generator | None) -> TeacherBatch:
        """A batch of these rows; the step of each rollout state is drawn from `generator`."""
        null = None
        if self.unconditional is not None and self.null_row is not None:
            null = self.unconditional.assemble([self.null_row] * len(rows))
        return TeacherBatch(
            sample=torch.stack([row.sample for row in rows]),
            conditioning=self.conditional.assemble([row.inputs for row in rows]),
            null_conditioning=null,
            rollout=_rollout(rows, generator),
            listed=self.listed,
        )


def _rollout(
    rows: Sequence[TeacherRow], generator: torch.Generator | None
) -> tuple[torch.Tensor, torch.Tensor] | None:
    states, timesteps = [], []
    for row in rows:
        if row.states is None or row.timesteps is None:
            return None
        step = int(torch.randint(len(row.timesteps), (), generator=generator))
        states.append(row.states[step].float())
        timesteps.append(row.timesteps[step])
    return torch.stack(states), torch.stack(timesteps)


def find_kinds(one: Mapping[str, Any], two: Mapping[str, Any], *, rows_of_one: int) -> dict[Path, str]:
    """How each input is made of rows, from a call for one prompt and a call for that prompt twice.

    Args:
        one (`Mapping[str, Any]`): inputs for one prompt.
        two (`Mapping[str, Any]`): inputs for the prompt twice.
        rows_of_one (`int`): rows of the sample in `one`: 2 where guidance branches go in together, else 1.
    """
    doubled = dict(leaves(two))
    paths = {path for path, _ in leaves(one)}
    kinds = {}
    for path, value in leaves(one):
        twice = doubled.get(path)
        grows = _length(value) == rows_of_one and _length(twice) == 2 * rows_of_one
        if _masked(path) in paths and (value is None or grows):
            kinds[path] = MASK
        elif isinstance(value, torch.Tensor) and grows:
            kinds[path] = STACKED
        elif isinstance(value, list) and grows:
            kinds[path] = LISTED if all(isinstance(item, torch.Tensor) for item in value) else REPEATED
        else:
            kinds[path] = SHARED
    return kinds


def join(name: str, path: Path) -> str:
    """Key of a tensor in a file."""
    return "/".join((name, *path))


def keys_by_name(keys: Iterable[str]) -> dict[str, dict[Path, str]]:
    """The keys of a file by name and path."""
    found: dict[str, dict[Path, str]] = {}
    for key in keys:
        name, *path = key.split("/")
        found.setdefault(name, {})[tuple(path)] = key
    return found


def leaves(inputs: Mapping[str, Any], prefix: Path = ()) -> Iterator[tuple[Path, Any]]:
    """Values by their path through nested dictionaries."""
    for name, value in inputs.items():
        if isinstance(value, dict) and value:
            yield from leaves(value, (*prefix, name))
        else:
            yield (*prefix, name), value


def same(first: Any, second: Any) -> bool:
    """Whether two inputs are equal, tensors bit by bit."""
    if isinstance(first, torch.Tensor) and isinstance(second, torch.Tensor):
        return first.dtype == second.dtype and torch.equal(first, second)
    if isinstance(first, torch.Tensor) or isinstance(second, torch.Tensor):
        return False
    if isinstance(first, (list, tuple)) and type(first) is type(second):
        return len(first) == len(second) and all(same(a, b) for a, b in zip(first, second, strict=True))
    return bool(first == second)


def _masked(path: Path) -> Path:
    """The input that a padding mask belongs to, by the names that the denoisers of diffusers use."""
    name = path[-1]
    if name == "encoder_attention_mask":
        return (*path[:-1], "encoder_hidden_states")
    return (*path[:-1], name.removesuffix("_mask")) if name.endswith("_mask") else ()


def _length(value: Any) -> int | None:
    if isinstance(value, torch.Tensor):
        return value.shape[0] if value.dim() else None
    return len(value) if isinstance(value, list) else None


def _brief(value: Any) -> str:
    return f"a tensor {list(value.shape)}" if isinstance(value, torch.Tensor) else repr(value)
