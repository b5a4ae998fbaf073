"""Streaming from a GGUF file: dequantized tensor by tensor, with the bits of a run in memory."""

import numpy as np
import pytest
import torch
import transformers
from transformers import modeling_gguf_pytorch_utils as legacy
from typer.testing import CliRunner

import framequant as fq
from framequant.cli.app import app
from framequant.cli.streaming import choose_streaming, float_bytes
from framequant.errors import ModelSourceError
from framequant.integrations.gguf import forget_quantization
from framequant.integrations.sources import open_model
from framequant.model import experts
from framequant.streaming.skeleton import build_skeleton
from tests.integrations.test_export import byte_level_tokenizer
from tests.streaming.models import same_tensors

gguf = pytest.importorskip("gguf")

IDS = torch.randint(2, 60, (6, 24), generator=torch.Generator().manual_seed(1))
SETTINGS = {
    "vocab_size": 70,
    "hidden_size": 64,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 64,
}


def export(folder, kind):
    """A GGUF file in float32 of a tiny model."""
    torch.manual_seed(0)
    config = getattr(transformers, f"{kind}Config")(**SETTINGS)
    model = getattr(transformers, f"{kind}ForCausalLM")(config).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            torch.nn.init.normal_(parameter)
    fq.quantize_(model, None, fq.preset("sigma-delta"))
    fq.save_pretrained(model, folder / "q", tokenizer=byte_level_tokenizer())
    fq.export(folder / "q", folder / "float.gguf", "gguf", dtype="float32")
    return folder / "float.gguf"


def add_matrix(writer, name, values, code):
    """Add a matrix, or a stack of them, in a code of ggml's."""
    writer.add_tensor(name, gguf.quantize(np.ascontiguousarray(values), code), raw_dtype=code)


def close(writer, path):
    """Write what was added; the file's path."""
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def rewrite(path, out, code, extra=None):
    """The same file with its matrices in another code of ggml's, and others in place of some if given."""
    reader = gguf.GGUFReader(path)
    kind = reader.fields["general.architecture"].contents()
    writer = gguf.GGUFWriter(out, kind)
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != "general.architecture":
            sub = field.types[-1] if field.types[0] == gguf.GGUFValueType.ARRAY else None
            writer.add_key_value(field.name, field.contents(), field.types[0], sub)
    for tensor in reader.tensors:
        if tensor.name in (extra or {}):
            continue
        values = np.array(gguf.dequantize(tensor.data, tensor.tensor_type))
        if values.ndim == 2:
            add_matrix(writer, tensor.name, values, code)
        else:
            writer.add_tensor(tensor.name, values)
    for name, values in (extra or {}).items():
        writer.add_tensor(name, values)
    return close(writer, out)


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    return export(tmp_path_factory.mktemp("gguf"), "Llama")


@pytest.mark.parametrize(
    ("kind", "code"),
    [
        ("Llama", "Q4_1"),
        ("Qwen2", "F32"),
        pytest.param("Llama", "F32", marks=pytest.mark.slow),
        pytest.param("Llama", "Q8_0", marks=pytest.mark.slow),
        pytest.param("Qwen2", "Q8_0", marks=pytest.mark.slow),
        pytest.param("Qwen2", "Q4_1", marks=pytest.mark.slow),
    ],
)
def test_codes_are_those_of_a_run_in_memory(tmp_path, exported, kind, code):
    source = exported if kind == "Llama" else export(tmp_path, kind)
    source = rewrite(source, tmp_path / "model.gguf", gguf.GGMLQuantizationType[code])
    opened, config = open_model(str(source)), fq.preset("framequant", state_bits=8)
    fq.quantize_(opened.model, IDS, config)
    fq.save_pretrained(opened.model, tmp_path / "memory", source=str(source))
    fq.quantize_streaming(source, tmp_path / "stream", IDS, config)
    same_tensors(tmp_path / "memory", tmp_path / "stream")
    for file in ("config.json", "generation_config.json", "README.md"):
        assert (tmp_path / "memory" / file).read_bytes() == (tmp_path / "stream" / file).read_bytes()
    with torch.no_grad():
        expected = opened.model.eval()(IDS).logits
        assert torch.equal(fq.load(tmp_path / "stream")(IDS).logits, expected)


def test_tensors_stay_in_the_file_until_they_are_read(exported, monkeypatch):
    read = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(
        gguf, "dequantize", lambda data, code: read.append(data.shape) or dequantize(data, code)
    )
    skeleton = build_skeleton(exported, torch.float32)
    assert not read
    assert all(parameter.is_meta for parameter in skeleton.model.parameters())
    ((_, tensor),) = skeleton.read(["model.layers.1.self_attn.q_proj.weight"])
    assert torch.equal(tensor, open_model(str(exported)).model.model.layers[1].self_attn.q_proj.weight)
    assert read[0] == (64, 64)


def test_another_file_is_another_model(exported, tmp_path):
    other = rewrite(exported, tmp_path / "model.gguf", gguf.GGMLQuantizationType.Q8_0)
    prints = [build_skeleton(path, torch.float32).files.fingerprint() for path in (exported, exported, other)]
    assert prints[0] == prints[1] != prints[2]


def write_experts(path):
    """A GGUF file of a tiny Qwen3-MoE, whose experts transformers takes to be 768 wide."""
    torch.manual_seed(0)
    sizes = {**SETTINGS, "moe_intermediate_size": 768, "num_experts": 4, "num_experts_per_tok": 2}
    model = transformers.Qwen3MoeForCausalLM(transformers.Qwen3MoeConfig(**sizes))
    writer = gguf.GGUFWriter(path, "qwen3moe")
    writer.add_vocab_size(70)
    writer.add_block_count(2)
    writer.add_embedding_length(64)
    writer.add_feed_forward_length(96)
    writer.add_head_count(4)
    writer.add_head_count_kv(2)
    writer.add_key_length(16)
    writer.add_expert_count(4)
    writer.add_expert_used_count(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3MOE, 2)
    code = gguf.GGMLQuantizationType.Q8_0
    for key, tensor in model.state_dict().items():
        values = tensor.numpy()
        if key.endswith("gate_up_proj"):
            block = key.split(".")[2]
            parts = {"gate": values[:, :768], "up": values[:, 768:]}
            parts = {f"blk.{block}.ffn_{name}_exps.weight": part for name, part in parts.items()}
        else:
            parts = {f"{names.get_name(key.removesuffix('.weight'))}.weight": values}
        for name, part in parts.items():
            if part.ndim > 1:
                add_matrix(writer, name, part, code)
            else:
                writer.add_tensor(name, part)
    return close(writer, path)


def test_stacked_experts_are_read_one_at_a_time(tmp_path, monkeypatch):
    source = write_experts(tmp_path / "experts.gguf")
    place = {"pretrained_model_name_or_path": str(tmp_path), "gguf_file": source.name}
    model = transformers.AutoModelForCausalLM.from_pretrained(**place, dtype=torch.float32)
    forget_quantization(model)
    skeleton = build_skeleton(source, torch.float32)
    read = []
    dequantize = gguf.dequantize
    monkeypatch.setattr(
        gguf, "dequantize", lambda data, code: read.append(len(data)) or dequantize(data, code)
    )
    found = dict(skeleton.read(["model.layers.1.mlp.experts.2.gate_up_proj.weight"]))
    assert read == [1, 1]
    experts.unfuse_(model)
    expected = model.state_dict()
    found |= dict(skeleton.read(key for key in skeleton.pieces if key in expected))
    assert found.keys() == expected.keys()
    assert not [key for key, tensor in found.items() if not torch.equal(tensor, expected[key])]
    config = fq.preset("gptq")
    fq.quantize_(model, IDS, config)
    fq.save_pretrained(model, tmp_path / "memory")
    fq.quantize_streaming(skeleton, tmp_path / "stream", IDS, config)
    same_tensors(tmp_path / "memory", tmp_path / "stream")


class Mixing(legacy.TensorProcessor):
    """Makes one matrix of a stack."""

    def process(self, weights, name, **_):
        return legacy.GGUFTensor(weights.reshape(-1, weights.shape[-1]), name, {})


def test_what_is_refused(exported, tmp_path, monkeypatch):
    stacks = {"blk.0.attn_v.weight": np.zeros((4, 8, 64), np.float32)}
    source = rewrite(exported, tmp_path / "stacks.gguf", gguf.GGMLQuantizationType.F32, stacks)
    with pytest.raises(ModelSourceError, match=r"v_proj.* of shape \(4, 8, 64\), and .* has \(32, 64\)"):
        build_skeleton(source, torch.float32)
    monkeypatch.setitem(legacy.TENSOR_PROCESSORS, "llama", Mixing)
    with pytest.raises(
        ModelSourceError, match=r"attn_v\.weight is no stack of experts' matrices.*--no-stream"
    ):
        build_skeleton(source, torch.float32)
    monkeypatch.undo()
    (tmp_path / "nonsense.gguf").write_bytes(b"nonsense")
    with pytest.raises(ModelSourceError, match="not a GGUF file"):
        build_skeleton(tmp_path / "nonsense.gguf", torch.float32)
    (tmp_path / "short.gguf").write_bytes(exported.read_bytes()[:-5000])
    with pytest.raises(ModelSourceError, match="transformers cannot read this GGUF file"):
        build_skeleton(tmp_path / "short.gguf", torch.float32)


def test_the_command_line(exported, tmp_path, text_file):
    config = fq.preset("framequant-scalar")
    assert choose_streaming(str(exported), None, None, "auto", "cpu", config) is None
    assert "do not fit" in choose_streaming(str(exported), None, "1MB", "auto", "cpu", config).reason
    skeleton = build_skeleton(exported, torch.bfloat16)
    assert float_bytes(exported, "bfloat16") == skeleton.num_bytes
    given = ["quantize", exported, "--out", tmp_path / "out", "--calibration", text_file, "--samples", 4]
    given += ["--sequence-length", 32, "--device", "cpu", "--preset", "framequant-scalar", "--stream"]
    result = CliRunner().invoke(app, [str(part) for part in given])
    assert result.exit_code == 0, result.stderr
    assert (tmp_path / "out" / "tokenizer.json").is_file()
    assert fq.load(tmp_path / "out").config.num_hidden_layers == 2
