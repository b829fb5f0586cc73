"""Which ops pass rows in an order of their own to each other: what needs these joined has all of them played once."""

from __future__ import annotations

from collections.abc import Iterable

from torch import fx


class Connected:
    """Sets of nodes that rows in an order of their own pass between (union-find)."""

    def __init__(self) -> None:
        self._parent: dict[fx.Node, fx.Node] = {}

    def find(self, node: fx.Node) -> fx.Node:
        root = node
        while (parent := self._parent.get(root, root)) is not root:
            root = parent
        while node is not root:
            node, self._parent[node] = self._parent[node], root
        return root

    def join(self, node: fx.Node, others: Iterable[fx.Node]) -> None:
        for other in others:
            self._parent[self.find(other)] = self.find(node)
