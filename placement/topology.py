"""The machine: GPUs, the switches and links between them, and what a byte costs from one GPU to another.

Shapes: G GPUs, V vertices of the graph (GPUs and switches), X directions of its links (two a link).
"""

from __future__ import annotations

from collections.abc import Hashable
from dataclasses import dataclass
from functools import cached_property

import networkx as nx
import numpy as np
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from moetrain.errors import PlacementError

Floats = NDArray[np.float64]
Vertex = Hashable
"""A GPU's number, or the name of a switch."""


@dataclass(frozen=True)
class Link:
    """One direction of a link; the other is alike."""

    bandwidth: float
    """Bytes a second."""
    latency: float
    """Seconds."""


NVLINK = Link(450e9, 2e-6)
"""All NVLinks of an H100 together, as the datasheet has them; the latency is of the right order."""


class Topology:
    """GPUs 0 … G − 1 and switches, joined by links of which each direction has its own bandwidth.

    Between two GPUs data takes the path of the largest bottleneck bandwidth, and of these the one of the least summed
    latency. Switches pass data on, GPUs do not. Raises PlacementError if GPUs are not numbered so, or two of them have
    no path.
    """

    bandwidth_GG: Floats
    """[G, G] bytes a second that the narrowest link of the path passes; infinite from a GPU to itself."""
    latency_GG: Floats
    """[G, G] seconds, the sum over the path."""

    def __init__(self, graph: nx.Graph, internode_weight: float | None = None):
        """`graph`: vertices are GPUs by number, with their `node` (a number), and switches by name; edges have
        `bandwidth` in bytes a second and `latency` in seconds. `internode_weight`: see :attr:`distance_GG`."""
        gpus = [vertex for vertex in graph if isinstance(vertex, int)]
        if sorted(gpus) != list(range(len(gpus))) or not gpus:
            raise PlacementError(f"GPUs must be numbered from 0 without gaps, and are {sorted(gpus)}")
        self.graph = graph
        self.num_gpus = len(gpus)
        self.node_G = np.array([graph.nodes[gpu]["node"] for gpu in range(self.num_gpus)])
        """The node (host) of each GPU."""
        self.internode_weight = internode_weight
        self.bandwidth_GG, self.latency_GG, self._way_GG, self._before = self._paths()
        unreached = np.argwhere(self.bandwidth_GG == 0)
        if len(unreached):
            source, target = unreached[0]
            raise PlacementError(f"not connected: no path from GPU {source} to GPU {target} (GPUs pass nothing on)")

    @staticmethod
    def uniform(num_gpus: int) -> Topology:
        """GPUs of one node on one switch, with an H100's NVLinks: every two of them are as far apart."""
        return Topology.of_nodes(1, num_gpus, NVLINK, None)

    @staticmethod
    def of_nodes(
        nodes: int, gpus_per_node: int, nvlink: Link, network: Link | None, internode_weight: float | None = None
    ) -> Topology:
        """Equal nodes: the GPUs of each on a switch, and each GPU with its own port to the network.

        `nvlink` and `network` are the way from GPU to GPU; each of its two hops has half of the latency.
        """
        graph = nx.Graph()
        for gpu in range(nodes * gpus_per_node):
            node = gpu // gpus_per_node
            graph.add_node(gpu, node=node)
            join(graph, gpu, f"nvlink {node}", nvlink, hops=2)
            if network is not None:
                join(graph, gpu, "network", network, hops=2)
        return Topology(graph, internode_weight)

    @property
    def num_nodes(self) -> int:
        return len(set(self.node_G.tolist()))

    @property
    def seconds_per_byte_GG(self) -> Floats:
        """[G, G]: 1 / bandwidth of the path; 0 from a GPU to itself."""
        return 1 / self.bandwidth_GG

    @cached_property
    def distance_GG(self) -> Floats:
        """[G, G]: what a row costs on its way, relative to the best way between two GPUs here, which costs 1.

        0 from a GPU to itself, else the largest bandwidth between any two GPUs, divided by this path's. With an
        `internode_weight`: 1 within a node, and that between nodes.
        """
        other_GG = ~np.eye(self.num_gpus, dtype=bool)
        if self.internode_weight is not None:
            across_GG = self.node_G[:, None] != self.node_G
            return np.where(across_GG, self.internode_weight, other_GG.astype(float))
        fastest = self.bandwidth_GG[other_GG].max(initial=0.0)
        return fastest / self.bandwidth_GG

    @cached_property
    def links(self) -> list[tuple[Vertex, Vertex]]:
        """[X]: the directions of all links, as (from, to)."""
        return [*self.graph.edges, *((b, a) for a, b in self.graph.edges)]

    @cached_property
    def link_bandwidth_X(self) -> Floats:
        """[X]: bytes a second of each direction of :attr:`links`."""
        return np.array([self.graph.edges[link]["bandwidth"] for link in self.links])

    def path(self, source: int, target: int) -> list[Vertex]:
        """The vertices from a GPU to another, both included."""
        links = [self.links[link] for link in self.path_links_HGG[::-1, source, target] if link < len(self.links)]
        return [source, *(to for _, to in links)]

    @cached_property
    def path_links_HGG(self) -> NDArray[np.intp]:
        """[H, G, G]: the links (in :attr:`links`) of the path from a GPU to another, the last first; X for no more."""
        number = {vertex: index for index, vertex in enumerate(self._vertices)}
        none = len(self.links)
        link_VV = np.full((len(number),) * 2, none)
        for index, (a, b) in enumerate(self.links):
            link_VV[number[a], number[b]] = index
        source_GG, at_GG = np.indices((self.num_gpus,) * 2)
        hops = []
        while (at_GG != source_GG).any():
            before_GG = np.where(at_GG == source_GG, at_GG, self._before[self._way_GG, source_GG, at_GG])
            hops.append(np.where(at_GG == source_GG, none, link_VV[before_GG, at_GG]))
            at_GG = before_GG
        return np.array(hops, dtype=np.intp).reshape(-1, self.num_gpus, self.num_gpus)

    def link_bytes_X(self, bytes_GG: Floats) -> Floats:
        """[X]: bytes over each direction of :attr:`links`, if `bytes_GG` [from, to] all take their paths."""
        total_X = np.zeros(len(self.links) + 1)
        for link_GG in self.path_links_HGG:
            total_X += np.bincount(link_GG.ravel(), bytes_GG.ravel(), len(total_X))
        return total_X[:-1]

    @cached_property
    def _vertices(self) -> list[Vertex]:
        """[V]: the GPUs in order, then the switches."""
        return [*range(self.num_gpus), *(vertex for vertex in self.graph if not isinstance(vertex, int))]

    def _paths(self) -> tuple[Floats, Floats, NDArray[np.intp], NDArray[np.intp]]:
        """Bandwidth and latency [G, G] of the best paths, and the way back along them: the index of a bandwidth
        [G, G], and for each of these, source and vertex the vertex before [·, G, V].

        For one bandwidth after the other, from the largest, shortest paths by latency over the links that have it.
        """
        number = {vertex: index for index, vertex in enumerate(self._vertices)}
        gpus, vertices = self.num_gpus, len(number)
        from_X, to_X = (np.array([number[link[end]] for link in self.links], np.intp) for end in (0, 1))
        bandwidth_X = self.link_bandwidth_X
        latency_X = np.array([self.graph.edges[link]["latency"] for link in self.links])
        # A GPU only begins paths or ends them: where they begin, it is another vertex, behind all others.
        start_X = np.where(from_X < gpus, from_X + vertices, from_X)
        bandwidth_GG = np.diag(np.full(gpus, np.inf))
        latency_GG = np.zeros((gpus, gpus))
        way_GG = np.zeros((gpus, gpus), dtype=np.intp)
        before = []
        for way, bandwidth in enumerate(np.unique(bandwidth_X)[::-1]):
            wide_X = bandwidth_X >= bandwidth
            graph = sparse.csr_matrix((latency_X[wide_X], (start_X[wide_X], to_X[wide_X])), (vertices + gpus,) * 2)
            latency_GV, before_GV = csgraph.dijkstra(
                graph, indices=np.arange(gpus) + vertices, return_predecessors=True
            )
            new_GG = (bandwidth_GG == 0) & np.isfinite(latency_GV[:, :gpus])
            bandwidth_GG[new_GG] = bandwidth
            latency_GG[new_GG] = latency_GV[:, :gpus][new_GG]
            way_GG[new_GG] = way
            before.append(np.where(before_GV >= vertices, before_GV - vertices, before_GV)[:, :vertices])
            if bandwidth_GG.all():
                break
        return bandwidth_GG, latency_GG, way_GG, np.array(before)


def join(graph: nx.Graph, a: Vertex, b: Vertex, link: Link, hops: int = 1) -> None:
    """Add one of the `hops` links that are together a way like `link`."""
    graph.add_edge(a, b, bandwidth=link.bandwidth, latency=link.latency / hops)
