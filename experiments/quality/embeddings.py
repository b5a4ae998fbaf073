r"""What it costs to round the token embeddings, which a tied output head shares, and what it would save.

    python experiments/quality/embeddings.py smollm2 --text ../shared/data/wikitext-2-raw/calibration.txt \\
        --csv experiments/quality/embeddings.csv

Every group of a row's entries gets a scale in 16 bits and symmetric levels, rounded to nearest, with the best of
some clips for its squared error. Divergence and perplexity are those of the float model with these embeddings, on the
last windows of the text; bytes are of codes and scales.
"""

from __future__ import annotations

import copy
from pathlib import Path
from typing import Annotated

import torch
import typer
from jaxtyping import Float
from sweep import write
from torch import Tensor

from framequant.cli.options import choose_device
from framequant.evaluation.kl import kl_divergence
from framequant.evaluation.perplexity import perplexity
from framequant.evaluation.text import read_text, tokenize, windows
from framequant.integrations.sources import open_model

CLIPS = (1.0, 0.95, 0.9, 0.85, 0.8, 0.75, 0.7)
#: Bits, and entries of a group; 0 for whole rows.
SETTINGS = ((8, 0), (6, 0), (6, 64), (5, 64), (4, 0), (4, 64), (3, 64))


def rounded(table: Float[Tensor, "n d"], bits: int, group: int) -> tuple[Float[Tensor, "n d"], int]:
    """A table as it would be stored, and the bytes that takes."""
    groups = table.float().reshape(-1, group or table.shape[1])
    most = 2 ** (bits - 1) - 1
    best, error = torch.zeros_like(groups), torch.full((len(groups), 1), float("inf"))
    for clip in CLIPS:
        scale = (clip / most * groups.abs().amax(dim=1, keepdim=True)).half().float().clamp(min=1e-7)
        found = (groups / scale).round().clamp(-most - 1, most) * scale
        lost = (found - groups).square().sum(dim=1, keepdim=True)
        best, error = torch.where(lost < error, found, best), torch.minimum(lost, error)
    return best.view(table.shape).to(table.dtype), table.numel() * bits // 8 + 2 * len(groups)


def main(
    model: str,
    text: Annotated[Path, typer.Option()],
    held: int = 24,
    sequence_length: int = 1024,
    device: str = "auto",
    dtype: str = "float32",
    csv_file: Annotated[Path | None, typer.Option("--csv")] = None,
) -> None:
    opened = open_model(model, dtype=dtype, device=choose_device(device))
    judged = windows(tokenize(opened.require_tokenizer(), read_text(text)), sequence_length)[-held:]
    base = perplexity(opened.model, judged).perplexity
    table = opened.model.get_input_embeddings().weight
    rows = []
    for bits, group in SETTINGS:
        changed = copy.deepcopy(opened.model)
        value, size = rounded(table.detach(), bits, group)
        changed.get_input_embeddings().weight.data.copy_(value)
        ratio = perplexity(changed, judged).perplexity / base
        kl = kl_divergence(changed, opened.model, judged).kl
        rows.append(
            {"bits": bits, "group": group or table.shape[1], "mbytes": round(size / 1e6, 2),
             "of_bfloat16": round(size / table.numel() / 2, 4), "ratio": round(ratio, 4), "kl": round(kl, 5)}
        )  # fmt: skip
        print(rows[-1], flush=True)
    if csv_file:
        write(rows, csv_file)


if __name__ == "__main__":
    typer.run(main)
