# SPDX-License-Identifier: Apache-2.0
"""One denoiser on its way from float to packed: its candidates, what they are solved to, and what is installed."""

import contextlib
import dataclasses
import logging
import time
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from diffusers import DiffusionPipeline
from torch import nn

from ..backend import ConversionPlan, file_bytes, replace_layers
from ..backend.components import encodes_text
from ..backend.config import TernaryConfig
from ..format import Int8Spec, TernarySpec
from ..layers import TernaryLayer
from ..rollouts import Rollouts
from .candidates import Candidate, base_candidate, candidates_for
from .config import CalibrationConfig
from .end_loss import OutputCollector
from .hessian import InputMoments
from .prefix import QuantizedPrefix, split_stages
from .report import LayerSensitivity
from .solve_time import WorkBar, layer_work
from .solver import SolvedLayer, solve_layer
from .statistics import InputGroup, collect_moments, find_groups, split_passes
from .store import LayerStore


logger = logging.getLogger(__name__)


class CalibrationRun:
    """The calibration of one component of a pipeline. The component is changed by [`install`] alone.

    Args:
        pipeline (`DiffusionPipeline`): the float pipeline.
        component (`str`): its denoiser.
        plan ([`ConversionPlan`]): what the config converts in it; int8 layers are not a choice.
        config ([`TernaryConfig`]), calibration ([`CalibrationConfig`]): as given.
        rollouts ([`Rollouts`]): the inputs of the layers.
        store ([`LayerStore`]): of finished layers.

    Attributes:
        candidates (`dict[str, dict[Candidate, int]]`): ternary layer → the ways to store it and their bytes, the
            config's own first.
        solved (`dict[str, dict[Candidate, SolvedLayer]]`): layer → the ways it was solved.
        sensitivities (`dict[str, dict[Candidate, float]]`): layer → the error of the denoiser's output with each
            candidate in that layer alone; empty if they are not measured.
        chosen (`dict[str, Candidate]`): layer → how it will be stored; at first as the config says.
        passes (`int`): times the prompts were run.
        statistics_bytes (`int`): largest amount of statistics held at once.
        seconds_statistics (`float`): wall time of the rollouts.
    """

    def __init__(
        self,
        pipeline: DiffusionPipeline,
        component: str,
        plan: ConversionPlan,
        config: TernaryConfig,
        calibration: CalibrationConfig,
        rollouts: Rollouts,
        store: LayerStore,
    ) -> None:
        self.pipeline = pipeline
        self.component = component
        self.model: nn.Module = pipeline.components[component]
        self.plan = plan
        self.config = config
        self.calibration = calibration
        self.rollouts = rollouts
        self.store = store
        self.candidates = {
            name: candidates_for(self.model.get_parameter(f"{name}.weight"), config, calibration)
            for name, kind in plan.kinds.items()
            if kind == "ternary"
        }
        self.solved: dict[str, dict[Candidate, SolvedLayer]] = {name: {} for name in self.candidates}
        self.sensitivities: dict[str, dict[Candidate, float]] = {}
        self.chosen = {name: next(iter(sizes)) for name, sizes in self.candidates.items()}
        self.passes = 0
        self.statistics_bytes = 0
        self.seconds_statistics = 0.0

    # --- solving --------------------------------------------------------------------------------------------------

    def solve(self) -> None:
        """Solves the ternary candidates of all layers, or takes them from the store; the others need no statistics."""
        missing: dict[str, list[Candidate]] = {}
        for name, candidates in self.candidates.items():
            for candidate in candidates:
                if candidate.kind != "ternary":
                    continue
                layer = self.store.load(self._key(name, candidate))
                if layer is None:
                    missing.setdefault(name, []).append(candidate)
                else:
                    self._take(name, candidate, layer)
        if not missing:
            return
        if any(self.solved.values()):
            finished = len(self.solved) - len(missing)
            logger.info("%s: %d of %d layers were finished already.", self.component, finished, len(self.solved))
        with WorkBar(
            f"Solving {self.component}", [self._work(name) for name in missing for _ in missing[name]]
        ) as bar:
            for groups, prefix in self._stages(missing):
                limit = self.calibration.memory_limit_bytes
                for part in split_passes(groups, limit=limit, dtype=self.calibration.dtype):
                    moments, outputs = self._collect(part, prefix)
                    for group in part:
                        inputs = moments.pop(group.layers[0])
                        for name in group.layers:
                            effect = outputs.pop(name, None)
                            for candidate in missing.get(name, ()):
                                self._take(name, candidate, self._solve_layer(name, candidate, inputs, effect))
                                bar.finish(self._work(name))

    def _take(self, name: str, candidate: Candidate, layer: SolvedLayer) -> None:
        self.solved[name][candidate] = layer
        # What it came to: without column scales, if those did not help.
        self.candidates[name][candidate] = file_bytes(layer.weight.spec)

    def _work(self, name: str) -> float:
        return layer_work(*self.model.get_parameter(f"{name}.weight").flatten(1).shape)

    def _stages(self, missing: Mapping[str, Any]) -> Iterator[tuple[list[InputGroup], list[str]]]:
        """Layers that are to be solved together, and those that are packed while their inputs are measured."""
        sequential = self.calibration.sequential
        # With a quantized prefix, also of layers that an earlier run has finished.
        groups = find_groups(self.pipeline, self.model, list(self.solved if sequential else missing), self.rollouts)
        if self._weighs_outputs:
            groups = [dataclasses.replace(group, out_features=self._out_features(group)) for group in groups]
        before: list[str] = []
        compensates = self.calibration.solver.compensation > 0
        for stage in split_stages(groups) if sequential else [groups]:
            wanted = [group for group in stage if any(name in missing for name in group.layers)]
            yield [dataclasses.replace(group, reference=compensates and bool(before)) for group in wanted], before
            before = before + [name for group in stage for name in group.layers]

    def blocks(self) -> list[list[str]]:
        """The layers of each block, in the order of their calls."""
        groups = find_groups(self.pipeline, self.model, list(self.candidates), self.rollouts)
        return [[name for group in stage for name in group.layers] for stage in split_stages(groups)]

    @property
    def _weighs_outputs(self) -> bool:
        # What an error of the embeddings does is not asked.
        return self.calibration.end_loss and not encodes_text(self.component)

    def _out_features(self, group: InputGroup) -> tuple[int, ...]:
        return tuple(len(self.model.get_parameter(f"{name}.weight")) for name in group.layers)

    def _collect(
        self, groups: Sequence[InputGroup], prefix: Sequence[str]
    ) -> tuple[dict[str, InputMoments], dict[str, torch.Tensor]]:
        """Moments by the first layer of each group, and what errors of the outputs do, by layer."""
        start = time.perf_counter()
        # The prefix is what the config alone would store, whatever a size budget will choose.
        packed = {name: self.solved[name][base_candidate(self.config)] for name in prefix}
        layers = [name for group in groups for name in group.layers] if self._weighs_outputs else []
        observer = OutputCollector(self.model, layers, dtype=self.calibration.dtype, seed=self.calibration.seed)
        quantized = QuantizedPrefix(self.model, self.config, packed)
        with quantized, observer if layers else contextlib.nullcontext():
            moments = collect_moments(
                self.pipeline,
                self.model,
                groups,
                self.rollouts,
                dtype=self.calibration.dtype,
                reference=quantized.lifted if groups[0].reference else None,
                description=f"Gathering statistics (pass {self.passes + 1})",
            )
        self.passes += 1
        self.statistics_bytes = max(self.statistics_bytes, sum(g.bytes(self.calibration.dtype) for g in groups))
        self.seconds_statistics += time.perf_counter() - start
        return moments, observer.outputs()

    def _solve_layer(
        self, name: str, candidate: Candidate, moments: InputMoments, outputs: torch.Tensor | None
    ) -> SolvedLayer:
        module: Any = self.model.get_submodule(name)
        spec = candidate.spec(module.weight, self.config)
        assert isinstance(spec, TernarySpec)
        layer = solve_layer(
            module.weight.detach().flatten(1),
            moments,
            spec,
            config=self.calibration.solver,
            correct_bias=self.calibration.correct_bias and module.bias is not None,
            outputs=outputs,
            seed=self.calibration.seed,
            name=f"{self.component}.{name}",
        ).to("cpu")
        self.store.save(self._key(name, candidate), layer)
        return layer

    def _key(self, name: str, candidate: Candidate) -> str:
        base = candidate == base_candidate(self.config)
        return f"{self.component}.{name}" if base else f"{self.component}.{name}@{candidate.label}"

    # --- sizes ----------------------------------------------------------------------------------------------------

    @property
    def weights(self) -> int:
        """Weights in the layers that the config converts."""
        return sum(self.model.get_parameter(f"{name}.weight").numel() for name in self.plan.kinds)

    @property
    def fixed_bytes(self) -> int:
        """Stored bytes of the layers that are not a choice: int8."""
        matrices = [
            self.model.get_parameter(f"{name}.weight").flatten(1)
            for name in self.plan.kinds
            if name not in self.candidates
        ]
        return sum(file_bytes(Int8Spec(*matrix.shape)) for matrix in matrices)

    @property
    def chosen_bytes(self) -> int:
        """Stored bytes of all layers that the config converts, as chosen."""
        return self.fixed_bytes + sum(self.candidates[name][candidate] for name, candidate in self.chosen.items())

    @property
    def other_bytes(self) -> int:
        """Bytes of everything else in the denoiser."""
        converted = {f"{name}.weight" for name in self.plan.kinds}
        state = self.model.state_dict()
        return sum(t.numel() * t.element_size() for name, t in state.items() if name not in converted)

    # --- results --------------------------------------------------------------------------------------------------

    def install(self) -> None:
        """Packs the layers of the model as they were chosen."""
        changed = {name: choice.kind for name, choice in self.chosen.items() if choice.kind != "ternary"}
        kept = {name: "kept by the size budget" for name, kind in changed.items() if kind == "keep"}
        kinds = {name: changed.get(name, kind) for name, kind in self.plan.kinds.items() if name not in kept}
        config = self.config
        if changed:
            # First: the first matching pattern decides.
            config = TernaryConfig.from_dict(
                {**config.to_dict(), "overrides": {**changed, **(config.overrides or {})}}
            )
        replace_layers(self.model, ConversionPlan(kinds, {**self.plan.kept, **kept}), config, fill=self._fill)

    def _fill(self, name: str, layer: Any, module: nn.Module) -> None:
        if isinstance(layer, TernaryLayer):
            self.solved[name][self.chosen[name]].install(layer, module)
        else:
            layer.pack(module.get_parameter("weight").detach(), name=name)

    def finished(self) -> list[SolvedLayer]:
        """The ternary layers, as chosen."""
        return [self.solved[name][choice] for name, choice in self.chosen.items() if choice.kind == "ternary"]

    def sensitivity_rows(self) -> list[LayerSensitivity]:
        """The measurement for the report."""
        return [
            LayerSensitivity(
                name=f"{self.component}.{name}",
                shape=tuple(self.model.get_parameter(f"{name}.weight").flatten(1).shape),  # type: ignore[arg-type]
                bytes={candidate.label: self.candidates[name][candidate] for candidate in errors},
                nmse={candidate.label: error for candidate, error in errors.items()},
                chosen=self.chosen[name].label,
            )
            for name, errors in self.sensitivities.items()
        ]
