"""Codebooks of a trellis that would be cheaper to decode: their error on a unit Gaussian, beside the one there is.

    python benchmarks/trellis_variants.py --csv benchmarks/trellis_variants.csv

Two minutes on two cores. Two bits a weight, paths of 256 weights with free ends, constants of the codebook drawn at
random: the median and the best of several draws, all kinds with the same draws. A state s of L bits becomes weights
through sums of the four bytes of ``m s + a`` (mod 2**32), as in ``codes.trellis_codebook``:

- one: a weight a state, two new bits: the default.
- two: two weights a state, four new bits, each with constants of its own: half as many windows to cut out of the bits.
- pairs: two weights a state, each the sum of two of the four bytes: half as many windows, products and byte sums
  (``weights_per_state=2``).
- taps: one weight a state, the sum of its bits as +1 and -1 times taps, fitted in turns with the paths: no decoding, as
  taps can be applied to activations. Of the first L alone: thirty searches a draw.
"""

from __future__ import annotations

import argparse
import csv
from pathlib import Path

import torch
from measure import commit
from torch import Tensor

from framequant.kernels.viterbi import search

LENGTH, BITS, GAIN = 256, 2, 1.03
KINDS = ("one", "two", "pairs", "taps")
FITS = 30  # of taps to paths


def hashed(states: Tensor, multiplier: int, addend: int) -> list[Tensor]:
    """The four bytes of each state's hash, centred."""
    found = (states * multiplier + addend) & 0xFFFFFFFF
    return [((found >> (8 * i)) & 255).float() - 127.5 for i in range(4)]


def codebook(kind: str, state_bits: int, constants: list[int]) -> Tensor:
    """Weights of each state, (states, 1 or 2), of unit variance."""
    states = torch.arange(1 << state_bits, dtype=torch.int64)
    first = hashed(states, constants[0], constants[1])
    if kind == "pairs":
        values = torch.stack([first[0] + first[1], first[2] + first[3]], 1)
    elif kind == "two":
        values = torch.stack([sum(first), sum(hashed(states, constants[2], constants[3]))], 1)
    else:
        values = torch.stack([sum(first)], 1)
    return values / values.std()


def paths(x: Tensor, values: Tensor) -> tuple[Tensor, Tensor]:
    """Mean squared errors of the best paths through (sequences, weights), and their states (sequences, steps)."""
    states = search(x, values, (BITS * values.shape[1],)).long()
    return (x - values[states].flatten(1)).square().mean(1), states


def taps_error(x: Tensor, state_bits: int) -> float:
    """Error of taps that begin at random and are fitted to the paths by least squares, paths and taps in turns."""
    bits = (torch.arange(1 << state_bits)[:, None] >> torch.arange(state_bits)) % 2 * 2.0 - 1.0
    taps = torch.nn.functional.normalize(torch.randn(state_bits), dim=0)
    for _ in range(FITS):
        errors, states = paths(x, (bits @ taps)[:, None])
        taps = torch.linalg.lstsq(bits[states.flatten()], x.reshape(-1, 1)).solution[:, 0]
    return float(errors.mean())


def error(kind: str, state_bits: int, sequences: int, constants: list[int]) -> float:
    """Mean squared error of a kind, of the same numbers for all kinds and constants."""
    torch.manual_seed(0)
    x = torch.randn(sequences, LENGTH)
    if kind == "taps":
        torch.manual_seed(constants[0])
        return taps_error(x, state_bits)
    return float(paths(x / GAIN, codebook(kind, state_bits, constants))[0].mean()) * GAIN**2


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--kinds", nargs="+", choices=KINDS, default=list(KINDS))
    parser.add_argument("--state-bits", nargs="+", type=int, default=[12, 14, 16])
    parser.add_argument("--sequences", type=int, default=48)
    parser.add_argument("--draws", type=int, default=5)
    parser.add_argument("--csv", type=Path)
    options = parser.parse_args()
    generator = torch.Generator().manual_seed(0)
    draws = [
        (torch.randint(1 << 31, (4,), generator=generator) * 2 + 1).tolist() for _ in range(options.draws)
    ]
    rows = [("kind", "state_bits", "median", "best", "draws", "sequences", "commit")]
    jobs = [(kind, bits) for bits in options.state_bits for kind in options.kinds]
    for kind, bits in jobs:
        if kind == "taps" and bits != options.state_bits[0]:
            continue
        found = sorted(error(kind, bits, options.sequences, draw) for draw in draws)
        row = (kind, bits, round(found[len(found) // 2], 4), round(found[0], 4))
        rows.append((*row, options.draws, options.sequences, commit()))
        print(*rows[-1][:4], flush=True)
    if options.csv:
        with options.csv.open("w", newline="") as file:
            csv.writer(file, lineterminator="\n").writerows(rows)


if __name__ == "__main__":
    main()
