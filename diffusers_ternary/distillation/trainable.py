# SPDX-License-Identifier: Apache-2.0
"""The trainable twin of a packed ternary layer."""

import dataclasses
import math
from typing import Any

import torch
import torch.nn.functional as F
from torch import nn
from torch.distributed.tensor import DTensor

from ..format import LOW_RANK_DTYPE, expand_scales, group_scales, pack_planes, unpack_planes
from ..layers import QuantizedConv2d, TernaryLayer
from ..ternarize import LowRank, rotate
from ..ternarize import TernaryWeight as PackedWeight
from .fake_quantize import consistent_latent, fake_quantize, round_scales, round_to, stored_scales, ternary_codes


LATENT_MARGIN = 0.05  # of the scale: how far inside its cell a latent starts that calibration moved to another code


@dataclasses.dataclass(frozen=True)
class LayerTraining:
    """What of a layer is trained beside its bias.

    Args:
        latents (`bool`): the codes, through latent float weights.
        scales (`bool`): the group scales.
        low_rank (`bool`): the low-rank correction.
        rank (`int`): rank of the correction that a layer without one is given; it starts as zero. 0 = none.
        seed (`int`): of that correction.
    """

    latents: bool
    scales: bool = True
    low_rank: bool = False
    rank: int = 0
    seed: int = 0


class TrainableTernaryLayer(nn.Module):
    """Multiplies by the weight that [`~TrainableTernaryLayer.pack`] would store, and lets gradients through.

    Parameters, all float32 (an update of 1e-5 is lost in 16 bits); those that are not trained take no gradient:

    - `latent` `[N, K]`: the float weights behind the codes; absent if the codes are frozen.
    - `scale` `[N, G]`: group scales before they are rounded to what is stored.
    - `bias` `[N]`, if the layer has one.
    - `low_rank_up` `[N, r]`, `low_rank_down` `[r, K]`, if there is a correction.

    Column scales stay as they are: the codes learn for the inputs that they give.

    Args:
        layer ([`TernaryLayer`]): packed; where training starts. Not changed.
        weight (`torch.Tensor`): the teacher's float weight, for the latents: `[N, K]`, or `[N, C, kh, kw]`.
        training ([`LayerTraining`]): what is trained.
    """

    latent: nn.Parameter | None
    bias: nn.Parameter | None
    low_rank_up: nn.Parameter | None
    low_rank_down: nn.Parameter | None
    frozen_planes: torch.Tensor | None
    frozen_scale: torch.Tensor | None
    frozen_multiplier: torch.Tensor | None
    column_scale: torch.Tensor | None

    def __init__(self, layer: TernaryLayer, weight: torch.Tensor, training: LayerTraining) -> None:
        super().__init__()
        self.spec = layer.spec
        self.in_features, self.out_features = layer.spec.in_features, layer.spec.out_features
        self.kernel_shape: tuple[int, ...] | None = None
        if isinstance(layer, QuantizedConv2d):
            self.kernel_shape = layer.weight_shape  # [N, C, kh, kw]
            self.convolution: dict[str, Any] = {
                "stride": layer.stride,
                "padding": layer.padding,
                "dilation": layer.dilation,
            }
        self.scale_dtype = layer.scale_dtype
        multiplier = None if layer.weight_multiplier is None else layer.weight_multiplier.detach()
        effective = group_scales(layer.scales.detach(), multiplier).clone()
        self.scale = nn.Parameter(effective, requires_grad=training.scales)
        # Scales that are not trained are stored as they came: to split them again could move a multiplier.
        self._freeze("frozen_scale", None if training.scales else layer.scales)
        self._freeze("frozen_multiplier", None if training.scales else layer.weight_multiplier)
        self._freeze("column_scale", layer.column_factors)
        self._freeze("frozen_planes", None if training.latents else layer.weight)
        self.register_parameter("latent", self._latent(layer, weight) if training.latents else None)
        self.bias = None if layer.bias is None else nn.Parameter(layer.bias.detach().float().clone())
        self._make_low_rank(layer.low_rank, training)

    def _freeze(self, name: str, tensor: torch.Tensor | None) -> None:
        # Not persistent: a checkpoint is to hold what is trained.
        self.register_buffer(name, None if tensor is None else tensor.detach().clone(), persistent=False)

    def _latent(self, layer: TernaryLayer, weight: torch.Tensor) -> nn.Parameter:
        target = weight.detach().float().flatten(1)
        if layer.low_rank is not None:
            target = target - layer.low_rank.dense()  # the codes stand for what the correction leaves
        if self.column_scale is not None:
            target = target / self.column_scale
        target = rotate(target, self.spec.hadamard)
        codes = unpack_planes(layer.weight.detach(), self.in_features)
        # Under the rounded scales: a latent near a border would change its code with the first forward.
        scales = self.effective_scales().detach()
        return nn.Parameter(consistent_latent(target, codes, scales, self.spec.group_size, margin=LATENT_MARGIN))

    def _make_low_rank(self, start: LowRank | None, training: LayerTraining) -> None:
        self.register_parameter("low_rank_up", None)
        self.register_parameter("low_rank_down", None)
        if start is not None:
            up, down = start.up.detach().float(), start.down.detach().float()
        elif training.rank:
            rank = min(training.rank, self.in_features, self.out_features)
            generator = torch.Generator().manual_seed(training.seed)
            down = torch.randn(rank, self.in_features, generator=generator) / math.sqrt(self.in_features)
            down = down.to(self.scale.device)
            up = torch.zeros(self.out_features, rank, device=self.scale.device)
        else:
            return
        self.low_rank_up = nn.Parameter(up, requires_grad=training.low_rank)
        self.low_rank_down = nn.Parameter(down, requires_grad=training.low_rank)

    def effective_scales(self) -> torch.Tensor:
        """Group scales float32 `[N, G]` as they will be read back from a file."""
        if self.frozen_scale is not None:
            return self.scale
        return round_scales(self.scale, layout=self.spec.scales, dtype=self.scale_dtype)

    def quantized_weight(self) -> torch.Tensor:
        """The dequantized codes float32 `[N, K]`; rotation and correction are not included."""
        scales = self.effective_scales()
        if self.latent is not None:
            return fake_quantize(self.latent, scales, self.spec.group_size)
        assert self.frozen_planes is not None
        codes = unpack_planes(self.frozen_planes, self.in_features)
        return codes * expand_scales(scales, self.spec.group_size, self.in_features)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """What the float layer computes, in the dtype that it would return."""
        device = x.device.type
        dtype = torch.get_autocast_dtype(device) if torch.is_autocast_enabled(device) else x.dtype
        x = x.to(dtype)
        bias = None if self.bias is None else self.bias.to(dtype)
        if self.kernel_shape is not None:
            kernel = self._whole_weight().to(dtype).view(self.kernel_shape)
            return F.conv2d(x, kernel, bias, **self.convolution)
        scaled = x if self.column_scale is None else (x * self.column_scale).to(dtype)
        product = F.linear(rotate(scaled, self.spec.hadamard), self.quantized_weight().to(dtype), bias)
        if self.low_rank_up is None or self.low_rank_down is None:
            return product
        up, down = (round_to(part, LOW_RANK_DTYPE).to(dtype) for part in (self.low_rank_up, self.low_rank_down))
        return product + F.linear(F.linear(x, down), up)

    def _whole_weight(self) -> torch.Tensor:
        """The dense weight float32 `[N, K]`, rotation, column scales and correction included."""
        weight = rotate(self.quantized_weight(), self.spec.hadamard)
        if self.column_scale is not None:
            weight = weight * self.column_scale
        if self.low_rank_up is None or self.low_rank_down is None:
            return weight
        return weight + round_to(self.low_rank_up, LOW_RANK_DTYPE) @ round_to(self.low_rank_down, LOW_RANK_DTYPE)

    @torch.no_grad()
    def pack(self) -> PackedWeight:
        """The packed weight that the forward multiplies by, bit for bit. Under FSDP every process has to call it."""
        scales = whole(self.scale)
        if self.frozen_scale is not None:
            scale, multiplier = self.frozen_scale.clone(), self.frozen_multiplier
        else:
            scale, multiplier = stored_scales(scales, layout=self.spec.scales, dtype=self.scale_dtype)
            scales = group_scales(scale, multiplier)
        if self.latent is not None:
            codes = ternary_codes(whole(self.latent), scales, self.spec.group_size)
            planes = pack_planes(codes.to(torch.int8))
        else:
            assert self.frozen_planes is not None
            planes = self.frozen_planes.clone()
        low_rank = self._packed_low_rank()
        rank = 0 if low_rank is None else low_rank.up.shape[1]
        column_scale = None if self.column_scale is None else self.column_scale.clone()
        spec = dataclasses.replace(self.spec, rank=rank)
        return PackedWeight(spec, planes, scale, multiplier, low_rank, column_scale)

    def _packed_low_rank(self) -> LowRank | None:
        if self.low_rank_up is None or self.low_rank_down is None:
            return None
        up, down = (round_to(whole(part), LOW_RANK_DTYPE) for part in (self.low_rank_up, self.low_rank_down))
        return LowRank(up.to(LOW_RANK_DTYPE), down.to(LOW_RANK_DTYPE))

    def extra_repr(self) -> str:
        """Shapes, for `print(model)`."""
        return f"in_features={self.in_features}, out_features={self.out_features}, group_size={self.spec.group_size}"


def whole(tensor: torch.Tensor) -> torch.Tensor:
    """The complete tensor of a parameter that FSDP may have sharded, without gradient. All processes have to call."""
    tensor = tensor.detach()
    return tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
