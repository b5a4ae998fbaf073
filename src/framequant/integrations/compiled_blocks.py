"""A decoder's repeated blocks through ``torch.compile`` for one token a step, compiled once for all of them.

``fused_blocks`` also gives the blocks our attention of one query (``kernels/one_query_ops.py``) and lets
``block_graphs`` move norms, gates and sums into our linears. Both leave a model as it was.

Must not import evaluation or the command line.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional
from transformers import AttentionInterface, StaticCache
from transformers.cache_utils import StaticLayer

from framequant.errors import ConfigError
from framequant.integrations.block_graphs import compile_fused
from framequant.kernels import launches

#: Under which transformers knows our attention. No mask is made for a name that has none.
ATTENTION = "framequant_one_query"
_DTYPES = (torch.float16, torch.bfloat16)


class Waiting(NamedTuple):
    """What a step adds to one of a layer's tensors, before it is there.

    Attributes:
        new: (batch, heads, 1, dim).
        kept: the cache's tensor, (batch, heads, longest, dim).
        length: positions in it.
    """

    new: Tensor
    kept: Tensor
    length: Tensor


class _OneLayer:
    """A cache as one block sees it: the block's own layer, so that compiled code does not depend on its number."""

    def __init__(self, layer: Any, waits: bool) -> None:
        self.layer, self.waits = layer, waits

    def update(self, keys: Tensor, values: Tensor, _: int, *args: Any, **kwargs: Any) -> Any:
        """Append to the layer, as transformers' caches do, or leave that to our attention."""
        if self.waits:
            length = self.layer.cumulative_length
            return Waiting(keys, self.layer.keys, length), Waiting(values, self.layer.values, length)
        return self.layer.update(keys, values, *args, **kwargs)

    def get_seq_length(self, _: int = 0) -> Any:
        """Tokens in the layer."""
        return self.layer.get_seq_length()


def repeated_blocks(model: nn.Module, count: int) -> list[nn.Module]:
    """The blocks of the outermost list of ``count`` modules of one class; empty if there is none."""
    for module in model.modules():
        if isinstance(module, nn.ModuleList) and len(module) == count and len({type(b) for b in module}) == 1:
            return list(module)
    return []


@contextmanager
def compiled_blocks(model: nn.Module, cache: Any, waits: bool = False, **options: Any) -> Iterator[None]:
    """Run a decoder's blocks through ``torch.compile`` while the context lasts, compiled once for all of them.

    Args:
        model: its repeated blocks are found by the number of the cache's layers.
        cache: whose layers belong to the blocks, in order.
        waits: blocks do not write to the cache; their attention is told what to write, and the last block counts.
        options: for ``torch.compile``.
    """
    blocks = repeated_blocks(model, len(cache.layers))
    for block, layer in zip(blocks, cache.layers, strict=False):
        run = torch.compile(type(block).forward, dynamic=False, **options)
        counted = cache if waits and block is blocks[-1] else None
        object.__setattr__(
            block, "forward", partial(_run_block, run, block, _OneLayer(layer, waits), counted)
        )
    try:
        yield
    finally:
        for block in blocks:
            object.__delattr__(block, "forward")


def _run_block(
    run: Callable[..., Any],
    block: nn.Module,
    layer: _OneLayer,
    counted: StaticCache | None,
    *args: Any,
    **kwargs: Any,
) -> Any:
    """One block's step; after the last one, ``counted`` has a position more."""
    if kwargs.get("past_key_values") is not None:
        kwargs["past_key_values"] = layer
    found = run(block, *args, **kwargs)
    if counted is not None:
        torch._foreach_add_([each.cumulative_length for each in counted.layers], 1)
    return found


def attend(
    module: nn.Module,
    query: Tensor,
    key: Waiting,
    value: Waiting,
    attention_mask: Tensor | None,
    scaling: float | None = None,
    dropout: float = 0.0,
    **options: Any,
) -> tuple[Tensor, None]:
    """Our attention as transformers' ``AttentionInterface`` calls it.

    Raises:
        ConfigError: an option that would change what is attended to, or how.
    """
    asked = [
        name
        for name in ("sliding_window", "softcap", "s_aux", "position_bias")
        if options.get(name) is not None
    ]
    if asked or attention_mask is not None:
        raise ConfigError(f"attention of one query knows no {', '.join(asked) or 'mask'}.")
    scale = query.shape[-1] ** -0.5 if scaling is None else scaling
    if not launches.query_pays(query.shape[1] // key.kept.shape[1], key.kept.shape[2]):
        return _attend_apart(query, key, value, scale), None
    found = torch.ops.framequant.one_query(query, key.new, value.new, key.kept, value.kept, key.length, scale)
    return found, None


def _attend_apart(query: Tensor, key: Waiting, value: Waiting, scale: float) -> Tensor:
    """The same by torch's attention: writes to the cache, a mask, and the sum."""
    place = key.length.reshape(1)
    key.kept.index_copy_(2, place, key.new)
    value.kept.index_copy_(2, place, value.new)
    there = torch.arange(key.kept.shape[2], device=place.device) <= place
    found = functional.scaled_dot_product_attention(
        query, key.kept, value.kept, attn_mask=there[None, None, None], scale=scale, enable_gqa=True
    )
    return found.transpose(1, 2).contiguous()


def _text_config(model: nn.Module) -> Any:
    """The settings of the decoder, which may be one part of several."""
    config: Any = model.config
    return config.get_text_config(decoder=True)


def can_fuse(model: nn.Module, cache: StaticCache) -> bool:
    """Whether ``fused_blocks`` may be tried: full attention over whole tensors, and heads that the kernel takes."""
    try:
        from framequant.kernels import one_query_ops
    except ImportError:  # no triton
        return False
    from framequant.kernels.triton_support import COMPILED

    heads = getattr(_text_config(model), "num_attention_heads", 0)
    for layer in cache.layers:
        if type(layer) is not StaticLayer or layer.keys is None or layer.keys.dtype not in _DTYPES:
            return False
        if layer.keys.shape != layer.values.shape or not (layer.keys.is_cuda or not COMPILED):
            return False
        if not one_query_ops.takes(heads, layer.keys.shape[1], layer.keys.shape[3]):
            return False
    return bool(repeated_blocks(model, len(cache.layers)))


@contextmanager
def fused_blocks(model: nn.Module, cache: StaticCache, **options: Any) -> Iterator[None]:
    """``compiled_blocks`` with our attention and with what ``block_graphs`` moves; ``can_fuse`` holds.

    Args:
        options: of inductor.
    """
    AttentionInterface.register(ATTENTION, attend)
    config = _text_config(model)
    before = config._attn_implementation
    config._attn_implementation = ATTENTION
    try:
        with compiled_blocks(model, cache, waits=True, backend=compile_fused, options=options):
            yield
    finally:
        config._attn_implementation = before
