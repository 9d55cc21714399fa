# SPDX-License-Identifier: Apache-2.0
"""Two gloo processes train together: DDP and FSDP2 agree, and a killed FSDP2 run goes on."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from diffusers import FluxTransformer2DModel

from diffusers_ternary.distillation import DistillReport
from integration_tests.support.fresh_process import ROOT


SETTINGS = {"mode": "full", "updates": 4, "checkpoint_every": 2}
DDP = """
    import json, sys
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from integration_tests.support import distillation

    distillation.run(sys.argv[1], **json.loads(sys.argv[2]))
    assert AcceleratorState().distributed_type == DistributedType.MULTI_CPU
"""
# accelerate offers FSDP for accelerators only; told that gloo on the CPU is one, it does the same with it.
FSDP2 = """
    import json, sys
    from accelerate import PartialState
    from accelerate.state import AcceleratorState
    from accelerate.utils import DistributedType
    from integration_tests.support import distillation

    PartialState(cpu=True).distributed_type = DistributedType.MULTI_GPU
    settings = json.loads(sys.argv[2])
    kill_at = settings.pop("kill_at", None)
    if kill_at:
        distillation.run_until_killed(sys.argv[1], kill_at, **settings)
    distillation.run(sys.argv[1], **settings)
    assert AcceleratorState().distributed_type == DistributedType.FSDP
"""
FSDP2_ENVIRONMENT = {
    "ACCELERATE_USE_FSDP": "true",
    "FSDP_VERSION": "2",
    "FSDP_AUTO_WRAP_POLICY": "TRANSFORMER_BASED_WRAP",
    "FSDP_RESHARD_AFTER_FORWARD": "true",
}


def launch(tmp_path: Path, script: str, folder: Path, settings: dict, **environment: str) -> int:
    file = tmp_path / "script.py"
    file.write_text("\n".join(line[4:] for line in script.splitlines()))
    command = [sys.executable, "-m", "torch.distributed.run", "--nproc_per_node=2", "--standalone"]
    result = subprocess.run(
        [*command, str(file), str(folder), json.dumps(settings)],
        env={
            **os.environ,
            "PYTHONPATH": str(ROOT),
            "OMP_NUM_THREADS": "1",
            "ACCELERATE_USE_CPU": "true",
            **environment,
        },
        capture_output=True,
        text=True,
    )
    assert result.returncode == 0 or "kill_at" in settings, result.stderr[-4000:]
    return result.returncode


@pytest.mark.slow
def test_ddp_and_fsdp2_agree_and_resume(tmp_path):
    launch(tmp_path, DDP, tmp_path / "ddp", SETTINGS)
    # Caching and set-up ask the first process's teacher 59 times; the third update is never finished.
    assert launch(tmp_path, FSDP2, tmp_path / "fsdp", {**SETTINGS, "kill_at": 62}, **FSDP2_ENVIRONMENT) != 0
    assert [path.name for path in (tmp_path / "fsdp" / "checkpoints").iterdir()] == ["step-00000002"]
    launch(tmp_path, FSDP2, tmp_path / "fsdp", SETTINGS, **FSDP2_ENVIRONMENT)
    ddp, fsdp = (DistillReport.load_json(tmp_path / name / "distill.json") for name in ("ddp", "fsdp"))
    assert ddp.processes == fsdp.processes == 2
    assert ddp.best_error < 0.5 * ddp.start_error
    for one, other in zip(ddp.history, fsdp.history, strict=True):
        assert one.step == other.step
        assert one.held_out == pytest.approx(other.held_out, rel=1e-4)
    students = [FluxTransformer2DModel.from_pretrained(tmp_path / name / "best") for name in ("ddp", "fsdp")]
    codes = [torch.cat([p.flatten() for n, p in s.named_parameters() if p.dtype == torch.int8]) for s in students]
    assert float((codes[0] == codes[1]).float().mean()) > 0.999
