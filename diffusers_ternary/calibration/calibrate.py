# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: ternarizes a pipeline with codes that fit what its layers see while it draws."""

import importlib.metadata
import os
import platform
from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline
from torch import nn

from ..backend import ConversionPlan, below_compiled_wrappers, plan_pipeline, with_separate_projections
from ..backend.config import TernaryConfig, given_or_default
from ..backend.reports import attach_report
from ..lora import folded_adapters
from ..rollouts import Rollouts, fingerprint, make_rollouts, weights_sha256
from .allocation import Allocation
from .budget import SizeBudget
from .config import CalibrationConfig
from .encoders import EncoderStates, rollouts_for
from .memory import explained_memory
from .report import CalibrationReport
from .run import CalibrationRun
from .sensitivity import TeacherStates, measure_sensitivities, record_states, whole_errors
from .store import LayerStore, work_folder


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

    Text encoders too, where the config's `components` name them: their layers are solved for the prompts, without any
    denoising, and what a size budget weighs is the error of the embeddings that the denoiser is given.

    The float pipeline draws the prompts with its own scheduler; the inputs of every layer to convert are summed up
    as H = E[x xᵀ] over all steps, guidance branches and tokens, and A = E[g gᵀ] of the gradient g of the prediction
    for the layer's output, from a backward of random signs through every call (`end_loss`). Codes and scales of each
    layer then minimize what the error of its output does to the prediction, tr(A (W - Ŵ) H (W - Ŵ)ᵀ): GPTQ (Frantar
    et al., arXiv 2210.17323), coordinate descent on the codes, and a joint least-squares fit of the scales, with
    feedback from rows to later rows. No images and no training. The result saves, loads and dequantizes like one from
    [`quantize`], at the same number of bits.

    Beside the pipeline, memory holds the statistics (4 K² bytes for each distinct input of K features, and with
    `end_loss` 4 N² for each layer of N outputs; see `memory_limit`), with `end_loss` the activations of one call of
    the denoiser (of more than 500 million weights: the inputs of its blocks, and the activations of one), the packed
    layers, and a few float32 copies of the layer being solved.

    Args:
        pipeline (`DiffusionPipeline`):
            Float pipeline. It is changed only when all layers are solved. To calibrate a fine-tune, fold its LoRA
            files in first ([`~lora.fold_adapters`]).
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
        TypeError: if `pipeline` is not a pipeline, a prompt is not a string, or a config is of another class.
        ValueError: for no or empty prompts, a pipeline without a denoiser or quantized already, call arguments that
            it does not take, NaN or Inf in weights or activations.
        BlockingIOError: if another calibration is using `work_dir`.
        MemoryError: when memory runs out; says which option lowers the need.
    """
    config = given_or_default("config", config, TernaryConfig)
    calibration = given_or_default("calibration", calibration, CalibrationConfig)
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
    with work_folder(work_dir), explained_memory(calibration):
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
    runs = [
        CalibrationRun(pipeline, component, plan, config, calibration, rollouts_for(component, rollouts), store)
        for component, plan in plans.items()
    ]
    allocation = None
    if calibration.size_budget is not None:
        allocation = Allocation(runs, SizeBudget.parse(calibration.size_budget), calibration.allocation)
    for run in runs:
        run.solve()
    states: dict[str, TeacherStates | EncoderStates] = {}
    if calibration.sensitivity is not None:
        for run in runs:
            states[run.component] = record_states(pipeline, run.component, run.rollouts, calibration.sensitivity)
            measure_sensitivities(run, states[run.component])
    if allocation is not None:
        allocation.spend()
    sensitivity = sorted((row for run in runs for row in run.sensitivity_rows()), key=lambda row: -row.worst)
    bits = 8 * sum(run.chosen_bytes for run in runs) / sum(run.weights for run in runs)
    for run in runs:
        run.install()
    layers = tuple(layer.report for run in runs for layer in run.finished())
    return CalibrationReport(
        layers=layers,
        bits_per_weight=bits,
        prompts=len(rollouts.prompts),
        prompts_sha256=rollouts.sha256(),
        weights_sha256=weights,
        passes=sum(run.passes for run in runs),
        statistics_bytes=max(run.statistics_bytes for run in runs),
        seconds_statistics=sum(run.seconds_statistics for run in runs),
        seconds_solver=sum(layer.seconds for layer in layers if not layer.resumed),
        config=config.to_dict(),
        calibration=calibration.to_dict(),
        versions=_versions(pipeline),
        sensitivity=tuple(sensitivity),
        velocity_nmse=whole_errors(pipeline, states),
        adapters=folded_adapters(pipeline),
    )


def _fingerprint(
    pipeline: DiffusionPipeline,
    config: TernaryConfig,
    calibration: CalibrationConfig,
    weights: str,
    rollouts: Rollouts,
) -> str:
    settings = calibration.to_dict()
    for name in ("memory_limit", "size_budget", "allocation", "sensitivity"):
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
