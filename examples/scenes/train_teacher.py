# SPDX-License-Identifier: Apache-2.0
"""Train a teacher of Scenes from nothing: flow matching on latents of scenes drawn on the fly, text encoders as well.

Runs on a GPU or on one CPU core, from the files of this folder and the autoencoder alone. Resumes from the last
checkpoint in ``--work`` by itself. Every step draws its batch from the seed and its own number, so an interrupted run
continues exactly where it stopped.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import logging
import random
import shutil
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from accelerate import Accelerator
from accelerate.utils import set_seed
from components import (
    LATENT_CHANNELS,
    LATENT_SIDE,
    UNNAMED,
    FluxTrainee,
    SanaTrainee,
    build_flux,
    build_sana,
    noun_labels,
    token_ids,
)
from diffusers import AutoencoderTiny, DiffusionPipeline
from diffusers.training_utils import EMAModel
from renderer import CANVAS, NOTHING, Layout, Renderer, Sprites, close_up_of, layout_of
from storage import save_pipeline, store_in_float8
from torch import nn
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.utils.data import DataLoader, Dataset
from transformers import PreTrainedTokenizerBase

from diffusers_ternary.evaluation.geneval import TASKS
from diffusers_ternary.evaluation.scenes.prompts import COMPOSED, training_task


logger = logging.getLogger("train_teacher")
CLOSE_UP_TASKS = ("single_object", "colors", "colors")
MIXTURE = dict(zip((*TASKS, COMPOSED), (5, 22, 18, 5, 20, 18, 12), strict=True))  # percent of the pictures


@dataclass(frozen=True)
class Recipe:
    """Everything that decides the result."""

    architecture: str = "flux"  # or "sana"
    width: int = 256
    num_layers: int = 3
    num_single_layers: int = 6  # of flux
    steps: int = 10_000
    decay_steps: int = 1_500
    batch_size: int = 48
    optimizer: str = "muon"
    learning_rate: float = 1.5e-3
    warmup_steps: int = 100
    weight_decay: float = 0.02
    ema_decay: float = 0.99
    no_caption: float = 0.1
    timestep_mean: float = 0.6
    content_weight: float = 1.0
    language_weight: float = 0.5
    grounding_weight: float = 0.2
    close_ups: float = 0.5  # of the steps, as long as there are any
    close_up_steps: int = 3_000
    seed: int = 0


def is_close_up(step: int, recipe: Recipe) -> bool:
    """Whether a step draws single objects that fill a small canvas.

    What each word looks like is learned there at a quarter of the price, before scenes ask for several at once: the
    training at low resolution that large models begin with.
    """
    drawn = random.Random(f"close-up {recipe.seed} {step}").random()
    return step < recipe.close_up_steps and drawn < recipe.close_ups


class Batches(Dataset):
    """Captioned layouts with noise and timesteps; batch ``step`` depends on nothing but the seed and ``step``."""

    def __init__(
        self, tokenizers: Sequence[PreTrainedTokenizerBase], sprites: Sprites, recipe: Recipe, first: int, last: int
    ) -> None:
        self.tokenizers, self.sprites, self.recipe = tokenizers, sprites, recipe
        self.first, self.last = first, last

    def __len__(self) -> int:
        return self.last - self.first

    def __getitem__(self, index: int) -> dict[str, torch.Tensor]:
        """One batch: objects, background, ids, noise [B, 4, side, side] and t = sigmoid(N(``timestep_mean``, 1))."""
        step, size = self.first + index, self.recipe.batch_size
        rng = random.Random(f"scenes {self.recipe.seed} {step}")
        generator = torch.Generator().manual_seed(self.recipe.seed * 1_000_003 + step)
        if is_close_up(step, self.recipe):
            size *= 2  # a quarter of the image tokens: twice as many pictures cost less
            tasks = [training_task(rng.choice(CLOSE_UP_TASKS), rng) for _ in range(size)]
            layout = close_up_of(tasks, self.sprites, rng)
        else:
            tags = rng.choices(tuple(MIXTURE), tuple(MIXTURE.values()), k=size)
            tasks = [training_task(tag, rng) for tag in tags]
            layout = layout_of(tasks, self.sprites, rng, training=True)
        side = layout.canvas * LATENT_SIDE // CANVAS
        captions = ["" if rng.random() < self.recipe.no_caption else task.prompt for task in tasks]
        ids = token_ids(self.tokenizers, captions)
        nouns, names = noun_labels(ids[:, -1], tasks, self.tokenizers[-1])
        return {
            "objects": layout.objects,
            "background": layout.background,
            "ids": ids,
            "nouns": nouns,
            "names": names,
            "noise": torch.randn(size, LATENT_CHANNELS, side, side, generator=generator),
            "timestep": (torch.randn(size, generator=generator) + self.recipe.timestep_mean).sigmoid(),
        }


class Encoder:
    """Layouts in, normalized latents out."""

    def __init__(self, vae: AutoencoderTiny, sprites: Sprites, device: torch.device) -> None:
        self.vae = vae.to(device, memory_format=torch.channels_last)
        self.renderer = Renderer(sprites, device)

    @torch.no_grad()
    def encode(self, layout: Layout) -> torch.Tensor:
        """float32 [B, 4, canvas / 4, canvas / 4] with mean 0 and standard deviation 1."""
        pictures = self.renderer.draw(layout).contiguous(memory_format=torch.channels_last)
        latents = self.vae.encode(pictures).latents.float()
        return (latents - self.vae.config.shift_factor) * self.vae.config.scaling_factor


def build(vae: AutoencoderTiny, recipe: Recipe) -> tuple[DiffusionPipeline, FluxTrainee | SanaTrainee]:
    """The untrained pipeline of a recipe, and its trained parts."""
    if recipe.architecture == "sana":
        pipeline = build_sana(vae, width=recipe.width, num_layers=recipe.num_layers)
        return pipeline, SanaTrainee(pipeline)
    pipeline = build_flux(
        vae, width=recipe.width, num_layers=recipe.num_layers, num_single_layers=recipe.num_single_layers
    )
    return pipeline, FluxTrainee(pipeline)


def learning_rate_factor(step: int, recipe: Recipe) -> float:
    """Linear warm-up, constant, then linear decay to zero over the last ``decay_steps``."""
    return min(1.0, (step + 1) / recipe.warmup_steps, max(0.0, (recipe.steps - step) / recipe.decay_steps))


def build_optimizers(trainee: nn.Module, recipe: Recipe) -> list[torch.optim.Optimizer]:
    """Muon (Jordan et al., 2024) for the matrices of the transformer's blocks, AdamW for everything else."""
    hidden, other = [], []
    for name, parameter in trainee.named_parameters():
        in_block = name.startswith("transformer.") and "blocks." in name and parameter.ndim == 2
        (hidden if in_block and recipe.optimizer == "muon" else other).append(parameter)
    decay, rate = recipe.weight_decay, recipe.learning_rate
    optimizers: list[torch.optim.Optimizer] = [
        torch.optim.AdamW(other, lr=rate, betas=(0.9, 0.98), weight_decay=decay, fused=True)
    ]
    if hidden:
        optimizers.append(torch.optim.Muon(hidden, lr=rate, weight_decay=decay, adjust_lr_fn="match_rms_adamw"))
    return optimizers


def content_loss(
    classes: torch.Tensor, colors: torch.Tensor, content: tuple[torch.Tensor, torch.Tensor]
) -> torch.Tensor:
    """Cross-entropy of ``ContentHead``'s logits against what each token shows in truth, mean over tokens."""
    terms = (
        -(truth * named.float().log_softmax(-1)).sum(-1).mean()
        for named, truth in zip((classes, colors), content, strict=True)
    )
    return torch.stack(tuple(terms)).sum()


def language_loss(fields: Sequence[torch.Tensor], labels: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of ``LanguageHead``'s logits against ``noun_labels``, mean over nouns; 0 where there are none."""
    nouns = (labels[..., 0] != UNNAMED).sum().clamp(min=1)
    terms = (
        nn.functional.cross_entropy(logits.float().flatten(0, 1), label.flatten(), reduction="sum")
        for logits, label in zip(fields, labels.unbind(-1), strict=True)
    )
    return torch.stack(tuple(terms)).sum() / nouns


def grounding_loss(lookups: Sequence[torch.Tensor], owners: torch.Tensor, names: torch.Tensor) -> torch.Tensor:
    """Cross-entropy of attention over the text against the noun that names a patch's object, mean over such patches.

    Args:
        lookups: Logits [B, patches, text tokens] of each head.
        owners: int64 [B, patches] of ``Renderer.owners``.
        names: int64 [B, objects] of ``noun_labels``.
    """
    truth = names.gather(1, owners.clamp(min=0)).masked_fill(owners == NOTHING, UNNAMED)
    terms = (
        nn.functional.cross_entropy(
            logits.float().flatten(0, 1), truth.flatten(), ignore_index=UNNAMED, reduction="sum"
        )
        for logits in lookups
    )
    return torch.stack(tuple(terms)).sum() / (truth != UNNAMED).sum().clamp(min=1)


def export(pipeline: DiffusionPipeline, trainee: nn.Module, ema: EMAModel, folder: Path, *, float8: bool) -> None:
    """Write the averaged weights as a bfloat16 pipeline folder; the weights in training stay as they are."""
    ema.store(trainee.parameters())
    ema.copy_to(trainee.parameters())
    part, stored = folder.with_name(folder.name + ".part"), folder.with_name(folder.name + ".new")
    for left_over in (part, stored):
        shutil.rmtree(left_over, ignore_errors=True)
    pipeline.save_pretrained(part)
    ema.restore(trainee.parameters())
    save_pipeline(type(pipeline).from_pretrained(part, dtype=torch.bfloat16), stored)
    shutil.rmtree(part)
    if float8:
        store_in_float8(stored)
    shutil.rmtree(folder, ignore_errors=True)
    stored.rename(folder)


def compile_parts(transformer: nn.Module, *, on_cpu: bool) -> None:
    """Compile the blocks in place; of Flux's double-stream blocks only the parts that compile correctly on a CPU.

    With torch 2.13 a whole double-stream block under bfloat16 autocast has NaN gradients of its image keys on a CPU.
    """
    for blocks in transformer.children():
        if not isinstance(blocks, nn.ModuleList):
            continue
        for block in blocks:
            whole = not (on_cpu and type(block).__name__ == "FluxTransformerBlock")
            parts = [block] if whole else [block.norm1, block.norm1_context, block.ff, block.ff_context]
            for part in parts:
                part.compile(fullgraph=True, dynamic=False)  # two sizes of canvas


class Checkpoints:
    """Folders ``checkpoint-<step>`` in the work folder; ``progress.json`` names the one that is complete."""

    def __init__(self, work: Path, recipe: Recipe) -> None:
        work.mkdir(parents=True, exist_ok=True)
        self.work, self.recipe = work, recipe
        self.progress_file = work / "progress.json"

    def load(self, accelerator: Accelerator) -> dict[str, float]:
        """Restore the last checkpoint, if there is one: the step to go on with and the CPU seconds spent."""
        if not self.progress_file.exists():
            return {"step": 0, "cpu_seconds": 0.0}
        progress = json.loads(self.progress_file.read_text())
        step, stored = progress["step"], Recipe(**progress["recipe"])
        # The end may be moved as long as the decay towards it has not begun.
        begun = any(step > recipe.steps - recipe.decay_steps for recipe in (stored, self.recipe))
        same = replace(stored, steps=self.recipe.steps, decay_steps=self.recipe.decay_steps) == self.recipe
        if stored != self.recipe and (begun or not same):
            raise ValueError(
                f"{self.work} holds a run of another recipe at step {step}: {stored}; choose another --work."
            )
        accelerator.load_state(str(self.work / f"checkpoint-{step}"))
        return progress

    def save(self, accelerator: Accelerator, step: int, cpu_seconds: float) -> None:
        """Write a checkpoint, then name it, then remove the one before it."""
        accelerator.save_state(str(self.work / f"checkpoint-{step}"))
        written = self.progress_file.with_suffix(".part")
        written.write_text(
            json.dumps({"step": step, "cpu_seconds": round(cpu_seconds, 1), "recipe": asdict(self.recipe)}, indent=2)
        )
        written.replace(self.progress_file)
        for folder in self.work.glob("checkpoint-*"):
            if folder.name != f"checkpoint-{step}":
                shutil.rmtree(folder)


def train(
    vae_folder: Path,
    work: Path,
    recipe: Recipe,
    *,
    checkpoint_every: int,
    stop_at: int | None = None,
    compile_blocks: bool = False,
    float8: bool = False,
) -> DiffusionPipeline:
    """Run or resume the training; the averaged weights are in ``work/teacher`` at every checkpoint.

    Args:
        vae_folder: The trained autoencoder.
        work: Folder for the checkpoints, the log of losses and the pipeline.
        recipe: What to train, and how.
        checkpoint_every: Steps between checkpoints.
        stop_at: Stop before this step as if interrupted there, after writing a checkpoint.
        compile_blocks: Compile the transformer's blocks: minutes at the start, 1.3 times the speed on a CPU. Rounds
            differently, so a resumed run repeats an uninterrupted one exactly only if both do the same.
        float8: Round the exported transformer to float8_e4m3fn, half the size; the training goes on in float32.
    """
    set_seed(recipe.seed)
    vae = AutoencoderTiny.from_pretrained(vae_folder).eval().requires_grad_(False)
    pipeline, trainee = build(vae, recipe)
    accelerator = Accelerator(mixed_precision="bf16", step_scheduler_with_optimizer=False)
    if compile_blocks:
        compile_parts(trainee.transformer, on_cpu=accelerator.device.type == "cpu")
    optimizers = build_optimizers(trainee, recipe)
    schedules = [
        torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: learning_rate_factor(step, recipe))
        for optimizer in optimizers
    ]
    model, *prepared = accelerator.prepare(trainee, *optimizers, *schedules)
    optimizers, schedules = prepared[: len(optimizers)], prepared[len(optimizers) :]
    ema = EMAModel(trainee.parameters(), decay=recipe.ema_decay)
    ema.to(accelerator.device)
    accelerator.register_for_checkpointing(ema)
    checkpoints = Checkpoints(work, recipe)
    progress = checkpoints.load(accelerator)
    first, spent = int(progress["step"]), progress["cpu_seconds"] - time.process_time()

    sprites = Sprites()
    encoder = Encoder(vae, sprites, accelerator.device)
    last = recipe.steps if stop_at is None else min(stop_at, recipe.steps)
    on_cpu = accelerator.device.type == "cpu"
    batches = DataLoader(
        Batches(trainee.tokenizers, sprites, recipe, first, last), batch_size=None, num_workers=0 if on_cpu else 12
    )
    # scaled_dot_product_attention's CPU flash kernel is slower than plain matmuls at 82 tokens
    attention = sdpa_kernel(SDPBackend.MATH) if on_cpu else contextlib.nullcontext()
    losses: list[torch.Tensor] = []  # of whole scenes
    with attention, (work / "losses.csv").open("a") as log:
        for step, host in enumerate(batches, first):
            batch = {name: value.to(accelerator.device, non_blocking=True) for name, value in host.items()}
            t = batch["timestep"][:, None, None, None]
            side = batch["noise"].shape[-1]
            layout = Layout(batch["objects"], batch["background"], side * CANVAS // LATENT_SIDE)
            with accelerator.autocast():
                clean = encoder.encode(layout)
                noisy = (1.0 - t) * clean + t * batch["noise"]
                velocity = model(noisy, batch["timestep"], batch["ids"])
                named, said, lookups = trainee.content(), trainee.language(), trainee.lookups()
            loss = nn.functional.mse_loss(velocity.float(), batch["noise"] - clean)
            shown = content_loss(*named, encoder.renderer.content(layout, side // 2))
            read = language_loss(said, batch["nouns"])
            found = grounding_loss(lookups, encoder.renderer.owners(layout, side // 2), batch["names"])
            helpers = recipe.content_weight * shown + recipe.language_weight * read + recipe.grounding_weight * found
            accelerator.backward(loss + helpers)
            accelerator.clip_grad_norm_(model.parameters(), 1.0)
            for part in (*optimizers, *schedules):
                part.step()
            for optimizer in optimizers:
                optimizer.zero_grad()
            ema.step(trainee.parameters())
            if layout.canvas == CANVAS:
                losses.append(loss.detach())
            if (step + 1) % 50 == 0 and losses:
                average = torch.stack(losses).mean().item()
                log.write(f"{step + 1},{average:.5f},{spent + time.process_time():.0f}\n")
                log.flush()
                losses.clear()
            if (step + 1) % checkpoint_every == 0 or step + 1 == last:
                if not loss.isfinite():  # and so are the weights: keep the checkpoint before
                    raise FloatingPointError(f"The loss of step {step + 1} is {loss.item()}; nothing was written.")
                checkpoints.save(accelerator, step + 1, spent + time.process_time())
                export(pipeline, trainee, ema, work / "teacher", float8=float8)
                logger.info("step %d, %.0f CPU seconds", step + 1, spent + time.process_time())
    return pipeline


def main() -> None:
    """Command line of the training."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--vae", type=Path, required=True, help="folder of train_vae.py")
    parser.add_argument("--work", type=Path, required=True, help="folder for checkpoints, losses and the pipeline")
    parser.add_argument("--checkpoint-every", type=int, default=200)
    parser.add_argument(
        "--compile", action="store_true", help="compile the blocks: a slow start, then 1.3 times faster"
    )
    parser.add_argument(
        "--float8", action="store_true", help="export weights rounded to float8_e4m3fn: half the size, other weights"
    )
    for name, default in asdict(Recipe()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=type(default), default=default)
    arguments = vars(parser.parse_args())
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    recipe = Recipe(**{name: arguments[name] for name in asdict(Recipe())})
    train(
        arguments["vae"],
        arguments["work"],
        recipe,
        checkpoint_every=arguments["checkpoint_every"],
        compile_blocks=arguments["compile"],
        float8=arguments["float8"],
    )


if __name__ == "__main__":
    main()
