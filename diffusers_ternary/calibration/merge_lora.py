# SPDX-License-Identifier: Apache-2.0
"""`merge_lora`: folds adapters into packed weights for good. The only call that makes new codes from an adapter."""

import dataclasses
import logging
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..backend import below_compiled_wrappers, bits_per_weight, with_separate_projections
from ..backend.config import given_or_default
from ..backend.reports import attach_report
from ..layers import TernaryLayer
from ..lora.compat import BaseTunerLayer, ModulesToSaveWrapper, PeftModel, check_adapters_to_merge
from ..lora.packed_base import PackedBaseMixin
from ..progress import Bar
from ..rollouts import make_rollouts
from ..ternarize import TernaryWeight, ternarize
from ..ternarize.weight import with_low_rank
from . import CalibrationConfig
from .hessian import InputMoments, damp
from .solver import solve_layer
from .statistics import collect_moments, find_groups, split_passes


logger = logging.getLogger(__name__)
TargetT = TypeVar("TargetT")
_DROWNED = 0.5  # part of an adapter's energy above which an error is worth a warning


@dataclasses.dataclass(frozen=True)
class MergedLayer:
    """One layer that took adapters in. Both figures are relative to the energy of the weight with the adapters.

    Args:
        name (`str`): component and module.
        adapter_energy (`float`): of what the adapters add: |ΔW|² / |W + ΔW|².
        error (`float`): of what was packed: |W + ΔW - Ŵ|² / |W + ΔW|². With calibration data, |·| is that of the
            layer's output, else that of the weight. Near `adapter_energy`, the adapter is lost.
        bits_per_weight (`float`): stored in a file afterward.
    """

    name: str
    adapter_energy: float
    error: float
    bits_per_weight: float


@dataclasses.dataclass(frozen=True)
class MergeReport:
    """What [`merge_lora`] did.

    Args:
        adapters (`tuple[str, ...]`): that were folded in and removed.
        layers (`tuple[MergedLayer, ...]`): the layers they changed.
        requantized (`bool`): whether codes were chosen anew.
        prompts (`int`): behind the statistics; 0 = none.
    """

    adapters: tuple[str, ...]
    layers: tuple[MergedLayer, ...]
    requantized: bool
    prompts: int

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dictionary."""
        return {**dataclasses.asdict(self), "layers": [dataclasses.asdict(layer) for layer in self.layers]}


@below_compiled_wrappers
@with_separate_projections
def merge_lora(
    pipeline_or_model: TargetT,
    adapter_names: Sequence[str] | None = None,
    *,
    requantize: bool = True,
    rank: int | None = None,
    prompts: Sequence[str] | None = None,
    calibration: CalibrationConfig | None = None,
    return_report: bool = False,
) -> TargetT | tuple[TargetT, MergeReport]:
    """Folds adapters into the packed weights and removes them. Lossy, so never done implicitly.

    Two ways: new ternary codes for the sum of weight and adapters (`requantize=True`), or the codes as they are and
    the adapters in the low-rank branch of the layer (`requantize=False` with a `rank`). With both, the branch takes
    what the new codes miss. With `prompts`, the pipeline draws them with its adapters on, and codes and branch are
    the best for the inputs of each layer (see [`calibrate`]); without, plain rounding and a plain SVD.

    Adapters on layers that are not packed are folded into their float weights. To use an adapter without loss, leave
    it unmerged, or call `pipe.fuse_lora()`, which keeps the packed weights.

    Args:
        pipeline_or_model (`DiffusionPipeline` or `nn.Module`): whose packed layers carry adapters.
        adapter_names (`Sequence[str]`, *optional*): default: those that are active. They must be active, with the
            weights they are to be merged with (`set_adapters`).
        requantize (`bool`, *optional*, defaults to `True`): whether to choose new codes.
        rank (`int`, *optional*): of the low-rank branch afterward, 16 rank (N + K) / (N K) bits per weight; default:
            as it is.
        prompts (`Sequence[str]`, *optional*): for statistics; needs a pipeline.
        calibration ([`CalibrationConfig`], *optional*): how to run the pipeline and to solve the layers.
        return_report (`bool`, *optional*, defaults to `False`): return `(pipeline_or_model, report)`.

    Returns:
        What was given, with the [`MergeReport`] as its `ternary_report`.

    Raises:
        ValueError: without adapters on packed layers, for fused adapters, unknown names, adapters on layers that
            are int8, weights that are not in memory, or nothing to do. Nothing is changed then.
        TypeError: for prompts without a pipeline, and for a config of another class.
    """
    calibration = given_or_default("calibration", calibration, CalibrationConfig)
    if not requantize and rank is None:
        raise ValueError(
            "merge_lora(requantize=False) keeps the codes, so the adapters need a low-rank branch: give rank=... "
            "To multiply by the exact sum and keep the packed weights, call pipe.fuse_lora()."
        )
    models = _models(pipeline_or_model)
    adapted = {name: layers for name, model in models.items() if (layers := _adapted_layers(model))}
    if not adapted:
        raise ValueError("No packed layer carries an adapter. Load one first: pipe.load_lora_weights(...).")
    names = tuple(adapter_names) if adapter_names is not None else _active_names(adapted)
    _check(adapted, names)
    moments: dict[str, InputMoments] = {}
    if prompts is not None:
        if not isinstance(pipeline_or_model, DiffusionPipeline):
            raise TypeError(f"prompts need a pipeline that draws them, got {type(pipeline_or_model).__name__}.")
        moments = _gather(pipeline_or_model, adapted, prompts, calibration)
    merger = _Merger(names, requantize, rank, moments, calibration)
    packed: dict[str, tuple[TernaryWeight, torch.Tensor | None]] = {}
    rows = []
    every = [(f"{component}.{name}", layer) for component, layers in adapted.items() for name, layer in layers.items()]
    for key, layer in Bar(every, "Merging adapters"):
        if any(name in layer._get_available_adapters() for name in names):
            weight, bias, row = merger.merge(key, layer)
            packed[key] = weight, bias
            rows.append(row)
    for key, layer in every:
        if key in packed:
            _install(layer, *packed[key])
    for component in adapted:
        _remove_adapters(models[component], names)
    report = MergeReport(names, tuple(rows), requantize, len(prompts or ()))
    drowned = [row.name for row in rows if row.error > _DROWNED * row.adapter_energy]
    if drowned:
        logger.warning(
            "merge_lora: in %d of %d layers (%s ...) the new error is more than half of what the adapters add. Give "
            "prompts or a larger rank, or keep the adapters unmerged.",
            len(drowned),
            len(rows),
            drowned[0],
        )
    return attach_report(pipeline_or_model, report, return_report)


@dataclasses.dataclass(frozen=True)
class _Merger:
    names: tuple[str, ...]
    requantize: bool
    rank: int | None
    moments: Mapping[str, InputMoments]
    calibration: CalibrationConfig

    @torch.no_grad()
    def merge(self, key: str, layer: PackedBaseMixin) -> tuple[TernaryWeight, torch.Tensor | None, MergedLayer]:
        base = layer.packed_base
        assert isinstance(base, TernaryLayer)
        before = base.dequantize(torch.float32)
        target, bias = before, base.active_bias
        for name in self.names:
            if name in layer._get_available_adapters():
                target = layer._merged_weight(name, target)
                merged_bias = layer._merged_bias(name, bias)
                bias = bias if merged_bias is None else merged_bias
        matrix = target.flatten(1)
        moments = self.moments.get(key)
        weight = self._codes(key, base, matrix, moments) if self.requantize else self._branch(base, matrix, moments)
        second = None if moments is None else moments.second
        row = MergedLayer(
            name=key,
            adapter_energy=_relative(matrix - before.flatten(1), matrix, second),
            error=_relative(matrix - weight.dequantize().to(matrix.device), matrix, second),
            bits_per_weight=bits_per_weight({key: weight.spec}),
        )
        return weight, bias, row

    def _codes(
        self, key: str, base: TernaryLayer, matrix: torch.Tensor, moments: InputMoments | None
    ) -> TernaryWeight:
        spec = base.spec
        rank = spec.rank if self.rank is None else self.rank
        if moments is None:
            return ternarize(
                matrix,
                group_size=spec.group_size,
                scales=spec.scales,
                hadamard=spec.hadamard,
                rank=rank,
                name=key,
            )
        wanted = dataclasses.replace(spec, rank=min(rank, *matrix.shape))
        return solve_layer(matrix, moments, wanted, config=self.calibration.solver, name=key).weight

    def _branch(self, base: TernaryLayer, matrix: torch.Tensor, moments: InputMoments | None) -> TernaryWeight:
        """The codes as they are; the branch takes all that they miss, what it held before included."""
        assert self.rank is not None
        codes = TernaryWeight(
            dataclasses.replace(base.spec, rank=0),
            base.weight.detach(),
            base.scales,
            base.weight_multiplier,
            column_scale=base.column_factors,
        )
        whitening = None if moments is None else damp(moments.second, self.calibration.solver.damping).upper
        return with_low_rank(codes, matrix, self.rank, whitening=whitening)


def _models(pipeline_or_model: Any) -> dict[str, nn.Module]:
    if isinstance(pipeline_or_model, DiffusionPipeline):
        return {name: part for name, part in pipeline_or_model.components.items() if isinstance(part, nn.Module)}
    if isinstance(pipeline_or_model, PeftModel):
        pipeline_or_model = pipeline_or_model.get_base_model()
    if isinstance(pipeline_or_model, nn.Module):
        return {type(pipeline_or_model).__name__: pipeline_or_model}
    raise TypeError(f"merge_lora takes a pipeline or a model, got {type(pipeline_or_model).__name__}.")


def _adapted_layers(model: nn.Module) -> dict[str, PackedBaseMixin]:
    return {
        name: module
        for name, module in model.named_modules()
        if isinstance(module, PackedBaseMixin) and module.packed_base is not None
    }


def _active_names(adapted: Mapping[str, Mapping[str, PackedBaseMixin]]) -> tuple[str, ...]:
    layers = [layer for layers in adapted.values() for layer in layers.values() if not layer.disable_adapters]
    names = dict.fromkeys(name for layer in layers for name in layer.active_adapters)
    return tuple(name for name in names if any(name in layer._get_available_adapters() for layer in layers))


def _check(adapted: Mapping[str, Mapping[str, PackedBaseMixin]], names: tuple[str, ...]) -> None:
    layers = {f"{component}.{name}": layer for component, part in adapted.items() for name, layer in part.items()}
    available = dict.fromkeys(name for layer in layers.values() for name in layer._get_available_adapters())
    unknown = [name for name in names if name not in available]
    if unknown or not names:
        raise ValueError(
            f"No adapter {', '.join(unknown) or 'is active'} on packed layers; there are {', '.join(available)}. "
            "Name some of them, or activate them with set_adapters(...)."
        )
    for key, layer in layers.items():
        if not any(name in layer._get_available_adapters() for name in names):
            continue
        if layer.merged:
            raise ValueError(f"The adapters of {key} are fused. Call pipe.unfuse_lora() first.")
        check_adapters_to_merge(layer, list(names))
        if not isinstance(layer.packed_base, TernaryLayer):
            raise ValueError(
                f"{key} is a {type(layer.packed_base).__name__}, not a ternary layer. Merge adapters into the float "
                "model and quantize that, or leave them unmerged."
            )
        if any(parameter.is_meta for parameter in layer.parameters()):  # type: ignore[attr-defined]
            raise ValueError(
                f"{key}: its weights are not in memory (offloaded). Call pipe.remove_all_hooks(), merge, and enable "
                "the offload again."
            )


def _gather(
    pipeline: DiffusionPipeline,
    adapted: Mapping[str, Mapping[str, PackedBaseMixin]],
    prompts: Sequence[str],
    calibration: CalibrationConfig,
) -> dict[str, InputMoments]:
    """Moments of the inputs of the base layers, while the adapters are on."""
    rollouts = make_rollouts(
        pipeline,
        prompts,
        seed=calibration.seed,
        batch_size=calibration.batch_size,
        call_kwargs=calibration.call_kwargs,
    )
    found: dict[str, InputMoments] = {}
    for component, layers in adapted.items():
        model = pipeline.components[component]
        names = {f"{name}.base_layer": name for name in layers}
        groups = find_groups(pipeline, model, list(names), rollouts)
        for part in split_passes(groups, limit=calibration.memory_limit_bytes, dtype=calibration.dtype):
            moments = collect_moments(pipeline, model, part, rollouts, dtype=calibration.dtype)
            for group in part:
                for layer in group.layers:
                    found[f"{component}.{names[layer]}"] = moments[group.layers[0]]
    return found


def _relative(error: torch.Tensor, weight: torch.Tensor, second: torch.Tensor | None) -> float:
    def energy(matrix: torch.Tensor) -> float:
        product = matrix if second is None else matrix.to(second) @ second
        return float((product * matrix.to(product)).sum(dtype=torch.float64))

    whole = energy(weight)
    return max(energy(error), 0.0) / whole if whole > 0 else 0.0


def _install(layer: PackedBaseMixin, weight: TernaryWeight, bias: torch.Tensor | None) -> None:
    base = layer.packed_base
    assert isinstance(base, TernaryLayer)
    base.install_weight(weight.to(base.weight.device))
    if bias is not None and bias is not base.bias:
        base.bias = nn.Parameter(bias.detach().to(base.weight.device), requires_grad=False)


def _remove_adapters(model: nn.Module, names: tuple[str, ...]) -> None:
    """Takes merged adapters off the model, and the adapter layers too if no adapter is left."""
    tuned = {name: module for name, module in model.named_modules() if isinstance(module, BaseTunerLayer)}
    whole = {name: module for name, module in model.named_modules() if isinstance(module, ModulesToSaveWrapper)}
    for layer in tuned.values():
        mine = [name for name in names if name in layer._get_available_adapters()]
        if getattr(layer, "packed_base", None) is None and mine:
            layer.merge(adapter_names=mine)  # a float layer takes them in as they are
            layer.merged_adapters = [name for name in layer.merged_adapters if name not in mine]
        for name in mine:
            layer.delete_adapter(name)
    for wrapper in whole.values():
        _keep_trained(wrapper, names)
    peft_config = getattr(model, "peft_config", {})
    for name in names:
        peft_config.pop(name, None)
    left = any(layer._get_available_adapters() for layer in tuned.values())
    if not left and not any(wrapper.modules_to_save for wrapper in whole.values()):
        for name, layer in tuned.items():
            model.set_submodule(name, layer.get_base_layer())
        for name, wrapper in whole.items():
            model.set_submodule(name, wrapper.original_module)
        if hasattr(model, "peft_config"):
            del model.peft_config
        if hasattr(model, "_hf_peft_config_loaded"):
            setattr(model, "_hf_peft_config_loaded", False)  # noqa: B010 - mypy takes it for a submodule


def _keep_trained(wrapper: ModulesToSaveWrapper, names: tuple[str, ...]) -> None:
    """Lets what an adapter trained as a whole (`modules_to_save`) take the place of the module it was copied from."""
    for name in wrapper.modules_to_save.keys() & set(names):
        active = wrapper.active_adapters
        if name in active:
            wrapper.original_module = wrapper.modules_to_save[name].requires_grad_(False)
        wrapper.delete_adapter(name, new_active_adapters=[other for other in active if other != name])
