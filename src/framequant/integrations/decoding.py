"""Decoding of language models with a static cache: on a GPU every step is one replay of a CUDA graph.

Works with any transformers model that takes transformers' ``StaticCache``, quantized or float. A graph is used only
where its first steps were compared with eager ones; else, and on a CPU, steps run eagerly, with the same results.
``model.generate`` of transformers works as it is beside this, and offers sampling, beams and streaming.

Must not import evaluation or the command line.
"""

from __future__ import annotations

import inspect
import warnings
from collections.abc import Callable
from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from framequant.errors import ConfigError
from framequant.integrations.compiled_blocks import can_fuse, compiled_blocks, fused_blocks

#: Relative difference from eager logits above which a graph is not used.
TOLERANCE = 0.05
_CHECKED_STEPS = 3
_NEXT_WAY = {
    "fused ": "blocks are compiled as they are",
    "compiled ": "blocks are not compiled",
    "": "steps run eagerly",
}


class Decoder:
    """Decodes with one model, one batch size and one greatest length; the memory of its cache is kept.

    Args:
        model: a causal language model of transformers, in evaluation mode on its device.
        max_length: prompt and new tokens together, at most.
        batch: sequences at a time; all prompts of a batch are of one length.
        graph: capture steps in a CUDA graph; None for yes on a GPU.
        compile_blocks: compile the model's repeated blocks with ``torch.compile`` before the capture, once for all
            blocks of a kind, so that norms, rotations and gates become single kernels or parts of our linears, and
            attention is ours. Costs seconds to a minute.

    Attributes:
        graph: the captured graph, or None where steps run eagerly.

    Raises:
        ConfigError: the model is no language model of transformers, or a size is not positive.

    Examples:
        decoder = Decoder(model, max_length=512)
        ids = decoder.generate(tokenizer("The tides", return_tensors="pt").input_ids, max_new_tokens=64)
    """

    def __init__(
        self,
        model: nn.Module,
        max_length: int,
        *,
        batch: int = 1,
        graph: bool | None = None,
        compile_blocks: bool = False,
    ) -> None:
        if not hasattr(model, "config") or not callable(getattr(model, "generate", None)):
            raise ConfigError(
                f"{type(model).__name__} is no language model of transformers; it cannot decode."
            )
        if max_length < 1 or batch < 1:
            raise ConfigError(f"max_length = {max_length} and batch = {batch} must be positive.")
        from transformers import StaticCache

        config: Any = model.config
        self.model, self.max_length, self.batch = model, max_length, batch
        self.device = next(model.parameters()).device
        self._last_only = "logits_to_keep" in inspect.signature(model.forward).parameters
        self.cache = StaticCache(config=config, max_cache_len=max(max_length, _CHECKED_STEPS + 1))
        self.tokens = torch.zeros((batch, 1), dtype=torch.long, device=self.device)
        self.graph: torch.cuda.CUDAGraph | None = None
        with torch.no_grad():
            self.logits = self._forward(self.tokens).clone()
            self._unmark()
            if self.device.type == "cuda" if graph is None else graph:
                self._try_capture(compile_blocks)
            self.cache.reset()

    def prompt(self, ids: Int[Tensor, "batch length"]) -> Float[Tensor, "batch vocabulary"]:
        """Begin anew with a prompt.

        Args:
            ids: token ids, without padding.

        Returns:
            Logits of the next token; overwritten by the next call.

        Raises:
            ConfigError: the prompt is empty, of another batch size, or too long.
        """
        if ids.ndim != 2 or ids.shape[0] != self.batch or not 1 <= ids.shape[1] <= self.max_length:
            raise ConfigError(
                f"a prompt of shape {tuple(ids.shape)} does not fit: this decoder takes ({self.batch}, 1 … "
                f"{self.max_length}) token ids."
            )
        self.cache.reset()
        with torch.no_grad():
            self._keep(self._forward(ids.to(self.device)))
        return self.logits

    def step(self, tokens: Int[Tensor, "batch 1"] | None = None) -> Float[Tensor, "batch vocabulary"]:
        """Read one token of each sequence.

        Args:
            tokens: the tokens; None for the most likely ones after the last call.

        Returns:
            Logits of the next token; overwritten by the next call. It is the caller's to stop at ``max_length``.
        """
        with torch.no_grad():
            if tokens is not None:
                self.tokens.copy_(tokens)
            if self.graph is not None:
                self.graph.replay()
            else:
                self._advance()
        return self.logits

    def generate(
        self,
        ids: Int[Tensor, "batch length"],
        max_new_tokens: int,
        choose: Callable[[Tensor], Tensor] | None = None,
        stop: int | None = None,
    ) -> Int[Tensor, "batch length+new"]:
        """Continue prompts of one length.

        Args:
            ids: the prompts' token ids.
            max_new_tokens: how many to add, at most.
            choose: from logits (batch, vocabulary) to tokens (batch, 1); the most likely by default.
            stop: a token after which to stop, once every sequence has it.

        Returns:
            Prompts and new tokens, on the model's device.

        Raises:
            ConfigError: prompt and new tokens are longer than ``max_length``, or ``prompt`` refuses the prompt.
        """
        if max_new_tokens < 1 or ids.shape[-1] + max_new_tokens > self.max_length:
            raise ConfigError(
                f"{ids.shape[-1]} prompt tokens and {max_new_tokens} new ones: this decoder has max_length = "
                f"{self.max_length}. Make one with a larger max_length."
            )
        logits = self.prompt(ids)
        done = torch.zeros((self.batch, 1), dtype=torch.bool, device=self.device)
        found = [ids.to(self.device)]
        for number in range(max_new_tokens):
            chosen = self.tokens.clone() if choose is None else choose(logits)
            found.append(chosen)
            if stop is not None:
                done |= chosen == stop
                if bool(done.all()):
                    break
            if number + 1 < max_new_tokens:
                logits = self.step(None if choose is None else chosen)
        return torch.cat(found, dim=1)

    def _forward(self, ids: Tensor) -> Tensor:
        """Logits after the last token."""
        options = {"logits_to_keep": 1} if self._last_only else {}
        output = self.model(input_ids=ids, past_key_values=self.cache, use_cache=True, **options)
        found: Tensor = output.logits[:, -1]
        return found

    def _keep(self, logits: Tensor) -> None:
        self.logits.copy_(logits)
        self.tokens.copy_(logits.argmax(-1, keepdim=True))

    def _advance(self) -> None:
        self._keep(self._forward(self.tokens))

    def _unmark(self) -> None:
        """Give cache layers tensors without transformers' mark of a static address, which compiled code would guard."""
        for layer in self.cache.layers:
            for name, value in vars(layer).items():
                if isinstance(value, Tensor):
                    setattr(layer, name, value.detach())

    def _try_capture(self, compile_blocks: bool) -> None:
        """Capture a step, and keep the graph if it does what eager steps do."""
        before = self._numbers()
        expected = self._first_logits()
        if self._numbers() != before:
            warnings.warn(
                "The model's cache counts in Python, which no CUDA graph can hold; steps run eagerly.",
                RuntimeWarning,
                stacklevel=3,
            )
            return
        for way in self._ways(compile_blocks):
            problem = self._capture_problem(way, expected)
            if not problem:
                return
            self.graph = None
            warnings.warn(
                f"A CUDA graph of a {way}decoding step {problem}; {_NEXT_WAY[way]}.",
                RuntimeWarning,
                stacklevel=3,
            )

    def _ways(self, compile_blocks: bool) -> list[str]:
        """How a step may be captured, the fastest first."""
        if not compile_blocks:
            return [""]
        return ["fused ", "compiled ", ""] if can_fuse(self.model, self.cache) else ["compiled ", ""]

    def _capture_problem(self, way: str, expected: Tensor) -> str:
        """Capture a step; what is wrong with it, or nothing."""
        try:
            with self._blocks(way):
                self.graph = self._capture()
            error = float((self._first_logits() - expected).norm() / expected.norm().clamp(min=1e-30))
        except Exception as failure:  # whatever a model's code does that a capture forbids
            return f"failed: {type(failure).__name__}: {str(failure)[:200]}"
        return "" if error <= TOLERANCE else f"differs from eager steps by {error:.2g}"

    def _blocks(self, way: str) -> AbstractContextManager[None]:
        """Blocks compiled while the context lasts, with what their device can do."""
        if not way:
            return nullcontext()
        options = _early_starts(self.device)
        if way == "fused ":
            return fused_blocks(self.model, self.cache, **options)
        return compiled_blocks(self.model, self.cache, **({"options": options} if options else {}))

    def _numbers(self) -> list[Any]:
        """What the cache's layers count in Python."""
        return [
            {name: value for name, value in vars(layer).items() if isinstance(value, int | float)}
            for layer in self.cache.layers
        ]

    def _first_logits(self) -> Tensor:
        """Logits of the first steps of a fresh cache, on fixed tokens, in float32."""
        self.cache.reset()
        found = []
        for number in range(_CHECKED_STEPS):
            found.append(self.step(torch.full_like(self.tokens, number + 1)).float().clone())
        return torch.stack(found)

    def _capture(self) -> torch.cuda.CUDAGraph:
        """A graph of one step; kernels are compiled and chosen before, on a side stream."""
        self.cache.reset()
        side = torch.cuda.Stream()
        side.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(side):
            for _ in range(_CHECKED_STEPS):
                self._advance()
        torch.cuda.current_stream().wait_stream(side)
        graph = torch.cuda.CUDAGraph()
        self.cache.reset()
        with torch.cuda.graph(graph):
            self._advance()
        return graph


def _early_starts(device: torch.device) -> dict[str, Any]:
    """Options of inductor that let a kernel start while the one before it ends, where both can."""
    from torch._inductor import config

    if device.type != "cuda" or torch.cuda.get_device_capability(device) < (9, 0):
        return {}
    return {"triton.enable_pdl": True} if hasattr(config.triton, "enable_pdl") else {}
