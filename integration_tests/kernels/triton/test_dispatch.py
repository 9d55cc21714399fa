# SPDX-License-Identifier: Apache-2.0
"""The choice of kernels: dispatch as a pure function, the tuner and its file, and what importing must not do."""

import dataclasses
import logging
import math
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from diffusers_ternary.kernels.triton import dispatch
from diffusers_ternary.kernels.triton.dispatch import Plan, Request, Target, candidates, resolve_activation_dtype
from diffusers_ternary.kernels.triton.weights import group_mode


A100 = Target("cuda", 80, 163 * 1024)
A10 = Target("cuda", 86, 99 * 1024)
RTX_4090 = Target("cuda", 89, 99 * 1024)
H200 = Target("cuda", 90, 227 * 1024)
MI300 = Target("hip", "gfx942", 64 * 1024)
MI210 = Target("hip", "gfx90a", 64 * 1024)
ARC = Target("xpu", "xpu", 64 * 1024)
T4 = Target("cuda", 75, 64 * 1024)
FLUX = Request(4096, 3072, 3072, 128, False, torch.bfloat16, "auto")


def ask(**changes: object) -> Request:
    return dataclasses.replace(FLUX, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("target", "expected"),
    [
        (A100, "int8"),
        (A10, "int8"),
        (RTX_4090, "int8"),
        (H200, "float8_e4m3fn"),
        (MI300, "int8"),
        (MI210, "none"),
        (ARC, "none"),
    ],
)
def test_auto_takes_the_fastest_of_the_device(target, expected):
    assert resolve_activation_dtype(target, FLUX) == expected


@pytest.mark.parametrize("rows", [1, 16, 255])
def test_auto_does_not_quantize_few_rows(rows):
    assert resolve_activation_dtype(H200, ask(rows=rows)) == "none"


def test_auto_does_not_quantize_small_layers():
    assert resolve_activation_dtype(H200, ask(out_features=256, in_features=256)) == "none"


def test_auto_keeps_the_error_bound(monkeypatch):
    monkeypatch.setattr(dispatch, "AUTO_ERROR_BOUND", 0.02)
    assert resolve_activation_dtype(H200, FLUX) == "int8"
    monkeypatch.setattr(dispatch, "AUTO_ERROR_BOUND", 0.0)
    assert resolve_activation_dtype(H200, FLUX) == "none"


@pytest.mark.parametrize("target", [A100, H200, MI300, ARC])
@pytest.mark.parametrize("asked", ["none", "int8"])
def test_what_is_asked_is_done(target, asked):
    assert resolve_activation_dtype(target, ask(activation_dtype=asked)) == asked


@pytest.mark.parametrize(("target", "expected"), [(A100, "none"), (MI300, "none"), (RTX_4090, "float8_e4m3fn")])
def test_float8_where_it_exists(target, expected):
    assert resolve_activation_dtype(target, ask(activation_dtype="float8_e4m3fn")) == expected


def test_int8_is_refused_where_the_sum_could_overflow():
    assert resolve_activation_dtype(A100, ask(activation_dtype="int8", in_features=300_000)) == "none"


@pytest.mark.parametrize(
    ("target", "activation_dtype", "rows", "path"),
    [
        (H200, "none", 1, "gemv"),
        (H200, "none", 16, "gemv"),
        (H200, "none", 17, "fused"),
        (H200, "none", 4096, "library"),
        (H200, "float8_e4m3fn", 512, "fused"),
        (H200, "float8_e4m3fn", 4096, "library"),
        (A100, "int8", 512, "fused"),
        (A100, "int8", 4096, "dense"),
        (RTX_4090, "int8", 4608, "dense"),
        (MI300, "int8", 4096, "dense"),
        (ARC, "none", 64, "fused"),
    ],
)
def test_first_plan(target, activation_dtype, rows, path):
    assert candidates(target, ask(rows=rows), activation_dtype)[0].path == path


@pytest.mark.parametrize("target", [A100, A10, RTX_4090, H200, MI300, ARC])
@pytest.mark.parametrize("rows", [1, 9, 16, 17, 64, 300, 1024, 4096, 100_000])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_every_plan_fits_the_device(target, rows, dtype):
    for activation_dtype in ("none", *target.activation_dtypes):
        plans = candidates(target, ask(rows=rows, dtype=dtype), activation_dtype)
        assert plans
        assert len(set(plans)) == len(plans)
        x_bytes = dtype.itemsize if activation_dtype == "none" else 1
        assert all(plan.shared_memory(x_bytes) <= target.shared_memory for plan in plans)


@pytest.mark.parametrize(
    ("in_features", "group_size", "block_k", "mode"),
    [
        (3072, 128, 128, 1),  # a plane of 768 columns is six groups
        (3072, 128, 64, 1),
        (3072, 64, 128, 2),
        (2240, 128, 64, 2),  # a plane of 560 columns ends inside a group
        (2240, 560, 64, 1),  # a plane is a group
        (2240, 2240, 128, 1),
        (7, 7, 64, 1),
        (7, 1, 1, 1),
    ],
)
def test_group_mode(in_features, group_size, block_k, mode):
    assert group_mode(in_features, group_size, block_k) == mode


def test_sums_take_group_scales_where_that_is_shorter():
    def scaled(target: Target, **changes: object) -> set[bool]:
        plans = candidates(target, ask(**changes), "int8")
        return {plan.scale_sums for plan in plans if plan.path in ("gemv", "fused")}

    assert scaled(A100, rows=512) == scaled(H200, rows=1) == scaled(MI300, rows=1) == {True}
    assert scaled(H200, rows=512) == scaled(A100, rows=512, per_row=True) == {False}


@pytest.mark.parametrize("rows", [64, 1024])
def test_groups_that_end_inside_blocks_are_unpacked_first(rows):
    for activation_dtype in ("none", "int8"):
        plans = candidates(A100, ask(rows=rows, in_features=2240), activation_dtype)
        assert {plan.path for plan in plans} <= {"dense", "library"}


def test_long_float8_sums_have_exact_twins_where_the_matrix_unit_drops_digits():
    def exact(target: Target, k: int, activation_dtype: str, dtype: torch.dtype = torch.bfloat16) -> list[str]:
        plans = candidates(target, ask(in_features=k, dtype=dtype), activation_dtype)
        return [str(plan) for plan in plans if plan.exact]

    both = ["library, exact sums", "dense 128x128x128, exact sums"]
    assert exact(H200, 15360, "float8_e4m3fn") == exact(H200, 12288, "float8_e4m3fn") == both
    assert exact(H200, 15360, "float8_e4m3fn", torch.float16) == both[1:]
    assert exact(H200, 3072, "float8_e4m3fn") == exact(H200, 15360, "int8") == exact(RTX_4090, 15360, "float8_e4m3fn")
    assert exact(H200, 15360, "none") == []


@pytest.mark.parametrize("target", [A100, H200, MI300])
@pytest.mark.parametrize(("in_features", "group_size"), [(3072, 128), (2240, 128), (3072, 64), (15360, 128)])
def test_scales_of_elements_are_gathered_in_small_blocks_only(target, in_features, group_size):
    """Wide blocks take thousands of instructions and half a minute to compile."""
    for rows in (1, 12, 40, 300, 1024):
        for activation_dtype in ("none", "int8"):
            request = ask(rows=rows, in_features=in_features, group_size=group_size)
            for plan in candidates(target, request, activation_dtype):
                if plan.path in ("gemv", "fused") and group_mode(in_features, group_size, plan.block_k) == 2:
                    assert (plan.path, plan.block_k <= 64) == ("gemv", True)


def test_float32_is_exact_so_the_library_multiplies():
    assert candidates(H200, ask(dtype=torch.float32), "none") == (Plan("library"),)


def test_library_products_are_not_asked_for_shapes_they_refuse():
    paths = {plan.path for plan in candidates(H200, ask(out_features=3073), "int8")}
    assert "library" not in paths
    paths = {plan.path for plan in candidates(H200, ask(dtype=torch.float16), "float8_e4m3fn")}
    assert "library" not in paths


def test_old_cards_are_not_supported():
    assert not T4.supported
    assert A100.supported


BUCKETS = [(1, 8), (8, 8), (9, 16), (16, 16), (17, 32), (4096, 4096), (4097, 8192), (10**6, 16384)]


@pytest.mark.parametrize("target", [A100, H200, MI300])
@pytest.mark.parametrize("per_row", [False, True])
def test_a_bucket_has_the_same_candidates_for_all_its_rows(target, per_row):
    """Else a plan that was measured for one number of rows is none for another, and measuring never ends."""
    for activation_dtype in ("none", *target.activation_dtypes):
        offered: dict[int, set[Plan]] = {}
        for rows in [*range(1, 70), 255, 256, 257, 511, 512, 513, 1024, 1025, 1535, 1536, 2048, 5000]:
            plans = set(candidates(target, ask(rows=rows, per_row=per_row), activation_dtype))
            assert offered.setdefault(dispatch.row_bucket(rows), plans) == plans, rows


@pytest.mark.parametrize(("rows", "bucket"), BUCKETS)
def test_row_bucket(rows, bucket):
    assert dispatch.row_bucket(rows) == bucket


def test_importing_the_package_imports_no_kernel():
    """Triton itself is imported by torch._dynamo, and so by diffusers, where it is installed."""
    code = (
        "import sys, diffusers_ternary, diffusers_ternary.kernels.ops, diffusers_ternary.kernels.triton as k;"
        "assert k.linear;"
        "loaded = {name.removeprefix('diffusers_ternary.kernels.triton.') for name in sys.modules};"
        "assert not loaded & {'devices', 'launch', 'product', 'tuning', 'fused'}, loaded"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_dispatch_and_the_entry_point_do_without_triton():
    code = (
        "import sys; sys.modules['triton'] = None; import diffusers_ternary.kernels.triton.dispatch;"
        "from diffusers_ternary.kernels.triton import unavailable_reason as why;"
        "assert why('cuda') == 'triton is not installed', why('cuda')"
    )
    subprocess.run([sys.executable, "-c", code], check=True)


def test_unsupported_devices_say_why():
    pytest.importorskip("triton")
    from diffusers_ternary.kernels.triton import unavailable_reason

    assert "no backend" in str(unavailable_reason("mps"))


class TestTuner:
    """The tuner with a stopwatch that the test sets."""

    PLANS = (Plan("library"), Plan("fused", 128, 128, 64), Plan("fused", 64, 64, 64))

    @pytest.fixture
    def tuning(self):
        pytest.importorskip("triton")
        from diffusers_ternary.kernels.triton import tuning

        return tuning

    def tuner(self, tuning, path, seconds):
        runs = []

        def run(plan):
            runs.append(plan)
            return seconds[plan]

        return tuning.Tuner(H200, tuning.PlanCache(path), lambda call: call()), run, runs

    def test_takes_the_fastest_and_remembers_it_for_the_bucket(self, tuning, tmp_path):
        path = tmp_path / "new" / "h200.json"
        tuner, run, runs = self.tuner(tuning, path, dict(zip(self.PLANS, (3.0, 1.0, 2.0), strict=True)))
        chosen = tuner.choose(ask(rows=4000), "none", self.PLANS, run, may_measure=True)
        assert chosen == self.PLANS[1]
        assert len(runs) == 3
        assert tuner.choose(ask(rows=3001), "none", self.PLANS, run, may_measure=True) == chosen
        again, run, runs = self.tuner(tuning, path, {})
        assert again.choose(ask(rows=2500), "none", self.PLANS, run, may_measure=True) == chosen
        assert runs == []

    def test_keys_differ_where_the_choice_may(self, tuning):
        requests = [FLUX, ask(rows=64), ask(out_features=9), ask(in_features=9), ask(per_row=True)]
        requests += [ask(group_size=64), ask(dtype=torch.float16)]
        assert len({tuning.request_key(request, "none") for request in requests}) == len(requests)

    def test_measures_nothing_while_a_graph_is_captured(self, tuning, tmp_path):
        tuner, run, runs = self.tuner(tuning, tmp_path / "a.json", {})
        assert tuner.choose(FLUX, "none", self.PLANS, run, may_measure=False) == self.PLANS[0]
        assert runs == []
        assert not (tmp_path / "a.json").exists()

    def test_passes_over_a_plan_that_cannot_run(self, tuning, tmp_path):
        tuner, _, _ = self.tuner(tuning, tmp_path / "a.json", {})

        def run(plan):
            if plan.path == "fused":
                raise RuntimeError("out of resource: shared memory")
            return 1.0

        assert tuner.choose(FLUX, "none", self.PLANS, run, may_measure=True) == self.PLANS[0]

    def test_passes_over_errors_of_triton_which_have_no_base_in_common(self, tuning, tmp_path, caplog):
        from triton.compiler.errors import CompilationError
        from triton.runtime.errors import OutOfResources, PTXASError

        errors = [CompilationError("", None, "no"), OutOfResources(2, 1, "shared memory"), PTXASError("no")]
        assert not any(isinstance(error, RuntimeError) for error in errors[:2])
        plans = (*self.PLANS, Plan("gemv", 8, 16, 64))
        raising = dict(zip(plans[:3], errors, strict=True))
        tuner, _, _ = self.tuner(tuning, tmp_path / "a.json", {})

        def run(plan):
            if plan in raising:
                raise raising[plan]
            return 1.0

        assert tuner.choose(FLUX, "none", plans, run, may_measure=True) == plans[3]
        assert [type(e).__name__ in r.message for e, r in zip(errors, caplog.records, strict=True)] == [True] * 3

    def test_stores_nothing_where_nothing_could_be_measured(self, tuning, tmp_path):
        path = tmp_path / "a.json"
        tuner, run, _ = self.tuner(tuning, path, dict.fromkeys(self.PLANS, math.inf))
        for _ in range(2):
            assert tuner.choose(FLUX, "none", self.PLANS, run, may_measure=True) == dispatch.PLAIN
        assert not path.exists()
        assert tuner.cache.get(tuning.request_key(FLUX, "none")) is None

    @pytest.mark.parametrize("may_measure", [False, True])
    def test_takes_no_plan_that_is_wrong(self, tuning, tmp_path, may_measure):
        tuner, run, runs = self.tuner(tuning, tmp_path / "a.json", dict(zip(self.PLANS, (1.0, 3.0, 2.0), strict=True)))
        wrong = [self.PLANS[0], self.PLANS[2]]
        options = {"may_measure": may_measure, "passes": lambda plan: plan not in wrong}
        assert tuner.choose(FLUX, "none", self.PLANS, run, **options) == self.PLANS[1]
        assert runs == ([self.PLANS[1]] if may_measure else [])
        # Nor one that another process has found to be the fastest.
        tuner.cache.put(tuning.request_key(FLUX, "none"), wrong[1])
        assert tuner.choose(FLUX, "none", self.PLANS, run, **options) == self.PLANS[1]
        wrong.append(self.PLANS[1])
        assert tuner.choose(FLUX, "none", self.PLANS, run, **options) == dispatch.PLAIN

    def test_the_winner_agrees_with_the_first_plan(self, tuning, tmp_path, caplog):
        seconds = dict(zip(self.PLANS, (3.0, 1.0, 2.0), strict=True))
        tuner, run, _ = self.tuner(tuning, tmp_path / "a.json", seconds)
        asked = []

        def disagreement(plan, first):
            asked.append((plan, first))
            return "relative error 1.2" if plan == self.PLANS[1] else None

        chosen = tuner.choose(FLUX, "none", self.PLANS, run, may_measure=True, disagreement=disagreement)
        assert chosen == self.PLANS[2]
        assert asked == [(self.PLANS[1], self.PLANS[0]), (self.PLANS[2], self.PLANS[0])]
        (record,) = caplog.records
        assert "fused 128x128x64 is left out" in record.message
        assert "relative error 1.2" in record.message

    def test_what_ran_out_of_memory_is_not_remembered_on_disk(self, tuning, tmp_path):
        path = tmp_path / "a.json"
        tuner, _, _ = self.tuner(tuning, path, {})
        runs = []

        def run(plan):
            runs.append(plan)
            if plan.path == "library":
                raise torch.OutOfMemoryError("its scratch does not fit today")
            return 2.0 if plan == self.PLANS[1] else 1.0

        for _ in range(2):
            assert tuner.choose(FLUX, "none", self.PLANS, run, may_measure=True) == self.PLANS[2]
        assert len(runs) == len(self.PLANS)
        assert not path.exists()

    @pytest.mark.parametrize("content", ["", "{", "[]", '{"a": 1}', '{"a": {"tile": 3}}', "\x00\x01"])
    def test_a_corrupt_file_is_ignored_with_a_warning(self, tuning, tmp_path, caplog, content):
        path = tmp_path / "a.json"
        path.write_text(content)
        with caplog.at_level(logging.WARNING):
            tuner, run, _ = self.tuner(tuning, path, dict.fromkeys(self.PLANS, 1.0))
        assert "cannot be read" in caplog.text
        tuner.choose(FLUX, "none", self.PLANS, run, may_measure=True)
        assert tuning.PlanCache(path).get(tuning.request_key(FLUX, "none")) == self.PLANS[0]

    def test_a_file_that_cannot_be_written_is_no_error(self, tuning, tmp_path, caplog):
        (tmp_path / "file").write_text("")
        tuner, run, _ = self.tuner(tuning, tmp_path / "file" / "a.json", dict.fromkeys(self.PLANS, 1.0))
        assert tuner.choose(FLUX, "none", self.PLANS, run, may_measure=True) == self.PLANS[0]
        assert "cannot be written" in caplog.text

    def test_processes_do_not_lose_each_others_plans(self, tuning, tmp_path):
        path = tmp_path / "a.json"
        first, second = tuning.PlanCache(path), tuning.PlanCache(path)
        first.put("a", self.PLANS[0])
        second.put("b", self.PLANS[1])
        assert tuning.PlanCache(path).get("a") == self.PLANS[0]
        assert tuning.PlanCache(path).get("b") == self.PLANS[1]
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

    def test_processes_that_tune_at_once_lose_nothing(self, tuning, tmp_path):
        program = (
            "import sys; from pathlib import Path;"
            "from diffusers_ternary.kernels.triton.tuning import PlanCache, Plan;"
            "cache = PlanCache(Path(sys.argv[1]));"
            "[cache.put(f'{sys.argv[2]}-{i}', Plan('fused', i)) for i in range(40)]"
        )
        path = tmp_path / "a.json"
        started = [subprocess.Popen([sys.executable, "-c", program, str(path), name]) for name in "ab"]
        assert [process.wait() for process in started] == [0, 0]
        cache = tuning.PlanCache(path)
        assert [cache.get(f"{name}-{i}") for name in "ab" for i in range(40)] == 2 * [
            Plan("fused", i) for i in range(40)
        ]
        assert [p.name for p in tmp_path.iterdir()] == ["a.json"]

    def test_the_file_is_named_after_the_device_the_versions_and_the_kernels(self, tuning):
        import triton

        path = tuning.cache_file("NVIDIA H200 (SXM)", Path("/x"))
        versions = f"torch-{torch.__version__}-triton-{triton.__version__}"
        assert path.name == f"nvidia-h200-sxm-{versions}-{tuning.kernels_hash()}.json"

    def test_a_bucket_is_measured_once_whatever_the_rows(self, tuning, tmp_path):
        tuner, run, runs = self.tuner(tuning, tmp_path / "a.json", dict.fromkeys(self.PLANS, 1.0))
        for rows in range(2049, 4097, 64):
            tuner.choose(ask(rows=rows), "none", self.PLANS, run, may_measure=True)
        assert len(runs) == len(self.PLANS)


def test_the_choice_of_auto_is_logged_once(caplog):
    product = pytest.importorskip("diffusers_ternary.kernels.triton.product")
    product._resolve.cache_clear()
    product._log_choice.cache_clear()
    with caplog.at_level(logging.INFO, "diffusers_ternary"):
        for rows in (1000, 2000, 3000):
            assert product._resolve(A100, ask(rows=rows))[0] == "int8"
    assert [record.message for record in caplog.records] == [
        "Activations on cuda 80: activation_dtype='auto' uses 'int8'."
    ]
