"""The ``moetrain`` command.

What a command needs is imported when it runs: ``moetrain --help`` and ``moetrain config`` start without torch. A
:class:`~moetrain.errors.UserError` ends a command with one line on stderr and its exit code, without a traceback.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from typing import Any, NoReturn

from moetrain import __version__
from moetrain.config import Config, check_world, load_config, packaged_configs, to_yaml
from moetrain.errors import ConfigError, UserError
from moetrain.launch.processes import (
    add_launch_arguments,
    check_restarts,
    choose_processes,
    is_worker,
    positive,
    start,
)


def main(argv: Sequence[str] | None = None) -> int:
    """Run one command; returns the exit code: 0, 1 for a user's error, 2 for a bad command line or config, 130."""
    try:
        arguments = _parse(sys.argv[1:] if argv is None else argv)
        code: int = arguments.handler(arguments)
    except KeyboardInterrupt:
        return 130
    except Exception as error:
        _record(error)
        if isinstance(error, UserError):
            told = error
        elif isinstance(error, OSError) and error.filename is not None:  # a full disk, a folder that cannot be written
            told = UserError(f"{error.filename}: {error.strerror}")
        else:
            raise
        _print_error(told)
        return told.exit_code
    return code


def _print_error(error: UserError) -> None:
    """One line. An error that all ranks share is told by rank 0 alone."""
    rank = os.environ["RANK"] if is_worker() else "0"
    shared = error.agreed or isinstance(error, ConfigError)
    if rank == "0" or not shared:
        where = "" if rank == "0" else f"rank {rank}: "
        print(f"moetrain: error: {where}{' '.join(str(error).splitlines())}", file=sys.stderr, flush=True)


class _Parser(argparse.ArgumentParser):
    """Reports a bad command line like any other error of the user."""

    def error(self, message: str) -> NoReturn:
        raise ConfigError(f"{message} (see {self.prog} --help)")


def _parse(argv: Sequence[str]) -> argparse.Namespace:
    parser = _build_parser(argv[0] if argv else None)
    arguments, rest = parser.parse_known_args(argv)
    # argparse gives up on positionals after an option (train tiny --nproc 2 train.steps=5).
    if rest and (not hasattr(arguments, "overrides") or any(word.startswith("-") for word in rest)):
        parser.error(f"unrecognized arguments: {' '.join(rest)}")
    if rest:
        arguments.overrides = [*arguments.overrides, *rest]
    return arguments


def _build_parser(command: str | None) -> argparse.ArgumentParser:
    parser = _Parser(
        prog="moetrain",
        description="Train Mixture-of-Experts language models from one YAML file.",
        epilog="examples:\n"
        "  moetrain train tiny --nproc auto\n"
        "  moetrain evaluate runs/tiny\n"
        "  moetrain config olmoe-1b-7b train.steps=100\n",
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"moetrain {__version__}")
    commands = parser.add_subparsers(metavar="command", required=True, parser_class=_Parser)

    train = _add_command(
        commands,
        "train",
        "train a model",
        "Train the model that CONFIG describes, or go on from the newest checkpoint of its run folder.\n"
        "SIGTERM and SIGUSR1 save a checkpoint and end the run with exit code 0.",
        "examples:\n"
        "  moetrain train tiny\n"
        "  moetrain train small train.steps=2000 optim.lr=1e-3 --nproc 4\n"
        "  moetrain train my.yaml parallel.ep=8 --nproc auto --launcher deepspeed\n"
        "  moetrain train my.yaml --nnodes 2 --rdzv-endpoint node1:29500 --max-restarts 3   # on both nodes\n"
        "  torchrun --nproc-per-node 8 -m moetrain train my.yaml parallel.ep=8\n",
    )
    _add_config(train)
    add_launch_arguments(train, restarts=True)
    train.set_defaults(handler=_train)

    evaluate = _add_command(
        commands,
        "evaluate",
        "score a checkpoint on held-out text",
        "Print held-out loss, perplexity and bits per byte of a run's newest checkpoint, or of the one given.",
        "examples:\n"
        "  moetrain evaluate runs/tiny\n"
        "  moetrain evaluate runs/small eval.tokens=1000000 --nproc auto --json score.json\n",
    )
    evaluate.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="a run folder or one of its checkpoints")
    _add_overrides(evaluate)
    evaluate.add_argument("--json", metavar="F", help="also write the scores to this file")
    add_launch_arguments(evaluate, restarts=False)
    evaluate.set_defaults(handler=_evaluate)

    generate = _add_command(
        commands,
        "generate",
        "let a model speak",
        "Print what the model of a run's newest checkpoint, or of the one given, writes after each prompt.",
        "examples:\n"
        "  moetrain generate runs/tiny --prompt 'def main('\n"
        "  moetrain generate olmoe --prompt 'The sea is' --prompt 'Paris is' --temperature 0 --max-tokens 40\n",
    )
    generate.add_argument("target", metavar="RUN_OR_CHECKPOINT", help="a run folder or one of its checkpoints")
    _add_overrides(generate)
    generate.add_argument(
        "--prompt",
        action="append",
        dest="prompts",
        metavar="TEXT",
        help="what to go on from, any number of times (default: the beginning of a document)",
    )
    generate.add_argument(
        "--max-tokens", type=positive, default=128, metavar="N", help="tokens a prompt (default: %(default)s)"
    )
    generate.add_argument(
        "--temperature", type=float, default=1.0, metavar="T", help="0: the likeliest token (default: %(default)g)"
    )
    generate.add_argument("--top-k", type=positive, metavar="K", help="choose among the K likeliest tokens")
    generate.add_argument(
        "--top-p",
        type=float,
        default=1.0,
        metavar="P",
        help="choose among the likeliest tokens that together have this probability (default: %(default)g)",
    )
    generate.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    generate.add_argument(
        "--scheme",
        choices=["ordinary", "context-coherent", "both"],
        default="ordinary",
        help="on several processes: how tokens reach others' experts. ordinary: there and back; context-coherent: they "
        "stay there, for every process has all keys and values (ExFlow); both: one after the other, to compare "
        "(default: %(default)s)",
    )
    generate.add_argument("--json", metavar="F", help="also write texts, tokens and traffic to this file")
    add_launch_arguments(generate, restarts=False)
    generate.set_defaults(handler=_generate)

    data = _add_command(
        commands,
        "data",
        "build and inspect training data",
        "Turn text into token shards.",
        "examples:\n  moetrain data build texts/ --out data/mine\n  moetrain data info data/mine\n",
    )
    if command == "data":
        _add_data_commands(data)

    checkpoint = _add_command(
        commands,
        "checkpoint",
        "inspect, verify and convert checkpoints",
        "Look into checkpoints, check every byte, and turn them into safetensors and back.",
        "examples:\n  moetrain checkpoint info runs/tiny\n  moetrain checkpoint verify runs/tiny\n",
    )
    if command == "checkpoint":
        _add_checkpoint_commands(checkpoint)

    huggingface = _add_command(
        commands,
        "hf",
        "from and to Hugging Face's transformers",
        "Turn models of transformers into checkpoints, checkpoints into models of transformers, and dense models into\n"
        "mixtures of experts.",
        "examples:\n"
        "  moetrain hf import allenai/OLMoE-1B-7B-0924 --out olmoe\n"
        "  moetrain hf export runs/mine --out mine --dtype bf16\n",
    )
    if command == "hf":
        _add_huggingface_commands(huggingface)

    trace = _add_command(
        commands,
        "trace",
        "inspect routing traces",
        "Look into the routing traces that placement.trace records.",
        "examples:\n  moetrain trace info runs/tiny\n",
    )
    if command == "trace":
        _add_trace_commands(trace)

    config = _add_command(
        commands,
        "config",
        "print a resolved config, or list the packaged ones",
        "Check CONFIG and print it as YAML with every default filled in.\nWithout CONFIG: list the packaged configs.",
        "examples:\n  moetrain config\n  moetrain config tiny\n  moetrain config tiny train.steps=100 > mine.yaml\n",
    )
    _add_config(config, required=False)
    config.set_defaults(handler=_config)

    plan = _add_command(
        commands,
        "plan",
        "parameters, memory and FLOPs of a config",
        "Print total, active and per-rank parameters, optimiser and activation memory and FLOPs a token.\n"
        "Needs no GPU.",
        "examples:\n  moetrain plan olmoe-1b-7b\n  moetrain plan qwen3-30b-a3b parallel.ep=8 --world-size 64\n",
    )
    _add_config(plan)
    plan.add_argument(
        "--world-size", type=positive, default=1, metavar="N", help="plan for N processes (default: %(default)s)"
    )
    plan.set_defaults(handler=_plan)

    place = _add_command(
        commands,
        "place",
        "find which GPU should hold which expert",
        "Find the placement of a trace's experts that costs least, prove how good it is, and compare it with others.\n"
        "Ctrl-C ends the search, and the best placement until then is written. Needs no GPU.",
        "examples:\n"
        "  moetrain place --trace runs/x --gpus 8 --out placement.json\n"
        "  moetrain place --trace runs/x --gpus 64 --topology cluster.yaml --objective load+0.5*traffic \\\n"
        "      --holdout 0.2 --time-limit 300 --out placement.json --report placement.html\n"
        "  moetrain place --trace ids.npz --experts 32 --gpus 8 --objective hops --out placement.json\n",
    )
    if command == "place":
        _add_place_arguments(place)

    bench = _add_command(
        commands,
        "bench",
        "measure speed and memory beside other implementations",
        "Time one MoE layer, whole training steps or checkpoints, beside other implementations that are installed, or\n"
        "compare all solvers of expert placements.",
        "examples:\n"
        "  moetrain bench moe-layer --shapes 24576,1536,256,128,8\n"
        "  moetrain bench step olmoe-1b-7b\n"
        "  moetrain bench checkpoint tiny\n"
        "  moetrain bench placement --traces runs/x --gpus 8\n",
    )
    _add_bench_commands(bench)

    tune = _add_command(
        commands,
        "tune",
        "measure this machine, once",
        "Measure what depends on the machine, and keep it for later runs.",
        "examples:\n  torchrun --nproc-per-node 8 -m moetrain tune overlap\n",
    )
    _add_tune_commands(tune)

    profile = _add_command(
        commands,
        "profile",
        "draw what GPUs do in a step",
        "Record training steps of a config and draw what the GPU does in them.",
        "examples:\n"
        "  torchrun --nproc-per-node 2 -m moetrain profile overlap moe-7b-fine model.n_layers=4 parallel.ep=2 \\\n"
        "      --out overlap.png\n",
    )
    _add_profile_commands(profile)
    return parser


def _add_command(
    commands: argparse._SubParsersAction[_Parser], name: str, summary: str, description: str, examples: str
) -> _Parser:
    return commands.add_parser(
        name,
        help=summary,
        description=description,
        epilog=examples,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )


def _add_data_commands(data: argparse.ArgumentParser) -> None:
    # The package takes torch with it; no other command should wait for that before it checks its own arguments.
    from moetrain.data import add_build_arguments, add_info_arguments, build_command, info_command

    commands = data.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    build = _add_command(
        commands,
        "build",
        "tokenise text into shards",
        "Tokenise text into memory-mapped shards for data.path.",
        "examples:\n"
        "  moetrain data build stdlib --out data/stdlib\n"
        "  moetrain data build texts/ more.jsonl.gz --tokenizer tokenizer.json --out data/mine\n",
    )
    add_build_arguments(build)
    build.set_defaults(handler=build_command)
    info = _add_command(
        commands,
        "info",
        "describe and check a folder of shards",
        "Describe and check a folder of shards.",
        "examples:\n  moetrain data info stdlib\n  moetrain data info data/mine --verify --sample 200\n",
    )
    add_info_arguments(info)
    info.set_defaults(handler=info_command)


def _add_checkpoint_commands(checkpoint: argparse.ArgumentParser) -> None:
    from moetrain import checkpoint_commands as run  # it takes torch with it, as the data commands do

    commands = checkpoint.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    info = _add_command(
        commands,
        "info",
        "what is in a checkpoint",
        "Print who wrote a checkpoint and when, how far the run was, and what its parts hold.",
        "examples:\n  moetrain checkpoint info runs/tiny\n",
    )
    run.add_info_arguments(info)
    info.set_defaults(handler=run.info_command)
    verify = _add_command(
        commands,
        "verify",
        "compare every byte with its checksum",
        "Read all files of checkpoints and print a line for each that is damaged or missing; exit code 1 if any is.",
        "examples:\n  moetrain checkpoint verify runs/tiny\n"
        "  moetrain checkpoint verify runs/tiny/checkpoints/step-00000100\n",
    )
    run.add_verify_arguments(verify)
    verify.set_defaults(handler=run.verify_command)
    convert = _add_command(
        commands,
        "convert",
        "to safetensors and back",
        "Write a checkpoint as a folder of safetensors under moetrain's names, or such a folder as a checkpoint.\n"
        "Other numbers of ranks and other parallelism need no conversion: a checkpoint loads under any.",
        "examples:\n"
        "  moetrain checkpoint convert runs/tiny --out tiny-weights --weights-only --dtype bfloat16\n"
        "  moetrain checkpoint convert runs/tiny --out tiny-all\n"
        "  moetrain checkpoint convert tiny-all --out tiny-again\n",
    )
    run.add_convert_arguments(convert)
    convert.set_defaults(handler=run.convert_command)


def _add_huggingface_commands(huggingface: argparse.ArgumentParser) -> None:
    from moetrain.huggingface import commands as run  # it takes torch with it, as the data commands do

    commands = huggingface.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    taken = _add_command(
        commands,
        "import",
        "a model of transformers as a checkpoint",
        "Write a model of transformers as a checkpoint, with its tokenizer and a config that trains on from it.\n"
        "One tensor is in memory at a time.",
        "examples:\n"
        "  moetrain hf import allenai/OLMoE-1B-7B-0924 --out olmoe\n"
        "  moetrain train olmoe/config.yaml data.path=data/mine --nproc auto\n",
    )
    run.add_import_arguments(taken)
    taken.set_defaults(handler=run.import_command)
    given = _add_command(
        commands,
        "export",
        "a checkpoint as a model of transformers",
        "Write a run's newest checkpoint, or the one given, as a folder that transformers loads: weights, config,\n"
        "tokenizer, generation settings and a model card. One tensor is in memory at a time, on each process.",
        "examples:\n"
        "  moetrain hf export runs/mine --out mine --dtype bf16\n"
        "  moetrain hf export runs/mine --out mine --lossy --nproc 4\n",
    )
    run.add_export_arguments(given)
    add_launch_arguments(given, restarts=False)
    given.set_defaults(handler=_export)

    made = _add_command(
        commands,
        "upcycle",
        "a dense model of transformers as a mixture of experts",
        "Write a dense model of transformers as a checkpoint whose experts are copies of its feed-forward layers, or\n"
        "parts of copies. Without noise it computes what the dense model does, before it is trained.",
        "examples:\n"
        "  moetrain hf upcycle Qwen/Qwen3-0.6B --out upcycled --experts 8 --top-k 2\n"
        "  moetrain hf upcycle llama/ --out upcycled --experts 32 --top-k 8 --granularity 4 --noise 0.01\n",
    )
    run.add_upcycle_arguments(made)
    made.set_defaults(handler=run.upcycle_command)


def _add_place_arguments(place: argparse.ArgumentParser) -> None:
    from moetrain import placement_commands as run  # it takes scipy and matplotlib with it

    run.add_place_arguments(place)
    place.set_defaults(handler=run.place_command)


def _add_trace_commands(trace: argparse.ArgumentParser) -> None:
    from moetrain import trace_commands as run  # it takes scipy with it

    commands = trace.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    info = _add_command(
        commands,
        "info",
        "what is in a trace",
        "Print how much a trace holds, how uneven its loads are, how well an expert tells the next layer's, and\n"
        "how far both have drifted since the first recorded steps.",
        "examples:\n"
        "  moetrain trace info runs/tiny --gpus 8\n"
        "  moetrain trace info ids.npz --experts 64 --json info.json\n",
    )
    run.add_info_arguments(info)
    info.set_defaults(handler=run.info_command)


def _add_bench_commands(bench: argparse.ArgumentParser) -> None:
    commands = bench.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    layer = _add_command(
        commands,
        "moe-layer",
        "one MoE layer, forward and backward",
        "Time one MoE layer with its router in bfloat16, after checking every implementation against float32, beside\n"
        "its six matrix products as cuBLAS batched products.",
        "examples:\n"
        "  moetrain bench moe-layer --json layer.json\n"
        "  moetrain bench moe-layer --shapes 24576,1536,256,128,8 32768,2048,1024,64,8 --peers grouped_mm --profile\n"
        "  moetrain bench moe-layer --rounding nearest\n",
    )
    layer.add_argument("--shapes", nargs="+", metavar="T,D,I,E,K", help="tokens, width, expert width, experts, top-k")
    layer.add_argument(
        "--backends",
        nargs="+",
        metavar="B",
        help="of ours (default: the one that auto chooses, and triton beside hopper)",
    )
    layer.add_argument(
        "--peers", nargs="*", metavar="P", help="grouped_mm, liger, sonicmoe (default: those that are installed)"
    )
    layer.add_argument(
        "--rounding",
        choices=["nearest", "up", "down", "balanced"],
        help="instead: time the experts on the pairs of token rounding and of top-k",
    )
    layer.add_argument("--parity", action="store_true", help="only check, do not time")
    layer.add_argument("--profile", action="store_true", help="also time every kernel of ours by itself")
    layer.add_argument("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    _add_bench_output(layer)
    layer.set_defaults(handler=_bench_moe_layer)

    step = _add_command(
        commands,
        "step",
        "whole training steps of a config",
        "Time training steps of CONFIG on random tokens, on one GPU or, under torchrun, several. Unless overridden:\n"
        "bfloat16 parameters and Adam states, no activation checkpointing, and a micro-batch of 4 sequences a rank.",
        "examples:\n"
        "  moetrain bench step olmoe-1b-7b --peer transformers --json step.json\n"
        "  moetrain bench step olmoe-1b-7b model.n_layers=4 train.compile=true\n"
        "  torchrun --nproc-per-node 2 -m moetrain bench step moe-7b-fine model.n_layers=4 parallel.ep=2\n",
    )
    _add_config(step)
    step.add_argument(
        "--peer", choices=["transformers"], help="also time the same model there, with grouped_mm experts"
    )
    step.add_argument("--peer-first", action="store_true", help="time the peer before ours")
    step.add_argument("--steps", type=positive, default=20, metavar="N", help="steps to time (default: %(default)s)")
    step.add_argument("--warmup", type=positive, default=3, metavar="N", help="before those (default: %(default)s)")
    _add_bench_output(step)
    step.set_defaults(handler=_bench_step)

    overlap = _add_command(
        commands,
        "overlap",
        "steps with overlap off, on, and without communication",
        "Time training steps of CONFIG with parallel.overlap off and on, and without any communication in the layers,\n"
        "which is a floor: its numbers are wrong on purpose. For micro-batches of several sizes, one a step; with the\n"
        "defaults of bench step. Starts under torchrun.",
        "examples:\n"
        "  torchrun --nproc-per-node 2 -m moetrain bench overlap moe-7b-fine model.n_layers=4 parallel.ep=2\n"
        "  torchrun --nproc-per-node 2 -m moetrain bench overlap moe-7b-fine model.n_layers=4 parallel.tp=2 \\\n"
        "      train.compile=true --tokens 8192 32768 --json overlap.json\n",
    )
    _add_config(overlap)
    overlap.add_argument(
        "--overlap",
        nargs="+",
        choices=["off", "on", "floor"],
        default=["off", "on", "floor"],
        metavar="W",
        help="(default: off on floor)",
    )
    overlap.add_argument(
        "--tokens",
        nargs="+",
        type=positive,
        default=[512 << n for n in range(7)],
        metavar="T",
        help="of micro-batches (default: 512 to 32768 by powers of two)",
    )
    overlap.add_argument(
        "--steps", type=positive, default=10, metavar="N", help="to time, a round (default: %(default)s)"
    )
    overlap.add_argument("--rounds", type=positive, default=2, metavar="N", help="(default: %(default)s)")
    _add_bench_output(overlap)
    overlap.set_defaults(handler=_bench_overlap)

    microscaling = _add_command(
        commands,
        "microscaling",
        "quantisers of FP4 and other microscaling formats",
        "Time the quantisers on one bfloat16 tensor beside a copy of it, after checking every result against its\n"
        "definition in plain PyTorch.",
        "examples:\n"
        "  moetrain bench microscaling --json microscaling.json\n"
        "  moetrain bench microscaling --shapes 16384,4096 4096,14336 --peers torchao\n",
    )
    microscaling.add_argument("--shapes", nargs="+", metavar="R,C", help="rows, columns (default: 16384,4096)")
    microscaling.add_argument("--peers", nargs="*", metavar="P", help="torchao (default: if it is installed)")
    microscaling.add_argument("--rounds", type=positive, default=5, metavar="N", help="(default: %(default)s)")
    _add_bench_output(microscaling)
    microscaling.set_defaults(handler=_bench_microscaling)

    placement = _add_command(
        commands,
        "placement",
        "all solvers of expert placements",
        "Solve traces with every solver for every objective, and judge the placements on a fifth of the tokens that\n"
        "was held out. Needs no GPU.",
        "examples:\n"
        "  moetrain bench placement --traces runs/x --gpus 8 --json placement.json\n"
        "  moetrain bench placement --synthetic zipf topics --shape 16384,12,64,8 --objectives load hops\n",
    )
    placement.add_argument("--traces", nargs="+", default=[], metavar="T", help="trace files, or runs that recorded")
    placement.add_argument(
        "--synthetic", nargs="+", default=[], metavar="F", help="made from the seed: zipf, lognormal, topics"
    )
    placement.add_argument(
        "--shape", default="16384,12,64,8", metavar="S,L,E,K", help="of those (default: %(default)s)"
    )
    placement.add_argument("--gpus", type=positive, default=8, metavar="G", help="(default: %(default)s)")
    placement.add_argument("--topology", metavar="F", help="as for moetrain place")
    placement.add_argument(
        "--objectives",
        nargs="+",
        default=["load", "hops", "traffic"],
        metavar="O",
        help="(default: load hops traffic)",
    )
    placement.add_argument("--solvers", nargs="+", metavar="S", help="(default: all)")
    placement.add_argument(
        "--time-limit", type=float, default=10.0, metavar="S", help="seconds of each search (default: %(default)g)"
    )
    placement.add_argument("--seed", type=int, default=0, metavar="N", help="(default: %(default)s)")
    _add_bench_output(placement)
    placement.set_defaults(handler=_bench_placement)

    fused = _add_command(
        commands,
        "allreduce-rmsnorm",
        "the fused all-reduce, residual add and norm, on several GPUs",
        "Time the fused all-reduce, residual add and RMSNorm by number of blocks, forward and backward, beside NCCL,\n"
        "torch's two-shot all-reduce and copies that the links cannot beat. Starts under torchrun.",
        "examples:\n"
        "  torchrun --nproc-per-node 2 -m moetrain bench allreduce-rmsnorm --json fused.json\n"
        "  torchrun --nproc-per-node 2 -m moetrain bench allreduce-rmsnorm --shapes 8192,4096 --blocks 16 132\n",
    )
    fused.add_argument("--shapes", nargs="+", metavar="T,D", help="rows and widths")
    fused.add_argument("--blocks", nargs="+", type=positive, metavar="N", help="of the fused kernels")
    fused.add_argument(
        "--rounds", type=positive, default=11, metavar="N", help="replays to time (default: %(default)s)"
    )
    _add_bench_output(fused)
    fused.set_defaults(handler=_bench_allreduce_rmsnorm)

    checkpoint = _add_command(
        commands,
        "checkpoint",
        "what saving costs a run",
        "Time saves between training steps of CONFIG on random tokens: how long one holds the loop up, when it is\n"
        "durable, and what one after every step costs, beside torch.save and torch.distributed.checkpoint.",
        "examples:\n"
        "  moetrain bench checkpoint tiny --json checkpoint.json\n"
        "  moetrain bench checkpoint small --folder /scratch/me --steps 50\n"
        "  torchrun --nproc-per-node 8 -m moetrain bench checkpoint moe-7b-fine parallel.ep=8 parallel.fsdp=true\n",
    )
    _add_config(checkpoint)
    checkpoint.add_argument("--methods", nargs="+", metavar="M", help="(default: all that there are here)")
    checkpoint.add_argument(
        "--repeats", type=positive, default=5, metavar="N", help="saves timed one by one (default: %(default)s)"
    )
    checkpoint.add_argument(
        "--steps", type=positive, default=20, metavar="N", help="steps with a save after each (default: %(default)s)"
    )
    checkpoint.add_argument("--folder", metavar="DIR", help="where to save (default: the system's temporary folder)")
    _add_bench_output(checkpoint)
    checkpoint.set_defaults(handler=_bench_checkpoint)

    huggingface = _add_command(
        commands,
        "hf",
        "time and memory of import and export",
        "Write random weights of CONFIG's shape as a checkpoint, export it, and import the export; show how long each\n"
        "took and how much memory. Needs no GPU, and room on the disk for twice the weights.",
        "examples:\n  moetrain bench hf olmoe-1b-7b --dir /scratch/bench --json hf.json\n",
    )
    _add_config(huggingface)
    huggingface.add_argument("--dir", required=True, metavar="DIR", help="folder to make, and to remove at the end")
    huggingface.add_argument(
        "--dtype", choices=["bfloat16", "float32"], default="bfloat16", help="of the weights (default: %(default)s)"
    )
    huggingface.add_argument("--json", metavar="F", help="also write the results to this file, as they come")
    huggingface.set_defaults(handler=_bench_huggingface)


def _add_tune_commands(tune: argparse.ArgumentParser) -> None:
    commands = tune.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    overlap = _add_command(
        commands,
        "overlap",
        "for parallel.overlap=auto: products, collectives, and the host",
        "Measure products, collectives alone and side by side, and how fast the host issues layers, for the cost\n"
        "model by which parallel.overlap=auto splits micro-batches. Starts under torchrun, with as many ranks as will\n"
        "train.",
        "examples:\n  torchrun --nproc-per-node 2 -m moetrain tune overlap\n",
    )
    overlap.set_defaults(handler=_tune_overlap)


def _add_profile_commands(profile: argparse.ArgumentParser) -> None:
    commands = profile.add_subparsers(metavar="command", required=True, parser_class=_Parser)
    overlap = _add_command(
        commands,
        "overlap",
        "computation, communication and what of it is exposed, with overlap off and on",
        "Record steps of CONFIG on random tokens with parallel.overlap off and on, and draw rank 0's computation,\n"
        "communication and exposed communication, by layer; the figures are printed, and written beside the picture.\n"
        "With the defaults of bench step. Starts under torchrun, on GPUs.",
        "examples:\n"
        "  torchrun --nproc-per-node 2 -m moetrain profile overlap moe-7b-fine model.n_layers=4 parallel.ep=2 \\\n"
        "      train.compile=true train.micro_batch=8 --out overlap.png\n",
    )
    _add_config(overlap)
    overlap.add_argument("--out", required=True, metavar="F.png", help="the picture; the figures go to F.json")
    overlap.add_argument(
        "--steps", type=positive, default=3, metavar="N", help="to record, one by one (default: %(default)s)"
    )
    overlap.set_defaults(handler=_profile_overlap)


def _add_bench_output(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", metavar="F", help="also write the results to this file, as they come")
    parser.add_argument(
        "--budget-seconds",
        type=float,
        metavar="S",
        help="begin nothing new after this time, and end with what there is",
    )


def _add_config(parser: argparse.ArgumentParser, required: bool = True) -> None:
    parser.add_argument(
        "config",
        metavar="CONFIG",
        nargs=None if required else "?",
        help="a YAML file, or the name of a packaged config (moetrain config lists them)",
    )
    _add_overrides(parser)


def _add_overrides(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "overrides", metavar="key=value", nargs="*", default=[], help="config keys to change, as in train.steps=100"
    )


def _train(arguments: argparse.Namespace) -> int:
    config = load_config(arguments.config, arguments.overrides)
    processes = choose_processes(arguments, config.run.device)
    check_world(config, processes.world_size)
    check_restarts(processes, config.checkpoint)
    if processes.launcher != "none":
        return start(processes, ["train", arguments.config, *arguments.overrides], config.run.device)
    _prepare_worker()
    from moetrain.trainer import train

    return train(config)


def _evaluate(arguments: argparse.Namespace) -> int:
    processes = choose_processes(arguments, "auto")
    if processes.launcher != "none":
        json = [] if arguments.json is None else ["--json", arguments.json]
        return start(processes, ["evaluate", arguments.target, *arguments.overrides, *json], "auto")
    _prepare_worker()
    from moetrain.evaluate import evaluate_command

    return evaluate_command(arguments.target, arguments.overrides, arguments.json)


def _generate(arguments: argparse.Namespace) -> int:
    processes = choose_processes(arguments, "auto")
    prompts = arguments.prompts or [""]
    if processes.launcher != "none":
        values = {
            "max-tokens": arguments.max_tokens,
            "temperature": arguments.temperature,
            "top-k": arguments.top_k,
            "top-p": arguments.top_p,
            "seed": arguments.seed,
            "scheme": arguments.scheme,
            "json": arguments.json,
        }
        options = [f"--{name}={value}" for name, value in values.items() if value is not None]
        options += [f"--prompt={prompt}" for prompt in prompts]
        return start(processes, ["generate", arguments.target, *arguments.overrides, *options], "auto")
    _prepare_worker()
    from moetrain.generate_command import Options, generate_command
    from moetrain.generation import Sampling

    schemes = ("ordinary", "context-coherent") if arguments.scheme == "both" else (arguments.scheme,)
    sampling = Sampling(arguments.max_tokens, arguments.temperature, arguments.top_k, arguments.top_p, arguments.seed)
    return generate_command(Options(arguments.target, prompts, sampling, schemes, arguments.overrides, arguments.json))


def _export(arguments: argparse.Namespace) -> int:
    processes = choose_processes(arguments, "cpu")
    if processes.launcher != "none":
        options = [f"--{name}={value}" for name in ("dtype", "tokenizer") if (value := getattr(arguments, name))]
        lossy = ["--lossy"] if arguments.lossy else []
        return start(processes, ["hf", "export", arguments.path, f"--out={arguments.out}", *options, *lossy], "cpu")
    _prepare_worker()
    from moetrain.huggingface.commands import export_command

    return export_command(arguments)


def _config(arguments: argparse.Namespace) -> int:
    if arguments.config is None:
        packaged = packaged_configs()
        width = max(map(len, packaged))
        for name, file in packaged.items():
            with file.open(encoding="utf-8") as lines:
                print(f"{name:{width}}  {lines.readline().lstrip('# ').rstrip()}")
        return 0
    config: Config = load_config(arguments.config, arguments.overrides)
    print(to_yaml(config), end="")
    return 0


def _plan(arguments: argparse.Namespace) -> int:
    from moetrain.plan import plan_command

    return plan_command(load_config(arguments.config, arguments.overrides), arguments.world_size)


def _bench_moe_layer(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.moe_layer import Options, moe_layer_command

    return moe_layer_command(Options(**_fields(arguments)))


def _bench_step(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.step import Options, step_command

    return step_command(Options(**_fields(arguments)))


def _bench_overlap(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.overlap import Options, overlap_command

    return overlap_command(Options(**_fields(arguments)))


def _bench_microscaling(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.microscaling import Options, microscaling_command

    return microscaling_command(Options(**_fields(arguments)))


def _bench_placement(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.placement import Options, placement_command

    return placement_command(Options(**_fields(arguments)))


def _bench_allreduce_rmsnorm(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.allreduce_rmsnorm import Options, allreduce_rmsnorm_command

    return allreduce_rmsnorm_command(Options(**_fields(arguments)))


def _tune_overlap(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.tune_overlap import tune_overlap_command

    return tune_overlap_command()


def _profile_overlap(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.profile_overlap import Options, profile_overlap_command

    return profile_overlap_command(Options(**_fields(arguments)))


def _bench_checkpoint(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.checkpoint import Options, checkpoint_command

    return checkpoint_command(Options(**_fields(arguments)))


def _bench_huggingface(arguments: argparse.Namespace) -> int:
    from moetrain.benchmarks.huggingface import Options, huggingface_command

    return huggingface_command(Options(**_fields(arguments)))


def _fields(arguments: argparse.Namespace) -> dict[str, Any]:
    return {name: value for name, value in vars(arguments).items() if name != "handler"}


def _prepare_worker() -> None:
    if not is_worker():
        return
    from torch.distributed.elastic.multiprocessing.errors import get_error_handler

    from moetrain.launch.torchrun import end_with_launcher

    end_with_launcher()
    get_error_handler().initialize()


def _record(error: Exception) -> None:
    """Leave the error where torchrun looks for the reason of a rank's failure."""
    if is_worker() and "TORCHELASTIC_ERROR_FILE" in os.environ:
        from torch.distributed.elastic.multiprocessing.errors import get_error_handler

        get_error_handler().record_exception(error)
