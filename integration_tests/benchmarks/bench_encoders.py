# SPDX-License-Identifier: Apache-2.0
"""What low bits leave of the text encoders of Scenes: the embeddings, and the denoiser's output behind them.

    python integration_tests/benchmarks/bench_encoders.py                 # results/encoders.csv
    python integration_tests/benchmarks/bench_encoders.py --teacher FOLDER

Each way is calibrated on tuning prompts and measured on the benchmark's, which are held out. The denoiser stays float,
and gets noise at two timesteps. Errors are mean |a - b|² / mean |b|².
"""

import argparse
import csv
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from quality import attention, load_teacher
from quality_table import machine
from students import BATCH_SIZE, CALIBRATION, tuning_prompts

from diffusers_ternary import CalibrationConfig, TernaryConfig, calibrate, quantize
from diffusers_ternary.backend import bits_per_weight, packed_layers
from diffusers_ternary.calibration import SensitivityConfig
from diffusers_ternary.cli.quiet import quiet_hosts
from diffusers_ternary.evaluation import Scenes
from diffusers_ternary.evaluation.scenes.call import scenes_call
from diffusers_ternary.evaluation.scenes.files import scenes_file
from diffusers_ternary.rollouts import normalized_error


RESULTS = Path(__file__).parent / "results" / "encoders.csv"
ENCODERS = {"text_encoder_2": "T5", "text_encoder": "CLIP"}
TIMESTEPS = (1.0, 0.5)
TOKENS, CHANNELS = (8, 8), 16  # of the packed latents of 64 x 64 pixels
WAYS: Mapping[str, Mapping[str, Any] | str] = {
    "int8": "int8",
    "rounded": "ternary",
    "calibrated": {},
    "budget 3 bits": {"size_budget": "3 bits"},
    "budget 5 bits": {"size_budget": "5 bits"},
}


class Denoiser:
    """What the float denoiser makes of embeddings.

    Args:
        pipeline (`DiffusionPipeline`): a Flux teacher of Scenes.
        prompts (`list[str]`): held out.
    """

    def __init__(self, pipeline: DiffusionPipeline, prompts: list[str]) -> None:
        self._model, self._prompts = pipeline.transformer, prompts
        generator = torch.Generator().manual_seed(0)
        shape = len(prompts), TOKENS[0] * TOKENS[1], CHANNELS
        self._noise = torch.randn(shape, generator=generator).to(self._model.dtype)
        self._ids = pipeline._prepare_latent_image_ids(1, *TOKENS, "cpu", self._model.dtype)

    @torch.no_grad()
    def embed(self, pipeline: DiffusionPipeline) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
        """Embeddings of the tokens, pooled ones, and the tokens' ids."""
        length = pipeline.tokenizer.model_max_length
        return pipeline.encode_prompt(self._prompts, self._prompts, max_sequence_length=length)

    @torch.no_grad()
    def predict(self, tokens: torch.Tensor, pooled: torch.Tensor, ids: torch.Tensor) -> torch.Tensor:
        """Velocities at all timesteps."""
        with attention():
            made = [
                self._model(
                    hidden_states=self._noise[rows],
                    timestep=torch.full_like(self._noise[rows, 0, 0], timestep),
                    encoder_hidden_states=tokens[rows],
                    pooled_projections=pooled[rows],
                    txt_ids=ids,
                    img_ids=self._ids,
                    return_dict=False,
                )[0]
                for timestep in TIMESTEPS
                for rows in torch.arange(len(self._prompts)).split(16)
            ]
        return torch.cat(made)


def convert(
    pipeline: DiffusionPipeline, component: str, way: Mapping[str, Any] | str, prompts: int, work: Path
) -> float:
    """Converts one encoder of a pipeline in place; returns its bits per weight, of kept layers too."""
    if isinstance(way, str):
        quantize(pipeline, TernaryConfig(components={component: way}, activation_dtype="none"))
        layers = packed_layers(pipeline.components[component])
        return bits_per_weight({name: layer.spec for name, layer in layers.items()})
    sensitivity = SensitivityConfig(prompts=32, group_sizes=(64, 32), ranks=()) if way else None
    calibration = CalibrationConfig(
        batch_size=BATCH_SIZE, call_kwargs=scenes_call(pipeline), sensitivity=sensitivity, **way
    )
    config = TernaryConfig(components=[component], activation_dtype="none")
    calibrate(pipeline, tuning_prompts(prompts, CALIBRATION), config, calibration, work_dir=work / component)
    return pipeline.ternary_report.bits_per_weight


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--teacher", type=Path, help="folder of a Flux teacher of Scenes; default: the published one")
    parser.add_argument("--prompts", type=int, default=128, help="to calibrate on")
    parser.add_argument("--count", type=int, default=48, help="held-out prompts")
    parser.add_argument("--work", type=Path, default=Path(__file__).parents[2] / "runs" / "encoders")
    parser.add_argument("--output", type=Path, default=RESULTS)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    quiet_hosts()
    folder = arguments.teacher or scenes_file("flux")
    teacher = load_teacher(folder)
    denoiser = Denoiser(teacher, list(Scenes(count=arguments.count, seed=0).prompts))
    expected = denoiser.embed(teacher)
    velocities = denoiser.predict(*expected)
    rows = []
    for component, kind in ENCODERS.items():
        for name, way in WAYS.items():
            pipeline = load_teacher(folder)
            bits = convert(pipeline, component, way, arguments.prompts, arguments.work)
            made = denoiser.embed(pipeline)
            errors = [normalized_error([pair]) for pair in zip(made[:2], expected[:2], strict=True)]
            rows.append(
                {
                    "encoder": kind,
                    "way": name,
                    "bits_per_weight": round(bits, 3),
                    "embedding_nmse": f"{max(errors):.3g}",  # one of the two is not this encoder's, and stays
                    "velocity_nmse": f"{normalized_error([(denoiser.predict(*made), velocities)]):.3g}",
                }
            )
            print(rows[-1], flush=True)
    with arguments.output.open("w", newline="", encoding="utf-8") as file:
        file.write(f"# {arguments.count} held-out prompts; teacher {Path(folder).name}; {machine(())}\n")
        writer = csv.DictWriter(file, list(rows[0]), lineterminator="\n")
        writer.writeheader()
        writer.writerows(rows)


if __name__ == "__main__":
    main()
