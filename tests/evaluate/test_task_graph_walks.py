import re
from itertools import pairwise

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks.base import Sample
from saccade.evaluate.tasks.graph_walks import GraphWalks

EDGE = re.compile(r"([a-z]{4}) -> ([a-z]{4})")


def distances(edges, start):
    """Shortest paths by relaxing every edge until nothing changes (Bellman-Ford)."""
    far = {start: 0}
    changed = True
    while changed:
        changed = False
        for a, b in edges:
            if a in far and far[a] + 1 < far.get(b, 10**9):
                far[b] = far[a] + 1
                changed = True
    return far


def graphs(text):
    """Edges and question of the worked example and of the sample itself."""
    parts = text.split("\n\n")
    found = [(EDGE.findall(part), after) for part, after in pairwise(parts)]
    return [(edges, question) for edges, question in found if edges]


def solve(edges, question):
    if (match := re.search(r"from (\w{4}) reach in exactly (\d) steps", question)) is not None:
        far = distances(edges, match.group(1))
        return {node for node, steps in far.items() if steps == int(match.group(2))}
    node = re.search(r"lead to (\w{4})\?", question).group(1)
    return {a for a, b in edges if b == node}


@pytest.mark.parametrize("kind", ["walk", "parents"])
@pytest.mark.parametrize("depth", [1, 2, 3])
def test_relaxing_edges_gives_the_answer(kind, depth, tokenizer):
    for index in range(2):
        sample = GraphWalks(kind=kind, depth=depth).sample(tokenizer, 1500, index)
        (_, said), (edges, question) = graphs(tokenizer.decode(sample.ids))
        assert question == sample.question
        assert solve(edges, question) == set(sample.answers) and 1 <= len(sample.answers) <= 8
        assert len(edges) == len(set(edges)) > 40 and all(a != b for a, b in edges)
        shown = graphs(tokenizer.decode(sample.ids))[0][0]
        assert solve(shown, said) == set(re.findall(r"[a-z]{4}", said.rsplit(" are ", 1)[1]))


def test_kinds_and_depths_take_turns(bpe):
    asked = [GraphWalks().sample(bpe, 900, index).question for index in range(6)]
    assert [re.search(r"(\d) steps", question).group(1) for question in asked[::2]] == ["1", "2", "3"]
    assert all("arrow lead" in question for question in asked[1::2])


def test_f1_by_hand():
    task, sample = GraphWalks(), Sample([], "", 9, answers=("abcd", "efgh"))
    for said, score in (
        ("efgh, abcd", 1.0),
        ("abcd", 2 / 3),
        ("abcd, efgh, ijkl, mnop", 2 / 3),
        ("abcd, ijkl", 0.5),
        ("ijkl", 0.0),
        ("none", 0.0),
    ):
        assert task.score(said, sample) == pytest.approx(score)
    assert task.score("", Sample([], "", 9)) == 1.0
    for options in ({"kind": "bfs"}, {"depth": 0}, {"depth": 4}):
        with pytest.raises(InputError, match="GraphWalks"):
            GraphWalks(**options)
