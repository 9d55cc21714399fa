# SPDX-License-Identifier: Apache-2.0
"""Runs every command that writes: on a full disk, and ended at random changes of the file system.

Run as a program: `python -m integration_tests.support.killing FOLDER SEED KILLS`; prints what was found as JSON. A
process is warmed up once and forked for every run. The moments are counted in changes below the folder (files opened
for writing, renamed, made, removed), not in seconds, so that a seed names the same moments on every machine.
"""

import hashlib
import json
import os
import pathlib
import random
import resource
import shutil
import signal
import sys
import tempfile
from collections.abc import Callable
from typing import Any

import torch
from torch import nn


SIGNALS = ("SIGTERM", "SIGINT", "SIGKILL")
_CHANGES = {"os.rename", "os.mkdir", "os.remove", "os.rmdir", "os.chmod", "shutil.rmtree", "shutil.copyfile"}
_DRAWING = ["--height", "8", "--width", "8", "--set", "max_sequence_length=16"]


def sources(root: pathlib.Path) -> None:
    """What the commands read: a float pipeline, one that somebody else made ternary, its packed forms, prompts."""
    from integration_tests.support import foreign
    from integration_tests.support.pipelines import PIPELINES

    PIPELINES["flux"].build().save_pretrained(root / "float")
    pipeline = PIPELINES["flux"].build().to(torch.bfloat16)
    layers = [
        part for name, part in pipeline.transformer.named_modules() if "block" in name and type(part) is nn.Linear
    ]
    for seed, layer in enumerate(layers):
        weight = foreign.random_ternary(layer.out_features, layer.in_features, 256, seed=seed)
        layer.weight.data = torch.from_numpy(weight.dense()).bfloat16()
    pipeline.save_pretrained(root / "published")
    (root / "prompts.txt").write_text("a cat\na dog\n")
    (root / "held_out.txt").write_text("a house\n")
    (root / "report").mkdir()
    (root / "report" / "result.json").write_text('{"psnr_db": 1.0}')
    (root / "report" / "index.html").write_text("an earlier report")
    (root / "old.gguf").write_bytes(b"GGUF of an earlier run")


def commands(root: pathlib.Path) -> dict[str, tuple[str, str, list[str]]]:
    """Name → what is there before, name of the destination, arguments."""
    prompts = ["--prompts", f"{root / 'prompts.txt'}"]
    distill = [
        "--held-out-prompts",
        f"{root / 'held_out.txt'}",
        "--rounded",
        "--updates",
        "2",
        "--batch-size",
        "1",
        "--cpu",
    ]
    float_model, again = f"{root / 'float'}", ["--overwrite"]
    return {
        "quantize": ("float", "out", ["quantize", float_model, "{}", *again]),
        "convert": ("float", "out", ["convert", f"{root / 'published'}", "{}", *again]),
        "export": ("old.gguf", "out.gguf", ["convert", f"{root / 'packed'}", "{}", *again]),
        "calibrate": (
            "float",
            "out",
            [
                "calibrate",
                float_model,
                "{}",
                *prompts,
                *again,
                *_DRAWING,
                "--steps",
                "1",
                "--descent-passes",
                "0",
                "--starts",
                "1",
            ],
        ),
        "distill": (
            "float",
            "out",
            ["distill", float_model, "{}", *prompts, *again, *_DRAWING, *distill, "--steps", "1"],
        ),
        "evaluate": (
            "report",
            "out",
            ["evaluate", float_model, float_model, "--report", "{}", *prompts, *again, *_DRAWING, "--steps", "1"],
        ),
        "push": (
            "float",
            "",
            ["push", f"{root / 'packed'}", "me/model", "--base-model", "a/b", "--dry-run", "--include-dequantized"],
        ),
    }


def in_child(
    action: Callable[[], None], root: pathlib.Path, *, stop_at: int | None = None, name: str = ""
) -> tuple[int, int]:
    """Forks; returns the status (negative: the signal) and how many changes there were."""
    read, write = os.pipe()
    child = os.fork()
    if child:
        os.close(write)
        with os.fdopen(read) as pipe:
            text = pipe.read()
        return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]), len(text)
    status = 1
    try:
        count = 0

        def observe(event: str, arguments: tuple[Any, ...]) -> None:
            nonlocal count
            if event == "open":
                path, _, flags = arguments
                changes = isinstance(flags, int) and bool(flags & (os.O_WRONLY | os.O_RDWR | os.O_CREAT))
            else:
                path, changes = (arguments or ("",))[0], event in _CHANGES
            # What is removed folder by folder is named without its place.
            if not changes or isinstance(path, int) or (os.path.isabs(path) and not str(path).startswith(str(root))):
                return
            os.write(write, b".")
            count += 1
            if count - 1 == stop_at:
                os.kill(os.getpid(), getattr(signal, name))

        silent = os.open(root / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
        os.dup2(silent, 1)
        os.dup2(silent, 2)
        sys.addaudithook(observe)
        # torch's pool does not survive a fork; remade here, before two threads race to do it.
        torch.set_num_threads(1)
        action()
        status = 0
    except SystemExit as error:
        status = error.code if isinstance(error.code, int) else int(error.code is not None)
    except KeyboardInterrupt:
        status = 130
    except BaseException as error:
        sys.stderr.write(repr(error))
    finally:
        os._exit(status)


def content(path: pathlib.Path) -> dict[str, str]:
    """Name → hash of every file; what differs between two runs (times, versions) is left out."""
    files = [path] if path.is_file() else sorted(file for file in path.rglob("*") if file.is_file())
    return {str(file.relative_to(path)): _signature(file) for file in files}


def _signature(file: pathlib.Path) -> str:
    data = file.read_bytes()
    if file.suffix == ".safetensors":  # whose metadata are written in random order
        size = 8 + int.from_bytes(data[:8], "little")
        header = json.dumps(json.loads(data[8:size]), sort_keys=True)
        return hashlib.sha256(header.encode() + data[size:]).hexdigest()
    return hashlib.sha256(data).hexdigest() if file.suffix in (".gguf", ".png") else ""


def leftovers(place: pathlib.Path) -> list[str]:
    """Hidden names, except for the folders from which calibration and distillation go on."""
    return [
        p.name
        for p in place.iterdir()
        if p.name.startswith(".") and not p.name.endswith((".calibration", ".distillation"))
    ]


def on_a_full_disk(action: Callable[[], None]) -> None:
    """No file may grow beyond 4 kB: what the kernel then says is handled like a full disk."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (4096, 4096))
    action()


def trial(root: pathlib.Path, name: str, generator: random.Random, kills: int) -> dict[str, Any]:
    """Kills one command several times, then lets it run."""
    from diffusers_ternary.cli import main

    before, destination, arguments = commands(root)[name]
    place = root / f"of {name}"
    place.mkdir()
    target = place / destination
    tempfile.tempdir = f"{place}"
    sys.argv = ["diffusers-ternary", *(argument.format(target) for argument in arguments)]

    def reset() -> None:
        if destination and (root / before).is_dir():
            shutil.rmtree(target, ignore_errors=True)
            shutil.copytree(root / before, target)
        elif destination:
            shutil.copyfile(root / before, target)

    def state() -> dict[str, str]:
        return content(target) if destination else {}

    reset()
    old = state()
    status, changes = in_child(main, place)
    assert status == 0, (place / "output.txt").read_text()
    new = state()
    assert leftovers(place) == [], leftovers(place)
    reset()
    status, _ = in_child(lambda: on_a_full_disk(main), place)
    full = {
        "status": status,
        "says": (place / "output.txt").read_text(),
        "state": "old" if state() == old else "broken",
        "left": leftovers(place),
    }
    found: list[dict[str, Any]] = []
    for number in range(kills):
        signal_name, moment = SIGNALS[number % len(SIGNALS)], generator.randrange(changes)
        reset()
        before_it = set(leftovers(place))  # of the kill before
        status, _ = in_child(main, place, stop_at=moment, name=signal_name)
        now = state()
        found.append(
            {
                "signal": signal_name,
                "moment": f"{moment} of {changes}",
                "status": status,
                "state": "old" if now == old else "new" if now == new else "broken",
                "left": [name for name in leftovers(place) if name not in before_it],
            }
        )
    status, _ = in_child(main, place)
    return {
        "full": full,
        "kills": found,
        "status": status,
        "says": (place / "output.txt").read_text()[-2000:],
        "complete": state() == new,
        "left": leftovers(place),
        "names": sorted(path.name for path in place.iterdir()),
        "destination": [destination] if destination else [],
    }


def run(root: pathlib.Path, seed: int, kills: int) -> dict[str, dict[str, Any]]:
    """All commands."""
    import transformers  # noqa: F401 - everything that a command imports is imported once

    import diffusers_ternary.calibration
    import diffusers_ternary.distillation
    import diffusers_ternary.evaluation
    import diffusers_ternary.hub
    import diffusers_ternary.interop  # noqa: F401
    from diffusers_ternary.cli import main

    torch.set_num_threads(1)
    sources(root)
    sys.argv = ["diffusers-ternary", "convert", f"{root / 'published'}", f"{root / 'packed'}"]
    assert in_child(main, root)[0] == 0, (root / "output.txt").read_text()
    generator = random.Random(seed)
    return {name: trial(root, name, generator, kills) for name in commands(root)}


if __name__ == "__main__":
    print(json.dumps(run(pathlib.Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))))
