# SPDX-License-Identifier: Apache-2.0
"""`export_gguf`: a packed Flux or Stable Diffusion 3 denoiser as a GGUF file for stable-diffusion.cpp and ComfyUI."""

import collections
import dataclasses
import json
import logging
import os
import pathlib
from typing import Any

import numpy as np
import torch
from diffusers.utils.logging import tqdm

from ..backend.packed_folder import PackedFolder
from ..extras import import_extra
from ..files.destinations import output_file
from ..format import TernarySpec, expand_scales
from .compat import TwoBitType, open_reader, writable_type
from .gguf_blocks import BLOCK, ENCODERS, FALLBACKS, RUNTIMES, TERNARY_TYPES, block_scales, choose_type
from .gguf_names import ARCHITECTURES, CONFIG_KEY, GgufTensor, gguf_tensors
from .gguf_two_bit import dequantize_two_bit
from .packed import open_packed


logger = logging.getLogger(__name__)
_MAGIC = b"GGUF"
# As ComfyUI-GGUF's converter does: tensors of one dimension and tiny ones are float32.
_SMALL = 1024
# The patch embedding of Stable Diffusion 3.
_CONVOLUTION = "x_embedder.proj.weight"


@dataclasses.dataclass(frozen=True)
class GgufReport:
    """What an export wrote, and what reading it again proved.

    Args:
        path (`Path`): the file.
        architecture (`str`): `"flux"` or `"sd3"`.
        types (`dict[str, int]`): GGML type → number of tensors.
        inexact (`list[str]`): tensors that are not bit-equal to the packed ones: their scales were rounded, or the
            caller allowed a fallback.
        weights (`int`): weights that were read from the file again and compared with the packed model, all of them.
        differing (`int`): of these, how many differ.
        largest_difference (`float`): of these, the largest relative to the largest weight of its tensor.
        bytes (`int`): size of the file.
    """

    path: pathlib.Path
    architecture: str
    types: dict[str, int]
    inexact: list[str]
    weights: int
    differing: int
    largest_difference: float
    bytes: int

    def proof(self) -> str:
        """What was compared, in one line."""
        text = f"{self.differing:,} of {self.weights:,} weights differ from the packed model"
        if not self.differing:
            return text
        return f"{text}, by at most {100 * self.largest_difference:.3f} % of the largest of their tensor"

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class _Options:
    types: tuple[str, ...]
    round_scales: bool
    fallback: str | None


def export_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    runtime: str = "sdcpp-cpu",
    ternary_type: str | None = None,
    round_scales: bool = True,
    fallback: str | None = None,
    overwrite: bool = False,
) -> GgufReport:
    """Writes a packed denoiser as a GGUF file, reads it again and compares every weight.

    Ternary layers become the best type that the program reads and whose blocks lie inside their groups (see the tables
    of `gguf_blocks.py`): TQ2_0 for groups that are multiples of 256, or one scale per row; Q2_0 for multiples of 64;
    Q4_0, which holds ternary weights exactly as well, for multiples of 32. What none holds is refused, with advice.
    Names: see `gguf_names.py`.

    Args:
        source (`str` or `PathLike`): packed model folder, or the pipeline folder it is in.
        destination (`str` or `PathLike`): file to write.
        runtime (`str`, *optional*, defaults to `"sdcpp-cpu"`): the program that is to read it: `"sdcpp-cpu"`,
            `"sdcpp-gpu"`, `"comfyui"` or `"diffusers"`.
        ternary_type (`str`, *optional*): `"tq2_0"`, `"tq1_0"`, `"q2_0"` or `"q4_0"`: this type first.
        round_scales (`bool`, *optional*, defaults to `True`): round scales that are not float16 (6-bit multipliers,
            say) to it, with a line of notice; changes weights by at most 0.05 %. Otherwise such layers are refused.
        fallback (`str`, *optional*): `"f32"`, `"f16"` or `"q8_0"` for layers that no type holds exactly.
        overwrite (`bool`, *optional*): replace the destination.

    Returns:
        [`GgufReport`].

    Raises:
        ValueError: if the source is not a packed Flux or SD3, or a layer cannot be held.
        FileExistsError: if the destination exists, or is not a GGUF file.
        MissingExtraError: without the `gguf` package.
    """
    options = _checked_options(runtime, ternary_type, round_scales, fallback)
    gguf = import_extra("gguf", "Writing GGUF files")
    with output_file(destination, magic=_MAGIC, sources=[source], overwrite=overwrite) as temporary:
        model = open_packed(pathlib.Path(source))
        class_name = model.config.get("_class_name", "?")
        tensors = gguf_tensors(class_name, model.names())
        # The cheap checks of every layer come before the first byte is written.
        for tensor in tensors:
            _check(model, tensor, options)
        writer = gguf.GGUFWriter(path=None, arch=ARCHITECTURES[class_name], use_temp_file=True)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_string(CONFIG_KEY, json.dumps(model.config, sort_keys=True))
        types: collections.Counter[str] = collections.Counter()
        for tensor in tqdm(tensors, desc="Exporting", leave=False):
            kind, data = _encode(gguf, model, tensor, options)
            writer.add_tensor(tensor.name, data, raw_dtype=writable_type(kind.upper()))
            types[kind] += 1
        writer.add_file_type(_file_type(gguf, types))
        _write(writer, temporary)
        report = GgufReport(
            pathlib.Path(destination),
            ARCHITECTURES[class_name],
            dict(types),
            *_compare(gguf, temporary, model, tensors),
            temporary.stat().st_size,
        )
    if options.types[0] != "q4_0" and report.types.get("q4_0"):
        logger.warning(
            "%d tensors are Q4_0 (4.5 bits): their group size is not a multiple of %d, which %s needs.",
            report.types["q4_0"],
            BLOCK[options.types[0]],
            options.types[0].upper(),
        )
    if report.inexact and options.round_scales:
        logger.warning("Scales of %d tensors were rounded to float16; %s.", len(report.inexact), report.proof())
    return report


def check_gguf_options(
    *, runtime: str | None = None, ternary_type: str | None = None, fallback: str | None = None
) -> None:
    """Checks options of [`export_gguf`] that are wrong whatever the source is; `None` is not looked at.

    Raises:
        ValueError: names what there is to choose from.
    """
    if runtime is not None and runtime not in RUNTIMES:
        raise ValueError(f"runtime={runtime!r} is not one of {', '.join(RUNTIMES)}.")
    if ternary_type is not None and ternary_type not in TERNARY_TYPES:
        raise ValueError(f"ternary_type={ternary_type!r} is not one of {', '.join(TERNARY_TYPES)}.")
    if fallback is not None and fallback not in FALLBACKS:
        raise ValueError(f"fallback={fallback!r} is not one of {', '.join(FALLBACKS)}.")


def _checked_options(runtime: str, ternary_type: str | None, round_scales: bool, fallback: str | None) -> _Options:
    check_gguf_options(runtime=runtime, ternary_type=ternary_type, fallback=fallback)
    types = RUNTIMES[runtime]
    if ternary_type is not None:
        types = (ternary_type, *(kind for kind in types if kind != ternary_type))
    return _Options(types, round_scales, fallback)


def _file_type(gguf: Any, types: collections.Counter[str]) -> Any:
    """What the file says it mostly is, for programs that show it."""
    names = {"tq2_0": "MOSTLY_TQ2_0", "tq1_0": "MOSTLY_TQ1_0", "q4_0": "MOSTLY_Q4_0", "q8_0": "MOSTLY_Q8_0"}
    most = max(types, key=lambda kind: types[kind] if kind in names else 0)
    return gguf.LlamaFileType[names.get(most, "GUESSED")]


def _scales(model: PackedFolder, name: str, options: _Options) -> torch.Tensor:
    scales = model.group_scales(name)
    if options.round_scales and bool((scales <= torch.finfo(torch.float16).max).all()):
        return scales.half().float()
    return scales


def _shared_type(model: PackedFolder, tensor: GgufTensor, options: _Options) -> tuple[str | None, str]:
    """The type that holds all parts of a tensor, or the reason why there is none."""
    specs = [model.spec(name) for name in tensor.parts]
    if all(spec is None for spec in specs):
        return "float", ""
    types = set()
    for name, spec in zip(tensor.parts, specs, strict=True):
        if spec is None:
            return None, f"{name} is not packed, but shares the tensor {tensor.name} with packed layers"
        choice = choose_type(spec, _scales(model, name, options), options.types)
        if choice.type is None:
            return None, f"{name}: {choice.reason}"
        types.add(choice.type)
    if types <= BLOCK.keys() - {"q8_0"}:
        # Smaller blocks lie inside the groups of the other parts as well.
        return min(types, key=BLOCK.__getitem__), ""
    return (types.pop(), "") if len(types) == 1 else (None, f"{tensor.name} joins layers of different kinds")


def _check(model: PackedFolder, tensor: GgufTensor, options: _Options) -> None:
    if tensor.name == _CONVOLUTION and model.spec(tensor.parts[0]) is not None:
        raise ValueError(f"{tensor.parts[0]} is a packed convolution, which GGML does not know. Keep it in float.")
    kind, reason = _shared_type(model, tensor, options)
    if kind is None and options.fallback is None:
        raise ValueError(
            f"No GGML type that this program reads holds {reason}. Make the model with a group size that is a "
            "multiple of 256 (64 for Q2_0), scales='group', and without rotation and low rank; or store such layers "
            "unpacked with --fallback f16, or round scales to float16 (--round-scales, at most 0.05 %)."
        )


def _encode(gguf: Any, model: PackedFolder, tensor: GgufTensor, options: _Options) -> tuple[str, np.ndarray]:
    """The type of a tensor, and its blocks."""
    kind, _ = _shared_type(model, tensor, options)
    if kind == "float":
        return _encode_float(gguf, tensor.join([model.read(name) for name in tensor.parts]), tensor.name)
    if kind is None:
        assert options.fallback is not None
        dense = tensor.join([model.dequantize(name) for name in tensor.parts])
        kind = options.fallback
        if kind == "q8_0" and dense.shape[1] % BLOCK["q8_0"]:
            kind = "f16"
        return kind, gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    scales = [_scales(model, name, options) for name in tensor.parts]
    if kind not in ENCODERS:
        dense = tensor.join([_product(model, name, part) for name, part in zip(tensor.parts, scales, strict=True)])
        return kind, gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    spread = [_spread(model, name, part, kind) for name, part in zip(tensor.parts, scales, strict=True)]
    codes = tensor.join([model.codes(name) for name in tensor.parts])
    return kind, ENCODERS[kind](codes, tensor.join(spread))


def _product(model: PackedFolder, name: str, scales: torch.Tensor) -> torch.Tensor:
    spec, codes = model.spec(name), model.codes(name)
    return codes * expand_scales(scales, spec.group_size if isinstance(spec, TernarySpec) else 1, codes.shape[1])


def _spread(model: PackedFolder, name: str, scales: torch.Tensor, kind: str) -> torch.Tensor:
    spec = model.spec(name)
    assert spec is not None
    size = spec.group_size if isinstance(spec, TernarySpec) else spec.in_features
    return block_scales(scales, size, spec.in_features, BLOCK[kind])


def _encode_float(gguf: Any, tensor: torch.Tensor, name: str) -> tuple[str, np.ndarray]:
    if tensor.dim() <= 1 or tensor.numel() <= _SMALL or tensor.dtype == torch.float32:
        return "f32", tensor.float().numpy()
    if tensor.dtype != torch.bfloat16:
        # float16, and 8-bit floats, every one of which is a float16.
        return "f16", tensor.half().numpy()
    if tensor.dim() == 2 and name.endswith(".weight"):
        return "bf16", gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16)
    # ComfyUI-GGUF and diffusers unpack bfloat16 inside linear layers only.
    half = tensor.half()
    return ("f16", half.numpy()) if torch.equal(half.float(), tensor.float()) else ("f32", tensor.float().numpy())


def _compare(
    gguf: Any, file: pathlib.Path, model: PackedFolder, tensors: list[GgufTensor]
) -> tuple[list[str], int, int, float]:
    """Reads the file with code that shares nothing with the encoders, and compares it with the packed model.

    Returns:
        Tensors that differ, weights compared, weights that differ, and the largest difference relative to the largest
        weight of its tensor.
    """
    stored = {part.name: part for part in open_reader(file).tensors}
    inexact, weights, differing, largest = [], 0, 0, 0.0
    for tensor in tqdm(tensors, desc="Comparing", leave=False):
        exact = tensor.join([model.dequantize(name) for name in tensor.parts]).float().numpy()
        back = _unpacked(gguf, stored[tensor.name]).reshape(exact.shape)
        weights += exact.size
        if np.array_equal(back, exact):
            continue
        difference = np.abs(back - exact)
        inexact.append(tensor.name)
        differing += int(np.count_nonzero(difference))
        largest = max(largest, float(difference.max() / np.abs(exact).max()))
    return inexact, weights, differing, largest


def _unpacked(gguf: Any, part: Any) -> np.ndarray:
    """float32 weights of a tensor of the file."""
    data = np.ascontiguousarray(part.data)
    if isinstance(part.tensor_type, TwoBitType):
        return dequantize_two_bit(data, part.tensor_type)
    back: np.ndarray = gguf.quants.dequantize(data, part.tensor_type)
    return back


def _write(writer: Any, target: pathlib.Path) -> None:
    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
