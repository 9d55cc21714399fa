# SPDX-License-Identifier: Apache-2.0
"""Marks every test of this folder `gpu` and skips it where there is none.

`integration_tests/unit/test_kernels_triton.py` runs compiled on such a machine; it tests the kernels one by one.
"""

from pathlib import Path

import pytest
import torch


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    for item in items:
        if Path(__file__).parent in item.path.parents:
            item.add_marker(pytest.mark.gpu)
            if not torch.cuda.is_available():
                item.add_marker(pytest.mark.skip(reason="no GPU"))


@pytest.fixture(autouse=True)
def _seed() -> None:
    torch.manual_seed(0)
