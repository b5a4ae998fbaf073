"""Continue a prompt with a causal language model, greedily by default."""

from __future__ import annotations

from typing import Any

import torch
from torch import nn

from framequant.errors import ModelSourceError


@torch.inference_mode()
def generate(
    model: nn.Module,
    tokenizer: Any,
    prompt: str,
    max_new_tokens: int = 64,
    temperature: float = 0.0,
    seed: int = 0,
    chat: bool = False,
) -> str:
    """Continue a prompt.

    Args:
        model: a transformers model that generates.
        tokenizer: its tokenizer.
        prompt: text to continue.
        max_new_tokens: most tokens to add.
        temperature: 0 takes the most likely token; larger values sample.
        seed: of the sampling.
        chat: wrap the prompt in the tokenizer's chat template.

    Returns:
        The added text alone.

    Raises:
        ModelSourceError: the model does not generate text, or has no chat template, or the prompt is empty.
    """
    can_generate = getattr(model, "can_generate", None)
    if can_generate is None or not can_generate():
        raise ModelSourceError(f"{type(model).__name__} does not generate text.")
    if not prompt:
        raise ModelSourceError("the prompt is empty.")
    if chat:
        if getattr(tokenizer, "chat_template", None) is None:
            raise ModelSourceError("the tokenizer has no chat template; leave out --chat.")
        prompt = tokenizer.apply_chat_template(
            [{"role": "user", "content": prompt}], tokenize=False, add_generation_prompt=True
        )
    encoded = tokenizer(prompt, return_tensors="pt", add_special_tokens=not chat).to(
        next(model.parameters()).device
    )
    torch.manual_seed(seed)
    options: dict[str, Any] = {"do_sample": temperature > 0}
    if temperature > 0:
        options["temperature"] = temperature
    padding = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    output = model.generate(
        input_ids=encoded["input_ids"],
        attention_mask=encoded.get("attention_mask"),
        max_new_tokens=max_new_tokens,
        pad_token_id=padding,
        **options,
    )
    return str(tokenizer.decode(output[0, encoded["input_ids"].shape[1] :], skip_special_tokens=True))
