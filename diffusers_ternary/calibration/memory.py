# SPDX-License-Identifier: Apache-2.0
"""Says which option lowers the need when memory runs out."""

import contextlib
import gc
from collections.abc import Iterator

import torch

from .config import CalibrationConfig


@contextlib.contextmanager
def explained_memory(calibration: CalibrationConfig) -> Iterator[None]:
    """Turns every kind of exhausted memory into one `MemoryError` that names the options; other errors pass.

    Raises:
        MemoryError: when memory ran out inside.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        # torch.OutOfMemoryError is a RuntimeError, and the CPU allocator raises plain ones.
        exhausted = isinstance(error, (torch.OutOfMemoryError, MemoryError)) or "can't allocate memory" in str(error)
        if not exhausted:
            raise
        gc.collect()
        raise MemoryError(
            f"Out of memory while calibrating (memory_limit={calibration.memory_limit!r}, "
            f"batch_size={calibration.batch_size}). Set a smaller memory_limit (statistics are then gathered in more "
            "passes), lower batch_size, or enable pipeline.enable_model_cpu_offload(). Finished layers are kept if "
            "work_dir was given."
        ) from error
