# SPDX-License-Identifier: Apache-2.0
"""Hundreds of damaged checkpoints: each is read as what it was, or refused with an error that names the file.

The mutations are drawn from a seed that failures print; `DIFFUSERS_TERNARY_SEED` repeats one.
"""

import json
import os
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from diffusers import FluxTransformer2DModel
from safetensors.torch import save_file
from torch import nn
from transformers import CLIPTextModel

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.backend.saving import state_dict_to_file
from diffusers_ternary.hub.source import read_source
from diffusers_ternary.interop.export import open_packed
from diffusers_ternary.interop.inspection import inspect_path
from diffusers_ternary.layers import LayerRecord
from integration_tests.support import denoisers, text_encoders


SEED = int(os.environ.get("DIFFUSERS_TERNARY_SEED", random.SystemRandom().randrange(1 << 32)))
CASES = 400
HOST_CASES = 25
FILE = "diffusion_pytorch_model.safetensors"
KEY = "diffusers_ternary"
# What JSON may hold in the place of something sensible; json writes infinities and NaN as their names.
ODD = (
    None,
    True,
    0,
    -1,
    1,
    2,
    9,
    1 << 40,
    1 << 80,
    0.5,
    float("inf"),
    float("nan"),
    "",
    "x",
    "F16",
    [],
    {},
    [[]],
    ["F16"],
)
Tensors = dict[str, torch.Tensor]


class Model(nn.Module):
    """A layer of each kind, and kept ones."""

    def __init__(self) -> None:
        super().__init__()
        self.rotated, self.doubled, self.int8 = nn.Linear(16, 6), nn.Linear(16, 6), nn.Linear(16, 6)
        self.conv, self.kept = nn.Conv2d(4, 6, 2), nn.Linear(16, 6)


def write_model(folder: Path) -> None:
    """Two shards, so that one can be lost or exchanged."""
    torch.manual_seed(0)
    model = Model()
    for name, options in {
        "rotated": {"hadamard": 8, "rank": 2},
        "doubled": {"scale_layout": "double"},
        "int8": {"kind": "int8"},
        "conv": {},
    }.items():
        config = TernaryConfig(
            **{"group_size": 8, "scale_layout": "group", **options}, overrides={"0": options.get("kind", "ternary")}
        )
        setattr(model, name, quantize(nn.Sequential(getattr(model, name)), config)[0])
    records = {name: LayerRecord(layer.spec, layer.scale_dtype) for name, layer in packed_layers(model).items()}
    tensors, layout = state_dict_to_file(model.state_dict(), records)
    folder.mkdir()
    names = sorted(tensors)
    parts = {f"{FILE.removesuffix('.safetensors')}-0000{i + 1}-of-00002.safetensors": names[i::2] for i in (0, 1)}
    for file, part in parts.items():
        save_file({name: tensors[name].contiguous() for name in part}, folder / file, layout.to_metadata())
    weight_map = {name: file for file, part in parts.items() for name in part}
    (folder / f"{FILE}.index.json").write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = {"_class_name": "FluxTransformer2DModel", "quantization_config": {"quant_method": KEY}}
    (folder / "config.json").write_text(json.dumps(config))


def read(folder: Path) -> Tensors:
    """All weights, as float32."""
    packed = open_packed(folder)
    return {name: packed.dequantize(name) for name in sorted(packed.names())}


def split(data: bytes) -> tuple[dict[str, Any], bytes]:
    size = int.from_bytes(data[:8], "little")
    return json.loads(data[8 : 8 + size]), data[8 + size :]


def join(header: dict[str, Any], data: bytes) -> bytes:
    text = json.dumps(header).encode()
    return len(text).to_bytes(8, "little") + text + data


# --- mutations: each changes the bytes of a file --------------------------------------------------------------------


def flip_bits(data: bytes, draw: random.Random) -> bytes:
    changed = bytearray(data)
    for _ in range(draw.choice((1, 1, 2, 8))):
        changed[draw.randrange(len(data))] ^= 1 << draw.randrange(8)
    return bytes(changed)


def cut(data: bytes, draw: random.Random) -> bytes:
    return data[: draw.randrange(len(data))]


def append(data: bytes, draw: random.Random) -> bytes:
    return data + draw.randbytes(draw.randrange(1, 64))


def overwrite(data: bytes, draw: random.Random) -> bytes:
    start = draw.randrange(len(data))
    count = min(draw.randrange(1, 64), len(data) - start)
    return data[:start] + draw.randbytes(count) + data[start + count :]


def change_metadata(data: bytes, draw: random.Random) -> bytes:
    """Sets, deletes or renames an entry of our JSON, anywhere in it."""
    header, rest = split(data)
    body = json.loads(header["__metadata__"][KEY])
    place: Any = body
    while True:
        keys = list(place) if isinstance(place, dict) else list(range(len(place)))
        key = draw.choice(keys)
        if isinstance(place[key], (dict, list)) and place[key] and draw.random() < 0.8:
            place = place[key]
            continue
        break
    how = draw.randrange(4)
    if how == 0 or not isinstance(place, dict):
        place[key] = draw.choice(ODD)
    elif how == 1:
        del place[key]
    elif how == 2:
        place[f"{key}{draw.choice('.x')}"] = place.pop(key)
    else:
        other = draw.choice(list(place))
        place[key], place[other] = place[other], place[key]
    header["__metadata__"][KEY] = json.dumps(body)
    return join(header, rest)


def change_layer(data: bytes, draw: random.Random) -> bytes:
    """Says something else of a packed layer that could be true."""
    header, rest = split(data)
    body = json.loads(header["__metadata__"][KEY])
    layer = body["layers"][draw.choice(list(body["layers"]))]
    field, value = draw.choice(
        (
            *(("hadamard", value) for value in (0, 2, 4, 8, 16)),
            *(("group_size", value) for value in (1, 7, 9, 12, 16)),
            *(("rank", value) for value in (0, 1, 2)),
            ("scales", draw.choice(("group", "double"))),
            ("shape", layer["shape"][::-1]),
        )
    )
    layer[field] = value
    if value == 0:
        del layer[field]
    header["__metadata__"][KEY] = json.dumps(body)
    return join(header, rest)


def drop_metadata(data: bytes, draw: random.Random) -> bytes:
    header, rest = split(data)
    header["__metadata__"] = draw.choice(({}, {KEY: ""}, {KEY: "{}"}, {KEY: "[" * 5000}, {KEY: "null"}))
    return join(header, rest)


def change_header(data: bytes, draw: random.Random) -> bytes:
    """Says something else of the same bytes: dtype, shape, name, place."""
    header, rest = split(data)
    names = [name for name in header if name != "__metadata__"]
    name, other = draw.choice(names), draw.choice(names)
    how = draw.randrange(6)
    if how == 0:
        same_size = {"F16": "BF16", "BF16": "F16", "U8": "I8", "I8": "U8", "F32": "I32", "I32": "F32"}
        header[name]["dtype"] = same_size.get(header[name]["dtype"], "U8")
    elif how == 1:
        header[name]["shape"] = header[name]["shape"][::-1]
    elif how == 2:
        header[name]["shape"] = [*header[name]["shape"], 1]
    elif how == 3:
        header[f"{name}_"] = header.pop(name)
    elif how == 4:
        header[name], header[other] = header[other], header[name]
    else:
        offsets = header[name]["data_offsets"]
        header[name]["data_offsets"] = header[other]["data_offsets"]
        header[other]["data_offsets"] = offsets
    return join(header, rest)


def drop_tensor(data: bytes, draw: random.Random) -> bytes:
    """Removes a tensor and its bytes; the file is in order afterward."""
    header, rest = split(data)
    name = draw.choice([name for name in header if name != "__metadata__"])
    start, stop = header.pop(name)["data_offsets"]
    for entry in (header[other] for other in header if other != "__metadata__"):
        if entry["data_offsets"][0] >= stop:
            entry["data_offsets"] = [offset - (stop - start) for offset in entry["data_offsets"]]
    return join(header, rest[:start] + rest[stop:])


def change_index(data: bytes, draw: random.Random) -> bytes:
    index = json.loads(data)
    names = list(index["weight_map"])
    how = draw.randrange(4)
    if how == 0:
        index["weight_map"] = draw.choice(ODD)
    elif how == 1:
        index["weight_map"][draw.choice(names)] = draw.choice((*ODD, "../config.json", "/etc/hostname", "config.json"))
    elif how == 2:
        only = draw.choice(list(index["weight_map"].values()))
        index["weight_map"] = {name: file for name, file in index["weight_map"].items() if file == only}
    else:
        return draw.choice((b"", b"{", b"[" * 100_000, b"null", b"\xff", b"[1]", b'{"weight_map": {}}'))
    return json.dumps(index).encode()


def change_config(data: bytes, draw: random.Random) -> bytes:
    config = json.loads(data)
    config[draw.choice(list(config))] = draw.choice(ODD)
    return draw.choice((json.dumps(config).encode(), b"{", b'{"a":' * 100_000))


MUTATIONS: dict[str, list[Callable[[bytes, random.Random], bytes]]] = {
    ".safetensors": [
        *(flip_bits, cut, append, overwrite, change_metadata, change_metadata, drop_metadata),
        *(change_layer, change_layer, change_header, change_header, drop_tensor, drop_tensor),
    ],
    ".index.json": [change_index],
    "config.json": [change_config],
}


def mutate(folder: Path, draw: random.Random) -> str:
    """Damages one file of a folder, and says how."""
    files = sorted(folder.iterdir())
    weights = [file for file in files if file.suffix == ".safetensors"]
    file = draw.choice([*weights * 4, *files])
    ending = next(ending for ending in MUTATIONS if file.name.endswith(ending))
    mutation = draw.choice(MUTATIONS[ending])
    if mutation in (change_layer, change_metadata):  # in all shards alike, which say the same
        state = draw.getstate()
        for file in weights:
            draw.setstate(state)
            file.write_bytes(mutation(file.read_bytes(), draw))
        return f"{mutation.__name__} of all shards"
    file.write_bytes(mutation(file.read_bytes(), draw))
    return f"{mutation.__name__} of {file.name}"


@pytest.fixture(scope="module")
def pristine(tmp_path_factory):
    folder = tmp_path_factory.mktemp("pristine") / "model"
    write_model(folder)
    return folder


def attempt(reader: Callable[[Path], Any], folder: Path, what: str, *, refusals: Any = ValueError) -> Any:
    """What a reader gives; `None` if it refuses with an error that names the folder or a file in it."""
    try:
        return reader(folder)
    except refusals as error:
        message = str(error)
    except Exception as error:
        pytest.fail(f"{what}: {type(error).__name__} instead of a refusal: {error}")
    if folder.name not in message:
        pytest.fail(f"{what}: the refusal does not name the file: {message}")
    return None


@pytest.mark.parametrize("part", range(4))
def test_readers(pristine, tmp_path, part):
    """`export`, `inspect` and `push` read the same: equal weights, or a refusal that names the file."""
    expected = read(pristine)
    assert len(expected) == 10
    refused = 0
    for case in range(part * CASES // 4, (part + 1) * CASES // 4):
        folder = tmp_path / f"case-{case}"
        shutil.copytree(pristine, folder)
        what = f"seed {SEED}, case {case}, {mutate(folder, random.Random(f'{SEED}-{case}'))}"
        values = attempt(read, folder, what)
        refused += values is None
        if values is not None:
            assert values.keys() == expected.keys(), what
            assert all(torch.equal(values[name], expected[name]) for name in values), f"{what}: other weights"
        attempt(inspect_path, folder, what)
        published = attempt(read_source, folder, what)
        assert published is None or values is not None, f"{what}: published"
        shutil.rmtree(folder)
    assert refused > CASES // 8, "the mutations do no damage any more"


HOSTS = {
    "diffusers": (FluxTransformer2DModel, denoisers.flux),
    "transformers": (CLIPTextModel, text_encoders.clip),
}


@pytest.mark.parametrize("host", HOSTS)
def test_hosts(host, tmp_path):
    """The loaders of diffusers and transformers: the same weights, or an error that names the file."""
    model_class, build = HOSTS[host]
    torch.manual_seed(0)
    quantize(build(), TernaryConfig(group_size=8)).save_pretrained(tmp_path / "pristine")
    expected = model_class.from_pretrained(tmp_path / "pristine").state_dict()
    for case in range(HOST_CASES):
        folder = tmp_path / f"case-{case}"
        shutil.copytree(tmp_path / "pristine", folder)
        draw = random.Random(f"{SEED}-{host}-{case}")
        (file,) = folder.glob("*.safetensors")
        mutation = draw.choice(MUTATIONS[".safetensors"])
        file.write_bytes(mutation(file.read_bytes(), draw))
        what = f"seed {SEED}, case {case}, {mutation.__name__}"
        # diffusers opens the file before it asks anybody, and raises OSError.
        model = attempt(model_class.from_pretrained, folder, what, refusals=(ValueError, OSError))
        if model is not None:
            state = model.state_dict()
            assert all(torch.equal(tensor, expected[name]) for name, tensor in state.items()), what
        shutil.rmtree(folder)
