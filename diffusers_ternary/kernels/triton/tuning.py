# SPDX-License-Identifier: Apache-2.0
"""The fastest plan for a product on this device, measured once and remembered on disk.

The key holds the bucket of M, not M: a new image size or batch never measures again. The file is named after the
device, the versions of torch and Triton and a hash of the kernels' sources: it cannot outlive what it was measured
with.
"""

import dataclasses
import functools
import hashlib
import json
import logging
import os
import re
import tempfile
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import triton

from .dispatch import Plan, Request, Target, row_bucket


logger = logging.getLogger(__name__)

WARMUP_CALLS = 2  # the first one compiles
MEASURED_CALLS = 5


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


class PlanCache:
    """Chosen plans by key: a JSON file, read once, written atomically.

    Args:
        path (`Path`): the file; it need not exist. A file that cannot be read is ignored, with a warning.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._plans = self._read()

    def _read(self) -> dict[str, Plan]:
        try:
            data = json.loads(self.path.read_text())
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
        self._plans = {**self._read(), **self._plans, key: plan}
        data = {name: dataclasses.asdict(value) for name, value in sorted(self._plans.items())}
        temporary = None
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True)
            with tempfile.NamedTemporaryFile("w", dir=self.path.parent, suffix=".tmp", delete=False) as file:
                temporary = file.name
                json.dump(data, file, indent=1)
            os.replace(temporary, self.path)
        except OSError as error:
            if temporary is not None:
                Path(temporary).unlink(missing_ok=True)
            logger.warning("The tuning file %s cannot be written (%s).", self.path, error)


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
    ) -> Plan:
        """The plan for a request.

        Args:
            request ([`Request`]): the product.
            activation_dtype (`str`): resolved.
            plans (`tuple[Plan, ...]`): the candidates, the default first.
            run (`Callable`): computes the product with a plan.
            may_measure (`bool`): `False` while a CUDA graph is captured, where nothing can be timed.
        """
        if len(plans) == 1:
            return plans[0]
        key = request_key(request, activation_dtype)
        known = self.cache.get(key)
        # A remembered plan that is no candidate was edited by hand or meant for another row count of the bucket.
        if known in plans:
            return known
        if not may_measure:
            return plans[0]
        measured = {plan: self._measured(plan, run) for plan in plans}
        best = min(plans, key=lambda plan: measured[plan].seconds)
        logger.info("Tuned %s: %s, %.1f us.", key, best, measured[best].seconds * 1e6)
        # What did not fit beside another model may fit tomorrow.
        self.cache.put(key, best, on_disk=not any(each.out_of_memory for each in measured.values()))
        return best

    def _measured(self, plan: Plan, run: Callable[[Plan], Any]) -> _Measured:
        try:
            return _Measured(self.measure(lambda: run(plan)))
        except torch.OutOfMemoryError:
            logger.info("%s needs more memory than is free.", plan)
            return _Measured(float("inf"), out_of_memory=True)
        except (triton.runtime.errors.OutOfResources, triton.runtime.errors.PTXASError, RuntimeError) as error:
            # A library that refuses a shape, or a tile that does not fit, is no candidate; a sick device raises
            # again from the plan that is chosen.
            logger.info("%s cannot run here: %s", plan, error)
            return _Measured(float("inf"))


def measure_on_stream(device: torch.device) -> Callable[[Callable[[], Any]], float]:
    """A measure with the device's events on its current stream; waits for that stream only."""
    module = torch.get_device_module(device.type)

    def measure(call: Callable[[], Any]) -> float:
        for _ in range(WARMUP_CALLS):
            call()
        times = []
        for _ in range(MEASURED_CALLS):
            start, end = module.Event(enable_timing=True), module.Event(enable_timing=True)
            start.record()
            call()
            end.record()
            end.synchronize()
            times.append(start.elapsed_time(end) / 1e3)
        return min(times)

    return measure
