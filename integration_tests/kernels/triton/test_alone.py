# SPDX-License-Identifier: Apache-2.0
"""The folder of Triton kernels needs torch and Triton only, so that its files can be published as they are."""

import ast
import os
import shutil
import subprocess
import sys
from pathlib import Path

from diffusers_ternary.kernels import triton as kernels
from integration_tests.support.interpreter import skip_without_interpreter


FOLDER = Path(kernels.__file__).parent
ALLOWED = {"torch", "triton"} | set(sys.stdlib_module_names)

# A product, computed by a copy of the folder under another name, with this package out of reach.
PROGRAM = """
import sys
sys.modules["diffusers_ternary"] = None
import torch
import published
from published import {modules}

codes = torch.randint(-1, 2, (16, 64))
planes = codes.view(16, 4, 16) & 3
packed = sum(planes[:, j] << (6 - 2 * j) for j in range(4)).to(torch.uint8).view(torch.int8)
x = torch.randn(3, 64)
weight = published.PackedWeight(packed, torch.full((16, 1), 0.5), None, 64, 64)
y = published.linear(x, weight, None, "none")
torch.testing.assert_close(y, x @ (codes.float() * 0.5).T, rtol=1e-5, atol=1e-5)
assert published.unavailable_reason("cpu") is None
"""


def test_imports_stay_inside_the_folder():
    for file in FOLDER.glob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.ImportFrom):
                assert node.level <= 1, f"{file.name}:{node.lineno} leaves the folder"
                names = [] if node.level else [str(node.module)]
            else:
                names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            assert {name.split(".")[0] for name in names} <= ALLOWED, f"{file.name}:{node.lineno} imports {names}"


def test_a_copy_works_alone(tmp_path):
    skip_without_interpreter()
    shutil.copytree(FOLDER, tmp_path / "published", ignore=shutil.ignore_patterns("__pycache__"))
    modules = ", ".join(sorted(file.stem for file in FOLDER.glob("*.py") if file.stem != "__init__"))
    environment = {**os.environ, "TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": ""}
    result = subprocess.run(
        [sys.executable, "-c", PROGRAM.format(modules=modules)],
        cwd=tmp_path,
        env={**environment, "PYTHONPATH": str(tmp_path)},
        capture_output=True,
        text=True,
        check=False,
    )
    assert result.returncode == 0, result.stderr[-4000:]
