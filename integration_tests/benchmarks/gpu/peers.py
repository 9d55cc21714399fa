# SPDX-License-Identifier: Apache-2.0
"""Low-bit linear layers of other libraries, those that are installed, behind one signature.

A peer that is installed and fails is reported with its error, never left out in silence.
"""

import importlib.util
from collections.abc import Callable, Iterator
from dataclasses import dataclass

import torch
from torch import nn


Layer = Callable[[torch.Tensor], torch.Tensor]


@dataclass(frozen=True)
class Peer:
    """A library's layer: what must be installed, and how to make one from a bfloat16 `nn.Linear`."""

    name: str
    package: str
    make: Callable[[nn.Linear], Layer]


def _torchao(config_name: str) -> Callable[[nn.Linear], Layer]:
    def make(linear: nn.Linear) -> Layer:
        import torchao.quantization as quantization

        model = nn.Sequential(linear)
        quantization.quantize_(model, getattr(quantization, config_name)())
        # torchao fuses the quantization of activations through the compiler, as its users run it.
        return torch.compile(model, dynamic=False)

    return make


def _bitsandbytes(linear: nn.Linear) -> Layer:
    import bitsandbytes

    layer = bitsandbytes.nn.Linear4bit(
        linear.in_features, linear.out_features, bias=False, compute_dtype=torch.bfloat16, quant_type="nf4"
    )
    layer.weight = bitsandbytes.nn.Params4bit(linear.weight.data.cpu(), requires_grad=False, quant_type="nf4")
    return layer.to(linear.weight.device)


def _gemlite(linear: nn.Linear) -> Layer:
    from gemlite.helper import A16W158_INT

    dense = linear.weight.data
    scale = dense.abs().amax().float()
    return A16W158_INT(device=str(dense.device)).from_weights((dense / scale).round(), scale)


def _sdnq(linear: nn.Linear) -> Layer:
    from sdnq import sdnq_post_load_quant

    return sdnq_post_load_quant(nn.Sequential(linear), weights_dtype="int8", use_quantized_matmul=True)


PEERS = (
    Peer("torchao int8 dynamic", "torchao", _torchao("Int8DynamicActivationInt8WeightConfig")),
    Peer("torchao float8 dynamic", "torchao", _torchao("Float8DynamicActivationFloat8WeightConfig")),
    Peer("bitsandbytes nf4", "bitsandbytes", _bitsandbytes),
    Peer("gemlite W1.58A16", "gemlite", _gemlite),
    Peer("SDNQ int8", "sdnq", _sdnq),
)


def installed() -> Iterator[Peer]:
    """The peers whose package is installed."""
    return (peer for peer in PEERS if importlib.util.find_spec(peer.package) is not None)
