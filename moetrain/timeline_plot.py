"""The picture of a step's timeline: computation, communication and what of it is exposed, off and on."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from moetrain.files import written_aside
from moetrain.timeline import Timeline

_BLUE, _ORANGE, _RED, _GREY = "#2f6db3", "#d9902a", "#c0392b", "#5f6670"
_ROWS = {"exposed": _RED, "communication": _ORANGE, "computation": _BLUE}
"""From the bottom, above them the layers."""


def draw_timelines(timelines: Mapping[str, Timeline], title: str, path: Path) -> None:
    """Write a PNG with one panel for each timeline, all on one scale of time.

    Above the rows are the layers, as far as they are known: from a layer's first kernel to its last, of the forward
    pass in dark and of the backward pass in light grey. Where halves take turns, neighbouring layers overlap.
    """
    figure = Figure(figsize=(14, 0.9 + 2.3 * len(timelines)), layout="constrained")
    FigureCanvasAgg(figure)
    panels = figure.subplots(len(timelines), 1, sharex=True, squeeze=False)[:, 0]
    figure.suptitle(title, x=0.01, ha="left", fontsize=12, fontweight="bold")
    for axes, (name, timeline) in zip(panels, timelines.items(), strict=True):
        _draw(axes, name, timeline)
    panels[-1].set_xlabel("milliseconds")
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)


def _draw(axes: Axes, name: str, timeline: Timeline) -> None:
    spans = dict(zip(_ROWS, (timeline.exposed, timeline.communication, timeline.compute), strict=True))
    for row, (label, color) in enumerate(_ROWS.items()):
        bars = [(start, end - start) for start, end in spans[label]]
        axes.broken_barh(bars, (row + 0.1, 0.8), facecolors=color, linewidth=0)
    for layer, backward, start, end in timeline.layers:
        # Two rows in turn, so that neighbours that overlap can be told apart.
        bottom = len(_ROWS) + 0.1 + 0.45 * (layer % 2)
        color = "#c9ced6" if backward else _GREY
        axes.broken_barh([(start, end - start)], (bottom, 0.4), facecolors=color, edgecolors="white", linewidth=0.6)
        axes.text(
            (start + end) / 2,
            bottom + 0.2,
            str(layer),
            ha="center",
            va="center",
            fontsize=7,
            color="black" if backward else "white",
            clip_on=True,
        )
    ms = timeline.figures()
    summary = (
        f"{name}: {ms['span_ms']:.1f} ms, computation {ms['compute_ms']:.1f}, communication "
        f"{ms['communication_ms']:.1f}, of which exposed {ms['exposed_ms']:.1f}; idle {ms['idle_ms']:.1f}"
    )
    axes.set_title(summary, loc="left", fontsize=10)
    rows = [*_ROWS, *(["layer"] if timeline.layers else [])]
    axes.set_yticks([row + 0.5 for row in range(len(rows))], rows)
    axes.set_ylim(0, len(rows) + 0.1)
    axes.tick_params(axis="y", length=0)
    axes.spines[["top", "right", "left"]].set_visible(False)
    axes.grid(axis="x", alpha=0.25, linewidth=0.6)
    axes.margins(x=0.005)
