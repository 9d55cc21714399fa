# SPDX-License-Identifier: Apache-2.0
"""Every transformer, UNet and ControlNet class of diffusers, tiny; and the table in the docs that says what works."""

import pytest

from integration_tests.support import architectures
from integration_tests.support.architecture_table import FILE, check, default_sizes, expected_run, row


pytestmark = pytest.mark.usefixtures("one_thread")
RUN = [cls.__name__ for cls in architectures.exported_classes() if expected_run(cls.__name__) == "yes"]


@pytest.mark.parametrize("name", RUN)
def test_quantized_saved_and_loaded(name, tmp_path):
    check(name, tmp_path)


@pytest.mark.parametrize("cls", architectures.exported_classes(), ids=lambda cls: cls.__name__)
def test_the_line_in_the_docs(cls):
    """The docs are made with one version of diffusers; a class that another one adds is not in them yet."""
    lines = {line.split(" | ")[0].removeprefix("| "): line for line in FILE.read_text().splitlines()}
    if cls.__name__ not in lines:
        pytest.skip(f"not in {FILE.name}: write it again with python -m integration_tests.support.architecture_table")
    assert lines[cls.__name__] == row(cls.__name__, default_sizes(cls), expected_run(cls.__name__))
