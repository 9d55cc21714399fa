# SPDX-License-Identifier: Apache-2.0
"""Files that only other programs read: workflows, issue forms, the citation. Checked against the schemas of those."""

import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

import diffusers_ternary


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
