# SPDX-License-Identifier: Apache-2.0
"""Products with a weight that is 8 bits wide in memory: int8 layers, and ternary ones that were unpacked to stay.

Few rows take activations as they are; many round them to 8 bits. Kernels are tried at first use, as those of packed
weights are; `None` says that the caller's own way serves.
"""

import dataclasses
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import launch, plain
from .devices import current, is_capturing, supported_target, tuner_of
from .dispatch import GEMV_MAX_ROWS, PLAIN, Plan, Request, Target, dense_plans, resolve_activation_dtype
from .product import multiply_8bit, passes
from .trial import LIBRARY_SIZE, TOLERANCE, problem_of, trial_weight
from .weights import PackedWeight


MANY_ROWS = 4096  # as large a product as any, for the choice of a dtype
WHOLE_BLOCKS = 128  # bytes; every tile's blocks divide it


@dataclasses.dataclass(frozen=True)
class EightBitWeight:
    """A dense weight of 8 bits.

    Args:
        values (`torch.Tensor`): int8 `[N, K']`, or the bits of float8; zero from K on.
        scale (`torch.Tensor`): float `[N]`, one for each row.
        in_features (`int`): K.
        activation_dtype (`str`): what activations are rounded to for it, `"int8"` or `"float8_e4m3fn"`.
        hadamard (`int`): block size of the rotation of the activations; 0 = none.
    """

    values: torch.Tensor
    scale: torch.Tensor
    in_features: int
    activation_dtype: str
    hadamard: int = 0


def int8_linear(
    x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """`x @ (values * scale).T + bias` for an int8 layer; `None` where no kernel serves.

    Args:
        x (`torch.Tensor`): `[..., K]` float32, bfloat16 or float16.
        values (`torch.Tensor`): int8 `[N, K]`, contiguous.
        scale (`torch.Tensor`): float `[N, 1]`.
        bias (`torch.Tensor`, *optional*): float `[N]`.
        activation_dtype (`str`): `"auto"`, `"none"` or `"int8"`; float8 has too few bits for such weights.
    """
    tokens = x.reshape(-1, x.shape[-1]).contiguous()
    if tokens.shape[0] == 0 or x.dtype not in TOLERANCE:
        return None
    weight = EightBitWeight(values, scale.flatten(), x.shape[-1], "int8")
    with current(x.device):
        if tokens.shape[0] <= GEMV_MAX_ROWS and activation_dtype != "int8":
            y = _gemv(tokens, weight, bias)
        elif activation_dtype == "int8" or (activation_dtype == "auto" and _worth_rounding(tokens, weight)):
            y = multiply(tokens, weight, bias)
        else:
            y = None
    return None if y is None else y.view(*x.shape[:-1], values.shape[0])


def unpacked(weight: PackedWeight, activation_dtype: str) -> EightBitWeight | None:
    """A packed weight as [`EightBitWeight`], in the dtype that its large products have here; `None` if none does.

    Args:
        weight ([`PackedWeight`]): on a supported device.
        activation_dtype (`str`): of the layer.
    """
    device = weight.packed.device
    target = supported_target(device)
    sizes = (MANY_ROWS, weight.out_features, weight.in_features, weight.group_size)
    request = Request(*sizes, weight.per_row, torch.bfloat16, activation_dtype)
    resolved = resolve_activation_dtype(target, request)
    if resolved == "none":
        return None

    def unpack(weight: PackedWeight) -> EightBitWeight:
        if weight.multiplier is None and not weight.per_row:
            weight = launch.derive_multipliers(weight)
        kind = launch.KINDS[resolved]
        values, scale = launch.unpack_8bit(weight, kind, inline_ptx=target.inline_ptx, alignment=WHOLE_BLOCKS)
        return EightBitWeight(values, scale, weight.in_features, resolved, weight.hadamard)

    def problem() -> str | None:
        sample = trial_weight(weight, LIBRARY_SIZE + weight.out_features % 16)
        integers = sample
        if sample.multiplier is None and not sample.per_row:
            integers = plain.integer_multipliers(sample)
        fp8 = resolved == "float8_e4m3fn"
        expected = plain.dequantize(integers, torch.float32, float8_multipliers=fp8)
        return problem_of(_dense(unpack(sample), torch.float32), expected, TOLERANCE[torch.float32])

    with current(device):
        if passes(device, ("unpack", resolved, *weight.layout), f"The kernel that unpacks to {resolved}", problem):
            return unpack(weight)
    return None


def _dense(weight: EightBitWeight, dtype: torch.dtype) -> torch.Tensor:
    codes = weight.values if weight.activation_dtype == "int8" else weight.values.view(torch.float8_e4m3fn)
    return codes[:, : weight.in_features].to(dtype) * weight.scale.to(dtype)[:, None]


def linear(
    x: torch.Tensor, weight: EightBitWeight, bias: torch.Tensor | None, activation_dtype: str
) -> torch.Tensor | None:
    """`rotate(x) @ W.T + bias` for x `[..., K]`; `None` where packed codes serve: few rows, or no rounding."""
    tokens = x.reshape(-1, weight.in_features).contiguous()
    if x.dtype not in TOLERANCE or tokens.shape[0] <= GEMV_MAX_ROWS:
        return None
    with current(x.device):
        if _request(tokens, weight, activation_dtype)[1] != weight.activation_dtype:
            return None
        y = multiply(tokens, weight, bias)
    return None if y is None else y.view(*x.shape[:-1], weight.values.shape[0])


def _worth_rounding(x: torch.Tensor, weight: EightBitWeight) -> bool:
    # Where "auto" rounds at all it takes the fastest dtype, which for float8 is as fast in int8.
    return _request(x, weight, "auto")[1] != "none"


def multiply(x: torch.Tensor, weight: EightBitWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    """`rotate(x) @ W.T + bias` with x `[M, K]` rounded to 8 bits; `None` where no kernel serves."""
    target = supported_target(x.device)
    request, resolved = _request(x, weight, weight.activation_dtype)
    if request.rows <= GEMV_MAX_ROWS or resolved != weight.activation_dtype:
        return None
    columns = weight.values.shape[1]
    plans = tuple(plan for plan in dense_plans(target, request, resolved) if columns % launch.alignment_of(plan) == 0)
    plan = _choose(plans, request, x, weight, bias, target)
    return None if plan is None else run(plan, x, weight, bias, target)


def run(
    plan: Plan, x: torch.Tensor, weight: EightBitWeight, bias: torch.Tensor | None, target: Target
) -> torch.Tensor:
    """Computes `[M, N]` by a plan of path `"dense"` or `"library"`."""
    activation_dtype, columns = weight.activation_dtype, weight.values.shape[1]
    operand, x_scale = launch.quantize_activations(x, activation_dtype, weight.hadamard, alignment=columns)
    kind = launch.KINDS[activation_dtype]
    return multiply_8bit(plan, operand, x_scale, weight.values, weight.scale, bias, x.dtype, kind, target)


def _gemv(x: torch.Tensor, weight: EightBitWeight, bias: torch.Tensor | None) -> torch.Tensor | None:
    def problem() -> str | None:
        return _problem(launch.int8_gemv, x.shape[0], x.dtype, weight, bias, rounded=False)

    key = ("int8 gemv", x.shape[0], *_code_key(x.dtype, weight, bias))
    if passes(x.device, key, f"The kernel for {x.dtype} rows and int8 weights", problem):
        return launch.int8_gemv(x, weight.values, weight.scale, bias)
    return None


def _choose(
    plans: tuple[Plan, ...],
    request: Request,
    x: torch.Tensor,
    weight: EightBitWeight,
    bias: torch.Tensor | None,
    target: Target,
) -> Plan | None:
    def right(plan: Plan) -> bool:
        def compute(
            x: torch.Tensor, values: torch.Tensor, scale: torch.Tensor, bias: torch.Tensor | None
        ) -> torch.Tensor:
            sample = dataclasses.replace(weight, values=values, scale=scale)
            return run(plan, x, sample, bias, target)

        def problem() -> str | None:
            rows = (plan.block_m or LIBRARY_SIZE) + 3
            return _problem(compute, rows, x.dtype, weight, bias, rounded=True)

        name = f"The kernel {plan} (8-bit weights, {weight.activation_dtype} activations, {x.dtype})"
        key = (plan, weight.activation_dtype, *_code_key(x.dtype, weight, bias))
        return passes(x.device, key, name, problem)

    tuner = tuner_of(x.device.type, x.device.index or 0)
    if tuner is None:
        return next((plan for plan in plans if right(plan)), None)
    plan = tuner.choose(
        request,
        f"{weight.activation_dtype}-weight",
        plans,
        lambda plan: run(plan, x, weight, bias, target),
        may_measure=not is_capturing(x.device),
        passes=right,
    )
    return None if plan == PLAIN else plan


def _problem(
    compute: Callable[[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor | None], torch.Tensor],
    rows: int,
    dtype: torch.dtype,
    weight: EightBitWeight,
    bias: torch.Tensor | None,
    *,
    rounded: bool,
) -> str | None:
    """Tries a kernel on random tokens and the first rows of the weight, against torch."""
    device = weight.values.device
    generator = torch.Generator(device).manual_seed(0)
    x = torch.randn(rows, weight.in_features, generator=generator, device=device).to(dtype)
    n = min(weight.values.shape[0], 2 * LIBRARY_SIZE + weight.values.shape[0] % 16)
    values, scale = weight.values[:n], weight.scale[:n]
    bias = None if bias is None else bias[:n]
    actual = compute(x, values, scale, bias)
    exact = torch.float64 if device.type in ("cuda", "cpu") else torch.float32
    if rounded:
        rotated = plain.rotate(x.float(), weight.hadamard) if weight.hadamard else x
        x = plain.round_activations(rotated, weight.activation_dtype)
    dense = _dense(dataclasses.replace(weight, values=values, scale=scale), exact)
    expected = F.linear(x.to(exact), dense, None if bias is None else bias.to(exact))
    if not expected.any():
        return None  # a weight of zeros shows nothing, and nothing can be wrong with it but a later one
    return problem_of(actual, expected, TOLERANCE[dtype])


def _code_key(dtype: torch.dtype, weight: EightBitWeight, bias: torch.Tensor | None) -> tuple[object, ...]:
    n, columns = weight.values.shape
    return (dtype, weight.in_features, columns, n % 16, weight.scale.dtype, None if bias is None else bias.dtype)


def _request(x: torch.Tensor, weight: EightBitWeight, activation_dtype: str) -> tuple[Request, str]:
    """The product as dispatch knows it, and the dtype to which its activations are rounded."""
    sizes = (x.shape[0], weight.values.shape[0], weight.in_features, weight.in_features)
    request = Request(*sizes, True, x.dtype, activation_dtype)
    return request, resolve_activation_dtype(supported_target(x.device), request)
