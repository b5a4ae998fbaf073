import pytest
import torch

from framequant.errors import ConfigError
from framequant.memory import free_bytes
from framequant.model.activations import Activations, Place, Placement
from framequant.streaming.plan import MemoryLimits, fits_in_memory, memory_limits, parse_size, plan_memory

CPU, CUDA = torch.device("cpu"), torch.device("cuda")
GB = 10**9


@pytest.mark.parametrize(
    ("text", "size"), [("8GB", 8 * GB), ("512 MiB", 512 << 20), ("1e9", GB), ("1.5g", 3 * GB // 2), ("7", 7)]
)
def test_sizes(text, size):
    assert parse_size(text) == size


@pytest.mark.parametrize("text", ["", "many", "8 parsecs", "-1GB", "1.2.3GB"])
def test_no_sizes(text):
    with pytest.raises(ConfigError, match="no size"):
        parse_size(text)


def test_limits_are_the_smaller_of_what_is_asked_and_what_is_free():
    assert memory_limits("1GB", CPU) == MemoryLimits(GB, GB)
    assert memory_limits("cpu=1GB,cuda=2GB", CPU).host == GB
    assert memory_limits("1000TB", CPU).host <= 2 * free_bytes(CPU)
    with pytest.raises(ConfigError, match="neither cpu nor cuda"):
        memory_limits("tpu=1GB", CPU)


def test_activations_go_to_the_nearest_place_with_room(tmp_path):
    def place(activations, limits, device):
        return plan_memory(activations, GB, GB, limits, device, tmp_path).placement.place

    roomy = MemoryLimits(64 * GB, 64 * GB)
    assert place(10 * GB, roomy, CUDA) is Place.DEVICE
    assert place(50 * GB, roomy, CUDA) is Place.HOST
    assert place(80 * GB, roomy, CUDA) is Place.DISK
    assert place(60 * GB, roomy, CPU) is Place.DISK
    assert plan_memory(0, 80 * GB, 0, roomy, CPU, tmp_path).float_cache_bytes == 0


def test_what_fits_in_memory():
    assert fits_in_memory(10 * GB, MemoryLimits(16 * GB, 16 * GB), CPU)
    assert not fits_in_memory(14 * GB, MemoryLimits(16 * GB, 16 * GB), CPU)
    assert not fits_in_memory(10 * GB, MemoryLimits(64 * GB, 12 * GB), CUDA)


@pytest.mark.parametrize("place", list(Place))
def test_a_store_gives_back_what_it_was_given(tmp_path, place):
    store = Activations(Placement(place, CPU, tmp_path), "blocks")
    assert store.get(0) is None
    value = (torch.randn(3, 4).bfloat16(), {"mask": torch.tensor([True, False])}, None, [torch.empty(0)])
    store.put(0, value)
    store.put(1, torch.ones(2))
    found = store.get(0)
    assert torch.equal(found[0], value[0])
    assert found[0].dtype == torch.bfloat16
    assert torch.equal(found[1]["mask"], value[1]["mask"])
    assert found[2] is None
    assert found[3][0].numel() == 0
    store.put(0, (torch.zeros(5), {}, None, []))  # of another size
    assert store.get(0)[0].shape == (5,)
    assert torch.equal(store.get(1), torch.ones(2))


def test_a_full_disk_is_an_error_and_no_crash(tmp_path, monkeypatch):
    import os

    from framequant.errors import CalibrationError

    def full(*_):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "posix_fallocate", full)
    with pytest.raises(CalibrationError, match="No space left"):
        Activations(Placement(Place.DISK, CPU, tmp_path), "blocks").put(0, torch.ones(2))
