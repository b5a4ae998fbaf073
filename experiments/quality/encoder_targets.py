"""Which targets suit a post-norm sentence encoder: agreement with the float model on held-out sentences.

    python experiments/quality/encoder_targets.py ../shared/data/stsb/stsb-en-dev.csv --csv encoder_targets.csv

A fifth of the sentences, drawn by seed, is held out; the rest calibrates. No score of the table is looked at:
``distance`` is the mean of 1 − cos between a held-out sentence's two embeddings, and ``agreement`` Spearman's
rank correlation between both models' cosines over random pairs of held-out sentences.
"""

from __future__ import annotations

import argparse
import copy
import csv
import itertools
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional

import framequant as fq
from framequant.evaluation.sentences import (
    calibration_sentences,
    embeddings,
    read_pairs,
    sentence_batches,
    spearman,
)
from framequant.integrations.sources import open_model

COLUMNS = ("bits", "float_targets", "residual_targets", "measured_bits", "distance", "agreement", "seconds")


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("table", type=Path)
    parser.add_argument("--model", default="minilm")
    parser.add_argument("--bits", type=float, nargs="*", default=[2.0, 2.25])
    parser.add_argument("--alpha", type=float, nargs="*", default=[0.0, 0.5, 0.75, 1.0])
    parser.add_argument("--beta", type=float, nargs="*", default=[0.0, 0.5, 0.75, 1.0])
    parser.add_argument("--state-bits", type=int, default=12)
    parser.add_argument("--csv", type=Path)
    args = parser.parse_args()
    device = "cuda" if torch.cuda.is_available() else "cpu"
    opened = open_model(args.model, device=device)
    sentences = read_pairs(args.table).sentences
    order = np.random.RandomState(0).permutation(len(sentences))
    held = sorted((sentences[i] for i in order[: len(order) // 5]), key=len)
    data = calibration_sentences(opened.tokenizer, [sentences[i] for i in order[len(order) // 5 :]], 256)
    pairs = torch.from_numpy(np.random.RandomState(1).randint(0, len(held), (2, 20000)))

    def embed(model: torch.nn.Module) -> torch.Tensor:
        return functional.normalize(embeddings(model, sentence_batches(opened.tokenizer, held, 256)), dim=1)

    reference, rows = embed(opened.model), []
    for bits, alpha, beta in itertools.product(args.bits, args.alpha, args.beta):
        config = fq.FrameQuantConfig(
            code="trellis", bits=bits, redundancy=1, frame="hadamard", state_bits=args.state_bits,
            float_targets=alpha, residual_targets=beta,
        )  # fmt: skip
        model = copy.deepcopy(opened.model)
        report = fq.quantize_(model, data, config)
        found = embed(model)
        distance = float(1 - (found * reference).sum(1).mean())
        cosines = [(x[pairs[0]] * x[pairs[1]]).sum(1).numpy() for x in (reference, found)]
        values = (report.bits_per_weight, distance, spearman(*cosines), report.seconds)
        rows.append((bits, alpha, beta, *(round(value, 5) for value in values)))
        print(dict(zip(COLUMNS, rows[-1], strict=True)), flush=True)
    if args.csv is not None:
        with args.csv.open("w", newline="") as file:
            writer = csv.writer(file)
            writer.writerow(COLUMNS)
            writer.writerows(rows)


if __name__ == "__main__":
    main()
