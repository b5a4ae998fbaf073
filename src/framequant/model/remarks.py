"""What a report warns of when a walk is done: linears that went badly, corrections that were off.

Must not import layers or quantizers.
"""

from __future__ import annotations

from collections.abc import Collection

from framequant.model.report import LinearReport, QuantizationReport

#: Share of the weights of the blocks' linears below which the report says that few are quantized.
USUAL_COVERAGE = 0.95


def linear_warnings(entry: LinearReport, pooled: Collection[str]) -> list[str]:
    """What is to be said of one linear.

    Args:
        entry: of the report.
        pooled: experts whose Hessians came from others, which are warned of elsewhere.
    """
    found = []
    if entry.escalations:
        found.append(f"{entry.name}: damping raised to {entry.damping:g}; too few calibration tokens?")
    if "scales_shrunk_by" in entry.details:
        found.append(
            f"{entry.name}: rounding did more harm than zeros would, so its scales were multiplied by "
            f"{entry.details['scales_shrunk_by']:.3g}. More bits, or ignore it."
        )
    if entry.tokens == 0 and entry.name not in pooled:
        found.append(f"{entry.name}: saw no calibration token; an identity Hessian was used.")
    return found


def run_warnings(report: QuantizationReport, pooled: Collection[str], residual: bool) -> list[str]:
    """What is to be said of a run, its linears first.

    Args:
        report: with all linears.
        pooled: see ``linear_warnings``.
        residual: whether the deviation of the residual stream was to be corrected.
    """
    found = [text for entry in report.linears for text in linear_warnings(entry, pooled)]
    if residual and not any(entry.residual_correction for entry in report.linears):
        found.append(
            "no linear writes straight to a residual stream (a norm or a scale may lie between), so the "
            "stream's deviation is not corrected."
        )
    if report.coverage < USUAL_COVERAGE:
        found.append(f"only {report.coverage:.1%} of the weights of the blocks' linears are quantized.")
    return found
