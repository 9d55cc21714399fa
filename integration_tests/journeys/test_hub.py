# SPDX-License-Identifier: Apache-2.0
"""Publishing and loading over HTTP: the real client, in processes of its own, against a Hub on loopback."""

import shutil
from collections.abc import Iterator
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard

import diffusers_ternary
from integration_tests.support import denoisers
from integration_tests.support.fresh_process import run_python
from integration_tests.support.hub_client import HubClient
from integration_tests.support.hub_server import READER, Fault, HubServer, hub_server


BASE_CARD = "---\nlicense: apache-2.0\npipeline_tag: text-to-image\n---\n# Base\n"


@pytest.fixture(scope="module")
def server() -> Iterator[HubServer]:
    with hub_server() as running:
        running.add("org/base", {"README.md": BASE_CARD})
        yield running


@pytest.fixture(scope="module")
def client(server, tmp_path_factory) -> Iterator[HubClient]:
    process = HubClient(server.environment(tmp_path_factory.mktemp("owner")))
    yield process
    process.close()


@pytest.fixture(autouse=True)
def in_order(server) -> Iterator[None]:
    yield
    server.faults.clear()
    server.quota = None


@pytest.fixture(scope="module")
def model(tmp_path_factory) -> Path:
    """A packed denoiser on its own, in shards."""
    folder = tmp_path_factory.mktemp("packed") / "flux"
    torch.manual_seed(0)
    diffusers_ternary.quantize(denoisers.flux()).save_pretrained(folder, max_shard_size="300KB")
    assert len(list(folder.glob("*.safetensors"))) > 2
    return folder


# --- what arrives -----------------------------------------------------------------------------------------------


def test_a_model_arrives_with_its_card_in_one_commit(server, client, model):
    answer = client.push(model, "user/model")
    repo = server.repos["user/model"]
    assert answer.commit == repo.refs["main"]
    assert len(repo.commits) == 2, "the empty repository and one commit"
    files = repo.files()
    for path in model.iterdir():
        assert files[path.name] == path.read_bytes()
    card = ModelCard(files["README.md"].decode())
    assert card.data.base_model == "org/base"
    assert card.data["base_model_relation"] == "quantized"
    assert card.data.license == "apache-2.0"
    assert card.data.pipeline_tag == "text-to-image"
    first = card.text.index("```python")
    assert card.text[first:].splitlines()[1].startswith("import torch, diffusers_ternary")


def test_a_second_push_sends_nothing_twice_and_removes_what_is_stale(server, client, model, tmp_path):
    client.push(model, "user/again", include_dequantized=True)
    repo = server.repos["user/again"]
    assert "bf16/diffusion_pytorch_model.bf16.safetensors" in repo.files()
    sent = server.uploads()

    other = tmp_path / "one_file"
    type(denoisers.flux()).from_pretrained(model).save_pretrained(other)
    repo.commits[repo.refs["main"]]["NOTES.md"] = repo.commits[repo.refs["main"]]["README.md"]
    assert client.push(other, "user/again").error is None
    assert server.uploads() == sent + 1
    names = set(repo.files())
    assert names == {"NOTES.md", "README.md", "config.json", "diffusion_pytorch_model.safetensors"}

    assert client.push(other, "user/again").commit == repo.refs["main"]
    assert server.uploads() == sent + 1
    assert len(repo.commits) == 3, "a push that changes nothing makes no commit"


def test_branches_and_pull_requests(server, client, model):
    client.push(model, "user/branches")
    repo = server.repos["user/branches"]
    before = repo.files()

    assert client.push(model, "user/branches", revision="candidate", include_dequantized=True).error is None
    assert "bf16/config.json" in repo.files("candidate")
    assert repo.files("main") == before

    proposed = client.push(model, "user/branches", create_pr=True, include_dequantized=True, token=READER)
    assert proposed.pr == "refs/pr/1"
    assert "bf16/config.json" in repo.files("refs/pr/1")
    assert repo.files("main") == before

    assert client.push(model, "user/branches", revision="refs/pr/1").commit == repo.refs["refs/pr/1"]
    refused = client.push(model, "user/branches", revision="refs/pr/9")
    assert refused.error == "ValueError"
    assert "no such revision" in refused.message
    assert "create_pr" in client.push(model, "user/branches", revision="x", create_pr=True).message


def test_private_repositories(server, client, model):
    assert client.push(model, "user/secret", private=True).error is None
    assert server.repos["user/secret"].private
    server.add("user/open", {})
    refused = client.push(model, "user/open", private=True)
    assert refused.error == "ValueError"
    assert "is public" in refused.message
    assert server.repos["user/open"].files() == {}


# --- what goes wrong --------------------------------------------------------------------------------------------


def test_without_a_valid_token(server, client, model):
    refused = client.push(model, "user/nobody", token="hf_unknown")
    assert refused.error == "PermissionError"
    assert "hf auth login" in refused.message
    assert "user/nobody" not in server.repos


def test_without_permission(server, client, model):
    server.add("user/theirs", {})
    refused = client.push(model, "user/theirs", token=READER)
    assert refused.error == "PermissionError"
    assert "create_pr=True" in refused.message
    assert server.repos["user/theirs"].files() == {}
    command = client.cli(model, "elsewhere/model", "--base-model", "org/base")
    assert command.exit_code == 3
    assert "may not write to elsewhere/model" in " ".join(command.output.split())


def test_a_name_that_is_taken_by_another_kind(server, client, model):
    server.add("user/data", {}, kind="dataset")
    refused = client.push(model, "user/data")
    assert (refused.error, "is taken by a dataset" in refused.message) == ("ValueError", True)
    assert server.repos["user/data"].files() == {}


def test_more_than_the_quota(server, client, model):
    server.large_files.clear()
    server.quota = 1000
    refused = client.push(model, "user/huge")
    assert refused.error == "OSError"
    assert "larger than the storage" in refused.message
    assert server.repos["user/huge"].files() == {}


def test_a_hub_that_stumbles(server, client, model):
    server.large_files.clear()
    server.faults += [Fault(r"PUT /large/", times=1), Fault(r"POST .*/user/shaky/commit", status=503, times=1)]
    assert client.push(model, "user/shaky").error is None
    assert server.repos["user/shaky"].files()["config.json"] == (model / "config.json").read_bytes()


def test_a_hub_that_refuses_the_files(server, client, model):
    server.large_files.clear()
    server.faults.append(Fault(r"PUT /large/", status=400, times=99))
    refused = client.push(model, "user/refused")
    assert refused.error == "OSError"
    assert "(400)" in refused.message
    assert server.repos["user/refused"].files() == {}


def test_a_repository_that_changed_meanwhile(server, client, model):
    server.add("user/busy", {})
    server.faults.append(Fault(r"POST .*/user/busy/commit", status=412, message="A commit has happened since."))
    refused = client.push(model, "user/busy")
    assert (refused.error, "Push again" in refused.message) == ("OSError", True)


def test_an_interrupted_push_goes_on_where_it_was(server, client, model, tmp_path):
    server.large_files.clear()
    process = HubClient(server.environment(tmp_path))
    count = len(list(model.glob("*.safetensors")))

    def kill_at_the_second_file() -> None:
        if len(server.large_files) >= 1:
            process.process.kill()

    server.faults.append(Fault(r"PUT /large/", times=99, action=kill_at_the_second_file))
    assert process.push(model, "user/interrupted").error == "Killed"
    process.close()
    server.faults.clear()
    arrived = len(server.large_files)
    assert arrived >= 1
    assert server.repos["user/interrupted"].files() == {}, "nothing is shown before everything is there"

    sent = server.uploads()
    assert client.push(model, "user/interrupted").error is None
    assert server.uploads() == sent + count - arrived
    assert set(server.repos["user/interrupted"].files()) >= {path.name for path in model.iterdir()}


def test_nothing_is_sent_before_the_source_is_validated(server, client, model, tmp_path):
    damaged = shutil.copytree(model, tmp_path / "damaged")
    shard = next(damaged.glob("*-00002-of-*"))
    data = bytearray(shard.read_bytes())
    data[-100] ^= 1
    shard.write_bytes(data)
    float_model = tmp_path / "float"
    denoisers.flux().save_pretrained(float_model)
    server.requests.clear()
    for folder, message in (
        (damaged, "checksum"),
        (float_model, "no packed weights"),
        (tmp_path / "nowhere", "is not a folder"),
    ):
        refused = client.push(folder, "user/bad")
        assert refused.error in ("ValueError", "FileNotFoundError"), refused
        assert message in refused.message
    report = {"psnr_db": 20.0, "images": [{"prompt": "x", "seed": 0}], "student_weights_sha256": "0" * 64}
    assert "other weights" in client.push(model, "user/bad", report=report).message
    assert not [request for request in server.requests if request.startswith(("POST", "PUT"))]


def test_the_command(server, client, model):
    dry = client.cli(model, "user/command", "--base-model", "org/base", "--dry-run")
    assert dry.exit_code == 0, dry.output
    assert "base_model: org/base" in dry.output
    assert "nothing was sent" in dry.output
    assert "user/command" not in server.repos
    done = client.cli(model, "user/command", "--base-model", "org/base", "--private")
    assert done.exit_code == 0, done.output
    assert f"{server.url}/user/command/commit/" in done.output
    assert server.repos["user/command"].private
    assert client.cli(model, "user/command").exit_code == 2, "--base-model is required"
    bad = client.cli(model, "not a name", "--base-model", "org/base")
    assert bad.exit_code == 3
    assert "namespace/name" in bad.output


# --- journeys ---------------------------------------------------------------------------------------------------

PUBLISH = """
    import torch, diffusers_ternary
    from diffusers_ternary.hub import push_to_hub
    from peft import LoraConfig
    from peft.utils import get_peft_model_state_dict
    from integration_tests.support import pipelines

    pipe = pipelines.PIPELINES["flux"].build()
    pipe.transformer.add_adapter(LoraConfig(r=4, target_modules=["to_q", "to_k"], init_lora_weights=False))
    adapter = get_peft_model_state_dict(pipe.transformer)
    type(pipe).save_lora_weights("{folder}/adapter", transformer_lora_layers=adapter)
    pipe.transformer.delete_adapters("default")
    pipe.transformer = pipelines.PIPELINES["flux"].build().transformer

    diffusers_ternary.quantize(pipe)
    push_to_hub(pipe, "user/pipeline", base_model="org/base", include_dequantized=True)
    pipe.push_to_hub("user/plain")
    for part in pipe.components.values():
        if isinstance(part, torch.nn.Module):
            part.eval()
    torch.save(pipelines.draw("flux", pipe), "{folder}/drawn.pt")
    value = True
    """

LOAD = """
    import json, sys
    import torch
    from diffusers import DiffusionPipeline
    from integration_tests.support import pipelines

    drawn = torch.load(sys.argv[1] + "/drawn.pt")
    """


@pytest.fixture(scope="module")
def published(server, client, tmp_path_factory) -> Path:
    """A pipeline that was pushed by both ways, an adapter, and a folder with what the pipeline draws."""
    folder = tmp_path_factory.mktemp("publisher")
    assert client.run(PUBLISH.format(folder=folder))
    adapter = {path.name: path.read_bytes() for path in (folder / "adapter").iterdir()}
    server.add("user/adapter", adapter)
    return folder


def test_a_fresh_process_draws_the_same(server, published, tmp_path):
    """Also after diffusers' own `pipe.push_to_hub`; and with a LoRA from the Hub."""
    server.requests.clear()
    code = (
        LOAD
        + """
    import diffusers_ternary

    pipe = DiffusionPipeline.from_pretrained("user/pipeline")
    same = torch.equal(pipelines.draw("flux", pipe), drawn)
    plain = DiffusionPipeline.from_pretrained("user/plain")
    plain_same = torch.equal(pipelines.draw("flux", plain), drawn)

    pipe.load_lora_weights("user/adapter")
    adapted = pipelines.draw("flux", pipe)
    plain.load_lora_weights(sys.argv[1] + "/adapter")
    local = pipelines.draw("flux", plain)
    print(json.dumps([same, plain_same, torch.equal(adapted, local), torch.equal(adapted, drawn)]))
    """
    )
    result = run_python(code, published, **server.environment(tmp_path))
    assert result == [True, True, True, False]
    assert not [request for request in server.requests if "/bf16/" in request], "the float copy is not downloaded"


def test_a_process_that_trusts_remote_code_needs_no_import_line(server, published, tmp_path):
    code = (
        LOAD
        + """
    name = "user/pipeline"
    pipe = DiffusionPipeline.from_pretrained(name, custom_pipeline="ternary_pipeline", trust_remote_code=True)
    print(json.dumps([type(pipe).__name__, torch.equal(pipelines.draw("flux", pipe), drawn)]))
    """
    )
    assert run_python(code, published, **server.environment(tmp_path)) == ["TernaryFluxPipeline", True]


def test_the_float_copy_loads_without_this_package(server, published, tmp_path):
    """The card's own snippet, in a process that cannot import the package."""
    card = ModelCard(server.repos["user/pipeline"].files()["README.md"].decode())
    snippets = [part.split("```")[0] for part in card.text.split("```python\n")[1:]]
    snippet = next(part for part in snippets if "bf16" in part)
    code = (
        "import json, sys\nsys.modules['diffusers_ternary'] = None\n"
        f"{snippet}\n"
        "from integration_tests.support import pipelines\n"
        "drawn = torch.load(sys.argv[1] + '/drawn.pt')\n"
        "error = (pipelines.draw('flux', pipe.to(torch.float32)) - drawn).abs().max() / drawn.abs().max()\n"
        "print(json.dumps([type(pipe.transformer.proj_out).__name__, error.item()]))\n"
    )
    kind, error = run_python(code, published, **server.environment(tmp_path))
    assert kind == "Linear"
    assert error < 0.05, "weights rounded to bfloat16, activations not rounded to int8"


def test_the_server_listens_on_loopback_only(server):
    assert server.server_address[0] == "127.0.0.1"
