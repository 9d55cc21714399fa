# SPDX-License-Identifier: Apache-2.0
"""What a distillation did."""

import dataclasses
import os
import pathlib
from collections.abc import Mapping
from typing import Any

from ..files import finite, parse_json_object, write_json
from ..lora import FoldedAdapter
from .progress import Evaluation


@dataclasses.dataclass(frozen=True)
class DistillReport:
    """The whole distillation. Errors are mean |v_s - v_t|^2 / mean |v_t|^2 of the packed student's prediction.

    Args:
        start_error (`float`): held-out error before training.
        best_error (`float`): held-out error of the student that was kept.
        best_step (`int`): updates after which it was reached.
        steps (`int`): updates done.
        stopped (`str`, *optional*): why the run ended early; `None` if it did not.
        history (`tuple[Evaluation, ...]`): held-out evaluations.
        bits_per_weight (`float`): stored bits per converted weight.
        trained_parameters (`Mapping[str, int]`): phase → parameters that were trained.
        training_prompts_sha256, held_out_prompts_sha256 (`str`): hashes of the lists, in order.
        teacher_sha256 (`str`): hash of the teacher's weights.
        seconds, cpu_seconds (`float`): of the updates alone, wall time and CPU time of the main process.
        processes (`int`): that trained together.
        config (`Mapping[str, Any]`): the [`TernaryConfig`].
        distill_config (`Mapping[str, Any]`): the [`DistillConfig`].
        versions (`Mapping[str, str]`): of the libraries, and the device.
        adapters (`tuple[FoldedAdapter, ...]`): that were folded into the teacher before.
    """

    start_error: float
    best_error: float
    best_step: int
    steps: int
    stopped: str | None
    history: tuple[Evaluation, ...]
    bits_per_weight: float
    trained_parameters: Mapping[str, int]
    training_prompts_sha256: str
    held_out_prompts_sha256: str
    teacher_sha256: str
    seconds: float
    cpu_seconds: float
    processes: int
    config: Mapping[str, Any]
    distill_config: Mapping[str, Any]
    versions: Mapping[str, str]
    adapters: tuple[FoldedAdapter, ...] = ()

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dictionary: numbers that are not finite become `None`."""
        return finite(dataclasses.asdict(self))

    def save_json(self, path: str | os.PathLike[str]) -> None:
        """Writes [`~DistillReport.to_dict`] to a file."""
        write_json(path, self.to_dict(), allow_nan=False)

    @classmethod
    def load_json(cls, path: str | os.PathLike[str]) -> "DistillReport":
        """Reads what `save_json` wrote."""
        values = parse_json_object(pathlib.Path(path).read_bytes(), source=path)
        history = tuple(Evaluation(**entry) for entry in values.pop("history"))
        adapters = tuple(FoldedAdapter(**entry) for entry in values.pop("adapters", ()))
        return cls(**values, history=history, adapters=adapters)
