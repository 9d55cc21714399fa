# SPDX-License-Identifier: Apache-2.0
"""Triton's interpreter, which runs kernels on the CPU, and where it does not work."""

import numpy
import pytest


def skip_without_interpreter() -> None:
    """Skips where Triton is not installed, or is one whose interpreter this numpy breaks."""
    triton = pytest.importorskip("triton")
    version = tuple(int(part) for part in triton.__version__.split(".")[:2])
    numpy_version = tuple(int(part) for part in numpy.__version__.split(".")[:2])
    if version < (3, 7) and numpy_version >= (2, 4):
        # It makes Python numbers of arrays of one element.
        pytest.skip(
            f"the interpreter of Triton {triton.__version__} needs numpy < 2.4, and here is {numpy.__version__}",
            allow_module_level=True,
        )
