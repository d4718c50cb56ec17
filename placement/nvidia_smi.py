"""The topology of this machine, as nvidia-smi shows it.

Shapes: G GPUs.
"""

from __future__ import annotations

import re
import subprocess

import networkx as nx
import numpy as np
from scipy.sparse import csgraph

from moetrain.errors import PlacementError
from moetrain.placement.topology import NVLINK, Link, Topology, Vertex, join

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


def detect_topology() -> Topology:
    """This machine's GPUs, as `nvidia-smi topo -m` shows them (see :func:`parse_nvidia_smi`).

    Raises PlacementError where there is no nvidia-smi, or it fails.
    """
    try:
        done = subprocess.run(["nvidia-smi", "topo", "-m"], capture_output=True, text=True, timeout=60, check=False)
    except FileNotFoundError:
        raise PlacementError(
            "no nvidia-smi on this machine, so no GPUs to detect; describe them in a topology file"
        ) from None
    except (OSError, subprocess.TimeoutExpired) as error:
        raise PlacementError(f"nvidia-smi topo -m: {error}; describe the machine in a topology file") from None
    if done.returncode != 0:
        reason = next(iter((done.stderr.strip() or done.stdout.strip()).splitlines()), f"exit code {done.returncode}")
        raise PlacementError(f"nvidia-smi topo -m: {reason}; describe the machine in a topology file")
    return parse_nvidia_smi(done.stdout)


def parse_nvidia_smi(text: str) -> Topology:
    """The GPUs of one node from the output of `nvidia-smi topo -m`.

    NV# is so many NVLinks of 25 GB/s (of the second to fourth generation: the output does not say which; NVLink 5 has
    50). They lead to a switch where a GPU's neighbours have more of them together than a GPU has, else from GPU to
    GPU. The other ways are PCIe: a tree of bridges (PIX, PXB), host bridges (PHB), NUMA nodes (NODE) and sockets (SYS),
    at PCIe 4.0's usual speeds. Raises PlacementError on other text.
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
            join(graph, gpu, f"nvlink {island_G[gpu]}", link, hops=2)
    else:
        for a, b in np.argwhere(np.triu(nvlinks_GG)).tolist():
            join(graph, a, b, Link(int(nvlinks_GG[a, b]) * _NVLINK_BANDWIDTH, NVLINK.latency))
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
                join(graph, vertex, switch, link, hops=2)
            root_G = [switch if vertex in group else vertex for vertex in root_G]


def _relations(text: str) -> list[list[str]]:
    """[G, G]: what the table says between GPUs: X, NV#, or a key of _PCIE."""
    lines = re.sub(r"\x1b\[[0-9;]*m", "", text).splitlines()
    rows = [line.split() for line in lines if re.match(r"\s*GPU\d+\s+(X|NV\d+|PIX|PXB|PHB|NODE|SYS)\b", line)]
    relations = [row[1 : len(rows) + 1] for row in rows]
    for gpu, row in enumerate(relations):
        named = [relation for relation in row if relation in _PCIE or _nvlinks(relation) or relation == "X"]
        if rows[gpu][0] != f"GPU{gpu}" or len(named) != len(rows) or row[gpu] != "X":
            raise PlacementError(
                f"nvidia-smi topo -m: cannot read its line {rows[gpu]}; describe the machine in a topology file"
            )
    if not relations:
        raise PlacementError("nvidia-smi topo -m: shows no GPUs; describe the machine in a topology file")
    return relations


def _nvlinks(relation: str) -> int:
    match = re.fullmatch(r"NV(\d+)", relation)
    return int(match[1]) if match else 0
