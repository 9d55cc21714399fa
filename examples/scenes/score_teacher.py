# SPDX-License-Identifier: Apache-2.0
"""Draw the benchmark's prompts with a teacher and let the judge score them: one row per seed, one column per task.

    python score_teacher.py --teacher work/flux/teacher --judge work/judge/judge.safetensors
    python score_teacher.py ... --seen --seeds 1000 --count 102 --steps 8 12 16 --guidance 1 2 3   # choose the call

The call is chosen on prompts that training drew (``--seen``), which the benchmark never asks for.
"""

from __future__ import annotations

import argparse
import itertools
import json
import logging
import time
from pathlib import Path

import torch
from contact_sheet import sheet
from diffusers import DiffusionPipeline
from PIL import Image
from torch.nn.attention import SDPBackend, sdpa_kernel

from diffusers_ternary.evaluation.geneval import aggregate, score
from diffusers_ternary.evaluation.scenes.call import GUIDANCE, STEPS, scenes_call
from diffusers_ternary.evaluation.scenes.detector import Detector, to_pictures
from diffusers_ternary.evaluation.scenes.prompts import benchmark_tasks
from diffusers_ternary.rollouts import Rollouts, draw_images, prepared


logger = logging.getLogger("score_teacher")


def generate(
    pipeline: DiffusionPipeline, prompts: list[str], *, seed: int, steps: int, guidance: float, batch_size: int
) -> list[Image.Image]:
    """One picture per prompt, 64 x 64, with noise of its own."""
    call = scenes_call(pipeline, steps=steps, guidance=guidance)
    seeds = tuple(range(seed * 1_000_003, seed * 1_000_003 + len(prompts)))
    images: list[Image.Image] = []
    with prepared(pipeline), sdpa_kernel(SDPBackend.MATH):  # at 82 tokens plain products are the fastest on a CPU
        for batch in Rollouts(tuple(prompts), seeds, call, batch_size).batches():
            images += draw_images(pipeline, batch, call)
            logger.info("%d of %d pictures", len(images), len(prompts))
    return images


def main() -> None:
    """Command line of the scoring."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, required=True, help="pipeline folder")
    parser.add_argument("--judge", type=Path, required=True, help="judge.safetensors")
    parser.add_argument("--output", type=Path, help="JSON file of the scores")
    parser.add_argument("--sheet", type=Path, help="PNG file of the first pictures")
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("--count", type=int, default=553)
    parser.add_argument("--steps", type=int, nargs="+", default=[STEPS])
    parser.add_argument("--guidance", type=float, nargs="+", default=[GUIDANCE], help="1 = none, half the time")
    parser.add_argument("--batch-size", type=int, default=64)
    parser.add_argument("--seen", action="store_true", help="prompts of combinations that training drew")
    arguments = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    torch.set_flush_denormal(True)
    detector = Detector.from_file(arguments.judge)
    pipeline = DiffusionPipeline.from_pretrained(arguments.teacher, dtype=torch.bfloat16)
    pipeline.to("cuda" if torch.cuda.is_available() else "cpu")
    results = {}
    for seed, steps, guidance in itertools.product(arguments.seeds, arguments.steps, arguments.guidance):
        tasks = benchmark_tasks(arguments.count, seed, held_out=not arguments.seen)
        prompts = [task.prompt for task in tasks]
        start = time.process_time()
        images = generate(
            pipeline, prompts, seed=seed, steps=steps, guidance=guidance, batch_size=arguments.batch_size
        )
        seconds = (time.process_time() - start) / len(images)
        pictures = to_pictures(images)
        verdicts = [score(task, found) for task, found in zip(tasks, detector.detect(pictures), strict=True)]
        scores = aggregate(zip(tasks, verdicts, strict=True))
        name = f"seed {seed}, {steps} steps, guidance {guidance:g}"
        results[name] = {**scores.per_task, "overall": scores.overall}
        values = "  ".join(f"{task} {100 * value:.1f}" for task, value in results[name].items())
        print(f"{name}: {values}  ({seconds:.3f} CPU seconds a picture)", flush=True)
        if arguments.sheet and len(results) == 1:
            captions = [
                f"{task.prompt.removeprefix('a photo of ')}{'' if verdict else ' - ' + verdict.reasons[0]}"
                for task, verdict in zip(tasks[:48], verdicts, strict=False)
            ]
            sheet(pictures[:48], captions, columns=12).save(arguments.sheet)
    if arguments.output:
        arguments.output.write_text(json.dumps(results, indent=2) + "\n")


if __name__ == "__main__":
    main()
