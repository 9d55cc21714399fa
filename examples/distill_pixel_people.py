# SPDX-License-Identifier: Apache-2.0
"""Distills the embedded pixel-people pipeline on one core, and judges the result on prompts it was not trained on.

python examples/distill_pixel_people.py                            # every code trained
python examples/distill_pixel_people.py --mode scales --updates 120  # scales, biases and norms only
python examples/distill_pixel_people.py --mode control             # biases and norms only: what do the codes add?
"""

import argparse
import json
import pathlib

import torch

from diffusers_ternary.demo import DEMO_CALL, demo_pipeline, held_out_prompts, training_prompts
from diffusers_ternary.demo.run import judge_scorer
from diffusers_ternary.demo.variants import STUDENTS, Variant, find_variant, stored_size
from diffusers_ternary.distillation import DistillConfig, distill
from diffusers_ternary.evaluation import compare, observe_teacher
from diffusers_ternary.rollouts import Rollouts


CONTROL = {"mode": "scales", "train_scales": False}  # codes and scales stay as calibration left them
RECIPE = {"batch_size": 16, "timesteps": "schedule", "rollout_fraction": 0.5}  # the eight timesteps of the pipeline


def parse() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--mode", default="full", choices=["scales", "blockwise", "full", "lora", "control"])
    parser.add_argument("--updates", type=int, default=700)
    parser.add_argument("--seed", type=int, default=0, help="of training prompts, held-out prompts and all noise")
    parser.add_argument("--prompts", type=int, default=2048, help="training prompts")
    parser.add_argument("--images", type=int, default=256, help="held-out prompts to judge, one image each")
    parser.add_argument("--output", type=pathlib.Path, default=None, help="folder of the run; it is resumed")
    return parser.parse_args()


def judge(distilled: Variant, *, seed: int, images: int) -> dict[str, dict[str, float]]:
    """Scores of teacher, rounded, calibrated and distilled, on other prompts and noise than training saw."""
    noise = range(10_000 * (seed + 1), 10_000 * (seed + 1) + images)
    rollouts = Rollouts(tuple(held_out_prompts(images, 300 + seed)), tuple(noise), DEMO_CALL, 32)
    run = observe_teacher(demo_pipeline(), rollouts, scorers={"judge": judge_scorer()}, velocity_prompts=64)
    rows: dict[str, dict[str, float]] = {"teacher": dict(run.scores)}
    for variant in (*STUDENTS, distilled):
        student = variant.load(torch.float32)
        result = compare(student, run)
        assert result.velocity is not None
        rows[variant.name] = {
            **{name: pair.student for name, pair in result.scores.items()},
            "psnr_db": result.psnr_db,
            "velocity_nmse": result.velocity.overall,
            "bits_per_weight": stored_size(student.transformer).bits_per_weight,
        }
    return rows


def main() -> None:
    """Distills, judges, prints."""
    arguments = parse()
    torch.set_num_threads(1)  # the model is small: one thread is fastest
    output = arguments.output or pathlib.Path(f"pixel_people_{arguments.mode}_{arguments.seed}")
    options = CONTROL if arguments.mode == "control" else {"mode": arguments.mode}
    student = distill(
        demo_pipeline(),
        training_prompts(arguments.prompts, 500 + arguments.seed),
        distill_config=DistillConfig(
            updates=arguments.updates, seed=arguments.seed, call_kwargs=dict(DEMO_CALL), **RECIPE, **options
        ),
        output_dir=output,
        student=find_variant("calibrated").load(torch.float32),
        held_out_prompts=held_out_prompts(32, 700 + arguments.seed),
    )
    distilled = Variant(arguments.mode, lambda dtype: student, "distilled here")
    scores = json.dumps(judge(distilled, seed=arguments.seed, images=arguments.images), indent=2)
    (output / "scores.json").write_text(scores + "\n", encoding="utf-8")
    print(scores)


if __name__ == "__main__":
    main()
