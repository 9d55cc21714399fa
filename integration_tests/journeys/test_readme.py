# SPDX-License-Identifier: Apache-2.0
"""The README's commands are those that CI runs, and its snippets run as they stand."""

import os
import pathlib
import re
import subprocess
import sys

import pytest


ROOT = pathlib.Path(__file__).parents[2]
README = (ROOT / "README.md").read_text(encoding="utf-8")


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", README, flags=re.DOTALL)


def test_ci_runs_the_readme_test_command():
    commands = [block.strip() for block in blocks("bash") if "pytest" in block]
    assert len(commands) == 1
    assert commands[0] in (ROOT / ".ci" / "run").read_text(encoding="utf-8")


def test_the_pinned_versions_are_named():
    text = (ROOT / "CONTRIBUTING.md").read_text(encoding="utf-8")
    pins = dict(
        line.split("==")
        for line in (ROOT / "integration_tests" / "constraints.txt").read_text().splitlines()
        if "==" in line and not line.startswith("#")
    )
    for name in ("torch", "diffusers", "transformers", "peft", "accelerate"):
        assert f"{name} {pins[name]}" in text, name


def test_it_is_read_in_three_minutes():
    assert len(README.splitlines()) <= 150


def test_links_and_pictures_exist():
    for target in re.findall(r"\]\(([^)#]+)\)", README):
        assert target.startswith("https://") or (ROOT / target).exists(), target


@pytest.mark.slow
def test_readme_snippets_run(tmp_path):
    first, second, *others = blocks("python")
    # The second block is for a fresh process; the others go on where the one before ended.
    for source in (first + "".join(others), second):
        result = subprocess.run(
            [sys.executable, "-c", source],
            cwd=tmp_path,
            env={**os.environ, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"},  # the model is too small for more
            capture_output=True,
            text=True,
        )
        assert result.returncode == 0, result.stderr[-2000:]
    assert (tmp_path / "packed" / "transformer" / "diffusion_pytorch_model.safetensors").stat().st_size < 2_000_000


def test_readme_commands_exist():
    from typer.main import get_command

    from diffusers_ternary.cli import app

    commands = get_command(app).commands
    used = set(re.findall(r"^diffusers-ternary (\w+)", README, flags=re.MULTILINE))
    assert used <= set(commands), used - set(commands)
