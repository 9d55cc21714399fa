# SPDX-License-Identifier: Apache-2.0
"""Which kernel serves which shape on which device: plain data in, plain data out, no device touched.

The order of the candidates is a prior from arithmetic and from compiled instruction counts; the first one serves
until the tuner has measured the others (see `tuning`).
"""

import dataclasses

import torch

from .weights import PackedWeight, group_mode


GEMV_MAX_ROWS = 16  # one tensor-core tile: more rows cost a second read of x, fewer cost nothing less
# From here a dense product hides the unpacking (N * K bytes written once, against M * N * K operations): 5-6 % of
# the time at 4,096 rows, about 20 % at 1,024, 45 % at 512, by arithmetic.
UNPACK_FIRST_ROWS = 1536  # the order of the candidates, not which they are, so it may lie inside a bucket
# Below, reading the weight bounds the product and 8-bit activations only add a launch.
AUTO_QUANTIZE_ROWS = 256
AUTO_QUANTIZE_WEIGHTS = 1 << 20
# int32 holds K products of 64 * 127.
INT8_MAX_IN_FEATURES = (2**31 - 1) // (64 * 127)
# Up to this K float8 sums are taken as the matrix unit makes them; beyond, a trial looks at their error.
MAX_IMPRECISE_SUM = 8192
# Relative RMS error on Gaussian activations, as (row scale, group scales); where codes are scaled, float8 rounds the
# multipliers of groups to four significant bits as well. Held by `integration_tests/kernels/triton/test_kernels.py`.
ACTIVATION_ERROR = {"none": (0.0, 0.0), "int8": (0.010, 0.015), "float8_e4m3fn": (0.030, 0.045)}
# What `"auto"` accepts: -26 dB, where ternary rounding itself leaves about -6 dB.
AUTO_ERROR_BOUND = 0.05

SUMS = 3  # of `Plan.scale_mode`: group scales multiply the sums over blocks


@dataclasses.dataclass(frozen=True)
class Target:
    """What dispatch must know of a device.

    Args:
        backend (`str`): `"cuda"`, `"hip"`, `"xpu"`, or `"interpret"` (Triton's interpreter on the CPU).
        arch (`int | str`): compute capability times ten (cuda), or the gfx name (hip).
        shared_memory (`int`): bytes of shared memory that one program may use.
    """

    backend: str
    arch: int | str
    shared_memory: int

    @property
    def supported(self) -> bool:
        """Whether the kernels compile for it."""
        return self.backend in ("hip", "xpu", "interpret") or (self.backend == "cuda" and int(self.arch) >= 80)

    @property
    def inline_ptx(self) -> bool:
        """Whether PTX may be inlined."""
        return self.backend == "cuda"

    @property
    def register_operands(self) -> bool:
        """Whether it is an NVIDIA GPU whose matrix instructions read both operands from registers."""
        return self.backend == "cuda" and not 90 <= int(self.arch) < 120  # sm_120 is like sm_89 in this

    @property
    def activation_dtypes(self) -> tuple[str, ...]:
        """8-bit activation dtypes with a matrix instruction, the fastest first."""
        if self.backend == "interpret":
            return ("int8", "float8_e4m3fn")
        if self.backend == "cuda":
            if int(self.arch) >= 90:
                return ("float8_e4m3fn", "int8")
            # Ada has float8, at half its int8 rate on GeForce cards.
            return ("int8", "float8_e4m3fn") if int(self.arch) >= 89 else ("int8",)
        # The float8 of gfx942 is another format (e4m3fnuz).
        return ("int8",)

    @property
    def quantizes_by_default(self) -> bool:
        """Whether 8-bit activations are known to double the rate of 16-bit ones."""
        return self.backend == "cuda" or self.arch in ("gfx942", "gfx950")


@dataclasses.dataclass(frozen=True)
class Request:
    """One product.

    Args:
        rows, out_features, in_features (`int`): M, N, K.
        group_size (`int`): columns per scale.
        per_row (`bool`): one scale per row, no multipliers.
        dtype (`torch.dtype`): of the activations and the output.
        activation_dtype (`str`): `"auto"`, `"none"`, `"int8"` or `"float8_e4m3fn"`.
    """

    rows: int
    out_features: int
    in_features: int
    group_size: int
    per_row: bool
    dtype: torch.dtype
    activation_dtype: str


@dataclasses.dataclass(frozen=True)
class Plan:
    """How to compute it.

    Args:
        path (`str`): `"gemv"`, `"fused"`, `"dense"` (unpack, then the Triton product) or `"library"` (unpack, then
            the vendor's product: `mm`, `_int_mm` or `_scaled_mm`) or `"plain"` (torch alone, where no other is right).
        block_m, block_n, block_k, num_warps, num_stages, weight_left: the tile, not used by the last two.
        scale_sums (`bool`): group scales multiply the sums over blocks instead of the codes, where groups end with
            blocks.
        exact (`bool`): float8 products are summed in float32 where the matrix unit would keep fewer bits.
    """

    path: str
    block_m: int = 0
    block_n: int = 0
    block_k: int = 0
    num_warps: int = 4
    num_stages: int = 3
    weight_left: bool = False
    scale_sums: bool = False
    exact: bool = False

    def __str__(self) -> str:
        tile = f" {self.block_m}x{self.block_n}x{self.block_k}" if self.block_m else ""
        return f"{self.path}{tile}{', weight left' if self.weight_left else ''}{', exact sums' if self.exact else ''}"

    def shared_memory(self, x_bytes: int) -> int:
        """Upper estimate of the bytes of shared memory for the operands of the pipeline."""
        return self.num_stages * self.block_k * (self.block_m * x_bytes + self.block_n)

    def scale_mode(self, weight: PackedWeight) -> int:
        """How the kernels of packed weights apply scales, `GROUPS` of `decode`; 0 for the others."""
        if weight.per_row or self.path not in ("gemv", "fused"):
            return 0
        mode = weight.group_mode(self.block_k)
        return SUMS if mode == 1 and self.scale_sums else mode


PLAIN = Plan("plain")


def resolve_activation_dtype(target: Target, request: Request) -> str:
    """`"none"`, `"int8"` or `"float8_e4m3fn"`: what the target can do of what was asked."""
    allowed = [d for d in target.activation_dtypes if d != "int8" or request.in_features <= INT8_MAX_IN_FEATURES]
    asked = request.activation_dtype
    if asked == "none" or asked in allowed:
        return asked
    if asked != "auto":
        return "none"  # more exact than what was asked; the caller logs it
    if request.rows < AUTO_QUANTIZE_ROWS or request.out_features * request.in_features < AUTO_QUANTIZE_WEIGHTS:
        return "none"
    if not target.quantizes_by_default:
        return "none"
    column = 0 if request.per_row else 1
    return next((d for d in allowed if ACTIVATION_ERROR[d][column] <= AUTO_ERROR_BOUND), "none")


def row_bucket(rows: int) -> int:
    """The power of two at or above `rows`, within 8..16384: what tuning distinguishes, and tiles depend on."""
    return min(max(1 << (rows - 1).bit_length(), 8), 16384)


def candidates(target: Target, request: Request, activation_dtype: str) -> tuple[Plan, ...]:
    """Plans worth measuring, the one to trust unmeasured first.

    Args:
        target ([`Target`]): the device.
        request ([`Request`]): the product.
        activation_dtype (`str`): as [`resolve_activation_dtype`] returned it.
    """
    x_bytes = request.dtype.itemsize if activation_dtype == "none" else 1
    if request.rows <= GEMV_MAX_ROWS:
        plans = _gemv_plans(target, request, activation_dtype)
    elif x_bytes == 4:
        plans = (Plan("library"),)  # float32 has no exact matrix instruction to fuse with
    else:
        fused = _fused_plans(target, request, activation_dtype)
        dense = dense_plans(target, request, activation_dtype)
        unpack_first = request.rows >= UNPACK_FIRST_ROWS or not fused
        plans = dense + fused if unpack_first else fused + dense
    plans = tuple(dataclasses.replace(plan, scale_sums=_scale_sums(target, request, plan)) for plan in plans)
    fitting = tuple(plan for plan in plans if plan.shared_memory(x_bytes) <= target.shared_memory)
    return fitting or (Plan("library"),)


def _gemv_plans(target: Target, request: Request, activation_dtype: str) -> tuple[Plan, ...]:
    # 8 columns are the narrowest tile of NVIDIA's matrix instructions, 16 of AMD's.
    block_m = 8 if request.rows <= 8 and target.backend != "hip" else 16
    if request.dtype.itemsize == 4 and activation_dtype == "none":
        return (Plan("gemv", block_m, 16, 32, 4, 2),)  # no matrix instruction: small tiles, or registers spill
    tiles: tuple[tuple[int, int, int, int], ...]
    if target.backend == "hip":
        tiles = ((32, 128, 2, 2), (64, 128, 4, 2))
    else:
        tiles = ((32, 128, 2, 3), (16, 128, 1, 4), (32, 256, 2, 2), (64, 128, 4, 3))
    # With a scale for each element, wide tiles spill: 8 x 32 x 256 took 6,000 instructions and 15 s to compile.
    narrow = tuple(tile for tile in tiles if not _gathers(request, tile[1])) or ((64, 64, 4, tiles[0][-1]),)
    return tuple(Plan("gemv", block_m, *tile) for tile in narrow)


def _fused_plans(target: Target, request: Request, activation_dtype: str) -> tuple[Plan, ...]:
    deep = 64 if activation_dtype == "none" else 128
    tiles: tuple[tuple[int, int, int, int, int], ...]
    if target.backend == "hip":
        tiles = ((128, 128, 64, 8, 2), (64, 128, 64, 4, 2), (64, 64, 64, 4, 2))
    elif request.rows <= 64:
        tiles = ((32, 64, 128, 4, 3), (64, 64, 64, 4, 4), (32, 128, 64, 4, 4))
    elif request.rows <= 512:
        tiles = ((64, 128, deep, 4, 3), (128, 64, 64, 4, 3), (64, 64, 64, 4, 4))
    else:
        tiles = ((128, 128, deep, 8, 3), (128, 128, 64, 8, 4), (64, 128, 64, 4, 4))
        if request.per_row:  # with groups its registers spill
            tiles += ((128, 256, 64, 8, 3),)
    plans = tuple(
        Plan("fused", *tile, weight_left=_weight_left(target, activation_dtype, tile[0]))
        for tile in dict.fromkeys(tiles)
        # A scale for each element of the block costs more than unpacking does.
        if not _gathers(request, tile[2])
    )
    if plans and activation_dtype != "none" and target.backend == "cuda" and not target.register_operands:
        # On the left an 8-bit weight stays in registers; on the right it passes through shared memory, but the
        # product is waited for less often: both are worth measuring.
        plans += (dataclasses.replace(plans[0], weight_left=not plans[0].weight_left),)
    return plans


def _gathers(request: Request, block_k: int) -> bool:
    """Whether groups end inside blocks of `block_k` bytes, so that each element has a scale of its own."""
    return not request.per_row and group_mode(request.in_features, request.group_size, block_k) == 2


def _scale_sums(target: Target, request: Request, plan: Plan) -> bool:
    """Whether scaling the sums over blocks is shorter than scaling the codes (see `multiply_add`).

    The second set of accumulators spills on sm_90 (152 bytes a thread in tiles of 128 x 128), not in those of a GEMV.
    """
    if request.per_row:
        return False
    return plan.path == "gemv" or (plan.path == "fused" and target.register_operands)


def _weight_left(target: Target, activation_dtype: str, block_m: int) -> bool:
    """On which side decoding is shortest, counted in the compiled loops.

    16-bit weights: on the left on sm_80 (281 instructions a step against 324), on the right on sm_90 (108 against
    182), where the left operand of the matrix instruction has at least 64 rows. 8-bit weights: on the right on sm_80
    (96 against 112).
    """
    if target.backend != "cuda":
        return False
    if target.register_operands:
        return activation_dtype == "none"
    return block_m < 64


def dense_plans(target: Target, request: Request, activation_dtype: str) -> tuple[Plan, ...]:
    """Products with a dense weight, the one to trust unmeasured first; without 8-bit activations the library's."""
    library = (Plan("library"),)
    if activation_dtype == "none":
        return library
    tile = (128, 128, 64, 4, 2) if target.backend == "hip" else (128, 128, 128, 8, 3)
    triton: tuple[Plan, ...] = (Plan("dense", *tile),)
    if target.register_operands:
        triton += (Plan("dense", 128, 256, 64, 8, 3), Plan("dense", 128, 128, 64, 8, 4))
    elif target.backend == "cuda" and activation_dtype == "float8_e4m3fn":
        triton += (Plan("dense", 128, 256, 128, 8, 3),)
    if activation_dtype == "int8":
        # The library leaves int32 in memory and needs a pass over it; Triton's own product does not.
        return triton + library if request.out_features % 8 == 0 else triton
    # The float8 product of the library is pipelined with the bulk copy engine. It has row scales from sm_90 on, for
    # bfloat16 outputs and whole 16-byte rows.
    row_scales = target.backend == "cuda" and int(target.arch) >= 90
    if row_scales and request.dtype == torch.bfloat16 and request.out_features % 16 == 0:
        triton = library + triton
    if sums_are_imprecise(target, request.in_features, activation_dtype):
        # Measured, and served where the trial finds the sums of the others imprecise.
        twins = tuple(plan for plan in triton if plan.path == "library" or plan.block_n <= 128)
        triton += tuple(dataclasses.replace(plan, exact=True) for plan in twins)
    return triton


def sums_are_imprecise(target: Target, in_features: int, activation_dtype: str) -> bool:
    """Whether float8 products lose digits in long sums: sm_90's matrix unit keeps 14 bits of them."""
    long_sums = in_features > MAX_IMPRECISE_SUM and activation_dtype == "float8_e4m3fn"
    return long_sums and target.backend == "cuda" and not target.register_operands
