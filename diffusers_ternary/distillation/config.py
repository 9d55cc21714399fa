# SPDX-License-Identifier: Apache-2.0
"""How to distill."""

import dataclasses
import functools
import json
import warnings
from collections.abc import Mapping
from typing import Any

from ..calibration import CalibrationConfig
from ..calibration.config import CHECKPOINTED_WEIGHTS


MODES = ("scales", "blockwise", "full", "lora")
TRAINED_OTHERS = ("none", "vectors", "all")
TIMESTEPS = ("auto", "logit_normal", "schedule")
OPTIMIZERS = ("auto", "adamw", "adamw8bit")
PRECISIONS = (None, "no", "bf16")
FORMER_NAMES = {"steps": "updates", "gradient_accumulation": "gradient_accumulation_steps"}


def _takes_former_names(cls: type) -> type:
    """Lets a configuration be made with the former names of its fields, with a warning."""
    made = cls.__init__  # type: ignore[misc]

    @functools.wraps(made)
    def init(self: Any, *args: Any, **settings: Any) -> None:
        for former in FORMER_NAMES.keys() & settings.keys():
            name = FORMER_NAMES[former]
            if name in settings:
                raise TypeError(f"{former} is the former name of {name}, and both are given. Leave {former} out.")
            warnings.warn(f"{cls.__name__}: {former} is now called {name}.", FutureWarning, stacklevel=2)
            settings[name] = settings.pop(former)
        made(self, *args, **settings)

    cls.__init__ = init  # type: ignore[misc]
    return cls


@_takes_former_names
@dataclasses.dataclass(frozen=True, kw_only=True)
class DistillConfig:
    """What [`distill`] trains, for how long, and how.

    Learning rates that are `None` follow the layer's mean scale s: latents get s / d with d = updates / 2 between 200
    and 2500; an absolute rate would be right for one model and destroy the start of another.

    Args:
        mode (`str`, *optional*, defaults to `"scales"`): what of the ternary layers is trained beside their biases.
            `"scales"`: the scales, codes frozen; the cheap one. `"blockwise"`: codes and scales of one block after
            the other, each against the teacher's output of that block, then all scales. `"full"`: all codes (through
            float32 latents) and scales. `"lora"`: a low-rank correction and the scales, codes frozen.
        updates (`int`, *optional*, defaults to 2000): updates of the weights (formerly `steps`).
        batch_size (`int`, *optional*, defaults to 32): rows of one forward on one device.
        gradient_accumulation_steps (`int`, *optional*, defaults to 1): forwards of one update (formerly
            `gradient_accumulation`).
        seed (`int`, *optional*, defaults to 0): of the order of the data, the noise and the timesteps.
        rank (`int`, *optional*, defaults to 16): of the correction in mode `"lora"`.
        train_scales (`bool`, *optional*, defaults to `True`): `False` freezes the scales: with mode `"scales"` only
            what is not ternary is trained, the control experiment.
        train_other (`str`, *optional*, defaults to `"vectors"`): what is trained of the rest of the denoiser:
            `"none"`, `"vectors"` (biases and norms) or `"all"` (embedders and final projection too). Biases of
            ternary layers always are.
        latent_lr, scale_lr, low_rank_lr, other_lr (`float`, *optional*): peak learning rates; those of latents
            and scales follow the layer's mean scale where none is given.
        block_weight (`float`, *optional*, defaults to 0.5): weight of the mean relative error of the blocks' outputs
            beside the error of the prediction.
        timesteps (`str`, *optional*, defaults to `"auto"`): `"logit_normal"` (80 %, the rest uniform), `"schedule"`
            (only those that the pipeline visits) or `"auto"`: the schedule for pipelines of up to four steps.
        uniform_fraction (`float`, *optional*, defaults to 0.2): share of uniform timesteps.
        rollout_fraction (`float`, *optional*, defaults to 0.2): share of rows that are states of the teacher's own
            trajectories.
        cfg_dropout (`float`, *optional*, defaults to 0.1): share of rows with the unconditional embedding, where the
            pipeline uses guidance.
        guidance_range (`tuple[float, float]`, *optional*, defaults to (1, 5)): guidance inputs of guidance-distilled
            models are drawn from it.
        held_out (`int`, *optional*, defaults to 32): prompts set aside for the held-out evaluation, if none
            are given; chosen by their hash, so that the order of the list has no part in it.
        evaluate_every, checkpoint_every (`int`, *optional*): in updates; default: a tenth of them.
        optimizer (`str`, *optional*, defaults to `"auto"`): `"adamw"`, `"adamw8bit"` (bitsandbytes), or `"auto"`: 8
            bits where mode is `"full"` on a GPU and bitsandbytes is installed.
        mixed_precision (`str`, *optional*): `"no"` or `"bf16"`; `None` = what `accelerate launch` says.
        gradient_checkpointing (`bool`, *optional*): `None` = on for models of more than 500 million weights.
        trackers (`tuple[str, ...]`, *optional*): names that accelerate knows, e.g. `"tensorboard"`.
        calibration ([`CalibrationConfig`], *optional*): how the student is made that training starts from; `None` =
            plain rounding. Not used if a student is given.
        calibration_prompts (`int`, *optional*, defaults to 128): how many of the training prompts it uses.
        online_pool (`int`, *optional*, defaults to 0): rows of a pool per process that the teacher renews while the
            student trains, one denoising step a forward, instead of a cache of all prompts on disk. 0 = cache.
        call_kwargs (`Mapping[str, Any]`, *optional*): further arguments of the pipeline call (steps, guidance, size)
            for cache and calibration; use what the student will be run with.

    Raises:
        TypeError, ValueError: for a value that is impossible.
    """

    mode: str = "scales"
    updates: int = 2000
    batch_size: int = 32
    gradient_accumulation_steps: int = 1
    seed: int = 0
    rank: int = 16
    train_scales: bool = True
    train_other: str = "vectors"
    latent_lr: float | None = None
    scale_lr: float | None = None
    low_rank_lr: float = 1e-3
    other_lr: float = 1e-3
    block_weight: float = 0.5
    timesteps: str = "auto"
    uniform_fraction: float = 0.2
    rollout_fraction: float = 0.2
    cfg_dropout: float = 0.1
    guidance_range: tuple[float, float] = (1.0, 5.0)
    held_out: int = 32
    evaluate_every: int | None = None
    checkpoint_every: int | None = None
    optimizer: str = "auto"
    mixed_precision: str | None = None
    gradient_checkpointing: bool | None = None
    trackers: tuple[str, ...] = ()
    calibration: CalibrationConfig | None = dataclasses.field(default_factory=CalibrationConfig)
    calibration_prompts: int = 128
    online_pool: int = 0
    call_kwargs: Mapping[str, Any] = dataclasses.field(default_factory=dict)

    def __post_init__(self) -> None:
        self._check_choices()
        for name, least in _INTEGERS.items():
            value = getattr(self, name)
            if value is None and name in ("evaluate_every", "checkpoint_every"):
                continue
            if isinstance(value, bool) or not isinstance(value, int):
                raise TypeError(f"{name}={value!r} is not an integer.")
            if value < least:
                raise ValueError(f"{name}={value} is below {least}.")
        for name in ("uniform_fraction", "rollout_fraction", "cfg_dropout"):
            value = getattr(self, name)
            if not 0 <= value <= 1:
                raise ValueError(f"{name}={value!r} is not a fraction between 0 and 1.")
        for name in ("latent_lr", "scale_lr", "low_rank_lr", "other_lr"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"{name}={value!r} is not a positive learning rate.")
        if not 0 <= self.block_weight < float("inf"):
            raise ValueError(f"block_weight={self.block_weight!r} is not a weight of 0 or more.")
        low, high = self.guidance_range
        if not 0 <= low <= high < float("inf"):
            raise ValueError(f"guidance_range={self.guidance_range!r} is not (lowest, highest).")

    def _check_choices(self) -> None:
        for name, choices in _CHOICES.items():
            value = getattr(self, name)
            if value not in choices:
                raise ValueError(f"{name}={value!r} is not one of {', '.join(map(str, choices))}.")
        if isinstance(self.trackers, str):
            raise TypeError(f"trackers={self.trackers!r} is one string. Give a tuple: trackers=({self.trackers!r},).")

    @property
    def evaluation_interval(self) -> int:
        """Updates between held-out evaluations."""
        return self.evaluate_every or max(1, self.updates // 10)

    @property
    def checkpoint_interval(self) -> int:
        """Updates between checkpoints."""
        return self.checkpoint_every or max(1, self.updates // 10)

    def checkpoints_gradients(self, weights: int) -> bool:
        """Whether activations are computed twice, for a denoiser of this many ternary weights."""
        return weights > CHECKPOINTED_WEIGHTS if self.gradient_checkpointing is None else self.gradient_checkpointing

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dictionary of all fields; call arguments that are not JSON appear as their `repr`."""
        plain = dataclasses.replace(self, call_kwargs={}, calibration=None)
        return {
            **dataclasses.asdict(plain),
            "guidance_range": list(self.guidance_range),
            "trackers": list(self.trackers),
            "calibration": None if self.calibration is None else self.calibration.to_dict(),
            "call_kwargs": json.loads(json.dumps(dict(self.call_kwargs), default=repr)),
        }


_CHOICES: dict[str, tuple[Any, ...]] = {
    "mode": MODES,
    "train_other": TRAINED_OTHERS,
    "timesteps": TIMESTEPS,
    "optimizer": OPTIMIZERS,
    "mixed_precision": PRECISIONS,
}
_INTEGERS = {
    "updates": 1,
    "batch_size": 1,
    "gradient_accumulation_steps": 1,
    "seed": 0,
    "rank": 1,
    "held_out": 1,
    "evaluate_every": 1,
    "checkpoint_every": 1,
    "calibration_prompts": 1,
    "online_pool": 0,
}
