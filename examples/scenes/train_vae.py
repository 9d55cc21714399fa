# SPDX-License-Identifier: Apache-2.0
"""Train the autoencoder of Scenes: 64 x 64 pixels to 16 x 16 x 4 latents with mean 0 and standard deviation 1."""

from __future__ import annotations

import argparse
import json
import logging
import math
import random
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from diffusers import AutoencoderTiny
from diffusers.training_utils import EMAModel
from renderer import BACKGROUNDS, GRID, NOTHING, Layout, Renderer, Sprites, corner, layout_of
from torch import nn
from tqdm import tqdm

from diffusers_ternary.evaluation.scenes.prompts import benchmark_tasks
from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES, COLORS


logger = logging.getLogger("train_vae")
LATENT_NOISE = 0.05  # standard deviations; keeps the latents smooth and the decoder tolerant


def build_vae() -> AutoencoderTiny:
    """An untrained f4 autoencoder with four latent channels."""
    return AutoencoderTiny(
        encoder_block_out_channels=(32, 32, 32),
        decoder_block_out_channels=(48, 48, 48),
        num_encoder_blocks=(0, 1, 2),
        num_decoder_blocks=(2, 1, 0),
        latent_channels=4,
    )


def random_layout(count: int, sprites: Sprites, rng: random.Random) -> Layout:
    """Scenes with up to nine objects of any class and color: more edges to learn from than the prompts ask for."""
    objects = torch.full((count, GRID * GRID, 5), NOTHING)
    background = torch.tensor([rng.randrange(len(BACKGROUNDS)) for _ in range(count)])
    for scene in objects:
        for cell in rng.sample(range(GRID * GRID), rng.randint(0, GRID * GRID)):
            kind, size = rng.randrange(len(CLASSES)), rng.randrange(sprites.num_sizes)
            width, height = sprites.extents[kind, size].tolist()
            place = corner(cell % GRID, width, rng), corner(cell // GRID, height, rng)
            scene[cell] = torch.tensor([kind, rng.randrange(len(COLORS)), size, *place])
    return Layout(objects, background)


def psnr(vae: AutoencoderTiny, pictures: torch.Tensor) -> float:
    """Mean over pictures of the reconstruction's peak signal-to-noise ratio in dB, of values in [-1, 1]."""
    with torch.no_grad():
        rebuilt = torch.cat([vae.decode(vae.encode(part).latents).sample.clamp(-1, 1) for part in pictures.split(64)])
    errors = (rebuilt - pictures).square().mean((1, 2, 3))
    return (10 * (4.0 / errors).log10()).mean().item()


def train(
    steps: int, batch_size: int, learning_rate: float, seed: int, start: AutoencoderTiny | None = None
) -> AutoencoderTiny:
    """Squared error of the pixels, with latents held at mean 0 and standard deviation 1 per channel.

    With ``start`` only the decoder is trained further: the latents, and so what a teacher learns, stay what they are.
    """
    set_seed(seed)
    accelerator = Accelerator(mixed_precision="bf16")
    sprites = Sprites()
    renderer = Renderer(sprites, accelerator.device)
    vae = build_vae() if start is None else start
    vae.encoder.requires_grad_(start is None)
    vae.to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(vae.parameters(), lr=learning_rate, betas=(0.9, 0.98), weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    model, optimizer, schedule = accelerator.prepare(vae, optimizer, schedule)
    ema = EMAModel(vae.parameters(), decay=0.995)
    stage = "vae" if start is None else "decoder"
    for step in tqdm(range(steps), mininterval=10):
        layout = random_layout(batch_size, sprites, random.Random(f"{stage} {seed} {step}"))
        pictures = renderer.draw(layout.to(accelerator.device)).contiguous(memory_format=torch.channels_last)
        with accelerator.autocast():
            latents = model.encode(pictures).latents.float()
            rebuilt = model.decode(latents + LATENT_NOISE * torch.randn_like(latents)).sample.float()
        error = nn.functional.mse_loss(rebuilt, pictures)
        center, spread = latents.mean((0, 2, 3)), latents.std((0, 2, 3))
        loss = error + 0.1 * nn.functional.l1_loss(rebuilt, pictures)
        loss = loss + 0.01 * (center.square().mean() + (spread - 1.0).square().mean())
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        ema.step(vae.parameters())
        if step % 200 == 199:
            logger.info("step %d: %.2f dB of the batch", step + 1, 10 * math.log10(4.0 / error.item()))
    ema.copy_to(vae.parameters())
    return vae.to(device="cpu", memory_format=torch.contiguous_format).eval()


def main() -> None:
    """Train, measure the latents and the reconstruction on held-out scenes, write a bfloat16 folder."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--output", type=Path, required=True)
    parser.add_argument("--refine", type=Path, help="folder of a trained autoencoder whose decoder is trained further")
    parser.add_argument("--steps", type=int, default=2000)
    parser.add_argument("--batch-size", type=int, default=16)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    start = AutoencoderTiny.from_pretrained(arguments.refine) if arguments.refine else None
    vae = train(arguments.steps, arguments.batch_size, arguments.learning_rate, arguments.seed, start)

    vae = vae.bfloat16().float()  # measured with the weights as they are stored
    sprites, rng = Sprites(), random.Random(arguments.seed)
    tasks = benchmark_tasks(553, arguments.seed)
    pictures = Renderer(sprites).draw(layout_of(tasks, sprites, rng, training=False))
    with torch.no_grad():
        latents = torch.cat([vae.encode(part).latents for part in pictures.split(64)])
    if start is None:
        vae.register_to_config(scaling_factor=1.0 / latents.std().item(), shift_factor=latents.mean().item())
    logger.info("per channel: mean %s, std %s", latents.mean((0, 2, 3)).tolist(), latents.std((0, 2, 3)).tolist())
    logger.info("%d held-out scenes rebuilt: %.2f dB", len(pictures), psnr(vae, pictures))
    vae.bfloat16().save_pretrained(arguments.output)
    config = arguments.output / "config.json"
    written = json.loads(config.read_text())
    written.pop("block_out_channels", None)  # AutoencoderTiny sets it itself, and warns when a file does
    written.pop("_name_or_path", None)
    config.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
