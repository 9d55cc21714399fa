# SPDX-License-Identifier: Apache-2.0
"""Makes the wheels of every system on one Linux machine, each with its compiled library.

    pip install build wheel ziglang==0.17.1
    python .ci/wheels.py dist

The library is plain C that Python only loads, so one wheel serves every version of Python, and `zig cc` (clang with
the C libraries of every system) compiles it for all of them. Where this machine runs a system's programs, by itself or
by an emulator, the library is tried with integration_tests/c/kernels_driver.c; the others are only compiled, and their
names looked up. Debian: `apt install qemu-user libc6-arm64-cross musl wine64`.
"""

import argparse
import os
import platform
import shutil
import subprocess
import sys
import tempfile
import tomllib
from pathlib import Path
from typing import NamedTuple


ROOT = Path(__file__).resolve().parents[1]
PACKAGE = "diffusers_ternary/kernels/cpu"
DRIVER = ROOT / "integration_tests/c/kernels_driver.c"


class System(NamedTuple):
    """One wheel."""

    target: str  # of zig
    tag: str  # of the wheel
    runner: tuple[str, ...] | None = None  # what runs its programs here; None: nothing can


SYSTEMS = (
    System("x86_64-linux-gnu.2.17", "manylinux_2_17_x86_64.manylinux2014_x86_64", ()),
    System(
        "aarch64-linux-gnu.2.17",
        "manylinux_2_17_aarch64.manylinux2014_aarch64",
        ("qemu-aarch64", "-cpu", "max", "-L", "/usr/aarch64-linux-gnu"),
    ),
    System("x86_64-linux-musl", "musllinux_1_2_x86_64", ("/lib/ld-musl-x86_64.so.1",)),
    System("aarch64-linux-musl", "musllinux_1_2_aarch64"),
    System("aarch64-macos.11.0", "macosx_11_0_arm64"),
    System("x86_64-macos.11.0", "macosx_11_0_x86_64"),
    System("x86_64-windows-gnu", "win_amd64", ("wine",)),
    System("aarch64-windows-gnu", "win_arm64"),
)


def run(*command: object, **options: object) -> None:
    """Runs a command; says what it said if it fails."""
    result = subprocess.run(list(map(str, command)), capture_output=True, text=True, **options)
    if result.returncode:
        sys.exit(f"{' '.join(map(str, command))}\n{result.stdout}{result.stderr}")


def zig(system: System, *arguments: object) -> None:
    """The C compiler for a system."""
    run(sys.executable, "-m", "ziglang", "cc", "-target", system.target, *arguments)


def compile_library(system: System, folder: Path) -> Path:
    """The sources that pyproject.toml names, without the module that only the build system needs."""
    extension = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["setuptools"]["ext-modules"][0]
    sources = [ROOT / name for name in extension["sources"] if not name.endswith("/module.c")]
    library = folder / ("_native.pyd" if "windows" in system.target else "_native.so")
    flags = {
        "linux": ["-s", "-Wl,-soname,_native.so", "-lm", "-lpthread"],
        "macos": ["-Wl,-install_name,@rpath/_native.so"],
        "windows": ["-s", f"-Wl,--out-implib,{folder / 'native.lib'}"],
    }[system.target.split("-")[1].split(".")[0]]
    zig(system, "-shared", "-fvisibility=hidden", *extension["extra-compile-args"], *sources, *flags, "-o", library)
    binary = library.read_bytes()
    lost = [name for name in exported_functions() if name.encode() not in binary]
    if lost:
        sys.exit(f"{library.name} for {system.target} lacks {', '.join(lost)}.")
    return library


def exported_functions() -> list[str]:
    """Names that kernels/cpu/native.py looks up, without importing torch."""
    text = (ROOT / PACKAGE / "native.py").read_text()
    table = text[text.index("_SIGNATURES = {") : text.index("\n}\n", text.index("_SIGNATURES = {"))]
    return [line.split('"')[1] for line in table.splitlines() if line.strip().startswith('"dt_')]


def try_library(system: System, library: Path) -> str:
    """What became of the trial of a library."""
    if system.runner is None:
        return "compiled only"
    if system.runner and shutil.which(system.runner[0]) is None:
        return f"compiled only, {system.runner[0]} is missing"
    if not system.runner and platform.machine() not in system.target:
        return "compiled only, this is another machine"
    folder = library.parent
    program = folder / "driver.exe"
    zig(system, "-O1", DRIVER, folder / "native.lib" if "windows" in system.target else library, "-lm", "-o", program)
    environment = {
        **os.environ,
        "LD_LIBRARY_PATH": str(folder),
        "WINEDEBUG": "-all",
        "WINEPREFIX": str(folder / "wine"),
    }
    if "qemu" in "".join(system.runner):
        environment["QEMU_SET_ENV"] = f"LD_LIBRARY_PATH={environment.pop('LD_LIBRARY_PATH')}"
    command = [*system.runner, str(program), "15", "7"]
    result = subprocess.run(command, cwd=folder, env=environment, capture_output=True, text=True)
    if result.returncode:
        sys.exit(f"{system.target}: {' '.join(command)}\n{result.stdout}{result.stderr}")
    return "ran: " + ", ".join(line.split(":")[0] for line in result.stdout.splitlines() if " problems" in line)


def pack(pure: Path, system: System, library: Path, output: Path) -> None:
    """The wheel of a system, from one that has no library."""
    work = library.parent / "wheel"
    run(sys.executable, "-m", "wheel", "unpack", pure, "--dest", work)
    (unpacked,) = work.iterdir()
    for stray in (unpacked / PACKAGE).glob("_native.*"):
        stray.unlink()
    shutil.copy(library, unpacked / PACKAGE)
    (metadata,) = unpacked.glob("*.dist-info/WHEEL")
    kept = [
        line
        for line in metadata.read_text().splitlines()
        if line and not line.startswith(("Tag:", "Root-Is-Purelib:"))
    ]
    tags = [f"Tag: py3-none-{tag}" for tag in system.tag.split(".")]
    metadata.write_text("\n".join([*kept, "Root-Is-Purelib: false", *tags, ""]))
    run(sys.executable, "-m", "wheel", "pack", unpacked, "--dest-dir", output)


def main() -> None:
    """Makes all wheels, or some."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("output", type=Path)
    parser.add_argument("--only", help="systems whose target contains this text")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as temporary:
        base = Path(temporary) / "base"
        # without a compiler: the library is optional
        run(sys.executable, "-m", "build", "--wheel", "--outdir", base, ROOT, env={**os.environ, "CC": "false"})
        (pure,) = base.glob("*.whl")
        for system in SYSTEMS:
            if options.only and options.only not in system.target:
                continue
            folder = Path(temporary) / system.target
            folder.mkdir()
            library = compile_library(system, folder)
            tried = try_library(system, library)
            pack(pure, system, library, options.output)
            print(f"{system.target:<24} {library.stat().st_size / 1e3:>6.0f} kB  {tried}", flush=True)


if __name__ == "__main__":
    main()
