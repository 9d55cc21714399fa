# SPDX-License-Identifier: Apache-2.0
"""What a layer stores, and its description in JSON."""

import dataclasses
import json

import pytest
import torch

from diffusers_ternary.format import Int8Spec, TernarySpec
from diffusers_ternary.format.spec import layer_spec_from_json


@pytest.mark.parametrize(
    ("spec", "file_shapes", "memory_shapes"),
    [
        (
            TernarySpec(7, 13, 4, "group"),
            {"weight": (19,), "weight_scale": (7, 4)},
            {"weight": (7, 4), "weight_scale": (7, 4)},
        ),
        (
            TernarySpec(7, 13, 4, "double"),
            {"weight": (19,), "weight_scale": (7, 1), "weight_multiplier": (7, 4)},
            {"weight": (7, 4), "weight_scale": (7, 1), "weight_multiplier": (7, 4)},
        ),
        (
            TernarySpec(1, 1, 1),
            {"weight": (1,), "weight_scale": (1, 1)},
            {"weight": (1, 1), "weight_scale": (1, 1)},
        ),
        (Int8Spec(7, 13), {"weight": (7, 13), "weight_scale": (7, 1)}, {"weight": (7, 13), "weight_scale": (7, 1)}),
    ],
)
def test_shapes(spec, file_shapes, memory_shapes):
    assert {name: tensor.shape for name, tensor in spec.file_tensors().items()} == file_shapes
    assert {name: tensor.shape for name, tensor in spec.memory_tensors().items()} == memory_shapes
    assert spec.weights == spec.out_features * spec.in_features


def test_dtypes():
    spec = TernarySpec(8, 256, 128, "double")
    assert spec.file_tensors()["weight"].dtypes == (torch.uint8,)
    # int8, not uint8: T5 casts its activations to weight.dtype unless that is int8.
    assert spec.memory_tensors()["weight"].dtypes == (torch.int8,)
    assert spec.file_tensors()["weight_multiplier"].dtypes == (torch.uint8,)
    assert torch.bfloat16 in spec.file_tensors()["weight_scale"].dtypes


@pytest.mark.parametrize("spec", [TernarySpec(7, 13, 4, "double"), TernarySpec(3, 5, 5), Int8Spec(2, 9)])
def test_json_round_trip(spec):
    assert layer_spec_from_json(json.loads(json.dumps(spec.to_json()))) == spec


def test_specs_cannot_be_changed():
    with pytest.raises(dataclasses.FrozenInstanceError):
        TernarySpec(7, 13, 4).group_size = 5


GOOD = {"kind": "ternary", "shape": [7, 13], "group_size": 4, "scales": "group"}


@pytest.mark.parametrize(
    ("data", "message"),
    [
        (None, "must be an object"),
        ([1], "must be an object"),
        ({**GOOD, "kind": "quaternary"}, "kind='quaternary' is not one of ternary, int8"),
        ({**GOOD, "shape": [7]}, r"shape=\[7\] is not"),
        ({**GOOD, "shape": "7x13"}, "shape='7x13' is not"),
        ({**GOOD, "shape": [7, 0]}, "in_features=0 is not a positive integer"),
        ({**GOOD, "shape": [7.0, 13]}, "out_features=7.0 is not a positive integer"),
        ({**GOOD, "shape": [True, 13]}, "out_features=True is not a positive integer"),
        ({**GOOD, "group_size": 14}, "group_size=14 is larger than in_features=13"),
        ({**GOOD, "group_size": 0}, "group_size=0 is not a positive integer"),
        ({**GOOD, "group_size": None}, "group_size=None is not a positive integer"),
        ({**GOOD, "scales": "triple"}, "scales='triple' is not one of group, double"),
        ({**GOOD, "rotation": 128}, "fields of a ternary layer are wrong.*rotation"),
        ({"kind": "ternary", "shape": [7, 13]}, "fields of a ternary layer are wrong.*group_size"),
        ({"kind": "int8", "shape": [7, 13], "group_size": 4}, "fields of a int8 layer are wrong.*group_size"),
    ],
)
def test_descriptions_that_make_no_sense_are_refused(data, message):
    with pytest.raises(ValueError, match=message):
        layer_spec_from_json(data)
