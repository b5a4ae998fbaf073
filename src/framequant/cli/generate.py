"""``framequant generate``: continue a prompt with a checkpoint or any model."""

from __future__ import annotations

import time
from typing import Annotated

import typer

from framequant.cli.console import Reporter, seconds
from framequant.cli.options import DeviceOption, DtypeOption, JsonOption, choose_device

NAME = "generate"
EXAMPLES = (
    "Examples:\n\n"
    'framequant generate smol-2bit "The capital of France is"\n\n'
    'framequant generate smollm2 "Tell me a story." --chat --temperature 0.7 --max-new-tokens 100'
)


def run(
    directory: Annotated[
        str, typer.Argument(help="A checkpoint of framequant, or any model that quantize accepts.")
    ],
    prompt: Annotated[str, typer.Argument(help="Text to continue.")],
    max_new_tokens: Annotated[int, typer.Option(min=1, help="Most tokens to add.")] = 64,
    temperature: Annotated[float, typer.Option(min=0.0, help="0 takes the most likely token.")] = 0.0,
    seed: Annotated[int, typer.Option(min=0, help="Of the sampling.")] = 0,
    chat: Annotated[
        bool, typer.Option("--chat", help="Wrap the prompt in the model's chat template.")
    ] = False,
    device: DeviceOption = "auto",
    dtype: DtypeOption = "auto",
    as_json: JsonOption = False,
) -> None:
    """Continue PROMPT with the model in DIRECTORY."""
    from framequant.evaluation.generate import generate
    from framequant.integrations.sources import open_model

    reporter = Reporter(as_json)
    place = choose_device(device)
    with reporter.stage(f"loading {directory}"):
        opened = open_model(directory, dtype, place)
    tokenizer = opened.require_tokenizer()
    start = time.perf_counter()
    with reporter.err.status("generating"):
        text = generate(opened.model, tokenizer, prompt, max_new_tokens, temperature, seed, chat)
    took = time.perf_counter() - start
    tokens = len(tokenizer(text, add_special_tokens=False)["input_ids"])
    reporter.out.print(prompt if not chat else "", style="dim", end="", soft_wrap=True, markup=False)
    reporter.out.print(text, soft_wrap=True, markup=False)
    reporter.err.print(f"[dim]{tokens} tokens in {seconds(took)}[/]")
    reporter.print_json(
        {"model": directory, "prompt": prompt, "text": text, "tokens": tokens, "seconds": took}
    )
