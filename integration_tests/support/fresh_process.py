# SPDX-License-Identifier: Apache-2.0
"""Runs code in a fresh interpreter, as a user who comes back the next day would."""

import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any


ROOT = Path(__file__).parents[2]


def run_python(code: str, *arguments: object, **environment: str) -> Any:
    """Runs `code` with `arguments` in `sys.argv[1:]` and returns its last printed line, read as JSON.

    `integration_tests.support` can be imported; one thread, so that sums are in the same order everywhere.
    """
    paths = [str(ROOT), *filter(None, [os.environ.get("PYTHONPATH")])]
    result = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code), *map(str, arguments)],
        capture_output=True,
        text=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1", **environment},
    )
    assert result.returncode == 0, f"the fresh process failed:\n{result.stderr[-4000:]}"
    return json.loads(result.stdout.splitlines()[-1])
