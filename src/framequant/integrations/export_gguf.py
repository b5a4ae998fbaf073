"""GGUF of a dequantized decoder, in the layout that llama.cpp and transformers' ``gguf_file=`` read.

Names come from the ``gguf`` package's own map. Llama's rotary embedding turns adjacent pairs of rows in GGUF and
halves of a head in transformers, so the rows of q and k change places.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from framequant.errors import ModelSourceError
from framequant.integrations.export import atomic_file
from framequant.integrations.sources import OpenedModel

#: transformers' model_type: GGUF's architecture, and whether its rotary embedding turns adjacent rows.
ARCHITECTURES = {
    "llama": ("llama", True),
    "mistral": ("llama", True),
    "qwen2": ("qwen2", False),
    "qwen3": ("qwen3", False),
}
_NORMAL, _CONTROL, _USER_DEFINED, _UNUSED = 1, 3, 4, 5


def import_gguf() -> Any:
    """Import gguf.

    Raises:
        ModelSourceError: it is not installed; the message has the command.
    """
    try:
        import gguf
    except ImportError as error:
        raise ModelSourceError("GGUF needs the gguf extra. Run: pip install 'framequant[gguf]'") from error
    return gguf


def write(opened: OpenedModel, out: Path, overwrite: bool) -> dict[str, Any]:
    """Write one ``.gguf`` file with weights, settings and, where there is one, the byte-level BPE tokenizer.

    Raises:
        ModelSourceError: the architecture, its rotary scaling or its tokenizer has no counterpart here.
    """
    gguf = import_gguf()
    config = getattr(opened.model, "config", None)
    kind = getattr(config, "model_type", type(opened.model).__name__)
    if kind not in ARCHITECTURES or not type(opened.model).__name__.endswith("ForCausalLM"):
        raise ModelSourceError(
            f"{opened.name} ({type(opened.model).__name__}): GGUF export knows the causal language models of "
            f"{', '.join(ARCHITECTURES)}. Use --format safetensors."
        )
    architecture, interleaved = ARCHITECTURES[kind]
    vocabulary = None if opened.tokenizer is None else _vocabulary(opened, config.vocab_size)
    with atomic_file(out) as partial:
        writer = gguf.GGUFWriter(str(partial), architecture)
        _add_settings(writer, config, opened, gguf)
        if vocabulary is not None:
            _add_tokenizer(writer, vocabulary, opened.tokenizer)
        count = _add_tensors(writer, opened, architecture, interleaved, gguf)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_tensors_to_file()
        writer.close()
    return {"architecture": architecture, "tensors": count, "tokenizer": vocabulary is not None}


def _add_settings(writer: Any, config: Any, opened: OpenedModel, gguf: Any) -> None:
    rope = dict(getattr(config, "rope_parameters", None) or {})
    if rope.get("rope_type", "default") != "default":
        raise ModelSourceError(
            f"{opened.name}: its rotary embedding is scaled ({rope['rope_type']!r}), which GGUF export does not "
            "write. Use --format safetensors."
        )
    heads = config.num_attention_heads
    width = getattr(config, "head_dim", None) or config.hidden_size // heads
    writer.add_name(Path(opened.name).name)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_key_length(width)
    writer.add_value_length(width)
    writer.add_rope_dimension_count(width)
    writer.add_rope_freq_base(float(rope.get("rope_theta", 10000.0)))
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    file_type = {torch.float32: "ALL_F32", torch.float16: "MOSTLY_F16", torch.bfloat16: "MOSTLY_BF16"}
    writer.add_file_type(gguf.LlamaFileType[file_type[opened.model.dtype]])


def _add_tensors(writer: Any, opened: OpenedModel, architecture: str, interleaved: bool, gguf: Any) -> int:
    config = opened.model.config
    kinds = {name: number for number, name in gguf.MODEL_ARCH_NAMES.items()}
    names = gguf.get_tensor_name_map(kinds[architecture], config.num_hidden_layers)
    heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}
    count = 0
    for key, tensor in opened.model.state_dict().items():
        if key == "lm_head.weight" and config.tie_word_embeddings:
            continue
        name = names.get_name(key, try_suffixes=(".weight", ".bias"))
        if name is None:
            raise ModelSourceError(f"{opened.name}: GGUF's {architecture!r} has no tensor {key}.")
        module = key.split(".")[-2]
        if interleaved and module in heads:
            tensor = to_adjacent_pairs(tensor, heads[module])
        _add_tensor(writer, name, tensor.contiguous(), gguf)
        count += 1
    return count


def to_adjacent_pairs(tensor: Tensor, heads: int) -> Tensor:
    """Rows of q or k, or entries of its bias, from halves of a head (transformers) to adjacent pairs (GGUF)."""
    rows = tensor.shape[0]
    return (
        tensor.reshape(heads, 2, rows // heads // 2, *tensor.shape[1:]).transpose(1, 2).reshape(tensor.shape)
    )


def _add_tensor(writer: Any, name: str, tensor: Tensor, gguf: Any) -> None:
    """Vectors are float32, as llama.cpp expects them; matrices keep their dtype."""
    if tensor.ndim == 1:
        tensor = tensor.float()
    if tensor.dtype == torch.bfloat16:
        data, kind = tensor.view(torch.uint8).numpy(), gguf.GGMLQuantizationType.BF16
        writer.add_tensor(name, data, raw_shape=data.shape, raw_dtype=kind)
    else:
        writer.add_tensor(name, tensor.numpy())


def _vocabulary(opened: OpenedModel, size: int) -> dict[str, Any]:
    """Tokens, their types and merges of a byte-level BPE tokenizer, filled up to ``size``.

    Raises:
        ModelSourceError: the tokenizer is of another kind.
    """
    backend = getattr(opened.tokenizer, "backend_tokenizer", None)
    data = {} if backend is None else json.loads(backend.to_str())
    model = data.get("model", {})
    if model.get("type") != "BPE" or "ByteLevel" not in json.dumps(data.get("pre_tokenizer")):
        raise ModelSourceError(
            f"{opened.name}: its tokenizer ({model.get('type', 'not fast')}) is no byte-level BPE, the only kind that "
            "GGUF export writes. Use --format safetensors, or export a copy of the checkpoint without tokenizer files."
        )
    tokens = {index: token for token, index in model["vocab"].items()}
    types = dict.fromkeys(tokens, _NORMAL)
    for entry in data.get("added_tokens", []):
        tokens[entry["id"]] = entry["content"]
        types[entry["id"]] = _CONTROL if entry["special"] else _USER_DEFINED
    size = max(size, max(tokens) + 1)
    return {
        "tokens": [tokens.get(index, f"[PAD{index}]") for index in range(size)],
        "types": [types.get(index, _UNUSED) for index in range(size)],
        "merges": [merge if isinstance(merge, str) else " ".join(merge) for merge in model["merges"]],
        "pre": pre_tokenizer_name(data["pre_tokenizer"]),
    }


def pre_tokenizer_name(data: Any) -> str:
    """llama.cpp's name for the way a text is split before the merges, told by structure."""
    text = json.dumps(data)
    if '"Digits"' in text:
        return "smollm"
    if '"Split"' not in text:
        return "gpt-2"
    return "llama-bpe" if r"\\p{N}{1,3}" in text else "qwen2"


def _add_tokenizer(writer: Any, vocabulary: dict[str, Any], tokenizer: Any) -> None:
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(vocabulary["pre"])
    writer.add_token_list(vocabulary["tokens"])
    writer.add_token_types(vocabulary["types"])
    writer.add_token_merges(vocabulary["merges"])
    for name in ("bos", "eos", "unk", "pad"):
        index = getattr(tokenizer, f"{name}_token_id", None)
        if index is not None:
            getattr(writer, f"add_{name}_token_id")(index)
    writer.add_add_bos_token(bool(getattr(tokenizer, "add_bos_token", False)))
    if isinstance(getattr(tokenizer, "chat_template", None), str):
        writer.add_chat_template(tokenizer.chat_template)
