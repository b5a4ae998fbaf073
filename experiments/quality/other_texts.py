"""Texts that calibration has not seen, for ``sweep.py`` to judge settings by: a Bible, manuals, sources, and Wikipedia.

The manuals and sources are those of the Python packages installed here, in the order of a seeded permutation.
Wikipedia, as it is and with its punctuation apart, is what the package gensim carries for its tests, if its wheel is
given::

    pip download --no-deps gensim==4.4.0
    python experiments/quality/other_texts.py TEXTS --gensim gensim-4.4.0-cp311-cp311-*.whl
"""

from __future__ import annotations

import bz2
import html
import random
import re
import zipfile
from pathlib import Path
from typing import Annotated

import torch
import typer

from framequant.evaluation.renderings import word_tokenized
from framequant.evaluation.text import king_james

CHARACTERS = 500_000
DUMP = "gensim/test/test_data/enwiki-latest-pages-articles1.xml-p000000010p000030302-shortened.bz2"
#: What is not running text, in the order in which it is taken out of an article.
MARKUP = (
    (r"<!--.*?-->", ""),
    (r"<ref[^>/]*/>", ""),
    (r"<ref[^>]*>.*?</ref>", ""),
    (r"<(math|gallery|timeline|code|pre|syntaxhighlight|source)[^>]*>.*?</\1>", ""),
    *[(r"\{\{[^{}]*\}\}", "")] * 6,  # they nest
    (r"\{\|.*?\|\}", ""),
    *[(r"\[\[(?:File|Image|Category):[^\[\]]*(?:\[\[[^\[\]]*\]\][^\[\]]*)*\]\]", "")] * 3,
    (r"\[\[[^\[\]|]*\|([^\[\]]*)\]\]", r"\1"),
    (r"\[\[([^\[\]]*)\]\]", r"\1"),
    (r"\[https?:[^ \]]* ?([^\]]*)\]", r"\1"),
    (r"'{2,}", ""),
    (r"<[^>]+>", ""),
)
LAST_SECTIONS = ("See also", "References", "Notes", "External links", "Further reading", "Bibliography")
SHORTEST_LINE, SHORTEST_ARTICLE, LONGEST_ARTICLE = 60, 3000, 12000


def installed_text(*patterns: str) -> str:
    """Beginnings of the longer files of installed packages whose names match a pattern."""
    root = Path(torch.__file__).parent.parent
    files = sorted(
        {file for pattern in patterns for file in root.rglob(pattern) if file.stat().st_size > 4000}
    )
    random.Random(0).shuffle(files)
    return "\n\n".join(file.read_text(errors="ignore")[:8000] for file in files[:200])


def article(source: str) -> str:
    """The running text of an article, with headings written as WikiText-2 has them."""
    text = html.unescape(html.unescape(source))
    for pattern, by in MARKUP:
        text = re.sub(pattern, by, text, flags=re.DOTALL)
    lines = []
    for line in map(str.strip, text.split("\n")):
        heading = re.fullmatch(r"(=+)\s*(.*?)\s*=+", line)
        if heading and heading[2] in LAST_SECTIONS:
            break
        if heading:
            signs = " ".join(heading[1])
            lines.append(f" {signs} {heading[2]} {signs} ")
        elif len(line) >= SHORTEST_LINE and line[0] not in "*#:;|!{}":
            lines.append(line)
    return "\n".join(lines)


def wikipedia(wheel: Path) -> str:
    """The longer articles of the dump in gensim's wheel, their beginnings."""
    with zipfile.ZipFile(wheel) as archive:
        dump = bz2.decompress(archive.read(DUMP)).decode(errors="ignore")
    found = []
    for page in re.findall(r"<page>(.*?)</page>", dump, re.DOTALL):
        title, source = (
            re.search("<title>(.*?)</title>", page),
            re.search(r"<text[^>]*>(.*?)</text>", page, re.DOTALL),
        )
        if "<redirect" in page or title is None or source is None or ":" in title[1]:
            continue
        text = article(source[1])
        if len(text) > SHORTEST_ARTICLE:
            found.append(f" = {title[1]} = \n\n{text[:LONGEST_ARTICLE]}")
    return "\n\n".join(found)


def main(folder: Path, gensim: Annotated[Path | None, typer.Option(help="its wheel")] = None) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "bible.txt").write_text(king_james("new")[:CHARACTERS])
    (folder / "manuals.txt").write_text(installed_text("*.md", "METADATA")[:CHARACTERS])
    (folder / "sources.txt").write_text(installed_text("*.py")[:CHARACTERS])
    if gensim is not None:
        text = wikipedia(gensim)
        (folder / "wiki.txt").write_text(text)
        (folder / "wikiwords.txt").write_text(word_tokenized(text))


if __name__ == "__main__":
    typer.run(main)
