"""Which samples are one, and which of them stays. Pure: edges in, decisions out.

Components are taken on the driver: an edge is 16 bytes, so 100 million pairs take 1.6 GB. Daft has no graph operation;
what finds and verifies the pairs, the expensive part, is Daft's.
"""

from __future__ import annotations

import numpy as np
from scipy.sparse import coo_array
from scipy.sparse.csgraph import connected_components


def components(num: int, edges: np.ndarray) -> np.ndarray:
    """int64[num]: the smallest member of each node's component. edges: int64[E, 2] of nodes below `num`."""
    graph = coo_array((np.ones(len(edges), np.int8), (edges[:, 0], edges[:, 1])), shape=(num, num))
    _, label = connected_components(graph, directed=False)
    first = np.full(label.max(initial=-1) + 1, num, np.int64)
    np.minimum.at(first, label, np.arange(num))
    return first[label]


def duplicates(group: np.ndarray, rank: np.ndarray) -> np.ndarray:
    """bool[N]: everything but the member of lowest rank of each group. rank: int64[N], all different."""
    order = np.lexsort((rank, group))
    first = np.ones(len(order), bool)
    first[1:] = group[order][1:] != group[order][:-1]
    found = np.ones(len(order), bool)
    found[order[first]] = False
    return found
