# SPDX-License-Identifier: Apache-2.0
"""Exported files in the loader and the dequantizers of ComfyUI-GGUF, of which there is no package.

    COMFYUI_GGUF=~/ComfyUI/custom_nodes/ComfyUI-GGUF pytest integration_tests/runtimes/test_comfyui_gguf.py

The rest of ComfyUI is not needed: of what the loader imports from it, its tensor class is all that is used.
"""

import ast
import importlib
import logging
import os
import pathlib
import sys
import types
from typing import Any

import pytest
import torch

from diffusers_ternary.interop import export_gguf
from integration_tests.support import exports


CHECKOUT = os.environ.get("COMFYUI_GGUF")
pytestmark = pytest.mark.skipif(CHECKOUT is None, reason="COMFYUI_GGUF does not name a checkout of ComfyUI-GGUF")


@pytest.fixture(scope="module")
def comfyui_gguf() -> types.SimpleNamespace:
    """`loader` and `dequant` of the checkout."""
    root = pathlib.Path(CHECKOUT or "")
    source = ast.parse((root / "ops.py").read_text())
    tensor_class = next(node for node in source.body if getattr(node, "name", "") == "GGMLTensor")
    package, ops = types.ModuleType("comfyui_gguf"), types.ModuleType("comfyui_gguf.ops")
    package.__path__ = [str(root)]
    ops.__dict__.update(torch=torch, logging=logging)
    exec(compile(ast.Module([tensor_class], []), str(root / "ops.py"), "exec"), ops.__dict__)
    sys.modules |= {package.__name__: package, ops.__name__: ops}
    modules = {name: importlib.import_module(f"comfyui_gguf.{name}") for name in ("loader", "dequant")}
    return types.SimpleNamespace(**modules)


@pytest.mark.parametrize("architecture", exports.GGUF)
def test_no_weight_differs(tmp_path, comfyui_gguf: Any, architecture) -> None:
    exact = exports.pack(tmp_path / "in", architecture, group_size=64)
    report = export_gguf(tmp_path / "in", tmp_path / "model.gguf", runtime="comfyui")
    state, found = comfyui_gguf.loader.gguf_sd_loader(str(tmp_path / "model.gguf"), return_arch=True)
    assert found == report.architecture
    assert state.keys() == exact.keys()
    for name, tensor in state.items():
        # By default they multiply in float16, which rounds products with 8-bit values.
        theirs = comfyui_gguf.dequant.dequantize_tensor(tensor, torch.float32, torch.float32)
        assert torch.equal(torch.as_tensor(theirs.data).reshape(exact[name].shape), exact[name]), name
        # Elsewhere ComfyUI reads the bytes of the weight as they are.
        linear = name.endswith(".weight") and exact[name].dim() == 2
        assert linear or not comfyui_gguf.dequant.is_quantized(tensor), name
