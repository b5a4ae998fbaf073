import subprocess
import sys

import pytest
import torch

from framequant import memory


def test_free_memory_is_what_limits_leave(monkeypatch, tmp_path):
    group = tmp_path / "outer" / "inner"
    group.mkdir(parents=True)
    for folder, limit, usage in ((group, "max", 50), (group.parent, "1000", 700)):
        (folder / "memory.max").write_text(f"{limit}\n")
        (folder / "memory.current").write_text(f"{usage}\n")
        (folder / "memory.stat").write_text("anon 100\ninactive_file 200\n")
    assert memory._group_limits(tmp_path, "outer/inner") == [500]
    monkeypatch.setattr(memory, "_limits", lambda: [1 << 62, 500])
    assert memory.free_bytes(torch.device("cpu")) == 500


@pytest.mark.skipif(not sys.platform.startswith("linux"), reason="ulimit -v")
def test_ulimit_counts():
    code = (
        "import resource, torch; resource.setrlimit(resource.RLIMIT_AS, (1 << 35, 1 << 35)); "
        "from framequant.memory import _limits; print(min(_limits()))"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert 0 < int(result.stdout) < 1 << 35
