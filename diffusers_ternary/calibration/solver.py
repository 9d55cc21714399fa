# SPDX-License-Identifier: Apache-2.0
"""One layer: from a float weight and the moments of its inputs to a packed ternary weight and a bias."""

import dataclasses
import itertools
import operator
import time
from collections.abc import Iterator

import torch
from torch import nn

from ..backend import bits_per_weight
from ..format import COLUMN_SCALE_DTYPE, TernarySpec
from ..layers import TernaryLayer
from ..ternarize import TernaryWeight, check_finite, low_rank_residual, ternarize
from .basis import Basis, first_basis
from .codes import CodeSearch
from .config import SolverConfig
from .coupling import CoupledSearch
from .gptq import Coding
from .hessian import DampedHessian, InputMoments, damp, quadratic
from .report import LayerReport


# Codes and low-rank factors are fitted in turn, each to what the other leaves: the second turn takes off 2 to 4 % of
# the error and the third 1 % (rank 16, Gaussian and heavy-tailed weights of 256 to 1024 columns).
LOW_RANK_TURNS = 2
# Codes and column scales likewise: one turn takes off 19 % of the error, three 20 % (attention of the Scenes teacher).
COLUMN_TURNS = 2
# Of A, as a fraction of its mean diagonal: one random probe per call knows its small directions badly.
OUTPUT_DAMPING = 0.2


@dataclasses.dataclass(frozen=True)
class SolvedLayer:
    """A calibrated layer: what is stored, installed and reported.

    Args:
        weight ([`TernaryWeight`]): packed.
        bias_change (`torch.Tensor`, *optional*): float32 `[N]` to add to the bias, (W - Ŵ) E[x].
        report ([`LayerReport`]): how it is stored, and its errors before and after.
    """

    weight: TernaryWeight
    bias_change: torch.Tensor | None
    report: LayerReport

    def to(self, device: torch.device | str) -> "SolvedLayer":
        """The same layer on a device."""
        change = None if self.bias_change is None else self.bias_change.to(device)
        return dataclasses.replace(self, weight=self.weight.to(device), bias_change=change)

    def bias(self, before: torch.Tensor) -> torch.Tensor:
        """The bias of the layer from that of the float layer, of the same dtype."""
        if self.bias_change is None:
            return before
        return (before.float() + self.bias_change.to(before.device)).to(before.dtype)

    def install(self, layer: TernaryLayer, module: nn.Module) -> None:
        """Fills the placeholder that takes the place of the float `module`, on the module's device."""
        weight = module.get_parameter("weight")
        layer.install_weight(self.weight.to(weight.device))
        if self.bias_change is not None:
            bias = self.bias(module.get_parameter("bias").detach())
            layer.bias = nn.Parameter(bias, requires_grad=False)


def solve_layer(
    weight: torch.Tensor,
    moments: InputMoments,
    spec: TernarySpec,
    *,
    config: SolverConfig | None = None,
    correct_bias: bool = False,
    outputs: torch.Tensor | None = None,
    seed: int = 0,
    name: str = "layer",
) -> SolvedLayer:
    """Chooses codes and scales that keep the layer's output on the inputs that the moments describe.

    Args:
        weight (`torch.Tensor`): float `[N, K]`.
        moments ([`InputMoments`]): of the inputs, on the device to work on; their dtype is the working precision.
            With a reference r, the codes stand for W E[r xᵀ] H⁻¹ (as far as `compensation` says), which also makes up
            for what r lost on its way to x, as far as x still tells.
        spec ([`TernarySpec`]): how to store it. With `hadamard`, it is also solved for inputs that are not rotated,
            with `column_scales` (or the config's) for inputs that are not scaled, and the best is kept. The correction
            of its `rank` is the best for the inputs (SVD of the residual times a root of H); codes and correction are
            fitted in turn.
        config ([`SolverConfig`], *optional*): which stages run (see [`CodeSearch`]).
        correct_bias (`bool`, *optional*, defaults to `False`): let the bias take over the mean of the error; then
            only the covariance of the inputs counts. For layers that have a bias.
        outputs (`torch.Tensor`, *optional*): `[N, N]`, A of [`OutputCollector`]: an error e of the output counts as
            eᵀ A e, in the report too. `None` = |e|².
        seed (`int`): of the noise of the polish.
        name (`str`): layer name for messages and the report.

    Raises:
        ValueError: if the weight or the moments hold NaN or Inf, or their widths differ.
    """
    begin = time.perf_counter()
    columns = weight.shape[1]
    if tuple(moments.second.shape) != (columns, columns):
        raise ValueError(
            f"{name}: the statistics are of {moments.second.shape[0]} inputs, but the weight has {columns} columns."
        )
    check_finite(weight, name=name)
    config = config or SolverConfig()
    weight = weight.to(moments.second.device)
    hessian = moments.covariance() if correct_bias else moments.second
    damped = damp(hessian, config.damping, name=name)
    target = weight.to(hessian).T.contiguous()  # [K, N]
    bias = moments.mean @ target
    if moments.reference is not None:
        cross = moments.reference.covariance(moments.mean) if correct_bias else moments.reference.cross
        bias = moments.reference.mean @ target
        target = target + config.compensation * damped.solve((cross - hessian) @ target)
    outputs = None if outputs is None else damp(outputs.to(hessian), OUTPUT_DAMPING, name=name).matrix
    specs = [
        dataclasses.replace(spec, hadamard=block, column_scales=scaled)
        for scaled in (False, True)[: 1 + (spec.column_scales or config.column_scales)]
        for block in dict.fromkeys((0, spec.hadamard))
    ]
    tried = itertools.chain.from_iterable(_tried(target, damped, each, config, outputs, seed, name) for each in specs)
    _, packed, dense, first = min(tried, key=operator.itemgetter(0))  # the first of equals

    def relative(difference: torch.Tensor, form: torch.Tensor) -> float:
        return _ratio(quadratic(difference, form, outputs), energy)

    energy = quadratic(target, moments.second, outputs)
    rounded = ternarize(weight, group_size=spec.group_size, scales=spec.scales, name=name).dequantize().to(target).T
    report = LayerReport(
        name=name,
        shape=(spec.out_features, spec.in_features),
        group_size=spec.group_size,
        scales=spec.scales,
        hadamard=packed.spec.hadamard,
        rank=packed.spec.rank,
        column_scales=packed.spec.column_scales,
        bits_per_weight=bits_per_weight({name: packed.spec}),
        error_rounded=relative(target - rounded, moments.second),
        error_gptq=relative(target - first, hessian),
        error=relative(target - dense, hessian),
        damping=damped.damping,
        tokens=moments.count,
        seconds=time.perf_counter() - begin,
        resumed=False,
    )
    change = (bias - moments.mean @ dense).float() if correct_bias else None
    return SolvedLayer(packed, change, report)


def _tried(
    target: torch.Tensor,
    damped: DampedHessian,
    spec: TernarySpec,
    config: SolverConfig,
    outputs: torch.Tensor | None,
    seed: int,
    name: str,
) -> Iterator[tuple[float, TernaryWeight, torch.Tensor, torch.Tensor]]:
    """What is tried for one basis of the inputs; the low-rank factors see the inputs as they are.

    Yields:
        The error, the packed weight, what it stands for, and what the first stage had found (`[K, N]`,
        of the inputs as they are).
    """
    plain = dataclasses.replace(spec, rank=0, column_scales=False)
    basis = first_basis(target, damped.matrix, spec.hadamard) if spec.column_scales else Basis(spec.hadamard)
    inputs = basis.inputs(damped, name)

    def search_for(wanted: torch.Tensor) -> CodeSearch | CoupledSearch:
        wanted = basis.weight(wanted)
        if outputs is None:
            return CodeSearch(wanted, inputs, plain, config)
        return CoupledSearch(wanted, inputs, plain, config, outputs)

    def finished(coding: Coding) -> tuple[float, TernaryWeight, torch.Tensor, torch.Tensor]:
        """Error, packed weight, what it stands for, and the part of that which is the correction's."""
        packed, coded = search.pack(coding)
        packed, dense = dataclasses.replace(packed, spec=spec), basis.dense(coded)
        if basis.scale is not None:
            packed = dataclasses.replace(packed, column_scale=basis.scale.to(COLUMN_SCALE_DTYPE))
        correction = torch.zeros_like(dense)
        if spec.rank:
            low_rank = low_rank_residual((target - dense).T, spec.rank, whitening=damped.upper)
            correction = low_rank.dense().to(target).T
            packed, dense = dataclasses.replace(packed, low_rank=low_rank), dense + correction
        return quadratic(target - dense, damped.matrix, outputs), packed, dense, correction

    search = search_for(target)
    start = search.start()
    first = basis.dense(start.dense())
    coding = search.search(start)
    for _ in range(COLUMN_TURNS if spec.column_scales else 0):
        basis = basis.refit(target, damped.matrix, coding.dense(), outputs)
        inputs = basis.inputs(damped, name)
        search = search_for(target)
        coding = search.improve(coding)
    correction = torch.zeros_like(target)
    for turn in range(LOW_RANK_TURNS if spec.rank else 1):
        if turn:  # the codes follow what the correction leaves to them
            search = search_for(target - correction)
            coding = search.improve(coding)
        error, packed, dense, correction = finished(coding)
        yield error, packed, dense, first
    if config.polish:
        error, packed, dense, _ = finished(search.polish(coding, seed))
        yield error, packed, dense, first


def _ratio(error: float, energy: float) -> float:
    # Round-off can leave a tiny negative error.
    return max(error, 0.0) / energy if energy > 0 else 0.0
