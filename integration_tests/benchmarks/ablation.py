# SPDX-License-Identifier: Apache-2.0
"""What each part of the calibration brings: the table of diffusers_ternary/calibration/METHODS.md.

    python integration_tests/benchmarks/ablation.py                       # the embedded pipeline, some minutes
    python integration_tests/benchmarks/ablation.py --teacher FOLDER      # a Scenes teacher
    python integration_tests/benchmarks/ablation.py --rows calibrated columns

The moments of the inputs are gathered once, over calibration prompts and over held-back ones, and kept in --work; then
every row solves the layers. Its numbers: stored bits; the error of the layers' outputs (mean over the layers of
E|W x - Ŵ x|² / E|W x|²) on both sets of prompts; that of the denoiser's output on held-back prompts and other noise,
with the weights in stock layers. The rows of budgets, end loss and sequential run `calibrate` as a whole; with end
loss the layers' error is what it does to the denoiser's output. Results go to
results/ablation_NAME.csv, one row at a time; a rerun makes what is missing. Seconds are CPU time of one thread.
"""

import argparse
import csv
import dataclasses
import statistics
import sys
import time
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from diffusers import DiffusionPipeline
from quality import identify, load_teacher
from quality_table import machine

from diffusers_ternary import CalibrationConfig, TernaryConfig, calibrate
from diffusers_ternary.backend import bits_per_weight, plan_pipeline
from diffusers_ternary.calibration import SensitivityConfig, SolverConfig
from diffusers_ternary.calibration.hessian import InputMoments, quadratic
from diffusers_ternary.calibration.sensitivity import TeacherStates, record_states
from diffusers_ternary.calibration.solver import SolvedLayer, solve_layer
from diffusers_ternary.calibration.statistics import collect_moments, find_groups
from diffusers_ternary.cli.quiet import quiet_hosts
from diffusers_ternary.demo import demo_pipeline
from diffusers_ternary.demo.grammar import held_out_prompts, training_prompts
from diffusers_ternary.demo.pipeline import DEMO_CALL
from diffusers_ternary.evaluation.scenes.call import scenes_call
from diffusers_ternary.evaluation.scenes.prompts import tuning_prompts
from diffusers_ternary.format import TernarySpec
from diffusers_ternary.rollouts import make_rollouts


RESULTS = Path(__file__).parent / "results"
WORK = Path(__file__).parents[2] / "runs" / "ablation"  # ignored by git
BATCH = 32
SEED = 1_000_000  # of the noise of the first calibration prompt
STATES = SensitivityConfig(prompts=16, steps=4)
WEIGHTS_ONLY = {"activation_dtype": "none"}
INT8_ONLY = SensitivityConfig(prompts=2, group_sizes=(), ranks=())  # what protected ends choose from
CALIBRATED = SolverConfig()
ROUNDED = SolverConfig(gptq=False, refit=False, descent_passes=0, starts=1)


@dataclasses.dataclass(frozen=True)
class Row:
    """One way to calibrate.

    Args:
        config (`TernaryConfig`), solver (`SolverConfig`): of every layer.
        correct_bias (`bool`): whether biases take over the mean of the error.
        settings (`Mapping[str, Any]`): of a `CalibrationConfig`; if there are any, `calibrate` runs as a whole.
    """

    config: TernaryConfig
    solver: SolverConfig = CALIBRATED
    correct_bias: bool = True
    settings: Mapping[str, Any] = dataclasses.field(default_factory=dict)


def rows(block: int) -> dict[str, Row]:
    """The rows by name; `block` is the size of the rotation."""
    plain, rotated = TernaryConfig(**WEIGHTS_ONLY), TernaryConfig(hadamard=block, **WEIGHTS_ONLY)
    finer = {"group_size": 64, **WEIGHTS_ONLY}
    scaled = SolverConfig(column_scales=True)
    budget = {"size_budget": "2.1 bits", "end_loss": False}
    # At widths of 128 and 256 a correction of rank 16 costs a bit per weight or more.
    measured = {**budget, "sensitivity": SensitivityConfig(prompts=2, ranks=())}
    sequential = {"sequential": True, "end_loss": False}
    return {
        "twn": Row(plain, ROUNDED, correct_bias=False),
        "gptq": Row(plain, dataclasses.replace(ROUNDED, gptq=True), correct_bias=False),
        "gptq, refit": Row(plain, SolverConfig(descent_passes=0, starts=1), correct_bias=False),
        "gptq, refit, descent": Row(plain, SolverConfig(starts=1), correct_bias=False),
        "gptq, refit, descent, starts": Row(plain, correct_bias=False),
        "calibrated": Row(plain),
        "columns": Row(plain, scaled),
        "rotated": Row(rotated),
        "rotated, columns": Row(rotated, scaled),
        "end loss": Row(plain, settings={"end_loss": True}),
        "end loss, rotated": Row(rotated, settings={"end_loss": True}),
        "end loss, rotated, columns": Row(rotated, scaled, settings={"end_loss": True}),
        "end loss, polish 500": Row(plain, SolverConfig(polish=500), settings={"end_loss": True}),
        "sequential": Row(plain, SolverConfig(compensation=0.0), settings=sequential),
        "sequential, compensated": Row(plain, settings=sequential),
        "sequential, compensated, end loss": Row(plain, settings={"sequential": True, "end_loss": True}),
        "group 64": Row(TernaryConfig(**finer)),
        "group 64, rotated": Row(TernaryConfig(hadamard=block, **finer)),
        "budget 2.1 bits, protected ends": Row(rotated, settings={**budget, "allocation": "protected_ends"}),
        "budget 2.1 bits, int8": Row(rotated, settings={**budget, "sensitivity": INT8_ONLY}),
        "budget 2.1 bits": Row(rotated, settings=measured),
    }


@dataclasses.dataclass(frozen=True)
class Bench:
    """What all rows share.

    Args:
        pipeline (`DiffusionPipeline`): the teacher, in float.
        prompts (`list[str]`): of the calibration.
        call (`dict[str, Any]`): arguments of the pipeline call.
        moments, held (`dict[str, InputMoments]`): of the inputs of each layer, over calibration and held-back prompts.
        states (`TeacherStates`): calls on held-back prompts.
    """

    pipeline: DiffusionPipeline
    prompts: list[str]
    call: dict[str, Any]
    moments: dict[str, InputMoments]
    held: dict[str, InputMoments]
    states: TeacherStates

    def measure(self, row: Row) -> dict[str, float]:
        """The numbers of a row; the teacher is as before afterward."""
        denoiser = self.pipeline.transformer
        before = {name: parameter.detach().clone() for name, parameter in denoiser.named_parameters()}
        start = time.process_time()
        try:
            if row.settings:
                return self._calibrate(row)
            layers = {name: self._solve(name, row) for name in self.moments}
            spent = time.process_time() - start
            errors = [layer.report.error for layer in layers.values()]
            held = [self._held_error(name, layer) for name, layer in layers.items()]
            for name, layer in layers.items():
                module = denoiser.get_submodule(name)
                module.weight.data = layer.weight.dequantize(module.weight.dtype).view_as(module.weight)
                if module.bias is not None:
                    module.bias.data = layer.bias(module.bias.data)
            specs = {name: layer.weight.spec for name, layer in layers.items()}
            return {
                "bits_per_weight": bits_per_weight(specs),
                "layer_error": statistics.fmean(errors),
                "layer_error_held": statistics.fmean(held),
                "velocity_nmse": self.states.error(denoiser),
                "columns": statistics.fmean(spec.column_scales for spec in specs.values()),
                "rotated": statistics.fmean(spec.hadamard > 0 for spec in specs.values()),
                "seconds": spent,
            }
        finally:
            if not row.settings:
                for name, parameter in denoiser.named_parameters():
                    parameter.data = before[name]

    def _solve(self, name: str, row: Row) -> SolvedLayer:
        module = self.pipeline.transformer.get_submodule(name)
        weight = module.weight.detach().float().flatten(1)
        spec = TernarySpec.for_matrix(*weight.shape, **row.config.spec_options)
        corrected = row.correct_bias and module.bias is not None
        return solve_layer(weight, self.moments[name], spec, config=row.solver, correct_bias=corrected, name=name)

    def _held_error(self, name: str, layer: SolvedLayer) -> float:
        """E|W x - Ŵ x - Δb|² / E|W x|² on the held-back prompts."""
        target = self.pipeline.transformer.get_parameter(f"{name}.weight").detach().float().flatten(1).T
        moments, error = self.held[name], target - layer.weight.dequantize().T
        value = quadratic(error, moments.second)
        if layer.bias_change is not None:
            change = layer.bias_change
            value += float(change.square().sum() - 2 * (moments.mean @ error) @ change)
        return value / quadratic(target, moments.second)

    def _calibrate(self, row: Row) -> dict[str, float]:
        start = time.process_time()
        student = copy_of(self.pipeline)
        settings = CalibrationConfig(
            solver=row.solver,
            correct_bias=row.correct_bias,
            seed=SEED,
            batch_size=BATCH,
            call_kwargs=self.call,
            **row.settings,
        )
        report = calibrate(student, self.prompts, row.config, settings).ternary_report
        spent = time.process_time() - start
        return {
            "bits_per_weight": report.bits_per_weight,
            "layer_error": statistics.fmean(layer.error for layer in report.layers),
            "layer_error_held": float("nan"),
            "velocity_nmse": self.states.error(student.transformer),
            "columns": statistics.fmean(layer.column_scales for layer in report.layers),
            "rotated": statistics.fmean(layer.hadamard > 0 for layer in report.layers),
            "seconds": spent,
        }


def copy_of(pipeline: DiffusionPipeline) -> DiffusionPipeline:
    """The same pipeline around a denoiser of its own."""
    denoiser = type(pipeline.transformer).from_config(pipeline.transformer.config).to(pipeline.transformer.dtype)
    denoiser.load_state_dict(pipeline.transformer.state_dict())
    return type(pipeline)(**{**pipeline.components, "transformer": denoiser.eval()})


def gather(
    pipeline: DiffusionPipeline, prompts: list[str], call: dict[str, Any], seed: int
) -> dict[str, InputMoments]:
    """The moments of the inputs of every layer that is converted."""
    layers = list(plan_pipeline(pipeline, TernaryConfig())["transformer"].kinds)
    rollouts = make_rollouts(pipeline, prompts, seed=seed, batch_size=BATCH, call_kwargs=call)
    groups = find_groups(pipeline, pipeline.transformer, layers, rollouts)
    found = collect_moments(pipeline, pipeline.transformer, groups, rollouts, dtype=torch.float32)
    return {layer: found[group.layers[0]] for group in groups for layer in group.layers}


def make_bench(teacher: str, work: Path, prompts: int, held: int) -> Bench:
    """Loads a teacher and gathers, or finds, what the rows share."""
    if teacher == "portraits":
        pipeline, call = demo_pipeline(), dict(DEMO_CALL)
        tuning, unseen = training_prompts(prompts, 100), held_out_prompts(held, 300)
    else:
        pipeline = load_teacher(Path(teacher))
        call = scenes_call(pipeline)
        tuning, unseen = tuning_prompts(prompts, 100), tuning_prompts(held, 300)
    path = work / identify(pipeline) / f"moments-{prompts}-{held}.pt"
    if not path.exists():
        rollouts = make_rollouts(pipeline, unseen[:16], seed=4_000_000, batch_size=16, call_kwargs=call)
        kept = {
            "moments": gather(pipeline, tuning, call, SEED),
            "held": gather(pipeline, unseen, call, 3_000_000),
            "states": record_states(pipeline, "transformer", rollouts, STATES),
        }
        path.parent.mkdir(parents=True, exist_ok=True)
        torch.save(kept, path)
    return Bench(pipeline, tuning, call, **torch.load(path, weights_only=False))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--teacher", default="portraits", help="portraits (embedded), or the folder of a Scenes teacher"
    )
    parser.add_argument("--name", help="of the results; default: portraits, or scenes")
    parser.add_argument("--prompts", type=int, default=64, help="calibration prompts")
    parser.add_argument("--held", type=int, default=32, help="held-back prompts")
    parser.add_argument("--rows", nargs="+", metavar="ROW", choices=list(rows(0)), help="default: all")
    parser.add_argument("--work", type=Path, default=WORK)
    arguments = parser.parse_args()
    torch.set_num_threads(1)
    torch.set_flush_denormal(True)
    quiet_hosts()
    bench = make_bench(arguments.teacher, arguments.work, arguments.prompts, arguments.held)
    embedded = arguments.teacher == "portraits"
    path = RESULTS / f"ablation_{arguments.name or ('portraits' if embedded else 'scenes')}.csv"
    about = f"# {identify(bench.pipeline)}; {arguments.prompts} prompts, {arguments.held} held back; {machine(())}"
    known: dict[str, dict[str, str]] = {}
    if path.exists():
        with path.open(newline="", encoding="utf-8") as file:
            first = file.readline().rstrip("\n")
            if first != about:
                sys.exit(f"{path} is of\n  {first}\nand this is\n  {about}\nGive another --name, or delete it.")
            known = {record["row"]: record for record in csv.DictReader(file)}
    methods = rows(128 if embedded else 256)
    for name in arguments.rows or methods:
        if name in known:
            continue
        numbers = bench.measure(methods[name])
        known[name] = {"row": name, **{key: f"{value:.6g}" for key, value in numbers.items()}}
        print(known[name], flush=True)
        with path.open("w", newline="", encoding="utf-8") as file:
            file.write(about + "\n")
            writer = csv.DictWriter(file, list(known[name]), lineterminator="\n")
            writer.writeheader()
            writer.writerows(known[each] for each in methods if each in known)


if __name__ == "__main__":
    main()
