"""How alike two HTML documents are in structure: tree edit distance over tags, as TEDS-S does for tables
(tree-edit-distance-based similarity, arXiv 1911.10683 section 5; structure only: text is not compared).

similarity = 1 - distance / max(nodes of both), with the ordered-tree distance of Zhang and Shasha (SIAM J. Comput.
18(6), 1989). A node is a tag with its class attribute; attributes with coordinates are not part of it.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from html.parser import HTMLParser

MAX_NODES = 400
"""The distance costs up to nodes^2 x depth^2: larger trees are compared by their first nodes in document order."""
_VOID = frozenset(
    ("area", "base", "br", "col", "embed", "hr", "img", "input", "link", "meta", "source", "track", "wbr")
)


@dataclass
class Node:
    label: str
    children: list[Node] = field(default_factory=list)


class _Tree(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.root = Node("root")
        self.open: list[Node] = [self.root]
        self.count = 0

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if self.count >= MAX_NODES:
            return
        self.count += 1
        kind = dict(attrs).get("class")
        node = Node(f"{tag}.{kind}" if kind else tag)
        self.open[-1].children.append(node)
        if tag not in _VOID:
            self.open.append(node)

    def handle_endtag(self, tag: str) -> None:
        for depth in range(len(self.open) - 1, 0, -1):
            if self.open[depth].label.split(".")[0] == tag:
                del self.open[depth:]
                return


def parse(html: str) -> Node:
    """The tree of tags under a root; a tag that is never closed ends with its parent."""
    tree = _Tree()
    tree.feed(html)
    tree.close()
    return tree.root


def html_similarity(found: str, wanted: str) -> float:
    """1 for equal structure, 0 for nothing in common (also when either has no tag and the other has)."""
    one, other = _Ordered(parse(found)), _Ordered(parse(wanted))
    largest = max(len(one.labels), len(other.labels)) - 1  # without the root that both have
    if largest == 0:
        return 1.0
    return 1.0 - tree_distance(one, other) / largest


class _Ordered:
    """A tree in post-order: labels, leftmost leaf of each node, and the key roots of the distance."""

    def __init__(self, root: Node):
        self.labels: list[str] = []
        self.leftmost: list[int] = []
        self._visit(root)
        last: dict[int, int] = {leaf: index for index, leaf in enumerate(self.leftmost)}
        self.key_roots = sorted(last.values())

    def _visit(self, node: Node) -> int:
        """Append the node after its children; returns its leftmost leaf's index."""
        leaves = [self._visit(child) for child in node.children]
        index = len(self.labels)
        self.labels.append(node.label)
        self.leftmost.append(leaves[0] if leaves else index)
        return self.leftmost[index]


def tree_distance(one: _Ordered, other: _Ordered) -> int:
    """Fewest insertions, deletions and relabellings that turn one tree into the other."""
    distance = [[0] * len(other.labels) for _ in one.labels]
    for i in one.key_roots:
        for j in other.key_roots:
            _subtrees(one, other, i, j, distance)
    return distance[-1][-1]


def _subtrees(one: _Ordered, other: _Ordered, i: int, j: int, distance: list[list[int]]) -> None:
    left_i, left_j = one.leftmost[i], other.leftmost[j]
    rows, columns = i - left_i + 2, j - left_j + 2
    forest = [[0] * columns for _ in range(rows)]
    for row in range(1, rows):
        forest[row][0] = row
    forest[0] = list(range(columns))
    for row in range(1, rows):
        a = left_i + row - 1
        for column in range(1, columns):
            b = left_j + column - 1
            cheapest = min(forest[row - 1][column], forest[row][column - 1]) + 1
            if one.leftmost[a] == left_i and other.leftmost[b] == left_j:
                change = one.labels[a] != other.labels[b]
                forest[row][column] = min(cheapest, forest[row - 1][column - 1] + change)
                distance[a][b] = forest[row][column]
            else:
                before = forest[one.leftmost[a] - left_i][other.leftmost[b] - left_j]
                forest[row][column] = min(cheapest, before + distance[a][b])
