"""What a placement costs: load, hops between layers, rows on the wire, and weighted sums of them.

Every term is a chain over the layers: what each layer costs on its own, and what each pair of neighbours costs. So
the search can price all moves of a layer in one table, and small instances can be solved exactly, layer by layer.

Shapes: L layers, E experts, G GPUs, U distinct rows (source and expert set), N (row, expert) pairs, X and Y candidate
assignments of a layer.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.optimize import linear_sum_assignment

from moetrain.errors import PlacementError
from moetrain.placement import moetuner, statistics
from moetrain.placement.load import load_bound_L
from moetrain.placement.placement import Assignment
from moetrain.placement.sums import parse_sum
from moetrain.placement.topology import Topology
from moetrain.placement.trace import Trace

Table = NDArray[np.float64]


class Objective(Protocol):
    """A cost of a placement, to be minimised. Assignments are int [L, E], GPUs of experts."""

    def cost(self, gpu_LE: Assignment) -> float: ...

    def lower_bound(self, num_gpus: int, least: int, most: int) -> float:
        """No more than the cost of any assignment with `least` to `most` experts of each layer on each GPU."""
        ...


class Term(Objective, Protocol):
    """A cost that is a chain over the layers, with tables of all its changes."""

    @property
    def symmetric(self) -> bool:
        """Renaming the GPUs, alike in all layers, changes no cost."""
        ...

    def within(self, layer: int, gpu_XE: Assignment, num_gpus: int) -> Table:
        """[X]: what the layer costs on its own, for each of X assignments of it."""
        ...

    def arrivals(self, layer: int, gpu_XE: Assignment) -> Table | None:
        """[X, E, G]: what the step to an expert of the next layer costs if that is on a GPU, for each of X assignments
        of the layer; the sum over experts is the step's cost. None: steps cost nothing."""
        ...

    def moves(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        """[E, G]: the exact change of the cost if one expert of the layer moved to a GPU and all else stayed."""
        ...

    def swaps(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        """[E, E]: the exact change of the cost if two experts of the layer changed places."""
        ...

    def linear(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table | None:
        """[E, G]: costs whose sum over the layer's experts is, up to a constant, the cost as a function of this layer
        alone, all others fixed; None where it is no such sum."""
        ...


@dataclass(frozen=True, eq=False)
class LoadTerm:
    """Σ_l max_g Σ_{e on g} load: pairs on each layer's fullest GPU, for which a step waits, per token."""

    load_LE: Table

    @property
    def symmetric(self) -> bool:
        return True

    def cost(self, gpu_LE: Assignment) -> float:
        num_gpus = int(gpu_LE.max()) + 1
        return float(sum(self.within(layer, gpu_E[None], num_gpus)[0] for layer, gpu_E in enumerate(gpu_LE)))

    def within(self, layer: int, gpu_XE: Assignment, num_gpus: int) -> Table:
        gpus = np.arange(num_gpus)
        total_XG = np.einsum("xeg,e->xg", gpu_XE[:, :, None] == gpus, self.load_LE[layer])
        return total_XG.max(1)

    def arrivals(self, layer: int, gpu_XE: Assignment) -> None:
        return None

    def moves(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        gpu_E, load_E = gpu_LE[layer], self.load_LE[layer]
        total_G, others_GG = self._totals(layer, gpu_LE, num_gpus)
        left_E1 = (total_G[gpu_E] - load_E)[:, None]
        peak_EG = np.maximum(np.maximum(left_E1, total_G + load_E[:, None]), others_GG[gpu_E])
        change_EG = peak_EG - total_G.max()
        change_EG[np.arange(len(gpu_E)), gpu_E] = 0
        return change_EG

    def swaps(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        gpu_E, load_E = gpu_LE[layer], self.load_LE[layer]
        total_G, others_GG = self._totals(layer, gpu_LE, num_gpus)
        # Where the first expert was, its load leaves and the second's arrives; the transpose is the second's GPU.
        first_EE = (total_G[gpu_E] - load_E)[:, None] + load_E
        peak_EE = np.maximum(np.maximum(first_EE, first_EE.T), others_GG[gpu_E[:, None], gpu_E])
        return np.where(gpu_E[:, None] == gpu_E, 0.0, peak_EE - total_G.max())

    def linear(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> None:
        return None

    def lower_bound(self, num_gpus: int, least: int, most: int) -> float:
        """Of each layer: see :func:`moetrain.placement.load.load_bound_L`."""
        return float(load_bound_L(self.load_LE, num_gpus, least, most).sum())

    def _totals(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> tuple[Table, Table]:
        """[G]: the load of each GPU; [G, G]: the largest among the others, where it matters for an exchange of two."""
        total_G: Table = np.bincount(gpu_LE[layer], self.load_LE[layer], minlength=num_gpus).astype(np.float64)
        gpus = np.arange(num_gpus)
        others_GG = np.full((num_gpus, num_gpus), -np.inf)
        # The two fullest are enough: whatever two GPUs exchange, the fuller of them has at least their mean.
        for gpu in np.argsort(-total_G)[1::-1]:
            others_GG[(gpus[:, None] != gpu) & (gpus != gpu)] = total_G[gpu]
        return total_G, others_GG


@dataclass(frozen=True, eq=False)
class HopTerm:
    """Σ_l Σ_ef transitions[l, e, f] · distance[GPU of e, GPU of f]: ExFlow's objective (arXiv 2401.08383, section IV).

    With distance 1 between any two GPUs it is the mean number of layer boundaries at which a token changes GPU.
    """

    transitions_LEE: Table
    """[L − 1, E, E]: the fraction of tokens that go from an expert to one of the next layer."""
    distance_GG: Table

    @property
    def symmetric(self) -> bool:
        return uniform(self.distance_GG)

    def cost(self, gpu_LE: Assignment) -> float:
        distance_LEE = self.distance_GG[gpu_LE[:-1, :, None], gpu_LE[1:, None, :]]
        return float(np.einsum("lef,lef->", self.transitions_LEE, distance_LEE))

    def within(self, layer: int, gpu_XE: Assignment, num_gpus: int) -> Table:
        return np.zeros(len(gpu_XE))

    def arrivals(self, layer: int, gpu_XE: Assignment) -> Table:
        return np.matmul(self.transitions_LEE[layer].T, self.distance_GG[gpu_XE])

    def moves(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        linear_EG = self.linear(layer, gpu_LE, num_gpus)
        return linear_EG - np.take_along_axis(linear_EG, gpu_LE[layer][:, None], 1)

    def swaps(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        change_EE = self.moves(layer, gpu_LE, num_gpus)[:, gpu_LE[layer]]
        return change_EE + change_EE.T

    def linear(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        linear_EG = np.zeros((gpu_LE.shape[1], num_gpus))
        if layer > 0:
            linear_EG += self.transitions_LEE[layer - 1].T @ self.distance_GG[gpu_LE[layer - 1], :num_gpus]
        if layer < len(gpu_LE) - 1:
            linear_EG += self.transitions_LEE[layer] @ self.distance_GG[:num_gpus, gpu_LE[layer + 1]].T
        return linear_EG

    def lower_bound(self, num_gpus: int, least: int, most: int) -> float:
        """An expert has at most `most` partners of the next layer on its own GPU, and only so many within any other
        distance; at best they are its heaviest partners. Either side of a boundary bounds it so."""
        transitions_LEE, bound = self.transitions_LEE, 0.0
        for nearer, farther, reached in reaches(self.distance_GG[:num_gpus, :num_gpus]):
            rest = max(transitions_LEE.shape[1] - reached * most, 0)
            forward_L = np.sort(transitions_LEE, axis=2)[:, :, :rest].sum((1, 2))
            backward_L = np.sort(transitions_LEE, axis=1)[:, :rest].sum((1, 2))
            bound += (farther - nearer) * float(np.maximum(forward_L, backward_L).sum())
        return bound


@dataclass(frozen=True, eq=False)
class TrafficTerm:
    """Σ_l Σ_(source, expert set) tokens · Σ_{GPUs that hold some of the set} distance[source, GPU].

    With distance 1 between any two GPUs: the rows that a token's dispatch sends, once per destination, in all layers.
    """

    rows: tuple[Rows, ...]
    """Of each layer."""
    distance_SG: Table
    """From each source; one row, the mean over the GPUs, where sources are not known."""

    @staticmethod
    def from_trace(trace: Trace, distance_GG: Table) -> TrafficTerm:
        """Sources that are not the GPUs 0 to G − 1, each with some tokens, are those of another world, or none: then
        every GPU is the source of an equal part of each row."""
        source_S, distance_SG = trace.source_among(len(distance_GG)), distance_GG
        if source_S is None:
            source_S, distance_SG = np.zeros(trace.num_tokens, np.int64), distance_GG.mean(0, keepdims=True)
        layers = range(trace.num_layers)
        rows = tuple(Rows.count(trace.expert_ids_SLK[:, layer], source_S, trace.num_experts) for layer in layers)
        return TrafficTerm(rows, distance_SG)

    @property
    def symmetric(self) -> bool:
        """With known sources the GPUs have parts of their own, whatever the distances."""
        return len(self.distance_SG) == 1 and bool(np.ptp(self.distance_SG) == 0)

    def cost(self, gpu_LE: Assignment) -> float:
        num_gpus = self.distance_SG.shape[1]
        return float(sum(self.within(layer, gpu_E[None], num_gpus)[0] for layer, gpu_E in enumerate(gpu_LE)))

    def within(self, layer: int, gpu_XE: Assignment, num_gpus: int) -> Table:
        rows = self.rows[layer]
        price_UG = rows.weight_U[:, None] * self.distance_SG[rows.source_U, :num_gpus]
        return np.array([price_UG[rows.held_UG(gpu_E, num_gpus) > 0].sum() for gpu_E in gpu_XE])

    def arrivals(self, layer: int, gpu_XE: Assignment) -> None:
        return None

    def moves(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        return self._moves(layer, gpu_LE, num_gpus)[0]

    def swaps(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        gpu_E, rows = gpu_LE[layer], self.rows[layer]
        change_EG, saved_N = self._moves(layer, gpu_LE, num_gpus)
        # A row that has both experts still reaches both GPUs: what it seemed to save is no saving.
        saved_UE = sparse.csr_array((saved_N, rows.expert_N, rows.first_U), shape=rows.members_UE.shape)
        both_EE = (saved_UE.T @ rows.members_UE).toarray()
        change_EE = change_EG[:, gpu_E] + both_EE
        return np.where(gpu_E[:, None] == gpu_E, 0.0, change_EE + change_EE.T)

    def linear(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> None:
        return None

    def lower_bound(self, num_gpus: int, least: int, most: int) -> float:
        """A row with k experts reaches at least ⌈k / most⌉ GPUs, at best the nearest. And as at most min(k, most) of
        them share a GPU, it costs at least each expert's own distance over that number: a sum over experts, whose
        least value under the bounds is a transport problem's. The larger of the two, in each layer."""
        distance_SG = self.distance_SG[:, :num_gpus]
        nearest_SG = np.pad(np.sort(distance_SG, axis=1).cumsum(1), ((0, 0), (1, 0)))
        bound = 0.0
        for rows in self.rows:
            size_U = np.diff(rows.first_U)
            reached = float(rows.weight_U @ nearest_SG[rows.source_U, -(-size_U // most)])
            share_U = rows.weight_U / np.clip(size_U, 1, most)
            share_SU = sparse.csr_array(
                (share_U, (rows.source_U, np.arange(len(share_U)))), (len(distance_SG), len(share_U))
            )
            linear_EG = (share_SU @ rows.members_UE).T @ distance_SG
            bound += max(
                reached, float(np.take_along_axis(linear_EG, transport(linear_EG, least, most)[:, None], 1).sum())
            )
        return bound

    def _moves(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> tuple[Table, Table]:
        """[E, G]: the change of each move; [N]: what a row saves if its expert leaves alone."""
        gpu_E, rows = gpu_LE[layer], self.rows[layer]
        held_UG = rows.held_UG(gpu_E, num_gpus)
        price_UG = rows.weight_U[:, None] * self.distance_SG[rows.source_U, :num_gpus]
        here_N = rows.row_N, gpu_E[rows.expert_N]
        saved_N = np.where(held_UG[here_N] == 1, price_UG[here_N], 0.0)
        saved_E = np.bincount(rows.expert_N, saved_N, minlength=len(gpu_E))
        price_UG[held_UG > 0] = 0
        change_EG = rows.members_UE.T @ price_UG - saved_E[:, None]
        change_EG[np.arange(len(gpu_E)), gpu_E] = 0
        return change_EG, saved_N


@dataclass(frozen=True, eq=False)
class Rows:
    """The distinct (source, expert set) of a layer, and what fraction of the tokens each is."""

    source_U: NDArray[np.int64]
    weight_U: Table
    members_UE: sparse.csr_array
    """1 where an expert is in the set."""
    row_N: NDArray[np.int64]
    """The row of each of the matrix' entries."""

    @staticmethod
    def count(expert_ids_SK: NDArray[np.integer], source_S: NDArray[np.integer], num_experts: int) -> Rows:
        """Rows of S tokens. Expert −1 is none."""
        keys = np.column_stack([source_S, np.sort(expert_ids_SK, axis=1)]).astype(np.int32)
        distinct, count_U = np.unique(keys, axis=0, return_counts=True)
        row_N, place_N = np.nonzero(distinct[:, 1:] >= 0)
        entries = np.ones(len(row_N)), (row_N, distinct[row_N, 1 + place_N])
        members_UE = sparse.csr_array(entries, shape=(len(distinct), num_experts))
        members_UE.sum_duplicates()
        members_UE.data[:] = 1
        row_N = np.repeat(np.arange(len(distinct)), np.diff(members_UE.indptr))
        return Rows(distinct[:, 0].astype(np.int64), count_U / len(expert_ids_SK), members_UE, row_N)

    @property
    def expert_N(self) -> NDArray[np.int32]:
        return self.members_UE.indices

    @property
    def first_U(self) -> NDArray[np.int32]:
        """[U + 1]: where each row's entries begin."""
        return self.members_UE.indptr

    def held_UG(self, gpu_E: NDArray[np.int64], num_gpus: int) -> NDArray[np.int64]:
        """[U, G]: how many of a row's experts each GPU holds."""
        place_N = self.row_N * num_gpus + gpu_E[self.expert_N]
        return np.bincount(place_N, minlength=len(self.weight_U) * num_gpus).reshape(-1, num_gpus)


@dataclass(frozen=True, eq=False)
class WeightedSum:
    """Σ weight · term, of weights that are not negative."""

    terms: Sequence[tuple[float, Term]]

    @property
    def symmetric(self) -> bool:
        return all(term.symmetric for _, term in self.terms)

    def cost(self, gpu_LE: Assignment) -> float:
        return sum(weight * term.cost(gpu_LE) for weight, term in self.terms)

    def within(self, layer: int, gpu_XE: Assignment, num_gpus: int) -> Table:
        return _sum([weight * term.within(layer, gpu_XE, num_gpus) for weight, term in self.terms])

    def arrivals(self, layer: int, gpu_XE: Assignment) -> Table | None:
        tables = [(weight, term.arrivals(layer, gpu_XE)) for weight, term in self.terms]
        costly = [weight * table for weight, table in tables if table is not None]
        return _sum(costly) if costly else None

    def moves(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        return _sum([weight * term.moves(layer, gpu_LE, num_gpus) for weight, term in self.terms])

    def swaps(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table:
        return _sum([weight * term.swaps(layer, gpu_LE, num_gpus) for weight, term in self.terms])

    def linear(self, layer: int, gpu_LE: Assignment, num_gpus: int) -> Table | None:
        tables = []
        for weight, term in self.terms:
            table = term.linear(layer, gpu_LE, num_gpus)
            if table is None:
                return None
            tables.append(weight * table)
        return _sum(tables)

    def lower_bound(self, num_gpus: int, least: int, most: int) -> float:
        """Each term's least value, as if all could be had at once."""
        return sum(weight * term.lower_bound(num_gpus, least, most) for weight, term in self.terms)


def _sum(tables: list[Table]) -> Table:
    return np.sum(tables, axis=0)


@dataclass(frozen=True, eq=False)
class TwoStages:
    """MoETuner's objective: deviation of loads from their mean, and only where it is the same the busiest links.

    As one number: deviations that differ by less than a millionth of a token's busiest link are the same. See
    :mod:`moetrain.placement.moetuner`.
    """

    load_LE: Table
    transitions_LEE: Table
    link_cost_GG: Table

    LINKS = 1e-6

    def cost(self, gpu_LE: Assignment) -> float:
        deviation = moetuner.deviation(self.load_LE, gpu_LE, len(self.link_cost_GG))
        return deviation + self.LINKS * moetuner.links(self.transitions_LEE, self.link_cost_GG, gpu_LE)

    def lower_bound(self, num_gpus: int, least: int, most: int) -> float:
        """Both are sums of what is not negative."""
        return 0.0


def parts(objective: Objective) -> list[tuple[float, Objective]]:
    """The weights and terms of a sum; of another objective, itself."""
    return list(objective.terms) if isinstance(objective, WeightedSum) else [(1.0, objective)]


NAMES = ("load", "traffic", "hops")


def objective(name: str, trace: Trace, topology: Topology) -> Objective:
    """The objective of that name: load, traffic or hops, a sum like ``load+0.5*traffic``, or moetuner.

    Raises PlacementError where the name is none of these, a weight no positive number, or one layer is to have hops.
    """
    if name == "moetuner":
        return TwoStages(statistics.load_LE(trace), statistics.transitions_LEE(trace), topology.distance_GG)
    try:
        parts = parse_sum(name, NAMES)
    except PlacementError as error:
        raise PlacementError(f"objective {name!r}: {error}; moetuner stands alone") from None
    terms = [(weight, _term(part, trace, topology)) for weight, part in parts]
    return terms[0][1] if len(terms) == 1 and terms[0][0] == 1 else WeightedSum(terms)


def _term(name: str, trace: Trace, topology: Topology) -> Term:
    if name == "load":
        return LoadTerm(statistics.load_LE(trace))
    if name == "hops":
        if trace.num_layers == 1:
            raise PlacementError(
                "objective hops counts steps from layer to layer, and the trace has one layer: choose load or traffic"
            )
        return HopTerm(statistics.transitions_LEE(trace), topology.distance_GG)
    return TrafficTerm.from_trace(trace, topology.distance_GG)


def transport(cost_EG: Table, least: int, most: int) -> NDArray[np.int64]:
    """[E]: the GPUs of a layer's experts for the least Σ cost, with `least` to `most` experts on each GPU.

    An assignment of experts to slots, `most` of each GPU; slots that would leave a GPU below `least` are taken by
    nobody else: experts that do not exist fill only the others.
    """
    num_experts, num_gpus = cost_EG.shape
    slots = np.repeat(np.arange(num_gpus), most)
    cost = cost_EG[:, slots]
    spare = len(slots) - num_experts
    if spare:
        optional = np.tile(np.arange(most) >= least, num_gpus)
        cost = np.vstack([cost, np.broadcast_to(np.where(optional, 0.0, np.inf), (spare, len(slots)))])
    return slots[linear_sum_assignment(cost)[1][:num_experts]]


def uniform(distance_GG: Table) -> bool:
    """All GPUs are equally far from one another, and from themselves."""
    off_diagonal = ~np.eye(len(distance_GG), dtype=bool)
    return all(
        np.ptp(distances) == 0 for distances in (distance_GG.diagonal(), distance_GG[off_diagonal]) if distances.size
    )


def reaches(distance_GG: Table) -> list[tuple[float, float, int]]:
    """(d, the next larger distance, at most how many GPUs are within d of any GPU), for every distance but the last."""
    steps = np.unique(np.append(distance_GG, 0.0))
    return [
        (float(nearer), float(farther), int((distance_GG <= nearer).sum(1).max()))
        for nearer, farther in pairwise(steps)
    ]
