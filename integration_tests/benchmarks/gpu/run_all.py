# SPDX-License-Identifier: Apache-2.0
"""Every figure that one short visit to a GPU can give, in order of value, in at most eight minutes.

    python integration_tests/benchmarks/gpu/run_all.py               # 480 s; --seconds sets another limit
    TRITON_INTERPRET=1 python integration_tests/benchmarks/gpu/run_all.py --dry-run     # no GPU

Kernels are compiled in all cores, then layers, a FLUX.1-dev step and a SANA-1.6B step are measured: time (eager, CUDA
graph, compiled, fused projections), memory, loading, host time and errors. Each stage is a process with a limit of its
own; its CSV file has each row as soon as it is known, so that what fails or runs out of time costs nothing that came
before. `run.log` beside the files has all that was printed.
"""

import argparse
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple


FOLDER = Path(__file__).parent
LEAST_SECONDS = 15  # a stage with less left is not begun


class Stage(NamedTuple):
    """A script, its options, and the seconds that it may take at most."""

    name: str
    script: str
    options: tuple[str, ...]
    seconds: int


STAGES = (
    Stage("compile", "compile_ahead.py", (), 90),
    Stage("linear", "bench_linear.py", ("--minutes", "1.9"), 125),
    Stage("flux", "bench_model.py", ("--model", "flux", "--minutes", "2.9"), 180),
    Stage("sana", "bench_model.py", ("--model", "sana", "--minutes", "1.2"), 80),
)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--seconds", type=float, default=480, help="for everything")
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes and models, without a GPU")
    parser.add_argument("--output", type=Path, default=FOLDER / "results")
    options = parser.parse_args()
    options.output.mkdir(parents=True, exist_ok=True)
    start = time.monotonic()
    with (options.output / "run.log").open("a", encoding="utf-8") as log:

        def say(text: str) -> None:
            print(text, flush=True)
            log.write(text + "\n")
            log.flush()

        for stage in STAGES:
            left = options.seconds - (time.monotonic() - start)
            limit = min(stage.seconds, left) if not options.dry_run else 600
            if limit < LEAST_SECONDS:
                say(f"=== {stage.name} left out, {left:.0f} s left")
                continue
            command = [sys.executable, str(FOLDER / stage.script), *stage.options]
            command += ["--dry-run"] if options.dry_run else []
            command += [] if stage.name == "compile" else ["--output", str(options.output)]
            environment = {**os.environ, "PYTHONUNBUFFERED": "1"}
            if stage.name == "compile":
                environment.pop("TRITON_INTERPRET", None)  # the compiler itself is what this stage is about
            begin = time.monotonic()
            try:
                status = subprocess.run(
                    command, env=environment, stdout=log, stderr=subprocess.STDOUT, timeout=limit, check=False
                )
                outcome = f"exit {status.returncode}"
            except subprocess.TimeoutExpired:
                outcome = "stopped at its limit"
            say(f"=== {stage.name} {outcome} after {time.monotonic() - begin:.0f} s of {limit:.0f}")
        say(f"=== end after {time.monotonic() - start:.0f} s; figures and run.log are in {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
