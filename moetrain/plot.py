"""The picture of a run: loss.png, drawn from metrics.jsonl."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure
from matplotlib.ticker import EngFormatter, MaxNLocator

from moetrain.errors import UserError
from moetrain.files import written_aside
from moetrain.metrics import read_metrics

_BLUE, _ORANGE, _GREY = "#2f6db3", "#d9702a", "#5f6670"


def plot_losses(run_dir: Path) -> Path:
    """Draw training and held-out loss over the steps, and below them expert load (MoE) or speed; returns loss.png.

    The training loss is drawn as it is (light) and smoothed. Values that were NaN or infinite are gaps. Raises
    UserError if metrics.jsonl is missing, damaged or holds no finite loss.
    """
    records = read_metrics(run_dir)
    loss = _series(records, "loss_metrics/global_avg_loss")
    heldout = _series(records, "heldout/loss")
    if not np.isfinite(loss[1]).any() and not np.isfinite(heldout[1]).any():
        raise UserError(f"{run_dir}: no loss to draw yet")

    figure = Figure(figsize=(8, 6), layout="constrained")
    FigureCanvasAgg(figure)
    top, bottom = figure.subplots(2, 1, sharex=True, height_ratios=[5, 2])
    figure.suptitle(run_dir.resolve().name, x=0.01, ha="left", fontsize=13, fontweight="bold")
    _draw_losses(top, loss, heldout)
    _draw_second(bottom, records)
    bottom.set_xlabel("step")
    bottom.xaxis.set_major_locator(MaxNLocator(integer=True, min_n_ticks=1))
    for axes in (top, bottom):
        axes.spines[["top", "right"]].set_visible(False)
        axes.grid(alpha=0.25, linewidth=0.6)
        axes.margins(x=0.02)

    path = run_dir / "loss.png"
    with written_aside(path) as aside:
        figure.savefig(aside, format="png", dpi=150)
    return path


Series = tuple[np.ndarray, np.ndarray]
"""Steps and values, both [n]; a value that was not finite is NaN."""


def _series(records: Sequence[dict[str, Any]], key: str) -> Series:
    points = [(record["step"], record[key]) for record in records if key in record]
    steps = np.array([step for step, _ in points], dtype=np.int64)
    values = np.array([np.nan if value is None else value for _, value in points], dtype=np.float64)
    return steps, values


def _smooth(values: np.ndarray) -> np.ndarray:
    """Mean over a window of a twentieth of the run around each value; NaN values are left out, and stay NaN.

    The window is narrower at the start, where a loss falls fast, and cut at the end.
    """
    index = np.arange(len(values))
    half = np.minimum(index, max(1, len(values) // 40))
    first, stop = index - half, np.minimum(index + half + 1, len(values))
    finite = np.isfinite(values)
    sums = np.concatenate([[0.0], np.cumsum(np.where(finite, values, 0.0))])
    counts = np.concatenate([[0], np.cumsum(finite)])
    result = np.full_like(values, np.nan)
    np.divide(sums[stop] - sums[first], counts[stop] - counts[first], out=result, where=finite)
    return result


def _draw_losses(axes: Axes, loss: Series, heldout: Series) -> None:
    steps, values = loss
    finite = values[np.isfinite(values)]
    marker = "o" if len(finite) == 1 else ""
    if len(finite):
        last = f"training, last {finite[-1]:.3f}"
        if len(finite) >= 40:
            axes.plot(steps, values, color=_BLUE, alpha=0.3, linewidth=0.8)
            axes.plot(steps, _smooth(values), color=_BLUE, linewidth=1.8, label=last)
        else:
            axes.plot(steps, values, color=_BLUE, linewidth=1.8, marker=marker, label=last)
    steps, values = heldout
    finite = values[np.isfinite(values)]
    if len(finite):
        axes.plot(
            steps,
            values,
            color=_ORANGE,
            linewidth=1.0,
            linestyle="--",
            marker="o",
            markersize=5,
            label=f"held-out, last {finite[-1]:.3f}",
        )
    axes.set_ylabel("loss (nats a token)")
    axes.legend(frameon=False)


def _draw_second(axes: Axes, records: Sequence[dict[str, Any]]) -> None:
    steps, values = _series(records, "moe/max_over_mean_load")
    if len(steps):
        axes.axhline(1.0, color=_GREY, linewidth=0.8, linestyle=":")
        axes.set_ylabel("max / mean\nexpert load")
    else:
        steps, values = _series(records, "throughput(global_tps)")
        axes.yaxis.set_major_formatter(EngFormatter(sep=""))
        axes.set_ylabel("tokens / s")
    axes.plot(steps, values, color=_GREY, linewidth=1.2, marker="o" if len(steps) == 1 else "")
