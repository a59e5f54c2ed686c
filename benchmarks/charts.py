"""Line charts as SVG files, for the README and the documentation.

Matplotlib draws them; it is only needed where a chart is asked for. Equal results give equal files, so that a chart under version
control changes when its figures do.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from . import files

# Distinguishable with every common colour vision, on white and on grey (Okabe and Ito, 2008).
COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7", "#e69f00", "#56b4e9", "#555555")
MARKERS = "osD^vPX"
STYLE: dict[str, Any] = {
    "font.family": "sans-serif", "font.size": 9, "svg.fonttype": "none", "svg.hashsalt": "megatron_kernels",
    "axes.spines.top": False, "axes.spines.right": False, "axes.grid": True, "grid.color": "#dddddd", "grid.linewidth": 0.6,
    "axes.titlesize": 10, "axes.titlelocation": "left", "legend.frameon": False, "legend.fontsize": 8}


@dataclass(frozen=True)
class Series:
    """One line: its points in any order, and where they are known the lower and upper end of each, drawn as a band.

    Points that are not finite leave a gap.
    """

    label: str
    points: Sequence[tuple[float, float]]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    dashed: bool = False  # what was not measured: an ideal, a limit, a model


@dataclass(frozen=True)
class Panel:
    """The arguments of `line_chart`, as a part of a `grid`."""

    series: Sequence[Series]
    title: str
    x_label: str
    y_label: str
    log_x: bool = False
    log_y: bool = False
    level: tuple[float, str] | None = None  # a horizontal line, and what it means
    ticks: Sequence[float] = ()  # on the x axis, where the default is not wanted


def why_not() -> str:
    """Why charts can't be drawn here, or nothing."""
    try:
        import matplotlib  # noqa: F401
    except ImportError as error:
        return f"charts need matplotlib (pip install matplotlib): {error}"
    return ""


def line_chart(path: str | Path, series: Sequence[Series], *, title: str, x_label: str, y_label: str, log_x: bool = False,
               log_y: bool = False, level: tuple[float, str] | None = None, ticks: Sequence[float] = ()) -> None:
    """Write one chart to `path`, an SVG file; the directory is made. RuntimeError without matplotlib."""
    grid(path, [Panel(series, title, x_label, y_label, log_x, log_y, level, ticks)], size=(6.4, 3.8))


def grid(path: str | Path, panels: Sequence[Panel], *, columns: int = 2, title: str = "",
         size: tuple[float, float] = (4.4, 3.2)) -> None:
    """Write several charts into one SVG file, `size` inches each. RuntimeError without matplotlib, ValueError without panels."""
    if why := why_not():
        raise RuntimeError(why)
    if not panels:
        raise ValueError(f"{path}: no panels to draw")
    from matplotlib import rc_context
    from matplotlib.backends.backend_svg import FigureCanvasSVG
    from matplotlib.figure import Figure

    columns = min(columns, len(panels))
    rows = math.ceil(len(panels) / columns)
    with rc_context(STYLE):
        figure = Figure(figsize=(size[0] * columns, size[1] * rows), layout="constrained")
        FigureCanvasSVG(figure)
        axes = list(figure.subplots(rows, columns, squeeze=False).flat)
        styles = _styles(panels)
        for axis, panel in zip(axes, panels, strict=False):
            _draw(axis, panel, styles)
        for axis in axes[len(panels):]:
            axis.set_axis_off()
        lines = {line.get_label(): line for axis in axes for line in axis.get_lines()}
        if len(panels) == 1:
            axes[0].legend()
        else:
            figure.legend(lines.values(), lines.keys(), loc="outside lower left", ncols=4)
        if title:
            figure.suptitle(title, x=0.01, ha="left", fontsize=11)
        with files.replacing(path) as partial:
            figure.savefig(partial, format="svg", facecolor="white", metadata={"Date": None})


def _styles(panels: Sequence[Panel]) -> dict[str, tuple[str, str]]:
    """Colour and marker of each label, the same in all panels."""
    labels = dict.fromkeys(series.label for panel in panels for series in panel.series)
    return {label: (COLOURS[i % len(COLOURS)], MARKERS[i % len(MARKERS)]) for i, label in enumerate(labels)}


def _draw(axis: Any, panel: Panel, styles: dict[str, tuple[str, str]]) -> None:
    most = max((len(series.points) for series in panel.series), default=0)
    for series in panel.series:
        order = sorted(range(len(series.points)), key=lambda i: series.points[i][0])
        x, y = ([series.points[i][part] for i in order] for part in (0, 1))
        colour, marker = styles[series.label]
        axis.plot(x, y, color=colour, label=series.label, linewidth=1.4, linestyle="--" if series.dashed else "-",
                  marker="" if series.dashed or most > 40 else marker, markersize=4)
        if series.low is not None and series.high is not None:
            axis.fill_between(x, [series.low[i] for i in order], [series.high[i] for i in order], color=colour, alpha=0.15,
                              linewidth=0)
    if panel.log_x:
        axis.set_xscale("log", base=2)
    if panel.log_y:
        axis.set_yscale("log")
    else:
        finite = [y for series in panel.series for _, y in series.points if math.isfinite(y)]
        if finite and min(finite) >= 0:
            axis.set_ylim(bottom=0)
    if panel.level is not None:
        value, label = panel.level
        axis.axhline(value, color="#555555", linewidth=1, linestyle=":", label=label)
    if panel.ticks:
        axis.set_xticks(list(panel.ticks), [f"{tick:g}" for tick in panel.ticks])
        axis.minorticks_off()
    axis.set_title(panel.title)
    axis.set_xlabel(panel.x_label)
    axis.set_ylabel(panel.y_label)
