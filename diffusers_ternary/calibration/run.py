# SPDX-License-Identifier: Apache-2.0
"""The part of a calibration that needs statistics: pass after pass over the prompts, solving what each measured."""

import dataclasses
import logging
import time
from collections.abc import Mapping, Sequence

from diffusers import DiffusionPipeline
from diffusers.utils.logging import tqdm
from torch import nn

from ..backend.config import TernaryConfig
from ..rollouts import Rollouts
from .candidates import Candidate, base_candidate
from .config import CalibrationConfig
from .hessian import InputMoments
from .memory import explained_memory
from .prefix import quantized_prefix, solved_on, split_stages
from .solver import SolvedLayer, solve_layer
from .statistics import GroupFinder, InputGroup, MomentCollector, split_passes
from .store import FinishedLayer, LayerStore


logger = logging.getLogger(__name__)
# Module name → the ways it was solved.
SolvedCandidates = dict[str, dict[Candidate, FinishedLayer]]


@dataclasses.dataclass
class CalibrationRun:
    """Solves layers in all the ways that are wanted.

    Args:
        pipeline (`DiffusionPipeline`): the float pipeline.
        config ([`TernaryConfig`]), calibration ([`CalibrationConfig`]): as given.
        rollouts ([`Rollouts`]): the inputs of the layers.
        store ([`LayerStore`]): of finished layers.
        passes (`int`): times the prompts were run.
        statistics_bytes (`int`): largest amount of statistics held at once.
        seconds_statistics (`float`): wall time of the rollouts.
    """

    pipeline: DiffusionPipeline
    config: TernaryConfig
    calibration: CalibrationConfig
    rollouts: Rollouts
    store: LayerStore
    passes: int = 0
    statistics_bytes: int = 0
    seconds_statistics: float = 0.0

    def solve(self, component: str, wanted: Mapping[str, Sequence[Candidate]]) -> SolvedCandidates:
        """Solves the ternary candidates of the layers of one component; the others need no statistics."""
        model = self.pipeline.components[component]
        solved: SolvedCandidates = {name: {} for name in wanted}
        missing: dict[str, list[Candidate]] = {}
        for name, candidates in wanted.items():
            for candidate in candidates:
                if candidate.kind != "ternary":
                    continue
                layer = self.store.load(self._key(component, name, candidate))
                if layer is None:
                    missing.setdefault(name, []).append(candidate)
                else:
                    solved[name][candidate] = layer
        if not missing:
            return solved
        if any(solved.values()):
            logger.info(
                "%s: %d of %d layers were finished already.", component, len(wanted) - len(missing), len(wanted)
            )
        dtype = self.calibration.dtype
        with explained_memory(self.calibration):
            # With a quantized prefix, also of layers that an earlier run has finished.
            groups = self._groups(model, list(wanted if self.calibration.sequential else missing))
            before: list[str] = []
            for stage in split_stages(groups) if self.calibration.sequential else [groups]:
                # The prefix is what the config alone would store, whatever a size budget will choose.
                prefix = {name: solved[name][wanted[name][0]].solved for name in before}
                before += [name for group in stage for name in group.layers]
                open_groups = [group for group in stage if any(name in missing for name in group.layers)]
                for part in split_passes(open_groups, limit=self.calibration.memory_limit_bytes, dtype=dtype):
                    moments = self._collect(model, part, prefix)
                    for group in tqdm(part, desc=f"Solving {component}", leave=False):
                        inputs = moments.pop(group.layers[0])
                        for name in group.layers:
                            for candidate in missing.get(name, ()):
                                solved[name][candidate] = self._solve(component, name, candidate, inputs)
        return solved

    def _groups(self, model: nn.Module, names: Sequence[str]) -> list[InputGroup]:
        with GroupFinder(model, names) as finder:
            self.rollouts.first(1).run(self.pipeline, description="Finding shared inputs")
        return finder.groups()

    def _collect(
        self, model: nn.Module, groups: Sequence[InputGroup], prefix: Mapping[str, SolvedLayer]
    ) -> dict[str, InputMoments]:
        start = time.perf_counter()
        with (
            quantized_prefix(model, self.config, prefix),
            MomentCollector(model, groups, dtype=self.calibration.dtype) as collector,
        ):
            self.rollouts.run(self.pipeline, description=f"Gathering statistics (pass {self.passes + 1})")
        self.passes += 1
        self.statistics_bytes = max(self.statistics_bytes, sum(g.bytes(self.calibration.dtype) for g in groups))
        moments = collector.moments()
        self.seconds_statistics += time.perf_counter() - start
        return moments

    def _solve(self, component: str, name: str, candidate: Candidate, moments: InputMoments) -> FinishedLayer:
        module = self.pipeline.components[component].get_submodule(name)
        start = time.perf_counter()
        solved = solve_layer(
            module.weight.detach().flatten(1),
            moments,
            group_size=candidate.group_size,
            scales=self.config.scale_layout,
            hadamard=self.config.hadamard,
            rank=candidate.rank,
            config=self.calibration.solver,
            correct_bias=self.calibration.correct_bias and module.bias is not None,
            name=f"{component}.{name}",
        )
        layer = FinishedLayer(solved_on(solved, "cpu"), moments.count, time.perf_counter() - start)
        self.store.save(self._key(component, name, candidate), layer)
        return layer

    def _key(self, component: str, name: str, candidate: Candidate) -> str:
        base = candidate == base_candidate(self.config)
        return f"{component}.{name}" if base else f"{component}.{name}@{candidate.label}"
