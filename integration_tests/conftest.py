# SPDX-License-Identifier: Apache-2.0
"""Set-up of the whole suite: no network, few threads."""

import os
import sys
from collections.abc import Iterator

import pytest


os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("HF_HUB_DISABLE_TELEMETRY", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("OMP_NUM_THREADS", "1")  # of each of the two test processes, and of what they start


@pytest.fixture(autouse=True)
def _forget_compiled_code() -> Iterator[None]:
    """Graphs count against a limit per function, and every test compiles the forward of the same layers."""
    yield
    if "torch._dynamo" in sys.modules:
        sys.modules["torch"]._dynamo.reset()


@pytest.fixture(scope="module")
def one_thread() -> Iterator[None]:
    """Sums in the same order everywhere, for `pytestmark = pytest.mark.usefixtures("one_thread")`."""
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)
