# SPDX-License-Identifier: Apache-2.0
"""What is optimized, how fast, and by what."""

import logging
import math
from typing import Any

import torch
from torch import nn

from ..extras import has_extra, import_extra
from .config import DistillConfig
from .trainable import TrainableTernaryLayer, whole


logger = logging.getLogger(__name__)
BETAS = (0.9, 0.99)
MAX_GRADIENT_NORM = 1.0
WARMUP = 0.05
FINAL_RATE = 0.05
# Of the latents' rate. Alone, on the embedded model, 60 updates of 32 rows: factor 0.5 leaves a velocity error of
# 0.0067, 5 of 0.0048, 20 of 0.0055 (calibrated: 0.0149). With latents, scales move the borders of all their codes.
_SCALE_FACTOR_WITH_LATENTS = 0.5
_SCALE_FACTOR_ALONE = 5.0


def parameter_groups(trainee: nn.Module, config: DistillConfig, *, steps: int) -> list[dict[str, Any]]:
    """Everything that takes a gradient, by peak learning rate, as optimizers of torch take it.

    Args:
        trainee (`nn.Module`): from [`make_trainee`].
        config ([`DistillConfig`]): rates, where they are given.
        steps (`int`): of the phase; short ones may move faster.
    """
    groups: dict[float, list[nn.Parameter]] = {}
    divisor = min(max(steps / 2, 200), 2500)
    ternary: set[int] = set()
    for module in trainee.modules():
        if not isinstance(module, TrainableTernaryLayer):
            continue
        ternary.update(id(parameter) for parameter in module.parameters())
        mean_scale = float(whole(module.scale).mean())
        latent = config.latent_lr or mean_scale / divisor
        factor = _SCALE_FACTOR_ALONE if module.latent is None else _SCALE_FACTOR_WITH_LATENTS
        rates = {
            "latent": latent,
            "scale": config.scale_lr or latent * factor,
            "bias": config.other_lr,
            "low_rank_up": config.low_rank_lr,
            "low_rank_down": config.low_rank_lr,
        }
        for name, parameter in module.named_parameters():
            if parameter.requires_grad:
                groups.setdefault(rates[name], []).append(parameter)
    for parameter in trainee.parameters():
        if parameter.requires_grad and id(parameter) not in ternary:
            groups.setdefault(config.other_lr, []).append(parameter)
    return [{"params": parameters, "lr": rate} for rate, parameters in groups.items()]


def uses_8_bits(config: DistillConfig, *, on_gpu: bool = True) -> bool:
    """Whether the optimizer's moments have 8 bits instead of 32."""
    automatic = config.mode == "full" and on_gpu and has_extra("bitsandbytes")
    return config.optimizer == "adamw8bit" or (config.optimizer == "auto" and automatic)


def make_optimizer(groups: list[dict[str, Any]], config: DistillConfig, device: torch.device) -> torch.optim.Optimizer:
    """AdamW without weight decay: decay would pull every latent towards code 0.

    Raises:
        MissingExtraError: for `optimizer="adamw8bit"` without bitsandbytes.
    """
    if uses_8_bits(config, on_gpu=device.type == "cuda"):
        bitsandbytes = import_extra("bitsandbytes", "optimizer='adamw8bit'")
        logger.info("Optimizer: AdamW with 8-bit states (bitsandbytes).")
        return bitsandbytes.optim.AdamW8bit(groups, betas=BETAS, weight_decay=0.0)
    logger.info("Optimizer: AdamW with float32 states.")
    # On a CPU torch goes through the tensors one by one and in many passes, unless it is told not to.
    fused = True if device.type == "cpu" else None
    return torch.optim.AdamW(groups, betas=BETAS, weight_decay=0.0, fused=fused)


def rate_factor(step: int, steps: int) -> float:
    """Share of the peak learning rate at a step: 5 % linear warm-up, then a cosine down to 5 %."""
    warmup = max(1, round(WARMUP * steps))
    if step < warmup:
        return (step + 1) / warmup
    progress = (step - warmup) / max(1, steps - warmup)
    return FINAL_RATE + (1 - FINAL_RATE) * 0.5 * (1 + math.cos(math.pi * progress))
