"""The one face of all vector indices, and the table of their kinds."""

from __future__ import annotations

import difflib
import importlib
import importlib.util
from typing import Any, NamedTuple, Protocol

import torch
from torch import Tensor

from saccade.core.errors import InputError, UnsupportedError

KINDS: dict[str, str] = {
    "flat": "saccade.kernels.search.flat:Flat",
    "graph": "saccade.kernels.search.graph:Graph",
    "lists": "saccade.kernels.search.lists:Lists",
    "faiss-flat": "saccade.kernels.search.libfaiss:FaissFlat",
    "faiss-ivf": "saccade.kernels.search.libfaiss:FaissIVF",
    "faiss-hnsw": "saccade.kernels.search.libfaiss:FaissHNSW",
    "faiss-nsg": "saccade.kernels.search.libfaiss:FaissNSG",
}


class Found(NamedTuple):
    """The keys found for each query, best first: ids int64 [m,count], -1 where fewer were found.

    `scanned` is how many inner products with stored vectors a query cost, on average.
    """

    ids: Tensor
    scanned: float


class Index(Protocol):
    """A vector index over the keys of one head."""

    def build(self, keys: Tensor, queries: Tensor | None = None) -> None:
        """Make the index for keys [n,D]; queries [m,D] are of the kind that will be asked, best first to learn from."""

    def search(self, queries: Tensor, count: int) -> Found:
        """The `count` keys with the largest inner product with each query [m,D]."""

    def bytes(self) -> int:
        """Bytes held, the keys among them where it keeps a copy."""


def check_kind(kind: str) -> None:
    """Raise unless an index of this kind can be made here.

    Raises:
        InputError: no such kind; names the nearest.
        UnsupportedError: faiss is not installed.
    """
    if kind not in KINDS:
        near = difflib.get_close_matches(str(kind), list(KINDS), n=1, cutoff=0.4)
        hint = f", did you mean {near[0]!r}?" if near else ""
        raise InputError(f"search: unknown kind of index {kind!r}{hint}; there are {', '.join(KINDS)}")
    if kind.startswith("faiss") and importlib.util.find_spec("faiss") is None:
        raise UnsupportedError(
            f"search: {kind!r} needs faiss: pip install 'saccade[search]', or take 'graph' or 'flat'"
        )


def index(kind: str, **arguments: Any) -> Index:
    """An index by its kind, empty.

    Args:
        kind: "flat" (exact), "graph" (learns from queries), "lists" (clusters), "faiss-flat", "faiss-ivf",
            "faiss-hnsw", "faiss-nsg".
        arguments: of its class, by name.

    Raises:
        InputError: no such kind (names the nearest), or an argument that it does not take.
        UnsupportedError: faiss is not installed.

    Example:
        >>> import torch
        >>> flat = index("flat")
        >>> flat.build(torch.tensor([[1.0, 0.0], [0.0, 2.0], [3.0, 1.0]]))
        >>> flat.search(torch.tensor([[1.0, 0.0]]), 2)
        Found(ids=tensor([[2, 0]]), scanned=3.0)
    """
    check_kind(kind)
    module, _, name = KINDS[kind].partition(":")
    cls = getattr(importlib.import_module(module), name)
    try:
        made: Index = cls(**arguments)
    except TypeError as error:
        raise InputError(f"search: {kind!r} does not take these arguments: {error}") from error
    return made


def check_keys(name: str, keys: Tensor) -> None:
    """Raise InputError unless keys are [n,D], finite and not empty."""
    if keys.ndim != 2 or 0 in keys.shape or not keys.dtype.is_floating_point:
        raise InputError(
            f"{name}: keys must be floating point [n, width], none empty; got {list(keys.shape)} {keys.dtype}"
        )
    # NaN and infinity are their own smallest or largest
    if not bool(torch.stack(keys.aminmax()).isfinite().all()):
        raise InputError(f"{name}: keys hold NaN or infinity")


def check_search(name: str, width: int, queries: Tensor, count: int) -> None:
    """Raise InputError unless the queries fit the keys and the count is one."""
    if width < 1:
        raise InputError(f"{name}: build() it first")
    if queries.ndim != 2 or queries.shape[1] != width:
        raise InputError(f"{name}: queries must be [m, {width}] like its keys, got {list(queries.shape)}")
    if isinstance(count, bool) or not isinstance(count, int) or count < 1:
        raise InputError(f"{name}: count must be an int >= 1, got {count!r}")
