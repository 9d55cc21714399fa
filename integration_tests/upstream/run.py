# SPDX-License-Identifier: Apache-2.0
"""Runs diffusers' own tester mixins against this backend, and writes down what passes.

    git clone https://github.com/huggingface/diffusers
    python integration_tests/upstream/run.py diffusers
    python integration_tests/upstream/run.py diffusers -- -k "Flux and Quantization"

PATH is a checkout of diffusers, near the version that is installed; its `tests` are imported from there and nothing
of it is copied. `wired.py` puts ternary models in the place of float ones. The result goes to RESULTS.md beside this
file, with the reason of every miss (`misses.py`). A failure without a reason, or a reason without one, ends with 1.
"""

import argparse
import collections
import fnmatch
import importlib.metadata
import os
import re
import subprocess
import sys
import tempfile
import xml.etree.ElementTree as ElementTree
from collections.abc import Iterable, Iterator
from pathlib import Path
from typing import NamedTuple

from misses import MISSES  # type: ignore[import-not-found]


HERE = Path(__file__).parent
ROOT = HERE.parents[1]
RESULTS = HERE / "RESULTS.md"
MODELS = ("flux", "flux2", "qwen_image", "sana", "sd3", "wan", "z_image")  # of wired.py
_VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate")


class Outcome(NamedTuple):
    """Of one test: `"passed"`, `"failed"` or `"skipped"`, and what was said."""

    test: str
    status: str
    message: str


def run(checkout: Path, models: Iterable[str], arguments: Iterable[str]) -> list[Outcome]:
    """Runs pytest in a process whose `tests` package is that of the checkout."""
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    # Their markers are declared in a conftest.py that is not loaded.
    options = ["-q", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", HERE / "wired.py", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", "UPSTREAM_MODELS": " ".join(models)},
        )
        if not report.exists():
            sys.exit("pytest wrote no report: see above.")
        return list(_outcomes(report))


def _outcomes(report: Path) -> Iterator[Outcome]:
    for case in ElementTree.parse(report).iter("testcase"):
        name = f"{case.get('classname', '').rpartition('.')[2]}.{case.get('name')}"
        found = next((child for child in case if child.tag in ("failure", "error", "skipped")), None)
        if found is None:
            yield Outcome(name, "passed", "")
            continue
        status = "skipped" if found.tag == "skipped" else "failed"
        message = found.get("message") or ""
        if found.get("type") == "pytest.xfail":
            status = "xfailed"
        yield Outcome(name, status, message.splitlines()[0] if message else "")


def reason_of(test: str) -> str | None:
    """Why a test does not pass, of the first pattern that fits its name."""
    # Brackets are of parameters, not of characters.
    return next(
        (why for pattern, why in MISSES.items() if fnmatch.fnmatchcase(test, pattern.replace("[", "[[]"))), None
    )


def page(outcomes: list[Outcome], checkout: Path, models: Iterable[str]) -> str:
    """RESULTS.md."""
    revision = subprocess.run(
        ["git", "-C", checkout, "log", "-1", "--format=%h of %cs"], capture_output=True, text=True
    ).stdout.strip()
    versions = ", ".join(f"{name} {importlib.metadata.version(name)}" for name in _VERSIONS)
    counts = collections.Counter(outcome.status for outcome in outcomes)
    by_class: dict[str, collections.Counter[str]] = collections.defaultdict(collections.Counter)
    for outcome in outcomes:
        by_class[outcome.test.partition(".")[0]][outcome.status] += 1
    lines = [
        "# diffusers' tester mixins against this backend",
        "",
        "Written by `python integration_tests/upstream/run.py PATH`, which says how. The models under test are",
        f"ternary ({', '.join(models)}), on a CPU.",
        f"Tests of diffusers {revision or 'at an unknown revision'}, run with {versions}.",
        "",
        f"**{counts['passed']} passed, {counts['failed']} failed**, {counts['xfailed']} failed as upstream expects, "
        f"{counts['skipped']} skipped by upstream's own conditions.",
        "",
        "| tests | passed | failed | expected to fail | skipped |",
        "|---|--:|--:|--:|--:|",
    ]
    for name, found in sorted(by_class.items()):
        numbers = (found[status] for status in ("passed", "failed", "xfailed", "skipped"))
        lines.append(f"| {name.removeprefix('Test')} | {' | '.join(map(str, numbers))} |")
    misses: dict[str, list[str]] = collections.defaultdict(list)
    for outcome in outcomes:
        if outcome.status == "failed":
            misses[reason_of(outcome.test) or f"no reason known: {outcome.message}"].append(outcome.test)
    lines += ["", "## What fails, and why", ""]
    for why, tests in misses.items():
        lines.append(f"- {why}")
        lines += [f"  - `{test.removeprefix('Test')}`" for test in sorted(tests)]
    skipped = collections.Counter(outcome.message for outcome in outcomes if outcome.status == "skipped")
    lines += ["", "## What is skipped, and why", ""]
    lines += [f"- {count}: {why}" for why, count in skipped.most_common()]
    passed: dict[str, list[str]] = collections.defaultdict(list)
    for outcome in outcomes:
        if outcome.status == "passed":
            name, _, test = outcome.test.partition(".")
            passed[name].append(re.sub(r"^test_", "", test))
    lines += ["", "## What passes", ""]
    lines += [f"- **{name.removeprefix('Test')}**: {', '.join(sorted(tests))}" for name, tests in passed.items()]
    return "\n".join(lines) + "\n"


def main() -> None:
    """The command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, help="checkout of diffusers")
    parser.add_argument("--models", nargs="+", choices=MODELS, default=MODELS, help="default: all")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest; with some, nothing is written")
    arguments = parser.parse_intermixed_args()
    if not (arguments.path / "tests" / "models" / "testing_utils").is_dir():
        sys.exit(f"{arguments.path} has no tests/models/testing_utils. Give a checkout of diffusers.")
    outcomes = run(arguments.path.resolve(), arguments.models, arguments.pytest)
    if not arguments.pytest:
        RESULTS.write_text(page(outcomes, arguments.path, arguments.models), encoding="utf-8")
        print(f"wrote {RESULTS}")
    failed = [outcome for outcome in outcomes if outcome.status == "failed"]
    unexplained = [outcome for outcome in failed if reason_of(outcome.test) is None]
    for outcome in unexplained:
        print(f"no reason in misses.py: {outcome.test}: {outcome.message}")
    stale = []
    if not arguments.pytest:
        stale = [why for why in MISSES.values() if why not in {reason_of(outcome.test) for outcome in failed}]
        for why in stale:
            print(f"nothing fails for this reason any more: {why}")
    sys.exit(bool(unexplained or stale))


if __name__ == "__main__":
    main()
