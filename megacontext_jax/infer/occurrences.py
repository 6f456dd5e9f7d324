"""An index of a history by token, for the lexical lens."""

import numpy as np

from megacontext_jax.context.store import TreeStore
from megacontext_jax.context.store_base import RamRows


class Occurrences:
    """Where in a history every token stands, for lexical match in time that grows with its logarithm."""

    def __init__(self):
        self._places: dict[int, RamRows] = {}
        self._tokens = 0

    def read(self, tree: TreeStore) -> None:
        """Takes in what the tree has gained."""
        ids_n = tree.tokens(self._tokens)
        if not len(ids_n):
            return
        order_n = np.argsort(ids_n, kind="stable")
        found, first = np.unique(ids_n[order_n], return_index=True)
        for token, places in zip(found.tolist(), np.split(order_n, first[1:]), strict=True):
            if token not in self._places:
                self._places[token] = RamRows(np.dtype(np.int64), ())
            self._places[token].append(self._tokens + places)
        self._tokens += len(ids_n)

    def count(self, token: int, begin, end):
        """How often the token stands in [begin, end), elementwise."""
        if token not in self._places:
            return np.zeros(len(begin), np.int32)
        places = self._places[token].read(0, len(self._places[token]))
        return np.searchsorted(places, end) - np.searchsorted(places, begin)
