"""``moetrain bench placement``: all solvers on traces, those given and synthetic ones, judged on held-out tokens.

Shapes: S tokens, L layers, E experts, K experts a token.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import torch
from numpy.typing import NDArray

from moetrain.benchmarks.report import Report, say, table
from moetrain.benchmarks.timing import Deadline
from moetrain.errors import ConfigError, PlacementError
from moetrain.placement.evaluation import Candidate, baselines, compare
from moetrain.placement.objectives import objective
from moetrain.placement.problem import Problem
from moetrain.placement.solve import SOLVERS, solve
from moetrain.placement.topology_file import topology_of
from moetrain.placement.trace import Trace, load_trace

HOLDOUT = 0.2


@dataclass(frozen=True)
class Options:
    """What the command line asks for."""

    traces: Sequence[str] = ()
    synthetic: Sequence[str] = ()
    shape: str = "16384,12,64,8"
    """S,L,E,K of the synthetic ones."""
    gpus: int = 8
    topology: str | None = None
    objectives: Sequence[str] = ("load", "hops", "traffic")
    solvers: Sequence[str] | None = None
    """None: all but those that every table has anyway."""
    time_limit: float = 10.0
    seed: int = 0
    budget_seconds: float | None = None
    json: str | None = None


def placement_command(options: Options) -> int:
    """Run the benchmark; returns 0. Raises TraceError, PlacementError and ConfigError."""
    topology = topology_of(options.topology, options.gpus)
    deadline = Deadline(options.budget_seconds)
    report = Report("placement", torch.device("cpu"), options.json)
    report.contents |= {"held_out": HOLDOUT, "time_limit": options.time_limit, "gpus": options.gpus}
    for name, trace in _traces(options):
        fitted, held_out = trace.split(HOLDOUT, options.seed)
        for wanted in options.objectives:
            if deadline.passed:
                say("out of time")
                return 0
            term = objective(wanted, fitted, topology)
            problem = Problem.equal(term, trace.num_layers, trace.num_experts, options.gpus)
            say(
                f"\n{name}: {trace.num_tokens:,} tokens, {trace.num_layers} layers, {trace.num_experts} experts, "
                f"{trace.top_k} a token, {options.gpus} GPUs; solved for {wanted}"
            )
            solved: list[tuple[Candidate, float | None]] = [
                *((candidate, None) for candidate in baselines(problem, fitted, options.seed)),
                *_solved(problem, options, deadline),
            ]
            compared = compare(
                [candidate for candidate, _ in solved], objective(wanted, held_out, topology), held_out, topology
            )
            rows = []
            for (candidate, gap), row in zip(solved, compared, strict=True):
                fitted_cost = term.cost(candidate.placement.gpu_LE)
                report.add(
                    {
                        "trace": name,
                        "objective": wanted,
                        "shape": [trace.num_tokens, trace.num_layers, trace.num_experts, trace.top_k],
                        "solver": row.name,
                        "fitted_cost": fitted_cost,
                        "gap": gap,
                        "held_out_cost": row.cost,
                        **asdict(row.score),
                        "seconds": row.seconds,
                    }
                )
                rows.append(
                    [
                        row.name,
                        f"{fitted_cost:.4f}",
                        None if gap is None else f"{100 * gap:.2f} %",
                        f"{row.cost:.4f}",
                        f"{row.score.load:.3f}",
                        f"{row.score.hops:.3f}",
                        f"{row.score.rows_inside + row.score.rows_across:.3f}",
                        f"{1e3 * row.score.step_seconds:.1f}",
                        f"{row.seconds:.2f}",
                    ]
                )
            table(["solver", "cost", "gap", "held out", "load", "hops", "rows", "step, ms", "solve, s"], rows)
    return 0


def _solved(problem: Problem, options: Options, deadline: Deadline) -> Iterator[tuple[Candidate, float]]:
    """What solvers find, and its gap. Those that are not for the objective raise PlacementError only if asked for."""
    every_table_has = ("contiguous", "random")
    asked_for = options.solvers is not None
    for solver in options.solvers or [name for name in SOLVERS if name not in every_table_has]:
        if deadline.passed:
            return
        try:
            solution = solve(problem, solver, time_limit=options.time_limit, seed=options.seed)
        except PlacementError:
            if asked_for:
                raise
            continue
        yield Candidate(solver, solution.placement, solution.seconds), solution.gap


def _traces(options: Options) -> list[tuple[str, Trace]]:
    """All at once, so that what is wrong with the last is known before the first is solved."""
    if not options.traces and not options.synthetic:
        raise ConfigError("--traces, --synthetic: give at least one")
    seed = options.seed
    return [
        *((path, load_trace(Path(path))) for path in options.traces),
        *((f"{family}, seed {seed}", synthetic(family, options.shape, seed)) for family in options.synthetic),
    ]


def synthetic(family: str, shape: str, seed: int) -> Trace:
    """A trace of one of FAMILIES; `shape` is S,L,E,K. Raises ConfigError for another family or no such shape.

    A token takes the K experts of the largest score plus Gumbel noise: K draws without replacement from softmax(score).
    """
    try:
        tokens, layers, experts, top_k = (int(number) for number in shape.split(","))
        if not (min(tokens, layers, top_k) > 0 and top_k <= experts):
            raise ValueError
    except ValueError:
        raise ConfigError(f"--shape {shape}: expected S,L,E,K, positive numbers, K at most E") from None
    if family not in FAMILIES:
        raise ConfigError(f"--synthetic {family}: is none of {', '.join(FAMILIES)}")
    rng = np.random.default_rng(seed)
    ids_SLK = np.empty((tokens, layers, top_k), np.int16)
    scores = FAMILIES[family](rng, tokens, experts)
    for layer in range(layers):
        noisy_SE = next(scores) + rng.gumbel(size=(tokens, experts))
        ids_SLK[:, layer] = np.argpartition(-noisy_SE, top_k - 1, axis=1)[:, :top_k]
    return Trace(ids_SLK, experts)


Scores = Iterator[NDArray[np.float64]]
"""Of one layer after the other, [S, E] or [1, E]."""


def _zipf(rng: np.random.Generator, tokens: int, experts: int) -> Scores:
    """The r-th expert of a layer is chosen like 1 / r; tokens are independent."""
    while True:
        yield -np.log(1.0 + rng.permutation(experts))[None]


def _lognormal(rng: np.random.Generator, tokens: int, experts: int) -> Scores:
    """An expert is chosen like exp(N(0, 1)); tokens are independent."""
    while True:
        yield rng.normal(size=(1, experts))


def _topics(rng: np.random.Generator, tokens: int, experts: int) -> Scores:
    """As log-normal, and tokens are of 16 topics, each with its own preferences, in every layer others: experts of a
    topic go together, in a layer and from layer to layer."""
    topic_S = rng.integers(0, 16, tokens)
    while True:
        yield (rng.normal(size=experts) + 2 * rng.normal(size=(16, experts)))[topic_S]


FAMILIES: dict[str, Callable[[np.random.Generator, int, int], Scores]] = {
    "zipf": _zipf,
    "lognormal": _lognormal,
    "topics": _topics,
}
