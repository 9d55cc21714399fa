# SPDX-License-Identifier: Apache-2.0
"""Score the packaged teacher on held-out attribute combinations, and the judge on real images of them."""

from __future__ import annotations

import argparse
import json
import logging
from pathlib import Path

import numpy as np
import torch

from diffusers_ternary.demo import DEMO_CALL, Judge, demo_pipeline, generate, held_out_prompts, real_images
from diffusers_ternary.demo.grammar import ATTRIBUTES, prompt_of, sample_portraits
from diffusers_ternary.demo.judge import AttributeAccuracy


logger = logging.getLogger("score_teacher")


def as_table(scores: dict[str, AttributeAccuracy]) -> str:
    """Markdown: one row per attribute, one column per entry of ``scores``, in percent."""
    lines = ["| attribute | " + " | ".join(scores) + " |", "|---" * (len(scores) + 1) + "|"]
    for name in ATTRIBUTES:
        values = (f"{100 * score.per_attribute[name]:.2f}" for score in scores.values())
        lines.append(f"| {name} | " + " | ".join(values) + " |")
    lines.append("| **mean** | " + " | ".join(f"{100 * score.mean:.2f}" for score in scores.values()) + " |")
    lines.append("| **all right** | " + " | ".join(f"{100 * s.all_attributes:.2f}" for s in scores.values()) + " |")
    return "\n".join(lines)


def main() -> None:
    """Command line of the scoring."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--data", type=Path, help="folder with held_out.npz: judge all its images, not only 512")
    parser.add_argument("--output", type=Path, required=True, help="JSON file of the scores")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=512)
    parser.add_argument("--steps", type=int, default=DEMO_CALL["num_inference_steps"])
    parser.add_argument("--cfg", type=float, default=DEMO_CALL["true_cfg_scale"])
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_num_threads(1)

    judge = Judge.from_package()
    if arguments.data:
        images = np.load(arguments.data / "held_out.npz")["images"]
        prompts = [prompt_of(portrait) for portrait in sample_portraits(len(images), 0, held_out=True)]
    else:
        real = real_images()
        images, prompts = real.images, list(real.prompts)
    scores = {f"real images ({len(images)})": judge.attribute_accuracy(images, prompts)}

    pipeline = demo_pipeline()
    pipeline.set_progress_bar_config(disable=True)
    for seed in arguments.seeds:
        prompts = held_out_prompts(arguments.count, seed)
        pictures = generate(
            pipeline,
            prompts,
            seed=seed,
            num_inference_steps=arguments.steps,
            true_cfg_scale=arguments.cfg,
        )
        scores[f"teacher, seed {seed}"] = judge.attribute_accuracy(pictures, prompts)
        logger.info("seed %d done", seed)
    print(as_table(scores))
    written = {
        name: {
            "per_attribute": dict(score.per_attribute),
            "mean": score.mean,
            "all_attributes": score.all_attributes,
            "count": score.count,
        }
        for name, score in scores.items()
    }
    arguments.output.write_text(json.dumps(written, indent=2) + "\n")


if __name__ == "__main__":
    main()
