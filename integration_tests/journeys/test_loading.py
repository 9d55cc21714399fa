# SPDX-License-Identifier: Apache-2.0
"""Packed checkpoints load without a float detour, and leave neither float tensors nor mapped files behind."""

import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from diffusers_ternary import TernaryConfig, quantize
from integration_tests.support import denoisers
from integration_tests.support.fresh_process import run_python


MEGABYTE = 2**20
LOADER = """
    import json, sys
    from pathlib import Path
    import torch, diffusers_ternary
    from diffusers import FluxTransformer2DModel

    def status(field):
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith(field + ":"))

    torch.set_num_threads(1)
    FluxTransformer2DModel.from_pretrained(sys.argv[2])  # what the first load imports is not this load's
    before, peak_before = status("RssAnon"), status("VmHWM")
    model = FluxTransformer2DModel.from_pretrained(sys.argv[1], torch_dtype=torch.bfloat16)
    print(json.dumps({
        "allocated": status("RssAnon") - before,
        "peak": status("VmHWM") - peak_before,
        "parameters": sum(p.numel() * p.element_size() for p in model.parameters()),
        "mapped": sum(sys.argv[1] in line for line in Path("/proc/self/maps").read_text().splitlines()),
    }))
    """


@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_memory_of_loading(tmp_path):
    model = denoisers.large_flux(2, 4)
    float_bytes = sum(p.numel() * p.element_size() for p in model.parameters())
    quantize(model, TernaryConfig()).save_pretrained(tmp_path / "packed")
    quantize(denoisers.flux(), TernaryConfig()).save_pretrained(tmp_path / "tiny")
    stored = sum(file.stat().st_size for file in (tmp_path / "packed").glob("*.safetensors"))
    measured = run_python(LOADER, tmp_path / "packed", tmp_path / "tiny")

    assert measured["mapped"] == 0, "the file is not held open by the tensors that were kept"
    assert measured["allocated"] < measured["parameters"] + 8 * MEGABYTE
    # The file's pages while it is read, the parameters, and the temporaries of one layer: far from the float model.
    assert measured["peak"] < stored + measured["parameters"] + 16 * MEGABYTE, measured
    assert stored + measured["parameters"] + 16 * MEGABYTE < 0.6 * float_bytes


def test_parallel_shards(tmp_path, monkeypatch):
    torch.manual_seed(0)
    model = quantize(denoisers.flux(), TernaryConfig())
    model.save_pretrained(tmp_path, max_shard_size="100KB")
    assert len(list(Path(tmp_path).glob("*.safetensors"))) > 2
    monkeypatch.setenv("HF_ENABLE_PARALLEL_LOADING", "yes")
    again = FluxTransformer2DModel.from_pretrained(tmp_path)
    expected = model.state_dict()
    assert all(torch.equal(tensor, expected[name]) for name, tensor in again.state_dict().items())
