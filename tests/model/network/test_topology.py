from __future__ import annotations

import pytest

from model.network.topology import Node, bifpn


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
