# SPDX-License-Identifier: Apache-2.0
"""`diffusers-ternary plan`: what it predicts is tested in `integration_tests/planning/`."""

import json

from integration_tests.support.command_line import run_command


def test_a_known_model_is_planned_at_its_own_size():
    own, given, large = (
        json.loads(run_command("plan", "demo", "--json", *arguments).stdout)
        for arguments in ((), ("--pixels", "16"), ("--pixels", "1024"))
    )
    assert own == given
    assert own["drawing"] < large["drawing"]
