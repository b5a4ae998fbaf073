"""The documentation does what it says: every block runs, every message and every column exists."""

from __future__ import annotations

import ast
import importlib.util
import re

import pytest
import yaml

from tests.conftest import ROOT
from tests.docs.harness import blocks, run_command, run_page

DOCS = ROOT / "docs"
PAGES = sorted(DOCS.glob("*.md"))
RUNNABLE = [page for page in PAGES if {block.kind for block in blocks(page.read_text())} & {"python", "bash"}]

_spec = importlib.util.spec_from_file_location("docs_hooks", DOCS / "hooks.py")
hooks = importlib.util.module_from_spec(_spec)
_spec.loader.exec_module(hooks)


@pytest.mark.parametrize("page", RUNNABLE, ids=lambda page: page.stem)
def test_every_block_runs(page, workspace):
    assert run_page(page) == sum(block.kind in ("python", "bash") for block in blocks(page.read_text()))


def test_the_readme_runs(workspace):
    import torch
    from transformers import AutoModelForCausalLM

    from framequant.integrations.sources import open_model

    data = torch.randint(2, 20, (8, 32), generator=torch.Generator().manual_seed(0))
    given = {
        "model": open_model("smollm2").model,
        "calibration": data,
        "AutoModelForCausalLM": AutoModelForCausalLM,
    }
    assert run_page(ROOT / "README.md", given) >= 3


@pytest.mark.parametrize(
    ("command", "message"),
    [
        ("framequant quantize smollm2 --no-such-option --out x", "No such option"),
        ("framequant evaluate nowhere --perplexity test.txt", "exit|nowhere"),
        ("pip install '.[nothing]'", "no extra nothing"),
        ("make coffee", "no target"),
        ("python experiments/nothing.py", "no script"),
        ("rm -rf /", "no rule"),
    ],
)
def test_the_harness_can_fail(command, message, workspace):
    import shlex

    with pytest.raises(AssertionError, match=message):
        run_command(shlex.split(command), "page")


def test_options_of_commands_that_are_only_parsed_are_checked(workspace):
    run_command(["framequant", "quantize", "smollm2", "--out", "x", "--tune", "9"], "page")
    with pytest.raises(Exception, match="No such option"):
        run_command(["framequant", "quantize", "smollm2", "--out", "x", "--tune", "9", "--tun", "3"], "page")


def _literals() -> set[str]:
    """Every string of the source; of formatted ones the parts between the placeholders."""
    found = set()
    for path in (ROOT / "src").rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text())):
            if isinstance(node, ast.Constant) and isinstance(node.value, str):
                found.add(node.value)
    return found


def test_troubleshooting_quotes_real_messages():
    text = "\n".join(sorted(_literals()))
    headings = re.findall(r"^### `(.+)`$", (DOCS / "troubleshooting.md").read_text(), re.M)
    assert len(headings) > 20
    for heading in headings:
        for part in heading.split("…"):
            assert part.strip() in text, f"no message says {part.strip()!r}"


def test_tables_come_from_results():
    seen = 0
    for page in PAGES:
        for match in hooks.MARK.finditer(page.read_text()):
            rows = hooks.table(match["file"], match["columns"]).splitlines()
            assert len({row.count("|") for row in rows if row.startswith("|")}) == 1
            seen += 1
    assert seen >= 5
    with pytest.raises(ValueError, match="has no column 'nothing'"):
        hooks.table("experiments/results/main_smollm2.csv", "nothing")
    with pytest.raises(ValueError, match="figures come from"):
        hooks.table("secret.csv", "row")


def _nav(entries):
    for entry in entries:
        if isinstance(entry, str):
            yield entry
        else:
            yield from _nav(next(iter(entry.values())))


def test_every_page_is_in_the_navigation_and_every_link_leads_somewhere():
    nav = set(_nav(yaml.safe_load((ROOT / "mkdocs.yml").read_text())["nav"]))
    assert nav == {page.name for page in PAGES}
    for page in [*PAGES, ROOT / "README.md"]:
        for target in re.findall(r"\]\((?!https?:|#)([^)#]+)", page.read_text()):
            assert (page.parent / target).exists(), f"{page.name} links to {target}"


def test_the_api_page_has_every_public_name():
    import framequant

    text = (DOCS / "api.md").read_text()
    for name in framequant.__all__:
        home = framequant._HOMES[name]
        listed = f"::: framequant.{home}.{name}\n" in text + "\n"
        assert listed or home == "errors" or name == "PRESETS", name


def test_code_of_the_site_is_python_that_ruff_would_read():
    for page in RUNNABLE:
        for block in blocks(page.read_text()):
            if block.kind == "python":
                ast.parse(block.code)
                assert max(map(len, block.code.splitlines())) <= 120, f"{page.name}:{block.line}"
