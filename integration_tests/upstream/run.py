# SPDX-License-Identifier: Apache-2.0
"""Runs diffusers' own tester mixins against this backend, and writes down what passes.

    git clone https://github.com/huggingface/diffusers
    python integration_tests/upstream/run.py diffusers
    python integration_tests/upstream/run.py diffusers -- -k "Flux and Quantization"

PATH is a checkout of diffusers, near the version that is installed; its `tests` are imported from there and nothing
of it is copied. `wired.py` puts ternary models in the place of float ones. The result goes to RESULTS.md beside this
file, with the reason of every miss: what fails is run again with the float model, and `misses.py` explains the rest. A
failure without a reason, or a reason without one, ends with 1.
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
WIRED = HERE.relative_to(ROOT) / "wired.py"
MODELS = ("flux", "flux2", "qwen_image", "sana", "sd3", "wan", "z_image")  # of wired.py
_VERSIONS = ("torch", "diffusers", "transformers", "peft", "accelerate")


class Outcome(NamedTuple):
    """Of one test: passed, failed, alike (the float model fails, too), xfailed or skipped; and what was said."""

    test: str
    status: str
    message: str


class Run(NamedTuple):
    """What was run, whether to its end, and what came of it."""

    models: tuple[str, ...]
    compiling: bool
    complete: bool
    outcomes: list[Outcome]

    def of(self, status: str) -> list[Outcome]:
        """The tests that ended so."""
        return [outcome for outcome in self.outcomes if outcome.status == status]


def run(checkout: Path, models: Iterable[str], arguments: Iterable[str], *, compiling: bool) -> Run:
    """All tests, and those that fail again with float models."""
    chosen = {"UPSTREAM_MODELS": " ".join(models), **({} if compiling else {"UPSTREAM_WITHOUT_COMPILE": "1"})}
    complete, outcomes = _pytest(checkout, [str(WIRED), *arguments], chosen)
    failed = [one.test for one in outcomes if one.status == "failed" and "Quantization" not in one.test]
    if failed:
        again = [f"{WIRED}::{test.replace('.', '::', 1)}" for test in failed]
        repeated = _pytest(checkout, again, {**chosen, "UPSTREAM_FLOAT": "1"})[1]
        alike = {one.test for one in repeated if one.status == "failed"}
        outcomes = [one._replace(status="alike") if one.test in alike else one for one in outcomes]
    return Run(tuple(models), compiling, complete, outcomes)


def _pytest(checkout: Path, arguments: Iterable[str], chosen: dict[str, str]) -> tuple[bool, list[Outcome]]:
    """Runs pytest in a process whose `tests` package is that of the checkout; whether it came to its end."""
    paths = os.pathsep.join(filter(None, [str(checkout), os.environ.get("PYTHONPATH")]))
    # Their markers are declared in a conftest.py that is not loaded.
    options = ["-v", "--tb=short", "-o", "addopts=--import-mode=importlib", "-W", "ignore", "-p", "no:cacheprovider"]
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        process = subprocess.run(
            [sys.executable, "-m", "pytest", *options, f"--junitxml={report}", *arguments],
            cwd=ROOT,
            env={**os.environ, "PYTHONPATH": paths, "HF_HUB_OFFLINE": "1", **chosen},
        )
        if not report.exists():
            sys.exit("pytest wrote no report: see above.")
        return process.returncode in (0, 1), list(_outcomes(report))


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


def page(found: Run, checkout: Path) -> str:
    """RESULTS.md."""
    outcomes = found.outcomes
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
        f"ternary ({', '.join(found.models)}), on a CPU{'' if found.compiling else '; nothing was compiled'}.",
        f"Tests of diffusers {revision or 'at an unknown revision'}, run with {versions}.",
        "",
        f"**{counts['passed']} passed, {counts['failed']} failed**, {counts['alike']} failed as the float model does,",
        f"{counts['xfailed']} as upstream expects, {counts['skipped']} were skipped by upstream's own conditions.",
        "" if found.complete else "The run was interrupted: what is not listed was not reached.",
        "",
        "| tests | passed | failed | like the float model | expected to fail | skipped |",
        "|---|--:|--:|--:|--:|--:|",
    ]
    for name, counted in sorted(by_class.items()):
        numbers = (counted[status] for status in ("passed", "failed", "alike", "xfailed", "skipped"))
        lines.append(f"| {name.removeprefix('Test')} | {' | '.join(map(str, numbers))} |")
    misses: dict[str, list[str]] = collections.defaultdict(list)
    for outcome in found.of("failed"):
        misses[reason_of(outcome.test) or f"no reason known: {outcome.message}"].append(outcome.test)
    for outcome in found.of("alike"):
        misses[f"With the float model as well, on a CPU: {outcome.message}"].append(outcome.test)
    lines += ["", "## What fails, and why", ""]
    for why, tests in misses.items():
        lines.append(f"- {why}")
        lines += [f"  - `{test.removeprefix('Test')}`" for test in sorted(tests)]
    skipped = collections.Counter(outcome.message for outcome in found.of("skipped"))
    lines += ["", "## What is skipped, and why", ""]
    lines += [f"- {count}: {why}" for why, count in skipped.most_common()]
    passed: dict[str, list[str]] = collections.defaultdict(list)
    for outcome in found.of("passed"):
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
    parser.add_argument("--without-compile", action="store_true", help="leave out what runs torch.compile: minutes")
    parser.add_argument("pytest", nargs="*", help="arguments of pytest; with some, nothing is written")
    arguments = parser.parse_intermixed_args()
    if not (arguments.path / "tests" / "models" / "testing_utils").is_dir():
        sys.exit(f"{arguments.path} has no tests/models/testing_utils. Give a checkout of diffusers.")
    compiling = not arguments.without_compile
    found = run(arguments.path.resolve(), arguments.models, arguments.pytest, compiling=compiling)
    if not arguments.pytest:
        RESULTS.write_text(page(found, arguments.path), encoding="utf-8")
        print(f"wrote {RESULTS}")
    failed = found.of("failed")
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
