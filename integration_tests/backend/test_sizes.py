# SPDX-License-Identifier: Apache-2.0
"""Bytes that are computed from a spec, against those of the tensors that are held and stored."""

import pytest
import torch
from torch import nn

from diffusers_ternary.backend.saving import state_dict_to_file
from diffusers_ternary.backend.sizes import bits_per_weight, file_bytes, memory_bytes
from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.layers import Int8Linear, TernaryLinear, read_records


@pytest.mark.parametrize(
    "options", [{"scales": "group"}, {"scales": "double"}, {"rank": 3, "hadamard": 8}, None], ids=str
)
def test_bytes_of_a_layer(options):
    torch.manual_seed(0)
    layer = Int8Linear(Int8Spec(24, 40), False) if options is None else TernaryLinear(TernarySpec(24, 40, 8), False)
    layer.pack(torch.randn(24, 40), **options or {})
    model = nn.ModuleDict({"layer": layer})
    state = model.state_dict()
    stored, _ = state_dict_to_file(state, read_records(state))
    assert memory_bytes(layer.spec) == sum(p.numel() * p.element_size() for p in layer.parameters())
    assert file_bytes(layer.spec) == sum(t.numel() * t.element_size() for t in stored.values())
    assert bits_per_weight({"layer": layer.spec}) == 8 * file_bytes(layer.spec) / (24 * 40)
