"""The model card (README.md) of a checkpoint, made from its report."""

from __future__ import annotations

from typing import Any

from framequant.model.report import QuantizationReport

_LOADING = {
    "transformers": (
        "import framequant\nfrom transformers import AutoModelForCausalLM\n\n"
        'model = AutoModelForCausalLM.from_pretrained("PATH")   # or framequant.load("PATH")'
    ),
    "timm": 'import framequant\n\nmodel = framequant.load("PATH")   # a timm model',
    "torch": 'import framequant\n\nmodel = framequant.load("PATH", model=YourModel())',
}


def _tuning(tuning: dict[str, Any]) -> str:
    return (
        f"{tuning['chosen_step']} of {tuning['steps']} steps against the float model, {tuning['loss']} on held-out "
        f"calibration data {tuning['loss_before']:.4g} → {tuning['loss_after']:.4g}"
    )


def model_card(report: QuantizationReport, source: str | None, library: str) -> str:
    """Return the text of the card.

    Args:
        report: of the run.
        source: name of the float model, or None.
        library: "transformers", "timm" or "torch": how it is loaded.
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
        f"| quantized weights | {weights:,} in {len(report.linears)} linears, {report.coverage:.1%} of the blocks' |",
        f"| bytes of these | {size:,} ({16 / report.bits_per_weight:.1f} times smaller than fp16) |",
        f"| true redundancy | {report.redundancy:.4f} |",
        f"| calibration tokens | {max((entry.tokens for entry in report.linears), default=0):,} |",
        *([f"| tuned | {_tuning(report.tuning)} |"] if report.tuning else []),
        f"| made with | {versions} |",
        "",
        "```python",
        _LOADING[library],
        "```",
        "",
        "Settings and every linear's figures are in `framequant_report.json`.",
        *[f"\n> **Note.** {warning}" for warning in report.warnings[:5]],
        "",
    ]
    return "\n".join(lines)
