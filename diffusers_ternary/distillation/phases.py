# SPDX-License-Identifier: Apache-2.0
"""The parts of a run: each trains certain parameters against certain outputs for a number of steps."""

import dataclasses
from collections.abc import Mapping, Sequence

from .blocks import block_names
from .config import DistillConfig
from .trainable import LayerTraining


_FINAL_SHARE = 0.25  # of a blockwise run: all scales together, after the blocks


@dataclasses.dataclass(frozen=True)
class Phase:
    """One part of a run.

    Args:
        name (`str`): for people and files.
        steps (`int`): updates.
        training (`Mapping[str, LayerTraining]`): ternary layer → what is trained of it; layers that are not named
            stay packed.
        train_other (`str`): see [`train_others`].
        block (`str`, *optional*): train against the output of this block alone; `None` = the prediction and all
            blocks.
    """

    name: str
    steps: int
    training: Mapping[str, LayerTraining]
    train_other: str
    block: str | None = None


def plan_phases(config: DistillConfig, layers: Sequence[str], order: Sequence[str]) -> tuple[Phase, ...]:
    """The phases of a mode.

    Args:
        config ([`DistillConfig`]): mode and steps.
        layers (`Sequence[str]`): the ternary layers.
        order (`Sequence[str]`): the blocks in the order in which they run.

    Raises:
        ValueError: for a blockwise run with fewer steps than phases.
    """
    if config.mode != "blockwise":
        return (Phase(config.mode, config.updates, _all(config, layers), config.train_other),)
    final = max(1, round(_FINAL_SHARE * config.updates))
    each, left = divmod(config.updates - final, len(order))
    if each < 1:
        raise ValueError(
            f"updates={config.updates} is too few for mode='blockwise' on {len(order)} blocks: give at least "
            f"{2 * (len(order) + 1)}."
        )
    phases = []
    for number, block in enumerate(order):
        inside = [name for name in layers if block_names([name]) == (block,)]
        training = {name: LayerTraining(latents=True, scales=config.train_scales) for name in inside}
        phases.append(Phase(block, each + (number < left), training, "none", block))
    everything = {name: LayerTraining(latents=False, scales=config.train_scales) for name in layers}
    return (*phases, Phase("scales", final, everything, config.train_other))


def _all(config: DistillConfig, layers: Sequence[str]) -> dict[str, LayerTraining]:
    lora = config.mode == "lora"
    return {
        name: LayerTraining(
            latents=config.mode == "full",
            scales=config.train_scales,
            low_rank=lora,
            rank=config.rank if lora else 0,
            seed=config.seed + index,
        )
        for index, name in enumerate(layers)
    }
