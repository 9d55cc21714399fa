# SPDX-License-Identifier: Apache-2.0
"""Train the judge on the rendered training portraits and test it on held-out attribute combinations."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch
from make_dataset import NO_LABEL
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm

from diffusers_ternary.demo.grammar import ATTRIBUTES, prompt_of, sample_portraits
from diffusers_ternary.demo.judge import Judge, to_pixels


logger = logging.getLogger("train_judge")
TEST_IMAGES = 512  # shipped with the package


def augment(pixels: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Noise, color shifts and smoothing: generated pictures are not as clean as rendered ones."""
    size = len(pixels)
    noise = torch.rand(size, 1, 1, 1, generator=generator) ** 2 * 0.3
    gain = 1.0 + 0.15 * torch.randn(size, 3, 1, 1, generator=generator).clamp(-2, 2)
    shift = 0.08 * torch.randn(size, 3, 1, 1, generator=generator)
    blur = 0.3 * torch.rand(size, 1, 1, 1, generator=generator) ** 2
    smooth = nn.functional.avg_pool2d(nn.functional.pad(pixels, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    changed = torch.lerp(pixels, smooth, blur) * gain + shift
    changed = changed + noise * torch.randn(changed.shape, generator=generator)
    return changed.clamp(-1, 1)


def train(data: Path, *, epochs: int, batch_size: int, learning_rate: float, seed: int) -> Judge:
    """Cross-entropy per attribute, over the portraits where it is visible."""
    stored = np.load(data / "train.npz")
    pixels, labels = to_pixels(stored["images"]), torch.from_numpy(stored["labels"]).long()
    torch.manual_seed(seed)
    generator = torch.Generator().manual_seed(seed)
    judge = Judge().train()
    steps = epochs * (len(pixels) // batch_size)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=learning_rate, weight_decay=0.05)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, learning_rate, total_steps=steps)
    loss_of = nn.CrossEntropyLoss(ignore_index=NO_LABEL)
    with tqdm(total=steps, mininterval=5) as bar:
        for _ in range(epochs):
            order = torch.randperm(len(pixels), generator=generator)
            for start in range(0, len(pixels) - batch_size + 1, batch_size):
                chosen = order[start : start + batch_size]
                logits = judge(augment(pixels[chosen], generator))
                loss = sum(
                    (loss_of(logits[name], labels[chosen, i]) for i, name in enumerate(ATTRIBUTES)),
                    start=torch.zeros(()),
                )
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                schedule.step()
                bar.update()
                bar.set_postfix(loss=f"{loss.item():.3f}", refresh=False)
    return judge.eval()


def main() -> None:
    """Train, test, and write the judge and the test images as package data."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz and held_out.npz")
    parser.add_argument("--output", type=Path, required=True, help="folder of the package data")
    parser.add_argument("--epochs", type=int, default=8)
    parser.add_argument("--batch-size", type=int, default=128)
    parser.add_argument("--learning-rate", type=float, default=3e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    judge = train(
        arguments.data,
        epochs=arguments.epochs,
        batch_size=arguments.batch_size,
        learning_rate=arguments.learning_rate,
        seed=arguments.seed,
    ).bfloat16()
    arguments.output.mkdir(parents=True, exist_ok=True)
    save_file(judge.state_dict(), arguments.output / "judge.safetensors")
    judge.float()  # tested with the weights as they were stored

    held_out = np.load(arguments.data / "held_out.npz")
    images = held_out["images"]
    prompts = [prompt_of(portrait) for portrait in sample_portraits(len(images), 0, held_out=True)]
    score = judge.attribute_accuracy(images, prompts)
    logger.info("%d held-out real images: %s", score.count, json.dumps(dict(score.per_attribute), indent=2))
    logger.info("mean %.4f, all attributes %.4f", score.mean, score.all_attributes)
    np.savez_compressed(
        arguments.output / "held_out_images.npz", images=images[:TEST_IMAGES], prompts=prompts[:TEST_IMAGES]
    )


if __name__ == "__main__":
    main()
