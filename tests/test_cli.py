"""The command line: help, dispatch, and where the work is sent."""

import errno
import json
import subprocess
import sys
import types

import pytest

import moetrain
from moetrain.cli import main
from moetrain.config import load_config, packaged_configs
from moetrain.errors import CheckpointError, DataError

LAUNCHER_VARIABLES = (
    "RANK",
    "WORLD_SIZE",
    "LOCAL_RANK",
    "MASTER_ADDR",
    "TORCHELASTIC_ERROR_FILE",
    "TORCHELASTIC_MAX_RESTARTS",
)


@pytest.fixture(autouse=True)
def _no_launcher(monkeypatch):
    for variable in LAUNCHER_VARIABLES:
        monkeypatch.delenv(variable, raising=False)


@pytest.fixture
def calls(monkeypatch):
    """Stand-ins for everything that the commands hand their work to; the calls they get."""
    calls = []

    def stand_in(module, name, returns=0):
        def function(*arguments):
            calls.append((name, *arguments))
            return returns

        monkeypatch.setitem(sys.modules, module, types.SimpleNamespace(**{name: function}))

    stand_in("moetrain.trainer", "train")
    stand_in("moetrain.evaluate", "evaluate_command")
    stand_in("moetrain.plan", "plan_command")
    for launcher in ("torchrun", "deepspeed"):
        monkeypatch.setattr(
            f"moetrain.launch.{launcher}.run",
            lambda *a, who=launcher, **options: calls.append((who, *a, *_given(options))) or 0,
        )
    return calls


def _given(options):
    """[options] without those that say: this machine, once."""
    options = {
        name: value for name, value in options.items() if value not in (None, 0, ()) and (name, value) != ("nodes", 1)
    }
    return [options] if options else []


def fail_with(monkeypatch, error):
    def train(config):
        raise error

    monkeypatch.setitem(sys.modules, "moetrain.trainer", types.SimpleNamespace(train=train))


@pytest.mark.parametrize(
    ("command", "words"),
    [
        ([], ["train", "evaluate", "data", "checkpoint", "config", "plan", "examples:"]),
        (["train"], ["CONFIG", "key=value", "--nproc", "--launcher", "default", "examples:"]),
        (["evaluate"], ["RUN_OR_CHECKPOINT", "--json", "--nproc", "examples:"]),
        (["data"], ["build", "info", "examples:"]),
        (["data", "build"], ["--out", "--tokenizer", "default", "examples:"]),
        (["data", "info"], ["--verify", "examples:"]),
        (["checkpoint"], ["info", "verify", "convert", "examples:"]),
        (["checkpoint", "info"], ["PATH", "examples:"]),
        (["checkpoint", "verify"], ["PATH", "exit code 1", "examples:"]),
        (["checkpoint", "convert"], ["--out", "--weights-only", "--dtype", "examples:"]),
        (["hf"], ["import", "export", "upcycle", "examples:"]),
        (["hf", "import"], ["DIR_OR_REPO", "qwen3_moe", "--out", "examples:"]),
        (["hf", "export"], ["RUN_OR_CKPT", "--dtype", "--lossy", "--tokenizer", "--nproc", "examples:"]),
        (["hf", "upcycle"], ["--experts", "--granularity", "--noise", "default", "examples:"]),
        (["generate"], ["RUN_OR_CHECKPOINT", "--prompt", "--scheme", "--temperature", "default", "examples:"]),
        (["config"], ["CONFIG", "list", "examples:"]),
        (["plan"], ["--world-size", "default", "examples:"]),
    ],
)
def test_help(command, words, capsys):
    with pytest.raises(SystemExit) as stop:
        main([*command, "--help"])
    assert stop.value.code == 0
    text = capsys.readouterr().out
    assert [word for word in words if word not in text] == []


def test_version(capsys):
    with pytest.raises(SystemExit):
        main(["--version"])
    assert capsys.readouterr().out == f"moetrain {moetrain.__version__}\n"


@pytest.mark.parametrize("arguments", [["--help"], ["train", "--help"], ["config", "tiny"], ["config"]])
def test_quick_commands_do_without_torch(arguments):
    program = (
        "import sys\nfrom moetrain.cli import main\n"
        f"try: main({arguments!r})\nexcept SystemExit: pass\n"
        "sys.exit('torch' in sys.modules)"
    )
    assert subprocess.run([sys.executable, "-c", program], stdout=subprocess.DEVNULL, timeout=60).returncode == 0


def test_config_prints_what_it_reads(capsys, tmp_path):
    assert main(["config", "tiny", "train.steps=7"]) == 0
    file = tmp_path / "tiny.yaml"
    file.write_text(capsys.readouterr().out)
    assert load_config(str(file)) == load_config("tiny", ["train.steps=7"])


def test_config_lists_the_packaged_ones(capsys):
    assert main(["config"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert [line.split()[0] for line in lines] == list(packaged_configs())
    assert all(len(line.split()) > 5 for line in lines)


def test_train_in_this_process(calls):
    assert main(["train", "tiny", "train.steps=7"]) == 0
    assert calls == [("train", load_config("tiny", ["train.steps=7"]))]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (["--nproc", "1"], ("train",)),
        (["--launcher", "none"], ("train",)),
        (["--nproc", "2"], ("torchrun", 2)),
        (["--nproc", "1", "--launcher", "torchrun"], ("torchrun", 1)),
        (["--nproc", "4", "--launcher", "deepspeed"], ("deepspeed", 4)),
        (["--nproc", "auto"], ("torchrun", 2)),
        (["--launcher", "deepspeed"], ("deepspeed", 2)),
    ],
)
def test_train_is_sent_to_the_launcher(options, expected, calls, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    monkeypatch.setattr("moetrain.launch.torchrun.usable_cores", lambda: 16)
    # Overrides may stand on both sides of the options.
    assert main(["train", "tiny", "train.steps=7", *options, "optim.lr=0.5"]) == 0
    if expected[0] == "train":
        assert calls == [("train", load_config("tiny", ["train.steps=7", "optim.lr=0.5"]))]
    else:
        launcher, nproc = expected
        assert calls == [(launcher, ["train", "tiny", "train.steps=7", "optim.lr=0.5"], nproc)]


def test_nproc_auto_is_one_process_a_gpu(calls, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    assert main(["train", "tiny", "--nproc", "auto"]) == 0
    monkeypatch.setattr("moetrain.launch.torchrun.usable_cores", lambda: 1)
    assert main(["train", "tiny", "--nproc", "auto", "run.device=cpu"]) == 0
    assert [call[0] for call in calls] == ["torchrun", "train"]
    assert calls[0][-1] == 4


@pytest.mark.parametrize(
    ("command", "expected"),
    [
        (
            ["hf", "export", "runs/x", "--out", "a b", "--dtype", "bf16", "--lossy", "--nproc", "3"],
            ["hf", "export", "runs/x", "--out=a b", "--dtype=bf16", "--lossy"],
        ),
        (
            [
                "generate",
                "runs/x",
                "--prompt",
                "-1 and",
                "--prompt",
                "b",
                "--top-k",
                "3",
                "--nproc",
                "3",
                "data.path=y",
            ],
            [
                *("generate", "runs/x", "data.path=y", "--max-tokens=128", "--temperature=1.0", "--top-k=3"),
                *("--top-p=1.0", "--seed=0", "--scheme=ordinary", "--prompt=-1 and", "--prompt=b"),
            ],
        ),
    ],
)
def test_other_commands_are_sent_to_the_launcher_too(command, expected, calls, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 0)
    assert main(command) == 0
    assert calls == [("torchrun", expected, 3)]


@pytest.mark.parametrize(
    ("options", "expected"),
    [
        (
            ["--nnodes", "2", "--rdzv-endpoint", "node1:29500"],
            ("torchrun", 4, {"nodes": 2, "endpoint": "node1:29500", "run_id": "moetrain"}),
        ),
        (
            ["--nnodes", "2", "--rdzv-endpoint", "[::1]:1", "--rdzv-id", "a", "--nproc", "1", "--max-restarts", "3"],
            ("torchrun", 1, {"nodes": 2, "endpoint": "[::1]:1", "run_id": "a", "max_restarts": 3}),
        ),
        (["--max-restarts", "1", "--nproc", "1"], ("torchrun", 1, {"max_restarts": 1})),
        (["--hostfile", "HOSTS"], ("deepspeed", 8, {"hosts": (("node1", 8), ("node2", 4))})),
        (["--hostfile", "HOSTS", "--nproc", "2"], ("deepspeed", 2, {"hosts": (("node1", 2), ("node2", 2))})),
    ],
)
def test_several_nodes_and_restarts(options, expected, calls, monkeypatch, tmp_path):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    (tmp_path / "hosts").write_text("# two\nnode1 slots=8\n\nnode2   slots=4 # half a machine\n")
    options = [str(tmp_path / "hosts") if option == "HOSTS" else option for option in options]
    launcher, nproc, given = expected
    assert main(["train", "tiny", "train.tokens_per_step=24576", "train.micro_batch=4", *options]) == 0
    assert calls == [(launcher, ["train", "tiny", "train.tokens_per_step=24576", "train.micro_batch=4"], nproc, given)]


def test_the_world_of_all_nodes_is_checked(calls, capsys, tmp_path):
    (tmp_path / "hosts").write_text("a slots=1\nb slots=2\n")
    for options in (
        ["--nnodes", "3", "--nproc", "1", "--rdzv-endpoint", "a:1"],
        ["--hostfile", str(tmp_path / "hosts")],
    ):
        assert main(["train", "tiny", "parallel.ep=2", *options]) == 2
        assert "world size of 3" in capsys.readouterr().err
    assert calls == []


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--nnodes", "2"], "--nnodes, --rdzv-endpoint: several nodes need both"),
        (["--rdzv-endpoint", "a:1"], "--nnodes, --rdzv-endpoint: several nodes need both"),
        (["--nnodes", "2", "--rdzv-endpoint", "a"], "--rdzv-endpoint a: expected HOST:PORT"),
        (["--nnodes", "2", "--rdzv-endpoint", "a:70000"], "--rdzv-endpoint a:70000: expected HOST:PORT"),
        (["--nnodes", "0"], "expected a positive number"),
        (["--rdzv-id", "x"], "--rdzv-id: only several nodes"),
        (["--nnodes", "2", "--rdzv-endpoint", "a:1", "--launcher", "deepspeed"], "--nnodes: needs --launcher torchrun"),
        (["--max-restarts", "1", "--launcher", "none"], "--max-restarts: needs --launcher torchrun, got none"),
        (["--hostfile", "F", "--max-restarts", "1"], "--max-restarts: needs --launcher torchrun, got deepspeed"),
        (["--hostfile", "F", "--launcher", "torchrun"], "--hostfile: needs --launcher deepspeed"),
        (["--hostfile", "nowhere"], "--hostfile nowhere: No such file"),
        (["--hostfile", "F"], "F, line 2: 'b': expected 'HOST slots=N'"),
        (
            ["--max-restarts", "1", "checkpoint.resume=never"],
            "checkpoint.resume = never with --max-restarts 1: a restart",
        ),
        (
            ["--max-restarts", "1", "checkpoint.resume=runs/x"],
            "= runs/x with --max-restarts 1: every restart would beg",
        ),
    ],
)
def test_launches_that_contradict_themselves(options, message, calls, capsys, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "F").write_text("a slots=2\nb\n")
    assert main(["train", "tiny", *options]) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1
    assert calls == []


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest's stderr is no file
def test_a_launcher_that_restarts_is_held_to_the_same_rule(calls, monkeypatch, capsys):
    for name, value in {"RANK": "0", "WORLD_SIZE": "2", "TORCHELASTIC_MAX_RESTARTS": "3"}.items():
        monkeypatch.setenv(name, value)
    assert main(["train", "tiny", "checkpoint.resume=never"]) == 2
    assert "checkpoint.resume = never with --max-restarts 3" in capsys.readouterr().err
    assert main(["train", "tiny"]) == 0


@pytest.mark.parametrize(
    ("gpus", "arguments", "names"),
    [(2, ["--nproc", "4"], "--nproc 4"), (0, ["--nproc", "2", "run.device=cuda"], "run.device = cuda")],
)
def test_missing_gpus_are_found_before_the_start(gpus, arguments, names, calls, monkeypatch, capsys):
    monkeypatch.setattr("torch.cuda.device_count", lambda: gpus)
    assert main(["train", "tiny", *arguments]) == 2
    assert calls == []
    error = capsys.readouterr().err
    assert names in error
    assert error.count("\n") == 1


def test_evaluate(calls):
    assert main(["evaluate", "runs/x", "eval.tokens=512", "--json", "score.json"]) == 0
    assert main(["evaluate", "runs/x", "--nproc", "2", "eval.tokens=512", "--json", "score.json"]) == 0
    assert calls == [
        ("evaluate_command", "runs/x", ["eval.tokens=512"], "score.json"),
        ("torchrun", ["evaluate", "runs/x", "eval.tokens=512", "--json", "score.json"], 2),
    ]


def test_plan(calls):
    assert main(["plan", "tiny", "--world-size", "4", "parallel.ep=4"]) == 0
    assert calls == [("plan_command", load_config("tiny", ["parallel.ep=4"]), 4)]


def test_data_build_and_info(tmp_path, capsys):
    text = tmp_path / "text"
    text.mkdir()
    for number in range(40):
        (text / f"{number}.txt").write_text(f"document {number}\n" * 50)
    assert main(["data", "build", str(text), "--out", str(tmp_path / "shards")]) == 0
    assert main(["data", "info", str(tmp_path / "shards"), "--verify"]) == 0
    capsys.readouterr()
    assert main(["data", "info", str(tmp_path / "nothing")]) == 1
    error = capsys.readouterr().err
    assert error.startswith("moetrain: error: ")
    assert error.count("\n") == 1


def test_under_a_launcher_it_joins(calls, monkeypatch):
    monkeypatch.setenv("RANK", "1")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "tiny"]) == 0
    assert [call[0] for call in calls] == ["train"]


def test_under_a_launcher_the_world_is_checked(calls, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "3")
    assert main(["train", "tiny", "parallel.ep=2"]) == 2
    assert calls == []
    assert "world size of 3" in capsys.readouterr().err


def test_under_a_launcher_no_second_one_starts(calls, monkeypatch, capsys):
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    assert main(["train", "tiny", "--nproc", "2"]) == 2
    assert calls == []
    assert "--nproc" in capsys.readouterr().err


@pytest.mark.parametrize("error", [DataError("shard 3 is short"), CheckpointError("shard 3\nis short")])
def test_user_errors_are_one_line(error, monkeypatch, capsys):
    fail_with(monkeypatch, error)
    assert main(["train", "tiny"]) == 1
    assert capsys.readouterr().err == "moetrain: error: shard 3 is short\n"


@pytest.mark.filterwarnings("ignore:Unable to enable fault handler")  # pytest's stderr is no file
@pytest.mark.parametrize(
    ("rank", "agreed", "printed"),
    [
        ("0", True, "moetrain: error: shard 3 is short\n"),
        ("1", True, ""),
        ("1", False, "moetrain: error: rank 1: shard 3 is short\n"),
    ],
)
def test_an_error_of_all_ranks_is_printed_once_and_recorded_by_each(
    rank, agreed, printed, monkeypatch, capsys, tmp_path
):
    monkeypatch.setenv("RANK", rank)
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", str(tmp_path / "error.json"))
    error = DataError("shard 3 is short")
    error.agreed = agreed
    fail_with(monkeypatch, error)
    assert main(["train", "tiny"]) == 1
    assert capsys.readouterr().err == printed
    recorded = json.loads((tmp_path / "error.json").read_text())
    assert recorded["message"]["message"] == "DataError: shard 3 is short"


@pytest.mark.parametrize("error", [ZeroDivisionError(), OSError(errno.EIO, "Input/output error")])
def test_bugs_keep_their_traceback_and_tell_the_launcher(error, monkeypatch, tmp_path):
    for name, value in {"RANK": "1", "WORLD_SIZE": "2", "TORCHELASTIC_ERROR_FILE": tmp_path / "error.json"}.items():
        monkeypatch.setenv(name, str(value))
    fail_with(monkeypatch, error)
    with pytest.raises(type(error)):
        main(["train", "tiny"])
    assert type(error).__name__ in (tmp_path / "error.json").read_text()


def test_a_full_disk_is_one_line(monkeypatch, capsys):
    fail_with(monkeypatch, OSError(errno.ENOSPC, "No space left on device", "runs/tiny/metrics.jsonl"))
    assert main(["train", "tiny"]) == 1
    assert capsys.readouterr().err == "moetrain: error: runs/tiny/metrics.jsonl: No space left on device\n"


def test_interrupt(monkeypatch):
    fail_with(monkeypatch, KeyboardInterrupt())
    assert main(["train", "tiny"]) == 130
