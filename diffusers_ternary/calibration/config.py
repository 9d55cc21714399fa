# SPDX-License-Identifier: Apache-2.0
"""How to calibrate."""

import dataclasses
import json
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from ..files import parse_size
from ..ternarize import ROUNDINGS
from .budget import SizeBudget


LEAST_ERROR, PROTECTED_ENDS = ALLOCATIONS = ("least_error", "protected_ends")
# Denoisers of more weights compute activations twice where gradients are needed.
CHECKPOINTED_WEIGHTS = 500_000_000
# Below and above, no row of the embedded pipeline finds its best codes.
_STRETCHES = (0.75, 1.65)


@dataclasses.dataclass(frozen=True, kw_only=True)
class SolverConfig:
    """Which stages choose the codes of a layer.

    Args:
        gptq (`bool`, *optional*, defaults to `True`): start from GPTQ; else from plain rounding.
        rounding (`str`, *optional*, defaults to `"twn"`): rule for a group's scale in GPTQ, and for rounding.
        refit (`bool`, *optional*, defaults to `True`): solve for all scales of a row at once, after GPTQ and after
            every pass of coordinate descent.
        descent_passes (`int`, *optional*, defaults to 4): passes of coordinate descent over the codes (one more runs
            against the rounded scales). 0 = none.
        starts (`int`, *optional*, defaults to 6): GPTQ solutions that are tried in layers of few groups a row, with
            group scales stretched by 0.75 to 1.65; each row keeps the best after one pass of coordinate descent. Each
            costs about as much as two passes. 1 = GPTQ's own scales only.
        column_scales (`bool`, *optional*, defaults to `False`): also solve every layer for inputs that are multiplied
            by a factor each, `[K]`, and keep what leaves the smaller error: 16 / N bits per weight, three times the
            solver's work, and one pass over the inputs when the layer is called.
        damping (`float`, *optional*, defaults to 0.01): added to the diagonal of H, as a fraction of its mean.
        compensation (`float`, *optional*, defaults to 1.0): with `sequential`, the share of earlier blocks' errors
            that a layer makes up for, as far as its inputs tell (GPTAQ, arXiv 2504.02692). Less holds better for
            inputs that were not seen where these are few (QEP, arXiv 2504.09629). 0 = none.
        polish (`int`, *optional*, defaults to 0): steps of gradient descent on softened codes and scales at the end
            (see [`polish`]), each of which costs as much as a product of H and the weight; 500 take off what there is.
            The better of both results is kept. 0 = none.

    Raises:
        ValueError: for a value that is impossible.
    """

    gptq: bool = True
    rounding: str = "twn"
    refit: bool = True
    descent_passes: int = 4
    starts: int = 6
    column_scales: bool = False
    damping: float = 0.01
    compensation: float = 1.0
    polish: int = 0

    def __post_init__(self) -> None:
        if self.rounding not in ROUNDINGS:
            raise ValueError(f"rounding={self.rounding!r} is not one of {', '.join(ROUNDINGS)}.")
        for name, least in (("descent_passes", 0), ("starts", 1), ("polish", 0)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int) or value < least:
                raise ValueError(f"{name}={value!r} is not an integer of {least} or more.")
        if not 0 <= self.compensation <= 1:
            raise ValueError(f"compensation={self.compensation!r} is not a share from 0 to 1.")
        if not 0 < self.damping < float("inf"):
            raise ValueError(f"damping={self.damping!r} is not a positive number; 0.01 is usual.")

    @property
    def stretches(self) -> tuple[float, ...]:
        """Factors on the group scales of the starts beside GPTQ's own."""
        count = self.starts - 1
        return tuple(_STRETCHES[0] + (_STRETCHES[1] - _STRETCHES[0]) * (i + 0.5) / count for i in range(count))


@dataclasses.dataclass(frozen=True, kw_only=True)
class SensitivityConfig:
    """How the effect of each layer on the denoiser's output is measured, and what a size budget chooses from.

    Every candidate of every layer is put into the float denoiser alone, and the recorded calls are replayed: layers ×
    candidates × prompts × steps forwards (twice that with two guidance branches).

    Args:
        prompts (`int`, *optional*, defaults to 4): the first ones of the calibration, with noise of their own.
        steps (`int`, *optional*, defaults to 4): of each rollout, evenly spread.
        group_sizes (`Sequence[int]`, *optional*, defaults to `(64, 32)`): smaller groups to offer.
        ranks (`Sequence[int]`, *optional*, defaults to `(16,)`): ranks of corrections to add.
        int8 (`bool`, *optional*, defaults to `True`): offer int8.

    Raises:
        ValueError: for a value that is impossible.
    """

    prompts: int = 4
    steps: int = 4
    group_sizes: Sequence[int] = (64, 32)
    ranks: Sequence[int] = (16,)
    int8: bool = True

    def __post_init__(self) -> None:
        object.__setattr__(self, "group_sizes", tuple(self.group_sizes))
        object.__setattr__(self, "ranks", tuple(self.ranks))
        values = {"prompts": [self.prompts], "steps": [self.steps]}
        for name, numbers in {**values, "group_sizes": self.group_sizes, "ranks": self.ranks}.items():
            for value in numbers:
                if isinstance(value, bool) or not isinstance(value, int) or value < 1:
                    raise ValueError(f"{name}={getattr(self, name)!r}: {value!r} is not a positive integer.")


ACCUMULATION_DTYPES = {"float32": torch.float32, "float64": torch.float64}


@dataclasses.dataclass(frozen=True, kw_only=True)
class CalibrationConfig:
    """How [`calibrate`] runs the pipeline and solves its layers.

    Args:
        solver ([`SolverConfig`], *optional*): how the codes of a layer are chosen.
        correct_bias (`bool`, *optional*, defaults to `True`): let the bias of a layer (where it has one) take over
            the mean of its error, and fit the codes to the covariance of the inputs. Costs no bits.
        end_loss (`bool`, *optional*, defaults to `True`): let errors of a layer's outputs count by what they do to
            the denoiser's prediction, instead of all alike. Takes a backward through the activations of every call of
            the denoiser, and 4 N² bytes of memory for each layer of N outputs.
        seed (`int`, *optional*, defaults to 0): prompt i starts from the noise of seed + i.
        batch_size (`int`, *optional*, defaults to 1): prompts per pipeline call.
        call_kwargs (`Mapping[str, Any]`, *optional*): further arguments of the pipeline call (steps, guidance, size);
            use what the quantized pipeline will be run with. The pipeline's defaults hold for the rest.
        accumulate (`str`, *optional*, defaults to `"float32"`): dtype of statistics and solver: `"float32"` or
            `"float64"`.
        sequential (`bool`, *optional*, defaults to `False`): solve block after block, each for the inputs that it gets
            behind the blocks that are quantized already, on the rollouts that these draw. One pass over the prompts
            per block.
        memory_limit (`int` or `str`, *optional*): bytes (or `"8GB"`, `"6GiB"`) that statistics may take on the
            device; what does not fit is gathered in further passes over the prompts. `None` = all in one pass.
        size_budget (`int` or `str`, *optional*): `"2.0 bits"` per weight of the layers that may be converted, or the
            size of all weights of the denoisers (`"400MB"`, or bytes). Each layer then gets ternary codes, smaller
            groups, a low-rank correction, int8 or its float weight, as `allocation` says. `None` = every layer as the
            [`TernaryConfig`] says.
        allocation (`str`, *optional*, defaults to `"least_error"`): how a size budget is spent: `"least_error"`, so
            that the layers together leave the least error of the denoiser's output, which is measured; or
            `"protected_ends"`, int8 for the blocks that are called first and last, and inward from there as far as
            the budget reaches, without a measurement.
        sensitivity ([`SensitivityConfig`], *optional*): measure the effect of every layer; an allocation of the least
            error does it in any case, by default as `SensitivityConfig()` says.

    Raises:
        TypeError, ValueError: for a value that is impossible.
    """

    solver: SolverConfig = dataclasses.field(default_factory=SolverConfig)
    correct_bias: bool = True
    end_loss: bool = True
    seed: int = 0
    batch_size: int = 1
    call_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)
    accumulate: str = "float32"
    sequential: bool = False
    memory_limit: int | str | None = None
    size_budget: int | str | None = None
    allocation: str = "least_error"
    sensitivity: SensitivityConfig | None = None

    def __post_init__(self) -> None:
        for name, least in (("seed", 0), ("batch_size", 1)):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is not an integer.")
            if value < least:
                raise ValueError(f"{name}={value} is below {least}.")
        if self.accumulate not in ACCUMULATION_DTYPES:
            raise ValueError(f"accumulate={self.accumulate!r} is not one of {', '.join(ACCUMULATION_DTYPES)}.")
        _ = self.memory_limit_bytes  # raises if it is not a size
        if self.allocation not in ALLOCATIONS:
            raise ValueError(f"allocation={self.allocation!r} is not one of {', '.join(ALLOCATIONS)}.")
        if self.allocation != LEAST_ERROR and self.size_budget is None:
            raise ValueError(f"allocation={self.allocation!r} spends a size_budget, and there is none. Set one too.")
        if self.size_budget is not None:
            SizeBudget.parse(self.size_budget)
            if self.sensitivity is None and self.allocation == LEAST_ERROR:
                object.__setattr__(self, "sensitivity", SensitivityConfig())

    @property
    def dtype(self) -> torch.dtype:
        """Dtype of statistics and solver."""
        return ACCUMULATION_DTYPES[self.accumulate]

    @property
    def memory_limit_bytes(self) -> int | None:
        """`memory_limit` in bytes."""
        return None if self.memory_limit is None else parse_size(self.memory_limit, name="memory_limit")

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dictionary of all fields; call arguments that are not JSON appear as their `repr`."""
        fields = dataclasses.asdict(dataclasses.replace(self, call_kwargs={}))
        return {**fields, "call_kwargs": json.loads(json.dumps(dict(self.call_kwargs), default=repr))}
