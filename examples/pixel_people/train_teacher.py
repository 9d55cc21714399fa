# SPDX-License-Identifier: Apache-2.0
"""Train the pixel-people FluxPipeline from scratch: flow matching on pixels, text encoders trained along.

Resumes from the last checkpoint in ``--work`` by itself. Every step draws its batch from the seed and its own number,
so an interrupted run continues exactly where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from components import CLIP_LENGTH, T5_LENGTH, build_pipeline
from diffusers import FluxPipeline
from diffusers.training_utils import EMAModel
from make_dataset import NO_LABEL
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from tqdm import tqdm

from diffusers_ternary.demo.grammar import ATTRIBUTES, Portrait, caption, training_prompts


logger = logging.getLogger("train_teacher")
PATCH = 2


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    num_layers: int = 3
    num_single_layers: int = 6
    num_heads: int = 4
    steps: int = 6400
    batch_size: int = 32
    learning_rate: float = 2e-3
    warmup_steps: int = 100
    decay_fraction: float = 0.6
    weight_decay: float = 0.02
    ema_decay: float = 0.999
    seed: int = 0


class Trainee(nn.Module):
    """The trained parts of the pipeline in one module: prompt tokens and noisy patches in, velocity out."""

    def __init__(self, pipeline: FluxPipeline) -> None:
        super().__init__()
        self.transformer = pipeline.transformer
        self.text_encoder = pipeline.text_encoder
        self.text_encoder_2 = pipeline.text_encoder_2

    def forward(
        self,
        latents: torch.Tensor,
        timestep: torch.Tensor,
        clip_ids: torch.Tensor,
        t5_ids: torch.Tensor,
        image_positions: torch.Tensor,
    ) -> torch.Tensor:
        """Predict the velocity [B, 64, 12] the way FluxPipeline does (no attention masks, zero text positions)."""
        return self.transformer(
            hidden_states=latents,
            timestep=timestep,
            encoder_hidden_states=self.text_encoder_2(t5_ids)[0],
            pooled_projections=self.text_encoder(clip_ids).pooler_output,
            txt_ids=torch.zeros(t5_ids.shape[1], 3, device=latents.device),
            img_ids=image_positions,
            return_dict=False,
        )[0]


class Batches:
    """Random captioned batches; batch ``step`` depends on nothing but the seed and ``step``."""

    def __init__(self, path: Path, pipeline: FluxPipeline, recipe: Recipe) -> None:
        data = np.load(path)
        self.images = torch.from_numpy(data["images"])
        self.labels = data["labels"]
        self.pipeline, self.recipe = pipeline, recipe

    def portrait(self, index: int) -> Portrait:
        """The attributes of one training picture."""
        return Portrait(
            **{
                name: None if label == NO_LABEL else values[label]
                for (name, values), label in zip(ATTRIBUTES.items(), self.labels[index], strict=True)
            }
        )

    def draw(self, step: int) -> dict[str, torch.Tensor]:
        """Token ids, packed pixels [B, 64, 12] in [-1, 1], noise and timesteps t = sigmoid(N(0, 1))."""
        size = self.recipe.batch_size
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        rng = random.Random(f"captions {self.recipe.seed} {step}")
        indices = torch.randint(len(self.images), (size,), generator=generator)
        captions = [caption(self.portrait(int(index)), rng) for index in indices]
        pixels = self.images[indices].permute(0, 3, 1, 2).float() / 127.5 - 1.0  # [B, 3, 16, 16]
        height, width = pixels.shape[2:]
        clean = FluxPipeline._pack_latents(pixels, size, 3, height, width)  # [B, 64, 12]
        return {
            "clean": clean,
            "noise": torch.randn(clean.shape, generator=generator),
            "timestep": torch.randn(size, generator=generator).sigmoid(),
            "clip_ids": self._tokens(self.pipeline.tokenizer, captions, CLIP_LENGTH),
            "t5_ids": self._tokens(self.pipeline.tokenizer_2, captions, T5_LENGTH),
        }

    @staticmethod
    def _tokens(tokenizer, captions: list[str], length: int) -> torch.Tensor:
        return tokenizer(
            captions, padding="max_length", max_length=length, truncation=True, return_tensors="pt"
        ).input_ids


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last ``decay_fraction`` of the steps."""
    decay_steps = recipe.decay_fraction * recipe.steps
    return min(1.0, (step + 1) / recipe.warmup_steps, max(0.0, (recipe.steps - step) / decay_steps))


def export(pipeline: FluxPipeline, trainee: nn.Module, ema: EMAModel, folder: Path) -> None:
    """Write the averaged weights as a bfloat16 pipeline folder; the weights in training stay as they are."""
    ema.store(trainee.parameters())
    ema.copy_to(trainee.parameters())
    part = folder.with_name(folder.name + ".part")
    shutil.rmtree(part, ignore_errors=True)
    pipeline.save_pretrained(part)
    ema.restore(trainee.parameters())
    shutil.rmtree(folder, ignore_errors=True)
    FluxPipeline.from_pretrained(part, dtype=torch.bfloat16).save_pretrained(folder)
    shutil.rmtree(part)
    for config in (*folder.glob("*/config.json"), folder / "model_index.json"):
        written = json.loads(config.read_text())
        written.pop("_name_or_path", None)  # the temporary folder's name
        if written.get("_class_name") == "AutoencoderTiny":
            del written["block_out_channels"]  # AutoencoderTiny sets it itself, and warns when a file does
        config.write_text(json.dumps(written, indent=2) + "\n")


def train(data: Path, work: Path, output: Path, recipe: Recipe, *, checkpoint_every: int) -> None:
    """Run or resume the training and export the pipeline to ``output`` at every checkpoint."""
    set_seed(recipe.seed)
    pipeline = build_pipeline(
        training_prompts(4000, recipe.seed),
        num_layers=recipe.num_layers,
        num_single_layers=recipe.num_single_layers,
        num_heads=recipe.num_heads,
    )
    accelerator = Accelerator(mixed_precision="bf16", step_scheduler_with_optimizer=False)
    trainee = Trainee(pipeline)
    optimizer = torch.optim.AdamW(
        trainee.parameters(), lr=recipe.learning_rate, betas=(0.9, 0.98), weight_decay=recipe.weight_decay
    )
    schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
    model, optimizer, schedule = accelerator.prepare(trainee, optimizer, schedule)
    ema = EMAModel(trainee.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)

    checkpoint, progress_file = work / "checkpoint", work / "progress.json"
    first = 0
    if progress_file.exists():
        progress = json.loads(progress_file.read_text())
        if progress["recipe"] != asdict(recipe):
            raise ValueError(f"{work} holds a run of another recipe: {progress['recipe']}; choose another --work.")
        accelerator.load_state(str(checkpoint))
        first = progress["step"]

    batches = Batches(data / "train.npz", pipeline, recipe)
    side = batches.images.shape[1] // PATCH
    positions = FluxPipeline._prepare_latent_image_ids(1, side, side, accelerator.device, torch.float32)
    # scaled_dot_product_attention's CPU flash kernel is slow backwards at 88 tokens; plain matmuls are 1.5x faster
    attention = sdpa_kernel(SDPBackend.MATH) if accelerator.device.type == "cpu" else contextlib.nullcontext()
    average = None
    with attention, tqdm(total=recipe.steps, initial=first, mininterval=10) as bar:
        for step in range(first, recipe.steps):
            batch = {name: value.to(accelerator.device) for name, value in batches.draw(step).items()}
            t = batch["timestep"][:, None, None]
            noisy = (1.0 - t) * batch["clean"] + t * batch["noise"]
            with accelerator.autocast():
                velocity = model(noisy, batch["timestep"], batch["clip_ids"], batch["t5_ids"], positions)
            loss = nn.functional.mse_loss(velocity.float(), batch["noise"] - batch["clean"])
            accelerator.backward(loss)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            ema.step(trainee.parameters())
            average = loss.item() if average is None else 0.98 * average + 0.02 * loss.item()
            bar.update()
            bar.set_postfix(loss=f"{average:.4f}", refresh=False)
            if (step + 1) % checkpoint_every == 0 or step + 1 == recipe.steps:
                accelerator.save_state(str(checkpoint))
                progress_file.write_text(json.dumps({"step": step + 1, "recipe": asdict(recipe)}))
                export(pipeline, trainee, ema, output)
                logger.info("step %d: loss %.4f", step + 1, average)


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, required=True, help="folder with train.npz")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints")
    parser.add_argument("--output", type=Path, required=True, help="folder of the exported pipeline")
    parser.add_argument("--steps", type=int, default=Recipe.steps)
    parser.add_argument("--checkpoint-every", type=int, default=500)
    parser.add_argument("--threads", type=int, default=1, help="more than one is slower at this model size")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(arguments.threads)
    arguments.work.mkdir(parents=True, exist_ok=True)
    train(
        arguments.data,
        arguments.work,
        arguments.output,
        Recipe(steps=arguments.steps),
        checkpoint_every=arguments.checkpoint_every,
    )


if __name__ == "__main__":
    main()
