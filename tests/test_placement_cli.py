"""`moetrain place`: what it writes and prints, and what it says to bad input."""

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pulp
import pytest

from moetrain import placement_commands
from moetrain.benchmarks.placement import synthetic
from moetrain.cli import main
from moetrain.placement.placement import load_placement
from moetrain.placement.program import minimise
from moetrain.placement.statistics import imbalance_L, load_LE, transitions_LEE
from moetrain.placement.trace import Trace, save_trace

LAYERS, EXPERTS = 3, 8


@pytest.fixture
def trace(tmp_path):
    """400 tokens with 2 of 8 experts in 3 layers: of two kinds, whose experts are apart in contiguous order."""
    rng = np.random.default_rng(0)
    kind_S = rng.integers(0, 2, 400)
    score_SLE = rng.gumbel(size=(400, LAYERS, EXPERTS)) + 4.0 * (np.arange(EXPERTS) % 2 == kind_S[:, None, None])
    trace = Trace(np.argsort(-score_SLE, axis=-1)[..., :2], EXPERTS, source_S=np.arange(400) % 2)
    save_trace(tmp_path / "trace.npz", trace)
    return trace


@pytest.fixture
def place(tmp_path, trace, monkeypatch):
    """Runs the command in a folder that has the trace."""
    monkeypatch.chdir(tmp_path)

    def run(*options):
        given = {"--trace": "trace.npz", "--gpus": "2", "--out": "p.json", "--time-limit": "5"}
        words = [word for name, value in given.items() if name not in options for word in (name, value)]
        return main(["place", *words, *options])

    return run


def hops(trace, gpu_LE):
    """Straight from the tokens: over the pairs of experts of neighbouring layers, how often the GPU changes."""
    total = 0.0
    for ids_LK in trace.expert_ids_SLK:
        for layer in range(trace.num_layers - 1):
            here_K = gpu_LE[layer, ids_LK[layer]]
            next_K = gpu_LE[layer + 1, ids_LK[layer + 1]]
            total += np.mean(here_K[:, None] != next_K)
    return total / trace.num_tokens


def test_what_is_written(place, trace, tmp_path, capsys):
    assert place("--objective", "hops", "--json", "c.json") == 0
    record = json.loads((tmp_path / "p.json").read_text())
    placement = load_placement(tmp_path / "p.json")
    assert (record["num_layers"], record["num_experts"], record["num_gpus"]) == (LAYERS, EXPERTS, 2)
    assert (record["objective"], record["tokens"], record["solved_for_tokens"]) == ("hops", 400, 400)
    assert (placement.experts_LG == EXPERTS // 2).all()
    assert record["cost"] == pytest.approx(hops(trace, placement.gpu_LE))
    assert record["bound"] <= record["cost"]
    assert record["gap"] == pytest.approx((record["cost"] - record["bound"]) / record["cost"])

    compared = json.loads((tmp_path / "c.json").read_text())
    rows = {row["name"]: row for row in compared["rows"]}
    assert list(rows) == ["contiguous", "random", "greedy", "solved"]
    contiguous = np.tile(np.arange(EXPERTS) // 4, (LAYERS, 1))
    assert rows["contiguous"]["cost"] == pytest.approx(hops(trace, contiguous))
    assert rows["solved"]["cost"] == rows["solved"]["score"]["hops"] == pytest.approx(record["cost"])
    assert rows["solved"]["cost"] < 0.5 * rows["contiguous"]["cost"]  # the two kinds are apart

    text = capsys.readouterr().out
    assert "trace.npz: 400 tokens, 3 layers of 8 experts, to 2 GPUs" in text
    assert "on 400 tokens (all); cost is hops" in text
    assert re.search(rf"solved .* {record['cost']:.4f} ", text)
    assert "written: p.json, c.json" in text
    assert "\x1b" not in text


def test_held_out_tokens(place, trace, tmp_path, capsys):
    """The solver does not see them, the comparison is on them alone, and the file's cost is on all tokens."""
    assert place("--objective", "hops", "--holdout", "0.25", "--seed", "3", "--json", "c.json") == 0
    record = json.loads((tmp_path / "c.json").read_text())
    gpu_LE = load_placement(tmp_path / "p.json").gpu_LE
    _, held_out = trace.split(0.25, seed=3)
    assert (record["solved_for_tokens"], record["compared_on_tokens"]) == (300, 100)
    assert record["cost"] == pytest.approx(hops(trace, gpu_LE))
    assert record["bound"] <= record["cost"]
    assert record["rows"][-1]["cost"] == pytest.approx(hops(held_out, gpu_LE))
    assert "on 100 tokens (held out)" in capsys.readouterr().out


def test_bounds_in_place_of_equal_shares(place, tmp_path):
    assert place("--gpus", "3", "--least", "1", "--most", "5", "--objective", "load") == 0
    experts_LG = load_placement(tmp_path / "p.json").experts_LG
    assert experts_LG.min() >= 1
    assert experts_LG.max() <= 5
    assert place("--gpus", "3", "--most", "3") == 0
    assert load_placement(tmp_path / "p.json").experts_LG.max() <= 3


def test_topology_and_sums(place, tmp_path, capsys):
    (tmp_path / "t.yaml").write_text(
        "nodes: 2\ngpus_per_node: 2\nnvlink: {bandwidth: 450 GB/s, latency: 2 us}\n"
        "network: {bandwidth: 50 GB/s, latency: 8 us}\n"
    )
    assert place("--gpus", "4", "--topology", "t.yaml", "--objective", "load+0.5*traffic", "--json", "c.json") == 0
    text = capsys.readouterr().out
    assert re.search(r"near +far", text)
    rows = json.loads((tmp_path / "c.json").read_text())["rows"]
    assert rows[-1]["cost"] <= rows[0]["cost"]
    assert all(row["score"]["rows_across"] > 0 for row in rows)


def test_calibration(place, tmp_path):
    (tmp_path / "fast.yaml").write_text("dense_seconds: 0\n")
    assert place("--json", "a.json") == 0
    assert place("--json", "b.json", "--calibration", "fast.yaml") == 0
    slow, fast = (json.loads((tmp_path / name).read_text())["rows"][0]["score"] for name in ("a.json", "b.json"))
    assert slow["step_seconds"] - fast["step_seconds"] == pytest.approx(LAYERS * 7.4e-3)


def test_reports(place, tmp_path):
    assert place("--report", "r.html") == 0
    page = (tmp_path / "r.html").read_text()
    pictures = re.findall(r'src="data:image/png;base64,([^"]+)"', page)
    assert [base64.b64decode(picture)[:8] for picture in pictures] == [b"\x89PNG\r\n\x1a\n"]
    assert not re.search(r"https?://|<script|<link", page)  # nothing from elsewhere
    assert [row.count("<td>") for row in re.findall(r"<tr[ >].*?</tr>", page)][-4:] == [8] * 4
    assert re.search(r'class="chosen"><td>solved</td>', page)
    assert place("--report", "r.png") == 0
    assert (tmp_path / "r.png").read_bytes()[:8] == b"\x89PNG\r\n\x1a\n"


def test_an_interrupt_keeps_the_best_so_far(place, trace, tmp_path, monkeypatch, capsys):
    shown = []

    def line(cost, bound, seconds, solver):
        shown.append(cost)
        if len(shown) == 3:
            raise KeyboardInterrupt
        return f"{solver} {cost}"

    monkeypatch.setattr(placement_commands, "_progress_line", line)
    assert place("--objective", "traffic") == 0
    assert len(shown) == 3
    record = json.loads((tmp_path / "p.json").read_text())
    assert record["cost"] == min(shown) < shown[0]
    assert "written: p.json" in capsys.readouterr().out


def test_an_interrupt_reaches_a_program_that_runs():
    """40 weights into 8 equal bins, as even as may be: minutes of branching."""
    weights = np.random.default_rng(0).random(40).tolist()
    program = pulp.LpProblem("bins", pulp.LpMinimize)
    most = program.add_variable("most", 0)
    program += most
    put = [[program.add_variable(f"x_{item}_{place}", cat="Binary") for place in range(8)] for item in range(40)]
    for of_item in put:
        program += pulp.lpSum(of_item) == 1
    for of_place in zip(*put, strict=True):
        program += pulp.lpSum(of_place) == 5
        program += pulp.lpSum(weight * x for weight, x in zip(weights, of_place, strict=True)) <= most
    before, began = signal.getsignal(signal.SIGINT), time.monotonic()
    press = threading.Timer(1, lambda: os.kill(os.getpid(), signal.SIGINT))
    press.start()
    try:
        with pytest.raises(KeyboardInterrupt):
            minimise(program, 60)
    finally:
        press.cancel()
    assert time.monotonic() - began < 30
    assert signal.getsignal(signal.SIGINT) is before


@pytest.mark.parametrize(
    ("options", "code", "message"),
    [
        (["--trace", "nowhere.npz"], 1, "nowhere.npz: No such file"),
        (["--experts", "6"], 1, "trace.npz: is of 8 experts, not 6"),
        (["--trace", "ids.npy", "--experts", "4"], 1, "ids.npy: expert id 7 is out of range, 0 to 3"),
        (["--trace", "few.npy", "--experts", "8"], 1, "few.npy: too few tokens"),
        (["--gpus", "3"], 1, "8 experts cannot be shared equally by 3 GPUs"),
        (
            ["--trace", "some.npy"],
            1,
            "some.npy: its largest expert id is 6, and 7 experts cannot be shared equally by 2",
        ),
        (["--holdout", "0.01", "--gpus", "8"], 1, "4 tokens for 8 GPUs: each must be the source of some"),
        (["--gpus", "0"], 2, "--gpus 0: expected a positive number"),
        (["--gpus", "two"], 2, "argument --gpus: invalid int value"),
        (["--least", "5"], 1, "at least 5 experts on each of 2 GPUs takes 10, but a layer has 8"),
        (["--most", "3"], 1, "at most 3 experts on each of 2 GPUs holds 6, but a layer has 8"),
        (["--least", "4", "--most", "2"], 1, "least may not exceed most"),
        (["--topology", "apart.yaml"], 1, "apart.yaml: not connected"),
        (["--topology", "four.yaml"], 1, "four.yaml: has 4 GPUs, not 2"),
        (["--topology", "detect"], 1, "no nvidia-smi on this machine"),
        (["--topology", "nowhere.yaml"], 1, "nowhere.yaml: cannot be read: No such file"),
        (["--objective", "speed"], 1, "objective 'speed'"),
        (["--solver", "magic"], 2, "argument --solver: invalid choice: 'magic'"),
        (["--time-limit", "0"], 2, "--time-limit 0: expected seconds, more than 0"),
        (["--time-limit", "nan"], 2, "--time-limit nan: expected seconds, more than 0"),
        (["--holdout", "1"], 2, "--holdout 1: expected a fraction between 0 and 1"),
        (["--holdout", "0.0001"], 1, "400 tokens cannot be split"),
        (["--calibration", "four.yaml"], 1, "four.yaml: no such key: nodes"),
        (["--report", "r.pdf"], 2, "--report r.pdf: expected a name that ends in .html or .png"),
        (["--out", "nowhere/p.json"], 1, "nowhere/p.json: there is no folder nowhere"),
        (["--out", "/proc/p.json"], 1, "/proc/p.json: cannot write to /proc"),
        (["--json", "/proc/p.json"], 1, "/proc/p.json: cannot write to /proc"),
        (["--out", "."], 1, ".: is a folder"),
        (["--json", "./p.json"], 2, "two of them name the same file"),
        (["--seed", "-1"], 2, "--seed -1: expected 0 or a positive number"),
        (["--least", "-1"], 2, "--least -1: expected 0 or a positive number"),
        (["--objective", "load+0*hops"], 1, "the weight in '0*hops' must be positive and finite"),
        (["--objective", "load+1e999*hops"], 1, "the weight in '1e999*hops' must be positive and finite"),
        (["--objective", "load+1..2*hops"], 1, "'1..2*hops' is none of load"),
        (["--objective", "load+hops", "--trace", "one.npy"], 1, "the trace has one layer"),
    ],
)
def test_bad_input_is_one_line(options, code, message, place, trace, tmp_path, capsys, monkeypatch):
    monkeypatch.setenv("PATH", "")
    np.save(tmp_path / "ids.npy", trace.expert_ids_SLK)
    np.save(tmp_path / "one.npy", trace.expert_ids_SLK[:, :1])
    np.save(tmp_path / "few.npy", trace.expert_ids_SLK[:3])
    np.save(tmp_path / "some.npy", trace.expert_ids_SLK[(trace.expert_ids_SLK < 7).all((1, 2))])
    (tmp_path / "four.yaml").write_text("nodes: 1\ngpus_per_node: 4\nnvlink: {bandwidth: 450 GB/s, latency: 2 us}\n")
    (tmp_path / "apart.yaml").write_text(
        "islands:\n"
        "  - {gpus: [0], bandwidth: 1 GB/s, latency: 1 us}\n"
        "  - {gpus: [1], bandwidth: 1 GB/s, latency: 1 us}\n"
    )
    assert place(*options) == code
    captured = capsys.readouterr()
    assert message in captured.err
    assert captured.err.startswith("moetrain: error: ")
    assert captured.err.count("\n") == 1
    assert "searching" not in captured.out
    assert not (tmp_path / "p.json").exists()


def test_a_deadline_that_is_too_short_for_anything(place, tmp_path, capsys):
    """Then what needs no time is the answer, with its gap."""
    assert place("--objective", "traffic", "--time-limit", "1e-9") == 0
    record = json.loads((tmp_path / "p.json").read_text())
    assert 0 < record["bound"] < record["cost"]
    assert re.search(r"none below .* \(gap .* %\)", capsys.readouterr().out)


def test_help_needs_no_solver():
    program = (
        "import sys\nfrom moetrain.cli import main\n"
        "try: main(['--help'])\nexcept SystemExit: pass\n"
        "sys.exit(any(name in sys.modules for name in ('torch', 'scipy', 'matplotlib')))"
    )
    done = subprocess.run([sys.executable, "-c", program], capture_output=True, text=True, timeout=60)
    assert done.returncode == 0
    assert re.search(r"place +find which GPU", done.stdout)


def test_bench(place, tmp_path, capsys):
    options = ["--synthetic", "zipf", "--shape", "800,2,8,2", "--gpus", "2", "--objectives", "load"]
    assert (
        main(
            ["bench", "placement", *options, "--traces", "trace.npz", "--solvers", "random", "auto", "--json", "b.json"]
        )
        == 0
    )
    contents = json.loads((tmp_path / "b.json").read_text())
    rows = contents["rows"]
    names = ["contiguous", "random", "greedy", "random", "auto"]
    assert [(row["trace"], row["solver"]) for row in rows] == [
        *(("trace.npz", name) for name in names),
        *(("zipf, seed 0", name) for name in names),
    ]
    assert [row["gap"] is None for row in rows] == [True, True, True, False, False] * 2  # also where names are alike
    for solved, contiguous in ((rows[4], rows[0]), (rows[9], rows[5])):
        assert solved["fitted_cost"] <= contiguous["fitted_cost"]
        assert 0 <= solved["gap"] < 1
    # Held out are 160 of 800 tokens with 2 of 8 experts: a GPU has a whole expert's tokens more or less.
    assert rows[9]["held_out_cost"] == pytest.approx(rows[9]["fitted_cost"], rel=0.2)
    assert rows[9]["held_out_cost"] != rows[9]["fitted_cost"]
    assert (
        "zipf, seed 0: 800 tokens, 2 layers, 8 experts, 2 a token, 2 GPUs; solved for load" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ([], "--traces, --synthetic: give at least one"),
        (["--traces", "trace.npz", "--synthetic", "flat"], "--synthetic flat: is none of zipf, lognormal, topics"),
        (["--synthetic", "zipf", "--shape", "8,2,4,5"], "--shape 8,2,4,5: expected S,L,E,K"),
        (["--synthetic", "zipf", "--shape", "8,2"], "--shape 8,2: expected S,L,E,K"),
    ],
)
def test_benches_of_nothing(options, message, place, capsys):
    assert main(["bench", "placement", *options]) == 2
    captured = capsys.readouterr()
    assert message in captured.err
    assert "solved for" not in captured.out


@pytest.mark.parametrize("family", ["zipf", "lognormal", "topics"])
def test_synthetic_traces(family):
    trace = synthetic(family, "3000,2,16,3", seed=1)
    again, other = (synthetic(family, "3000,2,16,3", seed=seed) for seed in (1, 2))
    np.testing.assert_array_equal(trace.expert_ids_SLK, again.expert_ids_SLK)
    assert not np.array_equal(trace.expert_ids_SLK, other.expert_ids_SLK)
    sorted_SLK = np.sort(trace.expert_ids_SLK, axis=-1)
    assert (np.diff(sorted_SLK, axis=-1) > 0).all()  # different ones
    assert imbalance_L(load_LE(trace)).min() > 1.5
    # Only topics tie the experts of neighbouring layers to one another.
    joint_EE = transitions_LEE(trace)[0]
    apart = np.abs(joint_EE - joint_EE.sum(1, keepdims=True) * joint_EE.sum(0)).sum() / 2
    assert (apart > 0.1) == (family == "topics")
