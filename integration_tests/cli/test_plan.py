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


def test_the_embedded_model_is_called_by_its_name():
    found = json.loads(run_command("plan", "demo", "--json").stdout)
    assert found["source"] == "demo"
    assert found["commands"][0].startswith("diffusers-ternary quantize demo demo-rounded")
    assert "demo_folder()" in found["code"]
    assert "/data/" not in json.dumps(found)
    code = found["code"].replace('pipe.to("cuda")', "")
    namespace: dict = {}
    exec(code, namespace)
    assert type(namespace["pipe"].transformer).__name__ == "FluxTransformer2DModel"
