# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map: resolves the request, picks a plan, launches its kernels."""

import functools
import logging

import torch
import torch.nn.functional as F

from . import launch
from .devices import current, is_capturing, supported_target, tuner_of
from .dispatch import Plan, Request, Target, candidates, resolve_activation_dtype
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
    target = supported_target(x.device)
    tokens = x.reshape(-1, weight.in_features)  # [M, K]
    tokens = tokens if tokens.is_contiguous() else tokens.contiguous()
    request = Request(
        rows=tokens.shape[0],
        out_features=weight.out_features,
        in_features=weight.in_features,
        group_size=weight.group_size,
        per_row=weight.per_row,
        dtype=x.dtype,
        activation_dtype=activation_dtype,
    )
    if request.rows == 0:
        return x.new_empty(*x.shape[:-1], weight.out_features)
    resolved, plans = _resolve(target, request)
    with current(x.device):
        y = run(_choose(tokens, weight, bias, request, resolved, plans), tokens, weight, bias, resolved, target)
    return y.view(*x.shape[:-1], weight.out_features)


def run(
    plan: Plan,
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    activation_dtype: str,
    target: Target,
) -> torch.Tensor:
    """Computes `[M, N]` from contiguous `x` `[M, K]` by a plan, with a resolved activation dtype."""
    ptx = target.inline_ptx
    if activation_dtype == "none" and weight.hadamard:
        x = launch.rotate(x, weight.hadamard)
    if activation_dtype == "none" and plan.path == "library":
        dense = launch.unpack_float(weight, x.dtype, inline_ptx=ptx)
        return F.linear(x, dense, None if bias is None else bias.to(x.dtype))
    kind = launch.KINDS[activation_dtype]
    operand, x_scale = x, None
    if activation_dtype != "none":
        operand, x_scale = launch.quantize_activations(x, activation_dtype, weight.hadamard)
        if weight.multiplier is None and not weight.per_row:
            weight = launch.derive_multipliers(weight)
    if plan.path in ("gemv", "fused"):
        y = x.new_empty(x.shape[0], weight.out_features)
        launch.packed_product(operand, x_scale, weight, bias, y, kind=kind, plan=plan, inline_ptx=ptx)
        return y
    assert x_scale is not None  # only 8-bit products are left
    dense, row_scale = launch.unpack_8bit(weight, kind, inline_ptx=ptx)
    if plan.path == "library" and kind == "fp8":
        return _scaled_mm(operand, x_scale, dense, row_scale, bias, x.dtype)
    y = x.new_empty(x.shape[0], weight.out_features)
    if plan.path == "library":
        launch.epilogue(torch._int_mm(operand, dense.t()), x_scale, row_scale, bias, y)
    else:
        launch.dense_product(
            operand, x_scale, dense, row_scale, bias, y, kind=kind, plan=plan, no_prefetch=target.register_operands
        )
    return y


def _scaled_mm(
    x: torch.Tensor,
    x_scale: torch.Tensor,
    dense: torch.Tensor,
    row_scale: torch.Tensor,
    bias: torch.Tensor | None,
    dtype: torch.dtype,
) -> torch.Tensor:
    return torch._scaled_mm(
        x.view(torch.float8_e4m3fn),
        dense.view(torch.float8_e4m3fn).t(),
        scale_a=x_scale[:, None],
        scale_b=row_scale[None, :],
        bias=None if bias is None else bias.to(dtype),
        out_dtype=dtype,
        use_fast_accum=True,
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


def _choose(
    x: torch.Tensor,
    weight: PackedWeight,
    bias: torch.Tensor | None,
    request: Request,
    activation_dtype: str,
    plans: tuple[Plan, ...],
) -> Plan:
    tuner = tuner_of(x.device.type, x.device.index or 0)
    if tuner is None:
        return plans[0]
    return tuner.choose(
        request,
        activation_dtype,
        plans,
        lambda plan: run(plan, x, weight, bias, activation_dtype, tuner.target),
        may_measure=not is_capturing(x.device),
    )
