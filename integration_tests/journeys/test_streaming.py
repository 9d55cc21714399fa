# SPDX-License-Identifier: Apache-2.0
"""On-the-fly quantization never holds more than one shard and the packed model."""

import json
import subprocess
import sys
import textwrap

import pytest
import torch
from diffusers import FluxTransformer2DModel


SHARD = 50 * 2**20
# Allocator, page cache of a shard being read while the next one is mapped, and torch's own buffers.
SLACK = 90 * 2**20

LOADER = textwrap.dedent(
    """
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
)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss is in kilobytes on Linux only")
def test_peak_memory_is_one_shard_and_the_packed_model(tmp_path):
    with torch.device("meta"):
        shape = FluxTransformer2DModel(
            num_layers=2,
            num_single_layers=2,
            attention_head_dim=64,
            num_attention_heads=16,
            axes_dims_rope=(16, 24, 24),
        )
    model = shape.to_empty(device="cpu").to(torch.bfloat16)
    for parameter in model.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    total = sum(p.numel() * p.element_size() for p in model.parameters())
    model.save_pretrained(tmp_path / "float", max_shard_size=SHARD)
    del model

    result = subprocess.run(
        [sys.executable, "-c", LOADER, str(tmp_path / "float")], capture_output=True, text=True, check=True
    )
    measured = json.loads(result.stdout.splitlines()[-1])

    assert total > 4 * SHARD, "the model must be much larger than a shard for the test to mean anything"
    assert measured["grown"] < SHARD + measured["packed"] + SLACK, measured
    assert SHARD + measured["packed"] + SLACK < 0.9 * total, "the bound itself must rule out holding the float model"
