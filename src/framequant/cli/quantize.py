"""``framequant quantize``: open a model, quantize it, save it, and say what it costs now."""

from __future__ import annotations

import shlex
import sys
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from framequant.cli.console import Reporter, count, facts, seconds, size
from framequant.cli.inputs import calibration_tensor, find_calibration
from framequant.cli.options import (
    DeviceOption,
    DtypeOption,
    JsonOption,
    build_config,
    choose_device,
    parse_overrides,
)
from framequant.cli.streaming import choose_streaming
from framequant.cli.tuning import Tuning, describe_tuning, request_of, tune_settings
from framequant.errors import ConfigError

if TYPE_CHECKING:
    from framequant.config import FrameQuantConfig
    from framequant.integrations.sources import OpenedModel
    from framequant.model.report import QuantizationReport

NAME = "quantize"
EXAMPLES = (
    "Examples:\n\n"
    "framequant quantize smollm2 --out smol-2bit\n\n"
    "framequant quantize timm/deit_tiny_patch16_224 --calibration train/ --out deit-2bit\n\n"
    "framequant quantize HuggingFaceTB/SmolLM2-135M --calibration wiki.txt --redundancy 1.25 --out smol\n\n"
    "framequant quantize smollm2 --calibration wiki.txt --tune 250 --out smol-tuned\n\n"
    "framequant quantize model.gguf --preset gptq --bits 3 --ignore down_proj --out gptq-3bit\n\n"
    "framequant quantize timm/deit_tiny_patch16_224 --preset sigma-delta --frame-size-ratio 8 --levels 2 --out deit-sd"
)


def run(
    model: Annotated[
        str,
        typer.Argument(
            help="A transformers directory or hub name, a .gguf file, timm/NAME, a timm directory, "
            "smollm2 or minilm."
        ),
    ],
    out: Annotated[Path, typer.Option("--out", help="Directory to write; must not exist or be empty.")],
    preset: Annotated[
        str | None,
        typer.Option(
            help="framequant (default), framequant-scalar, framequant-paper, quip, gptq, rtn or sigma-delta."
        ),
    ] = None,
    bits: Annotated[
        float | None,
        typer.Option(
            help="What the quantized linears take on disk per weight, everything counted: any number from 1.5 to 8. "
            "Of the scalar presets, the width of a code."
        ),
    ] = None,
    redundancy: Annotated[
        float | None, typer.Option(help="Redundancy r ≥ 1; a code costs bits times r.")
    ] = None,
    two_sided: Annotated[
        bool | None, typer.Option("--two-sided/--one-sided", help="Redundancy on the output side too.")
    ] = None,
    calibration: Annotated[
        str | None,
        typer.Option(
            help="A text file, an image folder, a .csv of sentence pairs, or a dataset NAME[:CONFIG] on the hub."
        ),
    ] = None,
    samples: Annotated[
        int | None, typer.Option(help="Calibration windows or images, 128; or sentences, all of them.")
    ] = None,
    sequence_length: Annotated[
        int | None, typer.Option(help="Tokens of a calibration window; 1024, or what the model reads.")
    ] = None,
    word_tokenized: Annotated[
        float | None,
        typer.Option(
            help="Share of the windows whose punctuation stands apart, as in many test texts; 0.2.",
            min=0,
            max=1,
        ),
    ] = None,
    renamed: Annotated[
        float | None,
        typer.Option(help="Share of the windows with made-up names, to be copied; 0.15.", min=0, max=1),
    ] = None,
    repeated: Annotated[
        float | None,
        typer.Option(help="Share of the windows of random phrases that come again; 0.1.", min=0, max=1),
    ] = None,
    generated: Annotated[
        float | None,
        typer.Option(help="Share of the windows that the language model writes itself; 0.4.", min=0, max=1),
    ] = None,
    continued: Annotated[
        float | None,
        typer.Option(
            help="Share of the windows that it writes going on from a few words of the text; 0.", min=0, max=1
        ),
    ] = None,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    seed: Annotated[
        int | None, typer.Option(help="Of the random signs and of the calibration sample; 0.")
    ] = None,
    ignore: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Leave matching linears in float; repeatable.")
    ] = None,
    include: Annotated[
        list[str] | None, typer.Option(metavar="REGEX", help="Quantize matching linears only; repeatable.")
    ] = None,
    override: Annotated[
        list[str] | None,
        typer.Option(
            metavar="REGEX::KEY=VALUE,…",
            help="Other settings for matching linears, or REGEX::skip; repeatable.",
        ),
    ] = None,
    damping: Annotated[
        float | None, typer.Option(help="Fraction of the Hessian's mean diagonal added to it.")
    ] = None,
    group_size: Annotated[
        int | None, typer.Option(help="Columns that share a scale; whole rows if not given.")
    ] = None,
    frame_size_ratio: Annotated[
        float | None, typer.Option(help="N/d of sigma-delta's frame; a weight costs N/d · log2(levels) bits.")
    ] = None,
    levels: Annotated[int | None, typer.Option(help="Levels of a code; sigma-delta: an even number.")] = None,
    config: Annotated[
        Path | None, typer.Option(metavar="FILE.yaml", help="Settings from a file; flags win over it.")
    ] = None,
    settings: Annotated[
        list[str] | None, typer.Option("--set", metavar="KEY=VALUE", help="Any setting by name; repeatable.")
    ] = None,
    tune: Annotated[
        int | None,
        typer.Option(
            metavar="STEPS", help="Afterwards train scales, norms and biases towards the float model."
        ),
    ] = None,
    tune_lr: Annotated[float | None, typer.Option(help="Learning rate of --tune; 0.001.")] = None,
    tune_batch: Annotated[int | None, typer.Option(help="Samples of a step of --tune; 8.")] = None,
    tune_embeddings: Annotated[
        float | None,
        typer.Option(
            metavar="RATE", help="Learning rate of --tune for token embeddings and a float output head; 0."
        ),
    ] = None,
    stream: Annotated[
        bool | None,
        typer.Option(
            "--stream/--no-stream",
            help="Read, quantize and write one block at a time, and go on after an interruption; by itself where the "
            "model does not fit into memory, and under torchrun.",
        ),
    ] = None,
    max_memory: Annotated[
        str | None,
        typer.Option(
            metavar="SIZE", help="Memory to stay within: 8GB of the host, or cuda=40GB,cpu=8GB; what is free."
        ),
    ] = None,
    overwrite: Annotated[
        bool, typer.Option("--overwrite", help="Replace what lies in the output directory.")
    ] = False,
    as_json: JsonOption = False,
) -> None:
    """Quantize MODEL and save it to a directory that framequant, transformers and timm models load from."""
    flags = {
        "bits": bits,
        "redundancy": redundancy,
        "two_sided": two_sided,
        "seed": seed,
        "ignore": ignore,
        "include": include,
        "overrides": parse_overrides(override) if override else None,
        "damping": damping,
        "group_size": group_size,
        "frame_size_ratio": frame_size_ratio,
        "levels": levels,
    }
    from framequant.evaluation.mix import Mix

    mix = Mix(word_tokenized, renamed, repeated, generated, continued)
    reporter = Reporter(as_json)
    chosen = build_config(preset, config, settings or [], flags)
    place = choose_device(device)
    tune_config = tune_settings(tune, tune_lr, tune_batch, chosen.seed, tune_embeddings)
    streaming = choose_streaming(model, stream, max_memory, dtype, place, chosen)
    if streaming is not None:
        if tune_config is not None:
            raise ConfigError("--tune needs the whole model in memory; leave it out, or give --no-stream.")
        if generated or continued:
            raise ConfigError(
                "--generated and --continued need the whole model in memory; give 0 for both, or --no-stream."
            )
        check_not_itself(out, model)
        source = find_calibration(calibration)
        streaming.quantize(chosen, out, source, samples, sequence_length, mix, overwrite, as_json)
        return
    check_output(out, overwrite, model)
    if tune_config is not None and chosen.is_data_free:
        raise ConfigError("--tune needs calibration data, and sigma-delta codes use none; leave --tune out.")
    chosen = with_room_for_tuning(chosen) if tune_config else chosen
    request = request_of(model, chosen, calibration, samples, sequence_length, dtype, mix)
    tuning = None if tune_config is None else Tuning(out, tune_config, request)
    source = find_calibration(calibration)
    opened = open_float(model, dtype, place, reporter)
    float_parameters = sum(parameter.numel() for parameter in opened.model.parameters())
    data = None
    if not chosen.is_data_free:
        with reporter.stage("reading the calibration data"):
            data = calibration_tensor(source, opened, samples, sequence_length, chosen.seed, reporter, mix)
        reporter.err.print(f"  {describe_calibration(data)}")
    if tuning is None:
        report = quantize_model(opened, data, chosen, reporter)
    else:
        opened = quantize_and_tune(opened, data, chosen, tuning, reporter)
        report = opened.model.framequant_report
    if sys.argv[1:2] == [NAME]:
        report.environment["command"] = shlex.join(["framequant", *sys.argv[1:]])
    save(opened, out, overwrite, reporter)
    if tuning is not None:
        tuning.finish()
    conclude(report, opened, out, float_parameters, data, reporter)


def conclude(
    report: QuantizationReport,
    opened: OpenedModel,
    out: Path,
    float_parameters: int,
    data: Any,
    reporter: Reporter,
) -> None:
    """Print what a finished run did."""
    summary = summarize(report, opened, out, float_parameters)
    summary["calibration"] = describe_calibration(data)
    print_summary(summary, report, reporter)
    reporter.print_json(summary)


def with_room_for_tuning(config: FrameQuantConfig) -> FrameQuantConfig:
    """The settings with row factors in the budget, where the code has any."""
    from dataclasses import replace

    return replace(config, row_factors=True) if config.code == "trellis" else config


def check_output(out: Path, overwrite: bool, model: str) -> None:
    """Refuse an output directory before any work is done.

    Raises:
        CheckpointError: it is not empty, or is the model itself, or ``--overwrite`` would delete what is no
            checkpoint.
    """
    from framequant.checkpoint import prepare_output

    check_not_itself(out, model)
    prepare_output(out, overwrite)


def check_not_itself(out: Path, model: str) -> None:
    """Refuse to write over the model.

    Raises:
        CheckpointError: the output is the model.
    """
    from framequant.errors import CheckpointError

    if out.exists() and Path(model).exists() and out.resolve() == Path(model).resolve():
        raise CheckpointError(f"--out {out} is the model itself; choose another directory.")


def open_float(name: str, dtype: str, device: str, reporter: Reporter) -> OpenedModel:
    """Open a model that is to be quantized.

    Raises:
        ModelSourceError: it cannot be opened, or is quantized already.
    """
    from framequant.errors import ModelSourceError
    from framequant.integrations.sources import open_model

    with reporter.stage(f"loading {name}"):
        opened = open_model(name, dtype, device)
    if opened.quantized:
        raise ModelSourceError(f"{name} is already quantized by framequant; give the float model.")
    for note in opened.notes:
        reporter.notice(note)
    return opened


def describe_calibration(data: Any) -> str:
    """The size of the calibration data in words."""
    if data is None:
        return "none needed"
    if isinstance(data, list):
        sentences = sum(len(batch["input_ids"]) for batch in data)
        return f"{sentences} sentences ({count(sum(int(b['attention_mask'].sum()) for b in data))} tokens)"
    if data.ndim == 2:
        return f"{data.shape[0]} windows of {data.shape[1]} tokens ({count(data.numel())} tokens)"
    return f"{data.shape[0]} images of {data.shape[3]} × {data.shape[2]} pixels"


def quantize_model(opened: OpenedModel, data: Any, config: Any, reporter: Reporter) -> QuantizationReport:
    """Run the walk with a progress bar over the weights."""
    from framequant import quantize_

    with reporter.bar("quantizing", "weights") as update:

        def show(progress: Any) -> None:
            update(progress.done, progress.total, progress.message)

        return quantize_(opened.model, data, config, progress=show)


def quantize_and_tune(
    opened: OpenedModel, data: Any, config: Any, tuning: Tuning, reporter: Reporter
) -> OpenedModel:
    """Quantize, or take the untuned model of a run that was begun, and tune it against the float model.

    Raises:
        CalibrationError: too few samples for the steps asked for.
    """
    tuning.check(data)
    parameter = next(opened.model.parameters())
    dtype, device = str(parameter.dtype).removeprefix("torch."), str(parameter.device)
    if tuning.begun:
        student, teacher = tuning.reopen(device, reporter), opened
        student.name = opened.name
    else:
        quantize_model(opened, tuning.calibration(data, parameter.device.type), config, reporter)
        tuning.keep(opened, reporter)
        student, teacher = opened, open_float(opened.name, dtype, device, reporter)
    tuning.tune(student, teacher, data, reporter)
    return student


def save(opened: OpenedModel, out: Path, overwrite: bool, reporter: Reporter) -> None:
    """Save a quantized model with its tokenizer or image processor."""
    from framequant import save_pretrained

    with reporter.stage(f"saving {out}"):
        save_pretrained(
            opened.model, out, overwrite=overwrite, source=opened.name, tokenizer=opened.processor
        )


def directory_bytes(directory: Path) -> dict[str, int]:
    """Bytes of every file of a directory, by name."""
    return {path.name: path.stat().st_size for path in sorted(directory.iterdir()) if path.is_file()}


def weight_bytes(directory: Path) -> int:
    """Bytes of a checkpoint's tensors and config: what the model itself takes."""
    files = directory_bytes(directory)
    return sum(n for name, n in files.items() if name.endswith(".safetensors") or name.startswith("config"))


def summarize(
    report: QuantizationReport, opened: OpenedModel, out: Path, float_parameters: int
) -> dict[str, Any]:
    """The figures of a finished run, as JSON has them."""
    weights = sum(entry.num_weights for entry in report.linears)
    worst = sorted(report.linears, key=lambda entry: entry.relative_loss, reverse=True)[:3]
    return {
        "model": opened.name,
        "model_class": report.model.get("class"),
        "out": str(out),
        "bits_per_weight": report.bits_per_weight,
        "budget_bits": report.allocation.get("budget_bits"),
        "redundancy": report.redundancy,
        "coverage": report.coverage,
        "parameter_share": report.parameter_share,
        "quantized_linears": len(report.linears),
        "quantized_weights": weights,
        "bytes": {
            "linears_float16": 2 * weights,
            "linears_quantized": sum(sum(entry.bytes.values()) for entry in report.linears),
            "model_float16": 2 * float_parameters,
            "model_on_disk": weight_bytes(out),
            "directory": sum(directory_bytes(out).values()),
        },
        "worst_linears": {entry.name: entry.relative_loss for entry in worst},
        "seconds": report.seconds,
        "environment": report.environment,
        "warnings": report.warnings,
        **({"tuning": report.tuning} if report.tuning else {}),
        "config": report.config,
    }


def print_summary(summary: dict[str, Any], report: QuantizationReport, reporter: Reporter) -> None:
    """Print the final table and the next command."""
    sizes = summary["bytes"]
    data_free = report.config["code"] == "sigma_delta"
    asked = (
        report.config["frame_size_ratio"]
        if data_free
        else report.config["redundancy"] ** (2 if report.config["two_sided"] else 1)
    )
    worst = [f"{loss:.4f}  {name}" for name, loss in summary["worst_linears"].items()]
    rows = {
        "model": f"{summary['model']} ({summary['model_class']})",
        "quantized": f"{summary['quantized_linears']} linears, {count(summary['quantized_weights'])} weights "
        f"({summary['coverage']:.1%} of those in the blocks, {summary['parameter_share']:.1%} of all parameters)",
        "bits per weight": f"{summary['bits_per_weight']:.4f}, measured: every byte stored for these linears",
        **describe_allocation(report),
        "true redundancy": f"{summary['redundancy']:.4f} (asked for {asked:.4g})",
        "these linears": f"{size(sizes['linears_float16'])} in 16 bits → {size(sizes['linears_quantized'])}",
        "whole model": f"{size(sizes['model_float16'])} in 16 bits → {size(sizes['model_on_disk'])} on disk "
        f"(the rest is kept in {report.environment['dtype']})",
        "largest relative loss": "\n".join(worst),
        **nearest_row(report),
        **({"tuned": describe_tuning(report.tuning)} if report.tuning else {}),
        "time": f"{seconds(summary['seconds'])} on {report.environment['device']}",
        "saved in": summary["out"],
    }
    reporter.print(facts("Quantized", rows))
    for warning in _shorten(report.warnings):
        reporter.notice(warning)
    reporter.print(f"Next: {next_command(report, summary['out'])}")


def nearest_row(report: QuantizationReport) -> dict[str, str]:
    """For Sigma-Delta codes: plain rounding at equal bits, beside the weight error; else nothing."""
    entries = [entry for entry in report.linears if "nearest_at_equal_bits" in entry.details]
    if not entries:
        return {}
    weights = sum(entry.num_weights for entry in entries)
    own = sum(entry.relative_loss * entry.num_weights for entry in entries) / weights
    plain = (
        sum(e.details["nearest_at_equal_bits"]["relative_error"] * e.num_weights for e in entries) / weights
    )
    return {"relative weight error": f"{own:.3g}; plain rounding to nearest at equal bits: {plain:.3g}"}


def describe_allocation(report: QuantizationReport) -> dict[str, str]:
    """The rates that a bit budget was shared out as, in words."""
    choices = report.allocation.get("choices", {})
    if not choices:
        return {}
    rates = sorted(choice["bits"] for choice in choices.values())
    text = f"{rates[0]:g} to {rates[-1]:g} bits a linear, half of them {rates[len(rates) // 2]:g} or more"
    predicted, uniform = report.allocation["predicted_loss"], report.allocation["uniform_loss"]
    if uniform:
        text += f"; predicted to cost {predicted / uniform:.2f} of what one rate for all would"
    return {"budget": f"{report.allocation['budget_bits']:g} bits, shared out: {text}"}


def _shorten(warnings: list[str]) -> list[str]:
    return (
        warnings
        if len(warnings) <= 5
        else [*warnings[:4], f"{len(warnings) - 4} more; see framequant_report.json"]
    )


def next_command(report: QuantizationReport, out: str) -> str:
    """A command worth running next."""
    name = str(report.model.get("class"))
    if name.endswith(("CausalLM", "LMHeadModel")):
        return f"framequant evaluate {out} --perplexity TEXT.txt"
    if name.endswith(("ImageClassification", "VisionTransformer", "SwinTransformer")):
        return f"framequant evaluate {out} --imagenet FOLDER"
    return f"framequant inspect {out}"
