# SPDX-License-Identifier: Apache-2.0
"""PEFT and diffusers learn of packed layers whenever they are imported, and are not imported for it."""

import importlib
import sys

import pytest

from diffusers_ternary.backend.after_import import after_import
from integration_tests.support.fresh_process import run_python


PROBE = """
import json, sys

def state():
    from diffusers_ternary.layers import QuantizedLayer
    from diffusers_ternary.backend.after_import import _Watcher

    peft = sys.modules.get("peft")
    flux = sys.modules.get("diffusers.loaders.lora_pipeline")
    mixin = sys.modules.get("diffusers.loaders.peft")
    return {
        "peft": peft is not None,
        "custom": peft is not None and len(peft.LoraConfig(target_modules=["x"])._custom_modules or {}),
        "dequantizable": hasattr(QuantizedLayer, "W_q"),
        "flux": flux is not None and hasattr(flux.FluxLoraLoaderMixin._calculate_module_shape, "__wrapped__"),
        "mixin": mixin is not None and hasattr(mixin.PeftAdapterMixin.fuse_lora, "__wrapped__"),
        "watched": sorted(finder.name for finder in sys.meta_path if isinstance(finder, _Watcher)),
    }
"""
NOTHING = {"peft": False, "custom": False, "dequantizable": False, "flux": False, "mixin": False}
MODULAR = "diffusers.modular_pipelines.modular_pipeline"  # nobody imports it here
HOSTS = ["diffusers.quantizers.auto", "transformers.quantizers.auto"]
WATCHED = sorted(["diffusers.loaders.lora_pipeline", "diffusers.loaders.peft", MODULAR, "peft", *HOSTS])
DONE = {"peft": True, "custom": 2, "dequantizable": True, "flux": True, "mixin": True, "watched": [MODULAR]}


def test_imported_first():
    before, after, same, wrapped_twice = run_python(
        PROBE
        + """
import importlib.util
import diffusers_ternary

importlib.util.find_spec("peft")  # asking whether it is there must not count as importing it
diffusers_ternary.lora.register()  # calling it again changes nothing, now and later
before = state()
from diffusers import DiffusionPipeline, FluxPipeline, FluxTransformer2DModel
from peft import LoraConfig

after, method = state(), LoraConfig.__post_init__
diffusers_ternary.lora.register()
shape = sys.modules["diffusers.loaders.lora_pipeline"].FluxLoraLoaderMixin._calculate_module_shape
print(json.dumps([before, after, LoraConfig.__post_init__ is method, hasattr(shape.__wrapped__, "__wrapped__")]))
"""
    )
    assert before == {**NOTHING, "watched": WATCHED}
    assert after == DONE
    assert same
    assert not wrapped_twice


def test_imported_last():
    code = "\nfrom diffusers import FluxPipeline, FluxTransformer2DModel\nimport diffusers_ternary\n"
    assert run_python(PROBE + code + "print(json.dumps(state()))") == DONE


class TestAfterImport:
    @pytest.fixture
    def name(self, tmp_path, monkeypatch):
        """A module that nobody has imported."""
        (tmp_path / "somebody_elses.py").write_text("value = 1\n")
        monkeypatch.syspath_prepend(tmp_path)
        yield "somebody_elses"
        sys.modules.pop("somebody_elses", None)

    def test_calls_back_once(self, name):
        calls = []
        after_import(name, lambda: calls.append(sys.modules[name].value))
        assert calls == []
        importlib.import_module(name)
        assert calls == [1]
        importlib.reload(sys.modules[name])
        assert calls == [1]
        after_import(name, lambda: calls.append(2))
        assert calls == [1, 2]

    def test_leaves_the_loader_as_it_was(self, name):
        after_import(name, lambda: None)
        loader = importlib.import_module(name).__spec__.loader
        assert loader.exec_module.__func__ is type(loader).exec_module

    def test_an_error_does_not_break_the_import(self, name, caplog):
        def moved():
            raise ImportError("cannot import name 'x'")

        after_import(name, moved)
        assert importlib.import_module(name).value == 1
        (record,) = caplog.records
        assert f"could not prepare {name} for packed layers" in record.getMessage()
        assert "cannot import name 'x'" in record.exc_text

    def test_an_error_of_the_module_itself_is_raised(self, tmp_path, name):
        (tmp_path / f"{name}.py").write_text("1 / 0\n")
        calls = []
        after_import(name, lambda: calls.append(1))
        with pytest.raises(ZeroDivisionError):
            importlib.import_module(name)
        assert calls == []
        (tmp_path / f"{name}.py").write_text("value = 1234\n")
        importlib.invalidate_caches()
        assert importlib.import_module(name).value == 1234
        assert calls == [1]
