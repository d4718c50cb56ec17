"""`moetrain place`."""

from __future__ import annotations

import argparse
import json
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, replace
from math import inf
from pathlib import Path
from typing import Any

from rich.box import SIMPLE_HEAD
from rich.console import Console
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.table import Table

from moetrain.errors import ConfigError, PlacementError
from moetrain.files import write_text
from moetrain.placement.evaluation import Candidate, Score, baselines, compare, table_of
from moetrain.placement.objectives import objective
from moetrain.placement.placement import save_placement
from moetrain.placement.problem import Problem, Solution
from moetrain.placement.problem import Progress as OnProgress
from moetrain.placement.report import FORMATS, Maps, write_report
from moetrain.placement.simulator import Calibration, load_calibration, sources
from moetrain.placement.solve import SOLVERS, solve
from moetrain.placement.topology import Topology
from moetrain.placement.topology_file import topology_of
from moetrain.placement.trace import Trace, load_trace


def add_place_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain place`."""
    parser.add_argument(
        "--trace", required=True, type=Path, metavar="T", help="a trace file, a folder of them, or a run that recorded"
    )
    parser.add_argument("--experts", type=int, metavar="E", help="of a layer (default: as the trace says)")
    parser.add_argument("--gpus", required=True, type=int, metavar="G", help="to place the experts on")
    parser.add_argument(
        "--topology",
        metavar="F",
        help="YAML of nodes and links, or `detect` for this machine's (default: any two GPUs equally far)",
    )
    parser.add_argument(
        "--objective",
        default="load",
        metavar="O",
        help="load, hops, traffic, moetuner, or a sum as load+0.5*traffic (default: %(default)s)",
    )
    parser.add_argument(
        "--solver", default="auto", choices=SOLVERS, metavar="S", help=f"{', '.join(SOLVERS)} (default: %(default)s)"
    )
    parser.add_argument(
        "--time-limit", type=float, default=60.0, metavar="SECONDS", help="of the search (default: %(default)g)"
    )
    parser.add_argument(
        "--least", type=int, metavar="N", help="experts of a layer on a GPU (default: E / G, or with --most 0)"
    )
    parser.add_argument(
        "--most", type=int, metavar="N", help="experts of a layer on a GPU (default: E / G, or with --least E)"
    )
    parser.add_argument(
        "--holdout",
        type=float,
        metavar="FRACTION",
        help="of the tokens to keep from the solver and compare on (default: solve for all, and compare on all)",
    )
    parser.add_argument(
        "--calibration", type=Path, metavar="F", help="YAML of the simulator's constants (see docs/placement.md)"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    parser.add_argument("--out", required=True, type=Path, metavar="F", help="placement.json to write")
    parser.add_argument("--report", type=Path, metavar="F", help="heat maps to write, .html or .png")
    parser.add_argument("--json", type=Path, metavar="F", help="also write the comparison to this file")


def place_command(args: argparse.Namespace) -> int:
    """Run `moetrain place`; returns the exit code. Raises TraceError and PlacementError, before the search where it
    can, and ConfigError for options that mean nothing."""
    _check_options(args)
    trace = load_trace(args.trace, args.experts)
    topology = topology_of(args.topology, args.gpus)
    calibration = Calibration() if args.calibration is None else load_calibration(args.calibration)
    fitted, judged = (trace, trace) if args.holdout is None else trace.split(args.holdout, args.seed)
    problem = _problem(args, fitted, topology)
    sources(judged, args.gpus)  # there are enough tokens to simulate a step with

    console = Console()
    layers = f"{trace.num_layers} layers of {trace.num_experts} experts"
    _say(console, f"{args.trace}: {trace.num_tokens:,} tokens, {layers}, to {args.gpus} GPUs")
    if trace.inferred_experts:
        _say(console, "the number of experts is the largest id + 1: say it with --experts if there are more")
    with _progress_shown(console) as on_progress:
        solution = solve(problem, args.solver, time_limit=args.time_limit, seed=args.seed, progress=on_progress)
    _say(
        console,
        f"{args.objective} {_costs(solution.cost, solution.bound)}, found by {solution.solver}, "
        f"{solution.seconds:.1f} s in all",
    )
    record = _record(args, trace, fitted, topology, problem, solution)
    save_placement(args.out, solution.placement, **record)

    candidates = [*baselines(problem, fitted, args.seed), Candidate("solved", solution.placement, solution.seconds)]
    term = problem.objective if judged is fitted else objective(args.objective, judged, topology)
    compared = compare(candidates, term, judged, topology, calibration, args.seed)
    head, rows = table_of(compared, several_nodes=topology.num_nodes > 1)
    which = "all" if args.holdout is None else "held out"
    caption = f"on {judged.num_tokens:,} tokens ({which}); cost is {args.objective}"
    _print_table(console, caption, head, rows)
    if args.json is not None:
        contents = {**record, "compared_on_tokens": judged.num_tokens, "rows": [asdict(row) for row in compared]}
        write_text(args.json, json.dumps(contents, indent=1) + "\n")
    if args.report is not None:
        write_report(
            args.report,
            title=f"{args.objective}: {layers} on {args.gpus} GPUs",
            facts=_facts(args, record, compared[-1].score),
            caption=caption,
            head=head,
            rows=rows,
            before=("contiguous", Maps.of(candidates[0].placement, judged, topology, args.seed)),
            after=("solved", Maps.of(solution.placement, judged, topology, args.seed)),
            node_G=topology.node_G,
        )
    _say(console, f"written: {', '.join(str(file) for file in (args.out, args.report, args.json) if file is not None)}")
    return 0


def _check_options(args: argparse.Namespace) -> None:
    """Raises ConfigError for numbers that mean nothing, and PlacementError for files that could not be written."""
    for name, value in {"--gpus": args.gpus, "--experts": args.experts, "--most": args.most}.items():
        if value is not None and value < 1:
            raise ConfigError(f"{name} {value}: expected a positive number")
    for name, value in {"--least": args.least, "--seed": args.seed}.items():
        if value is not None and value < 0:
            raise ConfigError(f"{name} {value}: expected 0 or a positive number")
    if not 0 < args.time_limit < inf:
        raise ConfigError(f"--time-limit {args.time_limit:g}: expected seconds, more than 0")
    if args.holdout is not None and not 0 < args.holdout < 1:
        raise ConfigError(f"--holdout {args.holdout:g}: expected a fraction between 0 and 1")
    if args.report is not None and args.report.suffix not in FORMATS:
        raise ConfigError(f"--report {args.report}: expected a name that ends in {' or '.join(FORMATS)}")
    files = [file for file in (args.out, args.report, args.json) if file is not None]
    if len({file.resolve() for file in files}) < len(files):
        raise ConfigError("--out, --report, --json: two of them name the same file")
    for file in files:
        if not file.parent.is_dir():
            raise PlacementError(f"{file}: there is no folder {file.parent}; make it first")
        if file.is_dir():
            raise PlacementError(f"{file}: is a folder; name a file")
        try:
            tempfile.TemporaryFile(dir=file.parent).close()
        except OSError as error:
            raise PlacementError(f"{file}: cannot write to {file.parent}: {error.strerror}; choose another") from None


def _problem(args: argparse.Namespace, trace: Trace, topology: Topology) -> Problem:
    """Raises PlacementError where nothing is feasible."""
    term = objective(args.objective, trace, topology)
    layers, experts = trace.num_layers, trace.num_experts
    if args.least is None and args.most is None:
        if trace.inferred_experts and experts % args.gpus:
            raise PlacementError(
                f"{args.trace}: its largest expert id is {experts - 1}, and {experts} experts cannot be shared equally "
                f"by {args.gpus} GPUs; if there are more, say how many with --experts"
            )
        problem = Problem.equal(term, layers, experts, args.gpus)
    else:
        least = 0 if args.least is None else args.least
        most = experts if args.most is None else args.most
        problem = Problem(term, layers, experts, args.gpus, least, most)
    problem.check()
    return problem


def _record(
    args: argparse.Namespace,
    trace: Trace,
    fitted: Trace,
    topology: Topology,
    problem: Problem,
    solution: Solution,
) -> dict[str, Any]:
    """What placement.json says besides the assignment: `cost` and `bound` are on the whole trace."""
    if fitted is not trace:
        whole = objective(args.objective, trace, topology)
        cost = whole.cost(solution.placement.gpu_LE)
        solution = replace(solution, cost=cost, bound=whole.lower_bound(args.gpus, problem.least, problem.most))
    return {
        "objective": args.objective,
        "cost": solution.cost,
        "bound": solution.bound,
        "gap": solution.gap,
        "solver": solution.solver,
        "seconds": solution.seconds,
        "least": problem.least,
        "most": problem.most,
        "trace": str(args.trace),
        "topology": args.topology,
        "tokens": trace.num_tokens,
        "solved_for_tokens": fitted.num_tokens,
        "seed": args.seed,
    }


def _facts(args: argparse.Namespace, record: dict[str, Any], score: Score) -> dict[str, str]:
    """The same in words."""
    parts = {
        "dense": score.dense_seconds,
        "dispatch": score.dispatch_seconds,
        "experts": score.compute_seconds,
        "combine": score.combine_seconds,
    }
    times = [f"{name} {1e3 * seconds:,.1f}" for name, seconds in parts.items()]
    share = "" if record["least"] == record["most"] else f"{record['least']} to "
    return {
        "objective": f"{args.objective} {_costs(record['cost'], record['bound'])}, on all {record['tokens']:,} tokens",
        "solver": f"{record['solver']} (asked for: {args.solver}), {record['seconds']:.1f} s",
        "trace": f"{args.trace}, of which {record['solved_for_tokens']:,} tokens to solve for",
        "topology": args.topology or "any two GPUs equally far",
        "experts of a layer on a GPU": f"{share}{record['most']}",
        "simulated step": f"{1e3 * score.step_seconds:,.1f} ms: " + ", ".join(times),
    }


def _print_table(console: Console, caption: str, head: Sequence[str], rows: Sequence[Sequence[str]]) -> None:
    """Ten columns in 80 characters."""
    table = Table(box=SIMPLE_HEAD, padding=(0, 1, 0, 0))
    table.add_column(head[0], no_wrap=True)
    for name in head[1:]:
        table.add_column(name.replace(" ", "\n"), justify="right")
    for row in rows:
        table.add_row(*row)
    _say(console, caption)
    console.print(table)


@contextmanager
def _progress_shown(console: Console) -> Iterator[OnProgress]:
    """What `solve` reports: on a terminal in one line that moves; else a line at most every second, and the last."""
    if console.is_terminal:
        columns = (SpinnerColumn(), TextColumn("{task.description}", markup=False), TimeElapsedColumn())
        with Progress(*columns, console=console, transient=True) as display:
            task = display.add_task("searching")
            yield lambda *report: display.update(task, description=_progress_line(*report))
        return
    shown_at, waiting = -inf, ""

    def show(cost: float, bound: float, seconds: float, solver: str) -> None:
        nonlocal shown_at, waiting
        waiting = f"{seconds:7.1f} s  {_progress_line(cost, bound, seconds, solver)}"
        if seconds >= shown_at + 1:
            _say(console, waiting)
            shown_at, waiting = seconds, ""

    yield show
    if waiting:
        _say(console, waiting)


def _progress_line(cost: float, bound: float, seconds: float, solver: str) -> str:
    return f"{_costs(cost, bound)}, {solver}"


def _costs(cost: float, bound: float) -> str:
    if bound == -inf:
        return f"{cost:.6g}"
    if bound >= cost:
        return f"{cost:.6g}, proven optimal"
    return f"{cost:.6g}, none below {bound:.6g} (gap {100 * (cost - bound) / cost:.3g} %)"


def _say(console: Console, text: str) -> None:
    console.print(text, markup=False, highlight=False, soft_wrap=True)
