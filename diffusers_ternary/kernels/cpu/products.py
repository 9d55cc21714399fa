# SPDX-License-Identifier: Apache-2.0
"""The ternary linear map on the CPU: int8 activations (W1.58A8), or exact float32."""

import torch

from . import fallback
from .choice import choose
from .native import DTYPES, NativeLibrary, load


# Below this many products a second thread costs more than it saves (handing over takes about 30 us).
THREAD_LEAST_PRODUCTS = 1 << 22
# Float32 elements of the weight that the exact path decodes at a time: 4 MiB, a second-level cache.
EXACT_BLOCK_ELEMENTS = 1 << 20
# Elements of x that the exact path converts to float32 at a time.
EXACT_ROW_ELEMENTS = 1 << 22


def kernel_name() -> str:
    """Which kernel serves `activation_dtype="int8"`: a native variant, `"torch-onednn"` or `"torch-blocked"`."""
    library = load()
    if library is not None:
        return library.variant
    return "torch-onednn" if fallback.onednn_is_exact() else "torch-blocked"


def check_layout(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
) -> None:
    """Checks everything that the native code reads by address.

    Raises:
        ValueError: names the tensor, its shape and what is expected.
    """
    columns = weight.shape[0]
    groups = -(-in_features // group_size)
    expected = (
        ("weight", weight, (columns, -(-in_features // 4)), (torch.int8,)),
        ("scale", scale, (columns, groups if multiplier is None else 1), tuple(DTYPES)),
        ("multiplier", multiplier, (columns, groups), (torch.uint8,)),
        ("bias", bias, (columns,), tuple(DTYPES)),
    )
    for name, tensor, shape, dtypes in expected:
        if tensor is not None and (tensor.shape != shape or tensor.dtype not in dtypes):
            raise ValueError(
                f"{name} is {tensor.dtype} {list(tensor.shape)}; in_features={in_features} and "
                f"group_size={group_size} need {list(shape)} of {' or '.join(map(str, dtypes))}."
            )


def linear_int8(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
    library: NativeLibrary | None = None,
    dense: bool = False,
) -> torch.Tensor:
    """`x @ W.T + bias` with each row of x rounded to int8 (scale max|row| / 127, half to even).

    Args:
        x (`torch.Tensor`): `[..., K]` float. A row with NaN gives a row of NaN; a row with an infinity is
            multiplied exactly, as `F.linear` would.
        weight (`torch.Tensor`): int8 `[N, ceil(K / 4)]`, 2-bit planes.
        scale (`torch.Tensor`): `[N, G]`, or `[N, 1]` with a multiplier; float32, bfloat16 or float16.
        multiplier (`torch.Tensor`, *optional*): uint8 `[N, G]` of 63rds.
        bias (`torch.Tensor`, *optional*): `[N]`.
        in_features (`int`): K.
        group_size (`int`): columns per scale.
        library (`NativeLibrary`, *optional*): the kernel to use; defaults to what [`choose`] finds.
        dense (`bool`): whether a bfloat16 product with the dense weight may serve where it is faster.

    Returns:
        `torch.Tensor`: `[..., N]`, dtype of `x`.

    Raises:
        ValueError: if a tensor does not fit `in_features` and `group_size`.
    """
    group_size = min(group_size, in_features)
    check_layout(weight, scale, multiplier, bias, in_features, group_size)
    rows = x.reshape(-1, in_features)  # [M, K]
    if library is None and (library := load()) is not None:
        library = choose(library, rows.shape[0], group_size, in_features, multiplier is not None, dense)
        if library is None:
            return _linear_dense(x, weight, scale, multiplier, bias, in_features, group_size)
    if rows.dtype not in DTYPES:
        rows = rows.float()
    if rows.stride(1) != 1:
        rows = rows.contiguous()
    infinite: int | bool
    if library is None:
        out, infinite = fallback.linear_int8(rows, weight, scale, multiplier, bias, in_features, group_size)
    else:
        out, infinite = _native(library, rows, weight, scale, multiplier, bias, in_features, group_size)
    if infinite:
        bad = rows.isinf().any(1).nonzero()[:, 0]
        out[bad] = linear_exact(
            rows[bad], weight, scale, multiplier, bias, in_features=in_features, group_size=group_size
        )
    return out.view(*x.shape[:-1], weight.shape[0]).to(x.dtype)


def _native(
    library: NativeLibrary,
    rows: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
) -> tuple[torch.Tensor, int]:
    # Kept in locals until the calls return: the arguments hold addresses only.
    weight, scale = weight.contiguous(), scale.contiguous()
    multiplier = None if multiplier is None else multiplier.contiguous()
    bias = None if bias is None else bias.contiguous()
    count, columns = rows.shape[0], weight.shape[0]
    out = torch.empty(count, columns, dtype=rows.dtype)
    if out.numel() == 0:
        return out, 0
    arguments = library.arguments(
        rows, weight, scale, multiplier, bias, out, in_features=in_features, group_size=group_size
    )
    workers = torch.get_num_threads() if count * columns * in_features >= THREAD_LEAST_PRODUCTS else 1
    return out, library.linear(arguments, workers)


def _linear_dense(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    in_features: int,
    group_size: int,
) -> torch.Tensor:
    """The product in bfloat16, for CPUs with tiles for it: closer than int8 activations, as [`linear_int8`]."""
    rows = x.reshape(-1, in_features).bfloat16()
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype)
    step = max(16, EXACT_BLOCK_ELEMENTS // in_features)
    for first in range(0, weight.shape[0], step):
        last = min(first + step, weight.shape[0])
        block = dequantize_rows(weight, scale, multiplier, first, last, in_features, group_size).bfloat16()  # [n, K]
        offset = None if bias is None else bias[first:last].bfloat16()
        out[:, first:last] = torch.nn.functional.linear(rows, block, offset)
    return out.view(*x.shape[:-1], weight.shape[0])


def linear_exact(
    x: torch.Tensor,
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    bias: torch.Tensor | None,
    *,
    in_features: int,
    group_size: int,
) -> torch.Tensor:
    """`x @ W.T + bias` in float32 whatever the dtype of x; W is decoded block by block, never as a whole.

    Args and returns as [`linear_int8`].
    """
    group_size = min(group_size, in_features)
    check_layout(weight, scale, multiplier, bias, in_features, group_size)
    rows = x.reshape(-1, in_features)
    out = torch.empty(rows.shape[0], weight.shape[0], dtype=x.dtype)
    row_step = max(64, EXACT_ROW_ELEMENTS // in_features) if rows.dtype != torch.float32 else max(1, rows.shape[0])
    column_step = max(16, EXACT_BLOCK_ELEMENTS // in_features)
    for first in range(0, weight.shape[0], column_step):
        last = min(first + column_step, weight.shape[0])
        dense = dequantize_rows(weight, scale, multiplier, first, last, in_features, group_size)  # [n, K]
        offset = None if bias is None else bias[first:last].float()
        for row in range(0, rows.shape[0], row_step):
            part = rows[row : row + row_step].float()  # [m, K]
            # float32: a bfloat16 sum over K = 15360 loses small terms
            out[row : row + row_step, first:last] = torch.nn.functional.linear(part, dense, offset)
    return out.view(*x.shape[:-1], weight.shape[0])


def dequantize_rows(
    weight: torch.Tensor,
    scale: torch.Tensor,
    multiplier: torch.Tensor | None,
    first: int,
    last: int,
    in_features: int,
    group_size: int,
) -> torch.Tensor:
    """Rows `[first, last)` of the dense weight, float32 `[last - first, K]`."""
    library = load()
    if library is None:
        return fallback.dequantize(weight, scale, multiplier, first, last, in_features, group_size)
    weight, scale = weight.contiguous(), scale.contiguous()
    multiplier = None if multiplier is None else multiplier.contiguous()
    dense = torch.empty(last - first, in_features)
    unused = dense[:0]
    arguments = library.arguments(
        unused, weight, scale, multiplier, None, unused, in_features=in_features, group_size=group_size
    )
    workers = torch.get_num_threads() if dense.numel() >= THREAD_LEAST_PRODUCTS // 16 else 1
    library.dequantize(arguments, first, last, dense, workers)
    return dense
