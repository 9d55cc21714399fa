# SPDX-License-Identifier: Apache-2.0
"""Importing the package registers the backend and does nothing else; the rest is imported when used."""

import re
import warnings

import pytest

import diffusers_ternary
from integration_tests.support.fresh_process import run_python


# Stock calls that meet this backend only through what importing it registered.
JOURNEY = """
import json, logging, sys, threading, warnings

def journey():
    from diffusers import DiffusionPipeline, FluxTransformer2DModel
    from diffusers_ternary import TernaryConfig
    from diffusers_ternary.backend.summary import packed_layers
    from diffusers_ternary.demo import demo_folder

    rounded = DiffusionPipeline.from_pretrained(demo_folder(), quantization_config=TernaryConfig()).transformer
    packed = FluxTransformer2DModel.from_pretrained(demo_folder() + "/../distilled")
    return [len(packed_layers(model)) for model in (rounded, packed)]

def loaded(*names):
    return [name for name in names if name in sys.modules]
"""
PACKED = [78, 78]  # layers
HEAVY = ("torch", "diffusers", "transformers", "accelerate", "peft")


@pytest.fixture(scope="module")
def first():
    """A fresh process that imports this package before its hosts."""
    return run_python(
        JOURNEY
        + """
threads = threading.active_count()
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    import diffusers_ternary
report = {
    "imported": sorted(name for name in sys.modules if name.startswith("diffusers_ternary")),
    "heavy": loaded(*HEAVY, "typer", "rich"),
    "threads": threading.active_count() - threads,
    "handlers": len(logging.getLogger("diffusers_ternary").handlers),
}
from diffusers_ternary.cli import app
from typer.testing import CliRunner

for name in ("--help", "--version", "calibrate --help"):
    result = CliRunner().invoke(app, name.split())
    report[name] = [result.exit_code, loaded(*HEAVY)]
import torch

report["operators"] = str(torch.ops.diffusers_ternary.linear)
folder = diffusers_ternary.__path__[0] + "/demo/data/distilled"
report["inspect"] = [CliRunner().invoke(app, ["inspect", folder]).exit_code, loaded(*HEAVY, "torch._dynamo")]

from diffusers.quantizers.auto import AUTO_QUANTIZER_MAPPING

report["backends"] = [name for name, one in AUTO_QUANTIZER_MAPPING.items() if "diffusers_ternary" in one.__module__]
report["class"] = AUTO_QUANTIZER_MAPPING["diffusers_ternary"].__name__
report["journey"] = journey()
report["cuda"] = sys.modules["torch"].cuda.is_initialized()
report["warnings"] = [str(warning.message) for warning in caught]
print(json.dumps(report))
""".replace("HEAVY", repr(HEAVY))
    )


def test_imports_what_registers_and_nothing_else(first):
    allowed = (
        r"diffusers_ternary(\.(lazy|lora|lora\.registration|backend|backend\.(after_import|method|registration)))?"
    )
    assert [name for name in first["imported"] if not re.fullmatch(allowed, name)] == []
    assert first["heavy"] == []


def test_starts_no_thread_warns_of_nothing_and_leaves_logging_alone(first):
    assert first["threads"] == 0
    assert first["warnings"] == []
    assert first["handlers"] == 0
    assert first["cuda"] is False


@pytest.mark.parametrize("command", ["--help", "--version", "calibrate --help"])
def test_help_imports_neither_torch_nor_the_hosts(first, command):
    assert first[command] == [0, []]


def test_inspect_imports_torch_and_no_host(first):
    assert first["inspect"] == [0, ["torch"]]


def test_operators_are_there_with_torch(first):
    assert first["operators"] == "diffusers_ternary.linear"  # an exported program needs them, and loads no layers


@pytest.mark.parametrize("room", ["format", "ternarize", "kernels.cpu"])
def test_a_room_that_operators_are_built_from_may_be_what_imports_torch(room):
    """torch's import registers the operators, in the middle of the room's own."""
    code = f"""
        import logging
        records = []
        handler = logging.Handler()
        handler.emit = lambda record: records.append(record.getMessage())
        logging.getLogger("diffusers_ternary").addHandler(handler)
        import diffusers_ternary.{room}, diffusers_ternary.layers, torch
        torch.ops.diffusers_ternary.linear.default
        import json
        print(json.dumps(records))
    """
    assert run_python(code) == []


def test_registers_one_backend_and_leaves_the_others_alone(first):
    assert first["backends"] == ["diffusers_ternary"]
    assert first["class"] == "TernaryDiffusersQuantizer"


def test_imported_before_the_hosts(first):
    assert first["journey"] == PACKED


@pytest.mark.parametrize(
    "before",
    ["import transformers.modeling_utils, diffusers.models.modeling_utils", "import diffusers_ternary.layers"],
)
def test_imported_after_the_hosts_or_in_parts(before):
    code = f"{JOURNEY}\n{before}\nimport diffusers_ternary\nprint(json.dumps(journey()))"
    assert run_python(code) == PACKED


def test_eleven_public_names():
    assert len(diffusers_ternary.__all__) == 11
    assert {*diffusers_ternary.__all__, "__version__"} == set(dir(diffusers_ternary))
    for name in diffusers_ternary.__all__:
        assert getattr(diffusers_ternary, name).__name__ == name


@pytest.mark.parametrize("name", sorted(diffusers_ternary._MOVED))
def test_a_name_that_moved_works_and_says_so_once(name, monkeypatch):
    monkeypatch.delitem(vars(diffusers_ternary), name, raising=False)
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        exec(f"from diffusers_ternary import {name} as first")
        exec(f"from diffusers_ternary import {name} as again")
    (warning,) = caught
    assert warning.category is FutureWarning
    namespace = {}
    exec(re.search(r"from \S+ import \w+", str(warning.message))[0], namespace)
    assert namespace[name] is getattr(diffusers_ternary, name)


def test_rooms_are_attributes_and_unknown_names_are_not():
    assert diffusers_ternary.layers.TernaryLinear.__name__ == "TernaryLinear"
    with pytest.raises(AttributeError, match="has no attribute 'quantise'"):
        _ = diffusers_ternary.quantise
