# SPDX-License-Identifier: Apache-2.0
"""The pipeline that the commands are tried on."""

import pathlib

import pytest
from safetensors.torch import save_file

from integration_tests.support.adapters import lora_state, with_prefix
from integration_tests.support.pipelines import PIPELINES


@pytest.fixture(scope="module")
def source(tmp_path_factory: pytest.TempPathFactory) -> pathlib.Path:
    """The folder of a float pipeline."""
    folder = tmp_path_factory.mktemp("float") / "flux"
    PIPELINES["flux"].build().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapters(tmp_path_factory: pytest.TempPathFactory) -> tuple[pathlib.Path, pathlib.Path]:
    """Two LoRA files of that pipeline; the name of one holds the sign that comes before a scale."""
    folder = tmp_path_factory.mktemp("adapters")
    transformer = PIPELINES["flux"].build().transformer
    files = folder / "style.safetensors", folder / "r=4.safetensors"
    for seed, file in enumerate(files):
        state = lora_state(transformer, rank=4, seed=seed, names=["transformer_blocks.0.attn.to_q"])
        save_file(with_prefix(state, "transformer"), file)
    return files
