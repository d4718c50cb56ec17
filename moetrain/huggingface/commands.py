"""`moetrain hf import`, `export` and `upcycle`."""

from __future__ import annotations

import argparse
from pathlib import Path

import torch

from moetrain.config import from_dict, load_config
from moetrain.flops import parameters
from moetrain.huggingface.exporting import export_model
from moetrain.huggingface.families import FAMILIES
from moetrain.huggingface.importing import import_model
from moetrain.huggingface.upcycling import Recipe, upcycle
from moetrain.launch.processes import positive
from moetrain.ranks import joined_mesh

DTYPES = {
    "bf16": torch.bfloat16,
    "bfloat16": torch.bfloat16,
    "fp16": torch.float16,
    "float16": torch.float16,
    "fp32": torch.float32,
    "float32": torch.float32,
}
_SOURCE_HELP = "folder of a model that transformers saved, or OWNER/NAME of a repository on the Hugging Face Hub"


def add_import_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain hf import`."""
    parser.add_argument("source", metavar="DIR_OR_REPO", help=f"{_SOURCE_HELP}: {', '.join(FAMILIES)}")
    parser.add_argument("--out", required=True, metavar="CKPT", help="checkpoint to make")


def add_export_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain hf export`."""
    parser.add_argument("path", metavar="RUN_OR_CKPT", help="a run (its newest checkpoint) or a checkpoint")
    parser.add_argument("--out", required=True, metavar="DIR", help="folder to make")
    parser.add_argument("--dtype", choices=list(DTYPES), help="cast the weights (default: as they are)")
    parser.add_argument(
        "--lossy", action="store_true", help="leave out what transformers has no place for, and list it"
    )
    parser.add_argument(
        "--tokenizer",
        metavar="DIR",
        help="folder with the tokenizer's files (default: of the model that the run began with, or of its data)",
    )


def add_upcycle_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of `moetrain hf upcycle`."""
    dense = ", ".join(family.model_type for family in FAMILIES.values() if family.experts_key is None)
    parser.add_argument("source", metavar="DIR_OR_REPO", help=f"{_SOURCE_HELP}: {dense}")
    parser.add_argument("--out", required=True, metavar="CKPT", help="checkpoint to make")
    parser.add_argument("--experts", type=positive, required=True, metavar="E", help="experts of a layer")
    parser.add_argument("--top-k", type=positive, required=True, metavar="K", help="experts of a token")
    parser.add_argument(
        "--granularity",
        type=positive,
        default=1,
        metavar="G",
        help="cut each copy into G experts of 1/G of its width; must divide E, K and the width (default: %(default)s)",
    )
    parser.add_argument(
        "--noise",
        type=float,
        default=0.0,
        metavar="S",
        help="normal noise on the copies, S times the deviation of their own numbers (default: none, and then the new "
        "model computes what the dense one does)",
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of noise and routers (default: %(default)s)")


def import_command(args: argparse.Namespace) -> int:
    """Run `moetrain hf import`; returns the exit code. Raises HuggingFaceError and CheckpointError."""
    out = Path(args.out)
    model = import_model(args.source, out)
    count = parameters(model.config).total
    print(f"{out}: {model.family.architecture} of {args.source}, {count:,} parameters in {model.dtype}")
    _say_how_to_go_on(out)
    return 0


def upcycle_command(args: argparse.Namespace) -> int:
    """Run `moetrain hf upcycle`; returns the exit code. Raises HuggingFaceError, CheckpointError and ConfigError."""
    out = Path(args.out)
    dense = upcycle(args.source, out, Recipe(args.experts, args.top_k, args.granularity, args.noise, args.seed))
    before, after = parameters(dense.config), parameters(load_config(str(out / "config.yaml")))
    print(
        f"{out}: {args.experts} experts of {dense.family.architecture} of {args.source}: {before.total:,} parameters "
        f"became {after.total:,}, {after.active:,} of a token"
    )
    _say_how_to_go_on(out)
    return 0


def _say_how_to_go_on(out: Path) -> None:
    print(f"train on from it: moetrain train {out / 'config.yaml'} data.path=…")


def export_command(args: argparse.Namespace) -> int:
    """Run `moetrain hf export` on this rank; returns the exit code. Raises HuggingFaceError and CheckpointError."""
    out = Path(args.out)
    # Files take as long as they take: a rank that is still writing is no rank that hangs.
    config = from_dict({"run": {"device": "cpu", "timeout_minutes": 1440}})
    with joined_mesh(config) as mesh:
        export = export_model(
            Path(args.path),
            out,
            mesh,
            dtype=None if args.dtype is None else DTYPES[args.dtype],
            lossy=args.lossy,
            tokenizer=None if args.tokenizer is None else Path(args.tokenizer),
        )
        if mesh.rank == 0:
            print(f"{out}: {export.family.architecture} of {export.checkpoint}")
            for what in export.dropped:
                print(f"  left out: {what}")
            if not export.has_tokenizer:
                print(
                    "  without a tokenizer: the model came with none, or its data are gone; give one with --tokenizer"
                )
    return 0
