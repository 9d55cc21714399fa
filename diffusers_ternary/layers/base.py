# SPDX-License-Identifier: Apache-2.0
"""What all packed layers share: their tensors, the float placeholder that loaders fill, and `dequantize`."""

import dataclasses
from collections.abc import Callable, Iterator, Mapping
from typing import Any, ClassVar, TypeVar

import torch
from torch import nn

from ..format import FLOAT_NAMES, LayerSpec, layer_spec_from_json
from ..kernels.compat import is_autocast
from ..kernels.ops import ResidentWeight, check_float
from ..ternarize import Int8Weight, TernaryWeight


ModuleT = TypeVar("ModuleT", bound=nn.Module)
NOT_TRAINABLE = (
    "holds codes, which have no gradient. Train an adapter on it (add_adapter, get_peft_model), or the weights behind "
    "the codes with diffusers_ternary.distill; or call dequantize() first."
)
_RECORD = "diffusers_ternary"  # beside torch's own "version" in the metadata of a state dict


@dataclasses.dataclass(frozen=True)
class LayerRecord:
    """What a saver must know of a packed layer beside its tensors."""

    spec: LayerSpec
    scale_dtype: torch.dtype


def read_records(state_dict: Mapping[str, Any]) -> dict[str, LayerRecord]:
    """The packed layers behind a state dict that `nn.Module.state_dict` made, by name.

    Packed layers note themselves in the state dict's metadata, so this describes the model as it was that moment,
    whatever was packed, replaced, renamed or copied before.
    """
    metadata: Mapping[str, Mapping[str, Any]] = getattr(state_dict, "_metadata", {})
    found = {name: entry[_RECORD] for name, entry in metadata.items() if _RECORD in entry}
    return {
        name: LayerRecord(layer_spec_from_json(record["spec"]), getattr(torch, record["scale_dtype"]))
        for name, record in found.items()
    }


class QuantizedLayer(nn.Module):
    """Base of the packed layers.

    Subclasses combine it with what is stored ([`TernaryLayer`], [`Int8Layer`]) and with the float module that they
    stand for ([`QuantizedLinear`], [`QuantizedConv2d`]): they are subclasses of `nn.Linear` and `nn.Conv2d`, so that
    the hooks and adapters of diffusers, accelerate and PEFT find them by type. All packed tensors are plain integer
    Parameters without gradient:

    - Parameters, because offloading hooks move parameters only;
    - not tensor subclasses, because those hooks rebuild parameters and drop everything else;
    - integers, because libraries cast floating parameters with the model (`.to(dtype)`, layerwise casting, loaders)
      and derive `model.dtype` from the first floating one. The 16-bit scales are therefore held as their bit
      patterns (int16) and viewed as `scale_dtype` where they are used, so no cast can change them;
    - int8 codes, not uint8, because T5 casts its activations to `weight.dtype` unless that is int8.

    Between construction and [`~QuantizedLayer.install`] the layer is a *placeholder*: `weight` is a float parameter
    of the float module's shape, as the loaders of float checkpoints expect.
    """

    packed_names: ClassVar[tuple[str, ...]] = ("weight", "weight_scale")
    spec: LayerSpec
    weight: torch.Tensor
    bias: torch.Tensor | None
    weight_scale: nn.Parameter | None
    fused_weight: nn.Parameter | None
    fused_bias: nn.Parameter | None
    # Of ternary layers on a GPU, see [`keep_unpacked`]. Of the class until then, as older pickles lack it.
    _resident: ResidentWeight | None = None

    def _become_placeholder(
        self,
        spec: LayerSpec,
        bias: bool,
        activation_dtype: str,
        compute_dtype: torch.dtype | None,
        device: torch.device | str | None,
        dtype: torch.dtype | None,
    ) -> None:
        """Called by constructors, after `nn.Module.__init__` and the attributes of the float module.

        Args:
            spec ([`LayerSpec`]): what the layer stores.
            bias (`bool`): whether there is a bias.
            activation_dtype (`str`): dtype the activations are rounded to, see [`TernaryConfig`].
            compute_dtype (`torch.dtype`, *optional*): dtype of the product; `None` follows the input.
            device, dtype: of the placeholder weight and the bias.
        """
        self.spec = spec
        self.activation_dtype = activation_dtype
        self.compute_dtype = compute_dtype
        self.scale_dtype = torch.float16
        placeholder = torch.empty(self.weight_shape, device=device, dtype=dtype)
        self.weight = nn.Parameter(placeholder, requires_grad=False)
        for name in (*self.packed_names[1:], "fused_weight", "fused_bias"):
            self.register_parameter(name, None)
        self._float_dtype = dtype
        values = torch.empty(spec.out_features, device=device, dtype=dtype) if bias else None
        self.register_parameter("bias", None if values is None else nn.Parameter(values, requires_grad=False))

    @property
    def weight_shape(self) -> tuple[int, ...]:
        """Shape of the float weight; its matrix, all but the first dimension flattened, is what the spec describes."""
        return (self.spec.out_features, self.spec.in_features)

    @property
    def kernel(self) -> str:
        """Name of the kernel that serves the layer where it is now."""
        return "torch"

    @property
    def is_packed(self) -> bool:
        """Whether the packed weight is installed (on any device, meta included)."""
        return self.weight_scale is not None

    def install(self, spec: LayerSpec, tensors: Mapping[str, torch.Tensor]) -> None:
        """Replaces the placeholder by a packed weight.

        It is what the layer multiplies by from then on: packed tensors, a fused weight and an unpacked copy of before
        are gone.

        Args:
            spec ([`LayerSpec`]): may differ from the placeholder's in all but its shape.
            tensors (`Mapping[str, torch.Tensor]`): named as in the spec; scales in their float dtype.

        Raises:
            ValueError: if a dtype or shape is not what the spec asks for, or the spec's shape is not the layer's.
        """
        own = self.spec
        if (spec.kind, spec.out_features, spec.in_features) != (own.kind, own.out_features, own.in_features):
            raise ValueError(f"A {spec} cannot be installed in the place of a {own}.")
        expected = spec.memory_tensors()
        if tensors.keys() != expected.keys():
            raise ValueError(f"Expected the tensors {sorted(expected)}, got {sorted(tensors)}.")
        for name, tensor in tensors.items():
            if tensor.dtype not in expected[name].dtypes or tuple(tensor.shape) != expected[name].shape:
                raise ValueError(
                    f"{name} of a {spec} must be {expected[name].dtypes} {list(expected[name].shape)}, "
                    f"got {tensor.dtype} {list(tensor.shape)}."
                )
        self.spec = spec
        self.scale_dtype = tensors["weight_scale"].dtype
        for name in self.packed_names:
            if name not in tensors:
                setattr(self, name, None)  # of a layout that was installed before
        for name, tensor in tensors.items():
            stored = scale_to_bits(tensor) if name in FLOAT_NAMES else tensor
            setattr(self, name, nn.Parameter(stored, requires_grad=False))
        self.fused_weight = self.fused_bias = self._resident = None

    def install_weight(self, weight: TernaryWeight | Int8Weight) -> None:
        """Installs a packed weight, see [`~QuantizedLayer.install`]."""
        self.install(weight.spec, weight.tensors())

    def install_empty(self, scale_dtype: torch.dtype, device: torch.device | str = "meta") -> None:
        """Installs packed tensors without values, which a loader fills by name."""
        tensors = {
            name: torch.empty(
                spec.shape, dtype=scale_dtype if name == "weight_scale" else spec.dtypes[0], device=device
            )
            for name, spec in self.spec.memory_tensors().items()
        }
        self.install(self.spec, tensors)

    def pack(self, weight: torch.Tensor, *, name: str = "weight", **options: object) -> None:
        """Quantizes a float weight of shape `weight_shape` and installs it."""
        raise NotImplementedError

    def matrix(self, dtype: torch.dtype, rows: slice = slice(None)) -> torch.Tensor:
        """Rows of the dense weight matrix, `[n, K]`: formed in float32 and rounded once to `dtype`."""
        raise NotImplementedError

    def multiply_rows(self, x: torch.Tensor) -> torch.Tensor:
        """`[..., K]` times the matrix, plus the bias: `[..., N]`."""
        raise NotImplementedError

    def float_module(self, weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Module:
        """The float module that the layer stands for, around a weight of shape `weight_shape` and a bias."""
        raise NotImplementedError

    def to_float(self, dtype: torch.dtype | None = None) -> nn.Module:
        """The float module with the dequantized weight and the same bias."""
        dense = self.dequantize(dtype)
        bias = self.active_bias
        return self.float_module(dense, None if bias is None else bias.detach().to(dense.dtype))

    def _fill_float(self, module: ModuleT, weight: torch.Tensor, bias: torch.Tensor | None) -> ModuleT:
        module.weight = nn.Parameter(weight, requires_grad=False)
        if bias is not None:
            # A parameter stays the one that it is: loaders mark those that have arrived.
            module.bias = bias if isinstance(bias, nn.Parameter) else nn.Parameter(bias, requires_grad=False)
        module.train(self.training)
        return module

    @property
    def scales(self) -> torch.Tensor:
        """The stored scale in its float dtype, a view of `weight_scale`."""
        if self.weight_scale is None:
            raise RuntimeError(f"{type(self).__name__} holds no packed weight yet: load or pack one first.")
        return bits_to_scale(self.weight_scale, self.scale_dtype)

    def dequantize(self, dtype: torch.dtype | None = None) -> torch.Tensor:
        """The complete dense weight, of shape `weight_shape`, that the layer multiplies by.

        Corrections are included; of a fused layer it is the fused weight. Formed in float32 and rounded once to
        `dtype` (default: the compute dtype, else float32).
        """
        dtype = dtype or self.compute_dtype or torch.float32
        if self.fused_weight is not None:
            return self.fused_weight.detach().to(dtype)
        return self.matrix(dtype).view(self.weight_shape)

    @property
    def float_dtype(self) -> torch.dtype | None:
        """Dtype that the float module would have in the place of this layer; `None` if nothing says so."""
        return self.compute_dtype or (self._float_dtype if self.bias is None else self.bias.dtype)

    @property
    def is_fused(self) -> bool:
        """Whether a dense weight stands in for the packed one."""
        return self.fused_weight is not None

    @property
    def active_bias(self) -> torch.Tensor | None:
        """The bias that the layer adds: its own, or the one of the fused weight."""
        return self.bias if self.fused_bias is None else self.fused_bias

    def fuse(self, weight: torch.Tensor, bias: torch.Tensor | None = None) -> None:
        """From now on the layer multiplies by `weight`; the packed tensors stay as they are.

        Args:
            weight (`torch.Tensor`): float, of shape `weight_shape`.
            bias (`torch.Tensor`, *optional*): `[N]`, in place of the layer's bias.

        Raises:
            ValueError: if `weight` is not a float tensor of that shape.
        """
        if tuple(weight.shape) != self.weight_shape or not weight.is_floating_point():
            raise ValueError(
                f"A fused weight must be float {list(self.weight_shape)}, got {weight.dtype} {list(weight.shape)}."
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
        return sum(p.nbytes for p in parameters if p is not None)

    def forward(self, input: torch.Tensor) -> torch.Tensor:
        """What the float module computes, in the dtype that it would return.

        Raises:
            RuntimeError: as the float module does, for inputs that are not float or on another device.
        """
        if is_autocast(input) and input.is_floating_point() and input.dtype != torch.float64:
            # Autocast does not see custom operators, and the float module would have been cast (unless in float64).
            return self._product(input.to(torch.get_autocast_dtype(input.device.type)))
        if self.compute_dtype is None:
            return self._product(input)
        check_float(input)
        return self._product(input.to(self.compute_dtype)).to(input.dtype)

    def _product(self, x: torch.Tensor) -> torch.Tensor:
        fused_weight = self._parameters["fused_weight"]  # without Module.__getattr__, which takes longer
        if fused_weight is None:
            return self._multiply(x)
        bias = self.active_bias
        return self._multiply_dense(x, fused_weight.to(x.dtype), None if bias is None else bias.to(x.dtype))

    def _multiply(self, x: torch.Tensor) -> torch.Tensor:
        """What the float module computes, with the packed weight."""
        raise NotImplementedError

    def _multiply_dense(self, x: torch.Tensor, weight: torch.Tensor, bias: torch.Tensor | None) -> torch.Tensor:
        """What the float module computes, with a dense weight."""
        raise NotImplementedError

    def requires_grad_(self, requires_grad: bool = True) -> "QuantizedLayer":
        """Freezes the layer, which it is already.

        Raises:
            ValueError: if it is to be trained.
        """
        if requires_grad:
            raise ValueError(f"A {type(self).__name__} {NOT_TRAINABLE}")
        return super().requires_grad_(False)

    def _save_to_state_dict(self, destination: Any, prefix: str, keep_vars: bool) -> None:
        super()._save_to_state_dict(destination, prefix, keep_vars)
        entry = getattr(destination, "_metadata", {}).get(prefix.removesuffix("."))
        if entry is not None and self.is_packed:
            # Builtin types only: torch.load(weights_only=True) must still read a pickled state dict.
            entry[_RECORD] = {
                "spec": self.spec.to_json(),
                "scale_dtype": str(self.scale_dtype).removeprefix("torch."),
            }

    def _load_from_state_dict(
        self,
        state_dict: dict[str, Any],
        prefix: str,
        local_metadata: dict[str, Any],
        strict: bool,
        missing_keys: list[str],
        unexpected_keys: list[str],
        error_msgs: list[str],
    ) -> None:
        """See `nn.Module`; what would turn codes into numbers that they are not is an error, `strict` or not."""
        refused = list(self._refusals(state_dict, prefix)) if self.is_packed else []
        if refused:
            # Nothing of the layer is changed: a new scale beside old codes would be as wrong.
            error_msgs.extend(refused)
            return
        super()._load_from_state_dict(
            state_dict, prefix, local_metadata, strict, missing_keys, unexpected_keys, error_msgs
        )

    def _refusals(self, state_dict: dict[str, Any], prefix: str) -> Iterator[str]:
        for name in self.packed_names:
            own, given = getattr(self, name), state_dict.get(f"{prefix}{name}")
            if own is None or not isinstance(given, torch.Tensor):
                continue
            if given.dtype != own.dtype or given.shape != own.shape:
                yield (
                    f"{prefix}{name} is {given.dtype} {list(given.shape)} in the state dict, but the layer is packed "
                    f"and holds {own.dtype} {list(own.shape)}. Load float weights into a float model and quantize "
                    "that, or call dequantize() first."
                )

    def _apply(self, fn: Callable[[torch.Tensor], torch.Tensor], recurse: bool = True) -> "QuantizedLayer":
        if self._float_dtype is not None:
            # A layer without a bias has no float tensor that would show what the model was cast to.
            self._float_dtype = fn(torch.empty(0, dtype=self._float_dtype)).dtype
        super()._apply(fn, recurse)
        return self

    def extra_repr(self) -> str:
        """Shapes, bits and kernel, for `print(model)`."""
        bits = f"{8 * self.stored_bytes() / self.spec.weights:.3f} bits/weight" if self.is_packed else "empty"
        return f"{super().extra_repr()}, {self._repr_details()}{bits}, kernel={self.kernel}"

    def _repr_details(self) -> str:
        return ""


def scale_to_bits(scale: torch.Tensor) -> torch.Tensor:
    """Bit pattern of a scale: int16 for 16-bit floats, int32 for float32."""
    return scale.contiguous().view(torch.int16 if scale.element_size() == 2 else torch.int32)


def bits_to_scale(bits: torch.Tensor, dtype: torch.dtype) -> torch.Tensor:
    """Inverse of [`scale_to_bits`]."""
    return bits.view(dtype)
