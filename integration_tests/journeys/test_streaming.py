# SPDX-License-Identifier: Apache-2.0
"""On-the-fly quantization never holds more than one shard and the packed model."""

import sys

import pytest

from integration_tests.support import denoisers
from integration_tests.support.fresh_process import run_python


SHARD = 50 * 2**20
# Allocator, page cache of a shard being read while the next one is mapped, and torch's own buffers.
SLACK = 90 * 2**20

LOADER = """
    import json, resource, sys
    import torch, diffusers_ternary
    from diffusers import FluxTransformer2DModel
    from diffusers_ternary import TernaryConfig

    def peak():
        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024

    torch.set_num_threads(1)
    torch.randn(256, 256) @ torch.randn(256, 256)  # what the first product allocates is not the loader's
    before = peak()
    model = FluxTransformer2DModel.from_pretrained(
        sys.argv[1], quantization_config=TernaryConfig(), torch_dtype=torch.bfloat16
    )
    packed = sum(p.numel() * p.element_size() for p in model.parameters())
    print(json.dumps({"grown": peak() - before, "packed": packed}))
    """


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_peak_memory_is_one_shard_and_the_packed_model(tmp_path):
    model = denoisers.large_flux(2, 2)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "float", max_shard_size=SHARD)
    del model

    measured = run_python(LOADER, tmp_path / "float")

    assert total > 4 * SHARD, "the model must be much larger than a shard for the test to mean anything"
    assert measured["grown"] < SHARD + measured["packed"] + SLACK, measured
    assert SHARD + measured["packed"] + SLACK < 0.9 * total, "the bound itself must rule out holding the float model"
