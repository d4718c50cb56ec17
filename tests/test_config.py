"""Configs: what is read, what is refused (one line, exit code 2, nothing left behind), and the packaged ones."""

import os
import re
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import psutil
import pytest
import yaml

from moetrain.cli import main
from moetrain.config import Config, check, check_world, from_dict, load_config, packaged_configs, to_yaml
from moetrain.errors import ConfigError

BAD_OVERRIDES = [
    # (arguments after the config's name, what the error line must name)
    (["train.stepz=1"], "train.stepz"),
    (["trane.steps=1"], "trane"),
    (["a.b.c.d=1"], "a"),
    (["run..dir=x"], "run..dir=x"),
    (["train.steps=abc"], "train.steps"),
    (["train.steps=1.5"], "train.steps"),
    (["train.steps=null"], "train.steps"),
    (["train.steps="], "train.steps"),
    (["train.steps=[1]"], "train.steps"),
    (["train.steps=true"], "train.steps"),
    (["train.steps=???"], "train.steps"),
    (["train.steps=["], "train.steps"),
    (["train.steps.x=1"], "train.steps"),
    (["train.steps=${train.nothing}"], "train.nothing"),
    (["=3"], "=3"),
    (["train.steps"], "train.steps"),
    (["train=5"], "train"),
    (["model=null"], "model"),
    (["optim.betas=[0.9]"], "optim.betas"),
    (["optim.betas=[a,b]"], "optim.betas"),
    (["optim.betas=[1.0,0.9]"], r"optim.betas[0]"),
    (["optim.no_decay=norm"], "optim.no_decay"),
    (["optim.lr=0"], "optim.lr"),
    (["optim.lr=.nan"], "optim.lr"),
    (["optim.lr=.inf"], "optim.lr"),
    (["optim.weight_decay=-1"], "optim.weight_decay"),
    (["optim.schedule=wsd", "optim.decay_steps=1000"], "optim.decay_steps"),
    (["optim.decay_steps=10"], "optim.decay_steps"),
    (["run.device=tpu"], "run.device"),
    (["run.dir=''"], "run.dir"),
    (["router.score=SOFTMAX"], "router.score"),
    (["router.top_k=9"], "router.top_k"),
    (["router.groups=3"], "router.groups"),
    (["router.groups=4", "router.top_groups=5"], "router.top_groups"),
    (["router.groups=8", "router.top_groups=1"], "router.top_k"),
    (["router.capacity_factor=0"], "router.capacity_factor"),
    (["router.jitter=1"], "router.jitter"),
    (["router.score=softmax_after_topk", "router.bias_update_rate=0.001"], "router.bias_update_rate"),
    (["model.n_heads=5"], "model.n_heads"),
    (["parallel.engine=fsdp"], "parallel.engine"),
    (["parallel.deepspeed.zero_optimization.overlap_comm=true"], "needs parallel.engine = deepspeed"),
    *(
        (["parallel.engine=deepspeed", *overrides], named)
        for overrides, named in (
            (["parallel.fsdp=true"], "parallel.fsdp = True: needs parallel.engine = torch"),
            (["parallel.zero_stage=0"], "parallel.zero_stage = 0: DeepSpeed without ZeRO takes wrong gradient norms"),
            (["parallel.zero_stage=3"], "parallel.zero_stage = 3: DeepSpeed refuses stage 3 with experts"),
            (["parallel.tp=2"], "parallel.tp = 2: with parallel.engine = deepspeed must be 1"),
            (["parallel.zero_stage=4"], "parallel.zero_stage = 4: must be 1 or 2"),
            (["parallel.zero_stage=1", "train.dtype=bfloat16"], "parallel.zero_stage = 1: DeepSpeed's stage 1 in"),
            (["train.param_dtype=bfloat16"], "train.param_dtype = bfloat16: DeepSpeed keeps weights"),
            (["train.param_dtype=float64"], "train.param_dtype = float64"),
            (["parallel.deepspeed.gradient_clipping=1"], "gradient_clipping = 1: follows from optim.clip_norm"),
            (["parallel.deepspeed.zero_optimization.stage=2"], "zero_optimization.stage = 2: follows from parallel.z"),
            (["parallel.deepspeed.zero_optimization=2"], "zero_optimization = 2: must be a section of keys"),
            (["parallel.deepspeed.bf16.enabled=true"], "parallel.deepspeed.bf16 = {'enabled': True}: follows from"),
        )
    ),
    *(
        (["parallel.overlap=on", "parallel.ep=2", *overrides], f"parallel.overlap = on: {named}")
        for overrides, named in (
            (["parallel.fsdp=true"], "not with this parallel.fsdp: FSDP would gather"),
            (["parallel.engine=deepspeed"], "not with this parallel.engine: DeepSpeed collects"),
            (
                ["train.activation_checkpointing.mode=full"],
                "not with this train.activation_checkpointing.mode: a layer",
            ),
            (
                ["--nproc", "2", "train.micro_batch=1"],
                "each tp rank needs two or more whole sequences of a micro-batch",
            ),
        )
    ),
    (
        ["parallel.overlap=true", "parallel.tp=2", "--nproc", "2", "train.micro_batch=2"],
        "parallel.overlap = on: each tp rank needs two or more whole sequences of a micro-batch: with parallel.tp = 2 "
        "train.micro_batch can be 4, 6, …, not 2",
    ),
    (
        ["parallel.overlap=on", "parallel.ep=2", "--nproc", "2", "train.micro_batch=2", "parallel.overlap_split=2"],
        "parallel.overlap_split = 2 leaves nothing of each tp rank's 2 sequences",
    ),
    (["metrics.communication_every=10", "train.profile.steps=2"], "metrics.communication_every = 10: records steps as"),
    (["parallel.overlap_split=0"], "parallel.overlap_split = 0: must be positive"),
    (["parallel.overlap=maybe"], "parallel.overlap: Invalid value 'maybe', expected one of ['off', 'auto', 'on']"),
    (["model.n_kv_heads=3"], "model.n_kv_heads"),
    (["model.head_dim=31"], "model.head_dim"),
    (["model.num_experts=-8"], "model.num_experts"),
    (["model.first_dense_layers=4"], "model.num_experts"),
    (["model.dense_layers=[0,1,2,3]"], "model.num_experts"),
    (["model.dense_layers=[4]"], "model.dense_layers = 4: is no layer: they are 0 to 3"),
    (["model.rope_scaling.factor=0"], "model.rope_scaling.factor"),
    (["model.rope_scaling.low_freq_factor=4"], "model.rope_scaling.low_freq_factor = 4.0: must be smaller than"),
    (["model.num_experts=0", "parallel.ep=2"], "parallel.ep"),
    (["model.shared_gate=true"], "model.shared_gate"),
    (["model.shared_gate=perhaps"], "model.shared_gate"),
    (["parallel.ep=3"], "parallel.ep"),
    (["parallel.dp=0"], "parallel.dp"),
    (["data.seq_len=-1"], "data.seq_len"),
    (["train.tokens_per_step=8193"], "train.tokens_per_step"),
    (["train.steps=0"], "train.steps"),
    (["train.seed=99999999999999999999"], "train.seed"),
    (["eval.tokens=10"], "eval.tokens"),
    (["checkpoint.every=-1"], "checkpoint.every"),
    (["kernels.experts=cuda"], "kernels.experts"),
    (["run.timeout_minutes=.inf"], "run.timeout_minutes"),
    # Rules about the number of processes
    (["--nproc", "2", "parallel.dp=4"], "parallel.dp"),
    (["--nproc", "3", "parallel.ep=2"], "parallel.ep"),
    (["--nproc", "3"], "train.tokens_per_step"),
    # The command line itself
    (["--nproc", "0"], "--nproc"),
    (["--nproc", "2", "--launcher", "none"], "--launcher none"),
    (["--launcher", "mpi"], "--launcher"),
    (["--steps", "5"], "--steps"),
]

BAD_FILES = [
    (b"- a\n- b", "list"),
    (b"just text", "str"),
    (b"train: [1", ":1"),
    (b"train:\n\tsteps: 1", ":2"),
    (b"\xff\xfe\x00", "UTF-8"),
    (b"a: \x00", "bad.yaml: not valid YAML: unacceptable character #x0000"),
    (b"a: 1\n---\nb: 2", ":2"),
    (b"!!python/object/apply:os.system ['echo']", "constructor"),
    (b"train:\n  steps: 1\n  steps: 2", "'steps'"),
    (b"train: {steps: 1}\ntrain: {seed: 2}", "'train'"),
    (b"train:", "train"),
    (b"train: 5", "train"),
    (b"5: 3", "5"),
    (b"train: {null: 1}", "train"),
    (b"train: {steps: 2024-01-01}", "train.steps"),
    (b"train: {steps: {a: 1}}", "train.steps"),
    (b"optim: {betas: [0.9, 0.9, 0.9]}", "optim.betas"),
    (b"a: &x [*x]", "itself"),
    (b"run: {dir: '${oc.env:NO_SUCH_VARIABLE}'}", "run.dir"),
    (b"model: {dim: 7}", "model.n_heads"),
]


@pytest.fixture
def no_traces(tmp_path, monkeypatch):
    """An empty working directory and home, and this process's children before and after."""
    folder = tmp_path / "work"
    folder.mkdir()
    monkeypatch.chdir(folder)
    monkeypatch.setenv("HOME", str(folder))
    before = psutil.Process().children()
    yield folder
    assert sorted(os.listdir(folder)) in ([], ["bad.yaml"])
    assert psutil.Process().children() == before


def assert_one_line(text: str, names: str) -> None:
    assert text.count("\n") == 1, text
    assert text.endswith("\n")
    assert text.startswith("moetrain: error: ")
    assert names in text


@pytest.mark.parametrize(("arguments", "names"), BAD_OVERRIDES, ids=[" ".join(a) for a, _ in BAD_OVERRIDES])
def test_bad_overrides(arguments, names, no_traces, capsys):
    assert main(["train", "tiny", *arguments]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, names)


@pytest.mark.parametrize(("content", "names"), BAD_FILES, ids=[repr(c)[2:-1] for c, _ in BAD_FILES])
def test_bad_files(content, names, no_traces, capsys):
    Path("bad.yaml").write_bytes(content)
    assert main(["train", "bad.yaml"]) == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert_one_line(captured.err, names)


@pytest.mark.parametrize("name", ["no-such-config", "", ".", "missing.yaml"])
def test_config_that_is_no_file(name, no_traces, capsys):
    assert main(["train", name]) == 2
    assert_one_line(capsys.readouterr().err, repr(name))


@pytest.mark.parametrize(
    ("arguments", "names"),
    [
        (
            ["train", "tiny", "router.top_k=9", "--nproc", "2"],
            "router.top_k = 9: must be at most model.num_experts = 8",
        ),
        (["config", "tiny", "nothing=1"], "nothing"),
        (["train"], "CONFIG"),
    ],
)
def test_bad_command_as_a_process(arguments, names, no_traces):
    result = subprocess.run([sys.executable, "-m", "moetrain", *arguments], capture_output=True, text=True, timeout=60)
    assert result.returncode == 2
    assert result.stdout == ""
    assert_one_line(result.stderr, names)


def test_a_bad_config_is_refused_before_torch_is_imported(no_traces):
    program = (
        "import sys; from moetrain.cli import main; code = main(['train', 'tiny', 'parallel.ep=3', '--nproc', '2']);"
        "sys.exit(0 if code == 2 and 'torch' not in sys.modules else 1)"
    )
    assert subprocess.run([sys.executable, "-c", program], stderr=subprocess.DEVNULL, timeout=60).returncode == 0


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_are_valid_and_say_what_they_are(name):
    config = load_config(name)
    check_world(config, 1)
    assert config.run.dir == f"runs/{name}"
    first = packaged_configs()[name].read_text(encoding="utf-8").splitlines()[0]
    assert first.startswith("# ")
    assert len(first) > 30


@pytest.mark.parametrize("name", packaged_configs())
def test_packaged_configs_hold_only_what_differs_from_the_defaults(name):
    defaults = yaml.safe_load(to_yaml(Config()))

    def leaves(tree, path=()):
        for key, value in tree.items():
            yield from leaves(value, (*path, key)) if isinstance(value, dict) else [((*path, key), value)]

    given = dict(leaves(yaml.safe_load(packaged_configs()[name].read_text(encoding="utf-8"))))
    known = dict(leaves(defaults))
    # The shape of a model is better spelled out than left to the defaults.
    assert [path for path, value in given.items() if known[path] == value and path[0] != "model"] == []


def parameters(config: Config) -> tuple[int, int]:
    """(total, active) of a model whose layers are all MoE layers, from the shapes of its weights."""
    model = config.model
    d = model.dim
    queries, keys = model.n_heads * model.head_width, model.kv_heads * model.head_width
    qk_norms = {"none": 0, "head": 2 * model.head_width, "full": queries + keys}[model.qk_norm]
    attention = d * queries + 2 * d * keys + queries * d + qk_norms
    layer = attention + 2 * d + model.num_experts * d
    expert = 3 * d * model.expert_dim
    outside = model.vocab_size * d * (1 if model.tie_embeddings else 2) + d
    assert all(model.is_moe_layer(index) for index in range(model.n_layers))
    assert not model.shared_dim
    return (
        outside + model.n_layers * (layer + model.num_experts * expert),
        outside + model.n_layers * (layer + config.router.top_k * expert),
    )


@pytest.mark.parametrize(
    ("name", "total"),
    [
        # The sizes of the published checkpoints.
        ("olmoe-1b-7b", 6_919_161_856),
        ("qwen3-30b-a3b", 30_532_122_624),
    ],
)
def test_published_sizes(name, total):
    assert parameters(load_config(name))[0] == total


@pytest.mark.parametrize("name", sorted(set(packaged_configs()) - {"tiny"}))
def test_sizes_in_the_comments(name):
    total, active = parameters(load_config(name))
    comment = packaged_configs()[name].read_text(encoding="utf-8").replace("\n# ", " ")
    assert re.search(r"([\d,]+) parameters, ([\d,]+) active", comment).groups() == (f"{total:,}", f"{active:,}")


def test_small_fits_a_24_gb_gpu():
    total, _ = parameters(load_config("small"))
    assert 300e6 < total < 400e6
    assert 16 * total < 8e9  # float32 weights, gradients and two moments leave two thirds to activations


def test_sonicmoe_layer():
    config = load_config("moe-7b-fine")
    model = config.model
    assert (model.dim, model.expert_dim, model.num_experts, config.router.top_k) == (1536, 256, 128, 8)
    assert 6.5e9 < parameters(config)[0] < 7.5e9


@pytest.mark.parametrize("name", packaged_configs())
def test_yaml_round_trip(name, tmp_path):
    config = load_config(name)
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config
    assert to_yaml(load_config(str(file))) == to_yaml(config)


def test_round_trip_of_odd_values(tmp_path):
    overrides = [
        "run.dir='a: b # c'",
        "optim.lr=1e-05",
        "optim.betas=[0.5,0]",
        "optim.no_decay=[]",
        "router.capacity_factor=1.25",
        "metrics.wandb_project='123'",
        "model.n_kv_heads=null",
    ]
    config = load_config("tiny", overrides)
    assert config.run.dir == "a: b # c"
    assert config.optim.lr == 1e-5
    assert config.optim.betas == (0.5, 0.0)
    assert config.metrics.wandb_project == "123"
    file = tmp_path / "resolved.yaml"
    file.write_text(to_yaml(config), encoding="utf-8")
    assert load_config(str(file)) == config


def test_empty_file_is_all_defaults(tmp_path):
    file = tmp_path / "mine.yaml"
    file.write_text("# nothing yet\n")
    config = load_config(str(file))
    assert config == replace(Config(), run=replace(Config().run, dir="runs/mine"))


def test_overrides_apply_in_order_and_win_over_the_file():
    config = load_config("tiny", ["train.steps=5", "train.steps=7", "train.profile.steps=2"])
    assert (config.train.steps, config.train.profile.steps) == (7, 2)


def test_defaults_pass_their_own_check():
    check(Config())


def test_world_rules():
    config = load_config("tiny", ["parallel.ep=2", "parallel.dp=2"])
    check_world(config, 2)
    with pytest.raises(ConfigError, match=r"parallel\.dp = 2"):
        check_world(config, 4)
    with pytest.raises(ConfigError, match=r"parallel\.ep = 2: must divide the world size of 1"):
        check_world(load_config("tiny", ["parallel.ep=2"]), 1)


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (
            ["model.n_kv_heads=2", "parallel.tp=4"],
            "parallel.tp = 4: must divide model.n_kv_heads = 2; here it can be 1, 2",
        ),
        (["parallel.tp=3"], "parallel.tp = 3: must divide model.n_heads = 4; here it can be 1, 2, 4"),
        (["model.ffn_dim=1022", "model.first_dense_layers=1", "parallel.tp=4"], "must divide model.ffn_dim = 1022"),
        (["model.n_heads=8", "data.seq_len=12", "train.tokens_per_step=12", "parallel.tp=8"], "data.seq_len = 12"),
        (
            ["model.vocab_size=321", "parallel.tp=2"],
            "model.vocab_size = 321: must be a multiple of parallel.tp = 2: 322 is",
        ),
    ],
)
def test_what_tensor_parallel_ranks_cannot_split(overrides, message):
    with pytest.raises(ConfigError, match=re.escape(message)):
        from_dict({}, overrides)


def test_the_width_of_dense_layers_that_are_not_there_may_be_odd():
    from_dict({"model": {"ffn_dim": 1023}}, ["parallel.tp=4"])
