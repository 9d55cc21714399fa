# SPDX-License-Identifier: Apache-2.0
"""Draws a picture with diffusers and one with stable-diffusion.cpp, from the same noise, and compares them.

    python integration_tests/runtimes/compare_pictures.py my-flux-ternary flux.gguf --sd-cli bin/sd-cli \\
        --files "--vae ae.safetensors --clip_l clip_l.safetensors --t5xxl t5xxl_fp16.safetensors"

The first argument is a packed pipeline, the second its export (`diffusers-ternary convert my-flux-ternary flux.gguf`),
`--files` are its other components as stable-diffusion.cpp takes them, and `sd-cli` is a build of that, which its own
documentation describes. Noise is torch's, drawn on the CPU, and the steps are those that diffusers' scheduler takes.
GGML rounds the activations of quantized weights to 8 bits; `--type f32` among the files unpacks them while loading.
FLUX.1 of real width and few blocks came out 54 to 56 dB alike.
"""

import argparse
import shlex
import subprocess
import tempfile
from pathlib import Path

import torch
from diffusers import DiffusionPipeline
from PIL import Image

from diffusers_ternary.evaluation.metrics import image_distance


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pipeline", help="packed pipeline folder")
    parser.add_argument("gguf", type=Path, help="its export")
    parser.add_argument("--sd-cli", required=True, help="the program")
    parser.add_argument("--files", default="", help="its options for the other components")
    parser.add_argument("--prompt", default="a lighthouse on a cliff at dawn")
    parser.add_argument("--size", type=int, default=512)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--guidance", type=float, default=3.5)
    parser.add_argument("--seed", type=int, default=42)
    options = parser.parse_args()
    pipeline = DiffusionPipeline.from_pretrained(options.pipeline, dtype=torch.float32)
    ours = pipeline(
        options.prompt,
        height=options.size,
        width=options.size,
        num_inference_steps=options.steps,
        guidance_scale=options.guidance,
        generator=torch.Generator().manual_seed(options.seed),
    ).images[0]
    sigmas = ",".join(f"{sigma:.6f}" for sigma in pipeline.scheduler.sigmas.tolist())
    with tempfile.TemporaryDirectory() as folder:
        picture = Path(folder) / "picture.png"
        command = [options.sd_cli, "--diffusion-model", options.gguf, *shlex.split(options.files)]
        command += ["--prompt", options.prompt, "--sigmas", sigmas, "--steps", options.steps, "--rng", "cpu"]
        command += ["--seed", options.seed, "--cfg-scale", 1, "--guidance", options.guidance]
        command += ["--width", options.size, "--height", options.size, "--output", picture]
        subprocess.run([str(argument) for argument in command], check=True)
        distance = image_distance([Image.open(picture).convert("RGB")], [ours])
    print(f"PSNR {distance.psnr_db:.1f} dB")


if __name__ == "__main__":
    main()
