"""Cross-scale connections as data: which features each node of a pyramid fuses.

One cell is a list of nodes. Features are numbered: the cell's inputs first (0 is the finest
level), then each node's output in order. A topology is repeated by feeding the features of
`outputs` to the next cell.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass


@dataclass(frozen=True)
class Node:
    """One fusion: features `inputs` are resampled to `level`, fused, then convolved."""

    level: int
    inputs: tuple[int, ...]


@dataclass(frozen=True)
class Topology:
    """Nodes of one cell over levels `min_level`..`max_level`, and the features it hands on."""

    min_level: int
    max_level: int
    nodes: tuple[Node, ...]
    outputs: tuple[int, ...]

    @property
    def num_levels(self) -> int:
        return self.max_level - self.min_level + 1

    @property
    def num_edges(self) -> int:
        return sum(len(node.inputs) for node in self.nodes)

    def feature_levels(self) -> list[int]:
        """Level of every feature: inputs, then nodes."""
        return [*range(self.min_level, self.max_level + 1), *(node.level for node in self.nodes)]


def bifpn(min_level: int, max_level: int) -> Topology:
    """Top-down then bottom-up, an extra edge from each middle input (paper §3.2, Figure 2d).

    The finest and the coarsest level have one node each: 2(L-1) nodes in all.
    """
    num_levels = max_level - min_level + 1
    nodes: list[Node] = []
    newest = {level: level - min_level for level in range(min_level, max_level + 1)}

    def add(level: int, *inputs: int) -> None:
        nodes.append(Node(level, inputs))
        newest[level] = num_levels + len(nodes) - 1

    for level in range(max_level - 1, min_level - 1, -1):
        add(level, newest[level], newest[level + 1])
    for level in range(min_level + 1, max_level):
        add(level, level - min_level, newest[level], newest[level - 1])
    add(max_level, max_level - min_level, newest[max_level - 1])
    outputs = tuple(newest[level] for level in range(min_level, max_level + 1))
    return Topology(min_level, max_level, tuple(nodes), outputs)


TOPOLOGIES: dict[str, Callable[[int, int], Topology]] = {"bifpn": bifpn}
