# SPDX-License-Identifier: Apache-2.0
"""Draw the benchmark's prompts with a teacher and let the judge score them: one row per seed, one column per task."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import torch
from contact_sheet import sheet
from diffusers import DiffusionPipeline, FluxPipeline
from PIL import Image

from diffusers_ternary.evaluation.geneval import aggregate, score
from diffusers_ternary.evaluation.scenes.detector import Detector, to_pictures
from diffusers_ternary.evaluation.scenes.prompts import benchmark_tasks


logger = logging.getLogger("score_teacher")


def generate(
    pipeline: DiffusionPipeline, prompts: list[str], *, seed: int, steps: int, guidance: float, batch_size: int
) -> list[Image.Image]:
    """One picture per prompt, 64 x 64, with noise of its own."""
    is_flux = isinstance(pipeline, FluxPipeline)
    call = (
        {"true_cfg_scale": guidance, "guidance_scale": 0.0}
        if is_flux
        else {"guidance_scale": guidance, "use_resolution_binning": False, "complex_human_instruction": None}
    )
    images: list[Image.Image] = []
    for start in range(0, len(prompts), batch_size):
        part = prompts[start : start + batch_size]
        images += pipeline(
            part,
            negative_prompt=[""] * len(part) if is_flux else "",
            height=64,
            width=64,
            num_inference_steps=steps,
            max_sequence_length=pipeline.tokenizer.model_max_length,
            generator=[torch.Generator().manual_seed(seed * 1_000_003 + start + k) for k in range(len(part))],
            **call,
        ).images
        logger.info("%d of %d pictures", len(images), len(prompts))
    return images


def main() -> None:
    """Command line of the scoring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--teacher", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--judge", type=Path, required=True, help="judge.safetensors")
    parser.add_argument("--output", type=Path, help="JSON file of the scores")
    parser.add_argument("--sheet", type=Path, help="PNG file of the first pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=553)
    parser.add_argument("--steps", type=int, default=16)
    parser.add_argument("--guidance", type=float, default=3.0)
    parser.add_argument("--batch-size", type=int, default=48)
    parser.add_argument("--seen", action="store_true", help="prompts of combinations that training drew")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    detector = Detector.from_file(arguments.judge)
    pipeline = DiffusionPipeline.from_pretrained(arguments.teacher, dtype=torch.bfloat16)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for seed in arguments.seeds:
        tasks = benchmark_tasks(arguments.count, seed, held_out=not arguments.seen)
        prompts = [task.prompt for task in tasks]
        images = generate(
            pipeline,
            prompts,
            seed=seed,
            steps=arguments.steps,
            guidance=arguments.guidance,
            batch_size=arguments.batch_size,
        )
        pictures = to_pictures(images)
        verdicts = [score(task, found) for task, found in zip(tasks, detector.detect(pictures), strict=True)]
        scores = aggregate(zip(tasks, verdicts, strict=True))
        results[f"seed {seed}"] = {**scores.per_task, "overall": scores.overall}
        if arguments.sheet and seed == arguments.seeds[0]:
            captions = [
                f"{task.prompt.removeprefix('a photo of ')}{'' if verdict else ' - ' + verdict.reasons[0]}"
                for task, verdict in zip(tasks[:48], verdicts, strict=False)
            ]
            sheet(pictures[:48], captions, columns=12).save(arguments.sheet)
    for name, values in results.items():
        print(name, "  ".join(f"{task} {100 * value:.1f}" for task, value in values.items()))
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
