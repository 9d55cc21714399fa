# SPDX-License-Identifier: Apache-2.0
"""Low-bit weights of other libraries, for the same layers: SDNQ, optimum-quanto, torchao, OrbitQuant and GGUF.

    pip install --no-deps sdnq optimum-quanto torchao orbitquant gguf ctransformers

They are benchmarks' guests, not dependencies: SDNQ is GPL, and nothing of it is used anywhere else. `gguf` has no
quantizer of the K types; those are ggml's own, from the library that ctransformers carries (which is not imported).

Each quantizes bfloat16 weights (so that scales take 16 bits, as on a GPU); what it makes of them is then multiplied
like everyone's, so that only the weights differ. Bits per weight are those of all tensors that a library keeps for a
layer. OrbitQuant's rotation belongs to its weights here, and activations are not rounded.
"""

import ctypes
import dataclasses
import functools
import importlib.util
import os
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import numpy as np
import torch
from torch import nn


os.environ.setdefault("ORBITQUANT_KERNELS_AUTOFETCH", "0")  # it would download kernels
os.environ.setdefault("SDNQ_USE_TORCH_COMPILE", "0")  # minutes for products that are made once


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library at one setting.

    Args:
        packages (`tuple[str, ...]`): what has to be importable.
        apply (`Callable[[nn.Module, Sequence[str]], float]`): gives linear layers of a denoiser the weights that the
            library makes of them, and returns the stored bits per weight of these layers.
    """

    packages: tuple[str, ...]
    apply: Callable[[nn.Module, Sequence[str]], float]

    @property
    def missing(self) -> list[str]:
        """What it would take to run here."""
        return [name for name in self.packages if not _installed(name)]


def _installed(package: str) -> bool:
    try:
        return importlib.util.find_spec(package) is not None
    except ModuleNotFoundError:  # of a parent package
        return False


def _layer_by_layer(quantize: Callable[[torch.Tensor], tuple[torch.Tensor, int]]) -> Callable[..., float]:
    """`apply` of a peer that makes of a bfloat16 weight [N, K] a dense one and the bytes that it stores."""

    def apply(denoiser: nn.Module, layers: Sequence[str]) -> float:
        stored = weights = 0
        for name in layers:
            linear = denoiser.get_submodule(name)
            assert isinstance(linear, nn.Linear)
            dense, size = quantize(linear.weight.detach().bfloat16())
            with torch.no_grad():
                linear.weight.copy_(dense)
            stored += size
            weights += linear.weight.numel()
        return 8 * stored / weights

    return apply


def _module_peer(package: str, convert: Callable[[nn.Module], None]) -> Peer:
    """A peer that quantizes all linear layers of a module in place."""

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        holder = nn.Sequential(nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16))
        holder[0].weight.data.copy_(weight)
        holder.eval().requires_grad_(False)
        convert(holder)
        if type(holder[0]) is nn.Linear and type(holder[0].weight.data) is torch.Tensor:
            raise RuntimeError(f"{package} left a layer of {list(weight.shape)} as it was.")
        with torch.no_grad():
            # The product with the identity reads the weight out of any kind of layer.
            dense = holder(torch.eye(weight.shape[1], dtype=torch.bfloat16)).T
        return dense, _bytes(holder)

    return Peer((package,), _layer_by_layer(quantize))


def _bytes(module: nn.Module) -> int:
    return sum(tensor.numel() * tensor.element_size() for tensor in _tensors(module))


def _tensors(module: nn.Module) -> Iterator[torch.Tensor]:
    for tensor in (*module.parameters(), *module.buffers()):
        yield from _plain(tensor)


def _plain(tensor: torch.Tensor) -> Iterator[torch.Tensor]:
    """The tensors that a tensor subclass is made of."""
    if hasattr(tensor, "__tensor_flatten__"):
        for name in tensor.__tensor_flatten__()[0]:
            yield from _plain(getattr(tensor, name))
    elif tensor.numel() > 1:  # quanto holds two unused scalars for activations
        yield tensor


def _sdnq(dtype: str, *, rank: int = 0) -> Peer:
    def convert(module: nn.Module) -> None:
        from sdnq.quantizer import sdnq_post_load_quant

        sdnq_post_load_quant(
            module,
            weights_dtype=dtype,
            group_size=64,
            use_svd=rank > 0,
            svd_rank=rank or 32,
            dequantize_fp32=False,
            add_skip_keys=False,
            minimum_allowed_numel=0,
            minimum_allowed_channel_size=0,
            torch_dtype=torch.bfloat16,
        )

    return _module_peer("sdnq", convert)


def _quanto(dtype: str) -> Peer:
    def convert(module: nn.Module) -> None:
        from optimum import quanto

        quanto.quantize(module, weights=getattr(quanto, dtype))
        quanto.freeze(module)

    return _module_peer("optimum.quanto", convert)


def _torchao(bits: int, group_size: int) -> Peer:
    def convert(module: nn.Module) -> None:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        quantize_(
            module, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))
        )

    return _module_peer("torchao", convert)


def _orbitquant(bits: int) -> Peer:
    """Every layer at the same number of bits."""

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        from orbitquant import OrbitQuantConfig, OrbitQuantLinear
        from orbitquant.modeling import dequantize_quantized_linear_modules

        linear = nn.Linear(weight.shape[1], weight.shape[0], bias=False, dtype=torch.bfloat16)
        linear.weight.data.copy_(weight)
        config = OrbitQuantConfig(weight_bits=bits, runtime_mode="dequant_bf16")
        holder = nn.Sequential(OrbitQuantLinear.from_linear(linear, config=config, module_name="0"))
        size = _stored_by_orbitquant(holder[0])
        return dequantize_quantized_linear_modules(holder)[0].weight, size

    return Peer(("orbitquant",), _layer_by_layer(quantize))


def _orbitquant_policy(bits: int) -> Peer:
    """The whole model as OrbitQuant's own policy has it: some layers at 4 bits, some in bfloat16."""

    def apply(denoiser: nn.Module, layers: Sequence[str]) -> float:
        from orbitquant import OrbitQuantConfig
        from orbitquant.modeling import dequantize_quantized_linear_modules, quantize_linear_modules

        dtype = next(denoiser.parameters()).dtype
        quantize_linear_modules(denoiser, OrbitQuantConfig(weight_bits=bits, runtime_mode="dequant_bf16"))
        stored = sum(_stored_by_orbitquant(denoiser.get_submodule(name)) for name in layers)
        dequantize_quantized_linear_modules(denoiser).to(dtype)
        return 8 * stored / sum(denoiser.get_submodule(name).weight.numel() for name in layers)

    return Peer(("orbitquant",), apply)


def _stored_by_orbitquant(layer: nn.Module) -> int:
    """Bytes of what it saves of a layer beside the bias; rotation and code book follow from the configuration."""
    return sum(t.numel() * t.element_size() for name, t in layer.state_dict().items() if name != "bias")


def _gguf_q4_0() -> Peer:
    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        import gguf

        packed = gguf.quants.quantize(weight.float().numpy(), gguf.GGMLQuantizationType.Q4_0)
        return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType.Q4_0)), packed.nbytes

    return Peer(("gguf",), _layer_by_layer(quantize))


def _gguf_k(kind: str, block_bytes: int) -> Peer:
    """A K type: blocks of 256 weights, quantized by ggml, read by gguf."""

    def quantize(weight: torch.Tensor) -> tuple[torch.Tensor, int]:
        import gguf

        rows, columns = weight.shape
        if columns % 256:
            raise ValueError(f"{kind} has blocks of 256 columns; a layer has {columns}.")
        values = np.ascontiguousarray(weight.float().numpy())
        packed = np.zeros((rows, columns // 256 * block_bytes), dtype=np.uint8)
        source, target = (array.ctypes.data_as(ctypes.c_void_p) for array in (values, packed))
        function = getattr(_ggml(), f"quantize_row_{kind.lower().replace('_k', '_K')}_reference")
        function(source, target, ctypes.c_int(values.size))  # rows are whole blocks, so all of them are one long row
        return torch.from_numpy(gguf.quants.dequantize(packed, gguf.GGMLQuantizationType[kind])), packed.nbytes

    return Peer(("gguf", "ctransformers"), _layer_by_layer(quantize))


class _InitParams(ctypes.Structure):
    """`struct ggml_init_params`."""

    _fields_ = (("mem_size", ctypes.c_size_t), ("mem_buffer", ctypes.c_void_p), ("no_alloc", ctypes.c_bool))


@functools.cache
def _ggml() -> ctypes.CDLL:
    spec = importlib.util.find_spec("ctransformers")
    assert spec is not None
    assert spec.submodule_search_locations
    library = ctypes.CDLL(str(Path(spec.submodule_search_locations[0], "lib", "basic", "libctransformers.so")))
    library.ggml_init.restype = ctypes.c_void_p
    library.ggml_init.argtypes, library.ggml_free.argtypes = [_InitParams], [ctypes.c_void_p]
    library.ggml_free(library.ggml_init(_InitParams(1024, None, False)))  # fills the table of float16 values
    return library


PEERS = {
    "SDNQ int2": _sdnq("int2"),
    "SDNQ int2 + SVD 8": _sdnq("int2", rank=8),
    "SDNQ uint2": _sdnq("uint2"),
    "SDNQ uint2 + SVD 8": _sdnq("uint2", rank=8),
    "SDNQ uint3": _sdnq("uint3"),
    "SDNQ uint3 + SVD 8": _sdnq("uint3", rank=8),
    "quanto qint2": _quanto("qint2"),
    "quanto qint4": _quanto("qint4"),
    "torchao int2, a byte per code": _torchao(2, 64),
    "torchao int4, a byte per code": _torchao(4, 64),
    "OrbitQuant W2": _orbitquant(2),
    "OrbitQuant W3": _orbitquant(3),
    "OrbitQuant W4": _orbitquant(4),
    "OrbitQuant W2, its policy": _orbitquant_policy(2),
    "OrbitQuant W3, its policy": _orbitquant_policy(3),
    "OrbitQuant W4, its policy": _orbitquant_policy(4),
    "GGUF Q2_K": _gguf_k("Q2_K", 84),
    "GGUF Q3_K": _gguf_k("Q3_K", 110),
    "GGUF Q4_0": _gguf_q4_0(),
}
PACKAGES = ("sdnq", "optimum-quanto", "torchao", "orbitquant", "gguf", "ctransformers")
