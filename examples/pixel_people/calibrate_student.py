# SPDX-License-Identifier: Apache-2.0
"""Makes the calibrated version of the embedded model that `diffusers-ternary demo` shows (a minute on one core).

    python examples/pixel_people/calibrate_student.py diffusers_ternary/demo/data/calibrated

Prompts only: none of the held-out combinations, no images, no training.
"""

import argparse
import pathlib

import torch

from diffusers_ternary import CalibrationConfig, TernaryConfig, calibrate
from diffusers_ternary.calibration import CalibrationReport
from diffusers_ternary.demo import DEMO_CALL, demo_pipeline, training_prompts


def _errors(report: CalibrationReport) -> tuple[list[float], list[float]]:
    return [layer.error_rounded for layer in report.layers], [layer.error for layer in report.layers]


def main() -> None:
    """Calibrates, stores what is not converted in bfloat16 like the teacher's file, and saves the transformer."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=pathlib.Path, help="folder for the transformer")
    parser.add_argument("--prompts", type=int, default=256, help="training prompts")
    parser.add_argument("--seed", type=int, default=0, help="of prompts and noise")
    arguments = parser.parse_args()

    torch.set_num_threads(1)  # the model is too small for more
    pipeline = demo_pipeline()
    pipeline, report = calibrate(
        pipeline,
        training_prompts(arguments.prompts, seed=arguments.seed),
        TernaryConfig(),
        CalibrationConfig(call_kwargs=dict(DEMO_CALL), batch_size=16, seed=arguments.seed),
        return_report=True,
    )
    for parameter in pipeline.transformer.parameters():
        if parameter.is_floating_point():
            parameter.data = parameter.data.bfloat16()
    # diffusers writes the folder it loaded from, which means nothing on another machine
    pipeline.transformer.register_to_config(_name_or_path="diffusers_ternary.demo_folder()")
    pipeline.transformer.save_pretrained(arguments.output)
    report.save_json(arguments.output / "calibration.json")
    before, after = (sum(errors) / len(report.layers) for errors in _errors(report))
    print(f"{report.bits_per_weight:.3f} bits per weight")
    print(f"mean relative error of the layers' outputs: {before:.4f} rounded, {after:.4f} calibrated")


if __name__ == "__main__":
    main()
