# SPDX-License-Identifier: Apache-2.0
"""How much memory a mode needs, told from shapes before anything is allocated, and what fits instead."""

import collections
import contextlib
import dataclasses
import re
from collections.abc import Iterator, Mapping
from typing import Any

import psutil
import torch
from torch import nn

from ..backend import plan_conversion
from ..backend.config import TernaryConfig
from ..format import group_count, normalize_group_size
from ..rollouts import float_dtype
from .blocks import block_names
from .config import DistillConfig
from .optimizer import uses_8_bits


FLOAT32 = 4
_ADAM, _ADAM_8BIT = 8, 2  # bytes a parameter: two moments
_PACKED = 1.75 / 8  # bytes a weight: codes and scales
# float32 temporaries of the largest layer while it is fake-quantized: weight over scale, codes, product.
_TEMPORARIES = 3
# Allocators keep more than they hand out.
_HEADROOM = 1.1
# These see one vector a row, not the tokens: their inputs and outputs are nothing beside the others'.
_MODULATION = re.compile(r"(^|\.)(norm\w*\.linear|norm\w*\.linear_\w+|\w*mod\w*(\.\d+)?|adaLN_modulation(\.\d+)?)$")
# Gradient checkpointing of a UNet, whose blocks are of several levels, keeps the inputs of these.
_UNIT = re.compile(r"^(.*\b(?:transformer_blocks|resnets)\.\d+)(\.|$)")


@dataclasses.dataclass(frozen=True)
class MemoryEstimate:
    """Bytes that one process needs at the peak of a run.

    Args:
        mode (`str`): of [`DistillConfig`].
        teacher (`int`): the float denoiser.
        student (`int`): the packed student, and the parts of it that stay float, twice: stored and trained.
        trained (`int`): float32 parameters that are trained (the latents, in mode `"full"`).
        gradients (`int`): of these.
        optimizer (`int`): its two moments.
        weights (`int`): dequantized weights that the backward pass needs, and temporaries of one layer.
        activations (`int`): what else the backward pass needs, and the blocks' outputs that are compared.
    """

    mode: str
    teacher: int
    student: int
    trained: int
    gradients: int
    optimizer: int
    weights: int
    activations: int

    @property
    def total(self) -> int:
        """Everything, with a tenth for what allocators hold back."""
        return int(_HEADROOM * sum(self.parts().values()))

    def parts(self) -> dict[str, int]:
        """Bytes by name."""
        return {name: value for name, value in dataclasses.asdict(self).items() if name != "mode"}

    def __str__(self) -> str:
        listed = ", ".join(f"{name} {value / 1e9:.2f}" for name, value in self.parts().items())
        return f"mode={self.mode!r}: {self.total / 1e9:.2f} GB ({listed})"


def estimate_memory(
    denoiser: nn.Module,
    config: TernaryConfig,
    distill_config: DistillConfig,
    *,
    tokens: int,
    dtype: torch.dtype | None = None,
    eight_bit_optimizer: bool | None = None,
    shards: int = 1,
) -> MemoryEstimate:
    """The peak memory of a run, from shapes; the denoiser may be on the meta device.

    Args:
        denoiser (`nn.Module`): the float teacher.
        config ([`TernaryConfig`]): what is ternarized of it.
        distill_config ([`DistillConfig`]): mode, batch size, gradient checkpointing, ...
        tokens (`int`): that a row has inside the blocks, image and text together (FLUX at 1024 pixels: 4096 + 512).
        dtype (`torch.dtype`, *optional*): of the computation and of what is not trained; default: the denoiser's.
        eight_bit_optimizer (`bool`, *optional*): default: as `distill_config` says, as if on a GPU.
        shards (`int`, *optional*, defaults to 1): processes that FSDP divides what is trained among.
    """
    model = _Shapes.of(denoiser, config)
    size = (dtype or float_dtype(denoiser)).itemsize
    if eight_bit_optimizer is None:
        eight_bit_optimizer = uses_8_bits(distill_config)
    checkpointing = distill_config.checkpoints_gradients(model.ternary)
    trained = model.trained(distill_config)
    blockwise = distill_config.mode == "blockwise"
    # What one block needs in the backward pass; without checkpointing, all of them at once.
    frozen_codes = 0 if distill_config.mode in ("full", "blockwise") else 1
    kept = (size + frozen_codes) * (max(model.blocks.values()) if blockwise or checkpointing else model.ternary)
    rows = tokens * distill_config.batch_size * size
    if blockwise:
        width = max(model.block_widths.values())
    elif checkpointing:
        width = max(model.unit_widths.values())
    else:
        width = sum(model.block_widths.values())
    inside = rows * width
    # Between blocks: inputs that are recomputed from, and outputs of student and teacher that are compared.
    copies = int(checkpointing) + 2 * bool(distill_config.block_weight)
    between = rows * model.hidden * (1 if blockwise else copies * len(model.unit_widths))
    return MemoryEstimate(
        mode=distill_config.mode,
        teacher=model.total * size,
        student=int(2 * _PACKED * model.ternary + 2 * size * (model.total - model.ternary)),
        trained=FLOAT32 * trained // shards,
        gradients=FLOAT32 * trained // shards,
        optimizer=(_ADAM_8BIT if eight_bit_optimizer else _ADAM) * trained // shards,
        weights=kept + _TEMPORARIES * FLOAT32 * model.largest_layer,
        activations=inside + between,
    )


def forward_activations(denoiser: nn.Module, config: TernaryConfig, *, tokens: int, dtype: torch.dtype) -> int:
    """Bytes of activations of a row in a forward without gradients: one block's, as if it freed none of them.

    Args:
        denoiser, config, tokens, dtype: see [`estimate_memory`].
    """
    return tokens * dtype.itemsize * max(_Shapes.of(denoiser, config).unit_widths.values())


def check_memory(
    denoiser: nn.Module, config: TernaryConfig, distill_config: DistillConfig, *, available: int, **options: Any
) -> MemoryEstimate:
    """Refuses a run that cannot fit, before it starts.

    Args:
        available (`int`): bytes, counting what the teacher's denoiser takes already; see [`available_memory`].
        denoiser, config, distill_config, options: see [`estimate_memory`].

    Raises:
        MemoryError: says what it needs, which modes fit, and which options lower the need.
    """

    def estimate(changed: DistillConfig) -> MemoryEstimate:
        return estimate_memory(denoiser, config, changed, **options)

    needed = estimate(distill_config)
    if needed.total <= available:
        return needed
    others = [(changed, estimate(changed).total) for changed in _alternatives(distill_config)]
    advice = [
        f"mode={changed.mode!r}, gradient_checkpointing=True, batch_size={changed.batch_size} ({total / 1e9:.1f} GB)"
        for changed, total in others
        if total <= available
    ]
    remedy = f"What fits: {'; '.join(advice)}." if advice else "No mode fits, not even with one row at a time."
    raise MemoryError(
        f"{needed}, and {available / 1e9:.1f} GB are there. {remedy} FSDP over more processes divides what is "
        "trained; fewer pixels or a smaller batch_size with gradient_accumulation_steps lower the activations."
    )


def available_memory(device: torch.device, denoiser: nn.Module) -> int:
    """Bytes that a run may take on a device: what is free, and what the denoiser itself holds there."""
    held = sum(p.numel() * p.element_size() for p in denoiser.parameters() if p.device.type == device.type)
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0] + held
    if device.type == "mps":
        return torch.mps.recommended_max_memory() - torch.mps.driver_allocated_memory() + held
    return psutil.virtual_memory().available + held


def _alternatives(config: DistillConfig) -> Iterator[DistillConfig]:
    """What to try instead, best first: the same mode leaner, then the other modes by quality."""
    leaner = dataclasses.replace(config, gradient_checkpointing=True)
    single = dataclasses.replace(leaner, batch_size=1, gradient_accumulation_steps=config.batch_size)
    rows = [leaner] if config.gradient_checkpointing is not True else []
    rows += [single] if config.batch_size > 1 else []
    yield from (changed for changed in rows if changed != config)
    for mode in ("full", "blockwise", "lora", "scales"):
        if mode != config.mode:
            yield dataclasses.replace(leaner, mode=mode)
            if config.batch_size > 1:
                yield dataclasses.replace(single, mode=mode)


@dataclasses.dataclass(frozen=True)
class _Shapes:
    """What the estimate needs to know of a denoiser.

    Args:
        shapes (`Mapping[str, tuple[int, int]]`): ternary layer → outputs, inputs.
        blocks (`Mapping[str, int]`): block → its ternary weights.
        block_widths (`Mapping[str, int]`): block → inputs and outputs of all layers, of one token.
        unit_widths (`Mapping[str, int]`): of what gradient checkpointing recomputes at a time: blocks, and parts of
            those of UNets.
        scales (`int`): group scales of all ternary layers.
        total (`int`): all parameters.
        vectors (`int`): biases and norms of the whole model.
        hidden (`int`): width between blocks.
    """

    shapes: Mapping[str, tuple[int, int]]
    blocks: Mapping[str, int]
    block_widths: Mapping[str, int]
    unit_widths: Mapping[str, int]
    scales: int
    total: int
    vectors: int
    hidden: int

    @classmethod
    def of(cls, denoiser: nn.Module, config: TernaryConfig) -> "_Shapes":
        kinds = plan_conversion(denoiser, config).kinds
        weights = {name: denoiser.get_parameter(f"{name}.weight") for name, k in kinds.items() if k == "ternary"}
        shapes = {name: (len(weight), weight[0].numel()) for name, weight in weights.items()}
        blocks: collections.Counter[str] = collections.Counter()
        widths: collections.Counter[str] = collections.Counter()
        units: collections.Counter[str] = collections.Counter()
        inputs: collections.Counter[int] = collections.Counter()
        for name, (rows, columns) in shapes.items():
            block = next(iter(block_names([name])), name)
            blocks[block] += rows * columns
            if not _MODULATION.search(name):
                widths[block] += rows + columns
                units[found[1] if (found := _UNIT.match(name)) else block] += rows + columns
                inputs[columns] += 1
        parameters = list(denoiser.parameters())
        return cls(
            shapes=shapes,
            blocks=blocks,
            block_widths=widths,
            unit_widths=units,
            scales=sum(n * group_count(k, normalize_group_size(config.group_size, k)) for n, k in shapes.values()),
            total=sum(p.numel() for p in parameters),
            vectors=sum(p.numel() for p in parameters if p.dim() == 1),
            hidden=inputs.most_common(1)[0][0],
        )

    @property
    def ternary(self) -> int:
        """Ternary weights."""
        return sum(self.blocks.values())

    @property
    def largest_layer(self) -> int:
        """Weights of the largest layer."""
        return max(rows * columns for rows, columns in self.shapes.values())

    def trained(self, config: DistillConfig) -> int:
        """Parameters that take a gradient at a time."""
        others = {"none": 0, "vectors": self.vectors, "all": self.total - self.ternary}[config.train_other]
        others += self.scales if config.train_scales else 0
        if config.mode == "full":
            return self.ternary + others
        if config.mode == "lora":
            return sum(min(config.rank, *shape) * sum(shape) for shape in self.shapes.values()) + others
        # One block's latents at a time, and all scales at the end.
        return max(*self.blocks.values(), others) if config.mode == "blockwise" else others


@contextlib.contextmanager
def observed_tokens(denoiser: nn.Module) -> Iterator[list[int]]:
    """Measures the tokens of a row while the denoiser runs inside: the longest sequence that a linear layer sees.

    Yields:
        `list[int]`: one entry, 0 before the first call.
    """
    longest = [0]

    def look(module: nn.Module, inputs: tuple[torch.Tensor, ...]) -> None:
        if inputs and inputs[0].dim() > 2:
            longest[0] = max(longest[0], inputs[0].shape[-2])

    linears = [module for module in denoiser.modules() if isinstance(module, nn.Linear)]
    handles = [module.register_forward_pre_hook(look) for module in linears]
    try:
        yield longest
    finally:
        for handle in handles:
            handle.remove()
