# SPDX-License-Identifier: Apache-2.0
"""Work folders: what was damaged or exchanged since a run wrote it never ends in other weights."""

import dataclasses
import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import nn

from diffusers_ternary.calibration import LayerReport
from diffusers_ternary.calibration.solver import SolvedLayer
from diffusers_ternary.calibration.store import LayerStore
from diffusers_ternary.distillation.checkpoint import latest_checkpoint, load_checkpoint, save_checkpoint
from diffusers_ternary.distillation.shards import find_fault, write_tensors
from diffusers_ternary.files.seals import is_sealed, read_sealed, seal, write_sealed
from diffusers_ternary.ternarize import ternarize


RECORD = {"of": "a", "numbers": [1, 0.1, float("nan"), None], "inner": {"x": "ü"}}
TENSORS = {"w": torch.arange(6, dtype=torch.bfloat16).view(2, 3), "n": torch.tensor(3), "e": torch.empty(0)}


def test_seals_survive_json():
    sealed = json.loads(json.dumps(seal(RECORD, TENSORS)))
    assert is_sealed(sealed, {name: tensor.clone() for name, tensor in TENSORS.items()})
    assert is_sealed(seal({}))
    assert not is_sealed({})


@pytest.mark.parametrize(
    "changes",
    [
        {"of": "b"},
        {"numbers": [1, 0.1, None, None]},
        {"inner": {}},
        {"more": 1},
        {"sha256": "0" * 64},
        {"sha256": None},
    ],
)
def test_changed_records_are_noticed(changes):
    assert not is_sealed({**seal(RECORD, TENSORS), **changes}, TENSORS)


@pytest.mark.parametrize(
    "changed",
    [
        {**TENSORS, "w": TENSORS["w"] + 1},
        {**TENSORS, "w": TENSORS["w"].view(torch.float16)},
        {**TENSORS, "w": TENSORS["w"].view(3, 2)},
        {"v": TENSORS["w"], "n": TENSORS["n"], "e": TENSORS["e"]},
        {"w": TENSORS["w"]},
        {**TENSORS, "more": torch.ones(1)},
    ],
)
def test_changed_tensors_are_noticed(changed):
    assert not is_sealed(seal(RECORD, TENSORS), changed)


def test_sealed_files(tmp_path):
    file = tmp_path / "file.safetensors"
    record = {"of": "a", "numbers": [1, 0.1, None]}
    write_sealed(file, record, TENSORS, metadata_key="key")
    found, tensors = read_sealed(file, metadata_key="key")
    assert {name: found[name] for name in record} == record
    assert tensors.keys() == TENSORS.keys()
    assert all(torch.equal(tensors[name], tensor) for name, tensor in TENSORS.items())
    with pytest.raises(ValueError, match=r"file\.safetensors cannot be read"):
        read_sealed(file, metadata_key="other")
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    save_file({**tensors, "n": torch.tensor(4)}, file, metadata)
    with pytest.raises(ValueError, match=r"file\.safetensors is not as it was written"):
        read_sealed(file, metadata_key="key")
    file.write_bytes(b"x" * 100)
    with pytest.raises(ValueError, match=r"file\.safetensors cannot be read"):
        read_sealed(file, metadata_key="key")


# --- calibrate ------------------------------------------------------------------------------------------------------


def finished(seed: int) -> SolvedLayer:
    weight = ternarize(torch.randn(4, 8, generator=torch.Generator().manual_seed(seed)), group_size=8)
    report = LayerReport("layer", (4, 8), 8, "group", 3.6, 0.3, 0.2, 0.1, 0.01, tokens=5, seconds=1.0, resumed=False)
    return SolvedLayer(weight, torch.full((4,), float(seed)), report)


@pytest.fixture
def layers(tmp_path):
    store = LayerStore(tmp_path, "fingerprint")
    for seed, name in enumerate(("first", "second")):
        store.save(name, finished(seed))
    return store


def test_layers_come_back(layers):
    for seed, name in enumerate(("first", "second")):
        loaded = layers.load(name)
        assert loaded.report == dataclasses.replace(finished(seed).report, resumed=True)
        assert torch.equal(loaded.weight.dequantize(torch.float32), finished(seed).weight.dequantize(torch.float32))
        assert torch.equal(loaded.bias_change, finished(seed).bias_change)


def test_layer_files_that_change_places(layers, tmp_path, caplog):
    """Same shapes, same fingerprint: only the name in the record tells."""
    (tmp_path / "first.safetensors").rename(tmp_path / "x")
    (tmp_path / "second.safetensors").rename(tmp_path / "first.safetensors")
    (tmp_path / "x").rename(tmp_path / "second.safetensors")
    assert layers.load("first") is layers.load("second") is None
    assert "first.safetensors is of the layer second; the layer is calibrated again" in caplog.text


def test_damaged_layer_files(layers, tmp_path, caplog):
    file = tmp_path / "first.safetensors"
    tensors = load_file(file)
    with safe_open(file, framework="pt") as handle:
        metadata = handle.metadata()
    (key,) = metadata
    record = json.loads(metadata[key])
    changes = [
        ({**tensors, "bias_change": tensors["bias_change"] + 1}, record),
        ({name: tensor for name, tensor in tensors.items() if name != "bias_change"}, record),
        (tensors, {**record, "layer": "other"}),
        (tensors, {**record, "spec": {**record["spec"], "hadamard": 8}}),
        (tensors, {**record, "report": {}}),
        (tensors, {name: value for name, value in record.items() if name != "sha256"}),
        (tensors, []),
    ]
    for changed, other in changes:
        file.unlink()
        save_file(changed, file, {key: json.dumps(other)})
        caplog.clear()
        assert layers.load("first") is None
        assert "the layer is calibrated again" in caplog.text
    for content in (b"", b"x" * 100):
        file.write_bytes(content)
        assert layers.load("first") is None


def test_measurements_that_change_places(layers, tmp_path, caplog):
    layers.save_numbers("a", {"x": 1.5})
    layers.save_numbers("b", {"x": 2.5})
    assert (layers.load_numbers("a"), layers.load_numbers("b")) == ({"x": 1.5}, {"x": 2.5})
    shutil.copy(tmp_path / "a.json", tmp_path / "b.json")
    assert layers.load_numbers("b") == {}
    assert "b.json is not as it was written" in caplog.text
    content = json.loads((tmp_path / "a.json").read_text())
    (tmp_path / "a.json").write_text(json.dumps({**content, "numbers": {"x": 9.0}}))
    assert layers.load_numbers("a") == {}
    (tmp_path / "a.json").write_text("[" * 100_000)
    assert layers.load_numbers("a") == {}
    assert layers.load_numbers("never measured") == {}


# --- distill --------------------------------------------------------------------------------------------------------


def trained(seed: int) -> tuple[nn.Module, torch.optim.Optimizer]:
    torch.manual_seed(seed)
    model = nn.Linear(3, 2)
    optimizer = torch.optim.AdamW(model.parameters())
    model(torch.ones(1, 3)).sum().backward()
    optimizer.step()
    return model, optimizer


@pytest.fixture
def checkpoint(tmp_path):
    model, optimizer = trained(0)
    save_checkpoint(tmp_path, 7, model, optimizer, {"loss": 0.5, "history": [1, 2]}, main_process=True)
    return tmp_path / "step-00000007"


def test_checkpoints_come_back(checkpoint):
    found = latest_checkpoint(checkpoint.parent)
    assert (found.step, dict(found.progress)) == (7, {"loss": 0.5, "history": [1, 2]})
    model, optimizer = trained(1)
    load_checkpoint(found, model, optimizer)
    expected, _ = trained(0)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), expected.parameters(), strict=True))


def test_checkpoints_with_the_state_of_others(checkpoint, tmp_path):
    model, optimizer = trained(5)
    save_checkpoint(tmp_path / "other", 7, model, optimizer, {}, main_process=True)
    shutil.copy(tmp_path / "other" / checkpoint.name / "state.safetensors", checkpoint / "state.safetensors")
    model, optimizer = trained(1)
    before = [parameter.clone() for parameter in model.parameters()]
    with pytest.raises(ValueError, match=r"state\.safetensors is missing or not as it was written\. Delete"):
        load_checkpoint(latest_checkpoint(checkpoint.parent), model, optimizer)
    assert all(torch.equal(p, q) for p, q in zip(model.parameters(), before, strict=True))


def test_checkpoints_of_another_model(checkpoint):
    model = nn.Sequential(nn.Linear(3, 2))
    optimizer = torch.optim.AdamW(model.parameters())
    with pytest.raises(ValueError, match=r"state\.safetensors holds no 0\.bias, which is trained now\. Delete"):
        load_checkpoint(latest_checkpoint(checkpoint.parent), model, optimizer)


def test_checkpoints_under_another_name(checkpoint):
    checkpoint.rename(checkpoint.with_name("step-00000009"))
    with pytest.raises(ValueError, match=r"step-00000009 is the checkpoint of step 7 under another name\. Delete"):
        latest_checkpoint(checkpoint.parent)


@pytest.mark.parametrize("content", ['{"step": 7}', "{", "[]", "[" * 100_000, "null"])
def test_damaged_progress(checkpoint, content):
    (checkpoint / "progress.json").write_text(content)
    with pytest.raises(ValueError, match=r"progress\.json .*Delete the checkpoints"):
        latest_checkpoint(checkpoint.parent)


def test_changed_progress(checkpoint):
    record = json.loads((checkpoint / "progress.json").read_text())
    for changes in ({"progress": {"loss": 0.1}}, {"step": 8}, {"state_sha256": "0" * 64}):
        (checkpoint / "progress.json").write_text(json.dumps({**record, **changes}))
        with pytest.raises(ValueError, match=r"progress\.json is not as it was written"):
            latest_checkpoint(checkpoint.parent)


def test_shards_that_change_places_with_their_hashes(tmp_path):
    for name in ("a", "b"):
        write_tensors(tmp_path / f"{name}.safetensors", {name: torch.ones(2)})
    for ending in ("", ".sha256"):
        shutil.copy(tmp_path / f"a.safetensors{ending}", tmp_path / f"b.safetensors{ending}")
    assert find_fault(tmp_path / "a.safetensors") is None
    assert find_fault(tmp_path / "b.safetensors") == "is a.safetensors under another name"
