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
    cell = _Builder(min_level, max_level)
    cell.top_down(first=max_level - 1)
    for level in range(min_level + 1, max_level):
        cell.add(level, level - min_level, cell.newest[level], cell.newest[level - 1])
    cell.add(max_level, max_level - min_level, cell.newest[max_level - 1])
    return cell.done()


def fpn(min_level: int, max_level: int) -> Topology:
    """One top-down pass (arXiv 1612.03144; paper Figure 2a)."""
    cell = _Builder(min_level, max_level)
    cell.top_down(first=max_level)
    return cell.done()


def panet(min_level: int, max_level: int) -> Topology:
    """Top-down, then bottom-up, a node at every level of both (arXiv 1803.01534; Figure 2b)."""
    cell = _Builder(min_level, max_level)
    cell.top_down(first=max_level)
    cell.bottom_up(first=min_level)
    return cell.done()


def simplified_panet(min_level: int, max_level: int) -> Topology:
    """PANet without its two nodes of a single input (paper §3.2)."""
    cell = _Builder(min_level, max_level)
    cell.top_down(first=max_level - 1)
    cell.bottom_up(first=min_level + 1)
    return cell.done()


def fully_connected(min_level: int, max_level: int) -> Topology:
    """PANet whose bottom-up nodes also see every input of the cell (arXiv 1911.09070v1, Figure 2d)."""
    cell = _Builder(min_level, max_level)
    cell.top_down(first=max_level)
    for level in range(min_level, max_level + 1):
        below = [] if level == min_level else [cell.newest[level - 1]]
        cell.add(level, *range(cell.num_levels), cell.newest[level], *below)
    return cell.done()


def nas_fpn(min_level: int, max_level: int) -> Topology:
    """The seven merging cells found on P3-P7 (arXiv 1904.07392, Figure 6), at any five levels.

    Inputs that no cell uses join the output of their level, as in the released implementation.
    """
    if max_level - min_level != 4:
        raise ValueError("nas_fpn is defined over five levels")
    finest = min_level
    nodes = (
        Node(finest + 1, (1, 3)),
        Node(finest + 1, (1, 5)),
        Node(finest, (0, 6)),
        Node(finest + 1, (6, 7)),
        Node(finest + 2, (7, 8, 2)),
        Node(finest + 4, (6, 9, 4)),
        Node(finest + 3, (9, 10)),
    )
    return Topology(min_level, max_level, nodes, outputs=(7, 8, 9, 11, 10))


class _Builder:
    """Collects the nodes of a cell; `newest` is the latest feature of each level."""

    def __init__(self, min_level: int, max_level: int) -> None:
        self.min_level, self.max_level = min_level, max_level
        self.num_levels = max_level - min_level + 1
        self.nodes: list[Node] = []
        self.newest = {level: level - min_level for level in range(min_level, max_level + 1)}

    def add(self, level: int, *inputs: int) -> None:
        self.nodes.append(Node(level, inputs))
        self.newest[level] = self.num_levels + len(self.nodes) - 1

    def top_down(self, *, first: int) -> None:
        for level in range(first, self.min_level - 1, -1):
            above = [] if level == self.max_level else [self.newest[level + 1]]
            self.add(level, self.newest[level], *above)

    def bottom_up(self, *, first: int) -> None:
        for level in range(first, self.max_level + 1):
            below = [] if level == self.min_level else [self.newest[level - 1]]
            self.add(level, self.newest[level], *below)

    def done(self) -> Topology:
        outputs = tuple(self.newest[level] for level in range(self.min_level, self.max_level + 1))
        return Topology(self.min_level, self.max_level, tuple(self.nodes), outputs)


TOPOLOGIES: dict[str, Callable[[int, int], Topology]] = {
    "bifpn": bifpn,
    "fpn": fpn,
    "panet": panet,
    "simplified_panet": simplified_panet,
    "nas_fpn": nas_fpn,
    "fully_connected": fully_connected,
}
