# SPDX-License-Identifier: Apache-2.0
"""What the packed layers share: their tensors, the float placeholder that loaders fill, and `dequantize`."""

from collections.abc import Callable
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import nn

from ..format import LOW_RANK_NAMES, LayerSpec


class QuantizedLinear(nn.Linear):
    """Base of the packed linear layers.

    A subclass of `nn.Linear`, so that the hooks and adapters of diffusers, accelerate and PEFT find it by type. All
    packed tensors are plain integer Parameters without gradient:

    - Parameters, because offloading hooks move parameters only;
    - not tensor subclasses, because those hooks rebuild parameters and drop everything else;
    - integers, because libraries cast floating parameters with the model (`.to(dtype)`, layerwise casting, loaders)
      and derive `model.dtype` from the first floating one. The 16-bit scales are therefore held as their bit
      patterns (int16) and viewed as `scale_dtype` where they are used, so no cast can change them;
    - int8 codes, not uint8, because T5 casts its activations to `weight.dtype` unless that is int8.

    Between construction and [`~QuantizedLinear.install`] the layer is a *placeholder*: `weight` is a float
    `[N, K]` parameter, as the loaders of float checkpoints expect.

    A layer can be *fused*: [`~QuantizedLinear.fuse`] makes it multiply by a dense weight, into which an adapter was
    merged, and leaves the packed tensors as they are, so that [`~QuantizedLinear.unfuse`] restores every bit.

    Args:
        spec ([`LayerSpec`]): what the layer stores.
        bias (`bool`): whether there is a bias.
        activation_dtype (`str`): dtype the activations are rounded to, see [`TernaryConfig`].
        compute_dtype (`torch.dtype`, *optional*): dtype of the product; `None` follows the input.
        device, dtype: of the placeholder weight and the bias.
    """

    packed_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    weight_scale: nn.Parameter | None
    fused_weight: nn.Parameter | None
    fused_bias: nn.Parameter | None

    def __init__(
        self,
        spec: LayerSpec,
        bias: bool = True,
        *,
        activation_dtype: str = "none",
        compute_dtype: torch.dtype | None = None,
        device: torch.device | str | None = None,
        dtype: torch.dtype | None = None,
    ) -> None:
        nn.Module.__init__(self)
        self.in_features = spec.in_features
        self.out_features = spec.out_features
        self.spec = spec
        self.activation_dtype = activation_dtype
        self.compute_dtype = compute_dtype
        self.scale_dtype = torch.float16
        placeholder = torch.empty(spec.out_features, spec.in_features, device=device, dtype=dtype)
        self.weight = nn.Parameter(placeholder, requires_grad=False)
        for name in (*self.packed_names[1:], "fused_weight", "fused_bias"):
            self.register_parameter(name, None)
        self._float_dtype = dtype
        if bias:
            values = torch.empty(spec.out_features, device=device, dtype=dtype)
            self.bias = nn.Parameter(values, requires_grad=False)
        else:
            self.register_parameter("bias", None)

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer where it is now."""
        return "torch"

    @property
    def is_packed(self) -> bool:
        """Whether the packed weight is installed (on any device, meta included)."""
        return self.weight_scale is not None

    def install(self, **tensors: torch.Tensor | None) -> None:
        """Replaces the placeholder by packed tensors (keywords named as in the spec; scales in their float dtype).

        Raises:
            ValueError: if a dtype or shape is not what the spec asks for.
        """
        expected = self.spec.memory_tensors()
        given = {name: tensor for name, tensor in tensors.items() if tensor is not None}
        if given.keys() != expected.keys():
            raise ValueError(f"Expected the tensors {sorted(expected)}, got {sorted(given)}.")
        for name, tensor in given.items():
            if tensor.dtype not in expected[name].dtypes or tuple(tensor.shape) != expected[name].shape:
                raise ValueError(
                    f"{name} of a {self.spec} must be {expected[name].dtypes} {list(expected[name].shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}."
                )
        self.scale_dtype = given["weight_scale"].dtype
        for name, tensor in given.items():
            if name == "weight_scale" or name in LOW_RANK_NAMES:
                tensor = scale_to_bits(tensor)
            setattr(self, name, nn.Parameter(tensor, requires_grad=False))

    def install_empty(self, scale_dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        """Installs packed tensors without values, which a loader fills by name."""
        tensors = {
            name: torch.empty(
                spec.shape, dtype=scale_dtype if name == "weight_scale" else spec.dtypes[0], device=device
            )
            for name, spec in self.spec.memory_tensors().items()
        }
        self.install(**tensors)

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: object) -> None:
        """Quantizes a float weight `[N, K]` and installs it."""
        raise NotImplementedError

    @property
    def scales(self) -> torch.Tensor:
        """The stored scale in its float dtype, a view of `weight_scale`."""
        if self.weight_scale is None:
            raise RuntimeError(f"{type(self).__name__} holds no packed weight yet: load or pack one first.")
        return bits_to_scale(self.weight_scale, self.scale_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The complete dense weight `[N, K]` that the layer multiplies by: of a fused layer, the fused weight.

        Formed in float32 and rounded once to `dtype` (default: the compute dtype, else float32).
        """
        dense = self._dequantize_packed() if self.fused_weight is None else self.fused_weight.detach()
        return dense.to(dtype or self.compute_dtype or torch.float32)

    def _dequantize_packed(self) -> torch.Tensor:
        raise NotImplementedError

    def to_linear(self, dtype: torch.dtype | None = None) -> nn.Linear:
        """A float `nn.Linear` with the dequantized weight and the same bias."""
        dense = self.dequantize(dtype)
        linear = nn.Linear(self.in_features, self.out_features, bias=False, device=dense.device, dtype=dense.dtype)
        linear.weight = nn.Parameter(dense, requires_grad=False)
        bias = self._active_bias
        if bias is not None:
            linear.bias = nn.Parameter(bias.detach().to(dense.dtype), requires_grad=False)
        return linear

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype that a float `nn.Linear` would have in the place of this layer; `None` if nothing says so."""
        return self.compute_dtype or (self._float_dtype if self.bias is None else self.bias.dtype)

    @property
    def is_fused(self) -> bool:
        """Whether a dense weight stands in for the packed one."""
        return self.fused_weight is not None

    @property
    def _active_bias(self) -> torch.Tensor | None:
        return self.bias if self.fused_bias is None else self.fused_bias

    def fuse(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """From now on the layer multiplies by `weight`; the packed tensors stay as they are.

        Args:
            weight (`torch.Tensor`): `[N, K]` float.
            bias (`torch.Tensor`, *optional*): `[N]`, in place of the layer's bias.

        Raises:
            ValueError: if `weight` is not a float `[N, K]`.
        """
        if tuple(weight.shape) != (self.out_features, self.in_features) or not weight.is_floating_point():
            raise ValueError(
                f"A fused weight must be float {[self.out_features, self.in_features]}, "
                f"got {weight.dtype} {list(weight.shape)}."
            )
        self.fused_weight = nn.Parameter(weight.detach(), requires_grad=False)
        if bias is not None:
            self.fused_bias = nn.Parameter(bias.detach(), requires_grad=False)

    def unfuse(self) -> None:
        """Multiplies by the packed weight again."""
        self.fused_weight = self.fused_bias = None

    def stored_bytes(self) -> int:
        """Bytes of the packed tensors as they are in memory (bias not counted)."""
        parameters = (getattr(self, name) for name in self.packed_names)
        return sum(p.numel() * p.element_size() for p in parameters if p is not None)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` to `[..., N]`, in the dtype that a float `nn.Linear` would return."""
        if torch.is_autocast_enabled(x.device.type) and x.dtype != torch.float64:
            # Autocast does not see custom operators, and nn.Linear would have been cast (unless in float64).
            return self._product(x.to(torch.get_autocast_dtype(x.device.type)))
        if self.compute_dtype is None:
            return self._product(x)
        return self._product(x.to(self.compute_dtype)).to(x.dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        if self.fused_weight is None:
            return self._multiply(x)
        bias = self._active_bias
        return F.linear(x, self.fused_weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        raise NotImplementedError

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLinear":
        if self._float_dtype is not None:
            # A layer without a bias has no float tensor that would show what the model was cast to.
            self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype)).dtype
        return super()._apply(fn, recurse)

    def extra_repr(self) -> str:
        """Shapes, bits and kernel, for `print(model)`."""
        fused = "fused with a dense weight, " if self.is_fused else ""
        bits = f"{8 * self.stored_bytes() / self.spec.weights:.3f} bits/weight" if self.is_packed else "empty"
        return (
            f"in_features={self.in_features}, out_features={self.out_features}, bias={self.bias is not None}, "
            f"{self._repr_details()}{fused}{bits}, kernel={self.kernel}"
        )

    def _repr_details(self) -> str:
        return ""


def scale_to_bits(scale: torch.Tensor) -> torch.Tensor:
    """Bit pattern of a scale: int16 for 16-bit floats, int32 for float32."""
    return scale.contiguous().view(torch.int16 if scale.element_size() == 2 else torch.int32)


def bits_to_scale(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of [`scale_to_bits`]."""
    return bits.view(dtype)
