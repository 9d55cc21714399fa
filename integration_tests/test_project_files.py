# SPDX-License-Identifier: Apache-2.0
"""Files that only other programs read: workflows, issue forms, the citation. Checked against the schemas of those."""

import importlib
import re
import runpy
import subprocess
import sys
import tomllib
from importlib.metadata import version
from pathlib import Path
from types import SimpleNamespace

import pytest

import diffusers_ternary
from diffusers_ternary.kernels.cpu import native


ROOT = Path(__file__).parents[1]
SCHEMAS = {
    "vendor.github-workflows": (".github/workflows/ci.yml", ".github/workflows/release.yml"),
    "vendor.github-issue-forms": (".github/ISSUE_TEMPLATE/bug.yml", ".github/ISSUE_TEMPLATE/feature.yml"),
    "vendor.github-issue-config": (".github/ISSUE_TEMPLATE/config.yml",),
    "vendor.citation-file-format": ("CITATION.cff",),
}


@pytest.mark.parametrize("schema", SCHEMAS)
def test_it_follows_its_schema(schema):
    files = [str(ROOT / name) for name in SCHEMAS[schema]]
    command = [sys.executable, "-m", "check_jsonschema", "--builtin-schema", schema, *files]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr


def test_every_file_is_checked():
    found = {path.relative_to(ROOT).as_posix() for path in (ROOT / ".github").rglob("*.yml")} | {"CITATION.cff"}
    assert found == {name for names in SCHEMAS.values() for name in names}


def test_paths_in_workflows_exist():
    ours = re.compile(r"(?<![\w./])((?:\.ci|integration_tests|diffusers_ternary)/[\w./]+)")
    for workflow in (ROOT / ".github" / "workflows").glob("*.yml"):
        for name in ours.findall(workflow.read_text()):
            assert (ROOT / name).exists(), f"{workflow.name}: {name}"


def test_the_version_is_written_once():
    assert version("diffusers-ternary") == diffusers_ternary.__version__
    assert f"version: {diffusers_ternary.__version__}\n" in (ROOT / "CITATION.cff").read_text()
    changelog = (ROOT / "diffusers_ternary" / "CHANGELOG.md").read_text()
    newest = next(line for line in changelog.splitlines() if line.startswith("## "))
    assert newest in ("## Unreleased", f"## {diffusers_ternary.__version__}")


def test_only_compilers_of_gnu_c_are_asked():
    """MSVC would answer with errors; the library is optional, so it is left out with one line."""
    setuptools = pytest.importorskip("setuptools")
    named = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["cmdclass"]["build_ext"]
    module, _, name = named.rpartition(".")
    command = getattr(importlib.import_module(module), name)(setuptools.Distribution())
    warnings = []
    command.warn = warnings.append
    for compiler in ("msvc", "mingw32"):
        command.extensions = ["never looked at"]
        command.compiler = SimpleNamespace(compiler_type=compiler)
        command.build_extensions()
        assert command.extensions == []
        assert compiler in warnings.pop()
        assert warnings == []


def test_wheels_look_for_every_function_that_is_called():
    script = runpy.run_path(str(ROOT / ".ci" / "wheels.py"))
    assert script["exported_functions"]() == list(native._SIGNATURES)
    tags = [system.tag for system in script["SYSTEMS"]]
    assert len(set(tags)) == len(tags)


def test_the_release_makes_wheels_with_the_compiler_that_was_tried():
    pinned = re.search(r"ziglang==[\d.]+", (ROOT / ".ci" / "wheels.py").read_text())
    assert pinned
    assert pinned[0] in (ROOT / ".github" / "workflows" / "release.yml").read_text()
