# SPDX-License-Identifier: Apache-2.0
"""Spends a size budget: one candidate for every layer of all denoisers."""

from collections.abc import Mapping, Sequence

import torch
from torch import nn

from ..backend import ConversionPlan
from ..backend.config import TernaryConfig
from .budget import Offer, SizeBudget, choose
from .candidates import Candidate
from .report import LayerSensitivity
from .sensitivity import Sensitivities


# Component → module name → candidates, the config's own first.
Candidates = Mapping[str, Mapping[str, Sequence[Candidate]]]
Choices = dict[str, dict[str, Candidate]]


class Allocation:
    """The sizes of all layers under all candidates.

    Args:
        models (`Mapping[str, nn.Module]`): the float denoisers by component.
        plans (`Mapping[str, ConversionPlan]`): what the config converts; its int8 layers are not a choice.
        candidates (`Candidates`): of every ternary layer.
        config ([`TernaryConfig`]): as given.
    """

    def __init__(
        self,
        models: Mapping[str, nn.Module],
        plans: Mapping[str, ConversionPlan],
        candidates: Candidates,
        config: TernaryConfig,
    ) -> None:
        self._models = models
        self._candidates = candidates
        self._scales = config.scale_layout
        converted = {(component, name) for component, plan in plans.items() for name in plan.kinds}
        self._fixed = sum(
            Candidate("int8").bytes(self._weight(*layer), config.scale_layout)
            for layer in converted
            if layer[1] not in candidates[layer[0]]
        )
        self._weights = sum(self._weight(*layer).numel() for layer in converted)
        weights = {f"{component}.{name}.weight" for component, name in converted}
        self._rest = sum(
            tensor.numel() * tensor.element_size()
            for component, model in models.items()
            for name, tensor in model.state_dict().items()
            if f"{component}.{name}" not in weights
        )

    def bits_per_weight(self, choices: Choices) -> float:
        """Stored bits per weight of all layers that the config converts, those that the choices keep included."""
        chosen = sum(
            candidate.bytes(self._weight(component, name), self._scales)
            for component, layers in choices.items()
            for name, candidate in layers.items()
        )
        return 8 * (self._fixed + chosen) / self._weights

    def check(self, budget: SizeBudget) -> None:
        """Checks that the smallest candidates fit, before hours of work.

        Raises:
            ValueError: names the smallest possible size.
        """
        self._capacity(budget)

    def spend(self, budget: SizeBudget, sensitivities: Mapping[str, Sensitivities]) -> Choices:
        """The choice within the budget that leaves the least sum of errors.

        Raises:
            ValueError: if the budget is impossible, or so large that a denoiser would keep all its layers.
        """
        layers = [(component, name) for component, named in self._candidates.items() for name in named]
        offers = [
            [
                Offer(candidate.bytes(self._weight(component, name), self._scales), error)
                for candidate, error in sensitivities[component][name].items()
            ]
            for component, name in layers
        ]
        choices: Choices = {component: {} for component in self._candidates}
        for (component, name), index in zip(layers, choose(offers, self._capacity(budget)), strict=True):
            choices[component][name] = self._candidates[component][name][index]
        for component, chosen in choices.items():
            if chosen and all(candidate.kind == "keep" for candidate in chosen.values()):
                raise ValueError(
                    f"The size budget is large enough to keep every layer of {component}: there is nothing to "
                    "quantize. Set a smaller one."
                )
        return choices

    def _capacity(self, budget: SizeBudget) -> int:
        capacity = budget.layer_bytes(weights=self._weights, rest=self._rest)
        least = self._fixed + sum(
            min(candidate.bytes(self._weight(component, name), self._scales) for candidate in candidates)
            for component, named in self._candidates.items()
            for name, candidates in named.items()
        )
        if least > capacity:
            smallest = budget.describe(least, weights=self._weights, rest=self._rest)
            raise ValueError(
                f"The size budget, {budget.describe(capacity, weights=self._weights, rest=self._rest)}, is below the "
                f"smallest possible, {smallest}, with all layers ternary. Allow more, or set a larger group_size."
            )
        return capacity - self._fixed

    def _weight(self, component: str, name: str) -> torch.Tensor:
        return self._models[component].get_parameter(f"{name}.weight")


def apply_choices(
    plan: ConversionPlan, config: TernaryConfig, choices: Mapping[str, Candidate]
) -> tuple[ConversionPlan, TernaryConfig]:
    """The plan of a component with its choices, and the config that says the same in its overrides."""
    kept = {name: "kept by the size budget" for name, choice in choices.items() if choice.kind == "keep"}
    kinds = {name: choices[name].kind if name in choices else kind for name, kind in plan.kinds.items()}
    changed = {name: choice.kind for name, choice in choices.items() if choice.kind != "ternary"}
    if changed:
        # First: the first matching pattern decides.
        config = TernaryConfig.from_dict({**config.to_dict(), "overrides": {**changed, **(config.overrides or {})}})
    converted = {name: kind for name, kind in kinds.items() if name not in kept}
    return ConversionPlan(converted, {**plan.kept, **kept}), config


def layer_sensitivities(
    models: Mapping[str, nn.Module],
    sensitivities: Mapping[str, Sensitivities],
    choices: Choices,
    config: TernaryConfig,
) -> tuple[LayerSensitivity, ...]:
    """The measurement for the report, the most sensitive layer first."""
    rows = []
    for component, layers in sensitivities.items():
        for name, errors in layers.items():
            weight = models[component].get_parameter(f"{name}.weight")
            rows_columns = weight.flatten(1).shape
            rows.append(
                LayerSensitivity(
                    name=f"{component}.{name}",
                    shape=(rows_columns[0], rows_columns[1]),
                    bytes={candidate.label: candidate.bytes(weight, config.scale_layout) for candidate in errors},
                    nmse={candidate.label: error for candidate, error in errors.items()},
                    chosen=choices[component][name].label,
                )
            )
    return tuple(sorted(rows, key=lambda row: -row.worst))
