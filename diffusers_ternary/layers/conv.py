# SPDX-License-Identifier: Apache-2.0
"""Packed layers that stand for `nn.Conv2d`."""

import torch
import torch.nn.functional as F
from torch import nn

from ..format import LayerSpec
from ..kernels.ops import check_devices, check_float
from .base import QuantizedLayer


# Weights of a k x k convolution that are unpacked at a time: 32 MiB in 16 bits, more than any layer of a Stable
# Diffusion UNet but its widest.
SCRATCH_WEIGHTS = 1 << 24


def why_not_convertible(conv: nn.Conv2d) -> str | None:
    """Why a convolution cannot be packed, or `None` if it can."""
    if conv.groups != 1:
        return "depthwise or grouped convolution"
    if conv.padding_mode != "zeros":
        return f"convolution with {conv.padding_mode} padding"
    return None


class QuantizedConv2d(QuantizedLayer, nn.Conv2d):
    """Base of the packed 2-d convolutions without groups.

    The weight `[N, C, kh, kw]` is stored as the matrix `[N, C * kh * kw]`. A 1x1 convolution is the linear map over
    the pixels, and runs as one; others unpack their weight, a bounded part at a time.

    Args:
        spec ([`LayerSpec`]): what the layer stores.
        like (`nn.Conv2d`): gives the sizes, stride, padding and dilation.
        bias (`bool`): whether there is a bias.
        activation_dtype (`str`): dtype the activations of 1x1 convolutions are rounded to; others multiply exactly.
        compute_dtype (`torch.dtype`, *optional*): dtype of the product; `None` follows the input.
        device, dtype: of the placeholder weight and the bias.

    Raises:
        ValueError: for groups, padding that is not zeros, or a spec of another shape.
    """

    def __init__(
        self,
        spec: LayerSpec,
        like: nn.Conv2d,
        bias: bool = True,
        *,
        activation_dtype: str = "none",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        if (reason := why_not_convertible(like)) is not None:
            raise ValueError(f"{type(self).__name__} cannot stand for a {reason}: {like}.")
        columns = like.in_channels * like.kernel_size[0] * like.kernel_size[1]
        if (spec.out_features, spec.in_features) != (like.out_channels, columns):
            raise ValueError(f"{spec} is not the matrix {[like.out_channels, columns]} of {like}.")
        nn.Module.__init__(self)
        for name in (*nn.Conv2d.__constants__, "_reversed_padding_repeated_twice"):
            setattr(self, name, getattr(like, name))
        self._become_placeholder(spec, bias, activation_dtype, compute_dtype, device, dtype)

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """`[N, C, kh, kw]`."""
        return (self.out_channels, self.in_channels, *self.kernel_size)

    @property
    def is_pointwise(self) -> bool:
        """Whether this is a linear map over the pixels: 1x1, no padding."""
        return self.kernel_size == (1, 1) and self.padding in ((0, 0), "valid", "same")

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer where it is now."""
        return super().kernel if self.is_pointwise else "unpacked, torch conv2d"

    def float_module(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Conv2d:
        """`nn.Conv2d` around a weight `[N, C, kh, kw]` and a bias."""
        conv = nn.Conv2d(
            self.in_channels,
            self.out_channels,
            self.kernel_size,  # type: ignore[arg-type] # torch annotates what its constructor takes, not what it keeps
            stride=self.stride,  # type: ignore[arg-type]
            padding=self.padding,  # type: ignore[arg-type]
            dilation=self.dilation,  # type: ignore[arg-type]
            bias=False,
            device="meta",
        )
        return self._fill_float(conv, weight, bias)

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        check_float(x)
        return self._multiply_pixels(x) if self.is_pointwise else self._convolve(x)

    def _multiply_pixels(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., C, H, W]` to `[..., N, H', W']`; without a copy where the channels are innermost in memory."""
        pixels = x.movedim(-3, -1)  # [..., H, W, C]
        y = self.multiply_rows(pixels[..., :: self.stride[0], :: self.stride[1], :]).movedim(-1, -3)
        # Like torch's own convolution: channels innermost if they came so, else outermost.
        return y if pixels.is_contiguous() else y.contiguous()

    def _convolve(self, x: torch.Tensor) -> torch.Tensor:
        rows = max(1, SCRATCH_WEIGHTS // self.spec.in_features)
        bias = None if self.bias is None else self.bias.to(x.dtype)
        parts = []
        for first in range(0, self.out_channels, rows):
            part = slice(first, min(first + rows, self.out_channels))
            dense = self.matrix(x.dtype, part).view(-1, *self.weight_shape[1:])
            offset = None if bias is None else bias[part]
            parts.append(self._multiply_dense(x, dense, offset))
        return parts[0] if len(parts) == 1 else torch.cat(parts, dim=-3)

    def _multiply_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        check_float(x)
        check_devices(x.device, "the input", weight=weight, bias=bias)
        return F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation)
