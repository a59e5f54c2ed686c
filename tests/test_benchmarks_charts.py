"""Charts: what is given is drawn, equal results give equal files, and a failed drawing leaves nothing behind."""

from __future__ import annotations

import re
import xml.etree.ElementTree as ElementTree

import pytest

from benchmarks import charts
from benchmarks.charts import Panel, Series

needs_matplotlib = pytest.mark.skipif(bool(charts.why_not()), reason=charts.why_not())
OURS = Series("ours", [(4096, 24.0), (256, 10.0), (1024, 20.0)], low=[23, 9, 19], high=[25, 11, 21])
PEER = Series("peer", [(256, 5.0), (1024, float("nan")), (4096, 8.0)])
IDEAL = Series("ideal", [(256, 12.0), (4096, 30.0)], dashed=True)


def panel(title: str = "softmax") -> Panel:
    return Panel([OURS, PEER, IDEAL], title, "columns", "GB/s", log_x=True, level=(28.0, "copy"), ticks=(256, 1024, 4096))


def words(path) -> list[str]:
    return [text.text.strip() for text in ElementTree.parse(path).iter("{http://www.w3.org/2000/svg}text")]


@needs_matplotlib
def test_everything_is_named_once(tmp_path):
    charts.grid(tmp_path / "made" / "chart.svg", [panel("softmax"), panel("layer norm"), panel("loss")], title="All of them")
    found = words(tmp_path / "made" / "chart.svg")
    for word, times in {"softmax": 1, "layer norm": 1, "loss": 1, "All of them": 1, "columns": 3, "GB/s": 3, "1024": 3,
                        "ours": 1, "peer": 1, "ideal": 1, "copy": 1}.items():
        assert found.count(word) == times, word


@needs_matplotlib
def test_points_are_drawn_in_order_and_gaps_stay(tmp_path):
    charts.line_chart(tmp_path / "chart.svg", [OURS, PEER], title="t", x_label="x", y_label="y")
    text = (tmp_path / "chart.svg").read_text()
    ours, = re.findall(rf'<path d="([^"]+)" clip-path[^>]*style="fill: none; stroke: {charts.COLOURS[0]}', text)
    x = [float(number) for number in re.findall(r"[ML] ([\d.]+)", ours)]
    assert len(x) == 3 and x == sorted(x)
    peer, = re.findall(rf'<path d="([^"]+)" clip-path[^>]*style="fill: none; stroke: {charts.COLOURS[1]}', text)
    assert peer.count("M") == 2


@needs_matplotlib
def test_equal_results_give_equal_files(tmp_path):
    for name in ("one.svg", "two.svg"):
        charts.line_chart(tmp_path / name, [OURS], title="t", x_label="x", y_label="y", log_y=True)
    assert (tmp_path / "one.svg").read_bytes() == (tmp_path / "two.svg").read_bytes()
    charts.line_chart(tmp_path / "two.svg", [PEER], title="t", x_label="x", y_label="y", log_y=True)
    assert (tmp_path / "one.svg").read_bytes() != (tmp_path / "two.svg").read_bytes()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["one.svg", "two.svg"]


@needs_matplotlib
def test_nothing_to_draw(tmp_path):
    with pytest.raises(ValueError, match="no panels"):
        charts.grid(tmp_path / "chart.svg", [])
    assert not list(tmp_path.iterdir())


def test_without_matplotlib(tmp_path, monkeypatch):
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    assert "pip install matplotlib" in charts.why_not()
    with pytest.raises(RuntimeError, match="pip install matplotlib"):
        charts.line_chart(tmp_path / "chart.svg", [OURS], title="t", x_label="x", y_label="y")
