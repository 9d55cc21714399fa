# SPDX-License-Identifier: Apache-2.0
"""Every field of a config is an option of the commands that take the config, with the field's own default and help."""

import inspect

import pytest
import typer
from typer.testing import CliRunner

from diffusers_ternary import CalibrationConfig, DistillConfig, TernaryConfig
from diffusers_ternary.calibration import SensitivityConfig, SolverConfig
from diffusers_ternary.cli import app, calibrate, distill, quantize
from diffusers_ternary.cli.fields import read_fields, with_options
from diffusers_ternary.cli.options import CALL


CONFIGS = {
    "TernaryConfig": TernaryConfig,
    "CalibrationConfig": CalibrationConfig,
    "SolverConfig": SolverConfig,
    "SensitivityConfig": SensitivityConfig,
    "DistillConfig": DistillConfig,
}
COMMANDS = {
    "quantize": (quantize.WEIGHTS,),
    "calibrate": (calibrate.WEIGHTS, *calibrate.CALIBRATION.groups),
    "distill": (distill.TRAINING, distill.WEIGHTS, *distill.CALIBRATION.groups),
}
GROUPS = {(group.file, group.cls) for groups in COMMANDS.values() for group in groups}
# Fields without an option of their own, and where they are set instead.
ELSEWHERE = {
    "TernaryConfig": {"format_version"},  # of a file that is read
    "CalibrationConfig": {"call_kwargs", "solver", "sensitivity"},  # --steps, ..., --set; their own fields
    "SolverConfig": set(),
    "SensitivityConfig": set(),
    "DistillConfig": {"call_kwargs", "calibration"},  # the same; --rounded and --calibration-...
}


def options(command, name=None):
    found = typer.main.get_command(app).commands[command].params
    return [option for option in found if name in (None, option.name)]


def given(groups, arguments):
    """What the options become, and what is printed."""
    seen, probe = {}, typer.Typer()

    @probe.command()
    @with_options(*groups, CALL)
    def command(**values):
        for group in groups:
            seen.update(group.given(values))

    result = CliRunner().invoke(probe, arguments, catch_exceptions=False)
    assert result.exit_code == 0, result.output
    return seen, result.output


@pytest.mark.parametrize(("file", "name"), sorted(GROUPS))
def test_what_is_read_from_the_source_is_what_the_class_has(file, name):
    parameters = inspect.signature(CONFIGS[name]).parameters.values()
    assert {each.kind for each in parameters} <= {inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD}
    expected = {each.name: each for each in parameters if each.kind is inspect.Parameter.KEYWORD_ONLY}
    fields = {field.name: field for field in read_fields(file, name)}
    assert list(fields) == list(expected)
    for field in fields.values():
        assert field.doc.endswith("."), field.name
        if field.name not in ELSEWHERE[name]:
            assert field.default == repr(expected[field.name].default), field.name


@pytest.mark.parametrize("command", COMMANDS)
def test_every_field_has_an_option(command):
    shown = [name for option in options(command) for name in (*option.opts, *option.secondary_opts)]
    assert len(shown) == len(set(shown))
    for group in COMMANDS[command]:
        fields = {field.name for field in group.fields()}
        # calibrate has the solver's rounding, and no other.
        served = fields | ELSEWHERE[group.cls] | ({"rounding"} if command == "calibrate" else set())
        assert {field.name for field in read_fields(group.file, group.cls)} <= served
        assert {group.flag(name) for name in fields} <= set(shown)


@pytest.mark.parametrize("command", typer.main.get_command(app).commands)
def test_help_reads_well_in_80_columns(command):
    result = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "80", "TERMINAL_WIDTH": "80"})
    assert result.exit_code == 0
    assert "…" not in result.output
    for option in options(command):
        if not option.hidden and option.name != "help":
            assert option.help, option.name
            assert "`" not in option.help
            assert option.param_type_name == "argument" or max(option.opts, key=len) in result.output
    text = typer.main.get_command(app).commands[command].help
    assert not any("\n" in paragraph for paragraph in text.split("\n\n")), "the terminal wraps lines, not the source"


def test_the_help_of_a_field_speaks_of_options():
    texts = {flag: option.help for option in options("distill") for flag in option.opts}
    assert "; default: what accelerate launch says." in texts["--mixed-precision"]
    assert "What --override says comes first." in texts["--kind"]
    assert "--kind" not in texts["--component"]  # its KIND is a part of the value


def test_one_word_for_one_thing():
    """The arguments of the pipeline call are the same options in all commands."""
    for name in [parameter.name for parameter in CALL.parameters()]:
        found = [option for command in ("calibrate", "distill", "evaluate") for option in options(command, name)]
        assert len(found) == 3
        assert len({(tuple(option.opts), option.help) for option in found}) == 1


@pytest.mark.parametrize(
    ("command", "arguments", "expected"),
    [
        ("quantize", "", {}),
        ("quantize", "--group-size 0", {"group_size": None}),
        ("quantize", "--group-size none", {"group_size": None}),
        ("quantize", "--hadamard 128 --rank 8 --kind int8", {"hadamard": 128, "rank": 8, "kind": "int8"}),
        ("quantize", "--activation-dtype int8", {"activation_dtype": "int8"}),
        ("quantize", "--component a --component b", {"components": ["a", "b"]}),
        ("quantize", "--component a=ternary --component b=int8", {"components": {"a": "ternary", "b": "int8"}}),
        ("quantize", "--skip x --override y=keep", {"modules_to_not_convert": ["x"], "overrides": {"y": "keep"}}),
        ("calibrate", "--no-gptq --sequential", {"gptq": False, "sequential": True}),
        ("calibrate", "--gptq --no-sequential", {"gptq": True, "sequential": False}),
        ("calibrate", "--sensitivity-ranks 8,16 --rounding optimum", {"ranks": (8, 16), "rounding": "optimum"}),
        ("distill", "--guidance-range 1,2.5", {"guidance_range": (1.0, 2.5)}),
        ("distill", "--tracker a --tracker b", {"trackers": ("a", "b")}),
        ("distill", "--start-rank 8 --rank 4", {"rank": 8}),
        ("distill", "--calibration-starts 2 --calibration-seed 3", {"starts": 2, "seed": 3}),
    ],
)
def test_values_become_arguments_of_the_config(command, arguments, expected):
    seen, printed = given(COMMANDS[command], arguments.split())
    assert seen == expected
    assert printed == ""


def test_a_list_that_cannot_be_read_names_the_flag():
    with pytest.raises(ValueError, match=r"--guidance-range 'low' cannot be read"):
        given(COMMANDS["distill"], ["--guidance-range", "low"])


@pytest.mark.parametrize(
    ("old", "new", "value"),
    [
        ("--scales", "--scale-layout", "group"),
        ("--passes", "--descent-passes", "3"),
        ("--accumulate", "--gradient-accumulation-steps", "2"),
        ("--precision", "--mixed-precision", "bf16"),
    ],
)
def test_an_old_flag_is_hidden_read_and_warns(old, new, value):
    groups = next(groups for groups in COMMANDS.values() if any(old in group.formerly.values() for group in groups))
    seen, printed = given(groups, [old, value])
    assert [str(each) for each in seen.values()] == [value]
    assert f"{old} is {new} now" in printed
    commands = [name for name, found in COMMANDS.items() if found is groups]
    assert all(option.hidden for name in commands for option in options(name) if old in option.opts)
