"""Topologies as users give them: as a YAML file, or as the machine at hand."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass
from math import inf
from pathlib import Path
from typing import Any

import networkx as nx

from moetrain.errors import PlacementError
from moetrain.placement.nvidia_smi import detect_topology
from moetrain.placement.topology import NVLINK, Link, Topology, join
from moetrain.yaml_files import read_yaml

_LINK_KEYS = ("bandwidth", "latency")


def topology_of(source: str | None, num_gpus: int) -> Topology:
    """A topology of so many GPUs: of a file, of this machine if `source` is "detect", uniform if it is None.

    Raises PlacementError where it has another number of GPUs, and as :func:`load_topology` and
    :func:`moetrain.placement.nvidia_smi.detect_topology` do.
    """
    if source is None:
        return Topology.uniform(num_gpus)
    topology = detect_topology() if source == "detect" else load_topology(Path(source))
    if topology.num_gpus != num_gpus:
        raise PlacementError(
            f"{source}: has {topology.num_gpus} GPUs, not {num_gpus}; give the topology of those that share a layer's "
            "experts"
        )
    return topology


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
    values = read_yaml(path, PlacementError)
    try:
        section = _Section(values, "")
        any_graph = "links" in section.values or "islands" in section.values
        return _from_graph(section) if any_graph else _from_nodes(section)
    except PlacementError as error:
        raise PlacementError(f"{path}: {error}") from None


@dataclass
class _Section:
    """A mapping of a topology file; every getter raises PlacementError with the key's path."""

    values: Any
    path: str

    def __post_init__(self) -> None:
        if not isinstance(self.values, Mapping):
            raise PlacementError(f"{self.path or 'the file'}: expected keys and values, found {_kind(self.values)}")

    def only(self, *keys: str) -> _Section:
        for key in self.values:
            if key not in keys:
                raise PlacementError(f"{self.at(key)}: unknown key (there are: {', '.join(keys)})")
        return self

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

    def sections(self, key: str, *keys: str) -> list[_Section]:
        values = self.values.get(key) or []
        if not isinstance(values, list):
            raise PlacementError(f"{self.at(key)}: expected a list, found {_kind(values)}")
        return [_Section(value, f"{self.at(key)}[{index}]").only(*keys) for index, value in enumerate(values)]

    def gpus(self, key: str) -> list[int]:
        return _gpus(self.get(key), self.at(key))

    def internode_weight(self) -> float | None:
        value = self.values.get("internode_weight")
        if value is None:
            return None
        if isinstance(value, bool) or not isinstance(value, int | float) or not 0 < value < inf:
            raise PlacementError(f"{self.at('internode_weight')} = {value!r}: must be a positive number")
        return float(value)

    def _quantity(self, key: str, kind: _Quantity) -> float:
        value = self.get(key)
        match = _NUMBER_WITH_UNIT.fullmatch(str(value))
        unit = None if match is None else kind.units.get(re.sub("[µμ]", "u", match[2]))
        if match is None or unit is None:
            raise PlacementError(
                f"{self.at(key)} = {value!r}: must be a number with a unit of {', '.join(kind.units)}, as in "
                f"{kind.example}"
            )
        number = float(match[1]) * unit
        if number == inf or (number == 0 and kind.positive):
            raise PlacementError(
                f"{self.at(key)} = {value!r}: must be {'positive and ' if kind.positive else ''}finite"
            )
        return number


@dataclass(frozen=True)
class _Quantity:
    units: Mapping[str, float]
    example: str
    positive: bool


_NUMBER_WITH_UNIT = re.compile(r"\s*((?:[0-9]+\.?[0-9]*|\.[0-9]+)(?:[eE][+-]?[0-9]+)?)\s*(\S+)\s*")
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
    section.only("nodes", "gpus_per_node", "nvlink", "network", "internode_weight")
    nodes, gpus = section.positive("nodes"), section.positive("gpus_per_node")
    nvlink = None if gpus == 1 and "nvlink" not in section.values else _link(section, "nvlink")
    network = None if nodes == 1 and "network" not in section.values else _link(section, "network")
    return Topology.of_nodes(nodes, gpus, nvlink or NVLINK, network, section.internode_weight())


def _link(section: _Section, key: str) -> Link:
    return _Section(section.get(key), section.at(key)).only(*_LINK_KEYS).link()


def _from_graph(section: _Section) -> Topology:
    section.only("links", "islands", "nodes", "internode_weight")
    graph = nx.Graph()
    node_of: dict[int, int] = {}
    for number, island in enumerate(section.sections("islands", "name", "gpus", *_LINK_KEYS)):
        name = str(island.values.get("name") or f"island {number}")
        if name in graph:
            raise PlacementError(f"{island.at('name')} = {name!r}: is there twice; choose another")
        link = island.link()
        for gpu in island.gpus("gpus"):
            if gpu in node_of:
                raise PlacementError(f"{island.at('gpus')}: GPU {gpu} is in two islands; take it out of one")
            node_of[gpu] = number
            join(graph, gpu, name, link, hops=2)
    for entry in section.sections("links", "between", *_LINK_KEYS):
        ends = entry.get("between")
        if not isinstance(ends, list) or len(ends) != 2 or ends[0] == ends[1] or not all(map(_is_vertex, ends)):
            raise PlacementError(f"{entry.at('between')} = {ends!r}: must be two GPUs (numbers) or switches (names)")
        if graph.has_edge(*ends):
            raise PlacementError(f"{entry.at('between')} = {ends!r}: is there twice; give one link of their bandwidth")
        join(graph, ends[0], ends[1], entry.link())
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
