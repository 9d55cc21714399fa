# SPDX-License-Identifier: Apache-2.0
"""The C code on its own: under the address and undefined-behavior sanitizers, and as AArch64 under an emulator."""

import shutil
import subprocess
from pathlib import Path

import pytest


ROOT = Path(__file__).parents[3]
SOURCES = [
    *(path for path in (ROOT / "diffusers_ternary/kernels/cpu/src").glob("*.c") if path.name != "module.c"),
    ROOT / "integration_tests/c/kernels_driver.c",
]


def build(compiler: str, flags: list[str], binary: Path) -> subprocess.CompletedProcess:
    command = [compiler, "-Wall", "-Wextra", *flags, *map(str, SOURCES), "-o", str(binary), "-lm"]
    return subprocess.run(command, capture_output=True, text=True)


def test_sanitizers_find_nothing(tmp_path):
    compiler = shutil.which("gcc") or shutil.which("clang")
    if compiler is None:
        pytest.skip("no C compiler")
    flags = ["-O1", "-g", "-fsanitize=address,undefined", "-fno-sanitize-recover=all"]
    built = build(compiler, flags, tmp_path / "driver")
    if "cannot find -lasan" in built.stderr or "cannot find -lubsan" in built.stderr:
        pytest.skip("the compiler has no sanitizer libraries")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    result = subprocess.run([tmp_path / "driver", "60", "7"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "scalar: 60 problems" in result.stdout


def test_neon_under_emulation(tmp_path):
    compiler, emulator = shutil.which("aarch64-linux-gnu-gcc"), shutil.which("qemu-aarch64")
    if compiler is None or emulator is None:
        pytest.skip("needs the Debian packages gcc-aarch64-linux-gnu, libc6-dev-arm64-cross and qemu-user")
    built = build(compiler, ["-O2", "-static"], tmp_path / "driver")
    assert built.returncode == 0, built.stderr
    assert "warning" not in built.stderr, built.stderr
    result = subprocess.run([emulator, "-cpu", "max", tmp_path / "driver", "60", "7"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon-i8mm: 60 problems" in result.stdout
    assert "neon-dotprod: 60 problems" in result.stdout
    # a processor without the instructions falls back
    result = subprocess.run([emulator, "-cpu", "cortex-a76", tmp_path / "driver", "5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon-i8mm: not on this CPU" in result.stdout
    assert "neon-dotprod: 5 problems" in result.stdout
    result = subprocess.run([emulator, "-cpu", "cortex-a53", tmp_path / "driver", "5"], capture_output=True, text=True)
    assert result.returncode == 0, result.stdout + result.stderr
    assert "neon-dotprod: not on this CPU" in result.stdout
