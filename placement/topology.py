"""The machine: GPUs, the switches and links between them, and what a byte costs from one GPU to another.

Shapes: G GPUs, V vertices of the graph (GPUs and switches), X directions of its links (two a link).
"""

from __future__ import annotations

import re
import subprocess
from collections.abc import Hashable, Iterable, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import networkx as nx
import numpy as np
import yaml
from numpy.typing import NDArray
from scipy import sparse
from scipy.sparse import csgraph

from moetrain.errors import PlacementError, UserError

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
_NVLINK_BANDWIDTH = 25e9
"""Of one NVLink of the second to fourth generation (V100 to H200)."""
_MOST_NVLINKS = 18
"""That a GPU has; where its neighbours add up to more, there is a switch between them."""
_PCIE = {
    "PIX": Link(25e9, 3e-6),
    "PXB": Link(25e9, 3e-6),
    "PHB": Link(20e9, 4e-6),
    "NODE": Link(15e9, 5e-6),
    "SYS": Link(10e9, 6e-6),
}
"""Ways between GPUs as `nvidia-smi topo` names them, nearest first, at what PCIe 4.0 ×16 reaches, in round figures."""


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
        return Topology(_islands_graph([range(num_gpus)], NVLINK, None))

    @staticmethod
    def of_nodes(
        nodes: int, gpus_per_node: int, nvlink: Link, network: Link | None, internode_weight: float | None = None
    ) -> Topology:
        """Equal nodes: the GPUs of each on a switch, and each GPU with its own port to the network.

        `nvlink` and `network` are the way from GPU to GPU; each of its two hops has half of the latency.
        """
        gpus = np.arange(nodes * gpus_per_node).reshape(nodes, gpus_per_node).tolist()
        return Topology(_islands_graph(gpus, nvlink, network), internode_weight)

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
        before_V = self._before[self._way_GG[source, target], source]
        numbers = [target]
        while numbers[-1] != source:
            numbers.append(int(before_V[numbers[-1]]))
        return [self._vertices[number] for number in reversed(numbers)]

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
        edges = [(number[a], number[b], edge["bandwidth"], edge["latency"]) for a, b, edge in self.graph.edges.data()]
        from_X, to_X, bandwidth_X, latency_X = (
            (np.array(column) for column in zip(*edges, *((b, a, *rest) for a, b, *rest in edges), strict=True))
            if edges
            else (np.zeros(0, np.intp), np.zeros(0, np.intp), np.zeros(0), np.zeros(0))
        )
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


def _islands_graph(islands: Iterable[Iterable[int]], nvlink: Link, network: Link | None) -> nx.Graph:
    """Each island's GPUs, one node, on its switch, and all GPUs on the network."""
    graph = nx.Graph()
    for node, gpus in enumerate(islands):
        for gpu in gpus:
            graph.add_node(gpu, node=node)
            _join(graph, gpu, f"nvlink {node}", nvlink, hops=2)
            if network is not None:
                _join(graph, gpu, "network", network, hops=2)
    return graph


def _join(graph: nx.Graph, a: Vertex, b: Vertex, link: Link, hops: int = 1) -> None:
    """Add one of the `hops` links that are together a way like `link`."""
    graph.add_edge(a, b, bandwidth=link.bandwidth, latency=link.latency / hops)


# Files ----------------------------------------------------------------------------------------------------------------

_NODES_KEYS = ("nodes", "gpus_per_node", "nvlink", "network", "internode_weight")
_GRAPH_KEYS = ("links", "islands", "nodes", "internode_weight")
_LINK_KEYS = ("bandwidth", "latency")


def load_topology(path: Path) -> Topology:
    """Read a topology, in one of two forms of YAML.

    Equal nodes, whose GPUs are numbered node by node (`nvlink` and `network` are the ways from GPU to GPU, per GPU and
    direction; either may be left out where there is but one GPU a node, or one node)::

        nodes: 8
        gpus_per_node: 8
        nvlink: {bandwidth: 450 GB/s, latency: 2 us}
        network: {bandwidth: 50 GB/s, latency: 8 us}

    Or any graph, of GPUs (numbers) and switches (names)::

        islands:                      # GPUs of a node on a switch of this name
          - {name: left, gpus: [0, 1, 2, 3], bandwidth: 450 GB/s, latency: 2 us}
          - {name: right, gpus: [4, 5], bandwidth: 300 GB/s, latency: 2 us}
        links:
          - {between: [left, right], bandwidth: 50 GB/s, latency: 8 us}
        nodes: [[0, 1, 2, 3], [4, 5]]   # default: the islands; without those, one node

    `internode_weight`, in both, overrides what a row costs between nodes (:attr:`Topology.distance_GG`). Bandwidths
    are in bytes (B/s, kB/s, MB/s, GB/s, TB/s) or bits (Gb/s, …), latencies in s, ms, us or ns. Raises PlacementError,
    which names the file, the key and what to do.
    """
    try:
        values = yaml.safe_load(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise PlacementError(f"{path}: {error.strerror}; give a topology file") from None
    except UnicodeDecodeError:
        raise PlacementError(f"{path}: not text; give a topology as YAML") from None
    except yaml.YAMLError as error:
        mark = getattr(error, "problem_mark", None)
        where = f"{path}:{mark.line + 1}" if mark else str(path)
        raise PlacementError(f"{where}: not valid YAML: {getattr(error, 'problem', None) or error}") from None
    try:
        section = _Section(values, "", None)
        return (
            _from_graph(section) if "links" in section.values or "islands" in section.values else _from_nodes(section)
        )
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None


@dataclass
class _Section:
    """A mapping of a topology file; every getter raises PlacementError with the key's path."""

    values: Any
    path: str
    keys: tuple[str, ...] | None
    """Those that it may have; None: the caller checks."""

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise PlacementError(f"{self.path or 'the file'}: expected keys and values, found {_kind(self.values)}")
        if self.keys is not None:
            self.only(self.keys)

    def only(self, keys: tuple[str, ...]) -> None:
        for key in self.values:
            if key not in keys:
                raise PlacementError(f"{self.at(key)}: unknown key (there are: {', '.join(keys)})")

    def at(self, key: object) -> str:
        return f"{self.path}.{key}" if self.path else str(key)

    def get(self, key: str) -> Any:
        if self.values.get(key) is None:
            raise PlacementError(f"{self.at(key)}: has no value; give one")
        return self.values[key]

    def positive(self, key: str) -> int:
        value = self.get(key)
        if type(value) is not int or value < 1:
            raise PlacementError(f"{self.at(key)} = {value!r}: must be a positive whole number")
        return value

    def link(self) -> Link:
        return Link(self._quantity("bandwidth", _BANDWIDTH), self._quantity("latency", _LATENCY))

    def sections(self, key: str, keys: tuple[str, ...]) -> list[_Section]:
        values = self.values.get(key) or []
        if not isinstance(values, list):
            raise PlacementError(f"{self.at(key)}: expected a list, found {_kind(values)}")
        return [_Section(value, f"{self.at(key)}[{index}]", keys) for index, value in enumerate(values)]

    def gpus(self, key: str) -> list[int]:
        return _gpus(self.get(key), self.at(key))

    def internode_weight(self) -> float | None:
        value = self.values.get("internode_weight")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < float("inf"):
            raise PlacementError(f"{self.at('internode_weight')} = {value!r}: must be a positive number")
        return float(value)

    def _quantity(self, key: str, kind: _Quantity) -> float:
        value = self.get(key)
        match = (
            re.fullmatch(r"\s*([0-9.]+(?:[eE][+-]?[0-9]+)?)\s*([^\s0-9.]+)\s*", value)
            if isinstance(value, str)
            else None
        )
        try:
            assert match is not None
            number = float(match[1]) * kind.units[match[2].replace("µ", "u").replace("μ", "u")]
        except (AssertionError, ValueError, KeyError):
            raise PlacementError(
                f"{self.at(key)} = {value!r}: must be a number with a unit of {', '.join(kind.units)}, as in "
                f"{kind.example}"
            ) from None
        if not kind.least <= number < float("inf") or (number == 0 and kind.positive):
            raise PlacementError(
                f"{self.at(key)} = {value!r}: must be {'positive and ' if kind.positive else ''}finite"
            )
        return number


@dataclass(frozen=True)
class _Quantity:
    units: Mapping[str, float]
    example: str
    positive: bool
    least: float = 0.0


_BANDWIDTH = _Quantity(
    {
        f"{prefix}{unit}": factor * scale
        for unit, scale in (("B/s", 1.0), ("b/s", 1 / 8))
        for prefix, factor in (("", 1.0), ("k", 1e3), ("M", 1e6), ("G", 1e9), ("T", 1e12))
    },
    "450 GB/s",
    positive=True,
)
_LATENCY = _Quantity({"s": 1.0, "ms": 1e-3, "us": 1e-6, "ns": 1e-9}, "2 us", positive=False)


def _from_nodes(section: _Section) -> Topology:
    section.only(_NODES_KEYS)
    nodes, gpus = section.positive("nodes"), section.positive("gpus_per_node")
    nvlink = None if gpus == 1 and "nvlink" not in section.values else _link(section, "nvlink")
    network = None if nodes == 1 and "network" not in section.values else _link(section, "network")
    return Topology.of_nodes(nodes, gpus, nvlink or NVLINK, network, section.internode_weight())


def _link(section: _Section, key: str) -> Link:
    return _Section(section.get(key), section.at(key), _LINK_KEYS).link()


def _from_graph(section: _Section) -> Topology:
    section.only(_GRAPH_KEYS)
    graph = nx.Graph()
    node_of: dict[int, int] = {}
    for number, island in enumerate(section.sections("islands", ("name", "gpus", *_LINK_KEYS))):
        name = str(island.values.get("name") or f"island {number}")
        if name in graph:
            raise PlacementError(f"{island.at('name')} = {name!r}: is there twice; choose another")
        link = island.link()
        for gpu in island.gpus("gpus"):
            if gpu in node_of:
                raise PlacementError(f"{island.at('gpus')}: GPU {gpu} is in two islands; take it out of one")
            node_of[gpu] = number
            _join(graph, gpu, name, link, hops=2)
    for entry in section.sections("links", ("between", *_LINK_KEYS)):
        ends = entry.get("between")
        if not isinstance(ends, list) or len(ends) != 2 or ends[0] == ends[1] or not all(map(_is_vertex, ends)):
            raise PlacementError(f"{entry.at('between')} = {ends!r}: must be two GPUs (numbers) or switches (names)")
        if graph.has_edge(*ends):
            raise PlacementError(f"{entry.at('between')} = {ends!r}: is there twice; give one link of their bandwidth")
        _join(graph, ends[0], ends[1], entry.link())
    gpus = [vertex for vertex in graph if isinstance(vertex, int)]
    if section.values.get("nodes") is not None:
        node_of = _nodes(section)
        if sorted(node_of) != sorted(gpus):
            raise PlacementError(f"nodes: hold GPUs {sorted(node_of)}, and links and islands {sorted(gpus)}")
    elif not node_of:
        node_of = dict.fromkeys(gpus, 0)
    for gpu in gpus:
        if gpu not in node_of:
            raise PlacementError(f"nodes: has no value, and GPU {gpu} is in no island; list the GPUs of each node")
        graph.nodes[gpu]["node"] = node_of[gpu]
    return Topology(graph, section.internode_weight())


def _nodes(section: _Section) -> dict[int, int]:
    nodes = section.get("nodes")
    if not isinstance(nodes, list):
        raise PlacementError(
            f"nodes = {nodes!r}: beside links and islands must be lists of GPUs, as in [[0, 1], [2, 3]]"
        )
    node_of: dict[int, int] = {}
    for node, gpus in enumerate(nodes):
        for gpu in _gpus(gpus, f"nodes[{node}]"):
            if gpu in node_of:
                raise PlacementError(f"nodes[{node}]: GPU {gpu} is in two nodes; take it out of one")
            node_of[gpu] = node
    return node_of


def _gpus(value: Any, where: str) -> list[int]:
    if not isinstance(value, list) or not value or not all(type(gpu) is int and gpu >= 0 for gpu in value):
        raise PlacementError(f"{where} = {value!r}: must be a list of GPU numbers, as in [0, 1]")
    return value


def _is_vertex(value: Any) -> bool:
    return isinstance(value, str) or (type(value) is int and value >= 0)


def _kind(value: object) -> str:
    return "nothing" if value is None else f"a {type(value).__name__}"


# This machine ---------------------------------------------------------------------------------------------------------


def detect_topology() -> Topology:
    """This machine's GPUs, as `nvidia-smi topo -m` shows them (see :func:`parse_nvidia_smi`).

    Raises UserError where there is no nvidia-smi, or it fails.
    """
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise UserError("no nvidia-smi on this machine, so no GPUs to detect; describe them with --topology") from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise UserError(f"nvidia-smi topo -m: {error}; describe the machine with --topology") from None
    if done.returncode != 0:
        reason = next(iter((done.stderr.strip() or done.stdout.strip()).splitlines()), f"exit code {done.returncode}")
        raise UserError(f"nvidia-smi topo -m: {reason}; describe the machine with --topology")
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> Topology:
    """The GPUs of one node from the output of `nvidia-smi topo -m`.

    NV# is so many NVLinks of 25 GB/s (of the second to fourth generation: the output does not say which; NVLink 5 has
    50). They lead to a switch where a GPU's neighbours have more of them together than a GPU has, else from GPU to
    GPU. The other ways are PCIe: a tree of bridges (PIX, PXB), host bridges (PHB), NUMA nodes (NODE) and sockets (SYS),
    at PCIe 4.0's usual speeds. Raises UserError on other text.
    """
    relations = _relations(text)
    gpus = len(relations)
    graph = nx.Graph()
    graph.add_nodes_from(range(gpus), node=0)
    nvlinks_GG = np.array([[_nvlinks(relation) for relation in row] for row in relations])
    if nvlinks_GG.sum(1).max() > _MOST_NVLINKS:
        _, island_G = csgraph.connected_components(nvlinks_GG > 0)
        for gpu in np.flatnonzero(nvlinks_GG.any(1)).tolist():
            link = Link(int(nvlinks_GG[gpu].max()) * _NVLINK_BANDWIDTH, NVLINK.latency)
            _join(graph, gpu, f"nvlink {island_G[gpu]}", link, hops=2)
    else:
        for a, b in np.argwhere(np.triu(nvlinks_GG)).tolist():
            _join(graph, a, b, Link(int(nvlinks_GG[a, b]) * _NVLINK_BANDWIDTH, NVLINK.latency))
    pcie = [[next(iter(_PCIE)) if _nvlinks(relation) else relation for relation in row] for row in relations]
    if any(relation in _PCIE for row in relations for relation in row):
        _add_pcie(graph, pcie)
    return Topology(graph)


def _add_pcie(graph: nx.Graph, relations: list[list[str]]) -> None:
    """A tree: GPUs that are joined at a level, and not below it, meet at a switch of that level."""
    root_G: list[Vertex] = list(range(len(relations)))
    for name, link in _PCIE.items():
        joined = nx.Graph()
        joined.add_nodes_from(root_G)
        for a, row in enumerate(relations):
            joined.add_edges_from((root_G[a], root_G[b]) for b, relation in enumerate(row) if relation == name)
        for number, group in enumerate(nx.connected_components(joined)):
            if len(group) == 1:
                continue
            switch = f"{name.lower()} {number}"
            for vertex in sorted(group, key=str):
                _join(graph, vertex, switch, link, hops=2)
            root_G = [switch if vertex in group else vertex for vertex in root_G]


def _relations(text: str) -> list[list[str]]:
    """[G, G]: what the table says between GPUs: X, NV#, or a key of _PCIE."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    rows = [line.split() for line in lines if re.match(r"\s*GPU\d+\s+(X|NV\d+|PIX|PXB|PHB|NODE|SYS)\b", line)]
    relations = [row[1 : len(rows) + 1] for row in rows]
    for gpu, row in enumerate(relations):
        named = [relation for relation in row if relation in _PCIE or _nvlinks(relation) or relation == "X"]
        if rows[gpu][0] != f"GPU{gpu}" or len(named) != len(rows) or row[gpu] != "X":
            raise UserError(
                f"nvidia-smi topo -m: cannot read its line {rows[gpu]}; describe the machine with --topology"
            )
    if not relations:
        raise UserError("nvidia-smi topo -m: shows no GPUs; describe the machine with --topology")
    return relations


def _nvlinks(relation: str) -> int:
    match = re.fullmatch(r"NV(\d+)", relation)
    return int(match[1]) if match else 0
