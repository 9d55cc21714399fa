# SPDX-License-Identifier: Apache-2.0
"""How a verb that works on a pipeline or model hands over its report: the same way for all of them."""

from typing import Any


def attach_report(target: Any, report: Any, return_report: bool) -> Any:
    """Hangs a report on what a verb returns: `calibrate`, `distill` and `merge_lora` end with this.

    Args:
        target (`DiffusionPipeline` or `nn.Module`): what the verb made. Its `ternary_report` becomes the report, in
            place of an earlier one; it is not saved with the target.
        report (`Any`): what the verb did.
        return_report (`bool`): whether the caller wants it returned too.

    Returns:
        `target`, or `(target, report)`.
    """
    target.ternary_report = report
    return (target, report) if return_report else target
