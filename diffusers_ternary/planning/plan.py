# SPDX-License-Identifier: Apache-2.0
"""`plan`: for every component of a pipeline what it becomes, what it takes then, and how to get there."""

import dataclasses
import itertools
import os
import shlex
from collections.abc import Mapping
from typing import Any

from ..backend.config import TernaryConfig
from ..files import parse_size
from .estimates import LIBRARIES, ModelEstimate
from .parts import Part, pipeline_models
from .picture import Picture


_DENOISERS = ("float", "int8", "ternary")  # by quality
_SMALL_ENCODER = 500_000_000  # bytes: below, int8 saves nothing that matters
_MODES = ("full", "blockwise", "lora", "scales")  # of distillation, by quality
_GIGABYTE = 10**9
_QUALITY = {
    "float": ("unchanged", "the weights of the source"),
    "int8": ("close", "int8 with a scale per row; see components in TernaryConfig. Not measured at this size"),
    "ternary": (
        "spoiled when only rounded; close when calibrated; closest when distilled",
        "measured on the embedded models: quality.csv and distill.csv in integration_tests/benchmarks/results. Not "
        "measured at this size",
    ),
}


@dataclasses.dataclass(frozen=True)
class ComponentPlan:
    """What becomes of a model of a pipeline; all sizes are predictions, in bytes.

    Args:
        name (`str`): of the component.
        model (`str`): its class.
        kind (`str`): `"float"` (kept), `"int8"` or `"ternary"`.
        source (`int`): its files now.
        file (`int`): its files then.
        memory (`int`): its weights in memory.
        working (`int`): activations while it works on one picture.
        quantizing (`int`): peak while it is quantized on the fly.
        calibrating (`int`, *optional*): peak of calibration; `None` for what does not denoise.
        distilling (`dict[str, int]`): peak of distillation by mode, one row at a time; empty likewise.
        quality (`str`): in a word or two.
        origin (`str`): where that is known from.
    """

    name: str
    model: str
    kind: str
    source: int
    file: int
    memory: int
    working: int
    quantizing: int
    calibrating: int | None
    distilling: dict[str, int]
    quality: str
    origin: str


@dataclasses.dataclass(frozen=True)
class PipelinePlan:
    """What becomes of a pipeline. Made by [`plan`].

    Args:
        source (`str`): folder or Hub id.
        components (`tuple[ComponentPlan, ...]`): its models.
        offload (`bool`): whether only the component that runs is on the device (`enable_model_cpu_offload`).
        vram (`int`, *optional*): bytes that it is to fit into.
        statistics (`int`): bytes that calibration is told to gather at a time.
    """

    source: str
    components: tuple[ComponentPlan, ...]
    offload: bool
    vram: int | None
    statistics: int

    @property
    def file(self) -> int:
        """Bytes of all files."""
        return sum(part.file for part in self.components)

    @property
    def drawing(self) -> int:
        """Peak on the device while one picture is drawn."""
        if self.offload:
            return LIBRARIES + max(part.memory + part.working for part in self.components)
        return LIBRARIES + sum(part.memory for part in self.components) + max(p.working for p in self.components)

    @property
    def denoisers(self) -> tuple[ComponentPlan, ...]:
        """The components that are called at every step."""
        return tuple(part for part in self.components if part.calibrating is not None)

    @property
    def config(self) -> TernaryConfig | None:
        """For `from_pretrained`, `quantize` and `calibrate`; `None` if nothing is to be converted."""
        kinds = self._kinds
        if kinds == {part.name: "ternary" for part in self.denoisers}:
            return TernaryConfig()
        return TernaryConfig(components=kinds) if kinds else None

    @property
    def code(self) -> str:
        """Lines of Python that draw with it."""
        config = self.config
        lines = ["import torch, diffusers_ternary", "from diffusers import DiffusionPipeline", ""]
        place = repr(self.source)
        if self.source == "demo":  # what the commands call the embedded model
            place = "demo_folder()"
            lines.insert(2, "from diffusers_ternary.demo import demo_folder")
        arguments = [place, "dtype=torch.bfloat16"]
        if config is not None:
            named = "" if config.components is None else f"components={config.components!r}"
            lines.insert(2, "from diffusers_ternary import TernaryConfig")
            arguments.insert(1, f"quantization_config=TernaryConfig({named})")
        lines.append(f"pipe = DiffusionPipeline.from_pretrained({', '.join(arguments)})")
        lines.append("pipe.enable_model_cpu_offload()" if self.offload else 'pipe.to("cuda")')
        return "\n".join(lines)

    @property
    def commands(self) -> tuple[str, ...]:
        """Commands that quantize, or better calibrate, or better still distill; empty if nothing is to be done."""
        config = self.config
        if config is None:
            return ()
        name = os.path.basename(os.path.normpath(self.source)).lower()
        chosen = (
            [] if config.components is None else [f"--component {part}={kind}" for part, kind in self._kinds.items()]
        )
        commands = [_command("quantize", self.source, f"{name}-rounded", *chosen)]
        ternary = [part for part in self.denoisers if part.kind == "ternary"]
        if not ternary:
            return tuple(commands)
        prompts = "--prompts template:128"
        limit = f"--memory-limit {max(1, -(-self.statistics // _GIGABYTE))}GB"
        commands.append(_command("calibrate", self.source, f"{name}-calibrated", prompts, limit, "--offload", *chosen))
        fitting = [mode for mode in _MODES if self.vram is None or ternary[0].distilling[mode] <= self.vram]
        mode = "full" if self.vram is None else next(iter(fitting), "scales")
        options = [f"--mode {mode}", "--batch-size 1", "--gradient-accumulation-steps 32", "--offload"]
        for part in ternary:
            which = [] if len(self.denoisers) == 1 else [f"--component {part.name}"]
            place = f"{name}-distilled" if len(ternary) == 1 else f"{name}-{part.name}-distilled"
            commands.append(_command("distill", self.source, place, "--prompts template:4000", *options, *which))
        return tuple(commands)

    @property
    def _kinds(self) -> dict[str, str]:
        return {part.name: part.kind for part in self.components if part.kind != "float"}

    def to_dict(self) -> dict[str, Any]:
        """JSON-safe."""
        config = self.config
        return {
            "source": self.source,
            "vram": self.vram,
            "offload": self.offload,
            "file": self.file,
            "drawing": self.drawing,
            "components": [dataclasses.asdict(part) for part in self.components],
            "config": None if config is None else config.to_dict(),
            "code": self.code,
            "commands": list(self.commands),
        }


def plan(
    source: str | os.PathLike[str], *, vram: int | str | None = None, pixels: int = 1024, frames: int = 1
) -> PipelinePlan:
    """What a pipeline can become, and what that takes: from headers and configs, nothing is loaded.

    Args:
        source (`str` or `PathLike`): folder or Hub id of a float pipeline.
        vram (`int` or `str`, *optional*): bytes that drawing is to fit into, or `"6GB"`; the best quality that fits is
            proposed, without offloading where possible. `None` = ternary denoisers and large text encoders in int8.
        pixels (`int`, *optional*, defaults to 1024): of a side.
        frames (`int`, *optional*, defaults to 1): of a clip.

    Raises:
        ValueError: if there is no such pipeline, it is quantized already, it has no denoiser, or nothing fits; says
            the smallest that would.
    """
    where = os.fspath(source)
    limit = None if vram is None else parse_size(vram, name="vram")
    picture = Picture(pixels, frames)
    return plan_parts(pipeline_models(where), source=where, vram=limit, picture=picture)


def plan_parts(
    parts: Mapping[str, Part], *, source: str, vram: int | None = None, picture: Picture | None = None
) -> PipelinePlan:
    """The plan for models that are known already; see [`plan`].

    Args:
        parts (`Mapping[str, Part]`): by component.
        source (`str`): for commands and messages.
        vram (`int`, *optional*): bytes.
        picture ([`Picture`], *optional*): what is drawn; default: one of 1024 x 1024 pixels.
    """
    if not any(part.denoises for part in parts.values()):
        raise ValueError(
            f"{source} has no component that denoises (transformer, unet, prior), only {', '.join(parts) or 'none'}. "
            "Quantize single models with quantize --component."
        )
    drawn = picture or Picture(1024)
    choices = _Choices(parts, drawn)
    if vram is None:
        return choices.pipeline(source, "ternary", encoders="int8", offload=False, vram=None)
    smallest: PipelinePlan | None = None
    # By quality of the denoiser; then without offloading, which takes time; then text encoders as they are.
    for kind, offload, encoders in itertools.product(_DENOISERS, (False, True), ("float", "int8")):
        proposal = choices.pipeline(source, kind, encoders=encoders, offload=offload, vram=vram)
        if proposal.drawing <= vram:
            return proposal
        if smallest is None or proposal.drawing < smallest.drawing:
            smallest = proposal
    assert smallest is not None
    needed = max(smallest.components, key=lambda part: part.memory + part.working)
    raise ValueError(
        f"{source} does not fit into {vram / 1e9:.2f} GB at {drawn.pixels} x {drawn.pixels} pixels: the smallest "
        f"takes {smallest.drawing / 1e9:.2f} GB (ternary denoiser, int8 text encoders, offloaded), of which "
        f"{needed.name} takes {needed.memory / 1e9:.2f} GB and {needed.working / 1e9:.2f} GB while it works. Draw "
        "fewer pixels, or give that much."
    )


class _Choices:
    """Plans of the components, each made once."""

    def __init__(self, parts: Mapping[str, Part], picture: Picture) -> None:
        self._parts = parts
        self._picture = picture
        self._made: dict[tuple[str, str], ComponentPlan] = {}
        self._statistics: dict[str, int] = {}

    def pipeline(self, source: str, kind: str, *, encoders: str, offload: bool, vram: int | None) -> PipelinePlan:
        """The pipeline with denoisers of a kind and text encoders of another."""
        kinds = {name: kind if part.denoises else encoders for name, part in self._parts.items()}
        for name, part in self._parts.items():
            if not part.denoises and (not part.encodes_text or part.bytes < _SMALL_ENCODER):
                kinds[name] = "float"
        components = tuple(self._component(self._parts[name], each) for name, each in kinds.items())
        statistics = max(self._statistics.values(), default=0)
        return PipelinePlan(source, components, offload, vram, statistics)

    def _component(self, part: Part, kind: str) -> ComponentPlan:
        key = part.name, kind
        if key not in self._made:
            self._made[key] = self._plan(part, kind)
        return self._made[key]

    def _plan(self, part: Part, kind: str) -> ComponentPlan:
        estimate = ModelEstimate(part, None if kind == "float" else TernaryConfig(kind=kind))
        calibrating, distilling, working = None, {}, 0
        if part.denoises:
            tokens = self._picture.tokens(part, self._parts.values())
            ternary = ModelEstimate(part, TernaryConfig())
            working, calibrating = estimate.activations(tokens), ternary.calibrating(tokens)
            distilling = ternary.distilling(tokens)
            self._statistics[part.name] = ternary.statistics
        elif part.decodes:
            working = self._picture.decoding(part, estimate.dtype.itemsize)
        quality, origin = _QUALITY[kind]
        return ComponentPlan(
            name=part.name,
            model=type(part.model).__name__,
            kind=kind,
            source=part.bytes,
            file=estimate.file,
            memory=estimate.memory,
            working=working,
            quantizing=estimate.quantizing,
            calibrating=calibrating,
            distilling=distilling,
            quality=quality,
            origin=origin,
        )


def _command(name: str, source: str, destination: str, *options: str) -> str:
    return " ".join(["diffusers-ternary", name, shlex.quote(source), shlex.quote(destination), *options])
