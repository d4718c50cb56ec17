"""The picture of a placement beside another one, as a PNG or as an HTML page that needs no network.

Shapes: L layers, G GPUs.
"""

from __future__ import annotations

import base64
import html
import io
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import LinearSegmentedColormap, Normalize, TwoSlopeNorm
from matplotlib.figure import Figure
from matplotlib.ticker import MaxNLocator
from numpy.typing import NDArray

from moetrain.errors import PlacementError
from moetrain.files import write_text, written_aside
from moetrain.placement.evaluation import gpu_transitions_GG
from moetrain.placement.placement import Placement
from moetrain.placement.simulator import simulate
from moetrain.placement.statistics import load_LE, load_LG, relative_LX
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace

FORMATS = (".html", ".png")

_LOAD = LinearSegmentedColormap.from_list("load", ["#2f6db3", "#f7f7f5", "#d9702a"])
_ROWS = LinearSegmentedColormap.from_list("rows", ["#f7f7f5", "#9cc0e4", "#2f6db3", "#12305a"])
_GREY = "#5f6670"


@dataclass(frozen=True)
class Maps:
    """What is drawn of a placement."""

    load_LG: NDArray[np.float64]
    """Pairs on each GPU / the mean of its layer."""
    rows_GG: NDArray[np.float64]
    """Rows that a token of the first GPU sends to the second in a layer, mean over the layers."""
    transitions_GG: NDArray[np.float64]
    """Fraction of the tokens that go from the first GPU to the second, mean over the layer boundaries."""

    @staticmethod
    def of(placement: Placement, trace: Trace, topology: Topology, seed: int = 0) -> Maps:
        return Maps(
            relative_LX(load_LG(load_LE(trace), placement.gpu_LE, placement.num_gpus)),
            simulate(trace, placement, topology, seed=seed).rows_GG,
            gpu_transitions_GG(placement, trace) / max(trace.num_layers - 1, 1),
        )


def write_report(
    path: Path,
    *,
    title: str,
    facts: Mapping[str, str],
    caption: str,
    head: Sequence[str],
    rows: Sequence[Sequence[str]],
    before: tuple[str, Maps],
    after: tuple[str, Maps],
    node_G: NDArray[np.int64],
) -> None:
    """Write heat maps of two placements to `path`, a .png, or .html that also has the facts and the table
    with its caption.

    `before` and `after` are names and maps; lines separate the nodes. Raises PlacementError for another suffix.
    """
    if path.suffix not in FORMATS:
        raise PlacementError(f"{path}: a report is {' or '.join(FORMATS)}")
    figure = _draw(before, after, node_G)
    if path.suffix == ".png":
        figure.suptitle(title, x=0.01, ha="left", fontsize=13, fontweight="bold")
        with written_aside(path) as aside:
            figure.savefig(aside, format="png", dpi=130)
        return
    picture = io.BytesIO()
    figure.savefig(picture, format="png", dpi=130)
    write_text(path, _page(title, facts, caption, head, rows, base64.b64encode(picture.getvalue()).decode()))


def _draw(before: tuple[str, Maps], after: tuple[str, Maps], node_G: NDArray[np.int64]) -> Figure:
    sides = (before, after)
    names = [name for name, _ in sides]
    loads = [maps.load_LG for _, maps in sides]
    rows = [maps.rows_GG for _, maps in sides]
    transitions = [maps.transitions_GG for _, maps in sides]
    away_GG = ~np.eye(len(node_G), dtype=bool)

    load_height = min(max(0.16 * len(loads[0]), 1.6), 5.0)
    figure = Figure(figsize=(10, load_height + 9.8), layout="constrained")
    FigureCanvasAgg(figure)
    lines = figure.subplots(3, 2, height_ratios=[load_height, 3.9, 3.9])

    most, least = max(load_LG.max() for load_LG in loads), min(load_LG.min() for load_LG in loads)
    even = TwoSlopeNorm(1, min(least, 0.999), max(most, 1.001))
    titles = [
        f"{name}: fullest GPU {load_LG.max(axis=1).mean():.3f} × the mean, worst layer {load_LG.max():.3f} ×"
        for name, load_LG in zip(names, loads, strict=True)
    ]
    _draw_pair(figure, lines[0], loads, titles, _LOAD, even, ("GPU", "layer", "pairs / mean of the layer"))
    titles = [
        f"{name}: {rows_GG[away_GG].sum() / len(node_G):.3f} rows a token and layer to other GPUs"
        for name, rows_GG in zip(names, rows, strict=True)
    ]
    labels = ("to GPU", "from GPU", "rows a token of the source")
    _draw_pair(figure, lines[1], rows, titles, _ROWS, _from_zero(rows), labels)
    titles = [
        f"{name}: {100 * transitions_GG[away_GG].sum():.1f} % of tokens change GPU at a layer boundary"
        for name, transitions_GG in zip(names, transitions, strict=True)
    ]
    labels = ("GPU of the next layer", "GPU of a layer", "fraction of tokens")
    _draw_pair(figure, lines[2], transitions, titles, _ROWS, _from_zero(transitions), labels)

    for border in np.flatnonzero(np.diff(node_G)) + 0.5:
        for axes in lines.flat:
            axes.axvline(border, color=_GREY, linewidth=0.6)
        for axes in lines[1:].flat:
            axes.axhline(border, color=_GREY, linewidth=0.6)
    return figure


def _from_zero(tables: Sequence[NDArray[np.float64]]) -> Normalize:
    return Normalize(0, max(float(table.max()) for table in tables) or 1.0)


def _draw_pair(
    figure: Figure,
    line: Sequence[Axes],
    tables: Sequence[NDArray[np.float64]],
    titles: Sequence[str],
    colours: LinearSegmentedColormap,
    scale: Normalize,
    labels: tuple[str, str, str],
) -> None:
    """Two tables side by side in the same colours; `labels` are of columns, rows and colours."""
    for axes, table, title in zip(line, tables, titles, strict=True):
        image = axes.imshow(table, cmap=colours, norm=scale, aspect="auto", interpolation="nearest")
        axes.set_title(title, fontsize=9, loc="left")
        axes.set_xlabel(labels[0])
        for axis in (axes.xaxis, axes.yaxis):
            axis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1, nbins=9))
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
    line[0].set_ylabel(labels[1])
    figure.colorbar(image, ax=line, label=labels[2], pad=0.01, aspect=25).outline.set_visible(False)


_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; color: #23272e; max-width: 1120px; margin: 2rem auto; padding: 0 1rem; }
h1 { font-size: 1.4rem; } h2 { font-size: 1.1rem; margin-top: 2rem; }
dl { display: grid; grid-template-columns: max-content auto; gap: .15rem 1.2rem; }
dt { color: #5f6670; } dd { margin: 0; }
.wide { overflow-x: auto; } table { border-collapse: collapse; font-variant-numeric: tabular-nums; }
th, td { padding: .3rem 0 .3rem 1.6rem; text-align: right; border-bottom: 1px solid #e3e5e8; white-space: nowrap; }
th { color: #5f6670; font-weight: 600; } th:first-child, td:first-child { text-align: left; padding-left: 0; }
tr.chosen td { font-weight: 600; background: #eef4fb; } img { width: 100%; height: auto; }
"""


def _page(
    title: str, facts: Mapping[str, str], caption: str, head: Sequence[str], rows: Sequence[Sequence[str]], png: str
) -> str:
    """The last row of the table is the placement that the report is about."""
    escape = html.escape
    listed = "\n".join(f"<dt>{escape(name)}</dt><dd>{escape(fact)}</dd>" for name, fact in facts.items())
    heads = "".join(f"<th>{escape(name)}</th>" for name in head)
    lines = []
    for number, row in enumerate(rows):
        chosen = ' class="chosen"' if number == len(rows) - 1 else ""
        lines.append(f"<tr{chosen}>{''.join(f'<td>{escape(cell)}</td>' for cell in row)}</tr>")
    body = "\n".join(lines)
    return f"""<!doctype html>
<html lang="en">
<head>
<meta charset="utf-8">
<meta name="viewport" content="width=device-width">
<title>{escape(title)}</title>
<style>{_STYLE}</style>
</head>
<body>
<h1>{escape(title)}</h1>
<dl>
{listed}
</dl>
<h2>{escape(caption[:1].upper() + caption[1:])}</h2>
<div class="wide"><table>
<thead><tr>{heads}</tr></thead>
<tbody>
{body}
</tbody>
</table></div>
<h2>Before and after</h2>
<img alt="Load by layer and GPU, rows and transitions by pair of GPUs" src="data:image/png;base64,{png}">
</body>
</html>
"""
