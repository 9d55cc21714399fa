# SPDX-License-Identifier: Apache-2.0
"""Canaries of what `compat` uses of torch: each fails readably when a new version moves it."""

import pytest
import torch
import torch.autograd.forward_ad as forward_ad
from torch._subclasses import FakeTensorMode
from torch.utils.flop_counter import FlopCounterMode

from diffusers_ternary.kernels.compat import constant_when_traced, is_autocast, is_plain, returns_no_view


X = torch.ones(2)


def test_the_mark_of_constant_results():
    ours, theirs = (mark(lambda: 1) for mark in (constant_when_traced, torch.compiler.assume_constant_result))
    assert vars(ours) == vars(theirs)


def test_a_plain_call():
    assert is_plain(X)
    assert is_plain(torch.nn.Parameter(X, requires_grad=False))
    with torch.inference_mode():
        assert is_plain(torch.ones(2))


def test_gradients():
    x = torch.ones(2, requires_grad=True)
    assert not is_plain(x)
    with torch.no_grad():
        assert is_plain(x)


def test_dispatch_modes():
    with FlopCounterMode(display=False):
        assert not is_plain(X)
    with FakeTensorMode():
        assert not is_plain(torch.ones(2))
    assert is_plain(X)


def test_subclasses():
    class Sub(torch.Tensor):
        pass

    assert not is_plain(X.as_subclass(Sub))


@pytest.mark.parametrize("transform", [torch.vmap, torch.func.grad], ids=["vmap", "grad"])
def test_function_transforms(transform):
    seen = []
    transform(lambda x: (seen.append(is_plain(x)), x.sum())[1])(X)
    assert seen == [False]


def test_forward_derivatives():
    with forward_ad.dual_level():
        assert not is_plain(X)
    assert is_plain(X)


@pytest.mark.filterwarnings("ignore")
def test_tracing():
    seen = []
    torch.jit.trace(lambda x: (seen.append(is_plain(x)), x + 1)[1], X, check_trace=False)
    assert seen == [False]


def test_autocast():
    assert not is_autocast(X)
    with torch.autocast("cpu"):
        assert is_autocast(X)
    with torch.autocast("cuda", enabled=True):  # of another device; warns where there is none and stays off
        assert not is_autocast(X)


@pytest.mark.parametrize("mode", [torch.enable_grad, torch.no_grad, torch.inference_mode])
def test_views_become_tensors_of_their_own(mode):
    with mode():
        x = torch.arange(4.0)
        y = returns_no_view(lambda: x.view(2, 2))()
        assert y._base is None
        assert y.data_ptr() == x.data_ptr()
        assert y.tolist() == [[0, 1], [2, 3]]
        assert returns_no_view(lambda: x)() is x
