# SPDX-License-Identifier: Apache-2.0
"""The metadata of packed files: golden text, round trip, malformed and newer ones, checksums."""

import json
import zlib
from collections.abc import Callable
from typing import Any

import pytest
import torch

from diffusers_ternary.backend.checkpoint import read_layout
from diffusers_ternary.format import (
    FORMAT_VERSION,
    METADATA_KEY,
    FileLayout,
    Int8Spec,
    TensorHeader,
    TernarySpec,
    check_format_version,
    crc32,
)


LAYOUT = FileLayout(
    layers={"blocks.0.to_q": TernarySpec(7, 13, 4, "double"), "blocks.0.norm.linear": Int8Spec(6, 13)},
    checksums={"blocks.0.to_q.weight": 2774526541},
)
# Version 1 of the format stays readable: this text never changes.
GOLDEN = (
    '{"format_version":1,"layers":{'
    '"blocks.0.to_q":{"kind":"ternary","shape":[7,13],"group_size":4,"scales":"double"},'
    '"blocks.0.norm.linear":{"kind":"int8","shape":[6,13]}},'
    '"crc32":{"blocks.0.to_q.weight":2774526541}}'
)


LAYOUT_2 = FileLayout(
    LAYOUT.layers,
    {"blocks.0.to_q.weight": 2774526541, "norm.weight": 3},
    {"blocks.0.to_q.weight": TensorHeader("U8", (19,)), "norm.weight": TensorHeader("BF16", (13, 2))},
)
# So does this one. The last number is zlib.crc32 of the JSON of {"layers": ..., "tensors": ...} with sorted keys.
GOLDEN_2 = (
    GOLDEN.replace('"format_version":1', '"format_version":2').replace(
        ":2774526541}}", ':2774526541,"norm.weight":3},'
    )
    + '"tensors":{"blocks.0.to_q.weight":["U8",[19]],"norm.weight":["BF16",[13,2]]},"layout_crc32":1290895080}'
)


# And so does this one.
GOLDEN_3 = (
    '{"format_version":3,"layers":{"a":{"kind":"ternary","shape":[2,4],"group_size":4,"scales":"group",'
    '"column_scales":true}},"crc32":{"a.column_scale":5},"tensors":{"a.column_scale":["F16",[4]]},'
    '"layout_crc32":1751503107}'
)


def body(**changes: object) -> dict[str, str]:
    return {METADATA_KEY: json.dumps({**json.loads(GOLDEN), **changes})}


def test_golden_text():
    assert LAYOUT.to_metadata() == {"diffusers_ternary": GOLDEN}
    assert read_layout({"diffusers_ternary": GOLDEN}, source="a.safetensors") == LAYOUT


def test_golden_text_of_version_2():
    assert LAYOUT_2.to_metadata() == {"diffusers_ternary": GOLDEN_2}
    assert read_layout({"diffusers_ternary": GOLDEN_2}, source="a.safetensors") == LAYOUT_2
    assert (LAYOUT.format_version, LAYOUT_2.format_version) == (1, 2)


def test_golden_text_of_version_3():
    layer = TernarySpec(2, 4, 4, "group", column_scales=True)
    layout = FileLayout({"a": layer}, {"a.column_scale": 5}, {"a.column_scale": TensorHeader("F16", (4,))})
    assert layout.to_metadata() == {"diffusers_ternary": GOLDEN_3}
    assert read_layout({"diffusers_ternary": GOLDEN_3}, source="a.safetensors") == layout
    assert layer.file_tensors()["column_scale"].shape == (4,)
    with pytest.raises(ValueError, match=r"malformed.*version 2 has no layers like a"):
        read_layout({"diffusers_ternary": GOLDEN_3.replace(":3,", ":2,")}, source="a.safetensors")


def change(path: str, value: object) -> Callable[[dict[str, Any]], None]:
    """Sets an entry of the JSON, or deletes it (`None`)."""

    def edit(content: dict[str, Any]) -> None:
        *parents, name = path.split("/")
        for parent in parents:
            content = content[parent]
        if value is None:
            del content[name]
        else:
            content[name] = value

    return edit


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (change("layers/blocks.0.to_q/group_size", 5), "does not match its checksum"),
        (change("layers/blocks.0.to_q/scales", "group"), "does not match its checksum"),
        (change("layers/blocks.0.to_q/hadamard", 4), "does not match its checksum"),
        (change("layers/blocks.0.to_q/rank", 3), "does not match its checksum"),
        (change("layers/blocks.0.norm.linear", None), "does not match its checksum"),
        (change("layers/other", {"kind": "int8", "shape": [6, 13]}), "does not match its checksum"),
        (change("tensors/norm.weight", ["F16", [13, 2]]), "does not match its checksum"),
        (change("tensors/norm.weight", ["BF16", [2, 13]]), "does not match its checksum"),
        (change("tensors/norm.weight", None), "does not match its checksum"),
        (change("layout_crc32", 0), "does not match its checksum"),
        (change("layout_crc32", None), "malformed.*layout_crc32"),
        (change("format_version", 1), "malformed.*version 1 has the fields"),
        (change("crc32", None), "malformed.*crc32"),
        (change("crc32/norm.weight", float("inf")), "malformed.*norm.weight: inf is not a CRC-32"),
        (change("crc32/norm.weight", float("nan")), "malformed.*norm.weight: nan is not a CRC-32"),
        (change("crc32/norm.weight", 1 << 32), "malformed.*is not a CRC-32"),
        (change("crc32/norm.weight", -1), "malformed.*is not a CRC-32"),
        (change("crc32/norm.weight", True), "malformed.*is not a CRC-32"),
        (change("crc32/norm.weight", "3"), "malformed.*is not a CRC-32"),
        (change("tensors/norm.weight", [1, 2, 3]), "malformed"),
        (change("tensors/norm.weight", ["F16", [float("inf")]]), "malformed"),
        (change("tensors/norm.weight", 7), "malformed"),
        (change("tensors", []), "malformed"),
    ],
)
def test_whatever_is_changed_in_version_2_is_noticed(edit, message):
    content = json.loads(LAYOUT_2.to_metadata()[METADATA_KEY])
    edit(content)
    with pytest.raises(ValueError, match=message) as caught:
        read_layout({METADATA_KEY: json.dumps(content)}, source="shard-2.safetensors")
    assert "shard-2.safetensors" in str(caught.value)
    assert "Download the file again" in str(caught.value)


@pytest.mark.parametrize("text", ["[" * 100_000, '{"a":' * 100_000, "9" * 5000])
def test_metadata_that_no_reader_survives(text):
    with pytest.raises(ValueError, match=r"x\.safetensors.*cannot be read"):
        read_layout({METADATA_KEY: text}, source="x.safetensors")


@pytest.mark.parametrize("metadata", [None, {}, {"format": "pt"}])
def test_files_of_others_are_no_packed_files(metadata):
    assert read_layout(metadata, source="a.safetensors") is None


@pytest.mark.parametrize(
    ("metadata", "message"),
    [
        ({METADATA_KEY: "{"}, "cannot be read"),
        ({METADATA_KEY: "[]"}, "cannot be read"),
        ({METADATA_KEY: "{}"}, "cannot be read.*format_version"),
        (body(layers=[]), "malformed"),
        (body(layers={"a": {}}), "malformed"),
        (body(layers={"a": {"kind": "int8", "shape": [0, 1]}}), "malformed.*out_features=0"),
        (body(crc32={"a": "x"}), "malformed"),
        (body(crc32=3), "malformed"),
        (body(format_version="1"), "format_version='1' is not a positive integer"),
        (body(format_version=0), "format_version=0 is not a positive integer"),
        (body(format_version=True), "format_version=True is not a positive integer"),
        (body(format_version=None), "format_version=None is not a positive integer"),
    ],
)
def test_malformed_metadata_names_the_file_and_the_remedy(metadata, message):
    with pytest.raises(ValueError, match=message) as caught:
        read_layout(metadata, source="shard-2.safetensors")
    assert "shard-2.safetensors" in str(caught.value)
    assert "Download the file again" in str(caught.value)


def test_a_newer_version_is_refused_before_its_fields_are_read():
    metadata = body(format_version=FORMAT_VERSION + 1, layers="something this version cannot read")
    with pytest.raises(ValueError, match=r"x\.safetensors: format_version=4 is newer than 3.*pip install -U"):
        read_layout(metadata, source="x.safetensors")


def test_this_version_is_accepted():
    check_format_version(FORMAT_VERSION, source="config.json")


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int8, torch.uint8, torch.bool])
def test_crc32_is_zlibs_over_the_bytes(dtype):
    tensor = (10 * torch.randn(5, 7, generator=torch.Generator().manual_seed(0))).to(dtype)
    data = bytes(tensor.contiguous().view(torch.uint8).flatten().tolist())
    assert crc32(tensor) == zlib.crc32(data)
    transposed = tensor.T
    assert crc32(transposed) == crc32(transposed.contiguous())


def test_crc32_of_scalars_and_empty_tensors():
    assert crc32(torch.tensor(1.0)) == zlib.crc32(b"\x00\x00\x80\x3f")
    assert crc32(torch.empty(0)) == 0


def test_crc32_of_a_view_covers_the_view_only():
    tensor = torch.arange(10, dtype=torch.uint8)
    assert crc32(tensor[2:4]) == zlib.crc32(b"\x02\x03")
