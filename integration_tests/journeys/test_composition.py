# SPDX-License-Identifier: Apache-2.0
"""A ternary denoiser beside a text encoder that another library quantized, in one pipeline: loaded, drawn, saved."""

import pytest
import torch
from diffusers import DiffusionPipeline, PipelineQuantizationConfig

from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.demo import DEMO_CALL, demo_folder


PROMPT = "a smiling person with red hair"


def bitsandbytes():
    from transformers import BitsAndBytesConfig

    return BitsAndBytesConfig(load_in_4bit=True, bnb_4bit_compute_dtype=torch.bfloat16)


def torchao():
    from torchao.quantization import Int8WeightOnlyConfig
    from transformers import TorchAoConfig

    return TorchAoConfig(Int8WeightOnlyConfig())


def quanto():
    from transformers import QuantoConfig

    return QuantoConfig(weights="int8")


def draw(pipeline: DiffusionPipeline) -> torch.Tensor:
    pipeline.set_progress_bar_config(disable=True)
    generator = torch.Generator().manual_seed(0)
    return pipeline(PROMPT, **DEMO_CALL, generator=generator, output_type="pt").images


def load(place, **options) -> DiffusionPipeline:
    return DiffusionPipeline.from_pretrained(place, dtype=torch.bfloat16, **options)


@pytest.mark.parametrize(
    ("library", "config"), [("bitsandbytes", bitsandbytes), ("torchao", torchao), ("optimum.quanto", quanto)]
)
def test_beside_a_text_encoder_of(library, config, tmp_path):
    pytest.importorskip(library, reason=f"{library} is not installed")
    mapping = {"transformer": TernaryConfig(), "text_encoder_2": config()}
    pipeline = load(demo_folder(), quantization_config=PipelineQuantizationConfig(quant_mapping=mapping))
    assert packed_layers(pipeline.transformer)
    linear = pipeline.text_encoder_2.encoder.block[0].layer[0].SelfAttention.q
    assert type(linear) is not torch.nn.Linear or type(linear.weight.data) is not torch.Tensor
    expected = draw(pipeline)
    plain = draw(load(demo_folder(), quantization_config=TernaryConfig()))
    assert 0 < (expected.float() - plain.float()).abs().mean() < 0.1
    if library == "optimum.quanto":  # transformers saves none of its models
        with pytest.raises(ValueError, match="not serializable"):
            pipeline.save_pretrained(tmp_path)
        return
    pipeline.save_pretrained(tmp_path)
    assert torch.equal(draw(load(tmp_path)), expected)
