# SPDX-License-Identifier: Apache-2.0
"""The first use of a kernel on a device: a small product with the tiles that will serve, compared with plain torch.

Nobody has tried every card, driver, torch and Triton. A kernel that does not compile, raises or is wrong is left out,
one warning names it, and the next candidate serves. A trial takes milliseconds beside the compilation, which serves
the real product as well: K, the layout of scales, dtypes and alignments are those of the layer.
"""

import logging
from collections.abc import Callable, Hashable

import torch

from . import plain
from .dispatch import SUMS, Plan, Target, sums_are_imprecise
from .weights import PackedWeight


logger = logging.getLogger(__name__)

# Relative RMS error: one rounding of the operands and one of the output, and TF32 where the user allows it.
TOLERANCE = {torch.float32: 2e-3, torch.float16: 3e-3, torch.bfloat16: 1.2e-2}
# Where an exact twin is at hand (see `sums_are_imprecise`): a quarter of what float8 activations cost, and above the
# 1.7e-3 of a bfloat16 output.
IMPRECISION = 6e-3
INTERPRETED_FLOAT8 = 0.1  # the interpreter's cast is wrong at powers of two
# Of single outputs, in units of the RMS: a wrong corner of a tile hides in the mean.
LARGEST_ERROR = 0.2
# Rows and columns of a trial for products that have no tile of their own.
LIBRARY_SIZE = 128

Run = Callable[[torch.Tensor, PackedWeight, torch.Tensor | None], torch.Tensor]


class Imprecise(str):
    """Why a kernel that does what it can is left out: no warning, since a more exact one is among the candidates."""


class Trials:
    """What became of the kernels of one device.

    Args:
        device (`str`): for messages.
    """

    def __init__(self, device: str) -> None:
        self.device = device
        self._passed: dict[Hashable, bool] = {}
        self._named: set[str] = set()

    def passes(self, key: Hashable, name: str, problem: Callable[[], str | None], *, may_run: bool = True) -> bool:
        """Whether a kernel may serve.

        Args:
            key (`Hashable`): what its code depends on; it is tried once.
            name (`str`): for the warning.
            problem (`Callable`): runs it and says what is wrong; whatever it raises is a problem, too.
            may_run (`bool`): `False` while a CUDA graph is captured: what was never tried is trusted then.
        """
        known = self._passed.get(key)
        if known is not None or not may_run:
            return known is not False
        try:
            reason = problem()
        except torch.OutOfMemoryError:
            return True  # says nothing about the kernel, and is not remembered
        except Exception as error:  # of every kind: compilers, drivers and libraries raise their own
            reason = f"{type(error).__name__}: {str(error).strip()[:300]}"
        self._passed[key] = reason is None
        if reason is not None:
            self.leave_out(name, reason)
        return reason is None

    def leave_out(self, name: str, reason: str) -> None:
        """Warns of a kernel, once."""
        if name not in self._named:
            self._named.add(name)
            level = logging.INFO if isinstance(reason, Imprecise) else logging.WARNING
            logger.log(level, "%s does not work on %s and is left out: %s", name, self.device, reason)


def difference(actual: torch.Tensor, expected: torch.Tensor) -> tuple[float, float]:
    """Relative RMS error, and the largest error in units of the RMS; infinite where a value is not a number."""
    error = (actual.to(expected.dtype) - expected).abs()
    rms = expected.square().mean().sqrt()
    found = torch.stack((error.square().mean().sqrt() / rms, error.max() / rms))
    relative, largest = found.nan_to_num(nan=float("inf")).tolist()
    return relative, largest


def problem_of(actual: torch.Tensor, expected: torch.Tensor, tolerance: float) -> str | None:
    """What is wrong with a result, or `None`."""
    if actual.shape != expected.shape:
        return f"its result is {list(actual.shape)}, expected {list(expected.shape)}"
    relative, largest = difference(actual, expected)
    if relative <= tolerance and largest <= max(LARGEST_ERROR, 8 * tolerance):
        return None
    return f"relative error {relative:.2g} (at most {tolerance:.2g}), largest {largest:.2g} times the RMS"


def trial_weight(weight: PackedWeight, rows: int) -> PackedWeight:
    """Random codes and scales in the layout of a weight, `rows` of them."""
    device, width, k = weight.packed.device, weight.plane_width, weight.in_features
    generator = torch.Generator(device).manual_seed(0)

    def draw(low: int, high: int, *shape: int) -> torch.Tensor:
        return torch.randint(low, high, shape, generator=generator, device=device)

    planes = draw(0, 3, rows, 4, width)
    planes = planes + (planes == 2).to(planes.dtype)  # 2 is not a code
    planes *= torch.arange(4 * width, device=device).view(4, width) < k
    packed = sum(planes[:, plane] << (6 - 2 * plane) for plane in range(4))
    assert isinstance(packed, torch.Tensor)
    scale = (draw(64, 256, rows, weight.scale.shape[1]) / 256).to(weight.scale.dtype)
    multiplier = None if weight.multiplier is None else draw(1, 64, rows, weight.groups).to(torch.int8)
    return PackedWeight(
        packed.to(torch.uint8).view(torch.int8), scale, multiplier, k, weight.group_size, weight.hadamard
    )


def product_problem(
    run: Run,
    plan: Plan,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation_dtype: str,
    target: Target,
    *,
    rows: int,
    dtype: torch.dtype,
) -> str | None:
    """Tries a plan on a product of a little more than one tile.

    Args:
        run (`Callable`): computes `run(x, weight, bias)` with the plan.
        plan ([`Plan`]): for the size of its tile.
        weight ([`PackedWeight`]): the layer's, whose K, scales, dtypes and alignment the trial has; so has `bias`.
        activation_dtype (`str`): resolved.
        target ([`Target`]): the device.
        rows (`int`): of the layer's product.
        dtype (`torch.dtype`): of its activations.
    """
    device = weight.packed.device
    generator = torch.Generator(device).manual_seed(1)
    m = rows if plan.path == "gemv" else (plan.block_m or LIBRARY_SIZE) + 3
    n = min(weight.out_features, (plan.block_n or LIBRARY_SIZE) + 16 + weight.out_features % 16)
    sample = trial_weight(weight, n)
    x = torch.randn(m, weight.in_features, generator=generator, device=device).to(dtype)
    if bias is not None:
        bias = torch.randn(n, generator=generator, device=device).to(bias.dtype)
    # What the kernel does not write stays not a number, where the allocator hands the memory out again.
    poison = torch.full((m, n), float("nan"), dtype=dtype, device=device)
    del poison
    actual = run(x, sample, bias)
    exact = torch.float64 if device.type in ("cuda", "cpu") else torch.float32
    scaled = activation_dtype == "float8_e4m3fn" and plan.scale_mode(weight) != SUMS
    expected = plain.product(x, sample, bias, activation_dtype, dtype=exact, float8_multipliers=scaled)
    tolerance = TOLERANCE[dtype]
    if target.backend == "interpret" and activation_dtype == "float8_e4m3fn":
        tolerance = INTERPRETED_FLOAT8
    problem = problem_of(actual, expected, tolerance)
    if problem is None and not plan.exact and sums_are_imprecise(target, weight.in_features, activation_dtype):
        problem = problem_of(actual, expected, IMPRECISION)
        return None if problem is None else Imprecise(problem)
    return problem
