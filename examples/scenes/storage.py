# SPDX-License-Identifier: Apache-2.0
"""How pipelines of Scenes are stored: without traces of the machine, and if asked for in 8 bits a weight.

python examples/scenes/storage.py work/sana/teacher examples/scenes/models/sana    # a copy in 8 bits
"""

from __future__ import annotations

import argparse
import json
import shutil
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from safetensors import safe_open
from safetensors.torch import load_file, save_file


def save_pipeline(pipeline: DiffusionPipeline, folder: Path) -> None:
    """``save_pretrained`` without the folders that the parts came from."""
    pipeline.save_pretrained(folder)
    for config in (*folder.glob("*/config.json"), folder / "model_index.json"):
        written = json.loads(config.read_text())
        written.pop("_name_or_path", None)
        if written.get("_class_name") == "AutoencoderTiny":
            written.pop("block_out_channels", None)  # AutoencoderTiny sets it itself, and warns when a file does
        config.write_text(json.dumps(written, indent=2) + "\n")


def store_in_float8(folder: Path) -> None:
    """Round the transformer's matrices to float8_e4m3fn, and store them in it.

    The rounded values *are* the teacher from then on: bfloat16 holds each of them exactly, and
    ``from_pretrained(folder, dtype=torch.bfloat16)`` computes with them. There are no scales. Vectors, which weigh
    little, stay as they are.

    Args:
        folder: Of the pipeline; changed.

    Raises:
        ValueError: If a weight is beyond what float8_e4m3fn can hold.
    """
    path = folder / "transformer" / "diffusion_pytorch_model.safetensors"
    with safe_open(path, "pt") as file:
        metadata = file.metadata()
    weights = load_file(path)
    for name, weight in weights.items():
        if weight.squeeze().ndim < 2:
            continue
        largest = torch.finfo(torch.float8_e4m3fn).max
        if weight.abs().max() > largest:
            raise ValueError(f"{name} of {path} has weights beyond {largest:g}, which float8_e4m3fn cannot hold.")
        weights[name] = weight.to(torch.float8_e4m3fn)
    save_file(weights, path, metadata)


def main() -> None:
    """Copy a pipeline folder and store the copy in 8 bits."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("source", type=Path, help="pipeline folder")
    parser.add_argument("output", type=Path, help="folder of the copy, which must not exist")
    arguments = parser.parse_args()
    shutil.copytree(arguments.source, arguments.output)
    store_in_float8(arguments.output)


if __name__ == "__main__":
    main()
