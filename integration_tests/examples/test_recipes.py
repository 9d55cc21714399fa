# SPDX-License-Identifier: Apache-2.0
"""`examples/README.md`: commands that the command line takes, files that are there, and the table of `sizes.py`."""

import re
import runpy
from pathlib import Path

import pytest

from integration_tests.support.command_line import parse_command


EXAMPLES = Path(__file__).parents[2] / "examples"
README = (EXAMPLES / "README.md").read_text(encoding="utf-8")
COMMANDS = re.findall(r"^diffusers-ternary .*", README, flags=re.MULTILINE)


@pytest.mark.parametrize("command", COMMANDS, ids=lambda line: " ".join(line.split()[1:3]))
def test_the_command_line_takes_it(command):
    parse_command(command)


def test_every_model_has_a_command():
    recipes = re.findall(r"^## (.+?)\n(.*?)(?=^## )", README, flags=re.MULTILINE | re.DOTALL)
    commands = {
        title: re.findall(r"^diffusers-ternary calibrate", text, flags=re.MULTILINE) for title, text in recipes
    }
    assert [title for title, found in commands.items() if len(found) == 1] == [
        "FLUX.1-dev and FLUX.1-schnell",
        "FLUX.2 Klein",
        "Z-Image-Turbo",
        "Qwen-Image",
        "SANA",
        "Stable Diffusion 3.5",
        "SDXL",
        "Wan 2.2",
    ]


def test_files_that_it_names_are_there():
    for name in re.findall(r"`(?:examples/)?([\w.]+\.(?:py|ipynb|md))`", README):
        assert (EXAMPLES / name).is_file(), name


@pytest.mark.parametrize("name", ["SANA-1.6B"])  # the others are built likewise; this one in a second
def test_the_table_is_what_the_script_makes(name):
    sizes = runpy.run_path(str(EXAMPLES / "sizes.py"))
    made = [line.split(" | ") for line in sizes["table"]([name]).splitlines()]
    written = [line.split(" | ") for line in README.splitlines() if line.startswith((made[0][0], f"| {name} |"))]
    assert made[0] in written, "run `python examples/sizes.py --write`"
    assert sizes["encoders"]([name]).splitlines()[2] in README.splitlines()
    row = next(line for line in written if line[0] == f"| {name}")
    full = made[0].index("distill `full`")  # smaller where bitsandbytes is installed
    assert [*row[:full], *row[full + 1 :]] == [*made[2][:full], *made[2][full + 1 :]]
    assert {line.split(" | ")[0][2:] for line in README.splitlines() if line.startswith("| ")} > set(
        sizes["PIPELINES"]
    )
