# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary demo`: the README's first command."""

import json
import math

import pytest
import torch
from PIL import Image

from diffusers_ternary.cli.console import ExitCode
from diffusers_ternary.demo import demo_pipeline
from diffusers_ternary.demo.grammar import held_out_prompts
from diffusers_ternary.demo.run import FULL_PROMPTS, QUICK_PROMPTS, DemoRow
from diffusers_ternary.demo.variants import STUDENTS, TEACHER, find_variant, stored_size
from integration_tests.support.command_line import run_command


KEYS = [
    "variant",
    "bits_per_weight",
    "bytes",
    "attribute_accuracy",
    "all_attributes",
    "psnr_db",
    "velocity_nmse",
    "seconds",
]


@pytest.fixture(scope="module")
def outcome(tmp_path_factory):
    folder = tmp_path_factory.mktemp("demo")
    return folder, run_command("demo", "--json", folder / "demo.json", "--output", folder / "out")


@pytest.mark.slow
def test_the_json_has_the_promised_keys(outcome) -> None:
    folder, run = outcome
    assert run.exit_code == ExitCode.OK, run.output
    rows = json.loads((folder / "demo.json").read_text(encoding="utf-8"), parse_constant=pytest.fail)
    assert [row["variant"] for row in rows] == ["teacher", *(variant.name for variant in STUDENTS)]
    assert all(list(row) == KEYS for row in rows)


@pytest.mark.slow
def test_the_numbers_are_plausible(outcome) -> None:
    folder, run = outcome
    assert run.exit_code == ExitCode.OK, run.output
    teacher, *students = json.loads((folder / "demo.json").read_text(encoding="utf-8"))
    assert teacher["bits_per_weight"] == 16.0
    assert teacher["psnr_db"] is None
    assert teacher["velocity_nmse"] is None
    assert teacher["attribute_accuracy"] > 0.96
    for student in students:
        assert 1.58 < student["bits_per_weight"] < 2.5
        assert student["bytes"] < teacher["bytes"] / 5
        assert math.isfinite(student["psnr_db"])
        assert student["velocity_nmse"] > 0


@pytest.mark.slow
def test_the_sheet_and_the_table_show_every_variant(outcome) -> None:
    folder, run = outcome
    assert run.exit_code == ExitCode.OK, run.output
    assert Image.open(folder / "out" / "contact_sheet.png").height > 2 * 176
    assert all(variant.name in run.output for variant in (TEACHER, *STUDENTS))
    assert f"{QUICK_PROMPTS} held-out prompts" in run.output


def test_full_has_at_least_256_prompts() -> None:
    assert FULL_PROMPTS >= 256
    assert len(held_out_prompts(FULL_PROMPTS)) == FULL_PROMPTS


def test_bad_paths_fail_before_anything_is_drawn(tmp_path) -> None:
    run = run_command("demo", "--json", tmp_path / "missing" / "demo.json")
    assert run.exit_code == ExitCode.BAD_INPUT
    assert "does not exist" in run.output
    assert run_command("demo", "--threads", 0).exit_code == ExitCode.USAGE


def test_files_of_others_are_kept(tmp_path) -> None:
    (tmp_path / "package.json").write_text('{"mine": 1}')
    (tmp_path / "contact_sheet.png").write_text("mine")
    for options in (["--json", tmp_path / "package.json", "--output", tmp_path / "new"], ["--output", tmp_path]):
        run = run_command("demo", *options)
        assert run.exit_code == ExitCode.BAD_INPUT, run.output
        assert "another kind of file" in " ".join(run.output.split())
    assert (tmp_path / "package.json").read_text() == '{"mine": 1}'
    assert (tmp_path / "contact_sheet.png").read_text() == "mine"


def test_stored_size_is_that_of_the_saved_file(tmp_path) -> None:
    """The bytes of all tensors in the file, from its own header."""
    from diffusers_ternary.interop.inspection import inspect_path

    for variant in (TEACHER, *STUDENTS):
        denoiser = variant.load(torch.bfloat16).transformer
        denoiser.save_pretrained(tmp_path / variant.name)
        (component,) = inspect_path(tmp_path / variant.name)
        size = stored_size(denoiser)
        assert size.bytes == component.bytes
        assert size.bits_per_weight == pytest.approx(component.packed_bits_per_weight or 16.0)


def test_a_file_is_no_output_folder(tmp_path) -> None:
    (tmp_path / "out").touch()
    outcome = run_command("demo", "--output", tmp_path / "out")
    assert outcome.exit_code == ExitCode.BAD_INPUT, outcome.output
    assert "is a file. Name a folder." in " ".join(outcome.output.split())


def test_variants_do_not_share_weights() -> None:
    first, second = (find_variant("teacher").load(torch.float32).transformer for _ in range(2))
    pointers = [{parameter.data_ptr() for parameter in model.parameters()} for model in (first, second)]
    assert not pointers[0] & pointers[1]
    with pytest.raises(ValueError, match="no variant 'distillled'"):
        find_variant("distillled")


def test_numbers_that_are_not_finite_become_null() -> None:
    row = DemoRow("x", 1.7, 1, 1.0, 1.0, math.inf, math.nan, 1.0).to_dict()
    assert row["psnr_db"] is None
    assert row["velocity_nmse"] is None


def test_the_embedded_pipeline_is_stock() -> None:
    assert type(demo_pipeline()).__module__.startswith("diffusers.")
