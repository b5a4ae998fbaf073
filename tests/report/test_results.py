import json

import pytest

from framequant.errors import ReportError
from framequant.report.pareto import MEASURES, Point, front, measures, models, points
from framequant.report.results import Plot, collect, read_table, write_plots

HEAD = "method,bits_per_weight,perplexity,model\n"


def write(path, text):
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text)
    return path


def test_tables_of_a_folder_are_found_with_their_plots(tmp_path):
    file = write(tmp_path / "deep" / "a.csv", HEAD + "rtn,2,9,m\n")
    plot = Plot("P", "perplexity", "bits_per_weight", series="method", where={"model": "m"}, log_y=True)
    write_plots(file, "Title", "Text", [plot])
    write(tmp_path / ".hidden" / "b.csv", HEAD + "rtn,2,9,m\n")
    found = collect([tmp_path, file])
    assert [(t.title, t.text, t.plots) for t in found.tables] == [("Title", "Text", (plot,))]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("a.csv", HEAD, "no rows"),
        ("a.csv", HEAD + "1,2,3,4,5\n", "no table"),
        ("a.csv", "a,a\n1,2\n", "no table"),
        ("a.txt", "x", "neither a .csv"),
        ("framequant_report.json", "{}", "no report of framequant"),
        ("framequant_report.json", "{", "cannot be read as JSON"),
        ("framequant_report.json", '{"config": {}, "linears": [{"name": 1}]}', "no report that this version"),
    ],
)
def test_files_of_another_kind_are_refused(tmp_path, name, text, message):
    with pytest.raises(ReportError, match=message):
        collect([write(tmp_path / name, text)])


def test_damaged_files_of_a_folder_are_listed(tmp_path):
    write(tmp_path / "good.csv", HEAD + "rtn,2,9,m\n")
    write(tmp_path / "bad.csv", HEAD)
    write(tmp_path / "bytes.csv", "").write_bytes(b"\xff\xfe\x00,")
    found = collect([tmp_path])
    assert [t.name for t in found.tables] == ["good"]
    assert sorted(found.skipped) == [str(tmp_path / "bad.csv"), str(tmp_path / "bytes.csv")]


def test_empty_folders_and_missing_files_say_what_is_looked_for(tmp_path):
    with pytest.raises(ReportError, match=r"looked for framequant_report\.json"):
        collect([tmp_path])
    with pytest.raises(ReportError, match="no file or folder"):
        collect([tmp_path / "nowhere"])
    write(tmp_path / "bad.csv", HEAD)
    with pytest.raises(ReportError, match="nothing to show"):
        collect([tmp_path])


@pytest.mark.parametrize(
    ("entry", "message"),
    [
        ({"title": "t", "y": "perplexty", "x": "method"}, "Did you mean 'perplexity'"),
        ({"title": "t", "yy": "a"}, "unknown key 'yy'"),
        ({"title": "t", "image": "../a.png"}, "no picture"),
        ({"title": "t", "image": "a.png"}, "no picture"),
    ],
)
def test_plots_must_fit_their_table(tmp_path, entry, message):
    file = write(tmp_path / "a.csv", HEAD + "rtn,2,9,m\n")
    write(tmp_path / "a.plots.json", json.dumps({"plots": [entry]}))
    with pytest.raises(ReportError, match=message):
        read_table(file)


def test_the_front_holds_what_nobody_beats():
    values = [Point(2, 5, "a", {}), Point(2, 7, "b", {}), Point(2.5, 7, "c", {}), Point(3, 9, "d", {})]
    assert [p.method for p in front(values, larger_is_better=True)] == ["b", "d"]
    assert [p.method for p in front(values, larger_is_better=False)] == ["a"]
    assert front([], True) == []


def test_points_are_rows_with_bits_and_quality(tmp_path):
    rows = "rtn,2,9,m\ngptq,,9,m\ngptq,2,nan,m\ngptq,3,8,other\n"
    table = read_table(write(tmp_path / "a.csv", HEAD + rows))
    assert [m.column for m in measures(table)] == ["perplexity"]
    assert models(table) == ["m", "other"]
    assert [(p.bits, p.quality, p.method) for p in points(table, MEASURES[0], "m")] == [(2, 9, "rtn")]
    plain = read_table(write(tmp_path / "b.csv", "a,perplexity\n1,2\n"))
    assert measures(plain) == []
    assert points(plain, MEASURES[0]) == []
