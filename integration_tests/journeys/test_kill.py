# SPDX-License-Identifier: Apache-2.0
"""Every command that writes, on a full disk and ended at random moments: its destination is the old or the new one."""

import json
import os
import random
import sys

import pytest

from integration_tests.support import killing
from integration_tests.support.fresh_process import run_python


pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(sys.platform == "win32", reason="forks, and sends signals that Windows does not have"),
]
COMMANDS = ("quantize", "convert", "export", "calibrate", "distill", "evaluate", "push")


@pytest.fixture(scope="module")
def seed() -> int:
    return int(os.environ.get("KILL_SEED") or random.randrange(1_000_000))


@pytest.fixture(scope="module")
def trials(seed, tmp_path_factory) -> dict:
    code = """
    import json, pathlib, sys
    from integration_tests.support import killing
    print(json.dumps(killing.run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
    """
    kills = int(os.environ.get("KILLS") or len(killing.SIGNALS))
    return run_python(code, tmp_path_factory.mktemp("kills"), seed, kills, TOKENIZERS_PARALLELISM="false")


@pytest.mark.parametrize("command", COMMANDS)
def test_a_full_disk_is_one_sentence_and_leaves_nothing(trials, command) -> None:
    full = trials[command]["full"]
    errors = [line for line in full["says"].splitlines() if line.startswith("error: ")]
    assert full["status"] == 3, full
    assert len(errors) == 1, full
    reason = "No space left on device" if command == "export" else "File too large"  # numpy does not say which
    assert f"cannot be written: {reason}" in errors[0], full
    assert ".partial" not in errors[0], full
    assert "Traceback" not in full["says"], full
    assert full["state"] == "old", full
    assert full["left"] == [], full


@pytest.mark.parametrize("command", COMMANDS)
def test_a_killed_command_leaves_all_or_nothing(trials, seed, command) -> None:
    trial = trials[command]
    told = f"KILL_SEED={seed} shows it again: {json.dumps(trial, indent=1)}"
    for kill in trial["kills"]:
        assert kill["state"] in ("old", "new"), told
        # Who is asked to end, and has not yet put the new result into its place, cleans up.
        if kill["signal"] != "SIGKILL" and kill["state"] == "old":
            assert not [name for name in kill["left"] if name.endswith(".partial")], told
    assert trial["status"] == 0, told
    assert trial["complete"], f"the next run ends with the same result. {told}"
    assert trial["left"] == [], f"the next run cleans up. {told}"
    assert trial["names"] == sorted({"output.txt", *trial["destination"]}), told
