# SPDX-License-Identifier: Apache-2.0
"""The inner loops of calibration in C: codes of a panel of columns, and sums over groups of columns.

Weights are transposed, `[K, N]`, as in [`calibration.gptq`].
"""

import torch

from .native import checked, open_library


def serves(values: torch.Tensor) -> bool:
    """Whether these functions take such values: float32 on the CPU, with the compiled library."""
    return values.is_cpu and values.dtype == torch.float32 and not isinstance(open_library(), str)


def code_columns(
    values: torch.Tensor,
    matrix: torch.Tensor,
    scales: torch.Tensor,
    codes: torch.Tensor,
    *,
    group_size: int,
    first: int = 0,
    inverse: torch.Tensor | None = None,
    residual: torch.Tensor | None = None,
) -> int:
    """Chooses the codes of consecutive columns, one column after the other.

    Coordinate descent, with `inverse`: `values` are the gradients E H of the columns. A code becomes the one nearest
    to `(t s + value · inverse) / s`; its step Δŵ_j moves the residual by -Δŵ_j, and the values to come by
    `-matrix_ji Δŵ_j`. Columns whose inverse is 0 keep their codes.

    GPTQ, without: `values` are what the columns should be, rounded to the nearest code; Δŵ_j is the error.

    Args:
        values (`torch.Tensor`): float32 `[B, N]`, contiguous; left as it is.
        matrix (`torch.Tensor`): float32 `[B, B]`, last stride 1; read above its diagonal.
        scales (`torch.Tensor`): float32 `[G, N]`, contiguous: of the groups from that of the first column on.
        codes (`torch.Tensor`): int8 `[B, N]`, contiguous; written.
        group_size (`int`): columns per scale.
        first (`int`, *optional*): place of the first column in its group.
        inverse (`torch.Tensor`, *optional*): float32 `[B]`, 1 / H_jj.
        residual (`torch.Tensor`, *optional*): float32 `[B, N]`, contiguous; written. With `inverse` only.

    Returns:
        `int`: how many codes changed (GPTQ: how many are not 0).
    """
    functions = open_library()
    assert not isinstance(functions, str)
    columns, rows = values.shape
    return checked(
        functions.dt_code_columns(
            matrix.data_ptr(),
            matrix.stride(0),
            None if inverse is None else inverse.data_ptr(),
            scales.data_ptr(),
            values.data_ptr(),
            None if residual is None else residual.data_ptr(),
            codes.data_ptr(),
            columns,
            rows,
            first,
            group_size,
            torch.get_num_threads(),
        )
    )


def group_sums(product: torch.Tensor, codes: torch.Tensor, group_size: int) -> torch.Tensor:
    """Sums product · codes over the columns of each group.

    Args:
        product (`torch.Tensor`): float32 `[K, N]`, last stride 1.
        codes (`torch.Tensor`): int8 `[K, N]`, last stride 1.
        group_size (`int`): columns per group; the last one may be shorter.

    Returns:
        `torch.Tensor`: float64 `[G, N]`.
    """
    functions = open_library()
    assert not isinstance(functions, str)
    columns, rows = product.shape
    sums = torch.empty(-(-columns // group_size), rows, dtype=torch.float64)
    functions.dt_group_sums(
        product.data_ptr(),
        product.stride(0),
        codes.data_ptr(),
        codes.stride(0),
        columns,
        rows,
        group_size,
        sums.data_ptr(),
    )
    return sums
