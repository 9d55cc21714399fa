# SPDX-License-Identifier: Apache-2.0
"""Bars: a library obeys its host, a command hides the host's bars and keeps its own."""

import pytest
from diffusers.utils import logging as diffusers_logging

from diffusers_ternary.cli.quiet import quiet_hosts
from diffusers_ternary.progress import Bar


@pytest.fixture(autouse=True)
def restored(monkeypatch):
    monkeypatch.setattr(Bar, "always", False)
    before = diffusers_logging.is_progress_bar_enabled()
    yield
    (diffusers_logging.enable_progress_bar if before else diffusers_logging.disable_progress_bar)()


def test_a_bar_obeys_the_host():
    diffusers_logging.enable_progress_bar()
    assert not Bar([], "work").disable
    assert Bar([], "work", visible=False).disable
    diffusers_logging.disable_progress_bar()
    assert Bar([], "work").disable


def test_commands_show_their_own_bars_and_not_those_of_the_hosts(capsys):
    diffusers_logging.enable_progress_bar()
    quiet_hosts()
    assert list(diffusers_logging.tqdm([1], desc="theirs")) == [1]
    bar = Bar([1, 2], "ours")
    bar.delay = bar.mininterval = 0
    assert list(bar) == [1, 2]
    error = capsys.readouterr().err
    assert "theirs" not in error
    assert "ours: " in error
    assert list(Bar([1, 2], "done within a second")) == [1, 2]
    assert "within a second" not in capsys.readouterr().err
