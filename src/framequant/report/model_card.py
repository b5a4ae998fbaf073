"""The model card (README.md) of a checkpoint, made from its report."""

from __future__ import annotations

from typing import Any

from framequant.model.report import QuantizationReport

_LOADING = {
    "transformers": (
        "import framequant\nfrom transformers import CLASS\n\n"
        'model = CLASS.from_pretrained("PATH")   # import framequant first: it registers the format'
    ),
    "timm": 'import framequant\n\nmodel = framequant.load("PATH")   # a timm model',
    "torch": 'import framequant\n\nmodel = framequant.load("PATH", model=YourModel())',
}


def _tuning(tuning: dict[str, Any]) -> str:
    return (
        f"{tuning['chosen_step']} of {tuning['steps']} steps against the float model, {tuning['loss']} on held-out "
        f"calibration data {tuning['loss_before']:.4g} → {tuning['loss_after']:.4g}"
    )


def _loading(report: QuantizationReport, library: str, name: str | None) -> str:
    code = _LOADING[library].replace("CLASS", str(report.model.get("class", "AutoModel")))
    return code.replace("PATH", name or "PATH")


def model_card(report: QuantizationReport, source: str | None, library: str, name: str | None = None) -> str:
    """Return the text of the card.

    Args:
        report: of the run.
        source: name of the float model, or None.
        library: "transformers", "timm" or "torch": how it is loaded.
        name: under which others load it, a name on the hub.
    """
    weights = sum(entry.num_weights for entry in report.linears)
    size = sum(sum(entry.bytes.values()) for entry in report.linears)
    versions = ", ".join(
        f"{name} {version}" for name, version in report.environment.get("versions", {}).items()
    )
    lines = [
        "---",
        f"library_name: {library}",
        "tags: [framequant, quantization]",
        *(
            [f"base_model: {source}"]
            if source and "/" in source and not source.startswith(("/", "."))
            else []
        ),
        "---",
        "",
        f"# {source or report.model.get('class', 'model')}, quantized with framequant",
        "",
        "| | |",
        "|---|---|",
        f"| measured bits per weight | **{report.bits_per_weight:.3f}** (from bytes on disk) |",
        f"| quantized weights | {weights:,} in {len(report.linears)} linears, {report.coverage:.1%} of the blocks', "
        f"{report.parameter_share:.1%} of all parameters |",
        f"| bytes of these | {size:,} ({16 / report.bits_per_weight:.1f} times smaller than fp16) |",
        f"| true redundancy | {report.redundancy:.4f} |",
        f"| calibration tokens | {max((entry.tokens for entry in report.linears), default=0):,} |",
        *([f"| tuned | {_tuning(report.tuning)} |"] if report.tuning else []),
        f"| made with | {versions} |",
        "",
        "```python",
        _loading(report, library, name),
        "```",
        "",
        "Settings and every linear's figures are in `framequant_report.json`.",
        *[f"\n> **Note.** {warning}" for warning in report.warnings[:5]],
        "",
    ]
    return "\n".join(lines)
