"""Topologies: paths against all paths there are, files, and what nvidia-smi says."""

from __future__ import annotations

import subprocess
from pathlib import Path

import networkx as nx
import numpy as np
import pytest

from moetrain.errors import PlacementError
from moetrain.placement.nvidia_smi import detect_topology, parse_nvidia_smi
from moetrain.placement.topology import Link, Topology
from moetrain.placement.topology_file import load_topology, topology_of

EQUAL_NODES = """
nodes: 2
gpus_per_node: 4
nvlink: {bandwidth: 450 GB/s, latency: 2 us}
network: {bandwidth: 400 Gb/s, latency: 8 us}
"""
GRAPH = """
islands:
  - {name: left, gpus: [0, 1], bandwidth: 400 GB/s, latency: 2 us}
  - {name: right, gpus: [2, 3], bandwidth: 300 GB/s, latency: 2 us}
links:
  - {between: [left, right], bandwidth: 50 GB/s, latency: 7000 ns}
  - {between: [1, 2], bandwidth: 0.1 TB/s, latency: 0.001 ms}
"""


def read(tmp_path: Path, text: str) -> Topology:
    path = tmp_path / "topology.yaml"
    path.write_text(text)
    return load_topology(path)


def test_equal_nodes(tmp_path: Path) -> None:
    topology = read(tmp_path, EQUAL_NODES)
    assert (topology.num_gpus, topology.num_nodes, topology.node_G.tolist()) == (8, 2, [0] * 4 + [1] * 4)
    same, inside = np.eye(8, dtype=bool), topology.node_G[:, None] == topology.node_G
    np.testing.assert_allclose(topology.distance_GG, np.where(same, 0, np.where(inside, 1, 9)))
    np.testing.assert_allclose(
        topology.seconds_per_byte_GG, np.where(same, 0, np.where(inside, 1 / 450e9, 1 / 50e9)), rtol=1e-12
    )
    np.testing.assert_allclose(topology.latency_GG, np.where(same, 0, np.where(inside, 2e-6, 8e-6)))
    assert topology.path(1, 6) == [1, "network", 6]
    weighted = read(tmp_path, EQUAL_NODES + "internode_weight: 4")
    np.testing.assert_allclose(weighted.distance_GG, np.where(same, 0, np.where(inside, 1, 4)))
    np.testing.assert_allclose(weighted.seconds_per_byte_GG, topology.seconds_per_byte_GG)


def test_parts_that_a_small_machine_has_not(tmp_path: Path) -> None:
    one = read(tmp_path, "nodes: 1\ngpus_per_node: 2\nnvlink: {bandwidth: 450 GB/s, latency: 0 s}")
    assert one.distance_GG.tolist() == [[0, 1], [1, 0]]
    apart = read(tmp_path, "nodes: 3\ngpus_per_node: 1\nnetwork: {bandwidth: 12.5 GB/s, latency: 10 µs}")
    assert apart.distance_GG.tolist() == (1 - np.eye(3)).tolist()
    assert apart.seconds_per_byte_GG[0, 2] == pytest.approx(8e-11)
    assert apart.latency_GG[0, 2] == pytest.approx(1e-5)
    assert Topology.uniform(1).distance_GG.tolist() == [[0]]
    assert Topology.uniform(4).distance_GG.tolist() == (1 - np.eye(4)).tolist()


def test_a_graph(tmp_path: Path) -> None:
    topology = read(tmp_path, GRAPH)
    assert topology.node_G.tolist() == [0, 0, 1, 1]
    assert topology.path(1, 2) == [1, 2]
    assert topology.path(0, 2) == [0, "left", "right", 2]  # GPU 1 passes nothing on
    assert topology.bandwidth_GG[0].tolist() == [np.inf, 400e9, 50e9, 50e9]
    assert topology.latency_GG[0] == pytest.approx([0, 2e-6, 9e-6, 9e-6])
    assert topology.latency_GG[1, 2] == pytest.approx(1e-6)
    assert topology.distance_GG[3] == pytest.approx([8, 8, 4 / 3, 0])
    plain = "links:\n  - {between: [0, 1], bandwidth: 1 GB/s, latency: 1 us}\n"
    assert read(tmp_path, plain).node_G.tolist() == [0, 0]
    assert read(tmp_path, plain + "nodes: [[1], [0]]").node_G.tolist() == [1, 0]


@pytest.mark.parametrize("seed", range(8))
def test_paths_are_the_best_of_all(seed: int) -> None:
    """The widest, and of these the shortest, of all paths over switches; and links carry what their paths say."""
    rng = np.random.default_rng(seed)
    graph = nx.Graph()
    for gpu in range(5):
        graph.add_node(gpu, node=gpu % 2)
    switches = [f"switch {number}" for number in range(5)]
    vertices = [*range(5), *switches]
    for number, a in enumerate(vertices):
        for b in vertices[:number]:
            if rng.random() < 0.5 or (a, b) == ("switch 0", 0) or a == "switch 0":
                graph.add_edge(a, b, bandwidth=float(rng.integers(1, 4)), latency=float(rng.integers(0, 5)))
    topology = Topology(graph)
    bytes_GG = rng.random((5, 5))
    load: dict[tuple[object, object], float] = dict.fromkeys(topology.links, 0.0)
    for a in range(5):
        for b in range(5):
            if a == b:
                continue
            rates = {}
            for path in nx.all_simple_paths(graph.subgraph([a, b, *switches]), a, b):
                edges = [graph.edges[edge] for edge in nx.utils.pairwise(path)]
                rates[tuple(path)] = (-min(e["bandwidth"] for e in edges), sum(e["latency"] for e in edges))
            best = min(rates.values())
            assert (-topology.bandwidth_GG[a, b], topology.latency_GG[a, b]) == best
            path = topology.path(a, b)
            assert rates[tuple(path)] == best
            for edge in nx.utils.pairwise(path):
                load[edge] += bytes_GG[a, b]
    np.testing.assert_allclose(topology.link_bytes_X(bytes_GG), list(load.values()))
    assert [graph.edges[link]["bandwidth"] for link in topology.links] == topology.link_bandwidth_X.tolist()


def test_a_thousand_gpus() -> None:
    topology = Topology.of_nodes(128, 8, Link(450e9, 2e-6), Link(50e9, 8e-6))
    total = topology.link_bytes_X(np.ones((1024, 1024)))
    per_link = {(1, "nvlink 0"): 7, ("nvlink 0", 1): 7, (1, "network"): 1016, ("network", 1): 1016}
    for link, expected in per_link.items():
        assert total[topology.links.index(link)] == expected


BAD = {
    "nodes: 2": "gpus_per_node: has no value; give one",
    "nodes: 0\ngpus_per_node: 1": "nodes = 0: must be a positive whole number",
    "nodes: true\ngpus_per_node: 1": "nodes = True: must be a positive whole number",
    "nodes: 1\ngpus_per_node: 2": "nvlink: has no value; give one",
    "nodes: 2\ngpus_per_node: 1": "network: has no value; give one",
    "nodes: 1\ngpu_per_node: 2": "gpu_per_node: unknown key (there are: nodes, gpus_per_node, nvlink, network, inter",
    "nodes: 2\ngpus_per_node: 1\nnetwork: fast": "network: expected keys and values, found a str",
    EQUAL_NODES.replace("450 GB/s", "450"): "nvlink.bandwidth = 450: must be a number with a unit of B/s, kB/s,",
    EQUAL_NODES.replace("450 GB/s", "450 GB"): "nvlink.bandwidth = '450 GB': must be a number with a unit of B/s",
    EQUAL_NODES.replace("450 GB/s", "4.5.0 GB/s"): "nvlink.bandwidth = '4.5.0 GB/s': must be a number with a unit",
    EQUAL_NODES.replace("450 GB/s", "9e999 GB/s"): "nvlink.bandwidth = '9e999 GB/s': must be positive and finite",
    EQUAL_NODES.replace("450 GB/s", "0 GB/s"): "nvlink.bandwidth = '0 GB/s': must be positive and finite",
    EQUAL_NODES.replace("8 us", "8 GB/s"): "network.latency = '8 GB/s': must be a number with a unit of s, ms, us, ns",
    EQUAL_NODES.replace("8 us", "-8 us"): "network.latency = '-8 us': must be a number",
    EQUAL_NODES.replace(", latency: 8 us", ""): "network.latency: has no value; give one",
    EQUAL_NODES.replace("latency: 8 us", "delay: 8 us"): "network.delay: unknown key (there are: bandwidth, latency)",
    EQUAL_NODES + "internode_weight: 0": "internode_weight = 0: must be a positive number",
    GRAPH.replace("gpus: [2, 3]", "gpus: [2, 4]"): "GPUs must be numbered from 0 without gaps, and are [0, 1, 2, 4]",
    GRAPH.replace("gpus: [2, 3]", "gpus: [1, 2]"): "islands[1].gpus: GPU 1 is in two islands; take it out of one",
    GRAPH.replace("gpus: [2, 3]", "gpus: 2"): "islands[1].gpus = 2: must be a list of GPU numbers, as in [0, 1]",
    GRAPH.replace("name: right", "name: left"): "islands[1].name = 'left': is there twice; choose another",
    GRAPH.replace("[left, right]", "[left, left]"): "links[0].between = ['left', 'left']: must be two GPUs (numbers)",
    GRAPH.replace("[1, 2]", "[right, left]"): "links[1].between = ['right', 'left']: is there twice",
    GRAPH.replace(
        "[left, right]", "[left, other]"
    ): "not connected: no path from GPU 0 to GPU 2 (GPUs pass nothing on)",
    GRAPH.replace("0.1 TB/s", "fast"): "links[1].bandwidth = 'fast': must be a number with a unit of",
    GRAPH.replace("[1, 2]", "[1, 4]"): "nodes: has no value, and GPU 4 is in no island; list the GPUs of each node",
    GRAPH + "nodes: [[0, 1], [2]]": "nodes: hold GPUs [0, 1, 2], and links and islands [0, 1, 2, 3]",
    GRAPH + "nodes: [[0, 1], [1, 2, 3]]": "nodes[1]: GPU 1 is in two nodes; take it out of one",
    GRAPH + "nodes: 2": "nodes = 2: beside links and islands must be lists of GPUs",
    GRAPH + "gpus_per_node: 2": "gpus_per_node: unknown key (there are: links, islands, nodes, internode_weight)",
    "links: 3": "links: expected a list, found a int",
    "links: []": "GPUs must be numbered from 0",
    "": "the file: expected keys and values, found nothing",
    "nodes: [": "topology.yaml:1: not valid YAML",
    EQUAL_NODES + "nodes: 3": "topology.yaml:6: not valid YAML: the key 'nodes' is there twice",
}


@pytest.mark.parametrize("text", BAD)
def test_what_is_no_topology(tmp_path: Path, text: str) -> None:
    with pytest.raises(PlacementError) as caught:
        read(tmp_path, text)
    message = str(caught.value)
    assert message.startswith(str(tmp_path / "topology.yaml"))
    assert BAD[text] in message


def test_a_file_that_cannot_be_read(tmp_path: Path) -> None:
    with pytest.raises(PlacementError, match="none: cannot be read: No such file or directory"):
        load_topology(tmp_path / "none")
    (tmp_path / "binary").write_bytes(b"\xff\xfe\x00")
    with pytest.raises(PlacementError, match="binary: not text in UTF-8"):
        load_topology(tmp_path / "binary")


# nvidia-smi -----------------------------------------------------------------------------------------------------------

HEAD = "\t\x1b[4m{gpus}\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m\n"
LEGEND = """
Legend:

  X    = Self
  SYS  = Connection traversing PCIe as well as the SMP interconnect between NUMA nodes (e.g., QPI/UPI)
  NODE = Connection traversing PCIe as well as the interconnect between PCIe Host Bridges within a NUMA node
  PHB  = Connection traversing PCIe as well as a PCIe Host Bridge (typically the CPU)
  PXB  = Connection traversing multiple PCIe bridges (without traversing the PCIe Host Bridge)
  PIX  = Connection traversing at most a single PCIe bridge
  NV#  = Connection traversing a bonded set of # NVLinks

NIC Legend:

  NIC0: mlx5_0
"""


def output(rows: list[str], nics: int = 0) -> str:
    """What `nvidia-smi topo -m` prints for GPUs with these relations, and NICs."""
    names = [f"GPU{gpu}" for gpu in range(len(rows))] + [f"NIC{nic}" for nic in range(nics)]
    lines = [
        "\t".join(
            [f"GPU{gpu}", *(f" {relation} " for relation in row.split()), *["PXB"] * nics, "0-51", "0", "", "N/A"]
        )
        for gpu, row in enumerate(rows)
    ]
    lines += ["\t".join([f"NIC{nic}", *["PXB"] * len(rows), *[" X "] * nics]) for nic in range(nics)]
    return HEAD.format(gpus="\t".join(names)) + "\n".join(lines) + "\n" + LEGEND


EIGHT_H100 = output([" ".join(["NV18"] * gpu + ["X"] + ["NV18"] * (7 - gpu)) for gpu in range(8)], nics=2)
PCIE_BOX = output(["X PIX NODE SYS", "PIX X NODE SYS", "NODE NODE X SYS", "SYS SYS SYS X"])
TWO_BRIDGES = output(["X NV4 SYS SYS", "NV4 X SYS SYS", "SYS SYS X NV4", "SYS SYS NV4 X"])
TWO_H200 = """\t\x1b[4mGPU0\tGPU1\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\x1b[0m
GPU0\t X \tNV18\t0-47\t0\t\tN/A
GPU1\tNV18\t X \t0-47\t0\t\tN/A
"""
FOUR_A100 = output(["X NV4 NV4 NV4", "NV4 X NV4 NV4", "NV4 NV4 X NV4", "NV4 NV4 NV4 X"])


def test_nvswitch() -> None:
    topology = parse_nvidia_smi(EIGHT_H100)
    assert topology.distance_GG.tolist() == (1 - np.eye(8)).tolist()
    assert topology.bandwidth_GG[0, 7] == 450e9
    assert topology.latency_GG[0, 7] == pytest.approx(2e-6)
    assert topology.path(0, 7) == [0, "nvlink 0", 7]
    assert topology.node_G.tolist() == [0] * 8


def test_direct_nvlinks() -> None:
    assert parse_nvidia_smi(TWO_H200).bandwidth_GG[0, 1] == 450e9
    topology = parse_nvidia_smi(FOUR_A100)
    assert topology.path(0, 3) == [0, 3]
    assert topology.bandwidth_GG[0, 3] == 100e9


def test_a_pcie_box() -> None:
    topology = parse_nvidia_smi(PCIE_BOX)
    distance = topology.distance_GG
    assert distance[0, 1] == 1
    assert distance[0, 1] < distance[0, 2] < distance[0, 3]
    assert distance[0, 2] == distance[1, 2]
    assert distance[0, 3] == distance[2, 3]
    latency = topology.latency_GG
    assert latency[0, 1] < latency[0, 2] < latency[0, 3]
    # All GPUs of a socket share its way to the other.
    assert topology.path(0, 3)[-2:] == topology.path(2, 3)[-2:]


def test_nvlink_bridges_in_a_pcie_box() -> None:
    topology = parse_nvidia_smi(TWO_BRIDGES)
    assert topology.path(2, 3) == [2, 3]
    assert topology.distance_GG.tolist() == [[0, 1, 10, 10], [1, 0, 10, 10], [10, 10, 0, 1], [10, 10, 1, 0]]


def test_one_gpu() -> None:
    topology = parse_nvidia_smi(
        "\tGPU0\tCPU Affinity\tNUMA Affinity\tGPU NUMA ID\nGPU0\t X \t0-15\t0\t\tN/A\n" + LEGEND
    )
    assert topology.distance_GG.tolist() == [[0]]


def test_text_that_is_no_table() -> None:
    with pytest.raises(PlacementError, match="shows no GPUs; describe the machine in a topology file"):
        parse_nvidia_smi("No devices were found")
    with pytest.raises(PlacementError, match=r"cannot read its line .*GPU1"):
        parse_nvidia_smi(TWO_H200.replace("GPU1\tNV18\t X ", "GPU1\tNV18\tFOO"))


def test_this_machine(monkeypatch: pytest.MonkeyPatch) -> None:
    results = {"stdout": TWO_H200, "stderr": "", "returncode": 0}
    monkeypatch.setattr(subprocess, "run", lambda *a, **k: subprocess.CompletedProcess(a, **results))
    assert detect_topology().num_gpus == 2
    assert topology_of("detect", 2).bandwidth_GG[0, 1] == 450e9
    with pytest.raises(PlacementError, match="detect: has 2 GPUs, not 8"):
        topology_of("detect", 8)
    results |= {"returncode": 9, "stdout": "NVIDIA-SMI has failed because it couldn't communicate with the driver."}
    with pytest.raises(PlacementError, match=r"NVIDIA-SMI has failed .*; describe the machine in a topology file"):
        detect_topology()
    monkeypatch.undo()
    monkeypatch.setenv("PATH", "")
    with pytest.raises(PlacementError, match="no nvidia-smi on this machine"):
        detect_topology()
