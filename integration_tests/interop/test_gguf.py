# SPDX-License-Identifier: Apache-2.0
"""GGUF: names against diffusers' own converters, values against the gguf package and blocks written by hand."""

import dataclasses
import functools
import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from diffusers import (
    Flux2Transformer2DModel,
    FluxTransformer2DModel,
    GGUFQuantizationConfig,
    SD3Transformer2DModel,
)
from diffusers.loaders.single_file_utils import (
    convert_flux2_transformer_checkpoint_to_diffusers,
    convert_flux_transformer_checkpoint_to_diffusers,
    convert_sd3_transformer_checkpoint_to_diffusers,
    convert_z_image_transformer_checkpoint_to_diffusers,
)

from diffusers_ternary import TernaryConfig, convert, quantize
from diffusers_ternary.backend import packed_layers
from diffusers_ternary.interop import ExportReport, export_gguf, slices
from diffusers_ternary.interop.compat import TwoBitType, open_reader
from diffusers_ternary.interop.export import ReadBack
from diffusers_ternary.interop.gguf_blocks import encode_q2_0, encode_tq2_0
from diffusers_ternary.interop.gguf_names import gguf_tensors
from diffusers_ternary.interop.gguf_two_bit import dequantize_tq2_0, dequantize_two_bit
from diffusers_ternary.interop.inspection import inspect_path
from integration_tests.support import denoisers, foreign


gguf = pytest.importorskip("gguf")
TYPES = gguf.GGMLQuantizationType


# 1024 channels in the feed-forward layers.
wide_z_image = functools.partial(denoisers.z_image, 6, (16, 24, 24))


def flux_like_the_real_one() -> FluxTransformer2DModel:
    """One block of each kind and 128 channels a head; the sizes that diffusers' converter takes for granted."""
    with torch.device("meta"):
        return FluxTransformer2DModel(num_layers=1, num_single_layers=1, guidance_embeds=True)


def packed(folder: Path, make: Any = denoisers.flux, *, dtype: torch.dtype = torch.bfloat16, **options: Any) -> Any:
    torch.manual_seed(0)
    model = quantize(make().to(dtype), TernaryConfig(**{"scale_layout": "group", **options}))
    model.save_pretrained(folder)
    model.dequantize()
    return model


@dataclasses.dataclass(frozen=True)
class Exported:
    """A packed Flux in bfloat16 with groups of 256, and its GGUF file."""

    folder: Path
    file: Path
    report: ExportReport
    model: FluxTransformer2DModel


@pytest.fixture(scope="module")
def flux(tmp_path_factory: pytest.TempPathFactory) -> Exported:
    root = tmp_path_factory.mktemp("flux")
    model = packed(root / "in", group_size=256)
    report = export_gguf(root / "in", root / "model.gguf")
    return Exported(root / "in", root / "model.gguf", report, model)


def tensors_of(file: Path) -> dict[str, np.ndarray]:
    """All tensors, unpacked by the gguf package where it can."""

    def unpack(tensor: Any) -> np.ndarray:
        if isinstance(tensor.tensor_type, TwoBitType):
            return dequantize_two_bit(tensor.data, tensor.tensor_type)
        return gguf.quants.dequantize(tensor.data, tensor.tensor_type)

    return {tensor.name: unpack(tensor).reshape(tensor.shape[::-1].tolist()) for tensor in open_reader(file).tensors}


def types_of(file: Path) -> dict[str, str]:
    return {tensor.name: tensor.tensor_type.name for tensor in open_reader(file).tensors}


def assert_equal_state(a: dict[str, torch.Tensor], b: dict[str, torch.Tensor]) -> None:
    assert a.keys() == b.keys()
    assert [name for name in a if not torch.equal(a[name].float(), b[name].float())] == []


def flux2_like_the_real_one() -> Flux2Transformer2DModel:
    with torch.device("meta"):
        return Flux2Transformer2DModel(num_layers=2, num_single_layers=2, guidance_embeds=True)


class TestNames:
    @pytest.mark.parametrize(
        ("make", "convert_names"),
        [
            (flux_like_the_real_one, convert_flux_transformer_checkpoint_to_diffusers),
            (flux2_like_the_real_one, convert_flux2_transformer_checkpoint_to_diffusers),
            (wide_z_image, convert_z_image_transformer_checkpoint_to_diffusers),
        ],
    )
    def test_against_the_converters_of_diffusers(self, make, convert_names):
        """Every number of the checkpoint is its own, so that one row in the wrong place would show."""
        model = make()
        expected = model.state_dict()
        # A row is one number here: the converters only move rows.
        rows = {name: torch.rand(tensor.shape[0]) for name, tensor in expected.items()}
        theirs = {
            tensor.name: tensor.join([rows[part] for part in tensor.parts])
            for tensor in gguf_tensors(type(model).__name__, expected.keys())
        }
        assert_equal_state(convert_names(dict(theirs)), rows)

    @pytest.mark.parametrize("make", [denoisers.sd3, denoisers.sd35_medium])
    def test_sd3_against_diffusers(self, tmp_path, make):
        model = packed(tmp_path / "in", make, group_size=None, dtype=torch.float32)
        export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        arrays = tensors_of(tmp_path / "model.gguf")
        checkpoint = {name: torch.from_numpy(array.copy()) for name, array in arrays.items()}
        converted = convert_sd3_transformer_checkpoint_to_diffusers(checkpoint)
        assert_equal_state(converted, model.state_dict())

    def test_what_comfyui_tells_the_architectures_by(self, flux, tmp_path):
        packed(tmp_path / "in", denoisers.sd3)
        sd3 = export_gguf(tmp_path / "in", tmp_path / "sd3.gguf")
        for report, architecture, key in (
            (flux.report, "flux", "double_blocks.0.img_attn.proj.weight"),
            (sd3, "sd3", "joint_blocks.0.x_block.attn.qkv.weight"),
        ):
            assert key in types_of(report.path)
            reader = open_reader(report.path)
            assert reader.get_field("general.architecture").contents() == report.architecture == architecture
            assert reader.get_field("general.quantization_version").contents() == gguf.GGML_QUANT_VERSION

    def test_other_architectures_have_no_names(self, tmp_path):
        packed(tmp_path / "in", denoisers.sana)
        with pytest.raises(ValueError, match="SanaTransformer2DModel has no GGUF form"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        assert not (tmp_path / "model.gguf").exists()


# d = 0.5; codes -1, 0, 1, -1, then zeros; and a block of zeros.
Q2_0_EXAMPLE = bytes.fromhex("0038" + "24" + 15 * "55" + "0000" + 16 * "55")


class TestTwoBit:
    def test_q2_0_byte_by_byte(self):
        codes = torch.zeros(1, 128, dtype=torch.int8)
        codes[0, :4] = torch.tensor([-1, 0, 1, -1])
        data = encode_q2_0(codes, torch.full((1, 2), 0.5))
        assert data.tobytes() == Q2_0_EXAMPLE
        back = dequantize_two_bit(data, TwoBitType.Q2_0)
        assert back[0, :5].tolist() == [-0.5, 0, 0.5, -0.5, 0]
        assert not back[0, 5:].any()

    @pytest.mark.parametrize("slice_weights", [1, 300, 1 << 19])
    def test_tq2_0_is_as_the_package_writes_and_reads_it(self, monkeypatch, slice_weights):
        """Also by slices, of which one has the weight that differs."""
        monkeypatch.setattr(slices, "_SLICE_WEIGHTS", slice_weights)
        weight = foreign.random_ternary(5, 512, 256, seed=2)
        codes, scales = torch.from_numpy(weight.codes), torch.from_numpy(weight.scales).float()
        codes[3, :256] = 0
        data = encode_tq2_0(codes, scales)
        exact = (codes * scales.repeat_interleave(256, dim=1)).numpy()
        assert np.array_equal(data, gguf.quants.quantize(exact, TYPES.TQ2_0))
        assert np.array_equal(dequantize_tq2_0(data), gguf.quants.dequantize(data, TYPES.TQ2_0))
        back = ReadBack("w", exact, lambda rows: dequantize_tq2_0(data[rows]))
        assert back.compare() == (0, 0.0)
        exact[4, 7] += 0.25
        assert back.compare() == (1, pytest.approx(0.25 / np.abs(exact).max()))

    def test_blocks_of_128_byte_by_byte(self):
        wide = bytes.fromhex("0038" + "24" + 31 * "55")
        back = dequantize_two_bit(np.frombuffer(wide, dtype=np.uint8)[None], TwoBitType.PQ2_0)
        assert back.shape == (1, 128)
        assert back[0, :5].tolist() == [-0.5, 0, 0.5, -0.5, 0]

    def test_trits_of_prism_ml(self):
        """The byte is the fraction that its trits are in base 3, in 256ths rounded up; trit n comes with 3^n."""
        rng = np.random.default_rng(0)
        trits = rng.integers(0, 3, size=128)
        data = []
        for first, weights, count in ((0, 80, 16), (80, 40, 8), (120, 8, 2)):
            digits = trits[first : first + weights].reshape(-1, count)  # [trits of a byte, bytes]
            for column in digits.T:
                value = sum(int(digit) * 3 ** (4 - index) for index, digit in enumerate(column))
                data.append(-(-value * 256 // 243))
        block = np.array([*data, 0x00, 0x38], dtype=np.uint8)[None]
        assert block.shape == (1, 28)
        assert np.array_equal(dequantize_two_bit(block, TwoBitType.PTQ1_0), (trits[None] - 1) * 0.5)

    def test_scales_must_be_finite(self):
        block = np.zeros((1, 18), dtype=np.uint8)
        block[0, 1] = 0x7E
        with pytest.raises(ValueError, match="a scale of Q2_0 is NaN"):
            dequantize_two_bit(block, TwoBitType.Q2_0)

    @pytest.mark.parametrize(("kind", "number", "group"), [("Q2_0", 42, 64), ("PQ2_0", 42, 128), ("PQ2_0", 142, 128)])
    def test_reader_tells_the_blocks_of_id_42_by_their_size(self, tmp_path, kind, number, group):
        """Tensors of both sides of it, as files have them; the last one ends with the file."""
        weight = foreign.random_ternary(8, 256, group, seed=1)
        codes, scales = torch.from_numpy(weight.codes), torch.from_numpy(weight.scales).float()
        blocks = encode_q2_0(codes, scales.repeat_interleave(group // 64, dim=1)).reshape(8, -1, 18)
        if group == 128:  # one scale, then the codes of both
            pairs = blocks.reshape(8, -1, 2, 18)
            blocks = np.concatenate([pairs[:, :, 0], pairs[:, :, 1, 2:]], axis=-1)
        data = blocks.reshape(8, -1)
        writer = gguf.GGUFWriter(path=tmp_path / "model.gguf", arch="flux")
        gguf.constants.GGML_QUANT_SIZES[TwoBitType(number)] = (group, data.shape[1] * group // 256)
        for name in ("a", "b"):
            writer.add_tensor(name, data, raw_dtype=TwoBitType(number))
            writer.add_tensor(f"{name}.bias", np.arange(3, dtype=np.float32))
        for write in (writer.write_header_to_file, writer.write_kv_data_to_file, writer.write_tensors_to_file):
            write()
        writer.close()
        gguf.constants.GGML_QUANT_SIZES.pop(TwoBitType(number))
        stored = {tensor.name: tensor for tensor in open_reader(tmp_path / "model.gguf").tensors}
        assert stored["a.bias"].data.tolist() == [0, 1, 2]
        for name in ("a", "b"):
            assert stored[name].tensor_type is TwoBitType[kind]
            assert np.array_equal(dequantize_two_bit(stored[name].data, stored[name].tensor_type), weight.dense())

    def test_the_package_does_not_know_them_yet(self):
        """When it does, its own types, and its quantizer and dequantizer, take the place of ours."""
        known = {int(kind) for kind in gguf.GGMLQuantizationType}
        assert not known & {int(kind) for kind in TwoBitType}

    def test_nothing_differs_in_any_type(self, tmp_path):
        packed(tmp_path / "in", group_size=64)
        for kind in ("q2_0", "q4_0"):
            report = export_gguf(tmp_path / "in", tmp_path / f"{kind}.gguf", ternary_type=kind)
            assert report.types[kind] == 13
            assert (report.differing, report.inexact) == (0, [])
            assert report.proof().startswith("0 of ")
            convert(tmp_path / f"{kind}.gguf", tmp_path / kind)
            (component,) = inspect_path(tmp_path / f"{kind}.gguf")
            assert component.packed_bits_per_weight == {"q2_0": 2.25, "q4_0": 4.5}[kind]

    @pytest.mark.parametrize(
        ("runtime", "group_size", "kind"),
        [
            ("sdcpp-cpu", 256, "tq2_0"),
            ("sdcpp-cpu", 128, "q2_0"),
            ("sdcpp-cpu", 32, "q4_0"),
            ("sdcpp-gpu", 256, "q2_0"),
            ("comfyui", 256, "q4_0"),
            ("diffusers", 64, "q4_0"),
        ],
    )
    def test_every_program_gets_a_type_that_it_reads(self, tmp_path, runtime, group_size, kind):
        packed(tmp_path / "in", group_size=group_size)
        report = export_gguf(tmp_path / "in", tmp_path / "model.gguf", runtime=runtime)
        assert set(report.types) == {kind, "bf16", "f32"}
        assert not report.differing

    def test_bfloat16_is_for_linear_layers_only(self, tmp_path):
        """ComfyUI-GGUF and diffusers unpack it nowhere else: the position embedding of SD3 crashed."""
        packed(tmp_path / "in", denoisers.sd3, group_size=None)
        export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        types = types_of(tmp_path / "model.gguf")
        assert types["context_embedder.weight"] == "BF16"
        assert {types["pos_embed"], types["x_embedder.proj.weight"]} <= {"F16", "F32"}
        model = SD3Transformer2DModel.from_pretrained(tmp_path / "in", dtype=torch.bfloat16)
        arrays = tensors_of(tmp_path / "model.gguf")
        assert np.array_equal(arrays["pos_embed"].reshape(-1), model.pos_embed.pos_embed.float().numpy().reshape(-1))


class TestRoundTrip:
    @pytest.mark.parametrize(
        ("make", "group_size", "dtype"),
        [
            (denoisers.flux, 256, torch.bfloat16),
            (denoisers.flux, 32, torch.float16),
            (denoisers.sd3, 32, torch.bfloat16),
            (denoisers.sd35_medium, None, torch.float32),
            (denoisers.flux2, 64, torch.bfloat16),
            (wide_z_image, 128, torch.bfloat16),
            (denoisers.qwen_image, 32, torch.float32),
        ],
    )
    def test_bit_equal(self, tmp_path, make, group_size, dtype):
        model = packed(tmp_path / "in", make, dtype=dtype, group_size=group_size)
        report = export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        assert not report.inexact
        assert ("q4_0" in report.types) == (group_size == 32)
        (conversion,) = convert(tmp_path / "model.gguf", tmp_path / "out")
        again = type(model).from_pretrained(tmp_path / "out", dtype=dtype)
        assert len(packed_layers(again)) == len(conversion.layers)
        assert again.config.get("num_layers") == model.config.get("num_layers")
        again.dequantize()
        state = again.state_dict()
        assert all(torch.equal(value, state[name]) for name, value in model.state_dict().items())

    @pytest.mark.parametrize("ternary_type", ["tq1_0", "tq2_0"])
    def test_types(self, flux, tmp_path, ternary_type):
        file = tmp_path / "model.gguf"
        export_gguf(flux.folder, file, ternary_type=ternary_type)
        types = types_of(file)
        assert types["double_blocks.0.img_attn.qkv.weight"] == ternary_type.upper()
        assert types["double_blocks.0.img_attn.qkv.bias"] == "F32"
        assert types["single_blocks.0.linear2.weight"] == ternary_type.upper()
        assert types["final_layer.adaLN_modulation.1.weight"] == "BF16"
        (component,) = inspect_path(file)
        assert component.format == "GGUF, flux"
        assert component.packed_bits_per_weight == {"tq1_0": 1.6875, "tq2_0": 2.0625}[ternary_type]

    def test_int8_layers_become_q8_0(self, tmp_path):
        model = packed(tmp_path / "in", overrides={"norm1.linear": "int8"}, group_size=256)
        file = tmp_path / "model.gguf"
        export_gguf(tmp_path / "in", file)
        assert types_of(file)["double_blocks.0.img_mod.lin.weight"] == "Q8_0"
        expected = model.transformer_blocks[0].norm1.linear.weight
        values = torch.from_numpy(tensors_of(file)["double_blocks.0.img_mod.lin.weight"])
        assert torch.equal(values.to(expected.dtype), expected)


def quantized_by_gguf(weight: foreign.Ternary, *, kind: Any) -> np.ndarray:
    return gguf.quants.quantize(weight.dense(), kind)


class TestImport:
    """Files that this package did not write."""

    def written(self, file: Path, encode: Any, kind: Any, *, arch: str | None = "flux", prefix: str = "") -> dict:
        torch.manual_seed(0)
        model = denoisers.flux()
        state = model.state_dict()
        writer = gguf.GGUFWriter(path=file, arch=arch or "x")
        if arch is None:
            writer.kv_data[0].clear()
        expected = {}
        for seed, tensor in enumerate(gguf_tensors(type(model).__name__, state.keys())):
            joined = tensor.join([state[part] for part in tensor.parts])
            if joined.dim() == 2 and "_blocks" in tensor.name:
                weight = foreign.random_ternary(*joined.shape, 256, seed=seed)
                dense = torch.from_numpy(weight.dense())
                writer.add_tensor(f"{prefix}{tensor.name}", encode(weight), raw_dtype=kind)
            else:
                dense = joined
                writer.add_tensor(f"{prefix}{tensor.name}", joined.numpy())
            expected |= dict(tensor.split(dense, [state[part].shape[0] for part in tensor.parts]))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        model.save_config(file.parent)
        return expected

    @pytest.mark.parametrize("kind", ["TQ1_0", "TQ2_0"])
    def test_blocks_written_by_hand(self, tmp_path, kind):
        encode = {"TQ1_0": foreign.tq1_0, "TQ2_0": foreign.tq2_0}[kind]
        expected = self.written(tmp_path / "model.gguf", encode, TYPES[kind])
        (report,) = convert(tmp_path / "model.gguf", tmp_path / "out", config=tmp_path)
        assert len(report.layers) == 20
        model = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
        model.dequantize()
        assert_equal_state(model.state_dict(), expected)

    def test_without_architecture_and_with_the_prefix_of_whole_checkpoints(self, tmp_path):
        file = tmp_path / "model.gguf"
        encode = functools.partial(quantized_by_gguf, kind=TYPES.TQ2_0)
        expected = self.written(file, encode, TYPES.TQ2_0, arch=None, prefix="model.diffusion_model.")
        convert(file, tmp_path / "out", config=tmp_path / "config.json", verify=False)
        model = FluxTransformer2DModel.from_pretrained(tmp_path / "out")
        model.dequantize()
        assert_equal_state(model.state_dict(), expected)

    def test_the_config_follows_from_the_shapes(self, tmp_path):
        model = packed(tmp_path / "in", denoisers.sd35_medium, group_size=None)
        export_gguf(tmp_path / "in", tmp_path / "own.gguf")
        source = open_reader(tmp_path / "own.gguf")
        writer = gguf.GGUFWriter(path=tmp_path / "model.gguf", arch="sd3")
        for tensor in source.tensors:
            writer.add_tensor(tensor.name, tensor.data, raw_dtype=tensor.tensor_type)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        convert(tmp_path / "model.gguf", tmp_path / "out")
        config = json.loads((tmp_path / "out" / "config.json").read_text())
        for name, value in config.items():
            if name not in ("_class_name", "sample_size", "quantization_config"):
                assert json.loads(json.dumps(model.config[name])) == value, name


class TestRefusals:
    def test_double_scales_are_refused_with_advice_if_they_may_not_be_rounded(self, tmp_path):
        packed(tmp_path / "in", group_size=32, scale_layout="double")
        file = tmp_path / "model.gguf"
        with pytest.raises(ValueError, match=r"not 16-bit floats.*scale_layout='group'.*--round-scales"):
            export_gguf(tmp_path / "in", file, round_scales=False)
        assert list(tmp_path.iterdir()) == [tmp_path / "in"]

    def test_double_scales_are_rounded_with_notice(self, tmp_path, caplog):
        model = packed(tmp_path / "in", group_size=32, scale_layout="double", dtype=torch.float32)
        file = tmp_path / "model.gguf"
        report = export_gguf(tmp_path / "in", file)
        name = "single_blocks.0.linear2.weight"
        assert name in report.inexact
        exact = model.single_transformer_blocks[0].proj_out.weight
        error = (torch.from_numpy(tensors_of(file)[name]) - exact).abs() / exact.abs().clamp_min(1e-9)
        assert 0 < float(error.max()) < 2**-11 + 1e-6
        assert 0 < report.differing < report.weights == sum(value.numel() for value in model.state_dict().values())
        assert 0 < report.largest_difference < 2**-11 + 1e-6
        assert "scales were rounded to float16" in caplog.text
        assert f"{report.differing:,} of {report.weights:,} weights differ" in caplog.text

    @pytest.mark.parametrize(("fallback", "limit"), [("f32", 0.0), ("f16", 1e-3), ("q8_0", 1e-2)])
    def test_fallbacks_of_rotated_layers(self, tmp_path, fallback, limit):
        model = packed(tmp_path / "in", group_size=256, hadamard=64, rank=2, dtype=torch.float32)
        with pytest.raises(ValueError, match="its inputs are rotated"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        file = tmp_path / "model.gguf"
        report = export_gguf(tmp_path / "in", file, fallback=fallback)
        name = "single_blocks.0.linear2.weight"
        assert types_of(file)[name] == fallback.upper()
        assert (name in report.inexact) == (fallback != "f32")
        exact = model.single_transformer_blocks[0].proj_out.weight
        error = (torch.from_numpy(tensors_of(file)[name].copy()) - exact).abs().max()
        assert float(error) <= limit * float(exact.abs().max()) + 1e-7

    def test_merged_layers_are_float16(self, tmp_path, caplog):
        packed(tmp_path / "in", group_size=256, rank=2)
        with pytest.raises(ValueError, match=r"to_q\.weight: it has a low-rank correction.*\(--merge\)\.$"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == [tmp_path / "in"]
        report = convert(tmp_path / "in", tmp_path / "model.gguf", to="gguf", merge=True)
        assert 0 < report.largest_difference < 2**-11
        assert types_of(report.path)["double_blocks.0.img_attn.qkv.weight"] == "F16"
        assert "13 tensors are stored as f16 (double_blocks.0" in caplog.text

    def test_another_type_than_was_asked_for_is_said(self, tmp_path, caplog):
        packed(tmp_path / "in", group_size=64)
        report = export_gguf(tmp_path / "in", tmp_path / "model.gguf", ternary_type="tq2_0")
        assert report.types["q2_0"] == 13
        assert "13 tensors are Q2_0: their groups are not multiples of 256 weights, the blocks of TQ2_0" in caplog.text

    def test_packed_convolutions(self, tmp_path):
        packed(tmp_path / "in", denoisers.sd3, overrides={"pos_embed.proj": "ternary"}, group_size=None)
        with pytest.raises(ValueError, match="is a packed convolution"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf", fallback="f32")

    def test_odd_group_sizes(self, tmp_path):
        packed(tmp_path / "in", group_size=48)
        with pytest.raises(ValueError, match="group size 48 is not a multiple of 32"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf")

    def test_existing_file(self, flux, tmp_path):
        (tmp_path / "model.gguf").write_text("mine")
        with pytest.raises(FileExistsError, match="--overwrite"):
            export_gguf(flux.folder, tmp_path / "model.gguf")
        assert (tmp_path / "model.gguf").read_text() == "mine"

    def test_float_models_are_not_exported(self, tmp_path):
        denoisers.flux().save_pretrained(tmp_path / "in")
        with pytest.raises(ValueError, match="is not a packed model"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf")

    def test_damaged_packed_folders_are_not_exported(self, tmp_path):
        packed(tmp_path / "in")
        file = tmp_path / "in" / "diffusion_pytorch_model.safetensors"
        data = bytearray(file.read_bytes())
        data[-1000] ^= 1
        file.unlink()
        file.write_bytes(data)
        with pytest.raises(ValueError, match="checksum"):
            export_gguf(tmp_path / "in", tmp_path / "model.gguf")
        assert list(tmp_path.iterdir()) == [tmp_path / "in"]


class TestBadFiles:
    def refused(self, file: Path, match: str) -> None:
        with pytest.raises(ValueError, match=match):
            convert(file, file.parent / "out")
        assert not (file.parent / "out").exists()

    def test_another_architecture(self, tmp_path):
        file = tmp_path / "model.gguf"
        writer = gguf.GGUFWriter(path=file, arch="llama")
        writer.add_tensor("token_embd.weight", np.zeros((4, 32), dtype=np.float32))
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        self.refused(file, "GGUF file of the architecture llama. Only flux, sd3, lumina2, qwen_image")
        assert inspect_path(file)[0].format == "GGUF, llama"

    def test_a_config_of_another_model(self, flux, tmp_path):
        denoisers.sd3().save_config(tmp_path)
        with pytest.raises(ValueError, match=r"flux GGUF, but its config\.json is of SD3Transformer2DModel"):
            convert(flux.file, tmp_path / "out", config=tmp_path)

    @pytest.mark.parametrize("size", [0, 3, 100, 4000, -1000])
    def test_truncated(self, flux, tmp_path, size):
        file = tmp_path / "model.gguf"
        file.write_bytes(flux.file.read_bytes()[:size])
        self.refused(file, "cannot be read as GGUF")
        with pytest.raises(ValueError, match="cannot be read as GGUF"):
            inspect_path(file)

    def test_not_gguf_at_all(self, tmp_path):
        (tmp_path / "model.gguf").write_text("text " * 100)
        self.refused(tmp_path / "model.gguf", "cannot be read as GGUF")


@pytest.mark.parametrize("make", [denoisers.sd3, denoisers.flux2, wide_z_image, denoisers.qwen_image])
def test_diffusers_itself_runs_an_exported_file(tmp_path, make):
    """Q4_0 is a type that diffusers' own GGUF backend reads; the names go through its single-file loader.

    It takes FLUX.1 for one of its released width.
    """
    model = packed(tmp_path / "in", make, group_size=32, dtype=torch.float32)
    export_gguf(tmp_path / "in", tmp_path / "model.gguf", runtime="diffusers")
    model.save_config(tmp_path / "config")
    theirs = type(model).from_single_file(
        str(tmp_path / "model.gguf"),
        config=str(tmp_path / "config"),
        quantization_config=GGUFQuantizationConfig(compute_dtype=torch.float32),
        dtype=torch.float32,
    )
    expected = denoisers.predict(model)
    assert float(expected.std()) > 1e-3
    assert float((denoisers.predict(theirs) - expected).abs().max()) < 1e-5
