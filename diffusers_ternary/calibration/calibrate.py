# SPDX-License-Identifier: Apache-2.0
"""`calibrate`: ternarizes a pipeline with codes that fit what its layers see while it draws."""

import dataclasses
import gc
import importlib.metadata
import logging
import os
import platform
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from diffusers.utils.logging import tqdm
from torch import nn

from ..config import TernaryConfig
from ..format import LayerSpec
from ..layers import QuantizedLinear, TernaryLinear
from ..quantizers import (
    ConversionPlan,
    bits_per_weight,
    packed_layers,
    plan_pipeline,
    replace_layers,
)
from ..rollouts import Rollouts, fingerprint, make_rollouts, weights_sha256
from .config import CalibrationConfig
from .hessian import InputMoments
from .report import CalibrationReport, LayerReport
from .solver import SolvedLayer, solve_layer
from .statistics import GroupFinder, InputGroup, MomentCollector, split_passes
from .store import FinishedLayer, LayerStore


logger = logging.getLogger(__name__)
_VERSIONED = ("diffusers-ternary", "diffusers", "transformers", "torch")


def calibrate(
    pipeline: DiffusionPipeline,
    prompts: Sequence[str],
    config: TernaryConfig | None = None,
    calibration: CalibrationConfig | None = None,
    *,
    work_dir: str | os.PathLike[str] | None = None,
) -> CalibrationReport:
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

    Returns:
        [`CalibrationReport`]

    Raises:
        TypeError: if `pipeline` is no pipeline, or a prompt no string.
        ValueError: for no or empty prompts, a pipeline without a denoiser or quantized already, call arguments that
            it does not take, NaN or Inf in weights or activations.
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
    weights = weights_sha256({name: part for name, part in pipeline.components.items() if isinstance(part, nn.Module)})
    store = LayerStore(work_dir, _fingerprint(pipeline, config, calibration, weights, rollouts))
    run = _Run(pipeline, config, calibration, rollouts, store)
    finished = {component: run.solve(component, plan) for component, plan in plans.items()}
    for component, plan in plans.items():
        _install(pipeline.components[component], plan, config, finished[component])
    return _report(pipeline, plans, finished, run, weights)


@dataclasses.dataclass
class _Run:
    """The part that needs statistics: pass after pass over the prompts, solving what each pass measured."""

    pipeline: DiffusionPipeline
    config: TernaryConfig
    calibration: CalibrationConfig
    rollouts: Rollouts
    store: LayerStore
    passes: int = 0
    statistics_bytes: int = 0
    seconds_statistics: float = 0.0

    def solve(self, component: str, plan: ConversionPlan) -> dict[str, FinishedLayer]:
        """Solves the ternary layers of one component; int8 layers need no statistics."""
        model = self.pipeline.components[component]
        names = [name for name, kind in plan.kinds.items() if kind == "ternary"]
        stored = {name: self.store.load(f"{component}.{name}") for name in names}
        finished = {name: layer for name, layer in stored.items() if layer is not None}
        missing = [name for name in names if name not in finished]
        if not missing:
            return finished
        if finished:
            logger.info("%s: %d of %d layers were finished already.", component, len(finished), len(names))
        dtype = self.calibration.dtype
        with _explained_memory(self.calibration):
            groups = self._groups(model, missing)
            for part in split_passes(groups, limit=self.calibration.memory_limit_bytes, dtype=dtype):
                moments = self._collect(model, part)
                for group in tqdm(part, desc=f"Solving {component}", leave=False):
                    self._solve_group(component, group, moments.pop(group.layers[0]), finished)
        return {name: finished[name] for name in names}

    def _groups(self, model: nn.Module, names: Sequence[str]) -> list[InputGroup]:
        first = dataclasses.replace(self.rollouts, prompts=self.rollouts.prompts[:1])
        with GroupFinder(model, names) as finder:
            first.run(self.pipeline, description="Finding shared inputs")
        return finder.groups()

    def _collect(self, model: nn.Module, groups: Sequence[InputGroup]) -> dict[str, InputMoments]:
        start = time.perf_counter()
        with MomentCollector(model, groups, dtype=self.calibration.dtype) as collector:
            self.rollouts.run(self.pipeline, description=f"Gathering statistics (pass {self.passes + 1})")
        self.passes += 1
        self.statistics_bytes = max(self.statistics_bytes, sum(g.bytes(self.calibration.dtype) for g in groups))
        moments = collector.moments()
        self.seconds_statistics += time.perf_counter() - start
        return moments

    def _solve_group(
        self, component: str, group: InputGroup, moments: InputMoments, finished: dict[str, FinishedLayer]
    ) -> None:
        for name in group.layers:
            module = self.pipeline.components[component].get_submodule(name)
            start = time.perf_counter()
            solved = solve_layer(
                module.weight.detach(),
                moments,
                group_size=self.config.group_size,
                scales=self.config.scales,
                config=self.calibration.solver,
                correct_bias=self.calibration.correct_bias and module.bias is not None,
                name=f"{component}.{name}",
            )
            layer = FinishedLayer(_to(solved, "cpu"), moments.count, time.perf_counter() - start)
            self.store.save(f"{component}.{name}", layer)
            finished[name] = layer


def _to(solved: SolvedLayer, device: torch.device | str) -> SolvedLayer:
    weight = dataclasses.replace(
        solved.weight,
        packed=solved.weight.packed.to(device),
        scale=solved.weight.scale.to(device),
        multiplier=None if solved.weight.multiplier is None else solved.weight.multiplier.to(device),
    )
    change = None if solved.bias_change is None else solved.bias_change.to(device)
    return dataclasses.replace(solved, weight=weight, bias_change=change)


def _install(
    model: nn.Module, plan: ConversionPlan, config: TernaryConfig, finished: Mapping[str, FinishedLayer]
) -> None:
    def fill(name: str, layer: QuantizedLinear, module: nn.Linear) -> None:
        if not isinstance(layer, TernaryLinear):
            layer.pack(module.weight.detach(), name=name)
            return
        solved = _to(finished[name].solved, module.weight.device)
        layer.install_weight(solved.weight)
        if solved.bias_change is not None:
            bias = module.bias.detach()
            layer.bias = nn.Parameter((bias.float() + solved.bias_change).to(bias.dtype), requires_grad=False)

    replace_layers(model, plan, config, fill=fill)


def _fingerprint(
    pipeline: DiffusionPipeline,
    config: TernaryConfig,
    calibration: CalibrationConfig,
    weights: str,
    rollouts: Rollouts,
) -> str:
    settings = calibration.to_dict()
    settings.pop("memory_limit")  # changes the order of work, not the result
    return fingerprint(
        pipeline=type(pipeline).__name__,
        scheduler=dict(getattr(getattr(pipeline, "scheduler", None), "config", {})),
        weights=weights,
        prompts=rollouts.sha256(),
        config=config.to_dict(),
        calibration=settings,
        version=importlib.metadata.version("diffusers-ternary"),
    )


class _explained_memory:  # noqa: N801 - reads as a function
    """Says which option lowers the need when memory runs out."""

    def __init__(self, calibration: CalibrationConfig) -> None:
        self._calibration = calibration

    def __enter__(self) -> None:
        return None

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        allocator = isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
        if not allocator and not isinstance(error, (torch.OutOfMemoryError, MemoryError)):
            return
        gc.collect()
        limit = self._calibration.memory_limit
        raise MemoryError(
            f"Out of memory while calibrating (memory_limit={limit!r}, batch_size={self._calibration.batch_size}). "
            "Set a smaller memory_limit (statistics are then gathered in more passes), lower batch_size, or enable "
            "pipeline.enable_model_cpu_offload(). Finished layers are kept if work_dir was given."
        ) from error


def _report(
    pipeline: DiffusionPipeline,
    plans: Mapping[str, ConversionPlan],
    finished: Mapping[str, Mapping[str, FinishedLayer]],
    run: _Run,
    weights: str,
) -> CalibrationReport:
    specs: dict[str, LayerSpec] = {}
    for component in plans:
        layers = packed_layers(pipeline.components[component])
        specs.update({f"{component}.{name}": layer.spec for name, layer in layers.items()})
    rows = tuple(_rows(finished))
    versions = {name: importlib.metadata.version(name) for name in _VERSIONED}
    return CalibrationReport(
        layers=rows,
        bits_per_weight=bits_per_weight(specs),
        prompts=len(run.rollouts.prompts),
        prompts_sha256=run.rollouts.sha256(),
        weights_sha256=weights,
        passes=run.passes,
        statistics_bytes=run.statistics_bytes,
        seconds_statistics=run.seconds_statistics,
        seconds_solver=sum(row.seconds for row in rows if not row.resumed),
        config=run.config.to_dict(),
        calibration=run.calibration.to_dict(),
        versions={**versions, "python": platform.python_version(), "device": str(pipeline.device)},
    )


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
                **fields,
            )
