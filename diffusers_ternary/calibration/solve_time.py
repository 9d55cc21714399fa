# SPDX-License-Identifier: Apache-2.0
"""How long solving takes: the products of every layer, at the rate of a small layer that is solved for it."""

import time
from collections.abc import Iterable, Sequence

import torch
from torch import nn

from ..backend import ConversionPlan
from ..backend.config import TernaryConfig
from ..format import TernarySpec
from ..progress import Bar
from .candidates import base_candidate, candidates_for
from .config import CalibrationConfig
from .hessian import InputMoments
from .solver import solve_layer


# Of the layer that is timed; larger ones are up to a third faster per operation.
_MOST_ROWS, _MOST_COLUMNS = 768, 1024


def layer_work(rows: int, columns: int) -> float:
    """Operations of a layer `[N, K]`, up to a factor: products of H with the weight, and the factor of H."""
    return columns**2 * (rows + columns / 8)


def ternary_shapes(
    model: nn.Module, plan: ConversionPlan, config: TernaryConfig, calibration: CalibrationConfig
) -> list[tuple[int, int]]:
    """`(N, K)` of everything that is solved in a denoiser, once for each way that a layer may be stored."""
    weights = [model.get_parameter(f"{name}.weight") for name, kind in plan.kinds.items() if kind == "ternary"]
    return [
        (weight.shape[0], weight[0].numel())
        for weight in weights
        for candidate in candidates_for(weight, config, calibration)
        if candidate.kind == "ternary"
    ]


def predicted_seconds(
    shapes: Iterable[tuple[int, int]], config: TernaryConfig, calibration: CalibrationConfig, device: torch.device
) -> float:
    """Seconds of solving layers on a device, which solves a small one now (about a second on a CPU core).

    Args:
        shapes (`Iterable[tuple[int, int]]`): `(N, K)` of each.
        config ([`TernaryConfig`]), calibration ([`CalibrationConfig`]): how.
        device (`torch.device`): where.
    """
    shapes = list(shapes)
    if not shapes:
        return 0.0
    rows = min(_MOST_ROWS, max(rows for rows, _ in shapes))
    columns = min(_MOST_COLUMNS, max(columns for _, columns in shapes))
    generator = torch.Generator().manual_seed(0)
    weight = torch.randn(rows, columns, generator=generator).to(device)
    x = torch.randn(2 * columns, columns, generator=generator).to(device, calibration.dtype)
    moments = InputMoments(x.T @ x / len(x), x.mean(dim=0), len(x))
    outputs = torch.eye(rows).to(x) if calibration.end_loss else None
    spec = base_candidate(config).spec(weight, config)
    assert isinstance(spec, TernarySpec)
    start = time.perf_counter()
    solved = solve_layer(
        weight, moments, spec, config=calibration.solver, correct_bias=calibration.correct_bias, outputs=outputs
    )
    solved.weight.scale.cpu()  # waits for the device
    rate = layer_work(rows, columns) / (time.perf_counter() - start)
    return sum(layer_work(*shape) for shape in shapes) / rate


class WorkBar(Bar):
    """A bar of layers whose time left counts the work in them, not their number.

    Args:
        description (`str`): what is being done.
        work (`Sequence[float]`): of each layer, see [`layer_work`].
    """

    def __init__(self, description: str, work: Sequence[float]) -> None:
        super().__init__(description=description, total=max(1, round(sum(work))))
        self.bar_format = "{desc}: {percentage:3.0f}%|{bar}|{postfix} [{elapsed}<{remaining}]"
        self.smoothing = 0.0  # the time for statistics lies between the layers of a pass
        self._layers, self._finished, self._done = len(work), 0, 0.0

    def finish(self, work: float) -> None:
        """One more layer is done."""
        self._finished += 1
        self._done += work
        self.set_postfix_str(f"{self._finished} of {self._layers} layers", refresh=False)
        self.update(round(self._done) - self.n)
