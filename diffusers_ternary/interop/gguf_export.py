# SPDX-License-Identifier: Apache-2.0
"""`export_gguf`: a packed denoiser as a GGUF file for stable-diffusion.cpp, ComfyUI and diffusers."""

import collections
import contextlib
import dataclasses
import functools
import json
import logging
import math
import os
import pathlib
from collections.abc import Iterator
from typing import Any

import numpy as np
import torch

from ..backend.packed_folder import PackedFolder
from ..extras import import_extra
from ..files.destinations import output_file
from ..format import LayerSpec
from ..format.dtypes import dtype_name
from ..progress import Bar
from .compat import TwoBitType, open_reader, writable_type
from .export import MERGE, ExportReport, ReadBack, block_scales, export
from .gguf_blocks import BLOCK, ENCODERS, FALLBACKS, RUNTIMES, TERNARY_TYPES, choose_type
from .gguf_names import ARCHITECTURES, CONFIG_KEY, GgufTensor, gguf_tensors
from .gguf_two_bit import dequantize_tq2_0, dequantize_two_bit
from .slices import row_slices


logger = logging.getLogger(__name__)
_MAGIC = b"GGUF"
# As ComfyUI-GGUF's converter does: tensors of one dimension and tiny ones are float32.
_SMALL = 1024
_KINDS = f"ternary and int8 layers. Quantize them to one kind, or {MERGE}."
# The patch embedding of Stable Diffusion 3.
_CONVOLUTION = "x_embedder.proj.weight"


def export_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    runtime: str = "sdcpp-cpu",
    ternary_type: str | None = None,
    round_scales: bool = True,
    fallback: str | None = None,
    merge: bool = False,
    overwrite: bool = False,
) -> ExportReport:
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
        merge (`bool`, *optional*, defaults to `False`): store such layers as float16, rotation and low-rank correction
            merged into them: `fallback="f16"`.
        overwrite (`bool`, *optional*): replace the destination.

    Returns:
        [`ExportReport`].

    Raises:
        ValueError: if the source is not a packed FLUX.1, FLUX.2, SD3, Z-Image or Qwen-Image, or a layer cannot be
            held.
        FileExistsError: if the destination exists, or is not a GGUF file.
        MissingExtraError: without the `gguf` package.
    """
    check_gguf_options(runtime=runtime, ternary_type=ternary_type, fallback=fallback)
    types = RUNTIMES[runtime]
    if ternary_type is not None:
        types = (ternary_type, *(kind for kind in types if kind != ternary_type))
    fallback = fallback or ("f16" if merge else None)
    form = _Gguf(import_extra("gguf", "Writing GGUF files"), types, round_scales, fallback)
    report = export(form, source, destination, overwrite=overwrite)
    for kind in types[1:]:
        # What was not asked for, or is large; a program's next best is what its users want.
        if report.types.get(kind) and (ternary_type is not None or kind == "q4_0"):
            logger.warning(
                "%d tensors are %s: their groups are not multiples of %d weights, the blocks of %s.",
                report.types[kind],
                kind.upper(),
                BLOCK[types[0]],
                types[0].upper(),
            )
    if report.inexact:
        logger.warning(
            "%d tensors are not bit-equal: their scales were rounded to float16%s; %s.",
            len(report.inexact),
            f", or they are stored as {fallback}" if fallback else "",
            report.proof(),
        )
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


def gguf_form(runtime: str) -> "_Gguf":
    """The form for a program, to ask what it would be: without the package, nothing is written."""
    return _Gguf(None, RUNTIMES[runtime], round_scales=True, fallback=None)


@dataclasses.dataclass(frozen=True)
class _Gguf:
    """The form of GGUF files; see [`export_gguf`]. `gguf` is the package."""

    gguf: Any
    types: tuple[str, ...]
    round_scales: bool
    fallback: str | None

    @property
    def may_round(self) -> bool:
        return self.round_scales or self.fallback is not None

    def output(
        self, destination: pathlib.Path, source: pathlib.Path, *, overwrite: bool
    ) -> contextlib.AbstractContextManager[pathlib.Path]:
        return output_file(destination, magic=_MAGIC, sources=[source], overwrite=overwrite)

    def architecture(self, model: PackedFolder) -> str:
        return ARCHITECTURES[model.class_name]

    def files(self, model: PackedFolder, place: pathlib.Path) -> list[pathlib.Path]:
        return [place]

    def check(self, model: PackedFolder) -> None:
        unpacked = []
        for tensor in gguf_tensors(model.class_name, model.names()):
            if tensor.name == _CONVOLUTION and model.spec(tensor.parts[0]) is not None:
                raise ValueError(
                    f"{tensor.parts[0]} is a packed convolution, which GGML does not know. Keep it in float."
                )
            kind, reason = self.type_of(model, tensor)
            if kind is None and self.fallback is None:
                raise ValueError(f"No GGML type that this program reads holds {reason}")
            if kind is None:
                unpacked.append(tensor.name)
        if unpacked:
            logger.warning("%d tensors are stored as %s (%s ...).", len(unpacked), self.fallback, unpacked[0])

    def write(self, model: PackedFolder, place: pathlib.Path) -> dict[str, int]:
        writer = self.gguf.GGUFWriter(path=None, arch=self.architecture(model), use_temp_file=True)
        writer.add_quantization_version(self.gguf.GGML_QUANT_VERSION)
        writer.add_string(CONFIG_KEY, json.dumps(model.config, sort_keys=True))
        types: collections.Counter[str] = collections.Counter()
        for tensor in Bar(gguf_tensors(model.class_name, model.names()), "Exporting"):
            kind, data = self._encode(model, tensor)
            writer.add_tensor(tensor.name, data, raw_dtype=writable_type(kind.upper()))
            types[kind] += 1
        writer.add_file_type(_file_type(self.gguf, types))
        writer.write_header_to_file(path=place)
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
        return dict(types)

    def read_back(self, model: PackedFolder, place: pathlib.Path) -> Iterator[ReadBack]:
        stored = {part.name: part for part in open_reader(place).tensors}
        for tensor in gguf_tensors(model.class_name, model.names()):
            exact = tensor.join([model.dequantize(name) for name in tensor.parts]).numpy()
            yield ReadBack(tensor.name, exact, functools.partial(_unpacked, self.gguf, stored[tensor.name]))

    def type_of(self, model: PackedFolder, tensor: GgufTensor) -> tuple[str | None, str]:
        """The type that holds all parts of a tensor, or the reason why there is none."""
        specs = [model.spec(name) for name in tensor.parts]
        if all(spec is None for spec in specs):
            return "float", ""
        types = set()
        for name, spec in zip(tensor.parts, specs, strict=True):
            if spec is None:
                shares = f"{name}, which is not packed, but shares the tensor {tensor.name} with packed layers"
                return None, f"{shares}. Quantize all of them or none, or {MERGE}."
            choice = choose_type(spec, self._scales(model, name), self.types)
            if choice.type is None:
                return None, f"{name}: {choice.reason}"
            types.add(choice.type)
        if types <= BLOCK.keys() - {"q8_0"}:
            # Smaller blocks lie inside the groups of the other parts as well.
            return min(types, key=BLOCK.__getitem__), ""
        return (types.pop(), "") if len(types) == 1 else (None, f"{tensor.name}, which joins {_KINDS}")

    def _scales(self, model: PackedFolder, name: str) -> torch.Tensor:
        scales = model.group_scales(name)
        if self.round_scales and bool((scales <= torch.finfo(torch.float16).max).all()):
            return scales.half().float()
        return scales

    def _encode(self, model: PackedFolder, tensor: GgufTensor) -> tuple[str, np.ndarray]:
        """The type of a tensor, and its blocks."""
        kind, _ = self.type_of(model, tensor)
        if kind == "float":
            return _encode_float(self.gguf, tensor.join([model.read(name) for name in tensor.parts]), tensor.name)
        if kind is None:
            assert self.fallback is not None
            dense = tensor.join([model.dequantize(name) for name in tensor.parts])
            kind = "f16" if self.fallback == "q8_0" and dense.shape[1] % BLOCK["q8_0"] else self.fallback
            return kind, _quantized(self.gguf, dense, kind)
        # A block of one weight: the whole product, which the package quantizes again.
        block = BLOCK[kind] if kind in ENCODERS else 1
        codes = tensor.join([model.codes(name) for name in tensor.parts])
        scales = tensor.join(
            [block_scales(_spec(model, name), self._scales(model, name), block) for name in tensor.parts]
        )
        if kind in ENCODERS:
            parts = [ENCODERS[kind](codes[rows], scales[rows]) for rows in row_slices(codes.shape)]
            return kind, np.concatenate(parts)
        return kind, _quantized(self.gguf, codes * scales, kind)


def _spec(model: PackedFolder, name: str) -> LayerSpec:
    spec = model.spec(name)
    assert spec is not None
    return spec


def _quantized(gguf: Any, weight: torch.Tensor, kind: str) -> np.ndarray:
    data: np.ndarray = gguf.quants.quantize(weight.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    return data


def _file_type(gguf: Any, types: collections.Counter[str]) -> Any:
    """What the file says it mostly is, for programs that show it."""
    names = {"tq2_0": "MOSTLY_TQ2_0", "tq1_0": "MOSTLY_TQ1_0", "q4_0": "MOSTLY_Q4_0", "q8_0": "MOSTLY_Q8_0"}
    most = max(types, key=lambda kind: types[kind] if kind in names else 0)
    return gguf.LlamaFileType[names.get(most, "GUESSED")]


def float_type(name: str, dtype: str, shape: tuple[int, ...]) -> str:
    """The GGML type of a tensor that is stored as floats: by its name in the file, its dtype and shape.

    `"f32"` for what is bfloat16 and not a linear layer's weight is the worst case: it is `"f16"` if that is exact.
    """
    if len(shape) <= 1 or math.prod(shape) <= _SMALL or dtype == "F32":
        return "f32"
    if dtype != "BF16":
        return "f16"  # float16, and 8-bit floats, every one of which is a float16
    # ComfyUI-GGUF and diffusers unpack bfloat16 inside linear layers only.
    return "bf16" if len(shape) == 2 and name.endswith(".weight") else "f32"


def _encode_float(gguf: Any, tensor: torch.Tensor, name: str) -> tuple[str, np.ndarray]:
    kind = float_type(name, dtype_name(tensor, name), tuple(tensor.shape))
    half = tensor.half()
    if kind == "bf16":
        return kind, _quantized(gguf, tensor.float(), kind)
    narrow = tensor.dtype == torch.bfloat16 and tensor.dim() > 1 and tensor.numel() > _SMALL
    if kind == "f16" or (narrow and torch.equal(half.float(), tensor.float())):
        return "f16", half.numpy()
    return "f32", tensor.float().numpy()


def _unpacked(gguf: Any, part: Any, rows: slice) -> np.ndarray:
    """float32 weights of some rows of a tensor of the file."""
    data = np.ascontiguousarray(part.data[rows])
    if isinstance(part.tensor_type, TwoBitType):
        return dequantize_two_bit(data, part.tensor_type)
    if part.tensor_type.name == "TQ2_0":
        return dequantize_tq2_0(data)
    back: np.ndarray = gguf.quants.dequantize(data, part.tensor_type)
    return back
