# SPDX-License-Identifier: Apache-2.0
"""Runs tests of kernels under Triton's interpreter, which must be chosen before Triton is imported."""

import os
import subprocess
import sys
from pathlib import Path

from integration_tests.support.interpreter import skip_without_interpreter


skip_without_interpreter()


def test_kernels_under_the_interpreter():
    tests = [Path(__file__).with_name(f"test_{name}.py") for name in ("kernels", "trial", "eight_bit")]
    result = subprocess.run(
        [sys.executable, "-m", "pytest", "-q", "-x", "-p", "no:cacheprovider", "-W", "ignore", *map(str, tests)],
        env={**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stdout[-8000:] + result.stderr[-2000:]
    assert " passed" in result.stdout
