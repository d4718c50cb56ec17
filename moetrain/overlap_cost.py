"""Whether it pays to split a micro-batch, and where: the time of its layers whole, and as two halves in turn.

A model of a few constants, which `moetrain tune overlap` measures once for a machine (:class:`Machine`):

- a matrix product takes as many waves as its tiles are turns of all multiprocessors, and no less than the smallest one
- attention and element-wise work go by rates, collectives by latency and bandwidth
- where a collective runs beside computation, `gain` of the shorter of the two is saved
- a pass is never faster than the host issues it, and halves are twice as many kernels

What is the same in both ways (embedding, loss, optimiser, reduction of gradients) is left out. Routing is taken as
even.

Arrays end in 2: forward and backward pass. Shapes: T tokens of a rank, D width, E experts on this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from math import comb
from typing import Any, NamedTuple

import numpy as np

from moetrain.config import Config
from moetrain.flops import parameters
from moetrain.parallel.wire import homeward, row_bytes
from moetrain.plan import compute_dtype

MARGIN = 0.05
"""Of the time of the layers that the model must promise to save: it is no more exact than that."""
ALIKE = 0.01
"""Of the time of the halves, by which an uneven split must be faster than a more even one."""
TILE = (128, 256)
"""Rows and columns of a product that a multiprocessor computes at a time: the fastest tile of cuBLAS and of ours."""
SPLIT_INNER = 1024
"""A product of fewer tiles than multiprocessors is split along its inner dimension, into parts no shorter than this."""
ELEMENTWISE_2 = np.array([8.0, 16.0])
"""Times that norms, sums, routing and gathering between two products read or write a row of D numbers, roughly: it is
the same work in both ways, and hides communication."""
BYTES = {"float32": 4, "bfloat16": 2, "float64": 8}


@dataclass(frozen=True)
class Collective:
    """What a collective of one group takes: `latency` seconds, and bytes / `bandwidth`.

    Bytes are of the whole tensor [T, D] on all ranks of the group, for all_to_all of the rows that a rank sends.
    """

    latency: float
    bandwidth: float
    gain: float
    """Beside a matrix product: of the shorter of the two, the part that is saved; 0 if they take turns."""

    def seconds(self, size: float) -> float:
        return self.latency + size / self.bandwidth


@dataclass(frozen=True)
class HostTime:
    """Seconds in which the host issues one layer, forward and backward."""

    whole: float
    halves: float


@dataclass(frozen=True)
class Machine:
    """A machine's constants, of bfloat16 and of one rank."""

    multiprocessors: int
    kernel_seconds: float
    """Of the smallest matrix product."""
    product_rate: float
    """FLOP/s."""
    experts_rate: float
    """FLOP/s of the experts' products with all that belongs to them."""
    attention_rate: float
    attention_backward_rate: float
    bandwidth: float
    """Bytes/s read and written by a copy."""
    collectives: Mapping[str, Collective]
    """By :func:`collective_name`."""
    hosts: Mapping[str, HostTime]
    """By :func:`layer_name`."""

    @staticmethod
    def from_json(values: dict[str, Any]) -> Machine:
        """The inverse of dataclasses.asdict. Raises TypeError, KeyError or AttributeError for anything else."""
        collectives = {name: Collective(**each) for name, each in values["collectives"].items()}
        hosts = {name: HostTime(**each) for name, each in values["hosts"].items()}
        return Machine(**{**values, "collectives": collectives, "hosts": hosts})


def collective_name(kind: str, ranks: int) -> str:
    """`kind`: all_gather, reduce_scatter or all_reduce, with the norm beside it; or all_to_all."""
    return f"{kind} of {ranks}"


def layer_name(tp: bool, ep: bool, moe: bool, compiled: bool) -> str:
    """`tp`, `ep`: whether there are several ranks along it."""
    parts = [*(["tp"] if tp else []), *(["ep"] if ep and moe else []), "moe" if moe else "dense"]
    return " ".join([*parts, *(["compiled"] if compiled else [])])


class Prediction(NamedTuple):
    """Seconds of all layers, forward and backward, of one micro-batch."""

    whole: float
    halves: float
    host_bound: bool
    """Whether the halves wait for the host."""

    @property
    def pays(self) -> bool:
        return self.halves <= (1 - MARGIN) * self.whole


def best_split(config: Config, dp: int, machine: Machine) -> tuple[int, Prediction]:
    """Sequences of each tp rank in the first half, those of `parallel.overlap_split` or else the fastest; and how fast.

    A micro-batch must have two halves (:func:`moetrain.config.halves_obstacle`). Raises KeyError where the machine was
    not measured with groups or layers of this kind.
    """
    sequences = config.micro_batch(dp) // config.parallel.tp
    given = config.parallel.overlap_split
    costs = _Costs(config, machine)
    predictions = {
        first: costs.predict(first, sequences - first) for first in (range(1, sequences) if given is None else [given])
    }
    # Of those that are alike the most even one, with the larger half first, as without a measurement.
    limit = (1 + ALIKE) * min(prediction.halves for prediction in predictions.values())
    alike = [first for first, prediction in predictions.items() if prediction.halves <= limit]
    best = min(alike, key=lambda first: (abs(2 * first - sequences), -first))
    return best, predictions[best]


class _Layer(NamedTuple):
    """Seconds [4, 2] of the phases of a layer: before attention, attention, before the feed-forward network, itself."""

    computing: np.ndarray
    communicating: np.ndarray


class _Costs:
    """Times of one config's layers on one machine."""

    def __init__(self, config: Config, machine: Machine) -> None:
        self.config, self.machine = config, machine
        self.tp, self.ep = config.parallel.tp, config.parallel.ep
        self.size = BYTES[compute_dtype(config)]
        kinds = [("all_gather", self.tp), ("reduce_scatter", self.tp), ("all_reduce", self.tp), ("all_to_all", self.ep)]
        self.collectives = {
            kind: machine.collectives[collective_name(kind, ranks)] for kind, ranks in kinds if ranks > 1
        }
        self.gain = min(collective.gain for collective in self.collectives.values())

    def predict(self, first: int, second: int) -> Prediction:
        """For halves of so many sequences of each tp rank."""
        model, checkpointing = self.config.model, self.config.train.activation_checkpointing
        whole, halves = 0.0, self._doubled_weights()
        host_whole, host_halves = 0.0, 0.0
        known: dict[tuple[bool, bool, int], _Layer] = {}
        for layer in range(model.n_layers):
            moe = model.is_moe_layer(layer)
            selective = checkpointing.mode == "selective" and layer % checkpointing.every == 0
            for sequences in {first, second, first + second}:
                if (moe, selective, sequences) not in known:
                    known[moe, selective, sequences] = self._layer(moe, selective, sequences)
            a, b, both = (known[moe, selective, sequences] for sequences in (first, second, first + second))
            whole += float((both.computing + both.communicating).sum())
            halves += self._woven(a, b)
            if layer == 0:  # what a pass begins and ends with has nothing beside it
                halves += float(np.maximum(a.communicating[0], b.communicating[0]).sum())
            host = self.machine.hosts[layer_name(self.tp > 1, self.ep > 1, moe, self.config.train.compile)]
            again = 4 / 3 if selective else 1.0  # forward, backward twice as long, and forward again
            host_whole += again * host.whole
            host_halves += again * host.halves
        return Prediction(max(whole, host_whole), max(halves, host_halves), host_halves > halves)

    def _woven(self, a: _Layer, b: _Layer) -> float:
        """A layer of both halves; each phase that computes has one beside it that communicates, of the other half."""
        seconds = 0.0
        for x, computes, y, communicates in ((a, 1, b, 0), (b, 1, a, 2), (a, 3, b, 2), (b, 3, a, 0)):
            # Element-wise kernels take turns with the products.
            work_2 = x.computing[computes] + y.computing[communicates]
            wait_2 = y.communicating[communicates]
            saved_2 = self.gain * np.minimum(work_2, wait_2)
            seconds += float((x.communicating[computes] + work_2 + wait_2 - saved_2).sum())
        return seconds

    def _layer(self, moe: bool, selective: bool, sequences: int) -> _Layer:
        config, tp, ep = self.config, self.tp, self.ep
        model = config.model
        D, width = model.dim, model.head_width
        tokens = sequences * config.data.seq_len
        gathered = tokens * tp
        computing, communicating = np.zeros((4, 2)), np.zeros((4, 2))

        queries, keys = model.n_heads * width // tp, model.kv_heads * width // tp
        computing[1] = (
            self._product_2(gathered, D, queries)
            + 2 * self._product_2(gathered, D, keys)
            + self._product_2(gathered, queries, D)
            + self._attention_2(gathered, queries)
        )
        if moe:
            computing[3] = self._experts_2(tokens * config.router.top_k)
            if model.shared_dim:
                computing[3] += self._network_2(tokens, model.shared_dim)
        else:
            computing[3] = self._network_2(gathered, model.ffn_dim // tp)
        computing[[0, 2]] = tokens * D * self.size / self.machine.bandwidth * ELEMENTWISE_2

        if tp > 1:
            summed = gathered * D * self.size
            before = ("all_gather", "reduce_scatter") if moe else ("all_reduce", "all_reduce")
            communicating[0] = self._seconds_2(summed, *before)
            communicating[2] = self._seconds_2(summed, *(before[::-1] if moe else before))
        if selective:
            # Attention is computed again from what was not gathered: the gather is part of it, twice.
            computing[1, 1] += computing[1, 0]
            communicating[1] = communicating[0]
            communicating[1, 1] += communicating[0, 0]
            communicating[0] = 0.0
            if moe:
                computing[3, 1] += computing[3, 0]
        if moe and ep > 1:
            out, home = self._dispatched_bytes(tokens)
            exchange = self.collectives["all_to_all"]
            # Rows and gradients of sums travel as `out`, sums and gradients of rows as `home`.
            communicating[2] += [exchange.seconds(out), exchange.seconds(home)]
            communicating[0] += [exchange.seconds(home), exchange.seconds(out)]
            # Sizes, indices and weights; the gradients of weights.
            communicating[2] += [3 * exchange.latency, exchange.latency]
        return _Layer(computing, communicating)

    def _product_2(self, rows: int, inputs: int, outputs: int) -> np.ndarray:
        """A linear layer; backward are the gradients of its input and of its weight."""
        forward = self._product(rows, outputs, inputs)
        return np.array([forward, self._product(rows, inputs, outputs) + self._product(outputs, inputs, rows)])

    def _network_2(self, rows: int, inner: int) -> np.ndarray:
        """A feed-forward network: gate and up, and down."""
        D = self.config.model.dim
        return self._product_2(rows, D, 2 * inner) + self._product_2(rows, inner, D)

    def _experts_2(self, pairs: int) -> np.ndarray:
        """Those of this rank, to which as many pairs come as its tokens have."""
        D, inner = self.config.model.dim, self.config.model.expert_dim
        experts = self.config.model.num_experts // self.ep
        rows, rate = -(-pairs // experts), self.machine.experts_rate

        def product(m: int, n: int, k: int) -> float:
            return self._product(m, n, k, experts, rate)

        forward = product(rows, 2 * inner, D) + product(rows, D, inner)
        backward = product(rows, D, 2 * inner) + product(rows, inner, D)
        return np.array([forward, backward + product(2 * inner, D, rows) + product(D, inner, rows)])

    def _product(self, m: int, n: int, k: int, count: int = 1, rate: float | None = None) -> float:
        """`count` products [m, k] × [k, n]."""
        machine = self.machine
        tiles = count * -(-m // TILE[0]) * -(-n // TILE[1])
        parts = max(1, min(machine.multiprocessors // tiles, k // SPLIT_INNER))
        waves = -(-tiles * parts // machine.multiprocessors)
        tile_flops = 2 * TILE[0] * TILE[1] * k / parts
        rate = machine.product_rate if rate is None else rate
        return machine.kernel_seconds + waves * tile_flops * machine.multiprocessors / rate

    def _attention_2(self, tokens: int, width: int) -> np.ndarray:
        """Causal; the backward pass has five products where the forward pass has two."""
        flops = 2 * tokens * self.config.data.seq_len * width
        machine = self.machine
        seconds_2 = [flops / machine.attention_rate, 2.5 * flops / machine.attention_backward_rate]
        return machine.kernel_seconds + np.array(seconds_2)

    def _seconds_2(self, size: int, forward: str, backward: str) -> np.ndarray:
        return np.array([self.collectives[forward].seconds(size), self.collectives[backward].seconds(size)])

    def _dispatched_bytes(self, tokens: int) -> tuple[float, float]:
        """Of the rows that a rank sends, its own among them, to the experts and home."""
        model, ep, wire = self.config.model, self.ep, self.config.parallel.wire
        experts, top_k = model.num_experts, self.config.router.top_k
        rows = tokens * ep * (1 - comb(experts - experts // ep, top_k) / comb(experts, top_k))
        return rows * row_bytes(wire, model.dim, self.size), rows * row_bytes(homeward(wire), model.dim, self.size)

    def _doubled_weights(self) -> float:
        """What the second half costs for its own sake: its rounded copies of the weights, and adding its gradients."""
        count, own = parameters(self.config), BYTES[self.config.train.param_dtype]
        held = (count.attention + count.feed_forward) / self.tp + count.experts / self.ep
        held += count.shared_experts + count.routers
        traffic = 3 * own + (2 * (own + self.size) if self.size < own else 0)
        return held * traffic / self.machine.bandwidth
