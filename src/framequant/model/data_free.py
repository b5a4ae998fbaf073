"""Quantize the linears of any model from their weights alone: the second paper's algorithm over a whole model.

No blocks, no calibration data, no order: every selected linear is taken by itself. Linears whose weight is tied to
another module's stay float, since their codes would be stored beside the float weight.
"""

from __future__ import annotations

import time
from collections import Counter
from collections.abc import Callable, Mapping

from torch import nn

from framequant.config import FrameQuantConfig
from framequant.errors import DiscoveryError
from framequant.layers import FrameLinear
from framequant.model import discovery
from framequant.model.experts import put_back_unselected, routers, unfuse_
from framequant.model.network_bounds import network_bounds
from framequant.model.report import QuantizationReport, environment, linear_report
from framequant.quantizers.sigma_delta_weight import DataFreeResult, linear_spec, quantize_linear


def quantize_data_free(
    model: nn.Module, config: FrameQuantConfig, progress: Callable[[int, int, str], None] | None = None
) -> QuantizationReport:
    """Quantize a model in place without data.

    Args:
        model: any module that holds linears.
        config: settings of a Sigma-Delta code.
        progress: called with weights done, weights in all and the linear's name after each.

    Returns:
        The report; it is also kept on the model for ``save_pretrained``.

    Raises:
        ConfigError: a pattern matches nothing.
        DiscoveryError: no linear is left to quantize.
        NumericalError: NaN or infinity in a weight; the linear is named.
        FrameError: no harmonic frame of the ratio exists for a dimension.
    """
    start = time.perf_counter()
    fused = unfuse_(model)
    linears = discovery.linears(model)
    if not linears or "" in linears:
        raise DiscoveryError(f"{type(model).__name__} holds no linears; give a model with linears inside.")
    selected = discovery.select_linears(model, None, config)
    left = set() if config.include else routers(model, _parents(fused))
    selected = [name for name in selected if name not in left]
    put_back_unselected(model, fused, selected)
    first = next(model.parameters())
    report = QuantizationReport(config.to_dict())
    report.environment = environment(str(first.device), str(first.dtype).removeprefix("torch."))
    report.model = {
        "class": type(model).__name__,
        "parameters": sum(parameter.numel() for parameter in model.parameters()),
        "blocks": 0,
        "chains": [],
        "block_linear_weights": sum(module.weight.numel() for module in linears.values()),
    }
    tied = _tied(model)
    names = [name for name in selected if name not in tied]
    for name in linears:
        if name not in names:
            reason = (
                "its weight is tied to another module's"
                if name in tied
                else "a router"
                if name in left
                else "left in float by a pattern"
            )
            report.skipped[name] = reason
    if not names:
        raise DiscoveryError("every linear is tied to another module, so nothing is left to quantize.")
    results = _quantize_all(model, names, config, report, progress)
    report.bounds = network_bounds(model, results)
    report.seconds = time.perf_counter() - start
    _warn(report)
    model.framequant_report = report
    return report


def _parents(fused: Mapping[str, nn.Module]) -> list[str]:
    """Modules that hold mixtures of experts."""
    return sorted({path.rpartition(".")[0] for path in fused if "." in path})


def _quantize_all(
    model: nn.Module,
    names: list[str],
    config: FrameQuantConfig,
    report: QuantizationReport,
    progress: Callable[[int, int, str], None] | None,
) -> dict[str, DataFreeResult]:
    modules = {name: model.get_submodule(name) for name in names}
    total = sum(module.weight.numel() for module in modules.values())
    done, results = 0, {}
    configs = {name: config.for_linear(name) or config for name in names}
    for name, module in modules.items():  # refuse what cannot be done before anything is replaced
        rows, columns = discovery.linear_weight(module).shape
        linear_spec(configs[name], columns, rows, module.bias is not None, name)
    for name, module in modules.items():
        begun, settings = time.perf_counter(), configs[name]
        bias = None if module.bias is None else module.bias.detach()
        result = quantize_linear(discovery.linear_weight(module), bias, settings, name)
        kept = None if settings.quantize_bias else bias
        layer = FrameLinear.from_tensors(result.quantized.spec, result.quantized.tensors, kept)
        model.set_submodule(name, layer.train(module.training))
        entry = linear_report(name, result.quantized, 0, False, time.perf_counter() - begun)
        entry.details = result.details
        report.linears.append(entry)
        results[name] = result
        done += result.quantized.spec.num_weights
        if progress:
            progress(done, total, name)
    return results


def _tied(model: nn.Module) -> set[str]:
    """Linears whose weight another module holds too."""
    owners = Counter(
        parameter.data_ptr()
        for module in model.modules()
        for parameter in module.parameters(recurse=False)
        if parameter.numel()
    )
    return {name for name, module in discovery.linears(model).items() if owners[module.weight.data_ptr()] > 1}


def _warn(report: QuantizationReport) -> None:
    """Say where plain rounding at equal bits has the smaller weight error."""
    worse = [
        entry
        for entry in report.linears
        if entry.details["nearest_at_equal_bits"]["relative_error"] < entry.relative_loss
    ]
    if worse:
        report.warnings.append(
            f"{len(worse)} of {len(report.linears)} linears would have a smaller weight error by plain rounding "
            f"to nearest at the same {report.bits_per_weight:.3g} bits per weight; see nearest_at_equal_bits in it."
        )
    overloads = sum(entry.details["overloads"] for entry in report.linears)
    if overloads:
        share = overloads / sum(entry.details["coefficients"] for entry in report.linears)
        report.warnings.append(
            f"{share:.2%} of the recursion's states overloaded: a step below the stable one had the smaller error."
        )
