"""Routing traces: which experts a sample of tokens went to, layer by layer, and their files.

Shapes: S sampled tokens, L MoE layers, K chosen experts, E experts.
"""

from __future__ import annotations

import zipfile
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from moetrain.errors import TraceError
from moetrain.files import written_aside

SCHEMA_VERSION = 1
"""Of the files that :func:`save_trace` writes."""

_BLOCKS = 100
"""Into which :meth:`Trace.split` cuts a trace."""


@dataclass(frozen=True, eq=False)
class Trace:
    """Experts of sampled tokens. Raises TraceError where an expert does not exist."""

    expert_ids_SLK: NDArray[np.integer]
    """No expert: −1, where a token has fewer than K."""
    num_experts: int
    source_S: NDArray[np.integer] | None = None
    """The rank that had the token; None: not recorded."""
    step_S: NDArray[np.integer] | None = None
    """The training step of the token; None: not recorded."""
    layers: tuple[int, ...] | None = None
    """The model's numbers of the MoE layers; None: not recorded."""
    inferred_experts: bool = False
    """Nobody said how many experts there are, so that `num_experts` is the largest id + 1."""

    def __post_init__(self) -> None:
        ids = self.expert_ids_SLK
        if ids.ndim != 3 or ids.size == 0:
            raise TraceError(f"expert ids have shape {list(ids.shape)}, not [tokens, layers, experts a token]")
        if ids.max() >= self.num_experts or ids.min() < -1:
            wrong = ids.max() if ids.max() >= self.num_experts else ids.min()
            raise TraceError(f"expert id {wrong} is out of range, 0 to {self.num_experts - 1}")

    @property
    def num_tokens(self) -> int:
        return self.expert_ids_SLK.shape[0]

    @property
    def num_layers(self) -> int:
        return self.expert_ids_SLK.shape[1]

    @property
    def top_k(self) -> int:
        return self.expert_ids_SLK.shape[2]

    def source_among(self, num_gpus: int) -> NDArray[np.integer] | None:
        """[S]: `source_S`, if each of the GPUs 0 to G − 1 had tokens, and no other; None: it says nothing of them."""
        source_S = self.source_S
        known = source_S is not None and np.array_equal(np.unique(source_S), np.arange(num_gpus))
        return source_S if known else None

    def select(self, tokens: NDArray[np.bool_] | slice) -> Trace:
        """The trace of some of the tokens."""
        return replace(
            self,
            expert_ids_SLK=self.expert_ids_SLK[tokens],
            source_S=None if self.source_S is None else self.source_S[tokens],
            step_S=None if self.step_S is None else self.step_S[tokens],
        )

    def split(self, fraction: float = 0.2, seed: int = 0) -> tuple[Trace, Trace]:
        """The tokens to fit a placement to, and a `fraction` of them held out to judge it by, both in their order.

        Whole blocks of neighbours are held out, chosen at random among (at most) 100 equal ones. Neighbours are alike,
        being of one text and one step: with single tokens held out at random, the placement would have seen each one's
        neighbours, and with one block at the end it would be judged by the last steps alone. Raises TraceError if
        either part would be empty.
        """
        blocks = min(_BLOCKS, self.num_tokens)
        held_out = round(fraction * blocks)
        if not 0 < held_out < blocks:
            raise TraceError(
                f"{self.num_tokens} tokens cannot be split so that a fraction of {fraction:g} is held out; record more "
                "tokens, or choose a fraction between 0 and 1"
            )
        held_out_B = np.zeros(blocks, dtype=bool)
        held_out_B[np.random.default_rng(seed).choice(blocks, held_out, replace=False)] = True
        held_out_S = held_out_B[np.arange(self.num_tokens) * blocks // self.num_tokens]
        return self.select(~held_out_S), self.select(held_out_S)


def save_trace(path: Path, trace: Trace) -> None:
    """Write a compressed .npz that is complete or absent, of the smallest integers that hold the values.

    Its arrays are `schema_version` and `num_experts` (numbers), `expert_ids` [S, L, K] and, where known, `source` [S],
    `step` [S] and `layers` [L].
    """
    optional = {"source": trace.source_S, "step": trace.step_S, "layers": trace.layers}
    arrays: dict[str, Any] = {
        "schema_version": np.array(SCHEMA_VERSION),
        "num_experts": np.array(trace.num_experts),
        "expert_ids": _smallest(trace.expert_ids_SLK),
        **{name: _smallest(np.asarray(value)) for name, value in optional.items() if value is not None},
    }
    with written_aside(path) as aside, aside.open("wb") as file:
        np.savez_compressed(file, **arrays)


def load_trace(path: Path, num_experts: int | None = None) -> Trace:
    """Read a trace: a file of :func:`save_trace`; an .npz with `expert_ids`; an .npy; or a folder of .npz files, as a
    run records them, which are put one after the other (a run's own folder means its `trace`).

    Ids are integers [tokens, layers] or [tokens, layers, K]. `num_experts`: of the model; default: what the file says,
    else the largest id + 1. Raises TraceError, which names the file, what is wrong and what to do, for everything that
    is not such a trace: a file that is missing, damaged or of another kind, ids that are no experts, an expert that a
    token has twice, fewer pairs than experts.
    """
    if not path.is_dir():
        trace = _read(path, num_experts)
    else:
        trace = _joined([_read(file, num_experts) for file in _files(path)], path)
    pairs = int((trace.expert_ids_SLK[:, 0] >= 0).sum())
    if pairs < max(1, trace.num_experts):
        raise TraceError(
            f"{path}: too few tokens: {trace.num_tokens}, with {pairs} experts chosen among {trace.num_experts} in a "
            "layer; record more (placement.trace.tokens and .every)"
        )
    return trace


def _files(folder: Path) -> list[Path]:
    """The recordings in a folder, or in the run's that it is."""
    for candidate in (folder, folder / "trace"):
        if files := sorted(file for file in candidate.glob("*.npz") if not file.name.startswith(".")):
            return files
    raise TraceError(f"{folder}: no .npz files in this folder; record some with placement.trace.every")


def _read(path: Path, num_experts: int | None) -> Trace:
    """One file."""
    arrays = _arrays(path)
    version = _number(path, arrays, "schema_version")
    if version not in (None, SCHEMA_VERSION):
        raise TraceError(
            f"{path}: schema_version is {version}, and this moetrain reads {SCHEMA_VERSION}; record it again"
        )
    if "expert_ids" not in arrays:
        raise TraceError(
            f"{path}: no array `expert_ids` (there are: {', '.join(arrays) or 'none'}); name the ids [tokens, layers] "
            "or [tokens, layers, experts a token] so"
        )
    ids = _integers(path, "expert_ids", arrays["expert_ids"])
    if ids.ndim not in (2, 3) or ids.size == 0:
        raise TraceError(
            f"{path}: expert_ids has shape {list(ids.shape)}; save it as [tokens, layers] or [tokens, layers, experts "
            "a token], none of them 0"
        )
    ids_SLK = _smallest(ids if ids.ndim == 3 else ids[:, :, None])
    declared = _number(path, arrays, "num_experts")
    if None not in (declared, num_experts) and declared != num_experts:
        raise TraceError(f"{path}: is of {declared} experts, not {num_experts}; use a trace of this model")
    known = num_experts if declared is None else declared
    source_S = _for_each(path, arrays, "source", ids_SLK.shape[0], "token")
    step_S = _for_each(path, arrays, "step", ids_SLK.shape[0], "token")
    layers_L = _for_each(path, arrays, "layers", ids_SLK.shape[1], "layer")
    try:
        trace = Trace(
            expert_ids_SLK=ids_SLK,
            num_experts=int(ids_SLK.max()) + 1 if known is None else known,
            source_S=source_S,
            step_S=step_S,
            layers=None if layers_L is None else tuple(layers_L.tolist()),
            inferred_experts=known is None,
        )
    except TraceError as error:
        raise TraceError(f"{path}: {error}; use a trace of this model, with ids from 0, and −1 for none") from None
    _check_different(path, trace)
    return trace


def _arrays(path: Path) -> dict[str, NDArray[Any]]:
    """The arrays of an .npz by name; of an .npy, as `expert_ids`. Never unpickles anything."""
    kind = "file"
    try:
        with path.open("rb") as file:
            start = file.read(6)
            file.seek(0)
            if start == b"\x93NUMPY":
                kind = ".npy file"
                return {"expert_ids": np.lib.format.read_array(file, allow_pickle=False)}
            if start[:4] in (b"PK\x03\x04", b"PK\x05\x06"):
                kind = ".npz file"
                with np.load(file, allow_pickle=False) as archive:
                    return {name: archive[name] for name in archive.files}
    except OSError as error:
        raise TraceError(f"{path}: {error.strerror or error}; give a trace file or a folder of them") from None
    except MemoryError:
        raise TraceError(f"{path}: does not fit into memory; record or select fewer tokens") from None
    except (ValueError, EOFError, RuntimeError, zipfile.BadZipFile, zlib.error) as error:
        if "allow_pickle" in str(error):
            raise TraceError(
                f"{path}: holds pickled Python objects, which could run code when loaded; save the ids as a plain "
                "integer array"
            ) from None
        reason = (str(error).splitlines() or [type(error).__name__])[0]
        raise TraceError(f"{path}: not a whole {kind} ({reason}); copy or record it again") from None
    raise TraceError(f"{path}: neither .npz nor .npy; save it with numpy.savez_compressed(path, expert_ids=…)")


def _integers(path: Path, name: str, array: NDArray[Any]) -> NDArray[np.integer]:
    if not isinstance(array, np.ndarray):  # a member of the archive that is no .npy
        raise TraceError(f"{path}: {name} is not an array; save it with numpy.savez_compressed(path, {name}=…)")
    if array.dtype.kind not in "iu":
        nan = array.dtype.kind == "f" and bool(np.isnan(array).any())
        raise TraceError(
            f"{path}: {name} is {array.dtype}{', with NaN' if nan else ''}; save it as integers"
            f"{', with −1 for none' if nan else ''}"
        )
    return array


def _number(path: Path, arrays: dict[str, NDArray[Any]], name: str) -> int | None:
    if name not in arrays:
        return None
    array = _integers(path, name, arrays[name])
    if array.size != 1 or array.item() < 1:
        raise TraceError(f"{path}: {name} must be one positive number; save it as one, or leave it out")
    return int(array.item())


def _for_each(
    path: Path, arrays: dict[str, NDArray[Any]], name: str, number: int, of: str
) -> NDArray[np.integer] | None:
    if name not in arrays:
        return None
    array = _integers(path, name, arrays[name])
    if array.shape != (number,) or array.min() < 0:
        raise TraceError(
            f"{path}: {name} has shape {list(array.shape)}; it must have a number from 0 for each {of}, [{number}]"
        )
    return array


def _check_different(path: Path, trace: Trace) -> None:
    """The K experts of a token are different ones."""
    sorted_SLK = np.sort(trace.expert_ids_SLK, axis=-1)
    twice_SLK = (sorted_SLK[..., 1:] == sorted_SLK[..., :-1]) & (sorted_SLK[..., 1:] >= 0)
    if twice_SLK.any():
        token, layer, k = (int(place) for place in np.argwhere(twice_SLK)[0])
        raise TraceError(
            f"{path}: token {token} has expert {sorted_SLK[token, layer, k]} twice in layer {layer}; a token's experts "
            "are different ones: put −1 for none"
        )


def _joined(traces: Sequence[Trace], folder: Path) -> Trace:
    """One trace after the other, padded to the largest K. Sources and steps are kept if all traces have them."""
    models = {(trace.num_experts, trace.num_layers, trace.layers) for trace in traces}
    if len(models) > 1:
        described = " and ".join(
            f"{experts} experts in {layers} layers" for experts, layers, _ in sorted(models, key=str)[:2]
        )
        raise TraceError(
            f"{folder}: its files are of different models ({described}); keep the recordings of one run in a folder, "
            "and if the files do not say how many experts there are, give their number"
        )
    top_k = max(trace.top_k for trace in traces)
    ids = [trace.expert_ids_SLK for trace in traces]
    if any(trace.top_k < top_k for trace in traces):
        signed = np.result_type(*ids, np.int8)
        ids = [
            np.pad(part.astype(signed), ((0, 0), (0, 0), (0, top_k - part.shape[2])), constant_values=-1)
            for part in ids
        ]
    sources = [trace.source_S for trace in traces if trace.source_S is not None]
    steps = [trace.step_S for trace in traces if trace.step_S is not None]
    return replace(
        traces[0],
        expert_ids_SLK=np.concatenate(ids),
        source_S=np.concatenate(sources) if len(sources) == len(traces) else None,
        step_S=np.concatenate(steps) if len(steps) == len(traces) else None,
        inferred_experts=any(trace.inferred_experts for trace in traces),
    )


def _smallest(array: NDArray[np.integer]) -> NDArray[np.integer]:
    """The same values in the narrowest integers, unsigned where none is negative."""
    dtype = np.result_type(np.min_scalar_type(int(array.min())), np.min_scalar_type(int(array.max())))
    return array.astype(dtype)
