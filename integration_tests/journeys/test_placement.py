# SPDX-License-Identifier: Apache-2.0
"""Offloading, casting, slicing, fusing, caching, compiling: nothing raises, pictures stay the same, weights packed.

On a CPU every mode runs with the CPU as onload device; `integration_tests/gpu` has the streams. Activations are not
rounded here: their rounding would enlarge the last bit of a float32 sum, which depends on where tensors lie in memory.
"""

import copy

import accelerate
import pytest
import torch
from diffusers import (
    DiffusionPipeline,
    FasterCacheConfig,
    FirstBlockCacheConfig,
    FluxTransformer2DModel,
    MagCacheConfig,
    PyramidAttentionBroadcastConfig,
    TaylorSeerCacheConfig,
)

from diffusers_ternary import TernaryConfig, quantize
from diffusers_ternary.backend import packed_layers
from integration_tests.support import architectures
from integration_tests.support.pipelines import PIPELINES, draw


pytestmark = pytest.mark.usefixtures("one_thread")
CPU = torch.device("cpu")
CONFIG = TernaryConfig(activation_dtype="none")


@pytest.fixture(scope="module", params=["flux", "sdxl"])
def saved(request, tmp_path_factory):
    """Name, folder and latents of a packed pipeline."""
    folder = tmp_path_factory.mktemp(request.param)
    quantize(PIPELINES[request.param].build(), CONFIG).save_pretrained(folder)
    return request.param, folder, draw(request.param, DiffusionPipeline.from_pretrained(folder))


class Case:
    def __init__(self, saved):
        self.name, self.folder, self.latents = saved
        self.pipeline = DiffusionPipeline.from_pretrained(self.folder)
        self.denoiser = getattr(self.pipeline, PIPELINES[self.name].denoiser)
        self.packed = {name: layer.weight.clone() for name, layer in packed_layers(self.denoiser).items()}

    def check(self, *, resident: bool = True) -> None:
        """The same latents, from the same packed weights."""
        latents = self.pipeline(
            "a red cat",
            height=PIPELINES[self.name].size,
            width=PIPELINES[self.name].size,
            num_inference_steps=2,
            output_type="latent",
            generator=torch.Generator().manual_seed(0),
            **PIPELINES[self.name].call,
        ).images.float()
        torch.testing.assert_close(latents, self.latents, rtol=1e-4, atol=1e-4 * self.latents.std().item())
        layers = packed_layers(self.denoiser)
        assert layers.keys() == self.packed.keys()
        for name, layer in layers.items():
            assert layer.weight.dtype == torch.int8
            assert not resident or torch.equal(layer.weight, self.packed[name]), name


@pytest.fixture
def case(saved):
    result = Case(saved)
    result.pipeline.set_progress_bar_config(disable=True)
    return result


class TestOffloading:
    def test_model(self, case):
        case.pipeline.enable_model_cpu_offload(device="cpu")
        case.check()
        case.check()

    def test_sequential(self, case):
        # As the pipeline's own switch does for each component; that one fails on CPUs for text encoders, float or not.
        accelerate.cpu_offload(case.denoiser, CPU, offload_buffers=True)
        layer = next(iter(packed_layers(case.denoiser).values()))
        assert layer.weight.is_meta, "packed weights rest outside of the model, too"
        case.check(resident=False)
        case.check(resident=False)

    @pytest.mark.parametrize("options", [{"offload_type": "leaf_level"}, {"offload_type": "block_level"}])
    @pytest.mark.parametrize("to_disk", [False, True])
    def test_group(self, case, options, to_disk, tmp_path):
        if options["offload_type"] == "block_level":
            options = {**options, "num_blocks_per_group": 1}
        if to_disk:
            options = {**options, "offload_to_disk_path": str(tmp_path)}
        case.denoiser.enable_group_offload(onload_device=CPU, offload_device=CPU, **options)
        case.check(resident=not to_disk)
        case.check(resident=not to_disk)

    def test_whole_pipeline_in_groups(self, case):
        case.pipeline.enable_group_offload(onload_device=CPU, offload_device=CPU, offload_type="leaf_level")
        case.check()

    def test_packed_model_with_layers_on_disk(self, case, tmp_path):
        """The files on disk hold packed tensors, and hardly more bytes than the model."""
        first = next(iter(case.packed)).split(".")[0]
        parts = {name: "cpu" for name, _ in case.denoiser.named_children()} | {first: "disk"}
        parts |= {name: "cpu" for name, _ in case.denoiser.named_parameters(recurse=False)}
        case.denoiser = type(case.denoiser).from_pretrained(
            case.folder / PIPELINES[case.name].denoiser, device_map=parts, offload_folder=tmp_path
        )
        setattr(case.pipeline, PIPELINES[case.name].denoiser, case.denoiser)
        offloaded = [layer for name, layer in packed_layers(case.denoiser).items() if name.startswith(f"{first}.")]
        assert offloaded
        assert all(layer.weight.is_meta for layer in offloaded)
        case.check(resident=False)


class TestCasting:
    def test_layerwise(self, case):
        """Kept layers are stored in 8 bits between calls; packed tensors are integers, which no cast reaches."""
        case.denoiser.enable_layerwise_casting(storage_dtype=torch.float8_e4m3fn, compute_dtype=torch.float32)
        assert any(parameter.dtype == torch.float8_e4m3fn for parameter in case.denoiser.parameters())
        scales = {name: layer.scales.clone() for name, layer in packed_layers(case.denoiser).items()}
        latents = draw(case.name, case.pipeline)
        assert torch.isfinite(latents).all()
        for name, layer in packed_layers(case.denoiser).items():
            assert torch.equal(layer.weight, case.packed[name])
            assert torch.equal(layer.scales, scales[name])

    def test_layerwise_of_nothing_but_packed_layers(self, case):
        """Biases aside, layers that are packed leave nothing to cast: the same latents."""
        for layer in packed_layers(case.denoiser).values():
            layer.bias = None
        case.latents = draw(case.name, case.pipeline)
        kept = {name for name, module in case.denoiser.named_modules() if name not in case.packed}
        leaves = [name for name in kept if name and not any(case.denoiser.get_submodule(name).children())]
        case.denoiser.enable_layerwise_casting(
            torch.float8_e4m3fn, torch.float32, skip_modules_pattern=[f"^{name}$" for name in leaves]
        )
        case.check()


@pytest.mark.parametrize("switch", ["enable_slicing", "enable_tiling"])
def test_vae(case, switch):
    getattr(case.pipeline.vae, switch)()
    case.check()
    images = case.pipeline(
        "a red cat", height=16, width=16, num_inference_steps=1, output_type="pt", **PIPELINES[case.name].call
    ).images
    assert torch.isfinite(images).all()


@pytest.mark.parametrize(
    "name",
    [
        "FluxTransformer2DModel",
        "SD3Transformer2DModel",
        "PixArtTransformer2DModel",
        "UNet2DConditionModel",
        "WanTransformer3DModel",
        "AuraFlowTransformer2DModel",
    ],
)
def test_fused_projections(name, tmp_path):
    model = quantize(architectures.build(name), CONFIG)
    expected, layers = architectures.run(name, model), len(packed_layers(model))
    model.fuse_qkv_projections()
    fused = packed_layers(model)
    assert len(fused) > layers
    torch.testing.assert_close(architectures.run(name, model), expected, rtol=1e-5, atol=1e-6)
    model.save_pretrained(tmp_path)  # as it is without the fused copies
    again = type(model).from_pretrained(tmp_path)
    assert len(packed_layers(again)) == layers
    assert torch.equal(architectures.run(name, again), expected)
    model.unfuse_qkv_projections()
    assert torch.equal(architectures.run(name, model), expected)


def test_projections_of_different_kinds_are_not_fused():
    model = quantize(
        architectures.build("FluxTransformer2DModel"),
        TernaryConfig(activation_dtype="none", overrides={"*.0.attn.to_k": "int8"}),
    )
    expected = architectures.run("FluxTransformer2DModel", model)
    with pytest.raises(ValueError, match="only packed layers of one kind"):
        model.fuse_qkv_projections()
    model.unfuse_qkv_projections()
    assert torch.equal(architectures.run("FluxTransformer2DModel", model), expected)


CACHES = {
    "first block": lambda pipeline: FirstBlockCacheConfig(threshold=1e6),
    "pyramid": lambda pipeline: PyramidAttentionBroadcastConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 1001),
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        current_timestep_callback=lambda: pipeline.current_timestep,
    ),
    "faster": lambda pipeline: FasterCacheConfig(
        spatial_attention_block_skip_range=2,
        spatial_attention_timestep_skip_range=(-1, 999),  # not the first step: there is nothing to reuse yet
        spatial_attention_block_identifiers=("transformer_blocks", "single_transformer_blocks"),
        is_guidance_distilled=True,
        current_timestep_callback=lambda: pipeline.current_timestep,
    ),
    "taylor": lambda pipeline: TaylorSeerCacheConfig(cache_interval=2, disable_cache_before_step=1),
    "mag": lambda pipeline: MagCacheConfig(
        num_inference_steps=4, mag_ratios=torch.ones(4), threshold=1.0, retention_ratio=0.0
    ),
}


@pytest.mark.parametrize("cache", CACHES)
def test_caches(saved, cache):
    """What a cache skips is skipped of the packed model as of its dequantized copy: the same pictures."""
    name, folder, _ = saved
    if name != "flux":
        pytest.skip("UNets have no enable_cache")
    pipeline = DiffusionPipeline.from_pretrained(folder)

    def run(transformer: FluxTransformer2DModel) -> torch.Tensor:
        pipeline.transformer = transformer
        transformer.enable_cache(CACHES[cache](pipeline))
        return pipeline(
            "a red cat",
            height=16,
            width=16,
            num_inference_steps=4,
            output_type="latent",
            max_sequence_length=16,
            generator=torch.Generator().manual_seed(0),
        ).images

    pipeline.set_progress_bar_config(disable=True)
    dense = copy.deepcopy(pipeline.transformer)
    dense.dequantize()
    latents = run(pipeline.transformer)
    torch.testing.assert_close(run(dense), latents, rtol=1e-3, atol=1e-3 * latents.std().item())


class TestCompiled:
    """With `aot_eager`, which traces everything and compiles nothing: seconds instead of minutes."""

    @pytest.fixture
    def model(self):
        return quantize(architectures.build("FluxTransformer2DModel"), CONFIG)

    def test_repeated_blocks(self, model):
        expected = architectures.run("FluxTransformer2DModel", model)
        model.compile_repeated_blocks(fullgraph=True, backend="aot_eager")
        output = architectures.run("FluxTransformer2DModel", model)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    def test_convolutions_in_one_graph(self):
        model = quantize(architectures.build("SanaTransformer2DModel"), CONFIG)
        expected = architectures.run("SanaTransformer2DModel", model)
        model.compile(fullgraph=True, backend="aot_eager")
        output = architectures.run("SanaTransformer2DModel", model)
        torch.testing.assert_close(output, expected, rtol=1e-4, atol=1e-5)

    def test_exported(self, model):
        inputs = architectures.inputs("FluxTransformer2DModel")
        expected = architectures.run("FluxTransformer2DModel", model)
        program = torch.export.export(model, (), {**inputs, "return_dict": False}, strict=False)
        assert any("diffusers_ternary.linear" in str(node.target) for node in program.graph.nodes)
        (output,) = program.module()(**inputs, return_dict=False)
        torch.testing.assert_close(output.flatten(), expected, rtol=1e-4, atol=1e-5)
