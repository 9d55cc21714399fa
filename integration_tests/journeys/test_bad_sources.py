# SPDX-License-Identifier: Apache-2.0
"""What cannot be quantized, or cast, or converted: an error that names the way that works."""

import pytest
import torch
from diffusers import (
    AutoPipelineForImage2Image,
    DiffusionPipeline,
    FluxImg2ImgPipeline,
    FluxTransformer2DModel,
    ModelMixin,
)
from diffusers.configuration_utils import ConfigMixin, register_to_config
from safetensors.torch import load_file, save_file
from transformers import CLIPTextModel

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from integration_tests.support.pipelines import PIPELINES, draw


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    path = tmp_path_factory.mktemp("flux")
    PIPELINES["flux"].build().save_pretrained(path)
    return path


class Waveform(ModelMixin, ConfigMixin):
    """Nothing but a 1-d convolution."""

    @register_to_config
    def __init__(self):
        super().__init__()
        self.conv = torch.nn.Conv1d(3, 3, 1)


class TestComponents:
    @pytest.mark.parametrize("components", [["trasformer"], {"trasformer": "int8"}])
    def test_of_a_pipeline_that_has_none_of_this_name(self, folder, components):
        with pytest.raises(ValueError, match=r"no component trasformer to quantize\. Choose from .*text_encoder_2"):
            DiffusionPipeline.from_pretrained(folder, quantization_config=TernaryConfig(components=components))

    def test_of_a_pipeline_in_memory(self):
        with pytest.raises(ValueError, match=r"no component unet to quantize\. Choose from .*transformer"):
            quantize(PIPELINES["flux"].build(), TernaryConfig(components=["unet"]))

    def test_other_configs_still_warn_only(self, folder):
        from diffusers import PipelineQuantizationConfig

        config = PipelineQuantizationConfig(quant_mapping={"unet": TernaryConfig(), "transformer": TernaryConfig()})
        pipeline = DiffusionPipeline.from_pretrained(folder, quantization_config=config)
        assert packed_layers(pipeline.transformer)


class TestNothingToConvert:
    MESSAGE = r"Waveform has no layer to convert .*leave this component out"

    def test_in_memory(self):
        with pytest.raises(ValueError, match=self.MESSAGE):
            quantize(Waveform())

    def test_on_the_fly(self, tmp_path):
        Waveform().save_pretrained(tmp_path)
        with pytest.raises(ValueError, match=self.MESSAGE):
            Waveform.from_pretrained(tmp_path, quantization_config=TernaryConfig())


class TestQuantizedSources:
    """Weights that another method has rounded already."""

    LAYER = "transformer_blocks.0.attn.to_q.weight"

    @pytest.mark.parametrize(
        ("suffix", "method"), [(".quant_state.bitsandbytes__nf4", "bitsandbytes"), (".SCB", "bitsandbytes")]
    )
    def test_bitsandbytes_files(self, folder, tmp_path, suffix, method):
        model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        model.save_pretrained(tmp_path)
        file = tmp_path / "diffusion_pytorch_model.safetensors"
        tensors = load_file(file)
        tensors[self.LAYER] = torch.zeros(tensors[self.LAYER].numel() // 2, 1, dtype=torch.uint8)
        tensors[self.LAYER.removesuffix(".weight") + suffix if suffix == ".SCB" else self.LAYER + suffix] = (
            torch.zeros(16, dtype=torch.uint8)
        )
        file.unlink()
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=rf"{method} has quantized .*load the original checkpoint"):
            FluxTransformer2DModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())

    def test_integer_weights(self, folder, tmp_path):
        encoder = CLIPTextModel.from_pretrained(folder / "text_encoder")
        encoder.save_pretrained(tmp_path)
        file = tmp_path / "model.safetensors"
        tensors = load_file(file)
        name = next(name for name in tensors if name.endswith("q_proj.weight"))
        tensors[name] = tensors[name].to(torch.int8)
        file.unlink()
        save_file(tensors, file, {"format": "pt"})
        with pytest.raises(ValueError, match=r"q_proj\.weight is I8, not a float weight.*original checkpoint"):
            CLIPTextModel.from_pretrained(tmp_path, quantization_config=TernaryConfig())

    def test_gguf_files(self, folder, tmp_path):
        gguf = pytest.importorskip("gguf")
        model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        writer = gguf.GGUFWriter(tmp_path / "flux.gguf", "flux")
        for name, tensor in model.state_dict().items():
            if name == self.LAYER:
                blocks = gguf.quants.quantize(tensor.numpy(), gguf.GGMLQuantizationType.Q8_0)
                writer.add_tensor(name, blocks, raw_dtype=gguf.GGMLQuantizationType.Q8_0)
            else:
                writer.add_tensor(name, tensor.numpy())
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        with pytest.raises(ValueError, match=r"is quantized \(.*GGUF\)\. .*load the original checkpoint"):
            FluxTransformer2DModel.from_single_file(
                str(tmp_path / "flux.gguf"), config=str(folder / "transformer"), quantization_config=TernaryConfig()
            )

    def test_models_in_memory(self, folder):
        model = FluxTransformer2DModel.from_pretrained(folder / "transformer")
        model.quantization_method = "bitsandbytes"  # as diffusers marks them
        with pytest.raises(ValueError, match=r"is quantized already \(bitsandbytes\)\. Load the float weights"):
            quantize(model)


class TestCasts:
    """Packed layers hold nothing that a cast could change, so all of diffusers' own casts go through."""

    @pytest.fixture
    def pipeline(self, folder):
        return DiffusionPipeline.from_pretrained(folder, quantization_config=TernaryConfig())

    @pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
    def test_to_dtype(self, pipeline, dtype):
        layer = pipeline.transformer.transformer_blocks[0].attn.to_q
        weight, scales = layer.weight.clone(), layer.scales.clone()
        pipeline.transformer.to(dtype)
        assert pipeline.transformer.dtype == dtype
        pipeline.to("cpu", torch.float32)
        assert pipeline.transformer.dtype == torch.float32
        assert torch.equal(layer.weight, weight)
        assert torch.equal(layer.scales, scales)

    def test_half(self, pipeline):
        assert pipeline.transformer.half().dtype == torch.float16
        assert pipeline.transformer.float().dtype == torch.float32
        assert torch.isfinite(draw("flux", pipeline)).all()

    def test_to_device(self, pipeline):
        assert pipeline.to("cpu").transformer is pipeline.transformer

    def test_from_pipe(self, pipeline):
        """`from_pipe` of a class casts, to float32 by default; that of AutoPipeline shares what is there."""
        assert FluxImg2ImgPipeline.from_pipe(pipeline).transformer is pipeline.transformer
        assert AutoPipelineForImage2Image.from_pipe(pipeline).transformer is pipeline.transformer
        assert FluxImg2ImgPipeline(**pipeline.components).transformer is pipeline.transformer
        assert torch.isfinite(draw("flux", pipeline)).all()
