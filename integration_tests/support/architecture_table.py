# SPDX-License-Identifier: Apache-2.0
"""Runs every denoiser class of diffusers quantized, and writes diffusers_ternary/ARCHITECTURES.md from what happened.

    python -m integration_tests.support.architecture_table

`journeys/test_architectures.py` runs the same checks, class by class, and compares with the lines of the file.
"""

import collections
import dataclasses
import tempfile
from pathlib import Path

import diffusers
import torch
from diffusers import ModelMixin

import diffusers_ternary
from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend import bits_per_weight, packed_layers, plan_conversion
from diffusers_ternary.backend.plan import layer_spec

from . import architectures


FILE = Path(diffusers_ternary.__file__).parent / "ARCHITECTURES.md"
# Why a class that is exported is not run here.
NOT_RUN = {
    "CosmosControlNetModel": "needs torchvision",
    "CosmosTransformer3DModel": "needs torchvision",
    "FluxMultiControlNetModel": "a list of ControlNets: quantize each",
    "HunyuanDiT2DMultiControlNetModel": "a list of ControlNets: quantize each",
    "MultiControlNetModel": "a list of ControlNets: quantize each",
    "QwenImageMultiControlNetModel": "a list of ControlNets: quantize each",
    "SD3MultiControlNetModel": "a list of ControlNets: quantize each",
    "ControlNetXSAdapter": "part of UNetControlNetXSModel",
    "MotionAdapter": "part of UNetMotionModel",
}
NO_INPUTS = "no tiny model and inputs of it in these tests"
HEAD = """\
# Architectures

Written by `integration_tests/support/architecture_table.py` from a run, and checked against a run by
`integration_tests/journeys/test_architectures.py`. With diffusers {version}, every transformer, UNet and ControlNet
that it exports:

- *weights*: parameters of the class with its default arguments, which are those of a released model for most classes.
- *ternary*: share of them that `TernaryConfig()` converts, and stored bits per converted weight.
- *kept*: the largest parts that stay as they are, in percent of all parameters. "Not a linear or 2-d convolution
  layer" are norms, tables, 1-d and 3-d convolutions, and experts that a model holds as one stacked tensor.
- *run*: a tiny model was quantized while it loaded, run, saved, loaded again and run again, with equal outputs that
  are finite and not those of the float model; or why not.

| class | weights | ternary | kept | run |
|---|---|---|---|---|
"""
SHORT = {
    "outside the repeated blocks (embedders, final norm and projection)": "outside the blocks",
    "kept in float32 by the model class": "float32 by the class",
}


@dataclasses.dataclass(frozen=True)
class Sizes:
    """What `TernaryConfig()` makes of a class with its default arguments.

    Args:
        total (`int`): parameters.
        converted (`int`): of them, in layers that become ternary.
        bits (`float`): stored per converted weight.
        kept (`dict[str, int]`): reason → parameters.
    """

    total: int
    converted: int
    bits: float
    kept: dict[str, int]


def sizes(model: ModelMixin) -> Sizes:
    """Plans a model (on the meta device, too); a class without anything to convert has `converted=0`."""
    config = TernaryConfig()
    total = sum(parameter.numel() for parameter in model.parameters())
    try:
        plan = plan_conversion(model, config)
    except ValueError:
        return Sizes(total, 0, 0.0, {})
    specs = {name: layer_spec(kind, model.get_submodule(name), config) for name, kind in plan.kinds.items()}
    kept: collections.Counter[str] = collections.Counter()
    for name, reason in plan.kept.items():
        kept[SHORT.get(reason, reason)] += model.get_submodule(name).weight.numel()
    converted = sum(spec.weights for spec in specs.values())
    kept["not a linear or 2-d convolution layer"] = total - converted - kept.total()
    return Sizes(total, converted, bits_per_weight(specs), dict(kept))


def default_sizes(cls: type[ModelMixin]) -> Sizes | None:
    """Of the class with its default arguments; `None` if it cannot be built with them."""
    try:
        with torch.device("meta"):
            return sizes(cls())
    except (TypeError, ValueError, NotImplementedError):
        return None


def check(name: str, folder: Path) -> None:
    """Quantizes, runs, saves and reloads a tiny model of the class.

    Raises:
        AssertionError: if an output is not what it must be.
    """
    model = architectures.build(name)
    expected = architectures.run(name, model)
    model.save_pretrained(folder / "float")
    quantized = type(model).from_pretrained(folder / "float", quantization_config=TernaryConfig())
    assert packed_layers(quantized)
    output = architectures.run(name, quantized)
    assert torch.isfinite(output).all()
    assert not torch.equal(output, expected), "nothing was rounded"
    quantized.save_pretrained(folder / "packed")
    again = type(model).from_pretrained(folder / "packed")
    assert packed_layers(again).keys() == packed_layers(quantized).keys()
    assert torch.equal(architectures.run(name, again), output)


def row(name: str, size: Sizes | None, run: str) -> str:
    """Line of the table."""
    if size is None:
        return f"| {name} | – | – | no default arguments | {run} |"
    if not size.converted:
        return f"| {name} | {_count(size.total)} | – | nothing to convert | {run} |"
    parts = sorted(size.kept.items(), key=lambda part: -part[1])
    kept = "; ".join(
        f"{100 * count / size.total:.1f} % {reason}" for reason, count in parts if count / size.total > 1e-3
    )
    share = f"{100 * size.converted / size.total:.1f} %, {size.bits:.2f} bits"
    return f"| {name} | {_count(size.total)} | {share} | {kept or 'under 0.1 %'} | {run} |"


def _count(parameters: int) -> str:
    return f"{parameters / 1e9:.2f} B" if parameters >= 5e8 else f"{parameters / 1e6:.1f} M"


def expected_run(name: str) -> str:
    """Last column of the table for a class, if its check passes."""
    if name in NOT_RUN:
        return NOT_RUN[name]
    return "yes" if name in architectures.descriptions() else NO_INPUTS


def main() -> None:
    lines = []
    for cls in architectures.exported_classes():
        run = expected_run(cls.__name__)
        if run == "yes":
            with tempfile.TemporaryDirectory() as folder:
                check(cls.__name__, Path(folder))
        lines.append(row(cls.__name__, default_sizes(cls), run))
        print(lines[-1], flush=True)
    FILE.write_text(HEAD.format(version=diffusers.__version__) + "\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
