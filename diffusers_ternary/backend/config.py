# SPDX-License-Identifier: Apache-2.0
"""`TernaryConfig`: one object that diffusers, transformers and pipelines take as their quantization config."""

import copy
import difflib
import enum
import inspect
import re
import warnings
from collections.abc import Mapping, Sequence
from typing import Any, TypeVar

import torch
from diffusers import PipelineQuantizationConfig

from ..format import FORMAT_VERSION, WRITTEN_VERSION, check_format_version
from ..format.spec import REQUESTED_LAYOUTS, check_hadamard, check_rank
from ..kernels.ops import ACTIVATION_DTYPES
from ..ternarize import ROUNDINGS
from .compat import DiffusersConfigMixin, TransformersConfigMixin, refuse_unknown_components
from .method import QUANT_METHOD


# The "rounding" that never rounds: packs layers whose weights are ternary already, and keeps all others.
RECOVER = "recover"

# What `scale_layout` is called in config.json, where every version reads it, and in the layers' records.
_STORED_LAYOUT = "scales"
KINDS = ("ternary", "int8")
OVERRIDE_KINDS = (*KINDS, "keep")
ConfigT = TypeVar("ConfigT")
COMPUTE_DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}

# transformer, transformer_2 (Wan), unet, prior (Kandinsky, Cascade): what denoises, and nothing else.
DENOISER_COMPONENTS = re.compile(r"(transformer|unet|prior)(_\d+)?")


class TernaryMethod(enum.StrEnum):
    """The quantization method's name; an enum because diffusers reads `.value`."""

    DIFFUSERS_TERNARY = QUANT_METHOD


class TernaryConfig(DiffusersConfigMixin, TransformersConfigMixin, PipelineQuantizationConfig):
    """How to quantize a model to ternary weights.

    Goes wherever diffusers or transformers take a `quantization_config`, for a single model or for a whole pipeline
    (whose denoisers are then quantized), and inside `PipelineQuantizationConfig(quant_mapping=...)`.

    Args:
        group_size (`int`, *optional*, defaults to 128):
            Consecutive input columns that share a scale; the last group of a row may be shorter. `None` = one scale
            per row.
        modules_to_not_convert (`list[str]`, *optional*):
            Names of modules to keep as they are, beside those that the architecture's policy keeps. A name matches
            whole dotted components anywhere in the module path; `*`, `?`, `[` make it a glob over the whole path.
        overrides (`dict[str, str]`, *optional*):
            Pattern → `"ternary"`, `"int8"` (symmetric, one scale per row) or `"keep"`. The first matching pattern
            decides, before `modules_to_not_convert` and before the policy.
        activation_dtype (`str`, *optional*, defaults to `"auto"`):
            What activations are rounded to, per token, before the product: `"int8"`, `"float8_e4m3fn"`, `"none"`, or
            `"auto"`: the fastest that the device's kernels have.
        compute_dtype (`str` or `torch.dtype`, *optional*):
            Dtype of the product, and of the model if `dtype` is not given. `None` = that of the input.
        components (`list[str]` or `dict[str, str]`, *optional*):
            Components of a pipeline to quantize, or a dictionary that gives each its own kind. `None` = its
            denoisers. Text encoders are safe in `"int8"`, which hardly changes their output; rounding one to ternary
            spoils the prompt, calibrating it less so.
        rounding (`str`, *optional*, defaults to `"twn"`):
            Rule for on-the-fly quantization: `"twn"`, `"optimum"` (least squares), `"absmean"` (comparison only), or
            `"recover"`: no rounding; packs the layers whose weights are ternary already and keeps the others. Such
            layers are packed exactly under every rule.
        scale_layout (`str`, *optional*, defaults to `"auto"`):
            How scales are stored: `"group"` (one 16-bit scale per group), `"double"` (an 8-bit multiplier per group
            and a 16-bit scale per row), `"auto"`, the smaller of the two for each layer, or `"portable"`, one per
            group that float16 and bfloat16 both hold, so that exports to other programs round nothing.
        hadamard (`int`, *optional*, defaults to 0):
            Rotate the inputs of ternary layers by Hadamard matrices of this size (a power of two, e.g. 128) and make
            the codes for the rotated weight: no bits, one fast transform per layer. Helps heavy-tailed weights and
            hurts others when rounding; `calibrate` decides per layer. 0 = no rotation.
        rank (`int`, *optional*, defaults to 0):
            Store a correction of this rank beside the codes: 16 r (N + K) / (N K) bits per weight. 0 = none.
        kind (`str`, *optional*, defaults to `"ternary"`):
            What the layers become that the policy converts: `"ternary"` or `"int8"`. What `overrides` says comes
            first.
        format_version (`int`, *optional*):
            Version of the packed format that was read; what is saved says so itself (`FORMAT.md`).

    Raises:
        TypeError: for an argument of the wrong type or an unknown one.
        ValueError: for a value that is impossible, or a `format_version` that this package does not read.
    """

    # What the pipeline loader reads of a PipelineQuantizationConfig; this class replaces its mapping.
    quant_mapping = None
    quant_backend = None

    def __init__(
        self,
        *,
        group_size: int | None = 128,
        modules_to_not_convert: Sequence[str] | None = None,
        overrides: Mapping[str, str] | None = None,
        activation_dtype: str = "auto",
        compute_dtype: str | torch.dtype | None = None,
        components: Sequence[str] | Mapping[str, str] | None = None,
        rounding: str = "twn",
        scale_layout: str = "auto",
        hadamard: int = 0,
        rank: int = 0,
        kind: str = "ternary",
        format_version: int = FORMAT_VERSION,
        **unknown: Any,
    ) -> None:
        if "scales" in unknown:
            _warn_scales()
            scale_layout = unknown.pop("scales")
        if unknown:
            raise TypeError(_unknown_arguments(unknown))
        self.quant_method = TernaryMethod.DIFFUSERS_TERNARY
        self.group_size = _check_group_size(group_size)
        self.modules_to_not_convert = _check_names("modules_to_not_convert", modules_to_not_convert)
        self.overrides = _check_overrides(overrides)
        self.activation_dtype = _check_choice("activation_dtype", activation_dtype, ACTIVATION_DTYPES)
        self.compute_dtype = _check_compute_dtype(compute_dtype)
        self.components = _check_components(components)
        if components is not None:
            refuse_unknown_components(TernaryConfig)
        self.rounding = _check_choice("rounding", rounding, (*ROUNDINGS, RECOVER))
        self.scale_layout = _check_choice("scale_layout", scale_layout, REQUESTED_LAYOUTS)
        check_hadamard(hadamard)
        self.hadamard = hadamard
        check_rank(rank)
        self.rank = rank
        self.kind = _check_choice("kind", kind, KINDS)
        check_format_version(format_version, source="TernaryConfig")
        # Whatever was read, these are the fields that will be written. Headers of files say what those need.
        self.format_version = WRITTEN_VERSION

    @property
    def scales(self) -> str:
        """The old name of `scale_layout`."""
        _warn_scales()
        return self.scale_layout

    @property
    def components_to_quantize(self) -> list[str] | None:
        """`components` by the name that the pipeline loader checks against the pipeline's own components."""
        return None if self.components is None else list(self.components)

    @property
    def spec_options(self) -> dict[str, Any]:
        """What it asks for every ternary weight: arguments of [`TernarySpec.for_matrix`] and [`ternarize`]."""
        return {
            "group_size": self.group_size,
            "scales": self.scale_layout,
            "hadamard": self.hadamard,
            "rank": self.rank,
        }

    @property
    def torch_compute_dtype(self) -> torch.dtype | None:
        """`compute_dtype` as a `torch.dtype`."""
        return None if self.compute_dtype is None else COMPUTE_DTYPES[self.compute_dtype]

    @classmethod
    def from_dict(cls, config_dict: dict[str, Any], return_unused_kwargs: bool = False, **kwargs: Any) -> Any:
        """Reads what [`~TernaryConfig.to_dict`] wrote. `config_dict` is left as it is.

        Raises:
            TypeError: for fields this version does not know.
            ValueError: for another `quant_method`, a newer `format_version`, or impossible values.
        """
        fields = {**config_dict, **kwargs}
        method = fields.pop("quant_method", QUANT_METHOD)
        if method != QUANT_METHOD:
            raise ValueError(
                f"quant_method={method!r} is not {QUANT_METHOD!r}: this is the config of another backend."
            )
        # First: a newer format may have fields that this version calls unknown.
        check_format_version(fields.get("format_version", FORMAT_VERSION), source="config.json")
        if _STORED_LAYOUT in fields:
            fields["scale_layout"] = fields.pop(_STORED_LAYOUT)
        config = cls(**fields)
        return (config, {}) if return_unused_kwargs else config

    def to_dict(self) -> dict[str, Any]:
        """A JSON-safe dictionary of all fields.

        `overrides` becomes a list of pairs: their order decides, and hosts sort the keys of what they write.
        """
        fields = {**copy.deepcopy(self.__dict__), "quant_method": QUANT_METHOD}
        fields[_STORED_LAYOUT] = fields.pop("scale_layout")
        if self.overrides is not None:
            fields["overrides"] = [list(pair) for pair in self.overrides.items()]
        return fields

    # diffusers' JSON view goes through this name, which only transformers' mixin defines.
    to_diff_dict = to_dict

    def __eq__(self, other: object) -> bool:
        return isinstance(other, TernaryConfig) and self.to_dict() == other.to_dict()

    __hash__ = None  # type: ignore[assignment]

    def __repr__(self) -> str:
        fields = ", ".join(f"{name}={value!r}" for name, value in self.__dict__.items() if name != "quant_method")
        return f"{type(self).__name__}({fields})"

    def selects(self, component: str) -> bool:
        """Whether the pipeline component of this name is to be quantized."""
        if self.components is not None:
            return component in self.components
        return DENOISER_COMPONENTS.fullmatch(component) is not None

    def for_component(self, component: str) -> "TernaryConfig | None":
        """The config of one pipeline component: `None` if it is not to be quantized."""
        if not self.selects(component):
            return None
        if not isinstance(self.components, dict):
            return self
        return type(self)(**{**self._fields(), "components": None, "kind": self.components[component]})

    def _fields(self) -> dict[str, Any]:
        return {name: value for name, value in copy.deepcopy(self.__dict__).items() if name != "quant_method"}

    def _resolve_quant_config(self, is_diffusers: bool = True, module_name: str | None = None) -> Any:
        """Called by the pipeline loader for each component; see `PipelineQuantizationConfig`."""
        return None if module_name is None else self.for_component(module_name)


def given_or_default(name: str, config: ConfigT | None, cls: type[ConfigT]) -> ConfigT:
    """The config that a verb was given as its argument `name`, or the default one.

    Raises:
        TypeError: if it is not of the class.
    """
    if config is None:
        return cls()
    if not isinstance(config, cls):
        raise TypeError(f"{name}={config!r} is not a {cls.__name__}. Give {name}={cls.__name__}(...).")
    return config


def _warn_scales() -> None:
    message = "TernaryConfig's scales is scale_layout now; the old name goes with the next minor version."
    warnings.warn(message, FutureWarning, stacklevel=3)


def _unknown_arguments(unknown: Mapping[str, Any]) -> str:
    known = [name for name in inspect.signature(TernaryConfig.__init__).parameters if name != "self"]
    known.remove("unknown")
    hints = [hit for name in unknown for hit in difflib.get_close_matches(name, known, n=1)]
    hint = f" Did you mean {', '.join(hints)}?" if hints else ""
    return (
        f"TernaryConfig does not know {', '.join(sorted(unknown))}.{hint} It takes {', '.join(known)}; if the config "
        "was written by a newer diffusers-ternary, upgrade: pip install -U diffusers-ternary"
    )


def _check_group_size(value: object) -> int | None:
    if value is None:
        return None
    if not isinstance(value, int) or isinstance(value, bool):
        raise TypeError(f"group_size={value!r} must be a positive integer, or None for one scale per row.")
    if value < 1:
        raise ValueError(f"group_size={value} must be a positive integer, or None for one scale per row.")
    return value


def _check_names(field: str, value: Any) -> list[str] | None:
    if value is None:
        return None
    if isinstance(value, str) or not isinstance(value, Sequence) or not all(isinstance(v, str) for v in value):
        raise TypeError(f"{field}={value!r} must be a list of names, e.g. ['proj_out'].")
    return list(value)


def _check_components(value: Any) -> list[str] | dict[str, str] | None:
    if not isinstance(value, Mapping):
        return _check_names("components", value)
    for component, kind in value.items():
        _check_choice(f"components[{component!r}]", kind, KINDS)
    return dict(value)


def _check_overrides(value: Any) -> dict[str, str] | None:
    if value is None:
        return None
    if isinstance(value, list) and all(isinstance(pair, list) and len(pair) == 2 for pair in value):
        value = dict(value)  # as `to_dict` writes it
    if not isinstance(value, Mapping):
        raise TypeError(f"overrides={value!r} must map patterns to kinds, e.g. {{'*.norm1.linear': 'int8'}}.")
    for pattern, kind in value.items():
        if not isinstance(pattern, str):
            raise TypeError(f"overrides: the pattern {pattern!r} must be a string.")
        _check_choice(f"overrides[{pattern!r}]", kind, OVERRIDE_KINDS)
    return dict(value)


def _check_choice(field: str, value: Any, choices: tuple[str, ...]) -> str:
    if not isinstance(value, str) or value not in choices:
        raise ValueError(f"{field}={value!r} is not one of {', '.join(choices)}.")
    return value


def _check_compute_dtype(value: Any) -> str | None:
    if value is None:
        return None
    name = str(value).removeprefix("torch.")
    if name not in COMPUTE_DTYPES:
        raise ValueError(f"compute_dtype={value!r} is not one of {', '.join(COMPUTE_DTYPES)}.")
    return name
