# SPDX-License-Identifier: Apache-2.0
"""The scripts of examples/scenes as modules, and teachers of the size of a test."""

import importlib
import sys
from pathlib import Path
from types import ModuleType

import torch
from diffusers import DiffusionPipeline


FOLDER = Path(__file__).parents[2] / "examples" / "scenes"


def examples(name: str) -> ModuleType:
    """Import one script under its own name; the scripts import each other by theirs."""
    if name not in sys.modules:
        sys.path.insert(0, str(FOLDER))
        try:
            importlib.import_module(name)
        finally:
            sys.path.remove(str(FOLDER))
    return sys.modules[name]


def tiny_teacher(architecture: str = "flux") -> DiffusionPipeline:
    """An untrained teacher of two blocks of 64 channels, without the zeros that trainings start from."""
    train_teacher, train_vae = examples("train_teacher"), examples("train_vae")
    recipe = train_teacher.Recipe(architecture=architecture, width=64, num_layers=1, num_single_layers=1)
    torch.manual_seed(7)
    pipeline, _ = train_teacher.build(train_vae.build_vae(), recipe)
    for module in pipeline.transformer.modules():
        if isinstance(module, torch.nn.Linear) and not module.weight.any():
            torch.nn.init.normal_(module.weight, std=0.1)
    return pipeline
