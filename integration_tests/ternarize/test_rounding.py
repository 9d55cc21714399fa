# SPDX-License-Identifier: Apache-2.0
"""Rounding rules against their definitions: numpy for TWN and absmean, brute force over all codes for the optimum."""

import itertools

import numpy as np
import pytest
import torch

from diffusers_ternary.ternarize import ROUNDINGS, absmean, optimum, twn


def groups_of(seed: int, *shape: int) -> torch.Tensor:
    return torch.randn(*shape, generator=torch.Generator().manual_seed(seed))


def counts_of(groups: torch.Tensor, last: int | None = None) -> torch.Tensor:
    counts = torch.full((groups.shape[-2],), float(groups.shape[-1]))
    if last is not None:
        counts[-1] = last
    return counts


def numpy_twn(row: np.ndarray) -> tuple[np.ndarray, float]:
    """Li et al., arXiv 1605.04711, equations 5 and 6, in float64."""
    delta = 0.75 * np.abs(row).mean()
    codes = np.sign(row) * (np.abs(row) > delta)
    kept = np.abs(row)[codes != 0]
    return codes, float(kept.mean()) if kept.size else 0.0


def numpy_absmean(row: np.ndarray) -> tuple[np.ndarray, float]:
    """Ma et al., arXiv 2402.17764, equations 1 to 3, in float64 (ties of 0.5 are measure zero here)."""
    scale = np.abs(row).mean()
    return np.clip(np.round(row / scale), -1, 1), float(scale)


@pytest.mark.parametrize(("rule", "reference"), [(twn, numpy_twn), (absmean, numpy_absmean)])
@pytest.mark.parametrize("seed", range(3))
def test_against_numpy(rule, reference, seed):
    groups = groups_of(seed, 6, 4, 37)
    groups[:, -1, 20:] = 0  # the last group is short
    result = rule(groups, counts_of(groups, last=20))
    for row in range(6):
        for group in range(4):
            length = 20 if group == 3 else 37
            codes, scale = reference(groups[row, group, :length].double().numpy())
            assert result.codes[row, group, :length].tolist() == codes.tolist()
            assert not result.codes[row, group, length:].any()
            assert result.scales[row, group].item() == pytest.approx(scale, rel=1e-5)


def brute_force_error(row: np.ndarray) -> float:
    """Least squared error over all 3^n codes, each with its own best scale of at least 0."""
    best = float((row**2).sum())
    for codes in itertools.product((-1, 0, 1), repeat=len(row)):
        code = np.array(codes, dtype=np.float64)
        support = (code**2).sum()
        if support:
            scale = max(0.0, float(row @ code) / support)
            best = min(best, float(((row - scale * code) ** 2).sum()))
    return best


@pytest.mark.parametrize("length", [1, 2, 3, 7])
@pytest.mark.parametrize("seed", range(4))
def test_the_optimum_beats_every_code(seed, length):
    groups = groups_of(seed, 2, 1, length)
    result = optimum(groups, counts_of(groups))
    error = ((groups - result.codes * result.scales[..., None]) ** 2).sum(dim=-1)
    for row in range(2):
        expected = brute_force_error(groups[row, 0].double().numpy())
        assert error[row, 0].item() == pytest.approx(expected, rel=1e-4, abs=1e-7)


@pytest.mark.parametrize("name", ["twn", "absmean"])
@pytest.mark.parametrize("distribution", ["gaussian", "laplace", "uniform", "student"])
def test_no_rule_beats_the_optimum(name, distribution):
    generator = np.random.default_rng(0)
    draws = {
        "gaussian": generator.standard_normal((32, 4, 128)),
        "laplace": generator.laplace(size=(32, 4, 128)),
        "uniform": generator.uniform(-1, 1, (32, 4, 128)),
        "student": generator.standard_t(3, (32, 4, 128)),
    }
    groups = torch.from_numpy(draws[distribution]).float()

    def errors(rule: str) -> torch.Tensor:
        result = ROUNDINGS[rule](groups, counts_of(groups))
        return ((groups - result.codes * result.scales[..., None]) ** 2).sum(dim=-1)

    assert (errors("optimum") <= errors(name) * (1 + 1e-5)).all()


@pytest.mark.parametrize("name", ROUNDINGS)
class TestEdges:
    def test_zeros_have_scale_zero(self, name):
        groups = torch.zeros(2, 3, 8)
        result = ROUNDINGS[name](groups, counts_of(groups))
        assert not result.codes.any()
        assert not result.scales.any()

    def test_a_zero_group_beside_others(self, name):
        groups = groups_of(0, 1, 3, 8)
        groups[:, 1] = 0
        result = ROUNDINGS[name](groups, counts_of(groups))
        assert result.scales[0, 1] == 0
        assert (result.scales[0, [0, 2]] > 0).all()

    @pytest.mark.parametrize("value", [3.0, -3.0, 1e-6, 1e6])
    def test_constants_are_exact(self, name, value):
        groups = torch.full((1, 1, 16), value)
        result = ROUNDINGS[name](groups, counts_of(groups))
        assert (result.codes == (1 if value > 0 else -1)).all()
        assert result.scales.item() == pytest.approx(abs(value), rel=1e-6)

    def test_one_column(self, name):
        groups = torch.tensor([[[0.7]], [[-0.2]], [[0.0]]])
        result = ROUNDINGS[name](groups, counts_of(groups))
        assert result.codes.flatten().tolist() == [1, -1, 0]
        torch.testing.assert_close(result.scales.flatten(), torch.tensor([0.7, 0.2, 0.0]))

    def test_equal_magnitudes_stay_exact(self, name):
        groups = torch.tensor([[[0.5, -0.5, 0.5, -0.5]]])
        result = ROUNDINGS[name](groups, counts_of(groups))
        assert (result.codes * result.scales[..., None]).tolist() == groups.tolist()

    def test_one_large_weight_among_zeros(self, name):
        groups = torch.zeros(1, 1, 128)
        groups[0, 0, 77] = -4.0
        result = ROUNDINGS[name](groups, counts_of(groups))
        assert result.codes[0, 0].nonzero().flatten().tolist() == [77]
        if name != "absmean":  # whose scale is the mean of all weights by definition
            assert result.scales.item() == 4.0

    def test_signs_are_symmetric(self, name):
        groups = groups_of(5, 4, 2, 64)
        plus = ROUNDINGS[name](groups, counts_of(groups))
        minus = ROUNDINGS[name](-groups, counts_of(groups))
        assert torch.equal(plus.codes, -minus.codes)
        assert torch.equal(plus.scales, minus.scales)

    def test_padding_changes_nothing(self, name):
        groups = groups_of(6, 4, 1, 20)
        padded = torch.nn.functional.pad(groups, (0, 12))
        plain = ROUNDINGS[name](groups, counts_of(groups))
        with_padding = ROUNDINGS[name](padded, counts_of(padded, last=20))
        assert torch.equal(plain.codes, with_padding.codes[..., :20])
        assert not with_padding.codes[..., 20:].any()
        torch.testing.assert_close(plain.scales, with_padding.scales)

    def test_scales_follow_the_weights(self, name):
        groups = groups_of(7, 2, 2, 64)
        one = ROUNDINGS[name](groups, counts_of(groups))
        four = ROUNDINGS[name](4 * groups, counts_of(groups))
        assert torch.equal(one.codes, four.codes)
        assert torch.equal(4 * one.scales, four.scales)
