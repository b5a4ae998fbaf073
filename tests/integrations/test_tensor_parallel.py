"""Linears divided among simulated ranks: slices joined, or terms summed, are the whole linear's outputs."""

from __future__ import annotations

import threading

import pytest
import torch

import framequant as fq
from framequant import storage
from framequant.codes.grid import GridKind, GridSpec
from framequant.codes.trellis import TrellisSpec
from framequant.frames import FrameKind, FrameSpec
from framequant.integrations import tensor_parallel as tp
from framequant.integrations.vllm_layer import Division, FusedParts, find_partition
from framequant.layers import FrameLinear
from framequant.model.walk import quantized_linears
from framequant.spec import LinearSpec
from tests.model.architectures import make

KINDS = {
    "scalar": ("framequant-scalar", {}),
    "groups": ("gptq", {"group_size": 16}),
    "two-sided": ("framequant-paper", {}),
    "trellis": ("framequant-scalar", {"code": "trellis", "state_bits": 8, "bits": 2.25}),
    "blocks": ("framequant-scalar", {"output_hadamard_block": 16}),
    "sigma-delta": ("sigma-delta", {"quantize_bias": False}),
}


@pytest.fixture(scope="module", params=KINDS)
def linears(request):
    model, data = make("llama")
    preset, settings = KINDS[request.param]
    fq.quantize_(model, data, fq.preset(preset, **settings))
    layers = {
        name: layer for name, layer in quantized_linears(model).items() if name.startswith("model.layers.0.")
    }
    for layer in layers.values():
        layer.backend = "reference"
    return {name.rpartition(".")[2]: layer.double() for name, layer in layers.items()}


class Ranks:
    """As many threads as ranks; ``gather`` joins what they bring, as a collective does."""

    def __init__(self, ranks):
        self.barrier, self.slots = threading.Barrier(ranks, timeout=60), [None] * ranks

    def gather(self, rank):
        def join(tensor):
            self.slots[rank] = tensor
            self.barrier.wait()
            joined = torch.cat(self.slots, dim=-1)
            self.barrier.wait()
            return joined

        return join

    def run(self, work):
        results = [None] * len(self.slots)

        def one(rank):
            results[rank] = work(rank, self.gather(rank))

        threads = [threading.Thread(target=one, args=(rank,)) for rank in range(len(results))]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        return results


def make_rank(layers, inputs_here, outputs_here, rank, ranks, gather):
    specs = {name: layer.spec for name, layer in layers.items()}
    parts = FusedParts(specs, find_partition(specs, inputs_here, outputs_here, rank, ranks), gather)
    for number, layer in enumerate(layers.values()):
        for name, tensor in layer.tensors.items():
            parts.load(number, name, tensor)
    parts.check_loaded()
    return parts


def close(found, expected):
    return (found - expected).abs().max() <= 1e-13 * expected.abs().max()


@pytest.mark.parametrize("ranks", [2, 3])
def test_slices_of_outputs_join_to_the_whole(linears, ranks):
    few_tiles = (
        isinstance(linears["q_proj"].spec.code, TrellisSpec) and ranks == 3
    )  # k and v have two rows of them
    names = ("q_proj",) if few_tiles else ("q_proj", "k_proj", "v_proj")
    layers = {name: linears[name] for name in names}
    x = torch.randn(5, 48, dtype=torch.float64)
    sizes = [layer.out_features // ranks for layer in layers.values()]

    def work(rank, gather):
        parts = make_rank(layers, 48, sizes, rank, ranks, gather)
        assert parts.partition.division is Division.OUTPUTS
        return parts(x).split(sizes, dim=-1)

    slices = Ranks(ranks).run(work)
    for index, layer in enumerate(layers.values()):
        assert close(torch.cat([own[index] for own in slices], dim=-1), layer(x))


def test_key_and_value_heads_fewer_than_ranks_are_replicated(linears):
    layers = {name: linears[name] for name in ("q_proj", "k_proj")}
    x = torch.randn(3, 48, dtype=torch.float64)
    results = Ranks(2).run(lambda rank, gather: make_rank(layers, 48, [24, 24], rank, 2, gather)(x))
    for result in results:
        assert close(result[:, 24:], layers["k_proj"](x))


def test_terms_of_divided_inputs_add_up_to_the_whole(linears):
    layer = linears["down_proj"]
    x = torch.randn(5, 80, dtype=torch.float64)

    def work(rank, gather):
        parts = make_rank({"down_proj": layer}, 40, [48], rank, 2, gather)
        assert parts.partition.division is Division.INPUTS
        return parts(x.chunk(2, dim=-1)[rank])

    terms = Ranks(2).run(work)
    assert close(sum(terms), layer(x))
    assert not close(terms[0], layer(x)), "one rank alone has but a part"


def test_ranks_hold_every_row_of_codes_once(linears):
    for layer in linears.values():
        shards = [tp.divide(layer.spec, rank, 2) for rank in range(2)]
        for name, tensor in layer.tensors.items():
            pieces = [tp.shard_tensor(layer.spec, shard, name, tensor) for shard in shards]
            if len(tensor) > 1:
                assert torch.equal(torch.cat(pieces), tensor)
            else:
                assert all(torch.equal(piece, tensor) for piece in pieces)
        for shard in shards:
            FrameLinear.from_tensors(
                tp.shard_spec(layer.spec, shard), tp.shard_tensors(layer.spec, shard, layer.tensors)
            )


def test_what_does_not_divide_is_refused(linears):
    spec = linears["q_proj"].spec
    with pytest.raises(fq.ConfigError, match="tensor-parallel-size"):
        tp.divide(spec, 0, spec.coefficient_shape[0] + 1)
    with pytest.raises(fq.ConfigError, match="48 features do not divide"):
        tp.own_features(torch.zeros(1, 48), 13, 0, 4)
    with pytest.raises(fq.CheckpointError, match="on each of 2 ranks"):
        find_partition({"q_proj": spec}, 20, [48], 0, 2)


def random_linear(seed, seed_in, seed_out, outputs, inputs):
    """A linear of two bits with random codes in randomized Hadamard frames."""
    frames = [
        FrameSpec(FrameKind.HADAMARD, dim, seed=number)
        for dim, number in ((inputs, seed_in), (outputs, seed_out))
    ]
    layer = FrameLinear(
        LinearSpec(inputs, outputs, *frames, GridSpec(GridKind.UNIFORM, num_levels=4)), bias=False
    )
    generator = torch.Generator().manual_seed(seed)
    for tensor in layer.tensors.values():
        if tensor.is_floating_point():
            tensor.copy_(torch.rand(tensor.shape, generator=generator) + 0.5)
        else:
            tensor.copy_(
                torch.randint(0, 4 if tensor.dtype != torch.uint8 else 256, tensor.shape, generator=generator)
            )
    return layer


@pytest.mark.parametrize("side", ["out", "in"])
def test_frame_blocks_local_to_a_shard_need_no_gather(side):
    """The further plan of docs/serving.md: with a block-diagonal frame, ranks quantized apart are one linear."""
    x = torch.randn(4, 48, dtype=torch.float64)
    if side == "out":
        shards = [random_linear(rank, 7, rank + 1, 16, 48) for rank in range(2)]
    else:
        shards = [random_linear(rank, rank + 1, 7, 32, 24) for rank in range(2)]
    inner, outer = zip(*([frame.as_matrix() for frame in shard.frames] for shard in shards), strict=True)
    decoded = [
        storage.decode_rows(s.spec, s.tensors, 0, s.spec.coefficient_shape[0], torch.float64) for s in shards
    ]
    if side == "out":  # T_out = diag(T_1, T_2), one T_in; each rank has rows of D and its own outputs
        whole = torch.block_diag(*outer).T @ torch.cat(decoded) @ inner[0]
        found = torch.cat([shard(x) for shard in shards], dim=-1)
    else:  # T_in = diag(T_1, T_2), one T_out; each rank has columns of D, and the outputs are summed
        whole = outer[0].T @ torch.cat(decoded, dim=1) @ torch.block_diag(*inner)
        found = sum(shard(own) for shard, own in zip(shards, x.chunk(2, dim=-1), strict=True))
    assert close(found, x @ whole.T)
