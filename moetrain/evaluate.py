"""The held-out score of a model, beside what n-gram models and compressors make of the same bytes."""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path

import torch
import torch.distributed as dist
from rich.console import Console
from rich.table import Table

from moetrain.baselines import dataset_baselines
from moetrain.checkpoint import find_checkpoint, load, read_manifest
from moetrain.config import Config, from_dict
from moetrain.data import IGNORED, Dataset, check_vocabulary, heldout_batches, open_dataset
from moetrain.errors import UserError
from moetrain.files import write_text
from moetrain.model import Decoder
from moetrain.parallel import Mesh, environment_world_size, first_on_each_node, watchdog
from moetrain.ranks import joined_mesh
from moetrain.state import logical_tensors


@dataclass(frozen=True)
class Score:
    """Cross-entropy over held-out tokens."""

    loss: float
    """Nats a token, ends of documents included."""
    tokens: int
    bytes: int
    """Bytes of text that these tokens stand for."""

    @property
    def perplexity(self) -> float:
        return math.exp(min(self.loss, 700.0))

    @property
    def bits_per_byte(self) -> float:
        """All bits spent (those for ends of documents too) over the bytes of text."""
        return self.loss * self.tokens / math.log(2) / self.bytes

    def metrics(self) -> dict[str, float]:
        return {
            "heldout/loss": self.loss,
            "heldout/perplexity": self.perplexity,
            "heldout/bits_per_byte": self.bits_per_byte,
        }


@torch.no_grad()
def heldout_score(model: Decoder, dataset: Dataset, config: Config, mesh: Mesh) -> Score:
    """Score the first `eval.tokens` held-out tokens, shared among the ranks; collective."""
    model.eval()
    sums = torch.zeros(2, dtype=torch.float64, device=mesh.device)  # nats, targets
    batches = heldout_batches(
        dataset.heldout,
        config.data.seq_len,
        config.train.micro_batch,
        config.eval.tokens,
        mesh.dp_rank,
        mesh.dp,
        end_of_document=dataset.end_of_document if config.data.mask_documents else None,
    )
    for host_batch in batches:
        watchdog.moved("evaluation")
        batch = host_batch.to(mesh.device)
        hidden_BSD, _ = model(batch.tokens_BS, batch.documents_BS)
        # The tp ranks of a share of the batch have summands of its loss, but all of its targets.
        targets = (batch.targets_BS != IGNORED).sum() * (mesh.tp_rank == 0)
        sums += torch.stack([model.cross_entropy(hidden_BSD, batch.targets_BS).double(), targets])
    if mesh.world_size > 1:
        dist.all_reduce(sums)
    nats, tokens = sums[0].item(), int(sums[1])
    # The first token of the split is no target.
    return Score(nats / tokens, tokens, dataset.count_text_bytes(dataset.heldout, 1, tokens))


def heldout_baselines(dataset: Dataset, tokens: int) -> dict[str, float]:
    """Bits per byte of n-grams and compressors on the targets of `tokens` held-out tokens; {} unless data is bytes."""
    if dataset.tokenizer_identity.get("kind") != "bytes":
        return {}
    return dataset_baselines(dataset, 1, tokens)


def print_score(score: Score, baselines: dict[str, float]) -> None:
    """A table of bits per byte, best last."""
    table = Table()
    table.add_column("")
    table.add_column("bits per byte", justify="right")
    rows = {**baselines, "this model": score.bits_per_byte}
    for name, bits in sorted(rows.items(), key=lambda row: -row[1]):
        table.add_row(name, f"{bits:.3f}", style="bold" if name == "this model" else None)
    console = Console()
    console.print(table)
    console.print(
        f"held-out loss {score.loss:.4f} nats a token, perplexity {score.perplexity:.3f}, over {score.tokens:,} tokens"
    )


def evaluate_command(target: str, overrides: list[str], json_path: str | None) -> int:
    """Score the checkpoint that `target` (a run folder or a checkpoint) names; returns the exit code."""
    if json_path is not None and not Path(json_path).absolute().parent.is_dir():
        raise UserError(f"--json {json_path}: no such folder")
    checkpoint = find_checkpoint(Path(target))
    manifest = read_manifest(checkpoint)
    config = from_dict(manifest.progress["config"], where=str(checkpoint))
    # The number of ranks here need not be that of the run.
    tp, ep = (math.gcd(size, environment_world_size()) for size in (config.parallel.tp, config.parallel.ep))
    topology = ["parallel.dp=null", f"parallel.tp={tp}", f"parallel.ep={ep}"]
    config = from_dict(manifest.progress["config"], [*topology, *overrides], where=str(checkpoint))
    with joined_mesh(config) as mesh:
        dataset = first_on_each_node(lambda first: open_dataset(config.data, verify=first), mesh)
        check_vocabulary(dataset, config.model.vocab_size)
        with torch.device(mesh.device):
            model = Decoder(config, mesh)
        load(checkpoint, logical_tensors(model), mesh, strict=False)
        score = heldout_score(model, dataset, config, mesh)
        if mesh.rank == 0:
            baselines = heldout_baselines(dataset, score.tokens)
            print(f"checkpoint {checkpoint}, step {manifest.step}; {dataset.describe()}")
            print_score(score, baselines)
            if json_path is not None:
                result = {
                    "checkpoint": str(checkpoint),
                    "step": manifest.step,
                    "tokens": score.tokens,
                    **score.metrics(),
                    "baselines/bits_per_byte": baselines,
                }
                write_text(Path(json_path), json.dumps(result, indent=2) + "\n")
    return 0
