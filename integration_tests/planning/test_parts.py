# SPDX-License-Identifier: Apache-2.0
"""A plan for a pipeline on a Hub: configs and headers are read over HTTP, and no weights are downloaded."""

from pathlib import Path

from diffusers_ternary.demo import demo_folder
from diffusers_ternary.planning import plan
from integration_tests.support.hub_client import HubClient
from integration_tests.support.hub_server import hub_server


def test_a_hub_id_gives_the_plan_of_its_folder(tmp_path):
    folder = Path(demo_folder())
    files = {file.relative_to(folder).as_posix(): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
    with hub_server() as server:
        server.add("org/people", files)
        server.add("org/pickles", {name: data for name, data in files.items() if not name.endswith(".safetensors")})
        process = HubClient(server.environment(tmp_path))
        try:
            value = process.run("""
                from diffusers_ternary.planning import plan
                value = plan("org/people", pixels=16).to_dict()
                """)
            message = process.run("""
                from diffusers_ternary.planning import plan
                try:
                    plan("org/pickles")
                except ValueError as error:
                    value = str(error)
                """)
        finally:
            process.close()
    assert value["components"] == plan(folder, pixels=16).to_dict()["components"]
    assert not list(tmp_path.rglob("*.safetensors"))
    assert "org/pickles has no text_encoder/model.safetensors" in message
