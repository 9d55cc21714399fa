# SPDX-License-Identifier: Apache-2.0
"""Nothing in the package assumes Linux: modules and functions that other systems lack are asked for, not relied on.

Read from the sources; this is not a run on Windows.
"""

import ast
import re
import subprocess
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest
from packaging.requirements import Requirement


ROOT = Path(__file__).parents[1]
PACKAGE = ROOT / "diffusers_ternary"
FILES = sorted(PACKAGE.rglob("*.py"))
# Modules of the standard library that Windows, or everybody but Windows, lacks.
POSIX_MODULES = {"fcntl", "grp", "posix", "pty", "pwd", "resource", "syslog", "termios", "tty"}
WINDOWS_MODULES = {"msvcrt", "winreg", "winsound", "_winapi"}
# Attributes that do not exist, or do something else, on Windows.
POSIX_ATTRIBUTES = {
    "os": {
        "O_DIRECTORY", "chown", "fork", "getgid", "geteuid", "getloadavg", "getpgid", "getuid", "killpg", "mkfifo",
        "nice", "rename", "sched_getaffinity", "sched_setaffinity", "setsid", "sysconf", "umask", "uname",
    },
    "signal": {"SIGALRM", "SIGHUP", "SIGKILL", "SIGPIPE", "SIGQUIT", "SIGUSR1", "SIGUSR2", "alarm", "pause"},
    "time": {"clock_gettime", "tzset"},
    "socket": {"AF_UNIX"},
}  # fmt: skip


def guarded_lines(tree: ast.Module) -> set[int]:
    """Lines inside `try: ... except ImportError/AttributeError` or behind a question about the system."""
    lines: set[int] = set()
    for node in ast.walk(tree):
        if isinstance(node, ast.Try):
            names = {name.id for handler in node.handlers for name in ast.walk(handler) if isinstance(name, ast.Name)}
            if names & {"ImportError", "AttributeError", "ModuleNotFoundError"}:
                lines.update(range(node.lineno, node.handlers[0].lineno))
        elif isinstance(node, ast.If | ast.IfExp) and re.search(
            r"os\.name|sys\.platform|hasattr\(|fcntl|msvcrt", ast.unparse(node.test)
        ):
            lines.update(range(node.lineno, (node.end_lineno or node.lineno) + 1))
    return lines


def assumptions(source: str) -> Iterator[tuple[int, str]]:
    tree = ast.parse(source)
    guarded = guarded_lines(tree)
    for node in ast.walk(tree):
        names: list[str] = []
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names if alias.name in POSIX_MODULES | WINDOWS_MODULES]
        elif isinstance(node, ast.ImportFrom) and node.level == 0:
            names = [node.module] if node.module in POSIX_MODULES | WINDOWS_MODULES else []
            wrong = POSIX_ATTRIBUTES.get(node.module or "", set())
            names += [f"{node.module}.{alias.name}" for alias in node.names if alias.name in wrong]
        elif isinstance(node, ast.Attribute) and isinstance(node.value, ast.Name):
            if node.attr in POSIX_ATTRIBUTES.get(node.value.id, set()):
                names = [f"{node.value.id}.{node.attr}"]
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            names = [node.value] if re.match(r"/(proc|dev|tmp|sys|etc|usr|var)(/|$)", node.value) else []
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute):
            # Without an encoding Windows reads and writes its own code page.
            keywords = {keyword.arg for keyword in node.keywords}
            if node.func.attr in ("read_text", "write_text") and "encoding" not in keywords and not node.args[1:]:
                owner = ast.unparse(node.func.value)
                names = [f"{owner}.{node.func.attr} without encoding"] if owner != "files" else []
        for name in names:
            if node.lineno not in guarded:
                yield node.lineno, name


@pytest.mark.parametrize(
    "source",
    [
        "import fcntl",
        "from os import fork",
        "os.sched_getaffinity(0)",
        "os.rename(a, b)",
        "open('/proc/self/status')",
        "signal.signal(signal.SIGHUP, f)",
        "path.read_text()",
    ],
)
def test_the_check_sees_what_it_is_for(source):
    assert list(assumptions(source))


def test_nothing_assumes_linux():
    found = [
        f"{file.relative_to(ROOT)}:{line}: {name}"
        for file in FILES
        for line, name in assumptions(file.read_text(encoding="utf-8"))
    ]
    assert not found, "\n".join(found)


@pytest.mark.parametrize(
    ("system", "machine", "expected"),
    [
        ("linux", "x86_64", "triton"),
        ("win32", "AMD64", "triton-windows"),
        ("darwin", "arm64", None),
        ("win32", "ARM64", None),
    ],
)
def test_triton_of_each_system(system, machine, expected):
    tomllib = pytest.importorskip("tomllib")  # Python 3.11
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))
    requirements = [Requirement(text) for text in project["project"]["dependencies"]]
    environment = {"sys_platform": system, "platform_machine": machine}
    chosen = [each.name for each in requirements if each.marker is not None and each.marker.evaluate(environment)]
    assert [name for name in chosen if "triton" in name] == ([expected] if expected else [])


def test_the_tuning_file_is_written_without_posix_locks(tmp_path):
    """As on Windows: the module of its locks is a stand-in, that of POSIX is not there."""
    pytest.importorskip("triton")
    program = f"""
import sys, types
import torch, triton, diffusers_ternary
sys.modules["fcntl"] = None
calls = []
sys.modules["msvcrt"] = types.SimpleNamespace(LK_LOCK=1, locking=lambda *a: calls.append(a[1:]))
from pathlib import Path
from diffusers_ternary.kernels.triton import tuning
from diffusers_ternary.kernels.triton.dispatch import Plan
path = Path({str(tmp_path)!r}) / "plans.json"
tuning.PlanCache(path).put("key", Plan("library"))
assert tuning.PlanCache(path).get("key") == Plan("library")
assert calls == [(1, 1)], calls
"""
    result = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, check=False)
    assert result.returncode == 0, result.stderr[-3000:]
