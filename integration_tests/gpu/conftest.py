# SPDX-License-Identifier: Apache-2.0
"""Marks every test of this folder `gpu`.

Without a GPU, the tests of what only a GPU has (its streams, graphs and memory) are skipped; the others run on the
CPU with small shapes, so that they cannot rot. `integration_tests/kernels/triton/test_kernels.py` tests the kernels
one by one, compiled where there is a GPU.
"""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)


@pytest.fixture
def cuda() -> None:
    """Asked for by tests of what only a GPU has."""
    if not torch.cuda.is_available():
        pytest.skip("no GPU")
