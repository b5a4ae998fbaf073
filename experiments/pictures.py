"""Pictures: weights before and after the frame with the clip, attention over rising redundancy, layers of runs.

    python experiments/pictures.py --quick
    python experiments/pictures.py --model timm/vit_base_patch16_224 --imagenet val/ --calibration train/

Tables of histograms, a PNG of attention maps with the images beside them, and reports of whole runs in ``runs/``,
from which ``framequant report`` draws loss and bits of every layer.
"""

from __future__ import annotations

import shutil
from argparse import Namespace
from collections.abc import Sequence

import numpy as np
import torch
from bench import Bench, Record, benches, parse, parse_row, parser, reason, shared
from numpy.typing import NDArray
from PIL import Image
from torch import Tensor, nn

from framequant.checkpoint import write_json
from framequant.frames import build_frame, choose_frame
from framequant.model.discovery import find_blocks, linear_weight, linears
from framequant.report.results import Plot

RUNS = {
    "GPTQ, 2 bits": "gptq",
    "FrameQuant, r = 1": "framequant-paper:redundancy=1.0",
    "FrameQuant, r = 1.125, input": "framequant-paper:two_sided=false,redundancy=1.125",
    "framequant, 2.25 bits": "framequant:bits=2.25",
}
REDUNDANCIES = (1.0, 1.1, 1.25)
CLIP = 2.0


def histogram(record: Record, model: str, name: str, space: str, values: Tensor) -> None:
    """Density of weights in units of their row's standard deviation, with what the clip cuts off."""
    rows = values.double()
    scaled = (rows - rows.mean(1, keepdim=True)) / rows.std(1, keepdim=True).clamp(min=1e-300)
    density, edges = np.histogram(scaled.numpy(), bins=120, range=(-6, 6), density=True)
    outside = float((scaled.abs() > CLIP).double().mean())
    kurtosis = float(scaled.pow(4).mean())
    for value, left, right in zip(density, edges[:-1], edges[1:], strict=True):
        middle = (left + right) / 2
        gaussian = float(np.exp(-(middle**2) / 2) / np.sqrt(2 * np.pi))
        record.rows.append(
            {
                "model": model, "linear": name, "space": space, "sigmas": round(middle, 3), "density": round(value, 6),
                "gaussian": round(gaussian, 6), "clipped": abs(middle) > CLIP, "share_clipped": round(outside, 5),
                "kurtosis": round(kurtosis, 3), "largest": round(float(scaled.abs().max()), 3),
            }
        )  # fmt: skip


def histograms(args: Namespace, found: Sequence[Bench]) -> None:
    """Weights of one linear of each model, as they are and in frame space."""
    record = Record(args, "histograms")
    plots = []
    for bench in found:
        blocks = next(iter(find_blocks(bench.model).values()))
        inside = [n for n in linears(bench.model) if n.startswith(f"{blocks[len(blocks) // 2]}.")]
        name = inside[-1]
        weight = linear_weight(bench.model.get_submodule(name)).detach().double().cpu()
        histogram(record, bench.name, name, "weight space", weight)
        outer = build_frame(choose_frame(weight.shape[0], 1.0, seed=1))
        for r in (1.0, 1.125):
            frame = build_frame(choose_frame(weight.shape[1], r, seed=2))
            coefficients = outer.analysis(frame.analysis(weight).T).T
            histogram(record, bench.name, name, f"frame space, r = {r:g}", coefficients)
        plots.append(
            Plot(
                f"Weights of {name}, {bench.name}", "density", "sigmas", "space", {"model": bench.name},
                predicted="gaussian", x_title=f"standard deviations of a row (the paper clips at ±{CLIP:g})",
            )
        )  # fmt: skip
    if record.rows:
        last = record.rows.pop()
        record.add(**last)
    record.plots("Histograms before and after the frame", "Density; broken lines are the Gaussian.", plots)


def attention(model: nn.Module, pixels: Tensor) -> NDArray[np.float64]:
    """Attention of the class token to patches in a timm ViT's last block, mean over heads: (images, side, side)."""
    block = model.blocks[-1]
    held: list[Tensor] = []
    handle = block.attn.qkv.register_forward_hook(lambda _m, _a, out: held.append(out.detach()))
    with torch.no_grad():
        model(pixels.to(next(model.parameters())))
    handle.remove()
    heads = block.attn.num_heads
    batch, tokens, width = held[0].shape
    query, key, _ = (
        held[0].float().reshape(batch, tokens, 3, heads, width // (3 * heads)).permute(2, 0, 3, 1, 4)
    )
    scores = (query[:, :, :1] @ key.transpose(-1, -2) / (width // (3 * heads)) ** 0.5).softmax(-1)
    side = int((tokens - 1) ** 0.5)
    return scores.mean(1)[:, 0, -side * side :].reshape(batch, side, side).double().cpu().numpy()


def tile(values: NDArray[np.float64], size: int) -> Image.Image:
    """A map as a picture, dark to bright."""
    spread = (values - values.min()) / max(float(np.ptp(values)), 1e-12)
    colours = np.stack([spread, spread**2, 0.35 + 0.3 * spread - 0.5 * spread**2], -1).clip(0, 1)
    return Image.fromarray((255 * colours).astype(np.uint8)).resize((size, size), Image.Resampling.BICUBIC)


def originals(bench: Bench, pixels: Tensor, size: int) -> list[Image.Image]:
    """Preprocessed images as pictures again."""
    settings = bench.opened.require_images()
    mean, std = (torch.tensor(v).view(3, 1, 1) for v in (settings.mean, settings.std))
    shown = ((pixels * std + mean).clamp(0, 1) * 255).byte().permute(0, 2, 3, 1).numpy()
    return [Image.fromarray(one).resize((size, size)) for one in shown]


def mosaic(columns: Sequence[Sequence[Image.Image]], size: int, gap: int = 6) -> Image.Image:
    """Columns of equal squares side by side."""
    width, height = (count * (size + gap) - gap for count in (len(columns), len(columns[0])))
    canvas = Image.new("RGB", (width, height), "white")
    for x, column in enumerate(columns):
        for y, picture in enumerate(column):
            canvas.paste(picture, (x * (size + gap), y * (size + gap)))
    return canvas


def agreement(maps: NDArray[np.float64], reference: NDArray[np.float64]) -> float:
    """Correlation of maps, mean over images."""
    pairs = zip(maps, reference, strict=True)
    return float(np.mean([np.corrcoef(one.ravel(), other.ravel())[0, 1] for one, other in pairs]))


def attention_maps(args: Namespace, bench: Bench, images: int = 4, size: int = 150) -> None:
    """Original images, and beside them attention of the float model and at rising redundancy."""
    record = Record(args, "attention")
    pixels = torch.cat([batch for batch, _ in bench.batches])[:images]
    reference = attention(bench.model, pixels)
    columns = [originals(bench, pixels, size), [tile(one, size) for one in reference]]
    for r in REDUNDANCIES:
        model, _, row = bench.quantized(parse_row(f"framequant-paper:two_sided=false,redundancy={r}")[0])
        maps = attention(model, pixels)
        columns.append([tile(one, size) for one in maps])
        correlation = round(agreement(maps, reference), 4)
        record.add(model=bench.name, method=f"FrameQuant, r = {r:g}", **row, correlation=correlation)
    mosaic(columns, size).save(record.path.with_name("attention.png"))
    order = ", ".join(["image", "float", *(f"r = {r:g}" for r in REDUNDANCIES)])
    plots = [
        Plot("Attention maps", image="attention.png", caption=f"Columns from left to right: {order}."),
        Plot(
            "Agreement of the maps", "correlation", "redundancy",
            caption="Correlation with the float model's maps, mean over the images shown.",
        ),
    ]  # fmt: skip
    text = "Attention of the class token in the last block, mean over heads; two bits, input side."
    record.plots("Attention over rising redundancy", text, plots)


def runs(args: Namespace, bench: Bench) -> None:
    """Reports of whole runs, for loss and bits of every layer."""
    for name, settings in RUNS.items():
        if args.quick and settings.startswith("framequant:"):
            settings += ",state_bits=8"
        try:
            _, report, _ = bench.quantized(parse_row(settings)[0])
        except Exception as error:  # the other runs go on
            print(f"{bench.name}, {name}: {reason(error)}", flush=True)
            continue
        report.environment["command"] = args.command
        folder = args.out / "runs" / f"{bench.name}, {name}"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        write_json(report.to_dict(), folder / "framequant_report.json")


def main(argv: Sequence[str] | None = None) -> None:
    args = parse(parser(__doc__), __file__, argv)
    deit = str(shared() / "models" / "deit_tiny_patch16_224")
    missing = Record(args, "pictures_missing")
    found = benches(args, missing, [deit] if args.quick else [deit, "smollm2", "minilm"])
    histograms(args, found)
    transformer = next((b for b in found if b.kind == "vision" and hasattr(b.model, "blocks")), None)
    if transformer is not None:
        attention_maps(args, transformer)
    if found:
        runs(args, found[0])


if __name__ == "__main__":
    main()
