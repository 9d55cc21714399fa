# SPDX-License-Identifier: Apache-2.0
"""PEFT's adapter layers on packed layers. Importing this imports PEFT."""

from typing import Any

import torch
from torch import nn

from .compat import LoHaConv2d, LoHaLinear, LoKrConv2d, LoKrLinear, LoraConv2d, LoraLinear
from .packed_base import PackedBaseMixin


# They subtract the adapter from the base weight, so that training starts at the same function.
_INITS_THAT_CHANGE_THE_BASE = ("pissa", "olora", "corda", "loftq", "lora_ga")
# PEFT's other variants change the base weight, or make parameters in its dtype.
_VARIANTS = ((), ("use_dora",), ("mica",))


class _LoraMixin(PackedBaseMixin):
    """What LoRA on packed layers does differently."""

    base_layer: nn.Module
    lora_A: nn.ModuleDict  # noqa: N815 - PEFT's name
    lora_B: nn.ModuleDict  # noqa: N815 - PEFT's name
    lora_bias: dict[str, bool]
    lora_variant: dict[str, Any]
    scaling: dict[str, float]

    @property
    def lora_variants(self) -> dict[tuple[str, ...], Any]:
        """The variants that work without changing the base weight."""
        variants: dict[tuple[str, ...], Any] = super().lora_variants  # type: ignore[misc] # of the PEFT layer
        return {key: variant for key, variant in variants.items() if key in _VARIANTS}

    def check_initialization(self, config: Any) -> None:
        """Checks that a new adapter leaves the base weight as it is.

        Raises:
            ValueError: if it would be changed.
        """
        init, packed = config.init_lora_weights, self.packed_base
        if packed is not None and isinstance(init, str) and init.lower().startswith(_INITS_THAT_CHANGE_THE_BASE):
            raise ValueError(
                f"init_lora_weights={init!r} subtracts the adapter from the base weight, and a packed "
                f"{type(packed).__name__} cannot hold the difference. Use True, 'gaussian', 'orthogonal', 'eva' or "
                "'mica'; what quantization itself lost is corrected by TernaryConfig(rank=...)."
            )

    def _merged_weight(self, adapter_name: str, weight: torch.Tensor) -> torch.Tensor:
        variant = self.lora_variant.get(adapter_name)
        if variant is None:
            return super()._merged_weight(adapter_name, weight)
        return variant.merge_safe(self, adapter_name, weight)

    def _merged_bias(self, adapter_name: str, bias: torch.Tensor | None) -> torch.Tensor | None:
        if not self.lora_bias[adapter_name]:
            return None
        if bias is None:
            raise RuntimeError(f"Cannot fuse {adapter_name!r}: it has a bias (lora_bias=True) and its base has none.")
        return bias + self.lora_B[adapter_name].get_parameter("bias") * self.scaling[adapter_name]


class TernaryLoraLinear(_LoraMixin, LoraLinear):
    """LoRA (also DoRA) on a packed linear layer: the packed product, plus PEFT's own adapter arithmetic.

    Made by PEFT for every packed layer that a `LoraConfig` targets. Plain LoRA does not look at the base weight; DoRA
    uses its norms, for which the weight is dequantized in each forward. Without gradients, plain LoRA is added to the
    packed product in place: three passes over `[M, N]` less, which is half of what an adapter costs on a CPU.
    """

    def __init__(self, base_layer: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> None:
        if kwargs.get("parameter_name") is not None:
            raise ValueError(
                f"target_parameters names {kwargs['parameter_name']!r} of a packed layer, which has no float weight. "
                "Name the layer in target_modules."
            )
        config.fan_in_fan_out = False  # as PEFT does for nn.Linear: the weight is [N, K]
        super().__init__(base_layer, adapter_name, config=config, **kwargs)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            ValueError: if its initialization would change the base weight.
        """
        self.check_initialization(config)
        super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)
        if config.use_dora:
            # PEFT takes the magnitudes from the dequantized weight, which is float32.
            self.lora_magnitude_vector[adapter_name].to(self.lora_A[adapter_name].get_parameter("weight").dtype)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """`[..., K]` to `[..., N]`."""
        names = [name for name in self.active_adapters if name in self.lora_A]
        in_place = not (args or kwargs or self.merged or self.disable_adapters) and self._can_add_in_place(names, x)
        if not in_place:
            return super().forward(x, *args, **kwargs)
        result = self.base_layer(x).contiguous()
        rows = result.view(-1, result.shape[-1])  # [M, N]
        for name in names:
            inner = self.lora_A[name](x) * self.scaling[name]  # [..., r]
            rows.addmm_(inner.reshape(-1, inner.shape[-1]), self.lora_B[name].get_parameter("weight").t())
        return result

    def _can_add_in_place(self, names: list[str], x: torch.Tensor) -> bool:
        """Whether nobody needs what PEFT's own forward does beyond the two products."""
        if torch.is_grad_enabled() or torch.is_autocast_enabled(x.device.type) or torch.compiler.is_compiling():
            return False
        if self.base_layer._forward_hooks:
            return False  # they may keep the output of the packed product
        return all(
            name not in self.lora_variant
            and isinstance(self.lora_dropout[name], nn.Identity)
            and _is_bare(self.lora_B[name])
            and self.lora_A[name].weight.dtype == self.lora_B[name].weight.dtype == x.dtype
            for name in names
        )

    def mica_init(self, adapter_name: str) -> None:
        """Minor components of the effective weight, whose float values are formed for this."""
        with self.float_base(values=True):
            super().mica_init(adapter_name)

    def orthogonal_init(self, adapter_name: str) -> None:
        """PEFT asks the base weight for the dtype."""
        with self.float_base(values=False):
            super().orthogonal_init(adapter_name)


def _is_bare(linear: nn.Module) -> bool:
    """Whether the module is its weight and nothing else: no bias, no hooks, no forward put in by offloading."""
    hooked = linear._forward_hooks or linear._forward_pre_hooks or "forward" in vars(linear)
    return type(linear) is nn.Linear and linear.bias is None and not hooked


class TernaryLoraConv2d(_LoraMixin, LoraConv2d):
    """LoRA (also DoRA) on a packed convolution."""

    # PEFT counts the dimensions of the base weight, which is packed as a matrix.
    _kernel_dim = property(lambda self: 4, lambda self, value: None)

    def update_layer(self, adapter_name: str, r: int, lora_alpha: int, config: Any, **kwargs: Any) -> None:
        """Adds an adapter.

        Raises:
            ValueError: if its initialization would change the base weight.
        """
        self.check_initialization(config)
        with self.float_base(values=config.use_dora):
            super().update_layer(adapter_name, r, lora_alpha=lora_alpha, config=config, **kwargs)

    def get_delta_weight(self, adapter: str) -> torch.Tensor:
        """The update, of the float weight's shape."""
        with self.float_base(values=False):
            return super().get_delta_weight(adapter)

    def forward(self, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The packed convolution, plus PEFT's own adapter arithmetic."""
        if self.merged or not any(name in self.lora_variant for name in self.active_adapters):
            return super().forward(x, *args, **kwargs)
        # DoRA of convolutions reads the base weight itself. The product is still that of the packed layer.
        with self.float_base(values=True):
            return super().forward(x, *args, **kwargs)


class _LycorisMixin(PackedBaseMixin):
    """LoHa and LoKr take the shape of their update from the base weight."""

    def update_layer(self, *args: Any, **kwargs: Any) -> None:
        """Adds an adapter."""
        with self.float_base(values=False):
            super().update_layer(*args, **kwargs)  # type: ignore[misc] # of the PEFT layer

    def get_delta_weight(self, *args: Any, **kwargs: Any) -> torch.Tensor:
        """The update, of the float weight's shape."""
        with self.float_base(values=False):
            return super().get_delta_weight(*args, **kwargs)  # type: ignore[misc] # of the PEFT layer


class TernaryLoHaLinear(_LycorisMixin, LoHaLinear):
    """LoHa on a packed linear layer."""


class TernaryLoHaConv2d(_LycorisMixin, LoHaConv2d):
    """LoHa on a packed convolution."""


class TernaryLoKrLinear(_LycorisMixin, LoKrLinear):
    """LoKr on a packed linear layer."""


class TernaryLoKrConv2d(_LycorisMixin, LoKrConv2d):
    """LoKr on a packed convolution."""
