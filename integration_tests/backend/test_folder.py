# SPDX-License-Identifier: Apache-2.0
"""What goes wrong while a model is loaded is called damage where a file is at fault, and a bug where we are."""

import types

import pytest
from safetensors import SafetensorError
from safetensors.torch import load_file

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import loading
from diffusers_ternary.backend.folder import explained_loading
from diffusers_ternary.backend.sources import load_quantized
from integration_tests.support import denoisers, text_encoders


def function_of(package: str, source: str):
    """A function of a module of that name, so that tracebacks show it there."""
    module = types.ModuleType(f"{package}.module")
    exec(source, vars(module) | {"explained_loading": explained_loading}, vars(module))
    return module.run


OURS = "diffusers_ternary"
LIBRARY = "library"
FAILS = "def run(): return {}['tensor']"
CALLS = "def run(inner): return inner()"
load = function_of(OURS, "def run(inner, **options):\n with explained_loading('model', **options): return inner()")


@pytest.mark.parametrize("options", [{}, {"own_reader": True}], ids=str)
def test_an_error_of_a_library_is_explained(options):
    with pytest.raises(ValueError, match=r"^model cannot be loaded \(KeyError: 'tensor'\)\. A file in it is damaged"):
        load(lambda: function_of(LIBRARY, FAILS)(), **options)


def test_an_error_of_this_package_stays_itself_wherever_it_was_called_from():
    hook = function_of(OURS, FAILS)
    for call in (hook, lambda: function_of(LIBRARY, CALLS)(hook)):
        with pytest.raises(KeyError, match="tensor"):
            load(call)


def test_a_library_that_a_hook_of_this_package_called_is_not_called_damage():
    def hook():
        return function_of(OURS, CALLS)(function_of(LIBRARY, FAILS))

    with pytest.raises(KeyError, match="tensor"):
        load(lambda: function_of(LIBRARY, CALLS)(hook))


def test_readers_of_this_package_see_damage_in_their_own_lookups_but_not_in_their_attributes():
    with pytest.raises(ValueError, match="model cannot be loaded"):
        load(function_of(OURS, FAILS), own_reader=True)
    with pytest.raises(AttributeError, match="tensor"):
        load(function_of(OURS, "def run(): return None.tensor"), own_reader=True)


def test_safetensors_speaks_of_the_file_whoever_called_it(tmp_path):
    file = tmp_path / "model.safetensors"
    file.write_bytes(b"not safetensors")
    with pytest.raises(ValueError, match="cannot be loaded") as error, explained_loading("model"):
        load_file(file)
    assert isinstance(error.value.__cause__, SafetensorError)


@pytest.mark.parametrize("build", [denoisers.flux, lambda: text_encoders.t5(64)], ids=["diffusers", "transformers"])
def test_a_bug_in_a_quantizer_is_not_called_a_damaged_file(build, tmp_path, monkeypatch):
    build().save_pretrained(tmp_path)

    def broken(*args, **kwargs):
        return None.no_such_name

    monkeypatch.setattr(loading, "pack_layer", broken)
    with pytest.raises(AttributeError, match="no_such_name"):
        load_quantized(str(tmp_path), TernaryConfig())
