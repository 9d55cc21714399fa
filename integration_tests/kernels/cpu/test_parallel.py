# SPDX-License-Identifier: Apache-2.0
"""Threads of the CPU kernels: a stop by the user in the middle of a layer, and how many threads there are."""

import signal
import subprocess
import sys

import pytest

from diffusers_ternary.kernels.cpu import native


pytestmark = [
    pytest.mark.skipif(not native.variants(), reason="the package was installed without its compiled library"),
    pytest.mark.skipif(sys.platform == "win32", reason="SIGINT cannot be sent to one process"),
]

# Rows that the threads share, columns that they share, and the dense weight of the float32 path. The kernels alone:
# importing the hosts takes longer than the tests.
CHILD = """
import signal
from pathlib import Path

import torch
from diffusers_ternary.kernels import cpu
from diffusers_ternary.kernels.operands import PackedWeight

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored in what a shell starts in the background
torch.manual_seed(0)
torch.set_num_threads(8)


def make(rows, columns, in_features, kernel):
    x, codes = torch.randn(rows, in_features), torch.randint(-128, 128, (columns, in_features // 4), dtype=torch.int8)
    weight = PackedWeight(codes, torch.rand(columns, in_features // 64).half(), None, in_features, 64)
    return lambda: kernel(x, weight, None)


layers = [
    make(2400, 1024, 512, cpu.linear_int8),
    make(100, 4096, 2048, cpu.linear_int8),
    make(1, 4096, 2048, cpu.linear_exact),
]
expected = [layer() for layer in layers]

for count in [*range(2, 17), 5, 16, 3]:
    torch.set_num_threads(count)
    assert torch.equal(layers[1](), expected[1])
if Path("/proc/self/task").exists():
    names = [path.read_text() for path in Path("/proc/self/task").glob("*/comm")]
    print("threads", names.count("ternary\\n"), flush=True)

torch.set_num_threads(8)
overwritten = different = 0
for i in range(24):
    try:
        print("running", flush=True)
        while True:
            y = layers[i % 3]()
    except KeyboardInterrupt:
        pass
    y = None
    others = [torch.full(expected[i % 3].shape, 7.0) for _ in range(2)]  # they get the same memory again
    again = layers[i % 3]()  # as long as a thread that was left behind would need
    overwritten += any(bool((other != 7.0).any()) for other in others)
    different += not torch.equal(again, expected[i % 3])
print("overwritten", overwritten, flush=True)
print("different", different, flush=True)
print("running", flush=True)
while True:
    layers[0]()
"""


@pytest.fixture(scope="module")
def interrupted():
    """A process that gets SIGINT 25 times in the middle of a layer: its status, what it counted, its errors."""
    counted = {}
    command = [sys.executable, "-c", CHILD]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True) as child:
        for line in child.stdout:
            if line == "running\n":
                child.send_signal(signal.SIGINT)
            else:
                name, value = line.split()
                counted[name] = int(value)
        errors = child.stderr.read()
        return child.wait(timeout=60), counted, errors


def test_interrupted_layer_leaves_no_thread_writing(interrupted):
    _, counted, errors = interrupted
    assert counted.get("overwritten") == 0, errors
    assert counted.get("different") == 0, errors


def test_process_that_is_stopped_in_a_layer_exits(interrupted):
    status, _, errors = interrupted
    assert "KeyboardInterrupt" in errors
    assert status in (-signal.SIGINT, 130), errors


def test_other_numbers_of_threads_in_turn_leave_no_threads_behind(interrupted):
    _, counted, errors = interrupted
    if "threads" not in counted:
        pytest.skip("threads are counted in /proc")
    assert counted["threads"] == 15, errors
