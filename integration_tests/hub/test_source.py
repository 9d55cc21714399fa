# SPDX-License-Identifier: Apache-2.0
"""What may be pushed: complete, undamaged, packed; and always with the same bytes."""

import json
import shutil

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import save_file

import diffusers_ternary
from diffusers_ternary.hub.source import read_source, sort_metadata, stage
from diffusers_ternary.hub.upload import stale_files
from integration_tests.support import denoisers
from integration_tests.support.checkpoints import edit_json, flip_bit


LAYER = "transformer_blocks.0.attn.to_q"


@pytest.fixture(scope="module")
def packed(tmp_path_factory):
    """A pipeline's folder with a packed denoiser in shards."""
    root = tmp_path_factory.mktemp("packed")
    torch.manual_seed(0)
    diffusers_ternary.quantize(denoisers.flux()).save_pretrained(root / "transformer", max_shard_size="300KB")
    (root / "scheduler").mkdir()
    (root / "scheduler" / "scheduler_config.json").write_text("{}")
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "FlowMatchEulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": [None, None],
    }
    (root / "model_index.json").write_text(json.dumps(index))
    return root


@pytest.fixture
def folder(packed, tmp_path):
    return shutil.copytree(packed, tmp_path / "folder")


def test_a_pipeline(packed):
    source = read_source(packed)
    assert (source.class_name, source.library, source.is_pipeline) == ("FluxPipeline", "diffusers", True)
    assert [part.name for part in source.components] == ["transformer"]
    assert {name: part.class_name for name, part in source.packed.items()} == {"transformer": "FluxTransformer2DModel"}
    assert 1.6 < source.bits_per_weight < 2
    assert set(source.files) == {path.relative_to(packed).as_posix() for path in packed.rglob("*") if path.is_file()}


def test_the_hash_is_of_the_weights_not_of_the_files(packed, tmp_path):
    model = denoisers.flux().from_pretrained(packed / "transformer")
    model.save_pretrained(tmp_path / "one_file")
    other = read_source(tmp_path / "one_file")
    source = read_source(packed / "transformer")
    assert source.weights_sha256 == other.weights_sha256
    torch.manual_seed(1)
    diffusers_ternary.quantize(denoisers.flux()).save_pretrained(tmp_path / "other")
    assert read_source(tmp_path / "other").weights_sha256 != source.weights_sha256


def test_what_is_not_sent(folder):
    for name in (".git/config", ".cache/x", "__pycache__/x.pyc", "bf16/config.json", "README.md"):
        path = folder / name
        path.parent.mkdir(exist_ok=True)
        path.write_text("x")
    (folder / "LICENSE.md").write_text("x")
    source = read_source(folder)
    assert "LICENSE.md" in source.files
    assert not [name for name in source.files if name.startswith((".", "__", "bf16", "README"))]
    assert source.card == folder / "README.md"


def test_a_dense_copy_in_the_folder_is_no_component(folder):
    (folder / "transformer" / "bf16").mkdir()
    save_file({"w": torch.zeros(3)}, folder / "transformer" / "bf16" / "model.safetensors")
    assert len(read_source(folder).components) == 1


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (lambda root: shutil.rmtree(root / "scheduler"), "scheduler is missing or empty"),
        (lambda root: next((root / "transformer").glob("*-00002-*")).unlink(), "which is not there"),
        (lambda root: [path.unlink() for path in (root / "transformer").glob("*.safetensors*")], "no weights"),
        (lambda root: flip_bit(next(iter((root / "transformer").glob("*-00001-*"))), first_tensor(root)), "checksum"),
        (
            lambda root: edit_json(root / "transformer" / "config.json", quantization_config=None),
            "has no quantization_config",
        ),
        (lambda root: (root / "model_index.json").write_text("[]"), "does not hold a JSON object"),
        (lambda root: (root / "model_index.json").write_text("{"), "not valid JSON"),
        (lambda root: (root / "model_index.json").unlink(), "neither model_index.json"),
        (lambda root: truncate(next((root / "transformer").glob("*-00001-*"))), "cannot be read as safetensors"),
    ],
    ids=["component", "shard", "weights", "bit", "config", "list", "json", "index", "truncated"],
)
def test_what_is_incomplete_or_damaged_is_refused(folder, damage, message):
    damage(folder)
    with pytest.raises(ValueError, match=message):
        read_source(folder)


def first_tensor(root) -> str:
    with safe_open(next((root / "transformer").glob("*-00001-*")), framework="pt") as handle:
        return next(name for name in handle.keys() if name.endswith(".weight"))  # noqa: SIM118


def truncate(file) -> None:
    data = file.read_bytes()
    file.write_bytes(data[: len(data) // 2])


def test_float_models_are_refused(tmp_path):
    denoisers.flux().save_pretrained(tmp_path)
    with pytest.raises(ValueError, match="no packed weights"):
        read_source(tmp_path)
    edit_json(tmp_path / "config.json", quantization_config={"quant_method": "diffusers_ternary"})
    with pytest.raises(ValueError, match="are not packed"):
        read_source(tmp_path)
    with pytest.raises(FileNotFoundError, match="is not a folder"):
        read_source(tmp_path / "nowhere")


# --- models in memory -------------------------------------------------------------------------------------------


def test_a_model_in_memory_is_saved_with_the_same_bytes_each_time(tmp_path):
    """safetensors orders the metadata at random; an interrupted push relies on equal files."""
    torch.manual_seed(0)
    model = diffusers_ternary.quantize(denoisers.flux())
    contents = {
        (stage(model, tmp_path / str(attempt)) / "diffusion_pytorch_model.safetensors").read_bytes()
        for attempt in range(8)
    }
    assert len(contents) == 1
    loaded = type(model).from_pretrained(tmp_path / "0")
    assert all(torch.equal(a, b) for a, b in zip(model.parameters(), loaded.parameters(), strict=True))


def test_sorting_the_metadata_changes_nothing_else(tmp_path):
    file = tmp_path / "x.safetensors"
    metadata = {"zulu": 'quotes " and \\ and ü', "alpha": "1", "mike": "{}"}
    save_file({"w": torch.arange(7.0)}, file, metadata)
    size = file.stat().st_size
    sort_metadata(file)
    assert file.stat().st_size == size
    with safe_open(file, framework="pt") as handle:
        assert handle.metadata() == metadata
        assert torch.equal(handle.get_tensor("w"), torch.arange(7.0))
    header = file.read_bytes()[8:]
    assert header.index(b"alpha") < header.index(b"mike") < header.index(b"zulu")


def test_what_cannot_be_staged(tmp_path):
    with pytest.raises(ValueError, match="holds no packed layers"):
        stage(denoisers.flux(), tmp_path / "x")
    with pytest.raises(TypeError, match="got Linear"):
        stage(torch.nn.Linear(2, 2), tmp_path / "x")
    assert not (tmp_path / "x").exists()
    assert stage(str(tmp_path), tmp_path / "x") == tmp_path


# --- what an earlier push left ----------------------------------------------------------------------------------


def test_stale_files(tmp_path):
    new = dict.fromkeys(("README.md", "transformer/model.safetensors", "model_index.json"), tmp_path)
    present = {
        ".gitattributes": False,
        "README.md": False,
        "my_notes.md": False,
        "assets/picture.png": False,
        "adapters/lora.safetensors": False,
        "transformer/model.safetensors": False,
        "transformer/model-00001-of-00002.safetensors": True,
        "transformer/model.safetensors.index.json": True,
        "bf16/transformer/config.json": True,
        "evaluation.json": True,
        "contact_sheet.png": True,
        "ternary_pipeline.py": True,
        "transformer/model.bin": True,
        "transformer/another.safetensors": False,
        "model.safetensors": False,
        "pipeline.py": False,
    }
    assert stale_files(present, new) == sorted(name for name, stale in present.items() if stale)
