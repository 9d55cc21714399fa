# SPDX-License-Identifier: Apache-2.0
"""A pipeline call that stops after every step of its scheduler."""

import functools
import threading
from typing import Any

import torch

from ..rollouts import DenoiserCall, RolloutBatch, prepared, recorded_calls
from .recording import TeacherRecorder


class _Abandoned(BaseException):
    """Ends a pipeline call that is no longer wanted. No `Exception`, so that no pipeline catches it."""


class SteppedCall:
    """A pipeline call that runs one scheduler step at a time.

    Pipelines are loops without a way out, so the call has a thread of its own, and exactly one of the two threads
    runs at any time: the pipeline's stops in `scheduler.step` and waits to be advanced.

    Args:
        recorder ([`TeacherRecorder`]): of a pipeline whose scheduler nobody else uses.
        batch ([`RolloutBatch`]): prompts to draw.
    """

    def __init__(self, recorder: TeacherRecorder, batch: RolloutBatch) -> None:
        self.batch = batch
        self.calls: list[DenoiserCall] = []
        self.latents: torch.Tensor | None = None
        self.steps = 0
        self._recorder = recorder
        self._error: BaseException | None = None
        self._abandoned = False
        self._go, self._stopped = threading.Semaphore(0), threading.Semaphore(0)
        # A daemon: a program that ends in the middle of a trajectory is to end.
        self._thread = threading.Thread(target=self._run, args=(torch.get_num_threads(),), daemon=True)
        self._thread.start()

    @property
    def finished(self) -> bool:
        """Whether the last step is done."""
        return self.latents is not None

    def advance(self) -> None:
        """Runs to the end of the next step; after the last one, to the end of the call."""
        assert not self.finished
        self._go.release()
        self._stopped.acquire()
        if self._error is not None:
            raise self._error

    def close(self) -> None:
        """Abandons the call."""
        if self._thread.is_alive():
            self._abandoned = True
            self._go.release()
            self._thread.join()

    def _run(self, threads: int) -> None:
        torch.set_num_threads(threads)  # a setting of each thread
        self._go.acquire()
        scheduler = self._recorder.pipeline.scheduler
        original = scheduler.step

        @functools.wraps(original)  # pipelines look at its signature
        def step(*args: Any, **kwargs: Any) -> Any:
            result = original(*args, **kwargs)
            self.steps += 1
            self._wait()
            return result

        try:
            if self._abandoned:
                return
            scheduler.step = step
            with prepared(self._recorder.pipeline), recorded_calls(self._recorder.denoiser) as self.calls:
                self.latents = self._recorder.draw(self.batch)
        except _Abandoned:
            return
        except BaseException as error:  # raised where the caller waits
            self._error = error
        finally:
            vars(scheduler).pop("step", None)
            self._stopped.release()

    def _wait(self) -> None:
        self._stopped.release()
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
