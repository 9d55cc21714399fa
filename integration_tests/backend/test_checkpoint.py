# SPDX-License-Identifier: Apache-2.0
"""Headers, checks and both directions of conversion between files and memory."""

import re

import pytest
import torch
from safetensors.torch import save_file

from diffusers_ternary.backend import check_headers, read_headers
from diffusers_ternary.backend.checkpoint import (
    PackedCheckpoint,
    check_crc,
    check_values,
    owner,
    to_memory,
)
from diffusers_ternary.backend.saving import state_dict_to_file
from diffusers_ternary.format import FileLayout, Int8Spec, TernarySpec, crc32
from diffusers_ternary.layers import Int8Linear, LayerRecord, TernaryLinear


class Model(torch.nn.Module):
    """A ternary layer of every scale layout, an int8 layer, and a float one."""

    def __init__(self) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.rowwise = TernaryLinear(TernarySpec(7, 13, 4))
        self.group = TernaryLinear(TernarySpec(7, 13, 4))
        self.int8 = Int8Linear(Int8Spec(7, 13))
        self.plain = torch.nn.Linear(13, 7)
        self.rowwise.pack(torch.randn(7, 13), scales="double")
        self.group.pack(torch.randn(7, 13) * 1e-9, scales="group")
        self.int8.pack(torch.randn(7, 13))

    def records(self) -> dict[str, LayerRecord]:
        layers = {"rowwise": self.rowwise, "group": self.group, "int8": self.int8}
        return {name: LayerRecord(layer.spec, layer.scale_dtype) for name, layer in layers.items()}


@pytest.fixture
def saved(tmp_path):
    """A model, its converted tensors and layout, split over two files."""
    model = Model()
    state = model.state_dict()
    tensors, layout = state_dict_to_file(state, model.records())
    names = sorted(tensors)
    for index, part in enumerate((names[:5], names[5:])):
        save_file({name: tensors[name] for name in part}, tmp_path / f"{index}.safetensors", layout.to_metadata())
    return model, tensors, layout, sorted(tmp_path.iterdir())


def test_dtypes_in_the_file(saved):
    _, tensors, _, _ = saved
    assert tensors["rowwise.weight"].dtype == tensors["group.weight"].dtype == torch.uint8
    assert tensors["rowwise.weight_scale"].dtype == torch.float16
    assert tensors["group.weight_scale"].dtype == torch.bfloat16  # 1e-9 is below float16's range
    assert tensors["int8.weight"].dtype == torch.int8
    assert tensors["plain.weight"].dtype == torch.float32


def test_the_state_dict_is_left_as_it_is():
    model = Model()
    state = model.state_dict()
    before = {name: tensor.clone() for name, tensor in state.items()}
    state_dict_to_file(state, model.records())
    assert state.keys() == before.keys()
    assert all(torch.equal(state[name], before[name]) for name in before)


def test_there_and_back(saved):
    model, tensors, layout, files = saved
    for name, tensor in model.state_dict().items():
        part = owner(name, layout.layers)
        if part is None:
            assert torch.equal(tensors[name], tensor)
        else:
            layer, suffix = part
            assert torch.equal(to_memory(name, suffix, tensors[name], layout.layers[layer], source="f"), tensor)
    read, stored = read_headers(files)
    assert read == layout
    assert stored.keys() == tensors.keys()
    assert {name: entry.shape for name, entry in stored.items()} == {n: tuple(t.shape) for n, t in tensors.items()}
    check_headers(read, stored, source="f")
    check_values(read, stored)
    assert PackedCheckpoint(read, stored).scale_dtypes() == {
        "rowwise": torch.float16,
        "group": torch.bfloat16,
        "int8": torch.float16,
    }


def test_every_tensor_has_a_checksum(saved):
    _, tensors, layout, _ = saved
    assert layout.checksums == {name: crc32(tensor) for name, tensor in tensors.items()}
    for name, tensor in tensors.items():
        check_crc(name, tensor, layout, source="f")
    with pytest.raises(ValueError, match=r"f: the checksum of plain\.bias does not match"):
        check_crc("plain.bias", tensors["plain.bias"] + 1, layout, source="f")


def test_files_of_others_are_skipped(saved, tmp_path):
    (tmp_path / "other.bin").write_bytes(b"no safetensors")
    save_file({"a": torch.zeros(2)}, tmp_path / "float.safetensors")
    layout, tensors = read_headers([tmp_path / "other.bin", tmp_path / "float.safetensors"])
    assert layout is None
    assert list(tensors) == ["a"]


@pytest.mark.parametrize("content", [b"", b"1234", b"\xff" * 100, (10).to_bytes(8, "little") + b"not json!!"])
def test_what_is_no_safetensors_file_is_refused(content, tmp_path):
    file = tmp_path / "x.safetensors"
    file.write_bytes(content)
    with pytest.raises(ValueError, match=r"x\.safetensors cannot be read as safetensors .*download it again"):
        read_headers([file])


def test_missing_files_are_refused(tmp_path):
    with pytest.raises(ValueError, match=r"gone\.safetensors cannot be read"):
        read_headers([tmp_path / "gone.safetensors"])


def test_owner():
    layers = {"a.b": TernarySpec(7, 13, 4, "group"), "a": Int8Spec(2, 2)}
    assert owner("a.b.weight", layers) == ("a.b", "weight")
    assert owner("a.b.weight_scale", layers) == ("a.b", "weight_scale")
    assert owner("a.b.weight_multiplier", layers) is None  # not in this layout
    assert owner("a.b.bias", layers) is None
    assert owner("a.weight", layers) == ("a", "weight")
    assert owner("weight", layers) is None


class TestWhatWasWrittenIsThere:
    """Every tensor of the table, kept ones and those of other shards too, and nothing else."""

    @pytest.mark.parametrize("name", ["plain.weight", "plain.bias", "int8.weight_scale"])
    @pytest.mark.parametrize("version", [1, 2])
    def test_missing(self, saved, name, version):
        _, tensors, layout, files = saved
        for file in files:
            file.unlink()
        left = {key: tensor for key, tensor in tensors.items() if key != name}
        layout = layout if version == 2 else FileLayout(layout.layers, layout.checksums)
        save_file(left, files[0], layout.to_metadata())
        read, stored = read_headers([files[0]])
        with pytest.raises(ValueError, match=rf"folder: the tensor {re.escape(name)}.* is missing.*download"):
            check_headers(read, stored, source="folder")

    def test_a_tied_weight_of_version_1_is_stored_once(self, tmp_path):
        shared = {"shared.weight": torch.randn(5, 3)}
        sums = {name: crc32(shared["shared.weight"]) for name in ("shared.weight", "encoder.embed_tokens.weight")}
        for checksums in (sums, {**sums, "norm.weight": sums["shared.weight"]}):
            layout = FileLayout({}, checksums)
            save_file(shared, tmp_path / "a.safetensors", layout.to_metadata())
            read, stored = read_headers([tmp_path / "a.safetensors"])
            if checksums is sums:
                check_headers(read, stored, source="folder")
            else:
                with pytest.raises(ValueError, match=r"the tensor norm\.weight is missing"):
                    check_headers(read, stored, source="folder")

    @pytest.mark.parametrize("version", [1, 2])
    def test_without_an_entry(self, saved, version):
        _, tensors, layout, files = saved
        sums = {name: value for name, value in layout.checksums.items() if name != "plain.bias"}
        for checksums, headers in ((sums, layout.headers), ({}, layout.headers), (layout.checksums, {})):
            changed = FileLayout(layout.layers, checksums, headers if version == 2 else None)
            if changed == FileLayout(layout.layers, layout.checksums):
                continue
            save_file(tensors, files[0], changed.to_metadata())
            read, stored = read_headers([files[0]])
            with pytest.raises(ValueError, match=r"0\.safetensors: the metadata has no entry for the tensor \S+"):
                check_headers(read, stored, source="folder")

    @pytest.mark.parametrize(
        ("name", "change"),
        [
            ("rowwise.weight_scale", lambda t: t.view(torch.bfloat16)),
            ("group.weight_scale", lambda t: t.view(torch.float16)),
            ("plain.weight", lambda t: t.view(torch.int32)),
            ("plain.weight", lambda t: t.view(13, 7)),
            ("plain.bias", lambda t: t.view(1, 7)),
        ],
    )
    def test_same_bytes_as_something_else(self, saved, name, change):
        _, tensors, layout, files = saved
        changed = {**tensors, name: change(tensors[name])}
        assert crc32(changed[name]) == layout.checksums[name]
        save_file(changed, files[0], layout.to_metadata())
        read, stored = read_headers([files[0]])
        with pytest.raises(ValueError, match=rf"0\.safetensors: {re.escape(name)} is .*, but was written as "):
            check_headers(read, stored, source="folder")

    def test_shards_of_two_checkpoints(self, saved, tmp_path):
        _, tensors, layout, files = saved
        other = FileLayout({**layout.layers, "int8": Int8Spec(7, 13)}, {**layout.checksums, "plain.bias": 0})
        names = sorted(tensors)[5:]
        for metadata in (other.to_metadata(), None):
            save_file({name: tensors[name] for name in names}, files[1], metadata)
            with pytest.raises(ValueError, match=r"1\.safetensors belongs to another checkpoint than .*0\.saf"):
                read_headers(files)

    def test_one_tensor_in_two_files(self, saved):
        _, tensors, layout, files = saved
        save_file(tensors, files[1], layout.to_metadata())
        with pytest.raises(ValueError, match=r"\S+ is in .*0\.safetensors and in .*1\.safetensors"):
            read_headers(files)

    def test_a_tensor_that_is_not_in_memory(self):
        model = Model()
        state = {**model.state_dict(), "plain.bias": torch.empty(7, device="meta")}
        with pytest.raises(ValueError, match=r"Cannot save: plain\.bias is not in memory"):
            state_dict_to_file(state, model.records())


def test_layouts_are_checked_as_a_whole(saved):
    _, _, layout, files = saved
    _, stored = read_headers(files)
    other = FileLayout({**layout.layers, "gone": Int8Spec(2, 2)}, layout.checksums)
    with pytest.raises(ValueError, match=r"folder: the tensor gone\.weight of a packed layer is missing"):
        check_headers(other, stored, source="folder")
    wrong = FileLayout({**layout.layers, "rowwise": TernarySpec(7, 14, 4, "double")}, layout.checksums)
    with pytest.raises(
        ValueError, match=r"rowwise\.weight is U8 \[19\], but a ternary layer of \[7, 14\] stores uint8"
    ):
        check_headers(wrong, stored, source="folder")


def test_saving_what_is_not_there_is_refused():
    model = Model()
    state = model.state_dict()
    del state["rowwise.weight_scale"]
    with pytest.raises(ValueError, match=r"Cannot save: rowwise\.weight_scale is missing"):
        state_dict_to_file(state, model.records())
    state = model.state_dict()
    state["int8.weight"] = torch.zeros(3, 3, dtype=torch.int8)
    with pytest.raises(
        ValueError, match=r"Cannot save: int8\.weight is \[3, 3\], but the layer was packed as \[7, 13\]"
    ):
        state_dict_to_file(state, model.records())


@pytest.mark.parametrize("name", ["blocks.0.base_layer.weight", "blocks.0.lora_A.default.weight"])
def test_adapters_are_refused(name):
    model = Model()
    with pytest.raises(ValueError, match=rf"carries adapter layers \({name}\).*save_lora_weights"):
        state_dict_to_file({**model.state_dict(), name: torch.zeros(1)}, model.records())
