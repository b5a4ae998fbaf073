"""The page in a headless Chromium: no errors, no network, sorting, filtering and hovering work."""

from __future__ import annotations

import os
import re
import shutil

import pytest
import torch

import framequant as fq
from framequant.errors import ConfigError
from framequant.report.page import pretty, render, sheet, write_page
from framequant.report.results import Plot, collect, write_plots
from tests.conftest import WORDS, make_llama

pytest.importorskip("plotly")

ROWS = [("float", 32, 20), ("rtn", 2.0, 900), ("gptq", 2.1, 80), ("gptq:bits=3", 3.1, 25), ("<b>&", 2.5, 30)]
PNG = bytes.fromhex(
    "89504e470d0a1a0a0000000d4948445200000001000000010806000000"
    "1f15c4890000000d49444154789c6360606060000000050001a5f645400000000049454e44ae426082"
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """Two runs, and a table with a plot and a picture."""
    root = tmp_path_factory.mktemp("results")
    data = torch.randint(0, len(WORDS), (4, 16), generator=torch.Generator().manual_seed(0))
    for bits in (2, 3):
        model = make_llama()
        fq.quantize_(model, data, fq.preset("gptq", bits=bits))
        fq.save_pretrained(model, root / f"gptq-{bits}")
    lines = [f"{method},{bits},{value},tiny,run me,1,abc,cpu" for method, bits, value in ROWS]
    lines += [f"row {i},4.{i},19,tiny,run me,1,abc,cpu" for i in range(10, 20)]
    head = "method,bits_per_weight,perplexity,model,command,seed,commit,device"
    (root / "table.csv").write_text("\n".join([head, *lines]))
    (root / "dot.png").write_bytes(PNG)
    plots = [
        Plot("By method", "perplexity", "method", kind="bars", log_y=True),
        Plot("By bits", "perplexity", "bits_per_weight", series="model", predicted="bits_per_weight"),
        Plot("A dot", image="dot.png", caption="one pixel"),
    ]
    write_plots(root / "table.csv", "The </script> table", "What it shows.", plots)
    return root


@pytest.fixture(scope="module")
def page_file(folder, tmp_path_factory):
    out = tmp_path_factory.mktemp("page") / "new" / "page.html"
    assert write_page(collect([folder]), out, "A <title>") == out.stat().st_size
    return out


def chromium() -> str:
    """A Chromium, or skip saying which one is missing."""
    names = ("chromium", "chromium-browser", "google-chrome", "chrome")
    found = os.environ.get("FRAMEQUANT_CHROMIUM") or next(filter(None, map(shutil.which, names)), None)
    if found is None:
        pytest.skip("no Chromium: apt-get install chromium, or name one in FRAMEQUANT_CHROMIUM")
    return found


@pytest.fixture(scope="module")
def browser():
    playwright = pytest.importorskip("playwright.sync_api")
    path = chromium()
    with playwright.sync_playwright() as running:
        browser = running.chromium.launch(executable_path=path, args=["--no-sandbox"])
        yield browser
        browser.close()


@pytest.fixture(params=[("light", 390), ("dark", 1280)], ids=lambda p: f"{p[0]}-{p[1]}")
def page(request, browser, page_file):
    scheme, width = request.param
    context = browser.new_context(color_scheme=scheme, viewport={"width": width, "height": 900}, offline=True)
    page = context.new_page()
    problems: list[str] = []
    page.on("console", lambda m: problems.append(m.text) if m.type in ("error", "warning") else None)
    page.on("pageerror", lambda error: problems.append(str(error)))
    page.on("requestfailed", lambda request: problems.append(request.url))
    page.goto(page_file.as_uri())
    yield page
    assert problems == []
    context.close()


def draw_all(page) -> None:
    """Scroll through the page until every plot is drawn."""
    for plot in page.locator(".plot").all():
        plot.scroll_into_view_if_needed()
    page.wait_for_function("[...document.querySelectorAll('.plot')].every(p => p.dataset.drawn)")


def column(page, index: int) -> list[str]:
    rows = page.locator("table.sortable").first.locator("tbody tr").all()
    return [row.locator("td").nth(index).inner_text().replace("\u200b", "") for row in rows]


def test_every_figure_is_drawn_and_nothing_is_wider_than_the_screen(page):
    draw_all(page)
    assert page.locator(".plot").count() == 6
    assert page.locator(".plot svg.main-svg").count() >= 6
    assert page.locator("figure img").evaluate("image => image.naturalWidth") == 1
    width = page.evaluate("document.documentElement.clientWidth")
    assert page.evaluate("document.documentElement.scrollWidth") <= width
    for plot in page.locator(".plot").all():
        assert plot.bounding_box()["width"] <= width


def test_sorting_goes_by_number_and_back(page):
    heading = page.locator("table.sortable").first.locator("th button").nth(1)
    heading.click()
    bits = [float(text) for text in column(page, 1)]
    assert bits == sorted(bits)
    assert column(page, 0)[-1] == "float"
    heading.click()
    assert [float(text) for text in column(page, 1)] == bits[::-1]
    sorts = page.locator("table.sortable").first.locator("th[aria-sort]")
    assert sorts.count() == 1
    assert sorts.get_attribute("aria-sort") == "descending"


def test_filtering_hides_the_other_rows(page):
    page.locator("input.filter").first.fill("gptq")
    visible = page.locator("table.sortable").first.locator("tbody tr:visible")
    assert visible.count() == 2


def test_hovering_shows_the_point(page):
    plot = page.locator(".plot").first
    plot.scroll_into_view_if_needed()
    page.wait_for_function("document.querySelector('.plot').dataset.drawn")
    points = plot.locator(".scatterlayer .trace path.point")
    box = points.first.bounding_box()
    page.mouse.move(box["x"] + box["width"] / 2, box["y"] + box["height"] / 2, steps=3)
    page.wait_for_selector(".hoverlayer .hovertext", timeout=5000)
    assert re.search(r"bits", page.locator(".hoverlayer .hovertext").first.text_content())


def test_colours_follow_the_scheme(page):
    draw_all(page)
    assert page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") in (True, False)
    before = page.evaluate("document.querySelector('.plot').layout.font.color")
    other = "light" if page.evaluate("matchMedia('(prefers-color-scheme: dark)').matches") else "dark"
    page.emulate_media(color_scheme=other)
    page.wait_for_function(f"document.querySelector('.plot').layout.font.color !== '{before}'")


def test_the_page_needs_nothing_from_outside_and_quotes_what_it_shows(page_file):
    html = page_file.read_text()
    assert "A &lt;title&gt;" in html
    assert "The &lt;/script&gt; table" in html
    assert not re.search(r'<(?:script|link|img)[^>]+(?:src|href)="(?:https?:)?//', html)
    assert "run me" in html
    for row in ("Settings in which they differ", "every linear", "commit <b>abc</b>"):
        assert row in html


def test_shared_origins_are_said_once():
    rows = [{"a": "1.234567", "seed": "0", "device": d, "empty": "", "command": "c"} for d in "xy"]
    found = sheet(["a", "seed", "device", "empty", "command"], rows)
    assert found.columns == ["a", "device"]
    assert found.shared == {"seed": "0"}
    assert found.cells[0][0] == ("1.2346", "1.234567")


@pytest.mark.parametrize(
    ("cell", "text"), [("1234567.5", "1,234,568"), ("12", "12"), ("nan", "nan"), ("x", "x")]
)
def test_numbers_are_short(cell, text):
    assert pretty(cell) == text


def test_values_that_are_not_finite_do_not_break_the_page(tmp_path):
    (tmp_path / "a.csv").write_text("method,x,y\na,1,nan\nb,2,inf\nc,3,1\n")
    write_plots(tmp_path / "a.csv", "", "", [Plot("p", "y", "x")])
    text = render(collect([tmp_path]), "t")
    data = re.search(r'id="figures">(.*?)</script>', text, re.S)[1]
    assert '"y": [null, null, 1.0]' in data


def test_a_folder_is_no_page(folder, tmp_path):
    with pytest.raises(ConfigError, match="is a folder"):
        write_page(collect([folder]), tmp_path)
