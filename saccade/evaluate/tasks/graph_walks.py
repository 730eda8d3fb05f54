"""Graph walks: a long list of directed edges; which nodes are so many steps away from one of them, or lead to it?"""

from __future__ import annotations

import re
from collections.abc import Sequence
from dataclasses import dataclass
from string import ascii_lowercase
from typing import Any, ClassVar

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample, Worded, pack, say, source

KINDS = ("walk", "parents")
NODE = re.compile(r"\b[a-z]{4}\b")
# nodes of an answer, and edges of each node
FEWEST, MOST, DEGREE = 1, 8, 2


@dataclass(frozen=True)
class GraphWalks(Worded):
    """Edges `a -> b` in no order, two from each node, and a question for the nodes at a distance or for parents.

    The form of GraphWalks (data set: openai/graphwalks). Nodes are four letters. A walk asks for the nodes whose
    shortest path from the start has exactly `depth` edges. Score: F1 of the set of nodes that are said; 1 where both
    sets are empty. Departs from it: one worked example, short names, no answer of more than eight nodes.

    Args:
        kind: "walk" or "parents" (None: in turn).
        depth: edges of a walk, 1 to 3 (None: in turn).
        max_new_tokens: tokens kept free for the answer.
    """

    name: ClassVar[str] = "graph-walks"
    file: ClassVar[str] = __file__
    kind: str | None = None
    depth: int | None = None
    max_new_tokens: int = 64

    def __post_init__(self):
        if self.kind is not None and self.kind not in KINDS:
            raise InputError(f"GraphWalks: unknown kind {self.kind!r}; known are {', '.join(KINDS)}")
        if self.depth is not None and not 1 <= self.depth <= 3:
            raise InputError(f"GraphWalks: depth must be 1 to 3, got {self.depth}")

    def sample(self, tokenizer: Any, length: int, index: int, seed: int = 0) -> Sample:
        rng, said = source(self.name, length, index, seed), self.said
        kind = self.kind or KINDS[index % len(KINDS)]
        depth = self.depth or 1 + index // len(KINDS) % 3
        # an edge takes at least five tokens
        most = max(length // 5, 8)
        nodes: dict[str, None] = {}
        while len(nodes) < most:
            nodes["".join(rng.choices(ascii_lowercase, k=4))] = None
        names = list(nodes)
        lots = [rng.random() for _ in range(most)]
        order = [rng.random() for _ in range(most)]

        def edges(size: int) -> list[tuple[str, str]]:
            """Edge i leads from node i // DEGREE to another one among those that have edges."""
            count = -(-size // DEGREE)
            found = {}
            for i in range(size):
                start = i // DEGREE
                end = (start + 1 + int(lots[i] * (count - 1))) % count
                found[names[start], names[end]] = order[i]
            return sorted(found, key=found.__getitem__)

        def asked(size: int) -> tuple[str, list[str]]:
            every = edges(size)
            for start in names[: -(-size // DEGREE)]:
                reached = walk(every, start, depth) if kind == "walk" else parents(every, start)
                if FEWEST <= len(reached) <= MOST:
                    return start, reached
            return names[0], []

        def question(size: int) -> str:
            return say(said[kind], node=asked(size)[0], depth=depth)

        def compose(size: int) -> str:
            lines = [say(said["edge"], start=start, end=end) for start, end in edges(size)]
            return "\n".join(lines) + "\n\n" + question(size)

        head = said["head"] + self._example(kind)
        ids, size = pack(tokenizer, length - self.max_new_tokens, compose, 8, most, head)
        reached = asked(size)[1]
        return Sample(ids, ", ".join(reached), self.max_new_tokens, None, question(size), tuple(reached))

    def score(self, prediction: str, sample: Sample) -> float:
        said, want = set(NODE.findall(prediction)), set(sample.answers)
        return 1.0 if said == want else 2 * len(said & want) / (len(said) + len(want))

    def _example(self, kind: str) -> str:
        """A worked example on four edges."""
        every = [("oaks", "elms"), ("elms", "firs"), ("oaks", "firs"), ("firs", "oaks")]
        depth, node = 1, "oaks"
        reached = walk(every, node, depth) if kind == "walk" else parents(every, node)
        lines = [say(self.said["edge"], start=start, end=end) for start, end in every]
        return "\n".join(lines) + f"\n\n{say(self.said[kind], node=node, depth=depth)} {', '.join(reached)}\n\n"


def walk(edges: Sequence[tuple[str, str]], start: str, depth: int) -> list[str]:
    """The nodes whose shortest path from the start has exactly `depth` edges, sorted.

    Example:
        >>> walk([("a", "b"), ("b", "c"), ("a", "c"), ("c", "d")], "a", 2)
        ['d']
    """
    after: dict[str, list[str]] = {}
    for a, b in edges:
        after.setdefault(a, []).append(b)
    seen, front = {start}, {start}
    for _ in range(depth):
        front = {b for a in front for b in after.get(a, ())} - seen
        seen |= front
    return sorted(front)


def parents(edges: Sequence[tuple[str, str]], node: str) -> list[str]:
    """The nodes with an edge to this one, sorted."""
    return sorted({a for a, b in edges if b == node})
