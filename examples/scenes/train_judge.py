# SPDX-License-Identifier: Apache-2.0
"""Train the judge of Scenes, a detector, on scenes drawn on the fly, and test it on scenes of held-out prompts.

It sees every combination of class and color, and of classes: it is the ruler, not what is measured.
"""

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
from renderer import NOTHING, Layout, Renderer, Sprites, boxes_of, layout_of
from safetensors.torch import save_file
from torch import nn
from tqdm import tqdm
from train_vae import random_layout

from diffusers_ternary.evaluation.geneval import Task, aggregate, score
from diffusers_ternary.evaluation.judgement import BenchmarkScores
from diffusers_ternary.evaluation.scenes.detector import BOX_UNIT, Detector, cell_centers
from diffusers_ternary.evaluation.scenes.prompts import benchmark_tasks
from diffusers_ternary.evaluation.scenes.vocabulary import CLASSES


logger = logging.getLogger("train_judge")
SPOILED = 0.08  # share of objects drawn over by another silhouette: neither of both, so nothing is to be found there
_INSIDE, _OUTSIDE = 3.0, 6.0  # pixels from an object's center: up to the first a cell is it, from the second it is not


def spoil(layout: Layout, sprites: Sprites, rng: random.Random) -> tuple[Layout, Layout]:
    """What to draw (some objects twice, as two classes) and what to find (the others)."""
    objects = layout.objects
    drawn = torch.cat((objects, torch.full_like(objects, NOTHING)), 1)
    wanted = objects.clone()
    slots = objects.shape[1]
    for scene, slot in (objects[..., 0] != NOTHING).nonzero().tolist():
        if rng.random() < SPOILED:
            drawn[scene, slots + slot] = objects[scene, slot]
            kind = (int(objects[scene, slot, 0]) + rng.randrange(1, len(CLASSES))) % len(CLASSES)
            drawn[scene, slots + slot, 0] = kind
            wanted[scene, slot, 0] = NOTHING
    return Layout(drawn, layout.background), Layout(wanted, layout.background)


def augment(pictures: torch.Tensor, vae: AutoencoderTiny) -> torch.Tensor:
    """Rebuild a quarter from noisy latents; then blur, color shifts and noise: generated pictures are not clean."""
    size, device = len(pictures), pictures.device
    few = size // 4
    with torch.no_grad():
        latents = vae.encode(pictures[:few]).latents
        latents = latents + 0.2 * torch.rand(few, 1, 1, 1, device=device) * torch.randn_like(latents)
        pictures = torch.cat((vae.decode(latents).sample.float(), pictures[few:]))
    smooth = nn.functional.avg_pool2d(nn.functional.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, stride=1)
    pictures = torch.lerp(pictures, smooth, torch.rand(size, 1, 1, 1, device=device) ** 2)
    gain = 1.0 + 0.06 * torch.randn(size, 3, 1, 1, device=device).clamp(-2, 2)
    shift = 0.05 * torch.randn(size, 3, 1, 1, device=device).clamp(-2, 2)
    noise = 0.25 * torch.rand(size, 1, 1, 1, device=device) ** 3
    return (pictures * gain + shift + noise * torch.randn_like(pictures)).clamp(-1, 1)


def loss_of(detector: nn.Module, pictures: torch.Tensor, wanted: Layout, sprites: Sprites) -> torch.Tensor:
    """Presence everywhere; box, class and color on the cells near an object's center."""
    presence, boxes, kinds, colors = detector(pictures)
    truth = boxes_of(wanted, sprites).float()  # [B, objects, 4]
    there = wanted.objects[..., 0] != NOTHING
    middle = (truth[..., :2] + truth[..., 2:]) / 2  # [B, objects, 2]
    cells = cell_centers(pictures.device).flatten(1).T  # [cells, 2]
    distance = (cells[None, :, None] - middle[:, None]).norm(dim=-1)  # [B, cells, objects]
    distance = distance.masked_fill(~there[:, None], torch.inf)
    nearest, owner = distance.min(-1)  # [B, cells]
    inside = nearest < _INSIDE
    clear = inside | (nearest > _OUTSIDE)
    target = inside.float()
    each = nn.functional.binary_cross_entropy_with_logits(presence.flatten(1), target, reduction="none")
    loss = (each * clear).sum() / len(pictures) / 4
    scene, cell = inside.nonzero(as_tuple=True)
    mine = owner[scene, cell]
    at = [part.flatten(2)[scene, :, cell] for part in (boxes, kinds, colors)]
    loss = loss + nn.functional.smooth_l1_loss(at[0] / BOX_UNIT, truth[scene, mine] / BOX_UNIT, beta=0.1)
    loss = loss + nn.functional.cross_entropy(at[1], wanted.objects[scene, mine, 0])
    return loss + nn.functional.cross_entropy(at[2], wanted.objects[scene, mine, 1])


def train(
    vae: AutoencoderTiny, sprites: Sprites, *, steps: int, batch_size: int, learning_rate: float, seed: int
) -> Detector:
    """Train on scenes of up to nine objects of any class and color."""
    set_seed(seed)
    accelerator = Accelerator(mixed_precision="bf16")
    renderer = Renderer(sprites, accelerator.device)
    vae.to(accelerator.device)
    detector = Detector().to(memory_format=torch.channels_last)
    optimizer = torch.optim.AdamW(detector.parameters(), lr=learning_rate, weight_decay=0.02)
    schedule = torch.optim.lr_scheduler.LambdaLR(
        optimizer, lambda step: min(1.0, (step + 1) / 100) * 0.5 * (1 + math.cos(math.pi * min(1.0, step / steps)))
    )
    model, optimizer, schedule = accelerator.prepare(detector, optimizer, schedule)
    average = 0.0
    for step in tqdm(range(steps), mininterval=10):
        rng = random.Random(f"judge {seed} {step}")
        drawn, wanted = spoil(random_layout(batch_size, sprites, rng), sprites, rng)
        pictures = renderer.draw(drawn.to(accelerator.device))
        with accelerator.autocast():
            pictures = augment(pictures, vae).contiguous(memory_format=torch.channels_last)
            loss = loss_of(model, pictures, wanted.to(accelerator.device), sprites)
        accelerator.backward(loss)
        accelerator.clip_grad_norm_(model.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        optimizer.zero_grad()
        average += loss.item()
        if step % 100 == 99:
            logger.info("step %d: loss %.4f", step + 1, average / 100)
            average = 0.0
    return detector.to(device="cpu", memory_format=torch.contiguous_format).eval()


def judge_pictures(detector: Detector, pictures: torch.Tensor, tasks: list[Task]) -> BenchmarkScores:
    """GenEval's scores of pictures [n, 3, 64, 64] for their prompts."""
    detections = [found for part in pictures.split(64) for found in detector.detect(part)]
    return aggregate((task, score(task, found)) for task, found in zip(tasks, detections, strict=True))


def main() -> None:
    """Train, test with the weights as stored, write ``judge.safetensors`` and ``judge_scores.json``."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="folder of train_vae.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", type=int, default=1500, help="0: only test the judge that is in --output")
    parser.add_argument("--batch-size", type=int, default=32)
    parser.add_argument("--learning-rate", type=float, default=2e-3)
    parser.add_argument("--seed", type=int, default=0)
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    vae, sprites = AutoencoderTiny.from_pretrained(arguments.vae).eval(), Sprites()
    if arguments.steps:
        detector = train(
            vae,
            sprites,
            steps=arguments.steps,
            batch_size=arguments.batch_size,
            learning_rate=arguments.learning_rate,
            seed=arguments.seed,
        ).bfloat16()
        arguments.output.mkdir(parents=True, exist_ok=True)
        save_file(detector.state_dict(), arguments.output / "judge.safetensors")
    test(arguments.output, vae.cpu(), sprites)


def test(folder: Path, vae: AutoencoderTiny, sprites: Sprites) -> None:
    """Score held-out scenes as drawn, through the autoencoder, and against the prompts of other scenes."""
    detector = Detector.from_file(folder / "judge.safetensors")
    results: dict[str, dict[str, float]] = {}
    for seed in range(3):
        tasks = benchmark_tasks(553, seed)
        layout = layout_of(tasks, sprites, random.Random(f"test {seed}"), training=False)
        pictures = Renderer(sprites).draw(layout)
        with torch.no_grad():
            rebuilt = torch.cat([vae.decode(vae.encode(p).latents).sample.clamp(-1, 1) for p in pictures.split(64)])
        shifted = pictures.roll(6 * 7, 0)  # the same task, another prompt
        for name, shown in (("drawn", pictures), ("autoencoder", rebuilt), ("wrong pairs", shifted)):
            scores = judge_pictures(detector, shown, tasks)
            results[f"{name}, seed {seed}"] = {**scores.per_task, "overall": scores.overall}
    for name, values in results.items():
        logger.info("%-20s %s", name, "  ".join(f"{task} {100 * value:.1f}" for task, value in values.items()))
    (folder / "judge_scores.json").write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
