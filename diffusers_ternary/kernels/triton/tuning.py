# SPDX-License-Identifier: Apache-2.0
"""The fastest plan for a product on this device, measured once and remembered on disk.

The key holds the bucket of M, not M: a new image size or batch never measures again. The file is named after the
device, the versions of torch and Triton and a hash of the kernels' sources: it cannot outlive what it was measured
with.
"""

import contextlib
import dataclasses
import functools
import hashlib
import json
import logging
import math
import os
import re
import tempfile
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import torch
import triton

from .dispatch import PLAIN, Plan, Request, Target, row_bucket


try:
    import fcntl
except ImportError:  # Windows
    fcntl = None  # type: ignore[assignment]
try:
    import msvcrt
except ImportError:
    msvcrt = None  # type: ignore[assignment]


logger = logging.getLogger(__name__)

WARMUP_CALLS = 2  # the first one compiles
MEASURED_CALLS = 5
CYCLES_PER_SECOND = 2e9  # at most; a slower clock sleeps longer
LONGEST_ENQUEUE = 2e-3  # seconds


def cache_folder() -> Path:
    """Folder of the tuning files: `$XDG_CACHE_HOME/diffusers-ternary/triton`, `~/.cache` by default."""
    root = os.environ.get("XDG_CACHE_HOME")
    return (Path(root) if root else Path.home() / ".cache") / "diffusers-ternary" / "triton"


@functools.cache
def kernels_hash() -> str:
    """Hash of the sources beside this file: changed kernels are measured again."""
    digest = hashlib.sha256()
    for source in sorted(Path(__file__).parent.glob("*.py")):
        digest.update(source.read_bytes())
    return digest.hexdigest()[:12]


def cache_file(device_name: str, folder: Path) -> Path:
    """Tuning file of a device."""
    device = re.sub(r"[^A-Za-z0-9]+", "-", device_name).strip("-").lower()
    # torch brings the vendor's products, which are among the plans.
    return folder / f"{device}-torch-{torch.__version__}-triton-{triton.__version__}-{kernels_hash()}.json"


def request_key(request: Request, activation_dtype: str) -> str:
    """What the choice may depend on: the bucket of M, N, K, the layout of scales and the dtypes."""
    fields = (
        f"m{row_bucket(request.rows)}",
        f"n{request.out_features}",
        f"k{request.in_features}",
        "row" if request.per_row else f"g{request.group_size}",
        str(request.dtype).removeprefix("torch."),
        activation_dtype,
    )
    return "-".join(fields)


@contextlib.contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Holds the lock of a folder against other processes; what two write at once would lose one of their plans."""
    # Windows opens no folders, and locks files only.
    descriptor = os.open(folder, os.O_RDONLY) if fcntl else os.open(folder / ".lock", os.O_RDWR | os.O_CREAT)
    try:
        with contextlib.suppress(OSError):  # a network file system without locks, or ten seconds of waiting on Windows
            if fcntl is not None:
                fcntl.flock(descriptor, fcntl.LOCK_EX)
            elif msvcrt is not None:
                msvcrt.locking(descriptor, msvcrt.LK_LOCK, 1)  # type: ignore[attr-defined, unused-ignore]
        yield  # closing the file frees the lock on both
    finally:
        os.close(descriptor)


class PlanCache:
    """Chosen plans by key: a JSON file, read once, written atomically, by one process at a time.

    Args:
        path (`Path`): the file; it need not exist. A file that cannot be read is ignored, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plans = self._read()

    def _read(self) -> dict[str, Plan]:
        try:
            data = json.loads(self.path.read_text(encoding="utf-8"))
            return {key: Plan(**fields) for key, fields in data.items()}
        except FileNotFoundError:
            return {}
        except (OSError, ValueError, TypeError, AttributeError) as error:
            logger.warning("The tuning file %s cannot be read (%s); kernels are measured again.", self.path, error)
            return {}

    def get(self, key: str) -> Plan | None:
        """The plan remembered for a key."""
        return self._plans.get(key)

    def put(self, key: str, plan: Plan, *, on_disk: bool = True) -> None:
        """Remembers a plan; on disk together with what other processes have written meanwhile."""
        if not on_disk:
            self._plans[key] = plan
            return
        self._plans[key] = plan
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with _locked(self.path.parent):
                self._plans = {**self._read(), **self._plans}
                self._write()
        except OSError as error:
            logger.warning("The tuning file %s cannot be written (%s).", self.path, error)

    def _write(self) -> None:
        data = {name: dataclasses.asdict(value) for name, value in sorted(self._plans.items())}
        with tempfile.NamedTemporaryFile(
            "w", encoding="utf-8", dir=self.path.parent, suffix=".tmp", delete=False
        ) as file:
            try:
                json.dump(data, file, indent=1)
                file.close()
                os.replace(file.name, self.path)
            except BaseException:
                Path(file.name).unlink(missing_ok=True)
                raise


@dataclasses.dataclass(frozen=True)
class _Measured:
    """Seconds of a plan; infinite if it could not run."""

    seconds: float
    out_of_memory: bool = False


class Tuner:
    """Chooses a plan: from the cache, by measuring, or the first candidate where measuring is impossible.

    Args:
        target ([`Target`]): the device's properties.
        cache ([`PlanCache`]): what was measured before.
        measure (`Callable`): seconds of a call, as `measure(call)`; raises where a plan cannot run.
    """

    def __init__(self, target: Target, cache: PlanCache, measure: Callable[[Callable[[], Any]], float]) -> None:
        self.target = target
        self.cache = cache
        self.measure = measure

    def choose(
        self,
        request: Request,
        activation_dtype: str,
        plans: tuple[Plan, ...],
        run: Callable[[Plan], Any],
        *,
        may_measure: bool,
        passes: Callable[[Plan], bool] = lambda plan: True,
        disagreement: Callable[[Plan, Plan], str | None] = lambda plan, first: None,
    ) -> Plan:
        """The plan for a request.

        Args:
            request ([`Request`]): the product.
            activation_dtype (`str`): resolved.
            plans (`tuple[Plan, ...]`): the candidates, the default first.
            run (`Callable`): computes the product with a plan.
            may_measure (`bool`): `False` while a CUDA graph is captured, where nothing can be timed.
            passes (`Callable`): whether a plan is known to be right on the device.
            disagreement (`Callable`): what is wrong with the result of a plan, given a plan of which nothing is.

        Returns:
            [`Plan`]: one of `plans`, or `PLAIN` where none of them works.
        """
        key = request_key(request, activation_dtype)
        known = self.cache.get(key)
        # A remembered plan that is not a candidate was edited by hand.
        if known in plans and passes(known):
            return known
        # Nothing is gained by trying them all where none is measured.
        right = (plan for plan in plans if passes(plan))
        if len(plans) == 1 or not may_measure:
            return next(right, PLAIN)
        measured = {plan: self._measured(plan, run) for plan in right}
        order = sorted(
            (plan for plan in measured if math.isfinite(measured[plan].seconds)), key=lambda p: measured[p].seconds
        )
        if not order:
            return PLAIN
        first = next(plan for plan in measured if plan in order)
        best = next(plan for plan in order if plan == first or self._agrees(plan, first, disagreement))
        logger.info("Tuned %s: %s, %.1f us.", key, best, measured[best].seconds * 1e6)
        # What did not fit beside another model may fit tomorrow.
        self.cache.put(key, best, on_disk=not any(each.out_of_memory for each in measured.values()))
        return best

    def _agrees(self, plan: Plan, first: Plan, disagreement: Callable[[Plan, Plan], str | None]) -> bool:
        problem = disagreement(plan, first)
        if problem is not None:
            logger.warning("%s is left out for this product: it differs from %s by %s.", plan, first, problem)
        return problem is None

    def _measured(self, plan: Plan, run: Callable[[Plan], Any]) -> _Measured:
        try:
            return _Measured(self.measure(lambda: run(plan)))
        except torch.OutOfMemoryError:
            logger.info("%s needs more memory than is free.", plan)
            return _Measured(float("inf"), out_of_memory=True)
        except Exception as error:
            # Of every kind: Triton's own (CompilationError, OutOfResources, PTXASError) have no base in common.
            logger.warning("%s fails for this product and is left out: %s: %s", plan, type(error).__name__, error)
            return _Measured(float("inf"))


def measure_on_stream(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A measure of the device's time, by events on its current stream; waits for that stream only.

    The device sleeps while the host enqueues all calls, so that launches which take longer than the kernels (most of
    SANA's) are not what is compared.
    """
    module = torch.get_device_module(device.type)
    sleep = getattr(module, "_sleep", None)  # in cycles; XPU has none

    def measure(call: Callable[[], Any]) -> float:
        for _ in range(WARMUP_CALLS - 1):
            call()
        module.current_stream(device).synchronize()
        begin = time.perf_counter()
        call()
        host = time.perf_counter() - begin  # seconds to enqueue a call
        events = [(module.Event(enable_timing=True), module.Event(enable_timing=True)) for _ in range(MEASURED_CALLS)]
        if sleep is not None:
            sleep(int(2 * MEASURED_CALLS * min(host, LONGEST_ENQUEUE) * CYCLES_PER_SECOND))
        for start, end in events:
            start.record()
            call()
            end.record()
        events[-1][1].synchronize()
        return min(start.elapsed_time(end) for start, end in events) / 1e3

    return measure
