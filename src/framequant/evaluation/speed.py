"""How fast a language model reads a prompt and decodes, and what share of the memory's bandwidth that is.

Times are medians of repeated runs after one that is not counted, of one sequence, through
``integrations.decoding.Decoder``. The limit of decoding is what one token must read, the model's tensors without
the rows of embeddings that it does not look up and the cache, over the bandwidth that copying reaches on the device.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor, nn

from framequant.integrations.decoding import Decoder

#: Bytes copied to measure the bandwidth, far above any cache.
COPY_BYTES = {"cpu": 1 << 28, "cuda": 1 << 30}


@dataclass(frozen=True)
class Speed:
    """Of one model on one device, one sequence.

    Attributes:
        prompt_tokens: of the prompt.
        first_token_seconds: from the prompt's ids to the first new token.
        prompt_tokens_per_second: of the prompt.
        tokens_per_second: of decoding.
        graph: whether steps were replays of a CUDA graph.
        model_bytes: of parameters and buffers, each once.
        memory_bytes: allocated on the GPU with cache and graph; on a CPU ``model_bytes`` and the cache.
        bytes_per_token: that decoding one token must read.
        bandwidth: bytes per second read and written by a copy.
        bandwidth_fraction: ``bytes_per_token`` per second of decoding, over ``bandwidth``.
    """

    prompt_tokens: int
    first_token_seconds: float
    prompt_tokens_per_second: float
    tokens_per_second: float
    graph: bool
    model_bytes: int
    memory_bytes: int
    bytes_per_token: int
    bandwidth: float
    bandwidth_fraction: float

    def to_dict(self) -> dict[str, Any]:
        """Fields by name."""
        return asdict(self)


def measure_speed(
    model: nn.Module,
    prompt: int = 128,
    tokens: int = 64,
    *,
    repeats: int = 3,
    compile_blocks: bool = False,
    bandwidth: float | None = None,
) -> Speed:
    """Measure a language model of transformers on its device, with random token ids.

    Args:
        model: in evaluation mode.
        prompt: tokens of the prompt, at least 1.
        tokens: to decode after it, at least 2.
        repeats: runs whose median counts.
        compile_blocks: see ``Decoder``.
        bandwidth: measured before on this device, or None to measure it.

    Raises:
        ConfigError: the model is no language model of transformers.
    """
    decoder = Decoder(model, prompt + tokens, compile_blocks=compile_blocks)
    device, vocabulary = decoder.device, model.config.get_text_config(decoder=True).vocab_size
    generator = torch.Generator().manual_seed(0)
    ids = torch.randint(0, vocabulary, (1, prompt), generator=generator).to(device)

    def decode() -> None:
        for _ in range(tokens):
            decoder.step()

    first, steps = [], []
    for _ in range(repeats + 1):
        first.append(_seconds(lambda: int(decoder.prompt(ids).argmax()), device))
        steps.append(_seconds(decode, device) / tokens)
    first_token, step = statistics.median(first[1:]), statistics.median(steps[1:])
    cache = tensor_bytes([value for layer in decoder.cache.layers for value in _tensors(layer)])
    read = bytes_read(model) + cache
    size = tensor_bytes([*model.parameters(), *model.buffers()])
    allocated = torch.cuda.memory_allocated(device) if device.type == "cuda" else size + cache
    bandwidth = copy_bandwidth(device) if bandwidth is None else bandwidth
    return Speed(
        prompt_tokens=prompt,
        first_token_seconds=first_token,
        prompt_tokens_per_second=prompt / first_token,
        tokens_per_second=1 / step,
        graph=decoder.graph is not None,
        model_bytes=size,
        memory_bytes=allocated,
        bytes_per_token=read,
        bandwidth=bandwidth,
        bandwidth_fraction=read / step / bandwidth,
    )


def tensor_bytes(tensors: list[Tensor]) -> int:
    """Bytes of tensors, those that share memory once."""
    return sum({tensor.data_ptr(): tensor.numel() * tensor.element_size() for tensor in tensors}.values())


def bytes_read(model: nn.Module) -> int:
    """Bytes of a model that one token reads: all tensors but embeddings, of which it looks up a row.

    An embedding that is tied to a head is read by the head.
    """
    heads = {module.weight.data_ptr() for module in model.modules() if isinstance(module, nn.Linear)}
    tables = {
        module.weight.data_ptr()
        for module in model.modules()
        if isinstance(module, nn.Embedding) and module.weight.data_ptr() not in heads
    }
    held = [*model.parameters(), *model.buffers()]
    return tensor_bytes([tensor for tensor in held if tensor.data_ptr() not in tables])


def copy_bandwidth(device: torch.device) -> float:
    """Bytes per second, read and written together, of the fastest of five copies of a large tensor."""
    source = torch.ones(COPY_BYTES.get(device.type, COPY_BYTES["cpu"]), dtype=torch.uint8, device=device)
    target = torch.empty_like(source)
    best = min(_seconds(lambda: target.copy_(source), device) for _ in range(5))
    return 2 * source.numel() / best


def _tensors(layer: Any) -> list[Tensor]:
    return [value for value in vars(layer).values() if isinstance(value, Tensor)]


def _seconds(run: Callable[[], object], device: torch.device) -> float:
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    start = time.perf_counter()
    run()
    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter() - start
