# SPDX-License-Identifier: Apache-2.0
"""The calibration report as a table for people."""

from typing import TYPE_CHECKING

from rich.table import Table


if TYPE_CHECKING:
    from .report import CalibrationReport


def report_table(report: "CalibrationReport", *, rows: int = 15) -> Table:
    """The layers that matter most: by the denoiser's output if that was measured, else by their own output's error.

    Args:
        report ([`CalibrationReport`]): what to show.
        rows (`int`, *optional*, defaults to 15): layers at most; the rest are counted in the caption.
    """
    total = len(report.sensitivity or report.layers)
    caption = [f"{report.bits_per_weight:.3f} bits per weight"]
    caption += [f"velocity NMSE of {name} {error:.3g}" for name, error in report.velocity_nmse.items()]
    if total > rows:
        caption.append(f"{total - rows} more layers in the report")
    table = Table(caption="; ".join(caption), caption_justify="left")
    for heading in ("layer", "stored as", "bits"):
        table.add_column(heading, justify="right" if heading == "bits" else "left", overflow="fold")
    if report.sensitivity:
        table.title = "Sensitivity of the denoiser's output"
        base = next(iter(report.sensitivity[0].nmse))
        for heading in (f"NMSE as {base}", "NMSE as stored"):
            table.add_column(heading, justify="right")
        for layer in report.sensitivity[:rows]:
            bits = 8 * layer.bytes[layer.chosen] / (layer.shape[0] * layer.shape[1])
            errors = (f"{layer.worst:.2e}", f"{layer.nmse[layer.chosen]:.2e}")
            table.add_row(layer.name, layer.chosen, f"{bits:.2f}", *errors)
        return table
    table.title = "Largest errors of layers' outputs"
    for heading in ("rounded", "calibrated"):
        table.add_column(heading, justify="right")
    for row in sorted(report.layers, key=lambda row: -row.error)[:rows]:
        errors = (f"{row.error_rounded:.4f}", f"{row.error:.4f}")
        table.add_row(row.name, row.stored_as, f"{row.bits_per_weight:.2f}", *errors)
    return table
