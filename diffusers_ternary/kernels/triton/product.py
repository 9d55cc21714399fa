# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map: resolves the request, picks a plan that is right and fast here, launches its kernels."""

import functools
import logging
from collections.abc import Callable

import torch
import torch.nn.functional as F

from . import launch, plain
from .devices import current, is_capturing, supported_target, trials_of, tuner_of
from .dispatch import (
    ACTIVATION_ERROR,
    GEMV_MAX_ROWS,
    PLAIN,
    UNPACK_FIRST_ROWS,
    Plan,
    Request,
    Target,
    candidates,
    resolve_activation_dtype,
)
from .recording import buffer, library
from .trial import LIBRARY_SIZE, TOLERANCE, problem_of, product_problem, trial_weight
from .weights import PackedWeight


logger = logging.getLogger(__name__)


def multiply(x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str) -> torch.Tensor:
    """`x @ W.T + bias` on a supported device.

    Args:
        x (`torch.Tensor`): `[..., K]` float32, bfloat16 or float16.
        weight ([`PackedWeight`]): on the device of `x`.
        bias (`torch.Tensor`, *optional*): `[N]` float.
        activation_dtype (`str`): `"auto"`, `"none"`, `"int8"` or `"float8_e4m3fn"`.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`.

    Raises:
        RuntimeError: if Triton cannot serve the device of `x`.
    """
    tokens = x.reshape(-1, weight.in_features)  # [M, K]
    tokens = tokens if tokens.is_contiguous() else tokens.contiguous()
    if tokens.shape[0] == 0:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    with current(x.device):
        plan, resolved, target = decide(tokens, weight, bias, activation_dtype)
        y = run(plan, tokens, weight, bias, resolved, target)
    return y.view(*x.shape[:-1], weight.out_features)


def decide(
    x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None, activation_dtype: str
) -> tuple[Plan, str, Target]:
    """The plan for contiguous `x` `[M, K]`, the activation dtype that its device has for it, and the device's target.

    Raises:
        RuntimeError: if Triton cannot serve the device of `x`.
    """
    target = supported_target(x.device)
    request = Request(
        rows=x.shape[0],
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        per_row=weight.per_row,
        dtype=x.dtype,
        activation_dtype=activation_dtype,
    )
    resolved, plans = _resolve(target, request)
    return choose(x, weight, bias, request, resolved, plans), resolved, target


def run(
    plan: Plan,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation_dtype: str,
    target: Target,
) -> torch.Tensor:
    """Computes `[M, N]` from contiguous `x` `[M, K]` by a plan, with a resolved activation dtype."""
    if plan == PLAIN:
        return plain.product(x, weight, bias, activation_dtype)
    ptx = target.inline_ptx
    if activation_dtype == "none" and weight.hadamard:
        x = launch.rotate(x, weight.hadamard)
    if activation_dtype == "none" and plan.path == "library":
        dense = launch.unpack_float(weight, x.dtype, inline_ptx=ptx)
        return library(_linear, x, dense, bias)
    kind = launch.KINDS[activation_dtype]
    operand, x_scale = x, None
    if activation_dtype != "none":
        alignment = launch.alignment_of(plan)
        operand, x_scale = launch.quantize_activations(x, activation_dtype, weight.hadamard, alignment=alignment)
        if weight.multiplier is None and not weight.per_row:
            weight = launch.derive_multipliers(weight)
    if plan.path in ("gemv", "fused"):
        y = buffer(x.shape[0], weight.out_features, dtype=x.dtype, device=x.device)
        launch.packed_product(operand, x_scale, weight, bias, y, kind=kind, plan=plan, inline_ptx=ptx)
        return y
    assert x_scale is not None  # only 8-bit products are left
    dense, row_scale = launch.unpack_8bit(weight, kind, inline_ptx=ptx, alignment=operand.shape[1])
    return multiply_8bit(plan, operand, x_scale, dense, row_scale, bias, x.dtype, kind, target)


def multiply_8bit(
    plan: Plan,
    operand: torch.Tensor,
    x_scale: torch.Tensor,
    dense: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    kind: str,
    target: Target,
) -> torch.Tensor:
    """Computes `[M, N]` in `dtype` from int8 `[M, K']` and `[N, K']` (float8 as its bits) and their scales."""
    if plan.path == "library" and kind == "fp8":
        # Views of whole buffers: a prepared call allocates them in these shapes.
        operand, dense = operand.view(torch.float8_e4m3fn), dense.view(torch.float8_e4m3fn).t()
        scales = (x_scale.unsqueeze(1), row_scale.unsqueeze(0))
        return library(_scaled_mm, operand, dense, *scales, bias, dtype, not plan.exact)
    y = buffer(operand.shape[0], dense.shape[0], dtype=dtype, device=operand.device)
    if plan.path == "library":
        launch.epilogue(library(torch._int_mm, operand, dense.t()), x_scale, row_scale, bias, y)
    else:
        launch.dense_product(
            operand, x_scale, dense, row_scale, bias, y, kind=kind, plan=plan, no_prefetch=target.register_operands
        )
    return y


def _linear(x: torch.Tensor, dense: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
    return F.linear(x, dense, None if bias is None else bias.to(x.dtype))


def _scaled_mm(
    x: torch.Tensor,
    dense: torch.Tensor,
    x_scale: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
    fast: bool,
) -> torch.Tensor:
    return torch._scaled_mm(
        x,
        dense,
        scale_a=x_scale,
        scale_b=row_scale,
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=fast,
    )


@functools.lru_cache(maxsize=4096)
def _resolve(target: Target, request: Request) -> tuple[str, tuple[Plan, ...]]:
    resolved = resolve_activation_dtype(target, request)
    _log_choice(target, request.activation_dtype, resolved)
    return resolved, candidates(target, request, resolved)


@functools.cache
def _log_choice(target: Target, asked: str, resolved: str) -> None:
    if asked == "auto":
        logger.info("Activations on %s %s: activation_dtype='auto' uses %r.", target.backend, target.arch, resolved)
    elif asked != resolved:
        logger.warning(
            "Activations on %s %s: %r is not supported there for every shape; %r serves.",
            target.backend,
            target.arch,
            asked,
            resolved,
        )


def choose(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    request: Request,
    activation_dtype: str,
    plans: tuple[Plan, ...],
) -> Plan:
    """The plan that serves a product: the fastest of those that are right on this device, or `PLAIN`.

    Args:
        x (`torch.Tensor`): `[M, K]`, contiguous.
        weight ([`PackedWeight`]), bias (`torch.Tensor`, *optional*): of the product.
        request ([`Request`]): the product, as plain data.
        activation_dtype (`str`): resolved.
        plans (`tuple[Plan, ...]`): the candidates.
    """
    target = supported_target(x.device)
    layout = (*weight.layout, None if bias is None else bias.dtype, request.dtype, activation_dtype)
    few_rows = request.rows if request.rows <= GEMV_MAX_ROWS else 0  # Triton compiles their number in

    def compute(plan: Plan, x: torch.Tensor, weight: PackedWeight, bias: torch.Tensor | None) -> torch.Tensor:
        return run(plan, x, weight, bias, activation_dtype, target)

    def right(plan: Plan) -> bool:
        def problem() -> str | None:
            run_plan = functools.partial(compute, plan)
            return product_problem(
                run_plan, plan, weight, bias, activation_dtype, target, rows=request.rows, dtype=x.dtype
            )

        name = f"The kernel {plan} ({activation_dtype} activations, {x.dtype})"
        return passes(x.device, (plan, few_rows, *layout), name, problem)

    def disagreement(plan: Plan, first: Plan) -> str | None:
        bound = TOLERANCE[x.dtype] + ACTIVATION_ERROR[activation_dtype][0 if weight.per_row else 1]
        return problem_of(compute(plan, x, weight, bias), compute(first, x, weight, bias).float(), bound)

    tuner = tuner_of(x.device.type, x.device.index or 0)
    if tuner is None:
        return next((plan for plan in plans if right(plan)), PLAIN)
    return tuner.choose(
        request,
        activation_dtype,
        plans,
        lambda plan: compute(plan, x, weight, bias),
        may_measure=not is_capturing(x.device),
        passes=right,
        disagreement=disagreement,
    )


def passes(device: torch.device, key: tuple[object, ...], name: str, problem: Callable[[], str | None]) -> bool:
    """Whether a kernel is right on a device, see [`Trials.passes`]."""
    trials = trials_of(device.type, device.index or 0)
    return trials.passes(key, name, problem, may_run=not is_capturing(device))


def dequantize(weight: PackedWeight, dtype: torch.dtype) -> torch.Tensor:
    """The dequantized weight `[N, K]`."""
    target = supported_target(weight.packed.device)

    def unpack(weight: PackedWeight) -> torch.Tensor:
        return launch.unpack_float(weight, dtype, inline_ptx=target.inline_ptx)

    def problem() -> str | None:
        sample = trial_weight(weight, LIBRARY_SIZE + weight.out_features % 16)
        return problem_of(unpack(sample), plain.dequantize(sample, torch.float32), TOLERANCE[dtype])

    key = ("dequantize", dtype, *weight.layout)
    if passes(weight.packed.device, key, f"The kernel that unpacks to {dtype}", problem):
        return unpack(weight)
    return plain.dequantize(weight, dtype)


def rotate(x: torch.Tensor, block: int) -> torch.Tensor:
    """`x @ R` for contiguous x `[M, K]`, see [`launch.rotate`]."""

    def problem() -> str | None:
        generator = torch.Generator(x.device).manual_seed(0)
        sample = torch.randn(3, x.shape[1], generator=generator, device=x.device).to(x.dtype)
        return problem_of(launch.rotate(sample, block), plain.rotate(sample.float(), block), TOLERANCE[x.dtype])

    if passes(x.device, ("rotate", x.dtype, x.shape[1], block), f"The kernel that rotates {x.dtype}", problem):
        return launch.rotate(x, block)
    return plain.rotate(x, block)


def unpack(weight: PackedWeight, activation_dtype: str) -> tuple[torch.Tensor, torch.Tensor]:
    """The weight as operand of an 8-bit product, see [`launch.unpack_8bit`]."""
    target = supported_target(weight.packed.device)
    if weight.multiplier is None and not weight.per_row:
        weight = launch.derive_multipliers(weight)
    return launch.unpack_8bit(weight, launch.KINDS[activation_dtype], inline_ptx=target.inline_ptx)


def library_dtype(weight: PackedWeight, dtype: torch.dtype, activation_dtype: str) -> str | None:
    """The 8-bit dtype in which unpacking and the vendor's product serve many rows, tried; `None` if they do not.

    Args:
        weight ([`PackedWeight`]): of the layer's layout, whatever its values.
        dtype (`torch.dtype`): of the activations.
        activation_dtype (`str`): that was asked for.
    """
    device = weight.packed.device
    target = supported_target(device)
    request = Request(
        rows=UNPACK_FIRST_ROWS,
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        per_row=weight.per_row,
        dtype=dtype,
        activation_dtype=activation_dtype,
    )
    resolved, plans = _resolve(target, request)
    if resolved == "none" or Plan("library") not in plans:
        return None
    chosen = choose(
        torch.empty(request.rows, 0, dtype=dtype, device=device), weight, None, request, resolved, (Plan("library"),)
    )
    return resolved if chosen == Plan("library") else None
