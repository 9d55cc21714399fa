# SPDX-License-Identifier: Apache-2.0
"""What one quantized layer stores: the tensors, their dtypes and shapes, in memory and in a file."""

import dataclasses
import functools
from typing import Any, ClassVar

import torch

from .base3 import packed_base3_bytes
from .planes import planes_width
from .scales import (
    double_quantize,
    group_count,
    normalize_group_size,
    portable_scales,
    scale_layout,
    storage_dtype,
)


SCALE_LAYOUTS = ("group", "double")
# What can be asked for: `scale_layout` settles "auto"; "portable" is "group" with scales that are exact in both of the
# 16-bit floats.
REQUESTED_LAYOUTS = ("auto", *SCALE_LAYOUTS, "portable")
SCALE_DTYPES = (torch.float16, torch.bfloat16, torch.float32)
LOW_RANK_DTYPE = torch.float16
LOW_RANK_NAMES = ("low_rank_up", "low_rank_down")
COLUMN_SCALE_DTYPE = torch.float16
FLOAT_NAMES = ("weight_scale", "column_scale", *LOW_RANK_NAMES)  # which layers hold as bit patterns


@dataclasses.dataclass(frozen=True)
class TensorSpec:
    """Allowed dtypes and the shape of one stored tensor."""

    dtypes: tuple[torch.dtype, ...]
    shape: tuple[int, ...]


def _check_positive(**sizes: int) -> None:
    for name, size in sizes.items():
        if not isinstance(size, int) or isinstance(size, bool) or size < 1:
            raise ValueError(f"{name}={size!r} is not a positive integer.")


def check_hadamard(value: object) -> None:
    """Raises unless `value` is 0 or a power of two of at least 2."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0 or value == 1 or value & (value - 1):
        raise ValueError(f"hadamard={value!r} is neither 0 (no rotation) nor a power of two such as 128.")


def check_rank(value: object) -> None:
    """Raises unless `value` is an integer of at least 0."""
    if not isinstance(value, int) or isinstance(value, bool) or value < 0:
        raise ValueError(f"rank={value!r} is neither 0 (no correction) nor a positive integer.")


@dataclasses.dataclass(frozen=True)
class TernarySpec:
    """A ternary weight.

    Args:
        out_features (`int`): N.
        in_features (`int`): K.
        group_size (`int`): columns that share a scale, 1..K; the last group of a row may be shorter.
        scales (`str`): `"group"` (one 16-bit scale per group) or `"double"` (a uint8 multiplier of 0..63 per group
            times one 16-bit scale per row).
        hadamard (`int`): block size of the rotation of the inputs that the codes were made for, a power of two of at
            most K; 0 = none (see [`ternarize.rotation.rotate`]).
        rank (`int`): rank of the correction that is added to the product, `up @ down` with float16 `[N, rank]` and
            `[rank, K]`; 0 = none.
        column_scales (`bool`): whether each input is multiplied by a float16 factor of its own, before the rotation.
        portable (`bool`): round scales to what float16 and bfloat16 both hold. Not part of the record: in a file, the
            scales are what they are.
    """

    out_features: int
    in_features: int
    group_size: int
    scales: str = "group"
    hadamard: int = 0
    rank: int = 0
    column_scales: bool = False
    portable: bool = dataclasses.field(default=False, compare=False)

    kind: ClassVar[str] = "ternary"

    def __post_init__(self) -> None:
        _check_positive(out_features=self.out_features, in_features=self.in_features, group_size=self.group_size)
        if self.group_size > self.in_features:
            raise ValueError(f"group_size={self.group_size} is larger than in_features={self.in_features}.")
        if self.scales not in SCALE_LAYOUTS:
            raise ValueError(f"scales={self.scales!r} is not one of {', '.join(SCALE_LAYOUTS)}.")
        check_hadamard(self.hadamard)
        if self.hadamard > self.in_features:
            raise ValueError(f"hadamard={self.hadamard} is larger than in_features={self.in_features}.")
        check_rank(self.rank)
        if self.rank > min(self.in_features, self.out_features):
            raise ValueError(f"rank={self.rank} is larger than a side of {[self.out_features, self.in_features]}.")
        if not isinstance(self.column_scales, bool):
            raise ValueError(f"column_scales={self.column_scales!r} is not true or false.")

    @classmethod
    def for_matrix(
        cls,
        out_features: int,
        in_features: int,
        *,
        group_size: int | None = 128,
        scales: str = "auto",
        hadamard: int = 0,
        rank: int = 0,
    ) -> "TernarySpec":
        """What options that were chosen for a whole model come to for one matrix.

        Args:
            out_features (`int`): N.
            in_features (`int`): K.
            group_size (`int`, *optional*, defaults to 128): columns per scale, at most K; `None` = one scale per row.
            scales (`str`, *optional*, defaults to `"auto"`): `"group"`, `"double"`, `"portable"` (`"group"`, with
                [`portable_scales`]) or `"auto"`, see [`scale_layout`].
            hadamard (`int`, *optional*, defaults to 0): block size of the rotation; a matrix with fewer columns is not
                rotated.
            rank (`int`, *optional*, defaults to 0): of the correction, at most the smaller side.

        Raises:
            ValueError: if an option is impossible for every matrix.
        """
        _check_positive(out_features=out_features, in_features=in_features)
        size = normalize_group_size(group_size, in_features)
        portable = scales == "portable"
        return cls(
            out_features,
            in_features,
            size,
            "group" if portable else scale_layout(scales, in_features, size),
            portable=portable,
            hadamard=hadamard if hadamard <= in_features else 0,
            rank=min(rank, out_features, in_features),
        )

    @property
    def format_version(self) -> int:
        """The first version of the file format that has everything that is stored here."""
        return 3 if self.column_scales else 1

    @functools.cached_property
    def groups(self) -> int:
        """Groups per row (G)."""
        return group_count(self.in_features, self.group_size)

    @property
    def weights(self) -> int:
        """Number of weights, N * K."""
        return self.out_features * self.in_features

    def round_scales(self, scales: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor | None]:
        """`weight_scale` and `weight_multiplier` that hold group scales, float32 `[N, G]`, in 16 bits and less."""
        if self.scales == "double":
            return double_quantize(scales)
        return portable_scales(scales) if self.portable else scales.to(storage_dtype(scales)), None

    def file_tensors(self) -> dict[str, TensorSpec]:
        """Tensors in a file: base-3 codes, scales, and what its options add."""
        return self._tensors(TensorSpec((torch.uint8,), (packed_base3_bytes(self.weights),)))

    def memory_tensors(self) -> dict[str, TensorSpec]:
        """Tensors in memory: 2-bit planes, scales, and what its options add."""
        return self._tensors(TensorSpec((torch.int8,), (self.out_features, planes_width(self.in_features))))

    def _tensors(self, codes: TensorSpec) -> dict[str, TensorSpec]:
        rows, columns = self.out_features, self.in_features
        tensors = {"weight": codes}
        if self.scales == "double":
            tensors["weight_scale"] = TensorSpec(SCALE_DTYPES, (rows, 1))
            tensors["weight_multiplier"] = TensorSpec((torch.uint8,), (rows, self.groups))
        else:
            tensors["weight_scale"] = TensorSpec(SCALE_DTYPES, (rows, self.groups))
        if self.column_scales:
            tensors["column_scale"] = TensorSpec((COLUMN_SCALE_DTYPE,), (columns,))
        if self.rank:
            tensors["low_rank_up"] = TensorSpec((LOW_RANK_DTYPE,), (rows, self.rank))
            tensors["low_rank_down"] = TensorSpec((LOW_RANK_DTYPE,), (self.rank, columns))
        return tensors

    def to_json(self) -> dict[str, Any]:
        """JSON-safe description; [`layer_spec_from_json`] reads it back."""
        return {
            "kind": self.kind,
            "shape": [self.out_features, self.in_features],
            "group_size": self.group_size,
            "scales": self.scales,
            **({"hadamard": self.hadamard} if self.hadamard else {}),
            **({"rank": self.rank} if self.rank else {}),
            **({"column_scales": True} if self.column_scales else {}),
        }


@dataclasses.dataclass(frozen=True)
class Int8Spec:
    """A symmetric int8 weight with one scale per row.

    Args:
        out_features (`int`): N.
        in_features (`int`): K.
    """

    out_features: int
    in_features: int

    kind: ClassVar[str] = "int8"
    format_version: ClassVar[int] = 1

    def __post_init__(self) -> None:
        _check_positive(out_features=self.out_features, in_features=self.in_features)

    @property
    def weights(self) -> int:
        """Number of weights, N * K."""
        return self.out_features * self.in_features

    def memory_tensors(self) -> dict[str, TensorSpec]:
        """Tensors in memory: the int8 weight and its row scales."""
        return {
            "weight": TensorSpec((torch.int8,), (self.out_features, self.in_features)),
            "weight_scale": TensorSpec(SCALE_DTYPES, (self.out_features, 1)),
        }

    def file_tensors(self) -> dict[str, TensorSpec]:
        """Tensors in a file: the same as in memory."""
        return self.memory_tensors()

    def to_json(self) -> dict[str, Any]:
        """JSON-safe description; [`layer_spec_from_json`] reads it back."""
        return {"kind": self.kind, "shape": [self.out_features, self.in_features]}


LayerSpec = TernarySpec | Int8Spec


def layer_spec_from_json(data: Any) -> LayerSpec:
    """Reads what `to_json` of a spec wrote.

    Raises:
        ValueError: if a field is missing, unknown or impossible.
    """
    if not isinstance(data, dict):
        raise ValueError(f"a layer description must be an object, got {data!r}.")
    fields = dict(data)
    kind = fields.pop("kind", None)
    shape = fields.pop("shape", None)
    if not isinstance(shape, list) or len(shape) != 2:
        raise ValueError(f"shape={shape!r} is not [out_features, in_features].")
    if "portable" in fields:
        raise ValueError(f"the fields of a {kind} layer are wrong: portable says how to round, not what is stored.")
    try:
        if kind == TernarySpec.kind:
            return TernarySpec(shape[0], shape[1], **fields)
        if kind == Int8Spec.kind:
            return Int8Spec(shape[0], shape[1], **fields)
    except TypeError as error:
        raise ValueError(f"the fields of a {kind} layer are wrong: {error}.") from error
    raise ValueError(f"kind={kind!r} is not one of ternary, int8.")
