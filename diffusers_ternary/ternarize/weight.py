# SPDX-License-Identifier: Apache-2.0
"""A float matrix to a packed ternary weight, one layer at a time."""

import dataclasses
from collections.abc import Callable, Mapping

import torch

from ..format import (
    LOW_RANK_NAMES,
    TernarySpec,
    expand_scales,
    group_scales,
    pack_planes,
    planes_width,
    unpack_planes,
)
from .low_rank import LowRank, low_rank_residual
from .rotation import rotate
from .rounding import FUSED_ROUNDINGS, ROUNDINGS


# Rows are ternarized in slices of about this many weights: bounds the float32 copy (and the sort of `optimum`).
_CHUNK_WEIGHTS = 1 << 20


@dataclasses.dataclass(frozen=True)
class TernaryWeight:
    """A packed ternary weight.

    Args:
        spec (`TernarySpec`): shape, group size and scale layout.
        packed (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; 16-bit float.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]`, only in the `"double"` layout.
        low_rank ([`LowRank`], *optional*): the correction, if the spec's rank is not 0.
        column_scale (`torch.Tensor`, *optional*): float16 `[K]`, if the spec has column scales.
    """

    spec: TernarySpec
    packed: torch.Tensor
    scale: torch.Tensor
    multiplier: torch.Tensor | None = None
    low_rank: LowRank | None = None
    column_scale: torch.Tensor | None = None

    def codes(self) -> torch.Tensor:
        """Codes int8 `[N, K]`."""
        return unpack_planes(self.packed, self.spec.in_features)

    def dequantize(self, dtype: torch.dtype = torch.float32) -> torch.Tensor:
        """Dense weight `[N, K]`, rotated back and corrected: formed in float32 and rounded once to `dtype`."""
        rows, columns, size = self.spec.out_features, self.spec.in_features, self.spec.group_size
        scales = group_scales(self.scale, self.multiplier)
        dense = scales.new_empty(rows, columns)
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, rows, step):  # what is between codes and weights stays in the cache
            part = slice(start, start + step)
            codes = unpack_planes(self.packed[part], columns)
            if columns % size == 0:
                grouped = dense[part].view(-1, scales.shape[1], size)
                grouped.copy_(codes.reshape(grouped.shape) * scales[part, :, None])
            else:
                dense[part] = codes * expand_scales(scales[part], size, columns)
        return complete(dense, self.spec.hadamard, self.column_scale, self.low_rank, dtype)

    def tensors(self) -> dict[str, torch.Tensor]:
        """The tensors by the names of [`TernarySpec.memory_tensors`]."""
        tensors = {"weight": self.packed, "weight_scale": self.scale}
        if self.multiplier is not None:
            tensors["weight_multiplier"] = self.multiplier
        if self.column_scale is not None:
            tensors["column_scale"] = self.column_scale
        if self.low_rank is not None:
            tensors |= zip(LOW_RANK_NAMES, (self.low_rank.up, self.low_rank.down), strict=True)
        return tensors

    @classmethod
    def of_tensors(cls, spec: TernarySpec, tensors: Mapping[str, torch.Tensor]) -> "TernaryWeight":
        """Inverse of [`~TernaryWeight.tensors`]; other tensors are ignored."""
        low_rank = LowRank(*(tensors[name] for name in LOW_RANK_NAMES)) if spec.rank else None
        multiplier, column_scale = tensors.get("weight_multiplier"), tensors.get("column_scale")
        return cls(spec, tensors["weight"], tensors["weight_scale"], multiplier, low_rank, column_scale)

    def to(self, device: torch.device | str) -> "TernaryWeight":
        """The same weight on a device."""
        low_rank = self.low_rank
        return TernaryWeight(
            self.spec,
            self.packed.to(device),
            self.scale.to(device),
            None if self.multiplier is None else self.multiplier.to(device),
            None if low_rank is None else LowRank(low_rank.up.to(device), low_rank.down.to(device)),
            None if self.column_scale is None else self.column_scale.to(device),
        )


def complete(
    unpacked: torch.Tensor,
    hadamard: int,
    column_scale: torch.Tensor | None,
    low_rank: LowRank | None,
    dtype: torch.dtype,
    *,
    rotation: Callable[[torch.Tensor, int], torch.Tensor] = rotate,
) -> torch.Tensor:
    """The dense weight: codes times scales, rotated back, scaled by column and corrected, in float32.

    It is rounded once, to `dtype`.

    Args:
        unpacked (`torch.Tensor`): codes times scales, `[N, K]`.
        hadamard (`int`): block size of the rotation that the codes were made after; 0 = none.
        column_scale (`torch.Tensor`, *optional*): factors of the inputs before the rotation, `[K]`.
        low_rank ([`LowRank`], *optional*): the correction.
        dtype (`torch.dtype`): of the result.
        rotation (`Callable`): what rotates on the device, as [`rotate`] does.
    """
    dense = rotation(unpacked, hadamard) if hadamard else unpacked
    if column_scale is not None:
        dense = dense * column_scale
    return (dense if low_rank is None else dense + low_rank.dense()).to(dtype)


def check_matrix(weight: torch.Tensor, shape: tuple[int, int] | None = None, *, name: str) -> None:
    """Raises unless a weight is a float matrix, of a shape if one is given.

    Raises:
        ValueError: names the layer, and what was expected.
    """
    if weight.dim() != 2 or not weight.is_floating_point() or (shape is not None and tuple(weight.shape) != shape):
        of_shape = f" of {list(shape)}" if shape is not None else ""
        raise ValueError(f"{name}: expected a float [N, K] weight{of_shape}, got {weight.dtype} {list(weight.shape)}.")


def check_finite(weight: torch.Tensor, *, name: str) -> None:
    """Raises if a weight holds NaN or Inf.

    Raises:
        ValueError: names the layer, the count and the remedy.
    """
    finite = torch.isfinite(weight)
    if not bool(finite.all()):
        bad = int((~finite).sum())
        raise ValueError(
            f"{name}: the weight holds {bad} NaN or Inf of {weight.numel()} values and cannot be quantized. "
            f"Check the checkpoint, or list the layer in modules_to_not_convert."
        )


def ternarize(
    weight: torch.Tensor,
    *,
    group_size: int | None = 128,
    rounding: str = "twn",
    scales: str = "auto",
    hadamard: int = 0,
    rank: int = 0,
    name: str = "weight",
) -> TernaryWeight:
    """Rounds a float weight to ternary codes and scales, and packs it.

    Args:
        weight (`torch.Tensor`): float `[N, K]`, any float dtype and device.
        group_size (`int`, *optional*, defaults to 128): columns per scale; `None` = one scale per row.
        rounding (`str`, *optional*, defaults to `"twn"`): `"twn"`, `"optimum"` or `"absmean"`.
        scales (`str`, *optional*, defaults to `"auto"`): `"group"`, `"double"`, `"portable"` or `"auto"`, see
            [`TernarySpec.for_matrix`].
        hadamard (`int`, *optional*, defaults to 0): rotate the columns in blocks of this size first; a weight with
            fewer columns is not rotated.
        rank (`int`, *optional*, defaults to 0): rank of the correction that is stored for what the codes miss; at
            most the smaller side.
        name (`str`, *optional*): layer name for messages.

    Returns:
        [`TernaryWeight`] on the device of `weight`. A group of zeros has scale 0.

    Raises:
        ValueError: if the weight is not a float matrix or holds NaN or Inf, or an option is impossible.
    """
    if rounding not in ROUNDINGS:
        raise ValueError(f"rounding={rounding!r} is not one of {', '.join(ROUNDINGS)}.")
    check_matrix(weight, name=name)
    spec = TernarySpec.for_matrix(*weight.shape, group_size=group_size, scales=scales, hadamard=hadamard, rank=rank)
    return round_to(weight, spec, rounding=rounding, name=name)


def round_to(weight: torch.Tensor, spec: TernarySpec, *, rounding: str = "twn", name: str = "weight") -> TernaryWeight:
    """Rounds a float weight to what a spec describes; see [`ternarize`], which makes the spec.

    Args:
        weight (`torch.Tensor`): float `[N, K]`, of the spec's shape.
        spec ([`TernarySpec`]): what to store.
        rounding (`str`, *optional*, defaults to `"twn"`): name of a rule, of [`ROUNDINGS`].
        name (`str`, *optional*): layer name for messages.

    Raises:
        ValueError: if the weight is not a float matrix of that shape, or holds NaN or Inf.
    """
    rows, columns, size, groups = spec.out_features, spec.in_features, spec.group_size, spec.groups
    check_matrix(weight, (rows, columns), name=name)
    weight = weight.detach()
    # Allocated before the temporaries: pieces that stay between those that go would keep the heap from shrinking.
    packed = torch.empty(rows, planes_width(columns), dtype=torch.int8, device=weight.device)
    group_scale = torch.empty(rows, groups, device=weight.device)
    fused = None if spec.hadamard else FUSED_ROUNDINGS.get((rounding, weight.device.type))
    if fused is None or not fused(weight, size, packed, group_scale):
        counts = torch.full((groups,), float(size), device=weight.device)
        counts[-1] = columns - (groups - 1) * size
        step = max(1, _CHUNK_WEIGHTS // columns)
        for start in range(0, rows, step):
            part = weight[start : start + step].float()  # float32: sums over K in 16 bits lose small weights
            check_finite(part, name=name)
            part = rotate(part, spec.hadamard)
            padded = torch.nn.functional.pad(part, (0, groups * size - columns)).view(-1, groups, size)
            result = ROUNDINGS[rounding](padded, counts)
            packed[start : start + step] = pack_planes(result.codes.view(-1, groups * size)[:, :columns])
            group_scale[start : start + step] = result.scales
    codes = dataclasses.replace(spec, rank=0) if spec.rank else spec
    rounded = TernaryWeight(codes, packed, *spec.round_scales(group_scale))
    return with_low_rank(rounded, weight, spec.rank) if spec.rank else rounded


def with_low_rank(
    packed: TernaryWeight, weight: torch.Tensor, rank: int, *, whitening: torch.Tensor | None = None
) -> TernaryWeight:
    """Adds the correction of a rank (capped at the smaller side; 0 = none) for what the codes miss of `weight`.

    Args: see [`low_rank_residual`].
    """
    rank = min(rank, *weight.shape)
    if not rank:
        return packed
    residual = weight.to(torch.promote_types(weight.dtype, torch.float32)) - packed.dequantize()
    low_rank = low_rank_residual(residual, rank, whitening=whitening)
    return dataclasses.replace(packed, spec=dataclasses.replace(packed.spec, rank=rank), low_rank=low_rank)
