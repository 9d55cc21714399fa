# SPDX-License-Identifier: Apache-2.0
"""Runs the test suite with the oldest and with the newest versions that `pyproject.toml` promises.

    python integration_tests/versions.py oldest             # every direct dependency at its lower bound
    python integration_tests/versions.py newest             # what the package index has today
    python integration_tests/versions.py newest --hosts     # only the tests of what the hosts may change
    python integration_tests/versions.py oldest -- -m "not slow" integration_tests/backend

Each set gets a virtual environment of its own below `runs/versions/` (ignored by git), with its own Python; uv finds
the interpreter and resolves the versions. What was installed and how the suite ended goes to
`integration_tests/versions.json` and to the table in CONTRIBUTING.md.
"""

import argparse
import json
import os
import platform
import re
import shutil
import subprocess
import sys
from datetime import date
from pathlib import Path


ROOT = Path(__file__).parents[1]
RECORD = Path(__file__).with_name("versions.json")
CONTRIBUTING = ROOT / "CONTRIBUTING.md"
PYTHON = {"oldest": "3.11", "newest": "3.13"}
SHOWN = ("torch", "triton", "diffusers", "transformers", "peft", "accelerate", "safetensors", "huggingface-hub")
# Private names of the hosts, what configs and loading ask of them, and quantizing.
HOSTS = (
    "integration_tests/backend/test_config.py",
    "integration_tests/lora/test_compat.py",
    "integration_tests/backend/test_compat.py",
    "integration_tests/backend/test_quantize.py",
)
_BEGIN, _END = "<!-- versions -->\n", "<!-- /versions -->"


def install(which: str, folder: Path, python: str) -> Path:
    """Makes the environment of a set of versions, and returns its interpreter."""
    if shutil.which("uv") is None:
        sys.exit("uv resolves the versions, and is not installed. Install it with: pip install uv")
    uv = ["uv", "pip", "install", "--quiet"]
    interpreter = folder / ("Scripts" if os.name == "nt" else "bin") / "python"
    if not interpreter.exists():
        subprocess.run(["uv", "venv", "--quiet", "--python", python, folder], check=True)
    resolution = ["--resolution", "lowest-direct"] if which == "oldest" else ["--upgrade"]
    # The tools of the test extra are not what is promised: they come in their newest versions, beside what is there.
    subprocess.run([*uv, "--python", interpreter, *resolution, "-e", ROOT], check=True)
    subprocess.run([*uv, "--python", interpreter, "-e", f"{ROOT}[test]"], check=True)
    return interpreter


def versions(interpreter: Path) -> dict[str, str]:
    """What is installed, of the libraries that matter."""
    listing = subprocess.run(
        ["uv", "pip", "list", "--python", interpreter, "--format", "json"], check=True, capture_output=True, text=True
    )
    installed = {entry["name"]: entry["version"] for entry in json.loads(listing.stdout)}
    return {name: installed[name] for name in SHOWN if name in installed}


def outcome(interpreter: Path, arguments: list[str]) -> tuple[int, str]:
    """Exit status of the suite, and pytest's closing line without the time."""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    environment.pop("PYTHONPATH", None)
    with subprocess.Popen(
        [interpreter, "-m", "pytest", "-q", *arguments], cwd=ROOT, env=environment, stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None
        last = ""
        for line in process.stdout:
            print(line, end="", flush=True)
            last = line.strip() or last
    return process.returncode, re.sub(r"=+|\s+in [\d.]+s.*", "", last).strip()


def table(record: dict[str, dict[str, str]]) -> str:
    """The table of CONTRIBUTING.md."""
    names = ["python", *SHOWN]
    lines = ["| | " + " | ".join(names) + " | suite |", "|---" * (len(names) + 2) + "|"]
    for which, entry in record.items():
        cells = [entry.get(name, "–") for name in names]
        lines.append(f"| {which} | " + " | ".join(cells) + f" | {entry['suite']} ({entry['date']}) |")
    return "\n".join(lines) + "\n"


def main() -> None:
    """Installs, runs, records."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("which", choices=PYTHON)
    parser.add_argument("--python", help="interpreter or version (default: 3.11 for oldest, 3.13 for newest)")
    parser.add_argument("--folder", type=Path, help="of the environment")
    parser.add_argument("--hosts", action="store_true", help="only the tests of what the hosts may change")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest; with some, nothing is recorded")
    arguments = parser.parse_intermixed_args()  # options may stand before "--"
    folder = arguments.folder or ROOT / "runs" / "versions" / arguments.which
    folder.parent.mkdir(parents=True, exist_ok=True)
    interpreter = install(arguments.which, folder, arguments.python or PYTHON[arguments.which])
    found = versions(interpreter)
    print(", ".join(f"{name} {version}" for name, version in found.items()), flush=True)
    status, suite = outcome(interpreter, arguments.pytest or (["-n0", *HOSTS] if arguments.hosts else []))
    if not arguments.pytest:
        record = json.loads(RECORD.read_text()) if RECORD.exists() else {}
        python = subprocess.run(
            [interpreter, "-c", "import platform; print(platform.python_version())"],
            check=True,
            capture_output=True,
            text=True,
        ).stdout.strip()
        record[arguments.which] = {
            "date": date.today().isoformat(),
            "machine": f"{platform.system()} {platform.machine()}",
            "python": python,
            **found,
            "suite": f"of the hosts: {suite}" if arguments.hosts else suite,
        }
        RECORD.write_text(json.dumps(record, indent=2) + "\n")
        text = CONTRIBUTING.read_text()
        head, rest = text.split(_BEGIN)
        CONTRIBUTING.write_text(head + _BEGIN + table(record) + _END + rest.split(_END)[1])
    sys.exit(status)


if __name__ == "__main__":
    main()
