# SPDX-License-Identifier: Apache-2.0
"""Lossless recovery: finds the codes and scales in a dense weight that was ternary before it was dequantized.

Such a weight holds only {-s, 0, +s} in every group of a row, but the file does not say how long the groups are. Every
place where the magnitude changes along a row must lie on a group boundary; the group sizes that all these places allow
are found from a few rows, and the largest is then checked on every weight. Nothing is ever rounded: a single weight
that does not fit makes the answer "not ternary". (Negative zeros become zeros, which compare equal.)
"""

import dataclasses

import torch

from ..format import TernarySpec, group_count, pack_planes
from .weight import TernaryWeight


MIN_GROUP_SIZE = 32
_MIN_COLUMNS = 8
RECOVERABLE_DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# Enough rows to tell: a weight that is not ternary betrays itself in the first one.
_SAMPLE_ROWS = 8
# Bounds the temporary copies: weights checked, and pairs tried against group sizes, at a time.
_CHUNK_WEIGHTS = 1 << 20
_CHUNK_PAIRS = 64


@dataclasses.dataclass(frozen=True)
class TernaryFit:
    """How much of a dense weight is ternary.

    Args:
        group_size (`int`): the group size that was looked at.
        fraction (`float`): share of its groups that hold only {-s, 0, +s}; 1 = ternary.
    """

    group_size: int
    fraction: float

    @property
    def almost(self) -> bool:
        """Ternary for the most part, yet not exactly: probably a damaged or edited ternary checkpoint."""
        return 0.5 <= self.fraction < 1

    def __str__(self) -> str:
        # Rounded down, so that 100 % is said of ternary weights only.
        return f"{int(self.fraction * 10000) / 100:g} % of the groups of {self.group_size} are ternary"


def recover(weight: torch.Tensor) -> TernaryWeight | TernaryFit | None:
    """Packs a dense weight whose groups hold only {-s, 0, +s}; the result dequantizes to equal values.

    An ordinary weight costs a look at a few rows.

    Args:
        weight (`torch.Tensor`): `[N, K]`, bfloat16, float16 or float32, K >= 8; any group size from 32 up to the whole
            row.

    Returns:
        [`TernaryWeight`] if every group is ternary, with scales in the dtype of `weight` (float32 scales in 16 bits
        where that is exact). [`TernaryFit`] if it is ternary for the most part: somebody damaged or edited it. `None`
        for every other weight, and for other dtypes and shapes.
    """
    rows = _sample(weight)
    if rows is None:
        return None
    # Ordinary weights stop here. One damaged row must not hide what the others say.
    few = rows.changes.sum(dim=1) < group_count(weight.shape[1], min(MIN_GROUP_SIZE, weight.shape[1]))
    if 2 * int(few.sum()) <= len(few):
        return None
    size = _find_group_size(weight, rows)
    if size is not None:
        return _packed(weight, size)
    sizes = _group_sizes(weight)
    values = rows.values.split(1)
    fitting = sum(_Rows.of(row).consistent(sizes).numel() > 0 for row in values)
    return ternary_fit(weight) if 2 * fitting > len(values) else None


def find_group_size(weight: torch.Tensor) -> int | None:
    """The largest group size with which every group of every row holds only {-s, 0, +s}; `None` if there is none.

    A weight that is not ternary costs a look at a few rows; a ternary one is read completely.
    """
    rows = _sample(weight)
    return None if rows is None else _find_group_size(weight, rows)


def ternary_fit(weight: torch.Tensor) -> TernaryFit:
    """How much of a dense `[N, K]` weight is ternary: for reports, and to recognize what is almost ternary."""
    columns = weight.shape[1]
    sizes = [size for size in (columns, 256, 128, 64, MIN_GROUP_SIZE) if size <= columns]
    if weight.dtype not in RECOVERABLE_DTYPES:
        return TernaryFit(sizes[-1], 0.0)
    fits = []
    for size in dict.fromkeys(sizes):
        good = sum(int(_fitting_groups(part, size).sum()) for part in _row_chunks(weight))
        fits.append(TernaryFit(size, good / (weight.shape[0] * group_count(columns, size))))
    # Smaller groups always fit better: the largest that comes close to the best is the one they were made with.
    best = max(fit.fraction for fit in fits)
    return next(fit for fit in fits if fit.fraction >= 0.9 * best)


@dataclasses.dataclass(frozen=True)
class _Rows:
    """A few rows of a weight.

    Args:
        values (`torch.Tensor`): `[R, K]`.
        changes (`torch.Tensor`): bool `[R, K]`, where a value differs in magnitude from the nonzero one before it.
        before (`torch.Tensor`): int64 `[R, K]`, the place of that one.
    """

    values: torch.Tensor
    changes: torch.Tensor
    before: torch.Tensor

    @classmethod
    def of(cls, values: torch.Tensor) -> "_Rows":
        """Finds the changes."""
        mags = _magnitudes(values)
        positions = torch.arange(mags.shape[1], device=mags.device).expand_as(mags)
        last = torch.where(mags > 0, positions, -1).cummax(dim=1).values
        before = torch.nn.functional.pad(last[:, :-1], (1, 0), value=-1)
        changes = (mags > 0) & (before >= 0) & (mags != mags.gather(1, before.clamp_min(0)))
        return cls(values, changes, before)

    def consistent(self, sizes: torch.Tensor) -> torch.Tensor:
        """Those of the group sizes (ascending) with which these rows can be ternary."""
        # Groups of the smallest size have this many inner boundaries.
        most = group_count(self.values.shape[1], int(sizes[0])) if sizes.numel() else 0
        if not bool(torch.isfinite(self.values).all()) or int(self.changes.sum(dim=1).max()) >= most:
            return sizes[:0]
        positions = torch.arange(self.values.shape[1], device=sizes.device).expand_as(self.before)
        # The boundary lies after the previous nonzero weight and not after the one that differs.
        pairs = torch.unique(torch.stack([self.before[self.changes], positions[self.changes]]), dim=1)
        pairs = pairs[:, (pairs[1] - pairs[0]).argsort()]  # the tightest first: they rule out the most
        for chunk in pairs.split(_CHUNK_PAIRS, dim=1):
            sizes = sizes[(chunk[0, :, None] // sizes < chunk[1, :, None] // sizes).all(dim=0)]
        return sizes


def _find_group_size(weight: torch.Tensor, rows: _Rows) -> int | None:
    sizes = rows.consistent(_group_sizes(weight))
    while sizes.numel():
        best = _preferred(sizes, weight.shape[1])
        failing = _first_misfit(weight, best)
        if failing is None:
            return best
        sizes = _Rows.of(failing).consistent(sizes[sizes != best])
    return None


def _sample(weight: torch.Tensor) -> _Rows | None:
    """A few rows, by which most weights can be told; `None` of what cannot be ternary."""
    # Of rows of a value or two nothing can be told, and nothing would be saved.
    if weight.dim() != 2 or weight.dtype not in RECOVERABLE_DTYPES or weight.shape[1] < _MIN_COLUMNS:
        return None
    rows = weight.shape[0]
    if rows == 0:
        return None
    return _Rows.of(weight[torch.linspace(0, rows - 1, min(rows, _SAMPLE_ROWS), device=weight.device).long()])


def _group_sizes(weight: torch.Tensor) -> torch.Tensor:
    columns = weight.shape[1]
    return torch.arange(min(MIN_GROUP_SIZE, columns), columns + 1, device=weight.device)


def _packed(weight: torch.Tensor, size: int) -> TernaryWeight:
    packed, scales = [], []
    for part in _row_chunks(weight):
        packed.append(pack_planes(part.sign().to(torch.int8)))
        scales.append(_group_magnitudes(part, size).amax(dim=-1).view(weight.dtype))
    spec = TernarySpec(weight.shape[0], weight.shape[1], size)
    return TernaryWeight(spec, torch.cat(packed), _smallest_exact(torch.cat(scales)))


def _row_chunks(weight: torch.Tensor) -> list[torch.Tensor]:
    return list(weight.split(max(1, _CHUNK_WEIGHTS // weight.shape[1])))


def _magnitudes(weight: torch.Tensor) -> torch.Tensor:
    """Bit patterns of |weight| as integers, which order and compare as the values do."""
    if weight.element_size() == 2:
        return weight.contiguous().view(torch.int16) & 0x7FFF
    return weight.contiguous().view(torch.int32) & 0x7FFFFFFF


def _group_magnitudes(weight: torch.Tensor, size: int) -> torch.Tensor:
    """Magnitudes by group `[R, G, size]`, the last group padded with zeros."""
    rows, columns = weight.shape
    groups = group_count(columns, size)
    padded = torch.nn.functional.pad(_magnitudes(weight), (0, groups * size - columns))
    return padded.view(rows, groups, size)


def _fitting_groups(weight: torch.Tensor, size: int) -> torch.Tensor:
    groups = _group_magnitudes(weight, size)
    largest = groups.amax(dim=-1, keepdim=True)  # [R, G, 1]
    finite = largest < _magnitudes(torch.full((1,), torch.inf, dtype=weight.dtype, device=weight.device))
    return (((groups == 0) | (groups == largest)).all(dim=-1, keepdim=True) & finite).squeeze(-1)


def _first_misfit(weight: torch.Tensor, size: int) -> torch.Tensor | None:
    """Up to a few rows that are not ternary in groups of `size`, or `None` if all are."""
    for part in _row_chunks(weight):
        fits = _fitting_groups(part, size).all(dim=-1)
        if not bool(fits.all()):
            return part[~fits][:_SAMPLE_ROWS]
    return None


def _preferred(sizes: torch.Tensor, columns: int) -> int:
    """Of group sizes (ascending), one that makes the fewest groups, rather one that divides the row, the roundest."""
    fewest = group_count(columns, int(sizes[-1]))
    as_few = sizes[sizes >= group_count(columns, fewest)]
    return min(as_few.tolist(), key=lambda size: (columns % size != 0, -(size & -size)))


def _smallest_exact(scales: torch.Tensor) -> torch.Tensor:
    if scales.dtype == torch.float32:
        for dtype in (torch.float16, torch.bfloat16):
            narrow = scales.to(dtype)
            if torch.equal(narrow.float(), scales):
                return narrow
    return scales
