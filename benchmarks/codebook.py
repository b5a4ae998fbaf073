"""Search multipliers for the trellis codebook, or print its Gaussian errors beside a random table's.

    python benchmarks/codebook.py --state-bits 12 --search     # prints the best (multiplier, upper)
    python benchmarks/codebook.py --state-bits 16 --search --per-state 2   # two weights a state
    python benchmarks/codebook.py --csv benchmarks/codebook.csv    # errors for every L and rate
    python benchmarks/codebook.py --per-state 2 --csv benchmarks/codebook_pairs.csv
    python benchmarks/codebook.py --em 12 --state-bits 8 10 12 --csv benchmarks/codebook_em.csv  # of a trained table

The error is the mean squared error of a unit Gaussian source in tiles of 256, ends free (no tail-biting), the
samples scaled to unit power. A random table is drawn from a Gaussian, centred and scaled; the mean over
several draws is shown. A trained table begins as the computed one; in each round, every state's value becomes the
mean of the samples that chose it (expectation-maximisation), on other samples than those that judge. Runs on the
CPU search, so numba is needed.
"""

from __future__ import annotations

import argparse
import csv
import os
import time
from pathlib import Path

import numpy as np
import torch

from framequant.codes.trellis_codebook import PER_STATE, Codebook, codebook, symmetric_codebook
from framequant.kernels.viterbi_cpu import search

THREADS = int(os.environ.get("THREADS", "2"))
# New bits of the steps, by weights of a state.
RATES = {
    1: ((1,), (1, 2), (2,), (2, 2, 2, 3), (2, 3), (3,), (4,)),
    2: ((2,), (3,), (4,)),  # those that the search on a CPU has vectors for
}
# Weights of the logarithms of errors in the search, and in its first two rounds.
WEIGHT = {1: {(1,): 1.0, (2,): 2.0, (3,): 1.0, (4,): 0.5}, 2: {(2,): 1.0, (3,): 1.0, (4,): 2.0}}
EARLY = {1: ([(2,)], [(1,), (2,), (3,)]), 2: ([(4,)], [(2,), (4,)])}


def gaussian(tiles: int, seed: int = 0) -> np.ndarray:
    values = np.random.default_rng(seed).standard_normal((tiles, 256))
    return (values / np.sqrt((values**2).mean())).astype(np.float32)


def normalised(table: np.ndarray) -> np.ndarray:
    """Values of states, (states, weights of a state), with mean 0 and variance 1."""
    table = table.astype(np.float64) - table.mean()
    return (table / table.std()).astype(np.float32)


def chosen(table: np.ndarray, rates: tuple[int, ...], values: np.ndarray) -> np.ndarray:
    free = np.full(len(values), -1)
    state_bits = int(np.log2(len(table)))
    return search(values, np.ones_like(values), table, np.array(rates), free, state_bits, THREADS)


def gaussian_error(table: np.ndarray, rates: tuple[int, ...], values: np.ndarray) -> float:
    states = chosen(table, rates, values)
    return float(((values.astype(np.float64) - table[states].reshape(values.shape)) ** 2).mean())


def trained(table: np.ndarray, rates: tuple[int, ...], tiles: int, rounds: int) -> np.ndarray:
    """A table after some rounds of expectation-maximisation, each on samples of its own."""
    for seed in range(1, rounds + 1):
        values = gaussian(tiles, seed)
        states = chosen(table, rates, values).ravel()
        counts = np.bincount(states, minlength=len(table))
        sums = np.bincount(states, weights=values.ravel(), minlength=len(table))
        means = (sums / np.maximum(counts, 1))[:, None]
        table = np.where(counts[:, None] > 0, means, table).astype(np.float32)
    return table


def table_of(book: Codebook, state_bits: int) -> np.ndarray:
    return normalised(book.levels(torch.arange(1 << state_bits)).numpy())


def score(
    state_bits: int,
    per_state: int,
    constants: tuple[int, bool],
    rates: list[tuple[int, ...]],
    values: np.ndarray,
) -> float:
    table = table_of(symmetric_codebook(state_bits, *constants, per_state), state_bits)
    return sum(WEIGHT[per_state][r] * np.log(gaussian_error(table, r, values)) for r in rates)


def search_constants(state_bits: int, per_state: int, candidates: int, seed: int, work: float) -> None:
    generator = np.random.default_rng(seed)
    pool = [(int(generator.integers(1 << 31)) * 2 + 1, bool(i % 2)) for i in range(candidates)]
    one, some = EARLY[per_state]
    rounds = ((one, 48, 32), (some, 256, 6), (list(WEIGHT[per_state]), 2048, 1))
    for rates, tiles, survivors in rounds:
        values = gaussian(max(32, int(tiles * work)), seed=len(rates))
        start = time.time()
        scored = sorted(
            (score(state_bits, per_state, constants, rates, values), constants) for constants in pool
        )
        pool = [constants for _, constants in scored[:survivors]]
        print(f"# L={state_bits} {rates} {time.time() - start:.0f}s best {scored[0]}", flush=True)
    print(f"    {state_bits}: {pool[0]},", flush=True)


def write(path: Path | None, head: list[str], rows: list[tuple[float, ...]]) -> None:
    if path is not None:
        with path.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(head)
            writer.writerows(rows)


def report(state_bits: list[int], per_state: int, tiles: int, draws: int, path: Path | None) -> None:
    rows = []
    identifier = next(name for name, each in PER_STATE.items() if each == per_state)
    for bits in state_bits:
        table = table_of(codebook(bits, identifier), bits)
        values = gaussian(max(64, int(tiles * min(1.0, 2.0 ** (13 - bits)))), seed=99)
        for rates in RATES[per_state]:
            computed = gaussian_error(table, rates, values)
            random = [
                gaussian_error(
                    normalised(np.random.default_rng(i).standard_normal(table.shape)), rates, values
                )
                for i in range(draws if bits < 14 else 2)
            ]
            rate = sum(rates) / (len(rates) * per_state)
            row = (
                bits,
                rate,
                computed,
                float(np.mean(random)),
                computed / float(np.mean(random)),
                4.0**-rate,
            )
            rows.append(row)
            print("L={} rate={:.3f} computed {:.5f} random {:.5f} ratio {:.4f} bound {:.5f}".format(*row))
    write(path, ["state_bits", "rate", "computed", "random", "ratio", "bound"], rows)


def report_trained(state_bits: list[int], tiles: int, rounds: int, path: Path | None) -> None:
    rows, values = [], gaussian(tiles, seed=99)
    for bits in state_bits:
        table = table_of(codebook(bits), bits)
        for rates in ((1,), (2,), (3,)):
            computed = gaussian_error(table, rates, values)
            more = max(tiles, (1 << bits) // 4)  # of 256 samples: 64 for a state
            found = gaussian_error(trained(table, rates, more, rounds), rates, values)
            rows.append((bits, sum(rates) / len(rates), rounds, computed, found, found / computed))
            print("L={} rate={} {} rounds: computed {:.5f} trained {:.5f} ratio {:.4f}".format(*rows[-1]))
    write(path, ["state_bits", "rate", "rounds", "computed", "trained", "ratio"], rows)


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--state-bits", type=int, nargs="*", default=list(range(8, 17)))
    parser.add_argument("--per-state", type=int, choices=(1, 2), default=1, help="weights of a state")
    parser.add_argument("--search", action="store_true")
    parser.add_argument("--candidates", type=int, default=600)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--tiles", type=int, default=1024)
    parser.add_argument("--draws", type=int, default=4)
    parser.add_argument("--em", type=int, metavar="ROUNDS", help="train the table for so many rounds")
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    if args.search:
        for bits in args.state_bits:
            work = min(1.0, 2.0 ** (14 - bits))
            search_constants(bits, args.per_state, args.candidates, args.seed, work)
    elif args.em:
        report_trained(args.state_bits, args.tiles, args.em, args.csv)
    else:
        report(args.state_bits, args.per_state, args.tiles, args.draws, args.csv)


if __name__ == "__main__":
    main()
