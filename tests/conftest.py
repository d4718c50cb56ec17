"""Markers for machines with GPUs, and what several test files share."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch

# Triton kernels run in its interpreter where there is no GPU; triton reads this when a kernel is defined.
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# Ranks are processes here; threads of several of them on few cores spend their time waiting for one another.
os.environ["OMP_NUM_THREADS"] = "1"
torch.set_num_threads(1)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    gpus = torch.cuda.device_count()
    for item in items:
        for marker, needed in (("gpu", 1), ("gpu2", 2)):
            if item.get_closest_marker(marker) and gpus < needed:
                item.add_marker(pytest.mark.skip(reason=f"needs {needed} CUDA GPU(s), found {gpus}"))


@pytest.fixture(scope="session")
def data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few thousand bytes of text, built once."""
    return _build_data(tmp_path_factory.mktemp("data"), files=40)


@pytest.fixture(scope="session")
def long_data_folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A few hundred thousand bytes."""
    return _build_data(tmp_path_factory.mktemp("data"), files=640)


def _build_data(folder: Path, files: int) -> Path:
    from moetrain.data.build import build
    from moetrain.data.tokenizer import BytesTokenizer

    for number in range(files):
        text = "\n".join(f"{number + i} squared is {(number + i) ** 2}" for i in range(20))
        (folder / f"{number:02}.txt").write_text(text)
    out = folder / "built"
    build([str(folder)], out, BytesTokenizer(), held_out_fraction=0.2, workers=1, progress=False)
    return out


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    """The rows that tests have recorded as "topology", and the largest figures of each engine."""
    reports = [report for reports in terminalreporter.stats.values() for report in reports]
    called = [report for report in reports if getattr(report, "when", None) == "call"]
    rows = [value for report in called for name, value in report.user_properties if name == "topology"]
    if not rows:
        return
    from comparison import Differences

    engines: dict[tuple[str, str, str], list[dict[str, str]]] = {}
    for row in rows:
        if "refused" not in row:
            engines.setdefault((row["where"], row["dtype"], row["engine"]), []).append(row)
    summary = [
        {"where": where, "dtype": dtype, "engine": engine, "rows": str(len(of_engine))}
        | {name: max((row[name] for row in of_engine), key=float) for name in Differences._fields}
        for (where, dtype, engine), of_engine in engines.items()
    ]
    terminalreporter.section("topologies: largest relative differences from one rank")
    for line in [*_table(rows), "", *_table(summary)]:
        terminalreporter.line(line)


def _table(rows: list[dict[str, str]]) -> list[str]:
    """A heading, and lines that end with the reason where one is "refused"."""
    names = [name for name in max(rows, key=len, default={}) if name != "refused"]
    heading = dict(zip(names, names, strict=True))
    widths = {name: max(len(row.get(name, "")) for row in [heading, *rows]) for name in names}

    def line(row: dict[str, str]) -> str:
        cells = "  ".join(row.get(name, "").ljust(width) for name, width in widths.items()).rstrip()
        return f"{cells}  refused: {row['refused']}" if "refused" in row else cells

    return [line(row) for row in [heading, *rows]]
