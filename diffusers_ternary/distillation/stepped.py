# SPDX-License-Identifier: Apache-2.0
"""A pipeline call that stops after every step of its scheduler."""

import threading

import torch

from ..rollouts import DenoiserCall, RolloutBatch, prepared, recorded_calls
from .recording import TeacherRecorder, watched_steps


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
        recorder = self._recorder
        try:
            self._wait()
            with (
                watched_steps(recorder.pipeline.scheduler, self._step_done),
                prepared(recorder.pipeline),
                recorded_calls(recorder.denoiser) as self.calls,
            ):
                self.latents = recorder.draw(self.batch)
        except _Abandoned:
            return
        except BaseException as error:  # raised where the caller waits
            self._error = error
        finally:
            self._stopped.release()

    def _step_done(self, _: torch.Tensor) -> None:
        self.steps += 1
        self._stopped.release()
        self._wait()

    def _wait(self) -> None:
        self._go.acquire()
        if self._abandoned:
            raise _Abandoned
