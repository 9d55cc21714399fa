# SPDX-License-Identifier: Apache-2.0
"""Threads of the CPU kernels: a stop by the user in the middle of a layer, and how many threads there are."""

import signal
import subprocess
import sys
from pathlib import Path

import pytest

from diffusers_ternary.kernels.cpu import native


pytestmark = pytest.mark.skipif(not native.variants(), reason="the package was installed without its compiled library")

LAYER = """
import torch
from diffusers_ternary import TernaryConfig, quantize
from torch import nn

torch.manual_seed(0)
torch.set_grad_enabled(False)
torch.set_num_threads(8)
layer = quantize(nn.Sequential({module}), TernaryConfig(overrides={{"*": "ternary"}}, activation_dtype="{dtype}"))
x = torch.randn({shape})
expected = layer(x)
size = expected.shape
"""

INTERRUPTED = """
for _ in range({count}):
    try:
        print("running", flush=True)
        while True:
            y = layer(x)
    except KeyboardInterrupt:
        pass
    y = None
    others = [torch.full(size, 7.0) for _ in range(2)]  # the allocator hands the same memory out again
    again = layer(x)  # as long as a thread that was left behind would need
    assert all(bool((other == 7.0).all()) for other in others), "a stopped layer wrote into somebody else's tensor"
    assert torch.equal(again, expected), "a stopped layer spoilt the next one"
print("finished", flush=True)
"""


# The dense float32 path decodes on the threads as well; a convolution goes through the same kernels.
@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
@pytest.mark.parametrize(
    ("module", "shape", "dtype"),
    [
        ("nn.Linear(512, 1024)", "2400, 512", "int8"),  # threads share the rows
        ("nn.Linear(2048, 4096)", "100, 2048", "int8"),  # threads share the columns
        ("nn.Linear(2048, 4096)", "1, 2048", "none"),
        ("nn.Conv2d(512, 512, 1)", "1, 512, 48, 48", "int8"),
    ],
)
def test_interrupted_layer_leaves_no_thread_writing(module, shape, dtype):
    count = 8
    script = LAYER.format(module=module, shape=shape, dtype=dtype) + INTERRUPTED.format(count=count)
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        for line in child.stdout:
            if line == "running\n":
                child.send_signal(signal.SIGINT)
        errors = child.stderr.read()
        assert child.wait(timeout=60) == 0, errors
    assert line == "finished\n", errors


@pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process")
def test_process_that_is_stopped_in_a_layer_exits():
    script = LAYER.format(module="nn.Linear(512, 1024)", shape="2400, 512", dtype="int8")
    script += 'print("running", flush=True)\nwhile True:\n    layer(x)\n'
    with subprocess.Popen(
        [sys.executable, "-c", script], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    ) as child:
        assert child.stdout.readline() == "running\n", child.stderr.read()
        child.send_signal(signal.SIGINT)
        _, errors = child.communicate(timeout=60)
    assert "KeyboardInterrupt" in errors
    assert child.returncode in (-signal.SIGINT, 130), errors


@pytest.mark.skipif(not Path("/proc/self/task").exists(), reason="threads are counted in /proc")
def test_other_numbers_of_threads_in_turn_leave_no_threads_behind():
    script = LAYER.format(module="nn.Linear(512, 1024)", shape="100, 512", dtype="int8")
    script += """
from pathlib import Path
for count in [*range(2, 17), 5, 16, 3]:
    torch.set_num_threads(count)
    assert torch.equal(layer(x), expected)
print(sum(path.read_text() == "ternary\\n" for path in Path("/proc/self/task").glob("*/comm")))
"""
    result = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120)
    assert result.returncode == 0, result.stderr
    assert int(result.stdout) == 15
