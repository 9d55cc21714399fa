# SPDX-License-Identifier: Apache-2.0
"""Layers whose weight the model itself reads, found in the source of its classes.

Some models cast activations to the dtype of a weight (`x.to(self.time_embedder.linear_1.weight.dtype)`, or that of
`next(self.time_embedder.parameters())`), or multiply by a weight without calling its layer. A packed weight is an
integer of another shape, so such layers stay in float, whatever a policy or an override says. There are some hundred
of these lines in diffusers and transformers, and more in every release: they are read, not listed.
"""

import ast
import dataclasses
import functools
import inspect
import re
import sys
from collections.abc import Iterator
from typing import Any

from torch import nn


# Methods that run before there are packed weights, or that this package replaces or refuses.
_NOT_IN_FORWARD = (
    "__init__",
    "_init",
    "init",
    "reset",
    "zero",
    "freeze",
    "unfreeze",
    "tie",
    "_tie",
    "from_",
    "load_",
    "_load",
    "convert_",
    "_convert",
    "fuse_",
    "unfuse_",
    "resize_",
    "_resize",
    "set_",
    "enable_",
    "disable_",
    "remove_",
    "prune_",
    "add_",
)
# What may be asked of any weight.
_HARMLESS = ("device", "requires_grad", "is_meta", "grad", "requires_grad_")
# Pipelines read the dtype of these layers of a model, or of its first parameter, whichever layer that is in.
_READ_BY_PIPELINES = {"AutoencoderKL": ("post_quant_conv",)}
_FIRST_READ_BY_PIPELINES = re.compile(r".*Vision.*|.*Autoencoder.*|.*V[aA][eE].*|StableCascadeUNet|UNet1DModel")
_SKIPPED_LIBRARIES = ("torch", "diffusers_ternary", "peft", "accelerate")


@dataclasses.dataclass(frozen=True)
class WeightRead:
    """A line that reads a weight.

    Args:
        path (`tuple[str, ...]`): attributes from the module to the layer; `"*"` for an element of a list.
        first (`bool`): whether it reads the first parameter below that path, wherever it is.
        place (`str`): class and method, for people.
    """

    path: tuple[str, ...]
    first: bool
    place: str


def layers_read_by_model(model: nn.Module) -> dict[str, str]:
    """Name of every module whose weight the model reads itself → where it does."""
    kind = type(model).__name__
    found = dict.fromkeys(_READ_BY_PIPELINES.get(kind, ()), "pipelines")
    if _FIRST_READ_BY_PIPELINES.fullmatch(kind):
        found |= dict.fromkeys(_resolve(model, WeightRead((), True, "")), "pipelines")
    for name, module in model.named_modules():
        readers = [(cls, "self") for cls in type(module).__mro__]
        processor = getattr(module, "processor", None)
        if processor is not None:
            readers += [(cls, "attn") for cls in type(processor).__mro__]
        for cls, root in readers:
            for read in _reads(cls, root):
                for layer in _resolve(module, read):
                    found.setdefault(f"{name}.{layer}".strip("."), read.place)
    return found


def _resolve(module: nn.Module, read: WeightRead) -> Iterator[str]:
    """Names, from `module`, of the modules that own what is read."""
    targets: list[tuple[str, Any]] = [("", module)]
    for step in read.path:
        children: list[tuple[str, Any]] = []
        for name, target in targets:
            if not isinstance(target, nn.Module):
                continue
            named: list[tuple[str, Any]] = [(step, getattr(target, step, None))]
            if step == "*":
                named = list(target.named_children())
            children += [(f"{name}.{child}".strip("."), part) for child, part in named]
        targets = children
    for name, target in targets:
        if isinstance(target, nn.Module):
            first = next((own for own, _ in target.named_parameters()), "") if read.first else "weight"
            yield f"{name}.{first.rpartition('.')[0]}".strip(".")


@functools.cache
def _reads(cls: type, root: str) -> tuple[WeightRead, ...]:
    """The reads in the methods of one class (not of its bases)."""
    if cls.__module__.partition(".")[0] in (*_SKIPPED_LIBRARIES, "builtins"):
        return ()
    node = _classes(cls.__module__).get(cls.__qualname__)
    if node is None:
        return ()
    reads: list[WeightRead] = []
    for method in node.body:
        if isinstance(method, ast.FunctionDef) and not method.name.startswith(_NOT_IN_FORWARD):
            reads += _method_reads(method, root, f"{cls.__name__}.{method.name}")
    return tuple(dict.fromkeys(reads))


@functools.cache
def _classes(module_name: str) -> dict[str, ast.ClassDef]:
    """The classes of a Python module that mention weights, by name; none if there is no source to read."""
    try:
        source = inspect.getsource(sys.modules[module_name])
    except (KeyError, OSError, TypeError):
        return {}
    # One class at a time: to parse whole files of some thousand lines would take longer than to quantize a model.
    blocks = re.split(r"^(?=class )", source, flags=re.MULTILINE)[1:]
    mentions = [block for block in blocks if ".weight" in block or ".parameters()" in block]
    bodies = (re.split(r"^(?=[@\w#])", block.removeprefix("class"), flags=re.MULTILINE)[0] for block in mentions)
    try:
        trees = [ast.parse(f"class{body}") for body in bodies]
    except SyntaxError:  # a text within a class begins at the margin
        trees = [ast.parse(source)]
    return {node.name: node for tree in trees for node in tree.body if isinstance(node, ast.ClassDef)}


def _method_reads(method: ast.FunctionDef, root: str, place: str) -> Iterator[WeightRead]:
    nodes = list(ast.walk(method))
    aliases: dict[str, tuple[str, ...]] = {root: ()}
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            path = _path(node.value, aliases)
            if path:
                aliases.setdefault(node.targets[0].id, path)
        elif isinstance(node, ast.For) and isinstance(node.target, ast.Name):
            path = _path(node.iter, aliases)
            if path:
                aliases.setdefault(node.target.id, (*path, "*"))
    harmless = {id(node.value) for node in nodes if isinstance(node, ast.Attribute) and node.attr in _HARMLESS}
    harmless |= _aware_of_integers(nodes)
    for node in nodes:
        if id(node) in harmless:
            continue
        if isinstance(node, ast.Attribute) and node.attr == "weight" and isinstance(node.ctx, ast.Load):
            path = _path(node.value, aliases)
            if path:
                yield WeightRead(path, False, place)
        elif _is_first_parameter(node):
            path = _path(_innermost_call(node).func.value, aliases)  # type: ignore[attr-defined]
            if path:
                yield WeightRead(path, True, place)


def _aware_of_integers(nodes: list[ast.AST]) -> set[int]:
    """Ids of nodes below `if ... != torch.int8: ...`, which leaves activations alone where weights are int8.

    And of nodes whose value goes to a variable that is read below such conditions only.
    """

    def is_aware(node: ast.AST) -> bool:
        return isinstance(node, ast.If) and any(
            isinstance(part, ast.Attribute) and part.attr == "int8" for part in ast.walk(node.test)
        )

    aware = {id(part) for node in nodes if is_aware(node) for part in ast.walk(node)}
    if not aware:
        return aware
    for node in nodes:
        if isinstance(node, ast.Assign) and isinstance(node.targets[0], ast.Name):
            variable = node.targets[0].id
            loads = [n for n in nodes if isinstance(n, ast.Name) and n.id == variable and isinstance(n.ctx, ast.Load)]
            if loads and all(id(load) in aware for load in loads):
                aware |= {id(part) for part in ast.walk(node)}
    return aware


def _is_first_parameter(node: ast.AST) -> bool:
    """Whether this is `next(x.parameters())` or `next(iter(x.parameters()))`."""
    if not (isinstance(node, ast.Call) and isinstance(node.func, ast.Name) and node.func.id == "next" and node.args):
        return False
    function = _innermost_call(node).func
    return isinstance(function, ast.Attribute) and function.attr == "parameters"


def _innermost_call(node: Any) -> ast.Call:
    while node.args and isinstance(node.args[0], ast.Call):
        node = node.args[0]
    call: ast.Call = node
    return call


def _path(node: ast.AST, aliases: dict[str, tuple[str, ...]]) -> tuple[str, ...] | None:
    """Attributes from the module to what an expression names; `None` for anything else."""
    steps: list[str] = []
    while not isinstance(node, ast.Name):
        if isinstance(node, ast.Attribute):
            steps.append(node.attr)
        elif isinstance(node, ast.Subscript):
            index = node.slice
            positive = isinstance(index, ast.Constant) and isinstance(index.value, int) and index.value >= 0
            steps.append(str(index.value) if positive and isinstance(index, ast.Constant) else "*")
        else:
            return None
        node = node.value
    if node.id not in aliases:
        return None
    return (*aliases[node.id], *reversed(steps))
