# SPDX-License-Identifier: Apache-2.0
"""A process that talks to a Hub: `HF_ENDPOINT` counts only when it is set before huggingface_hub is imported."""

import dataclasses
import json
import os
import subprocess
import sys
import textwrap
from pathlib import Path
from typing import Any

from .fresh_process import ROOT


WORKER = """
import json, logging, sys

import torch
from typer.testing import CliRunner

from diffusers_ternary.cli import app
from diffusers_ternary.hub import push_to_hub

torch.set_num_threads(1)
answers, sys.stdout = sys.stdout, sys.stderr
for line in sys.stdin:
    task = json.loads(line)
    answer = {}
    try:
        if "code" in task:
            scope = {}
            exec(task["code"], scope)
            answer = {"value": scope["value"]}
        elif "cli" in task:
            result = CliRunner().invoke(app, ["push", *task["cli"]])
            answer = {"output": result.output, "exit_code": result.exit_code}
        else:
            commit = push_to_hub(task.pop("folder"), task.pop("repo_id"), **task)
            answer = {"commit": commit.oid, "pr": commit.pr_revision}
    except Exception as error:
        answer = {"error": type(error).__name__, "message": str(error)}
    print(json.dumps(answer), file=answers, flush=True)
"""


@dataclasses.dataclass(frozen=True)
class Answer:
    """What a push gave: a commit, or an error's class and message; for the command, its output and exit code; for
    code, its variable `value`.
    """

    commit: str | None = None
    pr: str | None = None
    error: str | None = None
    message: str = ""
    output: str = ""
    exit_code: int = 0
    value: Any = None


class HubClient:
    """Runs pushes in a process of its own, one after the other."""

    def __init__(self, environment: dict[str, str]) -> None:
        self.process = subprocess.Popen(
            [sys.executable, "-c", WORKER],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            text=True,
            env={**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **environment},
        )

    def push(self, folder: Path, repo_id: str, **options: Any) -> Answer:
        return self._ask({"folder": str(folder), "repo_id": repo_id, "base_model": "org/base", **options})

    def cli(self, *arguments: object) -> Answer:
        return self._ask({"cli": [str(argument) for argument in arguments]})

    def run(self, code: str) -> Any:
        answer = self._ask({"code": textwrap.dedent(code)})
        assert answer.error is None, answer
        return answer.value

    def _ask(self, task: dict[str, Any]) -> Answer:
        assert self.process.stdin is not None
        assert self.process.stdout is not None
        self.process.stdin.write(json.dumps(task) + "\n")
        self.process.stdin.flush()
        line = self.process.stdout.readline()
        return Answer(**json.loads(line)) if line else Answer(error="Killed")

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        for pipe in (self.process.stdin, self.process.stdout):
            if pipe is not None:
                pipe.close()
