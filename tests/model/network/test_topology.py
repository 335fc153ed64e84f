from __future__ import annotations

from typing import get_args

import pytest

from model.network.scaling import TopologyKind
from model.network.topology import TOPOLOGIES, Node, bifpn, simplified_panet


def test_bifpn_of_p3_to_p7_listed_by_hand() -> None:
    """Features 0..4 are P3..P7; reference list of google/automl `fpn_configs.py`."""
    graph = bifpn(3, 7)
    assert graph.nodes == (
        Node(6, (3, 4)),  # 5:  P6'  from P6, P7
        Node(5, (2, 5)),  # 6:  P5'  from P5, P6'
        Node(4, (1, 6)),  # 7:  P4'  from P4, P5'
        Node(3, (0, 7)),  # 8:  P3"  from P3, P4'
        Node(4, (1, 7, 8)),  # 9:  P4"  from P4, P4', P3"
        Node(5, (2, 6, 9)),  # 10: P5"  from P5, P5', P4"
        Node(6, (3, 5, 10)),  # 11: P6"  from P6, P6', P5"
        Node(7, (4, 11)),  # 12: P7"  from P7, P6"
    )
    assert graph.outputs == (8, 9, 10, 11, 12)
    assert graph.num_edges == 19


@pytest.mark.parametrize(("max_level", "nodes", "edges"), [(6, 6, 14), (7, 8, 19), (8, 10, 24)])
def test_bifpn_sizes(max_level: int, nodes: int, edges: int) -> None:
    graph = bifpn(3, max_level)
    assert (len(graph.nodes), graph.num_edges) == (nodes, edges)


@pytest.mark.parametrize("max_level", [6, 7, 8])
def test_bifpn_is_a_graph_that_can_run(max_level: int) -> None:
    """A node reads only what is known before it, neighbours only, and nothing is made in vain."""
    graph = bifpn(3, max_level)
    levels = graph.feature_levels()
    for position, node in enumerate(graph.nodes):
        assert max(node.inputs) < graph.num_levels + position
        assert all(abs(levels[source] - node.level) <= 1 for source in node.inputs)
    assert [levels[source] for source in graph.outputs] == list(range(3, max_level + 1))
    read = {source for node in graph.nodes for source in node.inputs} | set(graph.outputs)
    assert read == set(range(len(levels)))


def test_the_configuration_names_every_topology() -> None:
    assert set(TOPOLOGIES) == set(get_args(TopologyKind))


@pytest.mark.parametrize("name", get_args(TopologyKind))
def test_topologies_are_graphs_that_can_run(name: str) -> None:
    """A node reads only what is known before it; outputs come level by level; nothing is in vain."""
    graph = TOPOLOGIES[name](3, 7)
    levels = graph.feature_levels()
    for position, node in enumerate(graph.nodes):
        assert max(node.inputs) < graph.num_levels + position
        assert len(set(node.inputs)) == len(node.inputs)
    assert [levels[source] for source in graph.outputs] == [3, 4, 5, 6, 7]
    read = {source for node in graph.nodes for source in node.inputs} | set(graph.outputs)
    assert read == set(range(len(levels)))


@pytest.mark.parametrize(
    ("name", "nodes", "edges"),
    [
        ("fpn", 5, 9),
        ("panet", 10, 18),
        ("simplified_panet", 8, 16),
        ("nas_fpn", 7, 16),
        ("fully_connected", 10, 43),
        ("bifpn", 8, 19),
    ],
)
def test_sizes_over_five_levels(name: str, nodes: int, edges: int) -> None:
    graph = TOPOLOGIES[name](3, 7)
    assert (len(graph.nodes), graph.num_edges) == (nodes, edges)


def test_bifpn_is_simplified_panet_with_an_edge_from_each_middle_input() -> None:
    plain, more = simplified_panet(3, 7).nodes, bifpn(3, 7).nodes
    assert [node.level for node in plain] == [node.level for node in more]
    added = [set(b.inputs) - set(a.inputs) for a, b in zip(plain, more, strict=True)]
    assert added == [set(), set(), set(), set(), {1}, {2}, {3}, set()]
