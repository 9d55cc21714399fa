# SPDX-License-Identifier: Apache-2.0
"""How long the ways through the package are: its Python calls, and the files they pass, for one layer on the CPU.

    python integration_tests/benchmarks/call_path.py

Packing runs from "the float weight of this layer is here" to "the packed layer is installed" (`backend.pack`), for an
ordinary weight, one that is ternary already, and int8. The forward is the second of a packed layer, at one token.
Early returns are the `return` statements before the last line of a function, over all functions that were called.
Counts are the same on every machine with the compiled library; it takes seconds.
"""

import argparse
import ast
import inspect
import sys
import textwrap
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType

import torch
from torch import nn

import diffusers_ternary
from diffusers_ternary import TernaryConfig
from diffusers_ternary.backend.pack import PackingRecord, pack_layer
from diffusers_ternary.backend.placeholders import placeholder_for
from diffusers_ternary.backend.plan import layer_spec


PACKAGE = Path(diffusers_ternary.__file__).parent
SIZE = 256


def calls_of(function: Callable[[], object]) -> list[CodeType]:
    """The functions of the package that a call passes, in order; comprehensions and generators are not counted."""
    found: list[CodeType] = []

    def profile(frame: FrameType, event: str, argument: object) -> None:
        code = frame.f_code
        if event == "call" and Path(code.co_filename).is_relative_to(PACKAGE) and not code.co_name.startswith("<"):
            found.append(code)

    sys.setprofile(profile)
    try:
        function()
    finally:
        sys.setprofile(None)
    return found


def early_returns(code: CodeType) -> int:
    """`return` statements of a function before its last line."""
    (function,) = ast.parse(textwrap.dedent(inspect.getsource(code))).body
    inner = {
        node
        for child in ast.walk(function)
        if child is not function and is_function(child)
        for node in ast.walk(child)
    }
    returns = [node for node in ast.walk(function) if isinstance(node, ast.Return) and node not in inner]
    return sum(node is not function.body[-1] for node in returns)


def is_function(node: ast.AST) -> bool:
    """Whether a node of a syntax tree is a function or class of its own."""
    return isinstance(node, ast.FunctionDef | ast.Lambda | ast.ClassDef)


def packing(weight: torch.Tensor, kind: str = "ternary") -> Callable[[], object]:
    """Packs a weight into its placeholder."""
    module = nn.Linear(SIZE, SIZE)
    config = TernaryConfig()
    layer = placeholder_for(module, layer_spec(kind, module, config), config)
    return lambda: pack_layer(layer, weight, name="layer", config=config, record=PackingRecord())


def forward() -> Callable[[], object]:
    """One product of a packed layer at one token; the first call has prepared it."""
    module = nn.Linear(SIZE, SIZE)
    config = TernaryConfig()
    layer = placeholder_for(module, layer_spec("ternary", module, config), config)
    pack_layer(layer, module.weight, name="layer", config=config, record=PackingRecord())
    x = torch.randn(1, SIZE)
    layer(x)
    return lambda: layer(x)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--list", action="store_true", help="print every call")
    options = parser.parse_args()
    torch.manual_seed(0)
    torch.set_grad_enabled(False)
    random = torch.randn(SIZE, SIZE)
    ways = {
        "pack an ordinary weight": packing(random),
        "pack a ternary weight": packing(0.5 * random.sign() * (random.abs() > 0.5)),
        "pack to int8": packing(random, "int8"),
        "forward at one token": forward(),
    }
    print("| way | calls | files | early returns |\n|---|---|---|---|")
    for name, function in ways.items():
        calls = calls_of(function)
        files = {code.co_filename for code in calls}
        returns = sum(early_returns(code) for code in dict.fromkeys(calls))
        print(f"| {name} | {len(calls)} | {len(files)} | {returns} |")
        if options.list:
            for code in calls:
                print(f"    {Path(code.co_filename).relative_to(PACKAGE)}: {code.co_name}")


if __name__ == "__main__":
    main()
