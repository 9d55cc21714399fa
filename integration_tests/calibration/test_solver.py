# SPDX-License-Identifier: Apache-2.0
"""The solver against brute force, numpy and the true output error."""

import dataclasses
import itertools
import logging

import numpy as np
import pytest
import torch

from diffusers_ternary.calibration.config import SolverConfig
from diffusers_ternary.calibration.descent import coordinate_descent
from diffusers_ternary.calibration.gptq import Coding, gptq
from diffusers_ternary.calibration.hessian import InputMoments, ReferenceMoments, damp
from diffusers_ternary.calibration.refit import refit_scales
from diffusers_ternary.calibration.solver import SolvedLayer, solve_layer
from diffusers_ternary.format import TernarySpec, normalize_group_size
from diffusers_ternary.ternarize import ternarize


SEEDS = range(5)
ROUNDED = SolverConfig(gptq=False, refit=False, descent_passes=0)
GPTQ = SolverConfig(refit=False, descent_passes=0, starts=1)
GPTQ_REFIT = SolverConfig(descent_passes=0, starts=1)
ONE_START = SolverConfig(starts=1)


def correlated_inputs(seed: int, tokens: int, columns: int) -> torch.Tensor:
    generator = torch.Generator().manual_seed(seed)
    mixing = torch.randn(columns, columns, generator=generator) * torch.logspace(0, -1.5, columns)
    mean = torch.randn(columns, generator=generator)
    return torch.randn(tokens, columns, generator=generator) @ mixing.T + mean


def moments_of(x: torch.Tensor) -> InputMoments:
    return InputMoments(x.T @ x / len(x), x.mean(dim=0), len(x))


def solve(
    weight: torch.Tensor,
    moments: InputMoments,
    *,
    group_size: int | None = 128,
    scales: str = "group",
    hadamard: int = 0,
    rank: int = 0,
    **options,
) -> SolvedLayer:
    size = normalize_group_size(group_size, weight.shape[1])
    return solve_layer(weight, moments, TernarySpec(*weight.shape, size, scales, hadamard, rank), **options)


def random_weight(seed: int, rows: int, columns: int) -> torch.Tensor:
    return torch.randn(rows, columns, generator=torch.Generator().manual_seed(1000 + seed))


def quadratic(error: torch.Tensor, hessian: torch.Tensor) -> torch.Tensor:
    """Per row of `error` [N, K]."""
    return ((error.double() @ hessian.double()) * error.double()).sum(dim=1)


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize("columns", [4, 6, 8])
def test_close_to_the_best_of_all_codes(seed, columns):
    x, weight = correlated_inputs(seed, 500, columns), random_weight(seed, 16, columns)
    hessian = moments_of(x).second
    solved = solve(weight, moments_of(x), group_size=None)

    # The best scale of given codes t is (t H w) / (t H t); it leaves w H w - (t H w)^2 / (t H t).
    codes = torch.tensor(list(itertools.product((-1.0, 0.0, 1.0), repeat=columns)))
    codes = codes[codes.abs().sum(dim=1) > 0]
    gain = (codes @ hessian @ weight.T) ** 2 / quadratic(codes, hessian)[:, None].float()
    best = quadratic(weight, hessian) - gain.amax(dim=0).double()
    found = quadratic(weight - solved.weight.dequantize(), hessian)
    rounded = quadratic(weight - ternarize(weight, group_size=None).dequantize(), hessian)

    assert bool((found >= best * 0.99 - 1e-5).all())
    # Single flips cannot leave every local optimum of so few columns: a quarter of the way back to rounding.
    assert float((found - best).sum()) < 0.25 * float((rounded - best).sum())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("columns", "group_size"), [(128, 128), (200, 64), (77, None), (300, 16)])
def test_every_stage_lowers_the_error(seed, columns, group_size):
    moments, weight = moments_of(correlated_inputs(seed, 2000, columns)), random_weight(seed, 24, columns)
    errors = [
        solve(weight, moments, group_size=group_size, config=config).report.error
        for config in (ROUNDED, GPTQ, GPTQ_REFIT, ONE_START, SolverConfig())
    ]
    assert errors[0] > errors[1] > errors[3]
    assert errors[2] < errors[1] * 1.001, "the refit may lose only what rounding the scales costs"
    assert errors[3] < errors[2]
    if group_size == 16:
        assert errors[4] == errors[3], "19 groups a row: one start"
    else:
        assert errors[4] < errors[3]


def test_calibrated_scales_that_every_program_holds():
    x, weight = correlated_inputs(2, 800, 64), random_weight(2, 24, 64)
    errors = {}
    for scales in ("group", "portable"):
        spec = TernarySpec.for_matrix(*weight.shape, group_size=16, scales=scales)
        solved = solve_layer(weight, moments_of(x), spec)
        errors[scales] = float(quadratic(weight - solved.weight.dequantize(), moments_of(x).second).sum())
    assert solved.weight.spec == spec
    assert torch.equal(solved.weight.scale.half().float(), solved.weight.scale.bfloat16().float())
    assert errors["portable"] < 1.001 * errors["group"]


@pytest.mark.parametrize("correct_bias", [False, True])
@pytest.mark.parametrize("scales", ["group", "double"])
def test_reported_errors_are_those_of_the_packed_layer(correct_bias, scales):
    x, weight = correlated_inputs(3, 4000, 96), random_weight(3, 20, 96)
    solved = solve(weight, moments_of(x), group_size=32, scales=scales, correct_bias=correct_bias)
    output = x @ solved.weight.dequantize().T
    if correct_bias:
        assert solved.bias_change is not None
        output = output + solved.bias_change
    else:
        assert solved.bias_change is None
    true = float((x @ weight.T - output).square().sum() / (x @ weight.T).square().sum())
    rounded = ternarize(weight, group_size=32, scales=scales).dequantize()
    true_rounded = float((x @ (weight - rounded).T).square().sum() / (x @ weight.T).square().sum())
    assert solved.report.error == pytest.approx(true, rel=1e-3)
    assert solved.report.error_rounded == pytest.approx(true_rounded, rel=1e-3)
    assert solved.weight.spec.scales == scales
    assert solved.weight.scale.dtype == torch.float16


def test_bias_takes_over_the_mean():
    x, weight = correlated_inputs(0, 4000, 64) + 5.0, random_weight(0, 32, 64)
    plain = solve(weight, moments_of(x))
    corrected = solve(weight, moments_of(x), correct_bias=True)
    assert corrected.report.error < plain.report.error
    assert corrected.bias_change is not None
    residual = (weight - corrected.weight.dequantize()) @ x.mean(dim=0)
    torch.testing.assert_close(corrected.bias_change, residual, rtol=1e-4, atol=1e-4)


def gptq_by_the_book(weight: torch.Tensor, hessian: torch.Tensor, group_size: int) -> torch.Tensor:
    """Frantar et al. as published: inverse, upper Cholesky factor, one column after the other."""
    columns = weight.shape[1]
    upper = torch.linalg.cholesky(torch.linalg.inv(hessian), upper=True)
    current, result = weight.clone(), torch.zeros_like(weight)
    for j in range(columns):
        if j % group_size == 0:
            group = current[:, j : j + group_size]
            delta = 0.75 * group.abs().mean(dim=1, keepdim=True)
            kept = group.abs() > delta
            scale = (group.abs() * kept).sum(dim=1) / kept.sum(dim=1).clamp_min(1)
        result[:, j] = (current[:, j] / scale).round().clamp(-1, 1) * scale
        error = (current[:, j] - result[:, j]) / upper[j, j]
        current[:, j + 1 :] -= error[:, None] * upper[j, j + 1 :]
    return result


@pytest.mark.parametrize(("columns", "group_size"), [(40, 40), (64, 16), (70, 32), (300, 300)])
def test_gptq_without_an_inverse_is_gptq(columns, group_size):
    moments, weight = moments_of(correlated_inputs(1, 3000, columns).double()), random_weight(1, 12, columns).double()
    damped = damp(moments.second, 0.05)
    coding = gptq(weight.T.contiguous(), damped.upper, group_size=group_size)
    expected = gptq_by_the_book(weight, damped.matrix, group_size)
    # The rule for a group's scale works in float32.
    torch.testing.assert_close(coding.dense().T, expected, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(damped.upper @ damped.upper.T, damped.matrix)


@pytest.mark.parametrize("seed", SEEDS)
def test_descent_never_raises_the_error_and_ends_in_a_local_optimum(seed):
    columns, group_size = 150, 64
    hessian = moments_of(correlated_inputs(seed, 2000, columns)).second.double()
    weight = random_weight(seed, 10, columns).double()
    start = gptq(weight.T.contiguous(), damp(hessian, 0.01).upper, group_size=group_size)
    coding, errors = start, [quadratic(weight - start.dense().T, hessian)]
    for _ in range(50):
        coding, changed = coordinate_descent(weight.T.contiguous(), hessian, coding)
        errors.append(quadratic(weight - coding.dense().T, hessian))
        if not changed:
            break
    assert not changed
    for before, after in itertools.pairwise(errors):
        assert bool((after <= before * (1 + 1e-12)).all())
    best = errors[-1]
    for column in range(0, columns, 7):
        for code in (-1, 0, 1):
            codes = coding.codes.clone()
            codes[column] = code
            other = quadratic(weight - Coding(codes, coding.scales, group_size).dense().T, hessian)
            assert bool((other >= best * (1 - 1e-12)).all())


@pytest.mark.parametrize("seed", SEEDS)
@pytest.mark.parametrize(("columns", "group_size"), [(60, 20), (50, 16), (30, 30)])
def test_refit_is_least_squares(seed, columns, group_size):
    x, weight = correlated_inputs(seed, 800, columns).double(), random_weight(seed, 6, columns).double()
    generator = torch.Generator().manual_seed(seed)
    codes = torch.randint(-1, 2, (columns, 6), generator=generator, dtype=torch.int8)
    hessian = x.T @ x / len(x)
    fitted = refit_scales(
        hessian @ weight.T, hessian, Coding(codes, torch.ones(-(-columns // group_size), 6), group_size)
    )
    assert float(fitted.scales.min()) >= 0
    groups = -(-columns // group_size)
    for row in range(6):
        parts = [
            (x[:, g * group_size : (g + 1) * group_size].numpy())
            @ codes[g * group_size : (g + 1) * group_size, row].numpy()
            for g in range(groups)
        ]
        expected, *_ = np.linalg.lstsq(np.stack(parts, axis=1), (x @ weight[row]).numpy(), rcond=None)
        signed = expected.repeat(group_size)[:columns] * codes[:, row].numpy()
        np.testing.assert_allclose(fitted.dense()[:, row].numpy(), signed, rtol=1e-5, atol=1e-7)


def test_refit_of_empty_and_collinear_groups():
    hessian = torch.ones(8, 8)  # rank one: any two groups are collinear
    codes = torch.ones(8, 3, dtype=torch.int8)
    codes[4:, 1] = 0
    codes[:, 2] = 0
    weight = torch.ones(8, 3)
    fitted = refit_scales(hessian @ weight, hessian, Coding(codes, torch.ones(2, 3), 4))
    assert bool(torch.isfinite(fitted.scales).all())
    assert float(fitted.scales[1, 1]) == 0.0
    assert float(fitted.scales[:, 2].abs().max()) == 0.0
    error = (weight - fitted.dense())[:, :2].sum(dim=0)
    assert float(error.abs().max()) < 1e-3


@pytest.mark.parametrize("correct_bias", [False, True])
def test_dead_and_constant_columns(correct_bias):
    x = correlated_inputs(0, 1000, 64)
    x[:, 5] = 0.0
    x[:, 9] = 2.5
    x[:, 40:48] = 0.0
    weight = random_weight(0, 8, 64)
    solved = solve(weight, moments_of(x), group_size=16, correct_bias=correct_bias)
    dense = solved.weight.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert solved.report.error < solved.report.error_rounded
    # A dead input says nothing about its weights, so they are rounded: an unseen input finds them.
    assert bool((dense[:, 40:48].sign() * weight[:, 40:48] >= 0).all())


def test_weights_of_zeros():
    weight = random_weight(0, 6, 32)
    weight[2] = 0.0
    weight[:, :16] = 0.0
    solved = solve(weight, moments_of(correlated_inputs(0, 500, 32)), group_size=16)
    dense = solved.weight.dequantize()
    assert bool(torch.isfinite(dense).all())
    assert float(dense[2].abs().max()) == 0.0


def test_inputs_that_are_all_zero_give_plain_rounding(caplog):
    weight = random_weight(0, 6, 32)
    moments = InputMoments(torch.zeros(32, 32), torch.zeros(32), 0)
    with caplog.at_level(logging.WARNING):
        solved = solve(weight, moments, config=GPTQ, name="blocks.0.to_q")
    assert "blocks.0.to_q" in caplog.text
    scale = ternarize(weight).scale.float()
    torch.testing.assert_close(solved.weight.dequantize(), (weight / scale).round().clamp(-1, 1) * scale)


def test_a_hessian_that_is_not_positive_definite_gets_more_damping(caplog):
    x = correlated_inputs(0, 500, 24)
    moments = moments_of(x)
    broken = moments.second - 0.5 * float(moments.second.diagonal().mean()) * torch.eye(24)
    weight = random_weight(0, 4, 24)
    with caplog.at_level(logging.WARNING):
        solved = solve(weight, InputMoments(broken, moments.mean, 500), name="blocks.3.ff")
    assert solved.report.damping > 0.01
    assert "blocks.3.ff" in caplog.text
    assert "not positive definite" in caplog.text
    assert bool(torch.isfinite(solved.weight.dequantize()).all())


def test_few_tokens_give_a_singular_hessian_and_still_a_result():
    x = correlated_inputs(0, 5, 128)
    solved = solve(random_weight(0, 16, 128), moments_of(x))
    assert solved.report.error < solved.report.error_rounded


def test_deterministic():
    moments, weight = moments_of(correlated_inputs(0, 500, 96)), random_weight(0, 16, 96)
    first, second = (solve(weight, moments, group_size=32) for _ in range(2))
    assert torch.equal(first.weight.packed, second.weight.packed)
    assert torch.equal(first.weight.scale, second.weight.scale)


def test_bfloat16_weights_and_float64_statistics():
    x, weight = correlated_inputs(0, 500, 48), random_weight(0, 16, 48).bfloat16()
    single = moments_of(x)
    double = InputMoments(single.second.double(), single.mean.double(), 500)
    errors = [solve(weight, moments).report.error for moments in (single, double)]
    assert errors[0] == pytest.approx(errors[1], rel=0.05)


def test_bad_input_names_layer_and_remedy():
    moments = moments_of(correlated_inputs(0, 100, 16))
    weight = random_weight(0, 4, 16)
    with pytest.raises(ValueError, match=r"proj: the statistics are of 16 inputs, but the weight has 8"):
        solve(weight[:, :8], moments, name="proj")
    weight[0, 0] = float("nan")
    with pytest.raises(ValueError, match=r"proj: the weight holds 1 NaN"):
        solve(weight, moments, name="proj")
    moments.second[0, 0] = float("inf")
    with pytest.raises(ValueError, match=r"proj: the input statistics hold NaN or Inf"):
        solve(random_weight(0, 4, 16), moments, name="proj")


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"rounding": "nf4"}, "nf4"),
        ({"descent_passes": -1}, "-1"),
        ({"starts": 0}, "1 or more"),
        ({"damping": 0.0}, "0.01 is usual"),
        ({"compensation": 1.5}, "share from 0 to 1"),
        ({"polish": -1}, "-1"),
    ],
)
def test_solver_config_rejects(arguments, message):
    with pytest.raises(ValueError, match=message):
        SolverConfig(**arguments)


def heavy_tailed(seed, rows=96, columns=256):
    generator = torch.Generator().manual_seed(seed)
    normal = torch.randn(rows, columns, generator=generator)
    return normal / torch.randn(rows, columns, 3, generator=generator).square().mean(-1).sqrt()  # Student's t, 3


@pytest.mark.parametrize("correct_bias", [False, True])
@pytest.mark.parametrize(("hadamard", "rank"), [(0, 0), (128, 0), (0, 8), (128, 8)])
def test_reported_error_is_that_of_the_packed_layer_on_the_inputs(hadamard, rank, correct_bias):
    weight = heavy_tailed(11)
    generator = torch.Generator().manual_seed(12)
    x = torch.randn(2000, 256, generator=generator) @ torch.randn(256, 256, generator=generator) + 0.5
    moments = InputMoments((x.double().T @ x.double() / 2000).float(), x.mean(0), 2000)
    solved = solve(weight, moments, hadamard=hadamard, rank=rank, correct_bias=correct_bias)
    change = 0 if solved.bias_change is None else solved.bias_change.double()
    # As the layer computes it, from the packed weight; solve_layer itself never saw x.
    wanted = x.double() @ weight.double().T
    output = x.double() @ solved.weight.dequantize().double().T + change
    error = float((output - wanted).square().sum() / wanted.square().sum())
    assert solved.report.error == pytest.approx(error, rel=1e-3)
    assert (solved.bias_change is None) != correct_bias


def test_rotation_is_chosen_where_it_helps():
    generator = torch.Generator().manual_seed(13)
    x = torch.randn(1000, 256, generator=generator)
    moments = InputMoments(x.T @ x / 1000, x.mean(0), 1000)
    heavy = heavy_tailed(14)
    plain, rotated = (solve(heavy, moments, hadamard=block) for block in (0, 128))
    assert rotated.weight.spec.hadamard == 128
    assert rotated.report.error < 0.8 * plain.report.error
    # Weights that are ternary already can only lose.
    ternary = torch.randint(-1, 2, (64, 256), generator=generator).float()
    kept = solve(ternary, moments, hadamard=128)
    assert kept.weight.spec.hadamard == 0
    assert kept.report.error < 1e-6


def test_low_rank_beats_the_same_rank_added_afterward():
    generator = torch.Generator().manual_seed(15)
    mix = torch.randn(256, 256, generator=generator) * torch.logspace(0, -1.5, 256)
    x = torch.randn(2000, 256, generator=generator) @ mix.T
    moments = InputMoments(x.T @ x / 2000, x.mean(0), 2000)
    weight = torch.randn(96, 256, generator=generator)
    plain = solve(weight, moments)
    solved = solve(weight, moments, rank=8)
    residual = (weight - plain.weight.dequantize()).double()
    left, values, right = torch.linalg.svd(residual)
    unweighted = residual - (left[:, :8] * values[:8]) @ right[:8]
    hessian = moments.second.double()

    def ratio(error):
        return float((error @ hessian @ error.T).trace() / (weight.double() @ hessian @ weight.double().T).trace())

    assert solved.report.error < 0.9 * ratio(unweighted) < 0.9 * plain.report.error
    assert solved.weight.spec.rank == 8


@pytest.mark.parametrize("correct_bias", [False, True])
def test_compensation_makes_up_for_what_the_layers_before_have_spoilt(correct_bias):
    weight, reference = random_weight(0, 24, 32), correlated_inputs(0, 600, 32)
    generator = torch.Generator().manual_seed(5)
    x = reference @ (torch.eye(32) + 0.1 * torch.randn(32, 32, generator=generator)) + 0.2
    expected = ReferenceMoments(x.T @ reference / len(x), reference.mean(dim=0))
    plain = moments_of(x)
    moments = dataclasses.replace(plain, reference=expected)

    def solved(moments: InputMoments, share: float) -> SolvedLayer:
        config = dataclasses.replace(ONE_START, compensation=share)
        return solve(weight, moments, group_size=16, config=config, correct_bias=correct_bias)

    def error(layer: SolvedLayer) -> torch.Tensor:
        output = x @ layer.weight.dequantize().T + (0 if layer.bias_change is None else layer.bias_change)
        return (reference @ weight.T - output).square().mean() / (reference @ weight.T).square().mean()

    none, half, full = (solved(moments, share) for share in (0.0, 0.5, 1.0))
    assert torch.equal(none.weight.packed, solved(plain, 1.0).weight.packed)
    assert error(full) < error(half) < error(none)
    assert error(full) < 0.5 * error(none)
    if correct_bias:
        mean = (reference @ weight.T - x @ full.weight.dequantize().T - full.bias_change).mean(dim=0)
        assert mean.abs().max() < 1e-4
