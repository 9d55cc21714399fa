# SPDX-License-Identifier: Apache-2.0
"""`examples/train_lora.py`, run as a user would: the adapter does what it was trained for, on the ternary base."""

import runpy
import subprocess
import sys
from pathlib import Path

import numpy as np
import torch

from diffusers_ternary.backend import packed_layers
from diffusers_ternary.calibration.merge_lora import merge_lora
from diffusers_ternary.demo import generate, held_out_prompts
from diffusers_ternary.demo.variants import find_variant


EXAMPLE = Path(__file__).parents[2] / "examples" / "train_lora.py"


def test_the_adapter_draws_in_its_style(tmp_path):
    command = [sys.executable, str(EXAMPLE), "--output", str(tmp_path), "--steps", "40"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "pytorch_lora_weights.safetensors").stat().st_size < 400_000  # an adapter, no model

    pipeline = find_variant("calibrated").load(torch.float32)
    packed = {name: layer.weight.clone() for name, layer in packed_layers(pipeline.transformer).items()}
    prompts = held_out_prompts(16, 5)
    plain = generate(pipeline, prompts)
    wanted = runpy.run_path(str(EXAMPLE))["sepia"](plain)
    pipeline.load_lora_weights(tmp_path, adapter_name="sepia")
    styled = generate(pipeline, prompts)
    # The same people in brown: three times closer in a quarter of the steps of the full run.
    assert np.square(styled - wanted).mean() < np.square(plain - wanted).mean() / 3
    pipeline.disable_lora()
    assert np.array_equal(generate(pipeline, prompts), plain)
    pipeline.enable_lora()
    merge_lora(pipeline, requantize=False, rank=8)
    assert np.abs(generate(pipeline, prompts) - styled).mean() < 0.01
    for name, layer in packed_layers(pipeline.transformer).items():
        assert torch.equal(layer.weight, packed[name])
