# SPDX-License-Identifier: Apache-2.0
"""Options for the fields of a config class: names, types, defaults and help are those of the class.

They are read from its source, because importing it takes seconds (it needs torch and diffusers) and `--help` must not.
"""

import ast
import dataclasses
import functools
import inspect
import pathlib
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Annotated, Any, TypeVar

import typer

from .console import errors, escape


PACKAGE = pathlib.Path(__file__).parents[1]
CommandT = TypeVar("CommandT", bound=Callable[..., None])


@dataclasses.dataclass(frozen=True)
class Field:
    """A field of a config class: its annotation and default as they are written, and its passage of the docstring."""

    name: str
    annotation: str
    default: str
    doc: str


@functools.cache
def read_fields(file: str, cls: str) -> tuple[Field, ...]:
    """The fields of a class of this package: of its keyword-only constructor, or else of the dataclass."""
    tree = ast.parse((PACKAGE / file).read_text(encoding="utf-8"))
    node = next(each for each in tree.body if isinstance(each, ast.ClassDef) and each.name == cls)
    docs = _argument_docs(ast.get_docstring(node) or "")
    found: list[tuple[str, ast.expr, ast.expr | None]] = [
        (each.target.id, each.annotation, each.value)
        for each in node.body
        if isinstance(each, ast.AnnAssign) and isinstance(each.target, ast.Name)
    ]
    for each in node.body:
        if isinstance(each, ast.FunctionDef) and each.name == "__init__":
            pairs = zip(each.args.kwonlyargs, each.args.kw_defaults, strict=True)
            found = [(arg.arg, arg.annotation, default) for arg, default in pairs if arg.annotation is not None]
    return tuple(
        Field(name, ast.unparse(annotation), "None" if default is None else ast.unparse(default), docs[name])
        for name, annotation, default in found
    )


def _argument_docs(docstring: str) -> dict[str, str]:
    """What the section "Args:" says about each name."""
    section = docstring.partition("Args:\n")[2].partition("\nRaises:")[0]
    docs = {}
    for entry in re.split(r"\n(?=    \S)", "\n" + section.rstrip())[1:]:
        names, _, text = re.fullmatch(r"    ([\w, ]+) (\(.*?\)):(\s.*)", entry, re.DOTALL).groups()  # type: ignore[union-attr]
        docs.update(dict.fromkeys(names.split(", "), " ".join(text.split())))
    return docs


def _sentences(field: Field) -> str:
    return field.doc[:1].upper() + field.doc[1:]


def _help(field: Field, flags: Mapping[str, str]) -> str:
    """The docstring's passage without marks of code; what `None` does is the default, or has a word of its own."""
    text = _sentences(field)
    text = re.sub(r"\[`~?([^`]+)`\]", r"\1", text)
    text = re.sub(r"`(\w+)`", lambda found: flags.get(found[1], found[0]), text)
    text = text.replace("; `None` =", "; default:") if field.default == "None" else text
    text = text.replace("`None` =", "Default:" if field.default == "None" else "none =")
    return escape(re.sub(r'`|(?<!\w)"(?=[\w.*])|(?<=\w)"(?!\w)', "", text))


def _numbers(kind: type) -> Callable[[str], Any]:
    return lambda text: tuple(kind(part) for part in text.split(","))


def parse_pairs(flag: str, values: Sequence[str], example: str) -> dict[str, str]:
    """`PATTERN=KIND` options, in their order.

    Raises:
        ValueError: for anything else.
    """
    pairs = {}
    for value in values:
        pattern, separator, kind = value.rpartition("=")
        if not separator or not pattern:
            raise ValueError(f"{flag} {value!r} is not {example.partition(' ')[0]}, e.g. {example.partition(' ')[2]}.")
        pairs[pattern] = kind
    return pairs


def _overrides(values: Sequence[str]) -> dict[str, str]:
    return parse_pairs("--override", values, "PATTERN=KIND '*.norm1.linear=int8'")


def _components(values: Sequence[str]) -> list[str] | dict[str, str]:
    if not any("=" in value for value in values):
        return list(values)
    return parse_pairs("--component", values, "NAME=KIND text_encoder_2=int8")


def _group_size(text: str) -> int | None:
    if text in ("0", "none"):
        return None
    return int(text)


# By field: flag, metavar, and what the flag's value becomes. Flags that are given several times are singular.
_SPECIAL: dict[str, tuple[str, str | None, Callable[[Any], Any]]] = {
    "components": ("--component", "NAME[=KIND]", _components),
    "group_size": ("--group-size", "N", _group_size),
    "held_out": ("--held-out", "N", int),
    "modules_to_not_convert": ("--skip", "PATTERN", list),
    "overrides": ("--override", "PATTERN=KIND", _overrides),
    "trackers": ("--tracker", "NAME", tuple),
}
# By annotation: type of the option, metavar, and what its value becomes.
_TYPES: dict[str, tuple[Any, str | None, Callable[[Any], Any]]] = {
    "bool": (bool, None, bool),
    "float": (float, None, float),
    "int": (int, None, int),
    "str": (str, "TEXT", str),
    "int | str": (str, "SIZE", str),
    "str | torch.dtype": (str, "DTYPE", str),
    "Sequence[int]": (str, "N,N,...", _numbers(int)),
    "tuple[float, float]": (str, "LOW,HIGH", _numbers(float)),
}


@dataclasses.dataclass(frozen=True)
class ConfigOptions:
    """The options of a command that are the fields of a config class.

    Args:
        file (`str`): of the class, relative to the package.
        cls (`str`): name of the class.
        panel (`str`): heading in the help.
        prefix (`str`, *optional*): of flags, where the names of two classes meet: `"sensitivity"`.
        leave_out (`tuple[str, ...]`, *optional*): fields that have options of their own, or none.
        formerly (`Mapping[str, str]`, *optional*): field → old flag, which is still read and warns.
        renamed (`Mapping[str, str]`, *optional*): field → flag, where two classes use one name for two things.
    """

    file: str
    cls: str
    panel: str
    prefix: str = ""
    leave_out: tuple[str, ...] = ()
    formerly: Mapping[str, str] = dataclasses.field(default_factory=dict)
    renamed: Mapping[str, str] = dataclasses.field(default_factory=dict)

    def fields(self) -> list[Field]:
        """The fields that have an option here."""
        return [field for field in read_fields(self.file, self.cls) if field.name not in self.leave_out]

    def flag(self, field: str) -> str:
        """The option of a field."""
        if field in self.renamed:
            return self.renamed[field]
        name = _SPECIAL[field][0] if field in _SPECIAL else "--" + field.replace("_", "-")
        return name.replace("--", f"--{self.prefix}-", 1) if self.prefix else name

    def parameters(self) -> list[inspect.Parameter]:
        """The parameters of a command, for typer. An option that is not given is `None`."""
        made = []
        flags = {field.name: self.flag(field.name) for field in self.fields()}
        for field in self.fields():
            flag, key = flags[field.name], self._key(field.name)
            kind, metavar, _ = self._kind(field)
            text = _help(field, flags)
            if kind is bool:
                # Each on a line of its own; in the help, the one that changes something.
                off, on_by_default = flag.replace("--", "--no-", 1), field.default == "True"
                made.append(_option(key, kind, flag, text, None, None if on_by_default else self.panel))
                text = text.removeprefix("False ") if text.startswith("False ") else f"Turn off: {text}"
                made.append(_option(f"{key}_off", kind, off, text, None, self.panel if on_by_default else None))
                continue
            if field.default not in ("None", "()"):
                value = ast.literal_eval(field.default)
                shown = ",".join(map(str, value)) if isinstance(value, tuple) else value
                text += f" [dim]\\[default: {shown}][/dim]"
            made.append(_option(key, kind, flag, text, metavar, self.panel))
            if field.name in self.formerly:
                made.append(_option(f"{key}_old", kind, self.formerly[field.name], f"Now {flag}.", metavar, None))
        return made

    def given(self, values: Mapping[str, Any]) -> dict[str, Any]:
        """Fields that were given, of all values of a command. Old flags say what they are called now.

        Raises:
            ValueError: for a value that cannot be read; the config itself checks the rest.
        """
        fields = {}
        for field in self.fields():
            key, flag = self._key(field.name), self.flag(field.name)
            value, old = values[key], values.get(f"{key}_old")
            if values.get(f"{key}_off"):
                value = False
            if old is not None:
                warn_renamed(self.formerly[field.name], flag)
                value = old if value is None else value
            if value is not None:
                try:
                    fields[field.name] = self._kind(field)[2](value)
                except ValueError as error:
                    if flag in str(error):
                        raise
                    raise ValueError(f"{flag} {value!r} cannot be read: {error}. {_sentences(field)}") from error
        return fields

    def _key(self, field: str) -> str:
        if field in self.renamed:
            return self.renamed[field].strip("-").replace("-", "_")
        return f"{self.prefix}_{field}".replace("-", "_") if self.prefix else field

    def _kind(self, field: Field) -> tuple[Any, str | None, Callable[[Any], Any]]:
        if field.name not in _SPECIAL:
            return _TYPES[field.annotation.removesuffix(" | None")]
        _, metavar, read = _SPECIAL[field.name]
        return (str if metavar == "N" else list[str]), metavar, read


def _option(key: str, kind: Any, decl: str, text: str, metavar: str | None, panel: str | None) -> inspect.Parameter:
    info = typer.Option(
        decl, help=text, metavar=metavar, show_default=False, rich_help_panel=panel, hidden=panel is None
    )
    return inspect.Parameter(
        key, inspect.Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind | None, info]
    )


def warn_renamed(old: str, new: str) -> None:
    """Says that a flag has a new name."""
    errors.print(f"warning: {old} is {new} now; the old name will be removed.", soft_wrap=True, markup=False)


def with_options(*groups: Any) -> Callable[[CommandT], CommandT]:
    """Gives a command the options of `groups` in the place of its `**values`."""

    def decorate(command: CommandT) -> CommandT:
        signature = inspect.signature(command)
        own = [each for each in signature.parameters.values() if each.kind is not inspect.Parameter.VAR_KEYWORD]
        added: Iterable[inspect.Parameter] = (each for group in groups for each in group.parameters())
        parameters = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in (*own, *added)]
        command.__signature__ = signature.replace(parameters=parameters)  # type: ignore[attr-defined]
        command.__annotations__ = {each.name: each.annotation for each in parameters}
        return command

    return decorate
