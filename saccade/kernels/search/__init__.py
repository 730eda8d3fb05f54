"""Search for the keys with the largest inner products: exact, by faiss, or along a graph that queries have drawn.

All kinds have one face: `build(keys, queries)` once, then `search(queries, count) -> Found(ids, scanned)`.
"""

from saccade.kernels.search.api import KINDS, Found, Index, check_kind, index
from saccade.kernels.search.background import Indices

__all__ = ["KINDS", "Found", "Index", "Indices", "check_kind", "index"]
