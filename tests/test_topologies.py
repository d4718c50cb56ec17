"""One table: training on every topology against training on one rank, over five steps with clipping.

In the mock world, in float64 so that neither a wrong scale nor a lost token can hide behind rounding: every world, tp,
ep and engine. Over them go accumulation, activation checkpointing and model: each row has those that bring the most
pairs of values (of any two columns) which no row before it has, and further rows follow until every pair is there that
can be.

In two processes, over gloo in float32, and over NCCL in float32 and bf16: DeepSpeed too. What the config refuses stands
there with the reason. How far rounding may part two runs in bf16 is measured, by runs on one GPU that add the same sums
in other orders.

tests/conftest.py prints the table.
"""

from __future__ import annotations

import functools
import itertools
import textwrap
from collections import Counter
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from comparison import MODELS, Differences, Numbers, config_of, differences, largest, train, train_all
from ranks import run_ranks

from moetrain.config import Config, check_world
from moetrain.errors import ConfigError
from moetrain.parallel.mock import MockWorld

# Buckets so small that gradients travel in many.
ZERO = ["parallel.engine=deepspeed", "parallel.deepspeed.zero_optimization.reduce_bucket_size=5000"]
ENGINES: dict[str, list[str]] = {
    "replicated": [],
    "fsdp": ["parallel.fsdp=true"],
    "fsdp, kept": ["parallel.fsdp=true", "parallel.reshard_after_forward=false"],
    "zero-1": [*ZERO, "parallel.zero_stage=1"],
    "zero-2": [*ZERO, "parallel.zero_stage=2"],
}
CHECKPOINTING = ("none", "selective", "full")
SEQUENCES = 16
"""In a step, of all ranks."""


class Row(NamedTuple):
    world: int
    tp: int
    ep: int
    engine: str
    accumulate: int
    checkpointing: str
    model: str

    def __str__(self) -> str:
        return "-".join(map(str, self)).replace(", ", "-")

    @property
    def dp(self) -> int:
        return self.world // self.tp

    @property
    def balance_scope(self) -> str:
        """Over micro-batches that come one after the other, the global balance loss sees those so far: another loss."""
        return "global" if self.accumulate == 1 else "sequence"

    def config(self, folder: Path, data: Path, *overrides: str) -> Config:
        """Raises ConfigError where it is refused."""
        config = config_of(
            folder,
            data,
            *MODELS[self.model],
            f"parallel.tp={self.tp}",
            f"parallel.ep={self.ep}",
            *of_length(16),
            f"train.micro_batch={SEQUENCES // (self.dp * self.accumulate)}",
            f"train.activation_checkpointing.mode={self.checkpointing}",
            f"router.balance_scope={self.balance_scope}",
            *ENGINES[self.engine],
            *overrides,
        )
        check_world(config, self.world)
        assert config.accumulation_steps(self.dp) == self.accumulate
        return config

    def refusal(self, *overrides: str) -> str | None:
        try:
            self.config(Path("runs"), Path("data"), *overrides)
        except ConfigError as error:
            return str(error)
        return None

    def cells(self, where: str, dtype: str) -> dict[str, str]:
        cells = {"world": self.world, "dp": self.dp} | self._asdict() | {"where": where, "dtype": dtype}
        return {name: str(value) for name, value in cells.items()}


def of_length(tokens: int) -> list[str]:
    """Overrides for so many tokens in a sequence."""
    return [
        f"data.seq_len={tokens}",
        f"train.tokens_per_step={SEQUENCES * tokens}",
        f"eval.tokens={SEQUENCES * tokens}",
    ]


def divisors(number: int) -> list[int]:
    return [d for d in range(1, number + 1) if number % d == 0]


def covering(choices: Iterable[list[Row]]) -> list[Row]:
    """A row of each list, and more of any until all pairs of values are there, in the order of worlds."""
    choices = list(choices)
    missing = {pair for row in itertools.chain(*choices) for pair in pairs(row)}
    taken: Counter[tuple[Any, ...]] = Counter()
    rows = []

    def take(some: Iterable[Row]) -> None:
        row = max(some, key=lambda row: (len(missing & pairs(row)), -taken[row[4:]]))
        missing.difference_update(pairs(row))
        taken[row[4:]] += 1
        rows.append(row)

    for some in choices:
        take(some)
    while missing:
        take(itertools.chain(*choices))
    return sorted(rows, key=lambda row: row[:3])


def pairs(row: Row) -> set[Any]:
    return set(itertools.combinations(row._asdict().items(), 2))


def mock_rows() -> list[Row]:
    topologies = [
        (world, tp, ep, engine)
        for world in (1, 2, 4, 8)
        for tp, ep in itertools.product(divisors(world), repeat=2)
        for engine in ("replicated", "fsdp", "fsdp, kept")
        # Weights that no other rank has are never freed.
        if engine != "fsdp, kept" or min(tp, ep) < world
    ]
    settings = list(itertools.product((1, 2), CHECKPOINTING, MODELS))
    return covering(
        [Row(*topology, *setting) for setting in settings if fits(setting[-1], topology[1])] for topology in topologies
    )


@functools.cache
def fits(model: str, tp: int) -> bool:
    return Row(tp, tp, 1, "replicated", 1, "none", model).refusal() is None


@pytest.fixture(scope="module")
def one_rank(tmp_path_factory: pytest.TempPathFactory, data_folder: Path) -> Callable[[Row], Numbers]:
    """What one rank gets that takes all of a step at once."""

    @functools.cache
    def numbers(model: str, scope: str) -> Numbers:
        row = Row(1, 1, 1, "replicated", 1, "none", model)
        config = row.config(tmp_path_factory.mktemp("one"), data_folder, f"router.balance_scope={scope}")
        (found,) = MockWorld(1).run(train, config)
        assert min(found.norms) > config.optim.clip_norm  # clipping is at work
        return found

    return lambda row: numbers(row.model, row.balance_scope)


@pytest.mark.parametrize("row", mock_rows(), ids=str)
def test_in_the_mock_world(
    row: Row, tmp_path: Path, data_folder: Path, one_rank: Callable[[Row], Numbers], record_property: Any
) -> None:
    ranks = MockWorld(row.world).run(train, row.config(tmp_path, data_folder))
    found = differences(ranks, one_rank(row))
    record_property("topology", row.cells("mock", "float64") | figures(found))
    assert found.within(Differences(*[1e-10] * 5))


def figures(found: Differences) -> dict[str, str]:
    return {name: f"{value:.1e}" for name, value in found._asdict().items()}


# Two processes -------------------------------------------------------------------------------------------------------

ROWS_OF_TWO = [
    Row(2, tp, ep, engine, 4, checkpointing, "qwen")
    for (engine, tp, ep), checkpointing in zip(
        itertools.product(("replicated", "fsdp", "zero-1", "zero-2"), (1, 2), (1, 2)), itertools.cycle(CHECKPOINTING)
    )
]
DTYPES = {"cpu": ["float32"], "cuda": ["float32", "bfloat16"]}


class Run(NamedTuple):
    row: Row
    dtype: str
    shuffle: int | None = None


def reference(run: Run) -> Run:
    """The run on one rank that the other is to equal."""
    # In bf16 ZeRO rounds embedding and routers too, which the other engines keep in float32.
    engine = "zero-2" if (run.row.engine, run.dtype) == ("zero-2", "bfloat16") else "replicated"
    return Run(Row(1, 1, 1, engine, 4, "none", "qwen"), run.dtype)


def other_orders(run: Run) -> list[Run]:
    """The same step in other micro-batches, of sequences in another order."""
    return [
        Run(run.row._replace(accumulate=accumulate), run.dtype, shuffle)
        for accumulate, shuffle in itertools.product((1, 2, 4, 16), (1, 2))
    ]


def overrides_of(device: str, dtype: str) -> list[str]:
    """Widths that GPU kernels take, and a loss that does not depend on accumulation."""
    overrides = ["model.dim=64", "model.expert_dim=64", "model.shared_dim=64"]
    overrides += ["model.n_layers=3", "model.first_dense_layers=1"]
    overrides += ["train.param_dtype=float32", f"train.dtype={dtype}", f"run.device={device}"]
    overrides += [*of_length(32), "router.balance_scope=sequence"]
    if dtype == "bfloat16":
        # Rounding sends some tokens to other experts: with many tokens that averages out. And nothing may turn it into
        # more than rounding, as Adam's division does where there is hardly a gradient, unless its eps is larger than
        # gradients are, and a bias whose step is a sign.
        overrides += [*of_length(2048), "optim.lr=1e-2", "optim.eps=1e-2", "router.bias_update_rate=0"]
    return overrides


class Measured(NamedTuple):
    device: str
    found: dict[Run, Differences]
    """From one rank, in its usual order."""
    by_order: dict[Run, Differences]
    """By such a run in bf16: the largest that other orders bring about."""


@pytest.fixture(scope="module")
def gloo(tmp_path_factory: pytest.TempPathFactory, long_data_folder: Path) -> Measured:
    return measure(tmp_path_factory.mktemp, long_data_folder, "cpu")


@pytest.fixture(scope="module")
def nccl(tmp_path_factory: pytest.TempPathFactory, long_data_folder: Path) -> Measured:
    return measure(tmp_path_factory.mktemp, long_data_folder, "cuda")


def measure(new_folder: Callable[[str], Path], data: Path, device: str) -> Measured:
    """All runs of a world share its processes, because starting them takes longer than most runs."""

    def numbers(world: int, runs: list[Run]) -> dict[Run, list[Numbers]]:
        folder = new_folder("numbers")
        configs = [run.row.config(new_folder("run"), data, *overrides_of(device, run.dtype)) for run in runs]
        run_ranks(world, train_all, configs, [run.shuffle for run in runs], folder)
        return {
            run: [Numbers(*torch.load(folder / f"{place}-{rank}.pt")) for rank in range(world)]
            for place, run in enumerate(runs)
        }

    runs = [Run(row, dtype) for dtype in DTYPES[device] for row in ROWS_OF_TWO]
    runs = [run for run in runs if run.row.refusal(*overrides_of(device, run.dtype)) is None]
    references = list(dict.fromkeys(map(reference, runs)))
    orders = {run: other_orders(run) for run in references if run.dtype == "bfloat16"}
    alone = numbers(1, [*references, *itertools.chain(*orders.values())])
    ranks = alone | numbers(2, runs)
    found = {run: differences(there, alone[reference(run)][0]) for run, there in ranks.items()}
    by_order = {run: largest([found[other] for other in others]) for run, others in orders.items()}
    return Measured(device, found, by_order)


@pytest.mark.parametrize("row", ROWS_OF_TWO, ids=str)
def test_over_gloo_in_float32(row: Row, gloo: Measured, record_property: Any) -> None:
    check(Run(row, "float32"), gloo, "gloo", record_property)


@pytest.mark.gpu2
@pytest.mark.parametrize("row", ROWS_OF_TWO, ids=str)
def test_over_nccl_in_float32(row: Row, nccl: Measured, record_property: Any) -> None:
    check(Run(row, "float32"), nccl, "nccl", record_property)


@pytest.mark.gpu2
@pytest.mark.parametrize("engine", ["replicated", "zero-2"])
def test_other_orders_on_one_gpu(engine: str, nccl: Measured, record_property: Any) -> None:
    """What the rows in bf16 are measured by."""
    row, found = {run.row.engine: (run.row, found) for run, found in nccl.by_order.items()}[engine]
    cells = {"engine": f"{engine}, other orders", "accumulate": "1–16"}
    record_property("topology", row.cells("nccl", "bfloat16") | cells | figures(found))
    assert all(0 < difference < 0.02 for difference in found)


@pytest.mark.gpu2
@pytest.mark.parametrize("row", ROWS_OF_TWO, ids=str)
def test_over_nccl_in_bfloat16(row: Row, nccl: Measured, record_property: Any) -> None:
    check(Run(row, "bfloat16"), nccl, "nccl", record_property)


def is_refused(run: Run) -> bool:
    """Of all rows these and no others; another refusal would take rows out of the table without a failure."""
    engine = run.row.engine
    return (engine in ("zero-1", "zero-2") and run.row.tp == 2) or (engine, run.dtype) == ("zero-1", "bfloat16")


def check(run: Run, measured: Measured, where: str, record_property: Any) -> None:
    cells = run.row.cells(where, run.dtype)
    refusal = run.row.refusal(*overrides_of(measured.device, run.dtype))
    assert (refusal is not None) == is_refused(run), refusal
    if refusal is not None:
        record_property("topology", cells | {"refused": textwrap.shorten(refusal, 80, placeholder=" …")})
        return
    found = measured.found[run]
    record_property("topology", cells | figures(found))
    if run.dtype == "float32":
        bounds = Differences(*[1e-5] * 5)
    else:
        # Other orders are a sample of a few: the largest of as many more would as often as not be larger.
        bounds = Differences(*(2 * spread for spread in measured.by_order[reference(run)]))
    assert found.within(bounds)
