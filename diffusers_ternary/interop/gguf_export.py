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

from ..destinations import output_file
from ..extras import import_extra
from ..format import TernarySpec
from .gguf_blocks import FALLBACKS, TERNARY_TYPES, block_scales, choose_type, encode_q4_0, encode_q8_0
from .gguf_names import ARCHITECTURES, GgufTensor, gguf_tensors
from .packed import PackedFolder, open_packed


logger = logging.getLogger(__name__)
CONFIG_KEY = "diffusers_ternary.config"
_MAGIC = b"GGUF"
# As ComfyUI-GGUF's converter does: tensors of one dimension and tiny ones are float32.
_SMALL = 1024
# The patch embedding of Stable Diffusion 3.
_CONVOLUTION = "x_embedder.proj.weight"


@dataclasses.dataclass(frozen=True)
class GgufReport:
    """What an export wrote.

    Args:
        path (`Path`): the file.
        architecture (`str`): `"flux"` or `"sd3"`.
        types (`dict[str, int]`): GGML type → number of tensors.
        inexact (`list[str]`): tensors that are not bit-equal to the packed ones, as the caller allowed.
        bytes (`int`): size of the file.
    """

    path: pathlib.Path
    architecture: str
    types: dict[str, int]
    inexact: list[str]
    bytes: int

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        return {**dataclasses.asdict(self), "path": str(self.path)}


@dataclasses.dataclass(frozen=True)
class _Options:
    ternary_type: str
    round_scales: bool
    fallback: str | None


@dataclasses.dataclass(frozen=True)
class _Encoded:
    type: str
    data: np.ndarray
    exact: bool


def export_gguf(
    source: str | os.PathLike[str],
    destination: str | os.PathLike[str],
    *,
    ternary_type: str = "tq2_0",
    round_scales: bool = False,
    fallback: str | None = None,
    overwrite: bool = False,
) -> GgufReport:
    """Writes a packed denoiser as a GGUF file, without loss unless that is allowed explicitly.

    Ternary layers become TQ2_0 (or TQ1_0) where blocks of 256 weights lie inside their groups: group sizes that are
    multiples of 256, or one scale per row. Other group sizes that are multiples of 32 become Q4_0, which holds ternary
    weights exactly as well, in 4.5 bits. What neither holds is refused, with advice. `TernaryConfig(group_size=256,
    scales="group")` makes models that export in 2.06 bits per weight. Names: see `gguf_names.py`.

    Args:
        source (`str` or `PathLike`): packed model folder, or the pipeline folder it is in.
        destination (`str` or `PathLike`): file to write.
        ternary_type (`str`, *optional*, defaults to `"tq2_0"`): `"tq2_0"` (fast) or `"tq1_0"` (1.69 bits).
        round_scales (`bool`, *optional*): round scales that are no float16 (6-bit multipliers, say) to it; changes
            weights by at most 0.05 %.
        fallback (`str`, *optional*): `"f32"`, `"f16"` or `"q8_0"` for layers that no type holds exactly.
        overwrite (`bool`, *optional*): replace the destination.

    Returns:
        [`GgufReport`].

    Raises:
        ValueError: if the source is no packed Flux or SD3, or a layer cannot be held.
        FileExistsError: if the destination exists, or is no GGUF file.
        MissingExtraError: without the `gguf` package.
    """
    options = _checked_options(ternary_type, round_scales, fallback)
    gguf = import_extra("gguf", "Writing GGUF files")
    with output_file(destination, magic=_MAGIC, sources=[source], overwrite=overwrite) as temporary:
        model = open_packed(pathlib.Path(source))
        class_name = model.config.get("_class_name", "?")
        tensors = gguf_tensors(class_name, model.names())
        # The cheap checks of every layer come before the first byte is written.
        for tensor in tensors:
            _check(model, tensor, options)
        file_type = gguf.LlamaFileType.MOSTLY_TQ2_0 if ternary_type == "tq2_0" else gguf.LlamaFileType.MOSTLY_TQ1_0
        writer = gguf.GGUFWriter(path=None, arch=ARCHITECTURES[class_name], use_temp_file=True)
        writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
        writer.add_file_type(file_type)
        writer.add_string(CONFIG_KEY, json.dumps(model.config, sort_keys=True))
        types: collections.Counter[str] = collections.Counter()
        inexact = []
        for tensor in tqdm(tensors, desc="Exporting", leave=False):
            encoded = _encode(gguf, model, tensor, options)
            writer.add_tensor(tensor.name, encoded.data, raw_dtype=gguf.GGMLQuantizationType[encoded.type.upper()])
            types[encoded.type] += 1
            if not encoded.exact:
                inexact.append(tensor.name)
        _write(writer, temporary)
        size = temporary.stat().st_size
    if types["q4_0"]:
        logger.warning(
            "%d tensors are Q4_0 (4.5 bits): their group size is no multiple of 256, which TQ needs.", types["q4_0"]
        )
    return GgufReport(pathlib.Path(destination), ARCHITECTURES[class_name], dict(types), inexact, size)


def _checked_options(ternary_type: str, round_scales: bool, fallback: str | None) -> _Options:
    if ternary_type not in TERNARY_TYPES:
        raise ValueError(f"ternary_type={ternary_type!r} is not one of {', '.join(TERNARY_TYPES)}.")
    if fallback is not None and fallback not in FALLBACKS:
        raise ValueError(f"fallback={fallback!r} is not one of {', '.join(FALLBACKS)}.")
    return _Options(ternary_type, round_scales, fallback)


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
        choice = choose_type(spec, _scales(model, name, options), options.ternary_type)
        if choice.type is None:
            return None, f"{name}: {choice.reason}"
        types.add(choice.type)
    if types <= {options.ternary_type, "q4_0"} and len(types) == 2:
        return "q4_0", ""
    return (types.pop(), "") if len(types) == 1 else (None, f"{tensor.name} joins layers of different kinds")


def _check(model: PackedFolder, tensor: GgufTensor, options: _Options) -> None:
    if tensor.name == _CONVOLUTION and model.spec(tensor.parts[0]) is not None:
        raise ValueError(f"{tensor.parts[0]} is a packed convolution, which GGML does not know. Keep it in float.")
    kind, reason = _shared_type(model, tensor, options)
    if kind is None and options.fallback is None:
        raise ValueError(
            f"No GGML type holds {reason}. For a lossless file make the model with group_size=256 and scales='group'; "
            "--round-scales rounds scales to float16 (at most 0.05 %), --fallback f16 stores such layers unpacked."
        )


def _encode(gguf: Any, model: PackedFolder, tensor: GgufTensor, options: _Options) -> _Encoded:
    kind, _ = _shared_type(model, tensor, options)
    if kind == "float":
        return _encode_float(gguf, tensor.join([model.read(name) for name in tensor.parts]))
    if kind is None:
        assert options.fallback is not None
        dense = tensor.join([model.dequantize(name) for name in tensor.parts])
        kind = options.fallback
        if kind == "q8_0" and dense.shape[1] % 32:
            kind = "f16"
        data = gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType[kind.upper()])
        return _Encoded(kind, data, kind == "f32")
    scales = [_scales(model, name, options) for name in tensor.parts]
    dense = tensor.join([model.product(name, part) for name, part in zip(tensor.parts, scales, strict=True)])
    if kind in TERNARY_TYPES:
        data = gguf.quants.quantize(dense.numpy(), gguf.GGMLQuantizationType[kind.upper()])
    else:
        spread = [_spread(model, name, part) for name, part in zip(tensor.parts, scales, strict=True)]
        codes = tensor.join([model.codes(name) for name in tensor.parts])
        data = (encode_q4_0 if kind == "q4_0" else encode_q8_0)(codes, tensor.join(spread))
    _prove(gguf, tensor.name, kind, data, dense)
    changed = options.round_scales and any(
        not torch.equal(part, model.group_scales(name)) for name, part in zip(tensor.parts, scales, strict=True)
    )
    return _Encoded(kind, data, not changed)


def _spread(model: PackedFolder, name: str, scales: torch.Tensor) -> torch.Tensor:
    spec = model.spec(name)
    assert spec is not None
    size = spec.group_size if isinstance(spec, TernarySpec) else spec.in_features
    return block_scales(scales, size, spec.in_features)


def _encode_float(gguf: Any, tensor: torch.Tensor) -> _Encoded:
    if tensor.dim() <= 1 or tensor.numel() <= _SMALL or tensor.dtype == torch.float32:
        return _Encoded("f32", tensor.float().numpy(), True)
    if tensor.dtype == torch.bfloat16:
        return _Encoded("bf16", gguf.quants.quantize(tensor.float().numpy(), gguf.GGMLQuantizationType.BF16), True)
    # float16, and 8-bit floats, every one of which is a float16.
    return _Encoded("f16", tensor.half().numpy(), True)


def _prove(gguf: Any, name: str, kind: str, data: np.ndarray, dense: torch.Tensor) -> None:
    """Unpacks what was encoded with the gguf package's own code, and compares.

    Raises:
        RuntimeError: if it differs, which would be a bug.
    """
    back = gguf.quants.dequantize(data, gguf.GGMLQuantizationType[kind.upper()])
    if not np.array_equal(back, dense.numpy()):
        raise RuntimeError(f"{name} differs after encoding as {kind}. This is a bug; please report it.")


def _write(writer: Any, target: pathlib.Path) -> None:
    writer.write_header_to_file(path=target)
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
