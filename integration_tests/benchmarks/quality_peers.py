# SPDX-License-Identifier: Apache-2.0
"""Low-bit weights of other libraries, for the same layers: SDNQ, optimum-quanto and torchao, where they are installed.

    pip install --no-deps sdnq optimum-quanto torchao

They are benchmarks' guests, not dependencies: SDNQ is GPL, and nothing of it is used anywhere else. Each quantizes a
bfloat16 copy of the layers (so that scales take 16 bits, as on a GPU); its weights are then multiplied in float32 like
everyone's, so that only the weights differ. Bits per weight are those of all tensors that a library keeps for a layer.
"""

import dataclasses
import importlib.util
from collections.abc import Callable, Iterator, Sequence

import torch
from torch import nn


@dataclasses.dataclass(frozen=True)
class Peer:
    """A library at one setting.

    Args:
        package (`str`): what has to be importable.
        convert (`Callable[[nn.Module], None]`): quantizes all linear layers of a module in place.
    """

    package: str
    convert: Callable[[nn.Module], None]

    @property
    def installed(self) -> bool:
        """Whether it can run here."""
        try:
            return importlib.util.find_spec(self.package) is not None
        except ModuleNotFoundError:  # of a parent package
            return False


def apply_peer(peer: Peer, denoiser: nn.Module, layers: Sequence[str]) -> float:
    """Gives linear layers the weights that a peer makes of them.

    Returns:
        `float`: stored bits per weight of these layers.
    """
    stored = weights = 0
    for name in layers:
        linear = denoiser.get_submodule(name)
        assert isinstance(linear, nn.Linear)
        holder = nn.Sequential(nn.Linear(linear.in_features, linear.out_features, bias=False, dtype=torch.bfloat16))
        holder[0].weight.data.copy_(linear.weight.data)
        holder.eval().requires_grad_(False)
        peer.convert(holder)
        if type(holder[0]) is nn.Linear and type(holder[0].weight.data) is torch.Tensor:
            raise RuntimeError(f"{peer.package} left {name} as it was.")
        with torch.no_grad():
            # The product with the identity reads the weight out of any kind of layer.
            dense = holder(torch.eye(linear.in_features, dtype=torch.bfloat16)).T
            linear.weight.copy_(dense.float())
        stored += sum(tensor.numel() * tensor.element_size() for tensor in _tensors(holder))
        weights += linear.weight.numel()
    return 8 * stored / weights


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

    return Peer("sdnq", convert)


def _quanto(dtype: str) -> Peer:
    def convert(module: nn.Module) -> None:
        from optimum import quanto

        quanto.quantize(module, weights=getattr(quanto, dtype))
        quanto.freeze(module)

    return Peer("optimum.quanto", convert)


def _torchao(bits: int, group_size: int) -> Peer:
    def convert(module: nn.Module) -> None:
        from torchao.quantization import IntxWeightOnlyConfig, quantize_
        from torchao.quantization.granularity import PerGroup

        quantize_(
            module, IntxWeightOnlyConfig(weight_dtype=getattr(torch, f"int{bits}"), granularity=PerGroup(group_size))
        )

    return Peer("torchao", convert)


PEERS = {
    "SDNQ int2": _sdnq("int2"),
    "SDNQ int2 + SVD 8": _sdnq("int2", rank=8),
    "SDNQ uint2": _sdnq("uint2"),
    "SDNQ uint2 + SVD 8": _sdnq("uint2", rank=8),
    "SDNQ uint3": _sdnq("uint3"),
    "SDNQ uint3 + SVD 8": _sdnq("uint3", rank=8),
    "quanto qint2": _quanto("qint2"),
    "torchao int2, a byte per code": _torchao(2, 64),
}
