# SPDX-License-Identifier: Apache-2.0
"""The model card: a golden page, what vanishes without data, licenses, and what contradicts the weights."""

import ast
import copy
import json
import pathlib

import pytest
import torch
from huggingface_hub import ModelCard
from PIL import Image
from safetensors.torch import save_file

from diffusers_ternary.evaluation.result import EvaluationResult, ScorePair
from diffusers_ternary.format import FileLayout, Int8Spec, TernarySpec, crc32, pack_base3
from diffusers_ternary.hub.base_card import BaseCard, License, Terms, read_base_card
from diffusers_ternary.hub.push import check_target, prepare
from diffusers_ternary.rollouts import prompts_sha256
from diffusers_ternary.rollouts.velocity import VelocityError


GOLDEN = pathlib.Path(__file__).with_name("golden_model_card.md")
BASE = BaseCard(
    "org/base", License("other", "base-non-commercial", "https://example.org/license"), "text-to-image", "en"
)
CALIBRATION = {
    "layers": [
        {
            "name": "transformer.blocks.0.to_q",
            "shape": [6, 20],
            "group_size": 10,
            "scales": "group",
            "error_rounded": 0.25,
            "error": 0.0125,
        }
    ],
    "bits_per_weight": None,
    "prompts": 64,
    "prompts_sha256": "ab" * 32,
    "weights_sha256": "cd" * 32,
    "calibration": {"seed": 7, "call_kwargs": {"num_inference_steps": 4}},
    "versions": {"torch": "2.13.0", "device": "cpu"},
}
DISTILLATION = {
    "steps": 100,
    "best_step": 80,
    "start_error": 0.5,
    "best_error": 0.03125,
    "stopped": None,
    "trained_parameters": {"scales": 1200},
    "training_prompts_sha256": "01" * 32,
    "held_out_prompts_sha256": "23" * 32,
    "teacher_sha256": "45" * 32,
    "distill_config": {"seed": 3},
    "versions": {"torch": "2.13.0"},
}


@pytest.fixture
def folder(tmp_path) -> pathlib.Path:
    """A pipeline of fixed bytes: one packed component with four kinds of tensors, and a float one."""
    root = tmp_path / "packed"
    specs = {
        "blocks.0.to_q": TernarySpec(6, 20, 10),
        "blocks.1.to_q": TernarySpec(6, 20, 10),
        "blocks.0.proj": Int8Spec(4, 6),
    }
    tensors = {"embed.weight": torch.ones(3, 5, dtype=torch.bfloat16), "norm.weight": torch.ones(6)}
    for name, spec in specs.items():
        if isinstance(spec, TernarySpec):
            codes = (torch.arange(spec.weights).reshape(6, 20) % 3 - 1).to(torch.int8)
            tensors[f"{name}.weight"] = pack_base3(codes)
            tensors[f"{name}.weight_scale"] = torch.full((6, 2), 0.5, dtype=torch.float16)
        else:
            tensors[f"{name}.weight"] = torch.arange(24, dtype=torch.int8).reshape(4, 6)
            tensors[f"{name}.weight_scale"] = torch.full((4, 1), 0.25, dtype=torch.float16)
    layout = FileLayout(specs, {name: crc32(tensor) for name, tensor in tensors.items()})
    index = {
        "_class_name": "FluxPipeline",
        "scheduler": ["diffusers", "EulerDiscreteScheduler"],
        "transformer": ["diffusers", "FluxTransformer2DModel"],
        "vae": ["diffusers", "AutoencoderKL"],
        "image_encoder": [None, None],
    }
    quantization = {"quant_method": "diffusers_ternary"}
    configs = {
        "model_index.json": index,
        "scheduler/scheduler_config.json": {},
        "transformer/config.json": {"_class_name": "FluxTransformer2DModel", "quantization_config": quantization},
        "vae/config.json": {"_class_name": "AutoencoderKL"},
    }
    for name, content in configs.items():
        path = root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(json.dumps(content))
    save_file(tensors, root / "transformer" / "diffusion_pytorch_model.safetensors", layout.to_metadata())
    save_file({"w": torch.zeros(7, 3)}, root / "vae" / "diffusion_pytorch_model.safetensors")
    return root


def evaluation(**changes) -> EvaluationResult:
    images = tuple(Image.new("RGB", (8, 8), color) for color in ("red", "blue"))
    fields = {
        "prompts": ('a "red" fox', "a blue door"),
        "seeds": (5, 6),
        "call_kwargs": {"num_inference_steps": 4, "height": 8, "width": 8},
        "student_images": images,
        "teacher_images": images,
        "psnr_db": 24.1875,
        "psnr_per_image": (24.0, 24.4),
        "ssim": 0.875,
        "lpips": None,
        "unavailable": {"lpips": "needs weights"},
        "velocity": VelocityError(per_step=(0.01, 0.02), timesteps=(1.0, 0.5), prompts=2, calls=4, overall=0.015625),
        "scores": {"judge_accuracy": ScorePair(0.96875, 1.0)},
        "student_seconds": 1.0,
        "teacher_seconds": 2.0,
        "pipeline": "FluxPipeline",
        "versions": {"torch": "2.13.0"},
        "created": "2026-01-01T00:00:00+00:00",
    }
    return EvaluationResult(**{**fields, **changes})


@pytest.fixture
def make(folder, tmp_path):
    """Prepares a push with a known base card."""

    def prepared(**options):
        work = pathlib.Path(tmp_path / f"work{len(list(tmp_path.iterdir()))}")
        work.mkdir()
        return prepare(folder, "user/packed", BASE, work, **options)

    return prepared


def snippets(card: ModelCard) -> list[str]:
    return [part.split("```")[0] for part in card.text.split("```python\n")[1:]]


def test_golden_card(make):
    card = make(report=evaluation(), calibration=CALIBRATION, distillation=DISTILLATION).card
    text = str(card)
    # Everything that the card says of the weights follows from their bytes, so this file changes only with the
    # template. After a change: read the new page, then write `text` to it.
    assert text == GOLDEN.read_text(encoding="utf-8")


def test_metadata_can_be_read_by_machines(make):
    data = ModelCard(str(make(report=evaluation()).card)).data
    assert data.base_model == "org/base"
    assert data["base_model_relation"] == "quantized"
    assert (data.library_name, data.pipeline_tag, data.language) == ("diffusers", "text-to-image", "en")
    assert (data.license, data.license_name) == ("other", "base-non-commercial")
    assert {"ternary", "diffusers-ternary"} <= set(data.tags)
    values = {result.metric_type: result.metric_value for result in data.eval_results}
    assert values == {"psnr": 24.1875, "ssim": 0.875, "velocity_nmse": 0.015625, "judge_accuracy": 0.96875}


def test_snippets_are_code_and_the_import_comes_first(make):
    card = make(report=evaluation(), include_dequantized=False).card
    for snippet in snippets(card):
        ast.parse(snippet)
    assert snippets(card)[0].startswith("import torch, diffusers_ternary")
    assert len([line for line in snippets(card)[0].splitlines() if line]) == 4
    assert 'pipe("a \\"red\\" fox", num_inference_steps=4, height=8, width=8)' in snippets(card)[0]


def test_nothing_is_said_that_was_not_measured(make):
    card = make().card
    for section in ("## Quality", "## How it was made"):
        assert section not in card.text
    assert "Quality was not measured" in card.text
    assert card.data.eval_results is None
    identical = evaluation(psnr_db=float("inf"), psnr_per_image=(float("inf"),) * 2, velocity=None, ssim=None)
    card = make(report=identical).card
    assert "PSNR" not in card.text
    assert [result.metric_type for result in card.data.eval_results] == ["judge_accuracy"]


def test_scores_on_the_prompts_of_calibration_are_marked(make):
    result = evaluation()
    same = prompts_sha256(result.prompts)
    mark = "the prompts that the weights were made with"
    assert mark in make(report=result, calibration={**CALIBRATION, "prompts_sha256": same}).card.text
    assert mark in make(report=result, distillation={**DISTILLATION, "training_prompts_sha256": same}).card.text
    assert mark not in make(report=result, calibration=CALIBRATION).card.text


def test_adapters_of_a_fine_tune_are_named(make):
    style = {"name": "style.safetensors", "scale": 0.5, "sha256": "ef" * 32}
    other = {"name": "person.safetensors", "scale": 1.0, "sha256": "ab" * 32}
    sentence = (
        "The float model is the base model with LoRA weights folded in: `style.safetensors` at scale 0.5 (SHA-256 "
        "`efefefefefefefef…`), `person.safetensors` at scale 1.0 (SHA-256 `abababababababab…`). "
    )
    reports = {"calibration": CALIBRATION, "distillation": DISTILLATION}
    for argument, report in reports.items():
        assert sentence in make(**{argument: {**report, "adapters": [style, other]}}).card.text
        with pytest.raises(ValueError, match=f"{argument}: .* has no name, scale, sha256 of adapters"):
            make(**{argument: {**report, "adapters": [{"name": "style"}]}})
    assert "LoRA weights folded in" not in make(**reports).card.text


def test_what_goes_along(make, folder):
    files = make(report=evaluation(), calibration=CALIBRATION, distillation=DISTILLATION).files
    own = {path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()}
    added = {
        "README.md",
        "ternary_pipeline.py",
        "evaluation.json",
        "contact_sheet.png",
        "calibration.json",
        "distill.json",
    }
    assert set(files) == own | added
    with Image.open(files["contact_sheet.png"]) as sheet:
        assert sheet.width > 8
    assert json.loads(files["evaluation.json"].read_text())["psnr_db"] == 24.1875
    ast.parse(files["ternary_pipeline.py"].read_text())


def test_reports_in_the_folder_are_taken(make, folder):
    (folder / "calibration.json").write_text(json.dumps(CALIBRATION))
    (folder / "evaluation.json").write_text(json.dumps(evaluation().to_dict()))
    card = make().card
    assert "## Quality" in card.text
    assert "**Calibrated**" in card.text


# --- contradictions ---------------------------------------------------------------------------------------------


def test_reports_of_other_weights_are_refused(make):
    wrong_shape, wrong_layer, wrong_bits = (copy.deepcopy(CALIBRATION) for _ in range(3))
    wrong_shape["layers"][0]["group_size"] = 20
    wrong_layer["layers"][0]["name"] = "transformer.blocks.9.to_q"
    wrong_bits["bits_per_weight"] = 1.6
    for calibration, message in (
        (wrong_shape, "group_size"),
        (wrong_layer, "blocks.9.to_q"),
        (wrong_bits, "1.6000 bits per weight"),
        ({"layers": []}, "not a report of a calibration"),
        ({**CALIBRATION, "layers": [{"name": "transformer.blocks.0.to_q"}]}, "no errors of layers"),
        ("nowhere.json", "there is no file"),
    ):
        with pytest.raises(ValueError, match=message):
            make(calibration=calibration)
    with pytest.raises(ValueError, match="pipelines of class SanaPipeline"):
        make(report=evaluation(pipeline="SanaPipeline"))
    with pytest.raises(ValueError, match="not a result of evaluate"):
        make(report={"psnr_db": 1.0})
    with pytest.raises(ValueError, match="not a result of evaluate"):
        make(report={"psnr_db": 1.0, "images": [{"prompt": "x"}]})
    with pytest.raises(ValueError, match="neither a report"):
        make(report=3)
    measured = {**evaluation().to_dict(), "student_weights_sha256": "0" * 64}
    with pytest.raises(ValueError, match="measured weights of hash 0000"):
        make(report=measured)
    with pytest.raises(ValueError, match="not a report of a distillation"):
        make(distillation=CALIBRATION)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("base_model", "org/other"),
        ("base_model_relation", "finetune"),
        ("library_name", "transformers"),
        ("license", "apache-2.0"),
        ("diffusers_ternary", {"bits_per_weight": 1.0}),
        ("diffusers_ternary", {"weights_sha256": "0" * 64}),
    ],
)
def test_a_card_that_contradicts_the_weights_is_refused(make, folder, field, value):
    (folder / "README.md").write_text(f"---\n{field}: {json.dumps(value)}\n---\n# Mine\n")
    with pytest.raises(ValueError, match=f"README.md says {field}"):
        make()


@pytest.mark.parametrize("head", ["{", "- a list", "diffusers_ternary: mine"])
def test_cards_of_odd_metadata(make, folder, head):
    (folder / "README.md").write_text(f"---\n{head}\n---\n# Mine\n")
    if head.startswith("diffusers"):
        assert make().card.data["diffusers_ternary"]["format_version"] == 1
    else:
        with pytest.raises(ValueError, match="metadata block cannot be read"):
            make()


def test_a_result_in_the_card_that_contradicts_the_report_is_refused(make, folder):
    card = make(report=evaluation()).card
    card.text += "\nMy own words.\n"
    card.data.eval_results[0].metric_value = 40.0
    card.save(folder / "README.md")
    with pytest.raises(ValueError, match=r"model-index psnr: 40.0, but the report gives 24.1875"):
        make(report=evaluation())


def test_an_own_card_keeps_its_text_and_gets_the_metadata(make, folder):
    (folder / "README.md").write_text("---\nlicense: other\ntags:\n- portraits\nwidget: x\n---\n# Mine\n\nMy words.\n")
    card = make(report=evaluation()).card
    assert card.text.strip() == "# Mine\n\nMy words."
    assert card.data["widget"] == "x"
    assert card.data.base_model == "org/base"
    assert card.data.tags == ["portraits", "ternary", "quantized", "diffusers-ternary"]
    assert len(card.data.eval_results) == 4


def test_a_generated_card_is_written_anew_until_somebody_edits_it(make, folder):
    make().card.save(folder / "README.md")
    assert "## Quality" in make(report=evaluation()).card.text
    path = folder / "README.md"
    path.write_text(path.read_text() + "\nAn afterthought.\n")
    card = make(report=evaluation()).card
    assert "An afterthought." in card.text
    assert "## Quality" not in card.text


# --- licenses ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("license", "terms"),
    [
        (License("apache-2.0"), Terms.FREE),
        (License("mit"), Terms.FREE),
        (License("cc-by-nc-4.0"), Terms.NON_COMMERCIAL),
        (License("other", "flux-1-dev-non-commercial-license"), Terms.NON_COMMERCIAL),
        (License("other", "stabilityai-ai-community"), Terms.NON_COMMERCIAL),
        (License("openrail++"), Terms.CONDITIONAL),
        (License("creativeml-openrail-m"), Terms.CONDITIONAL),
        (License("other", "my-license"), Terms.UNKNOWN),
        (License("unknown"), Terms.UNKNOWN),
        (License(), Terms.UNKNOWN),
    ],
)
def test_terms_of_licenses(license, terms):
    assert license.terms is terms
    assert (BaseCard("org/base", license).license_warning() is None) is (terms is Terms.FREE)


def test_a_base_that_cannot_be_read_leaves_the_license_open():
    """The test suite is offline."""
    base = read_base_card("org/base")
    assert base.license == License()
    assert base.pipeline_tag is None
    assert "is not known" in base.license_warning()
    with pytest.raises(ValueError, match="not a Hub id"):
        read_base_card("./a/local/folder")


def test_the_destination_is_checked_without_asking():
    check_target("user/name", revision=None, create_pr=True)
    for name in ("user/na me", "name", "a/b/c"):
        with pytest.raises(ValueError, match="namespace/name"):
            check_target(name, revision=None, create_pr=False)
    with pytest.raises(ValueError, match="create_pr=True"):
        check_target("user/name", revision="main", create_pr=True)


def test_no_local_path_goes_along(make, folder):
    """diffusers writes the folder that a model was loaded from into its configuration."""
    configurations = [path for path in folder.rglob("*.json") if path.name in ("config.json", "model_index.json")]
    for path in configurations:
        settings = json.loads(path.read_text())
        path.write_text(json.dumps({**settings, "_name_or_path": "/home/somebody/secret"}))
    files = make().files
    sent = {name: path.read_text() for name, path in files.items() if name.endswith(".json")}
    assert sum("_name_or_path" in text for text in sent.values()) == len(configurations) > 0
    assert not any("/home/somebody" in text for text in sent.values())
    assert "/home/somebody" in configurations[0].read_text()  # the user's own folder stays as it is
