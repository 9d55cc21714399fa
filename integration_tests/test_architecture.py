# SPDX-License-Identifier: Apache-2.0
"""The dependency direction of the packages, and the license line of every source file.

Imports are parsed, not run, so that lazy ones inside functions count too.
"""

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_ternary"

# A room may import from rooms on the floors above it in this list, and from itself.
FLOORS = (
    {"extras", "files", "format", "lazy", "progress"},
    {"rollouts", "ternarize"},
    {"kernels"},
    {"layers"},
    {"backend"},
    {"evaluation", "interop", "lora"},
    {"calibration", "demo", "hub"},
    {"distillation"},
    {"planning"},
    {"cli"},
)
RANK = {name: rank for rank, names in enumerate(FLOORS) for name in names}
# What the root's own namespace offers (`from .. import TernaryConfig`) is made of everything up to here.
ROOT_RANK = RANK["backend"]


def part_of(file: Path) -> str:
    """The package or root module that a file belongs to; empty for the root's own `__init__`."""
    first = file.relative_to(PACKAGE).parts[0].removesuffix(".py")
    return "" if first == "__init__" else first


def imports(file: Path) -> Iterator[tuple[int, tuple[str, ...]]]:
    """Line and dotted name of everything of this project that a file imports."""
    package = ("diffusers_ternary", *file.relative_to(PACKAGE).parts[:-1])
    for node in ast.walk(ast.parse(file.read_text())):
        targets: list[tuple[str, ...]] = []
        if isinstance(node, ast.Import):
            targets = [tuple(alias.name.split(".")) for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            base = package[: len(package) - node.level + 1] if node.level else ()
            base += tuple((node.module or "").split(".")) if node.module else ()
            targets = [(*base, alias.name) for alias in node.names]
        for target in targets:
            if target[0] == "diffusers_ternary":
                yield node.lineno, target


def imported_parts(file: Path) -> Iterator[tuple[int, str]]:
    """Line and package of every import of this project in a file; empty for the root's namespace."""
    for line, target in imports(file):
        part = target[1] if len(target) > 1 else ""
        yield line, part if (PACKAGE / part).is_dir() or (PACKAGE / f"{part}.py").exists() else ""


def imported_files(file: Path) -> Iterator[Path]:
    """The files of this package that a file imports."""
    for _, target in imports(file):
        while target:
            path = ROOT.joinpath(*target)
            found = next((f for f in (path.with_suffix(".py"), path / "__init__.py") if f.exists()), None)
            if found is not None:
                yield found
                break
            target = target[:-1]


FILES = sorted(PACKAGE.rglob("*.py"))


def test_every_package_has_a_place():
    parts = {part_of(file) for file in FILES} - {""}
    unknown = parts - RANK.keys()
    assert not unknown, (
        f"{sorted(unknown)} have no place in the order of packages. Add them to FLOORS in {__file__}, as far to the "
        "left as what they import allows."
    )


def test_imports_point_to_the_left():
    wrong = []
    for file in FILES:
        part = part_of(file)
        for line, target in imported_parts(file):
            if part == target or part not in RANK:
                continue
            target_rank = RANK.get(target, ROOT_RANK)
            if target_rank >= RANK[part]:
                wrong.append(f"{file.relative_to(ROOT)}:{line}: {part} imports {target or 'the package root'}")
    order = " → ".join("{" + ", ".join(sorted(names)) + "}" for names in FLOORS)
    assert not wrong, f"imports against the direction {order}:\n" + "\n".join(wrong)


def test_no_files_import_each_other_in_a_circle():
    """Lazy imports count; a package's own `__init__` may gather what is below it."""
    waiting = {file: {found for found in imported_files(file) if found.name != "__init__.py"} for file in FILES}
    while free := [file for file, needed in waiting.items() if not needed & waiting.keys()]:
        for file in free:
            del waiting[file]
    # What is left imports something that is left: of these, only files that are also imported are in a circle.
    while tops := [file for file in waiting if not any(file in needed for needed in waiting.values())]:
        for file in tops:
            del waiting[file]
    circle = [str(file.relative_to(ROOT)) for file in waiting]
    assert not circle, f"these import each other in a circle: {circle}"


def test_the_check_sees_what_it_is_for():
    """The parser finds relative, absolute, lazy and module-level imports."""
    seen = {(part_of(file), target) for file in FILES for _, target in imported_parts(file)}
    assert ("backend", "layers") in seen
    assert ("layers", "kernels") in seen
    assert ("", "backend") in seen
    assert ("format", "layers") not in seen


@pytest.mark.parametrize("library", ["diffusers", "transformers", "accelerate", "peft"])
@pytest.mark.parametrize("part", ["format", "ternarize", "kernels", "layers"])
def test_the_core_knows_torch_only(part, library):
    for file in (PACKAGE / part).rglob("*.py"):
        for node in ast.walk(ast.parse(file.read_text())):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            if isinstance(node, ast.ImportFrom) and node.level == 0:
                names = [node.module or ""]
            assert not any(name.split(".")[0] == library for name in names), f"{file}:{node.lineno}"


@pytest.mark.parametrize("name", ["replace", "rename", "fsync", "umask", "mkstemp", "NamedTemporaryFile"])
def test_files_are_written_in_one_way(name):
    """Renaming, syncing and temporary names are left to `files/`; the Triton kernels stand alone."""
    for file in FILES:
        if file.is_relative_to(PACKAGE / "files") or file.parent.name == "triton":
            continue
        for node in ast.walk(ast.parse(file.read_text())):
            if isinstance(node, ast.Attribute) and node.attr == name and isinstance(node.value, ast.Name):
                assert node.value.id not in ("os", "tempfile"), f"{file}:{node.lineno}"


CONTRIBUTING = ROOT / "CONTRIBUTING.md"
_BEGIN, _END = "<!-- house -->\n", "<!-- /house -->"


def picture() -> str:
    """The rooms from the top floor down, each with what its docstring says first."""
    lines = []
    for floor, rooms in reversed(list(enumerate(FLOORS))):
        for room in sorted(rooms):
            path = PACKAGE / room / "__init__.py" if (PACKAGE / room).is_dir() else PACKAGE / f"{room}.py"
            docstring = ast.get_docstring(ast.parse(path.read_text())) or ""
            sentence = re.split(r"(?<=[.])\s|\n", docstring)[0].replace("`", "").rstrip(".")
            number = "" if lines and room != min(rooms) else f"{floor}"
            lines.append(f"{number:2}{room:14}{sentence}")
    return "```\n" + "\n".join(lines) + "\n```\n"


def test_the_picture_in_contributing_shows_these_floors():
    drawn = CONTRIBUTING.read_text().split(_BEGIN)[1].split(_END)[0]
    assert drawn == picture(), "draw it again: python integration_tests/test_architecture.py"


# Tests in a room that are of no single file, and what they are of.
OF_A_WHOLE_ROOM = {
    "kernels/cpu/test_c.py": "all C sources, under sanitizers and for another architecture",
    "kernels/triton/test_alone.py": "the imports of the room",
    "kernels/triton/test_benchmarks.py": "benchmarks/gpu, which run its kernels",
    "kernels/triton/test_compile.py": "every kernel, compiled for GPUs",
    "kernels/triton/test_interpreted.py": "runs test_kernels.py under Triton's interpreter",
    "kernels/triton/test_kernels.py": "every kernel against float32",
    "kernels/triton/test_ptx.py": "the inlined PTX of several files",
}


def test_the_test_of_a_file_is_found_by_its_path():
    """`<room>/test_X.py` is of `<room>/X.py`, of `<room>/src/X.c`, or of the files `<room>/X_*.py`."""
    tests = ROOT / "integration_tests"
    lost = set()
    for test in tests.rglob("test_*.py"):
        room, name = PACKAGE / test.parent.relative_to(tests), test.stem.removeprefix("test_")
        if test.parent == tests or not room.is_dir():
            continue  # of the whole package; journeys, examples, GPUs
        found = [room / f"{name}.py", room / "src" / f"{name}.c", *room.glob(f"{name}_*.py")]
        if not any(file.is_file() for file in found):
            lost.add(test.relative_to(tests).as_posix())
    assert lost == OF_A_WHOLE_ROOM.keys(), (
        f"{sorted(lost ^ OF_A_WHOLE_ROOM.keys())}: name a test after the file that it is of; put it into journeys/ if "
        "it is of many, or into OF_A_WHOLE_ROOM with what it is of."
    )


def sources() -> Iterator[Path]:
    for folder in ("diffusers_ternary", "integration_tests", "examples"):
        for file in sorted((ROOT / folder).rglob("*")):
            if file.suffix in (".py", ".c", ".h", ".cpp", ".cu") and "build" not in file.parts:
                yield file


def test_every_source_file_has_the_license_line_first():
    missing = [
        str(file.relative_to(ROOT))
        for file in sources()
        if not any(
            file.read_text().startswith(f"{mark} SPDX-License-Identifier: Apache-2.0") for mark in ("#", "//", "/*")
        )
    ]
    assert not missing, f"first line must be '# SPDX-License-Identifier: Apache-2.0' in: {missing}"


if __name__ == "__main__":
    before, after = CONTRIBUTING.read_text().split(_BEGIN)
    CONTRIBUTING.write_text(before + _BEGIN + picture() + _END + after.split(_END)[1])
