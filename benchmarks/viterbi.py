"""Weights a second of the Viterbi search and of tail-biting encoding: a table and a CSV.

    python benchmarks/viterbi.py --csv benchmarks/viterbi_h100.csv    # on a GPU: Triton, several variants
    python benchmarks/viterbi.py --device cpu --csv benchmarks/viterbi_cpu.csv

`search` is one pass with free ends; `encode` closes tiles of 256 to rings (a pass over the seam, then one
over the tile). Rows of few tiles show what one panel of a small matrix costs, when most of the GPU is idle, and
`smollm2` adds up the panels of SmolLM2-135M: seconds instead of weights a second. The squared error on unit
Gaussians stands beside each figure, and on a GPU the first tiles are checked against the plain torch search.
Figures are the best of several runs after one that compiles; the CSV names device and commit.
"""

from __future__ import annotations

import argparse
import csv
import os
import platform
from pathlib import Path

import torch
from measure import best_seconds, commit

from framequant.codes.trellis import TrellisSpec, codebook_values, decode_states, rate_pattern
from framequant.codes.trellis_codebook import codebook
from framequant.kernels.viterbi import encode_tiles, search

FEW = 60  # tiles of a panel of SmolLM2's q, k and v
COLUMNS = ("what", "state_bits", "bits", "variant", "tiles", "weights_per_second", "mse", "device", "commit")


def variants(state_bits: int) -> list[dict[str, int]]:
    """Launch options worth comparing: the default first, then half and twice its warps."""
    from framequant.kernels.viterbi_triton import launch_options

    default = launch_options(state_bits)
    warps = sorted({max(1, min(32, int(default["num_warps"] * f))) for f in (0.5, 1, 2)})
    return [default, *({"num_warps": w} for w in warps if w != default["num_warps"])]


def gpu_rows(state_bits: int, bits: float, tiles: int, repeats: int) -> list[tuple[object, ...]]:
    from framequant.kernels import viterbi_triton

    rates, rows = rate_pattern(bits), []
    values = torch.randn(tiles, 256, generator=torch.Generator("cuda").manual_seed(0), device="cuda")
    constants = codebook(state_bits)
    levels = constants.levels(torch.arange(1 << state_bits, device="cuda")).to(
        torch.float16
    )  # as in encoding
    targets = values / constants.scale
    weights, free = torch.ones_like(values), torch.full((tiles,), -1, device="cuda")
    oracle = search(targets[:2], levels, rates, backend="torch")
    for options in variants(state_bits):
        name = f"triton warps={options['num_warps']}"

        def run(count: int, options: dict[str, int] = options) -> torch.Tensor:
            part = slice(count)
            given = (targets[part], weights[part], levels, rates, free[part], state_bits, options)
            return viterbi_triton.search(*given)

        try:
            states = run(tiles)
            seconds = {count: best_seconds(lambda n=count: run(n), True, repeats) for count in (tiles, FEW)}
        except Exception as error:  # a variant that does not fit the device is a row, not the end
            print(f"!! {name} L={state_bits} {rates}: {type(error).__name__}: {str(error)[:200]}")
            continue
        found, least = (((targets[:2] - levels[s[:2].long(), 0]) ** 2).sum() for s in (states, oracle))
        if abs(found - least) > 1e-3 * least:
            print(f"!! {name} L={state_bits} {rates}: cost {found:.5f}, oracle {least:.5f}")
        mse = ((values - levels[states.long(), 0] * constants.scale) ** 2).mean().item()
        rows += [("search", state_bits, bits, name, n, n * 256 / s, mse) for n, s in seconds.items()]
    return rows


def model_row(state_bits: int, bits: float, repeats: int) -> tuple[object, ...]:
    """Seconds of all panels of SmolLM2-135M in tiles of 16 x 16, one after the other as LDLQ needs them."""
    spec, total = TrellisSpec(state_bits, rate_pattern(bits)), 0.0
    panels = {960: 36, 576: 36 + 96, 3072: 36}  # rows: panels a block; q/k/v, o and down, gate/up
    for rows, count in panels.items():
        values = torch.randn(rows // 16, 256, device="cuda")
        total += 30 * count * best_seconds(lambda v=values: encode_tiles(v, spec), True, repeats)
    return ("smollm2", state_bits, bits, "auto", sum(panels.values()) * 30, total, 0.0)


def cpu_rows(state_bits: int, bits: float, tiles: int, repeats: int) -> list[tuple[object, ...]]:
    values = torch.randn(tiles, 256, generator=torch.Generator().manual_seed(0))
    table, rates, rows = codebook_values(state_bits), rate_pattern(bits), []
    for backend in ("cpu", "torch"):
        part = values if backend == "cpu" else values[: max(1, tiles // 64)]
        states = search(part, table, rates, backend=backend)
        mse = ((part - table[states.long(), 0]) ** 2).mean().item()
        run = lambda b=backend, p=part: search(p, table, rates, backend=b)  # noqa: E731
        seconds = best_seconds(run, False, repeats)
        rows.append(("search", state_bits, bits, backend, len(part), part.numel() / seconds, mse))
    return rows


def encode_row(state_bits: int, bits: float, tiles: int, repeats: int, device: str) -> tuple[object, ...]:
    values = torch.randn(tiles, 256, generator=torch.Generator().manual_seed(0)).to(device)
    spec = TrellisSpec(state_bits, rate_pattern(bits))
    seconds = best_seconds(lambda: encode_tiles(values, spec), device == "cuda", repeats)
    error = values - decode_states(encode_tiles(values, spec), state_bits)
    mse = error.square().mean().item()
    return ("encode", state_bits, bits, "auto", tiles, values.numel() / seconds, mse)


def provenance(device: str) -> tuple[str, str]:
    name = (
        torch.cuda.get_device_name() if device == "cuda" else f"{platform.machine()} {os.cpu_count()} cores"
    )
    return name, commit()


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    default = "cuda" if torch.cuda.is_available() else "cpu"
    parser.add_argument("--device", choices=("cuda", "cpu"), default=default)
    parser.add_argument("--state-bits", type=int, nargs="*", default=[8, 10, 12, 14, 16])
    parser.add_argument("--bits", type=float, nargs="*", default=[1.5, 2.0, 2.25, 3.0])
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    origin, rows = provenance(args.device), []
    for state_bits in args.state_bits:
        for bits in args.bits:
            if args.device == "cuda":
                tiles = 1 << max(11, min(17, 29 - state_bits))
                found = gpu_rows(state_bits, bits, tiles, args.repeats)
            else:
                tiles = 1 << max(5, 22 - state_bits)
                found = cpu_rows(state_bits, bits, tiles, args.repeats)
            found.append(encode_row(state_bits, bits, tiles, args.repeats, args.device))
            if args.device == "cuda":
                found.append(model_row(state_bits, bits, args.repeats))
            for row in found:
                rows.append((*row, *origin))
                what, _, _, variant, count, speed, mse = row
                where = f"{what:7} L={state_bits:2} {bits:5.3f} bits  {variant:32} {count:6} tiles"
                rate = f"{speed:9.2f} s" if what == "smollm2" else f"{speed / 1e6:9.2f} M/s  mse {mse:.5f}"
                print(f"{where} {rate}", flush=True)
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
