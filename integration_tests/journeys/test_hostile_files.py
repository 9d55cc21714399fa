# SPDX-License-Identifier: Apache-2.0
"""Files that were made to harm: refused at once with their name, and nothing outside is read or written."""

import json
import pickle
import struct
from pathlib import Path

import gguf
import numpy as np
import pytest
import torch
from diffusers import FluxTransformer2DModel
from rich.text import Text
from safetensors.torch import load_file, save_file

from diffusers_ternary import TernaryConfig, convert, quantize
from diffusers_ternary.backend.folder import explained_loading, model_class, pipeline_parts
from diffusers_ternary.backend.packed_writer import PackedFolderWriter
from diffusers_ternary.backend.sources import load_quantized
from diffusers_ternary.cli.console import escape
from diffusers_ternary.files import parse_size
from diffusers_ternary.files.destinations import forget_local_paths, is_local_path
from diffusers_ternary.hub.source import read_source
from diffusers_ternary.interop.empty_model import empty_model
from diffusers_ternary.interop.export import open_packed
from diffusers_ternary.interop.gguf_header import check_header
from diffusers_ternary.interop.inspection import inspect_path
from diffusers_ternary.interop.tensor_files import StateDictFile
from diffusers_ternary.ternarize import ternarize
from integration_tests.support import denoisers
from integration_tests.support.checkpoints import edit_json
from integration_tests.support.command_line import run_command


FILE = "diffusion_pytorch_model.safetensors"


# --- GGUF -----------------------------------------------------------------------------------------------------------


def header(*, tensors: int = 0, fields: int = 0, body: bytes = b"") -> bytes:
    return b"GGUF" + struct.pack("<IQQ", 3, tensors, fields) + body


def field(kind: int, value: bytes, *, key: bytes = b"a") -> bytes:
    return struct.pack("<Q", len(key)) + key + struct.pack("<I", kind) + value


def array(kind: int, count: int, value: bytes = b"") -> bytes:
    return struct.pack("<IQ", kind, count) + value


STRING, ARRAY, UINT8, UINT32 = 8, 9, 0, 4
NESTED = array(UINT8, 0)
for _ in range(50):
    NESTED = array(ARRAY, 1, NESTED)
BOMBS = {
    "an array of 2^62 bytes": header(fields=1, body=field(ARRAY, array(UINT8, 1 << 62))),
    "an array of 2^62 strings": header(fields=1, body=field(ARRAY, array(STRING, 1 << 62))),
    "an array of 2^62 arrays": header(fields=1, body=field(ARRAY, array(ARRAY, 1 << 62))),
    "arrays in arrays": header(fields=1, body=field(ARRAY, NESTED)),
    "arrays of empty arrays": header(fields=1, body=field(ARRAY, array(ARRAY, 1000, array(ARRAY, 1 << 40) * 10))),
    "a string of 2^62 bytes": header(fields=1, body=field(STRING, struct.pack("<Q", 1 << 62))),
    "a key of 2^62 bytes": header(fields=1, body=struct.pack("<Q", 1 << 62)),
    "2^62 fields": header(fields=1 << 62),
    "2^62 tensors": header(tensors=1 << 62),
    "a tensor of 2^62 values": header(
        tensors=1, body=struct.pack("<Q", 1) + b"t" + struct.pack("<IQQIQ", 2, 1 << 31, 1 << 31, 0, 0)
    ),
    "a tensor whose size overflows": header(
        tensors=1, body=struct.pack("<Q", 1) + b"t" + struct.pack("<IQQQIQ", 3, 1 << 32, 1 << 32, 1, 0, 0)
    ),
    "a tensor of 2^32 dimensions": header(
        tensors=1, body=struct.pack("<Q", 1) + b"t" + struct.pack("<I", 0xFFFFFFFF) + bytes(16)
    ),
    "a field of no type": header(fields=1, body=field(77, bytes(16))),
    "cut off": header(fields=1, body=b"\x01"),
    "another file": b"GGML" + bytes(100),
}


@pytest.mark.parametrize("name", BOMBS)
def test_gguf_bombs(name, tmp_path):
    file = tmp_path / "bomb.gguf"
    file.write_bytes(BOMBS[name])
    for read in (inspect_path, lambda path: convert(path, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"bomb\.gguf cannot be read as GGUF \(.*It is damaged"):
            read(file)
    assert not (tmp_path / "out").exists()


def test_a_gguf_file_whose_tensors_share_their_data(tmp_path):
    """A thousand tensors over the same bytes would be written a thousand times."""
    size = 1 << 16
    infos = b"".join(
        struct.pack("<Q", 4) + f"t{i:03d}".encode() + struct.pack("<IQIQ", 1, size // 4, 0, 0) for i in range(100)
    )
    data = header(tensors=100, body=infos)
    (tmp_path / "a.gguf").write_bytes(data + bytes(-len(data) % 32) + bytes(size))
    with pytest.raises(ValueError, match=r"a\.gguf .*its tensors are of 6553600 bytes, more than the whole file"):
        inspect_path(tmp_path / "a.gguf")


def test_gguf_headers_of_the_library_pass(tmp_path):
    writer = gguf.GGUFWriter(tmp_path / "a.gguf", "flux")
    writer.add_array("list", [[1, 2], [3]])
    writer.add_array("words", ["a", "bc"])
    writer.add_float64("number", 1.5)
    writer.add_tensor("t", np.ones((3, 32), dtype=np.float32))
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    check_header(tmp_path / "a.gguf")
    (component,) = inspect_path(tmp_path / "a.gguf")
    assert sum(row.weights for row in component.rows) == 96


# --- configs --------------------------------------------------------------------------------------------------------


@pytest.fixture(scope="module")
def float_folder(tmp_path_factory):
    """A ternary model in float."""
    folder = tmp_path_factory.mktemp("float")
    torch.manual_seed(0)
    model = denoisers.flux()
    for module in model.modules():
        if type(module) is torch.nn.Linear:
            module.weight.data = torch.randint(-1, 2, module.weight.shape).float() * 0.5
    model.save_pretrained(folder)
    return folder


def copy(folder: Path, target: Path) -> Path:
    target.mkdir()
    for file in folder.iterdir():
        (target / file.name).write_bytes(file.read_bytes())
    return target


@pytest.mark.parametrize(
    "changes",
    [{"num_layers": 10_000_000}, {"num_single_layers": 10_000_000}, {"num_layers": 1 << 80}, {"num_layers": "x"}],
)
def test_configs_of_more_layers_than_there_are_weights(float_folder, tmp_path, changes):
    folder = copy(float_folder, tmp_path / "model")
    edit_json(folder / "config.json", **changes)
    with pytest.raises(ValueError, match=r"model.*(more than \d+ parameters|cannot be loaded|can be made of)"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


def test_configs_of_tables_larger_than_the_weights():
    config = {"_class_name": "SD3Transformer2DModel", "num_layers": 1, "pos_embed_max_size": 1_000_000}
    with pytest.raises(ValueError, match=r"x: pos_embed_max_size=1000000 .* is too large for a model of 6"):
        empty_model(config, {"a": (2, 3)}, source="x")


@pytest.mark.parametrize(
    "name",
    [
        "utils",
        "__doc__",
        "__path__",
        "DiffusionPipeline",
        "DDIMScheduler",
        "",
        None,
        3,
        ["FluxTransformer2DModel"],
        {},
    ],
)
def test_classes_that_are_none(float_folder, tmp_path, name):
    for config in ({"_class_name": name}, {"architectures": [name]}, {"architectures": name}):
        with pytest.raises(ValueError, match=r"x: the installed \w+ has no class .* of models, which config"):
            model_class(config, source="x")
    folder = copy(float_folder, tmp_path / "model")
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps({**config, "_class_name": name}))
    for read in (lambda: load_quantized(str(folder), TernaryConfig()), lambda: convert(folder, tmp_path / "out")):
        with pytest.raises(ValueError, match=r"model: the installed diffusers has no class"):
            read()


# --- names and links ------------------------------------------------------------------------------------------------


def pipeline(folder: Path, name: str) -> Path:
    """A packed pipeline whose denoiser is called `name`."""
    torch.manual_seed(0)
    folder.mkdir()
    quantize(denoisers.flux(), TernaryConfig(group_size=16)).save_pretrained(folder / "transformer")
    index = {"_class_name": "FluxPipeline", name: ["diffusers", "FluxTransformer2DModel"]}
    (folder / "model_index.json").write_text(json.dumps(index))
    return folder


@pytest.mark.parametrize("name", ["../outside", "/tmp/outside", "a/b", "..", ".", "", "a/../../outside", "a\\b"])
def test_component_names_that_are_paths(name, tmp_path):
    root = pipeline(tmp_path / "packed", name)
    (tmp_path / "outside").mkdir()
    (tmp_path / "outside" / "config.json").write_text("{}")
    for read in (
        lambda: read_source(root),
        lambda: convert(root, tmp_path / "out"),
        lambda: open_packed(root),
        lambda: load_quantized(str(root), TernaryConfig()),
    ):
        with pytest.raises(ValueError, match=r"packed: model_index\.json names a component .* not a name"):
            read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["outside", "packed"]


def test_settings_of_a_pipeline_are_no_components():
    index = {
        "_class_name": ["my_pipeline", "MyPipeline"],
        "layers": [10, 20],
        "vae": [None, None],
        "unet": ["diffusers", "X"],
    }
    assert pipeline_parts(index, source="x") == {"unet": ("diffusers", "X")}


@pytest.mark.parametrize("shard", ["../secret.safetensors", "/etc/passwd", "..", None, 7, "sub/x.safetensors"])
def test_shards_of_other_folders(float_folder, tmp_path, shard):
    folder = copy(float_folder, tmp_path / "model")
    (folder / FILE).rename(tmp_path / "secret.safetensors")
    (folder / f"{FILE}.index.json").write_text(json.dumps({"weight_map": {"a": shard}}))
    for read in (lambda: convert(folder, tmp_path / "out"), lambda: read_source(folder)):
        with pytest.raises(ValueError, match=r"index\.json names .*, which is not the name of a file beside it"):
            read()


@pytest.mark.parametrize("where", ["key.pem", "transformer/key.pem", "folder"])
def test_links_are_neither_published_nor_copied(where, tmp_path):
    root = pipeline(tmp_path / "packed", "transformer")
    (tmp_path / "private").mkdir()
    (tmp_path / "private" / "id").write_text("secret")
    (root / where).symlink_to(tmp_path / "private" if where == "folder" else tmp_path / "private" / "id")
    export = lambda: convert(root, tmp_path / "out", to="mflux")  # noqa: E731
    for read in (lambda: read_source(root), lambda: convert(root, tmp_path / "out"), export):
        with pytest.raises(ValueError, match=rf"{where} is a symbolic link to .*private.*put a copy in its place"):
            read()
    assert not (tmp_path / "out").exists()


def test_links_of_a_hub_cache_are_followed(float_folder, tmp_path):
    """That is how the Hub's client keeps what it downloads; a link out of the repository is refused there too."""
    cache = tmp_path / "models--a--b"
    snapshot = cache / "snapshots" / "c0ffee"
    snapshot.mkdir(parents=True)
    copy(float_folder, cache / "blobs")
    for file in (cache / "blobs").iterdir():
        (snapshot / file.name).symlink_to(Path("../../blobs") / file.name)
    (report,) = convert(snapshot, tmp_path / "out")
    assert report.layers
    assert not any(path.is_symlink() for path in (tmp_path / "out").rglob("*"))
    (snapshot / "more").symlink_to(tmp_path)
    with pytest.raises(ValueError, match="more is a symbolic link"):
        convert(snapshot, tmp_path / "again")


# --- values ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("name", ["x_embedder.bias", "transformer_blocks.0.attn.to_q.weight"])
def test_convert_refuses_what_is_not_finite(float_folder, tmp_path, bad, name):
    folder = copy(float_folder, tmp_path / "model")
    tensors = load_file(folder / FILE)
    tensors[name].view(-1)[3] = bad
    (folder / FILE).unlink()
    save_file(tensors, folder / FILE)
    with pytest.raises(ValueError, match=rf"model: {name} holds NaN or Inf"):
        convert(folder, tmp_path / "out")
    assert not (tmp_path / "out").exists()


class Attack:
    """What a pickle of this does is up to who made it."""

    def __reduce__(self):
        return (open, ("attacked", "w"))


def shared_dicts() -> dict:
    """2^40 values by their names, in a few hundred bytes."""
    content: dict = {"a": torch.ones(1)}
    for _ in range(40):
        content = {"a": content, "b": content}
    return content


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (Attack(), "cannot be read as a state dict"),
        ([1, 2], "holds a list"),
        (shared_dicts(), "dicts nested without end"),
        ({"x.W_q": torch.ones(1).expand(1 << 40)}, r"x\.W_q is \[1099511627776\], more than its 4 bytes"),
    ],
    ids=["attack", "list", "shared", "expanded"],
)
def test_state_dicts_that_were_made_to_harm(content, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    torch.save(content, tmp_path / "qmodel.pt", pickle_protocol=2)
    with pytest.raises(ValueError, match=rf"qmodel\.pt.* {message}"):
        StateDictFile(tmp_path / "qmodel.pt")
    with pytest.raises(ValueError, match=r"qmodel\.pt"):
        inspect_path(tmp_path)
    assert not (tmp_path / "attacked").exists()


def test_pickled_weights_that_attack(float_folder, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    folder = copy(float_folder, tmp_path / "model")
    (folder / FILE).unlink()
    (folder / "diffusion_pytorch_model.bin").write_bytes(pickle.dumps({"x": Attack()}))
    result = run_command("quantize", folder, tmp_path / "out")
    assert result.exit_code == 3, result.output
    assert sorted(path.name for path in tmp_path.iterdir()) == ["model"]


@pytest.mark.parametrize("levels", [0, -1, 1, 3, 1 << 40])
def test_gemlite_metadata(levels, tmp_path):
    metadata = [0, 2, 32, 0, levels, 0, 0, 0, 0, 0, 3]
    content = {
        "x.W_q": torch.zeros(4, 8, dtype=torch.uint8),
        "x.scales": torch.ones(1, 8),
        "x.zeros": torch.ones(1, 8),
        "x.metadata": torch.tensor(metadata),
        "x.orig_shape": torch.tensor([8, 16]),
    }
    (tmp_path / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    from diffusers_ternary.interop.open_foreign import open_foreign

    torch.save(content, tmp_path / "qmodel.pt")
    with pytest.raises(ValueError, match=rf"{tmp_path.name}: x: gemlite metadata .* says {levels} levels per integer"):
        list(open_foreign(tmp_path).items())


# --- the command line ---------------------------------------------------------------------------------------------


@pytest.mark.parametrize("size", ["1e400GB", "-1GB", "0", "GB", "", "inf", "nan", "9" * 400, "1XB", "1 000 000TBTB"])
def test_sizes_that_are_none(size, tmp_path):
    with pytest.raises(ValueError, match=r"--max-shard-size=.* is not a positive size such as '400MB'"):
        parse_size(size, name="--max-shard-size")
    result = run_command("quantize", tmp_path, tmp_path / "out", f"--max-shard-size={size}")
    assert result.exit_code == 2
    assert "is not a positive size such as '400MB' or '6GiB'" in " ".join(result.output.split())


@pytest.mark.parametrize(
    ("size", "expected"),
    [("10GB", 10**10), ("1.5 GiB", 3 << 29), ("500", 500), (7, 7), ("2kb", 2000), ("3MiB", 3 << 20)],
)
def test_sizes(size, expected):
    assert parse_size(size, name="x") == expected


@pytest.mark.parametrize(
    "text", ["a\\[b", "[int8]", "[3, 4]", "C:\\[a]\\", "\\", "[/]", "[bold]x[/bold]", "a\\\\[red]b\\"]
)
def test_messages_show_what_they_say(text):
    assert Text.from_markup(f"[bold]error:[/] {escape(text)}").plain == f"error: {text}"


def test_a_path_that_looks_like_markup(tmp_path):
    for name in ("a\\[b", "[red]x", "x[/]"):
        result = run_command("inspect", name)
        assert result.exit_code == 3, (name, result.output)
        assert f"{name} does not exist" in " ".join(result.output.split())


def test_local_paths_are_forgotten(float_folder, tmp_path):
    result = run_command("quantize", float_folder, tmp_path / "out")
    assert result.exit_code == 0, result.output
    text = (tmp_path / "out" / "config.json").read_text()
    assert str(float_folder.parent) not in text
    assert "_name_or_path" not in text
    FluxTransformer2DModel.from_pretrained(tmp_path / "out")
    assert all(path.stat().st_mode & 0o444 == 0o444 for path in (tmp_path / "out").iterdir())


def test_ids_of_the_hub_are_kept(tmp_path):
    paths = ["/home/me/x", "./x", "~/x", "..", "a/b/c", "C:\\x", str(tmp_path)]
    assert all(is_local_path(path) for path in paths)
    assert not any(is_local_path(value) for value in ("owner/name", "name", "", None, 3))
    content = {"_name_or_path": "owner/name", "inner": {"_name_or_path": "/home/me/x", "size": 3}}
    (tmp_path / "config.json").write_text(json.dumps(content))
    forget_local_paths(tmp_path)
    read = json.loads((tmp_path / "config.json").read_text())
    assert read == {"_name_or_path": "owner/name", "inner": {"size": 3}}


# --- writing --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "options",
    [
        {"scales": "double"},
        {"rank": 2},
        {"hadamard": 8, "rank": 3, "scales": "double"},
        {"scales": "group"},
    ],
)
def test_the_writer_stores_all_of_a_weight(options, tmp_path):
    torch.manual_seed(0)
    weight = ternarize(torch.randn(6, 16), group_size=8, **options)
    writer = PackedFolderWriter(tmp_path, weights_name="diffusion_pytorch_model", max_shard_size=100)
    writer.add_layer("layer", weight)
    writer.finish({"_class_name": "X"}, TernaryConfig())
    packed = open_packed(tmp_path)
    torch.testing.assert_close(packed.dequantize("layer.weight"), weight.dequantize(torch.float32))


def test_a_lack_of_memory_is_not_called_damage():
    """torch's CPU allocator raises a plain RuntimeError, its GPU allocators a subclass."""
    with pytest.raises(ValueError, match=r"^model does not fit into memory .*allocate"), explained_loading("model"):
        torch.empty(1 << 50, dtype=torch.uint8)
    with pytest.raises(ValueError, match=r"^model does not fit into memory \(CUDA"), explained_loading("model"):
        raise torch.OutOfMemoryError("CUDA out of memory.")
