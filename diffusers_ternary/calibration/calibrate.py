# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: ternarizes a pipeline with codes that fit what its layers see while it draws."""

import importlib.metadata
import os
import platform
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from diffusers import DiffusionPipeline
from torch import nn

from ..backend import (
    ConversionPlan,
    below_compiled_wrappers,
    bits_per_weight,
    plan_pipeline,
    replace_layers,
    with_separate_projections,
)
from ..backend.config import TernaryConfig
from ..backend.reports import attach_report
from ..format import TernarySpec
from ..rollouts import Rollouts, fingerprint, make_rollouts, weights_sha256
from .allocation import Allocation, apply_choices, layer_sensitivities
from .budget import SizeBudget
from .candidates import Candidate, candidates_for
from .config import CalibrationConfig
from .memory import explained_memory
from .prefix import install_solved, solved_on
from .report import CalibrationReport, LayerReport
from .run import CalibrationRun, SolvedCandidates
from .sensitivity import Sensitivities, TeacherStates, measure_sensitivities, record_states, whole_errors
from .store import FinishedLayer, LayerStore, work_folder


_VERSIONED = ("diffusers-ternary", "diffusers", "transformers", "torch")


@below_compiled_wrappers
@with_separate_projections
def calibrate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    config: TernaryConfig | None = None,
    calibration: CalibrationConfig | None = None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
    return_report: bool = False,
) -> DiffusionPipeline | tuple[DiffusionPipeline, CalibrationReport]:
    """Ternarizes the denoisers of a pipeline in place, with codes chosen on its own rollouts.

    The float pipeline draws the prompts with its own scheduler; the inputs of every layer to convert are summed up
    as H = E[x xᵀ] over all steps, guidance branches and tokens. Codes and scales of each layer then minimise the
    error of its output, tr((W - Ŵ) H (W - Ŵ)ᵀ): GPTQ (Frantar et al., arXiv 2210.17323), coordinate descent on the
    codes, and a joint least-squares fit of the scales. No images and no training. The result saves, loads and
    dequantizes like one from [`quantize`], at the same number of bits.

    Beside the pipeline, memory holds the statistics (4 K² bytes for each distinct input of K features; see
    `memory_limit`), the packed layers, and a few float32 copies of the layer being solved.

    Args:
        pipeline (`DiffusionPipeline`):
            Float pipeline. It is changed only when all layers are solved.
        prompts (`Sequence[str]`):
            64 to 256 that cover what the model is to draw.
        config ([`TernaryConfig`], *optional*):
            What to convert and how to store it. Its `rounding` is not used: `calibration` decides.
        calibration ([`CalibrationConfig`], *optional*):
            How to run the pipeline and to solve the layers.
        work_dir (`str` or `os.PathLike`, *optional*):
            Folder for finished layers. A rerun with the same weights, prompts and settings takes them from there.
        return_report (`bool`, *optional*, defaults to `False`):
            Return `(pipeline, report)`.

    Returns:
        `DiffusionPipeline`: the same pipeline, with the [`CalibrationReport`] as its `ternary_report`.

    Raises:
        TypeError: if `pipeline` is not a pipeline, or a prompt no string.
        ValueError: for no or empty prompts, a pipeline without a denoiser or quantized already, call arguments that
            it does not take, NaN or Inf in weights or activations.
        BlockingIOError: if another calibration is using `work_dir`.
        MemoryError: when memory runs out; says which option lowers the need.
    """
    config = config or TernaryConfig()
    calibration = calibration or CalibrationConfig()
    if not isinstance(pipeline, DiffusionPipeline):
        raise TypeError(f"calibrate takes a diffusers pipeline, got {type(pipeline).__name__}.")
    rollouts = make_rollouts(
        pipeline,
        prompts,
        seed=calibration.seed,
        batch_size=calibration.batch_size,
        call_kwargs=calibration.call_kwargs,
    )
    plans = plan_pipeline(pipeline, config)
    with work_folder(work_dir):
        report = _calibrate(pipeline, plans, config, calibration, rollouts, work_dir)
    return attach_report(pipeline, report, return_report)


def _calibrate(
    pipeline: DiffusionPipeline,
    plans: Mapping[str, ConversionPlan],
    config: TernaryConfig,
    calibration: CalibrationConfig,
    rollouts: Rollouts,
    work_dir: str | os.PathLike[str] | None,
) -> CalibrationReport:
    weights = weights_sha256({name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)})
    store = LayerStore(work_dir, _fingerprint(pipeline, config, calibration, weights, rollouts))
    models = {component: pipeline.components[component] for component in plans}
    candidates = {
        component: {
            name: candidates_for(models[component].get_parameter(f"{name}.weight"), config, calibration)
            for name, kind in plan.kinds.items()
            if kind == "ternary"
        }
        for component, plan in plans.items()
    }
    allocation = Allocation(models, plans, candidates, config)
    budget = None if calibration.size_budget is None else SizeBudget.parse(calibration.size_budget)
    if budget is not None:
        allocation.check(budget)
    run = CalibrationRun(pipeline, config, calibration, rollouts, store)
    solved = {component: run.solve(component, wanted) for component, wanted in candidates.items()}
    states: dict[str, TeacherStates] = {}
    sensitivities: dict[str, Sensitivities] = {}
    if calibration.sensitivity is not None:
        for component, wanted in candidates.items():
            with explained_memory(calibration):
                states[component] = record_states(pipeline, component, rollouts, calibration.sensitivity)
                sensitivities[component] = measure_sensitivities(
                    pipeline, component, states[component], wanted, solved[component], store
                )
    if budget is not None:
        choices = allocation.spend(budget, sensitivities)
    else:
        choices = {c: {name: wanted[0] for name, wanted in layers.items()} for c, layers in candidates.items()}
    ranking = layer_sensitivities(models, sensitivities, choices, config)
    bits = allocation.bits_per_weight(choices)
    finished = {component: _chosen(solved[component], choices[component]) for component in plans}
    for component, plan in plans.items():
        _install(models[component], *apply_choices(plan, config, choices[component]), finished[component])
    rows = tuple(_rows(finished))
    return CalibrationReport(
        layers=rows,
        bits_per_weight=bits,
        prompts=len(rollouts.prompts),
        prompts_sha256=rollouts.sha256(),
        weights_sha256=weights,
        passes=run.passes,
        statistics_bytes=run.statistics_bytes,
        seconds_statistics=run.seconds_statistics,
        seconds_solver=sum(row.seconds for row in rows if not row.resumed),
        config=config.to_dict(),
        calibration=calibration.to_dict(),
        versions=_versions(pipeline),
        sensitivity=ranking,
        velocity_nmse=whole_errors(pipeline, states),
    )


def _chosen(solved: SolvedCandidates, choices: Mapping[str, Candidate]) -> dict[str, FinishedLayer]:
    return {name: solved[name][choice] for name, choice in choices.items() if choice.kind == "ternary"}


def _install(
    model: nn.Module, plan: ConversionPlan, config: TernaryConfig, finished: Mapping[str, FinishedLayer]
) -> None:
    def fill(name: str, layer: Any, module: Any) -> None:
        if not isinstance(layer.spec, TernarySpec):
            layer.pack(module.weight.detach(), name=name)
            return
        solved = solved_on(finished[name].solved, module.weight.device)
        install_solved(layer, module, solved)

    replace_layers(model, plan, config, fill=fill)


def _fingerprint(
    pipeline: DiffusionPipeline,
    config: TernaryConfig,
    calibration: CalibrationConfig,
    weights: str,
    rollouts: Rollouts,
) -> str:
    settings = calibration.to_dict()
    for name in ("memory_limit", "size_budget", "sensitivity"):
        settings.pop(name)  # change the order and the choice of the work, not its results
    return fingerprint(
        pipeline=type(pipeline).__name__,
        scheduler=dict(getattr(getattr(pipeline, "scheduler", None), "config", {})),
        weights=weights,
        prompts=rollouts.sha256(),
        config=config.to_dict(),
        calibration=settings,
        version=importlib.metadata.version("diffusers-ternary"),
    )


def _versions(pipeline: DiffusionPipeline) -> dict[str, str]:
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return {**versions, "python": platform.python_version(), "device": str(pipeline.device)}


def _rows(finished: Mapping[str, Mapping[str, FinishedLayer]]) -> Iterator[LayerReport]:
    for component, layers in finished.items():
        for name, layer in layers.items():
            spec, errors = layer.solved.weight.spec, layer.solved.errors
            fields: dict[str, Any] = {"group_size": spec.group_size, "scales": spec.scales}
            yield LayerReport(
                name=f"{component}.{name}",
                shape=(spec.out_features, spec.in_features),
                bits_per_weight=bits_per_weight({name: spec}),
                error_rounded=errors.rounded,
                error_gptq=errors.gptq,
                error=errors.solved,
                damping=layer.solved.damping,
                tokens=layer.tokens,
                seconds=layer.seconds,
                resumed=layer.resumed,
                hadamard=spec.hadamard,
                rank=spec.rank,
                **fields,
            )
