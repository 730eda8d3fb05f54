"""The table's functions: find, build, family, and what they say about names that are not there."""

import pytest

from saccade.core.errors import PlanError, SaccadeError
from saccade.core.table import METHODS, build, family, find


def test_find_imports_one_class():
    assert find("streaming").__name__ == "Streaming"
    assert family("streaming") == "select"


def test_build():
    method = build("streaming", {"sink": 2})
    assert (method.sink, method.recent) == (2, type(method)().recent)
    assert build("dense") == build("dense", {})


def test_arguments_are_not_kept():
    args = {"sink": 2}
    build("streaming", args)
    assert args == {"sink": 2}


@pytest.mark.parametrize(
    ("name", "args", "says"),
    [
        ("streeming", {}, "did you mean 'streaming'.*saccade list"),
        ("xyzzy", {}, "unknown method 'xyzzy'; "),
        ("", {}, "unknown method ''"),
        ("streaming", {"recnt": 4}, "unknown argument 'recnt', did you mean 'recent'.* it takes sink, recent"),
        ("streaming", {"recent": 0}, "streaming: .*recent"),
        ("streaming", {"recent": "much"}, "recent"),
        ("streaming", {"recent": None}, "recent"),
        ("streaming", {"recent": [1]}, "recent"),
        ("streaming", {"recent": 2.5}, "recent"),
        ("pooled", {"budget": 1.5}, "budget.*share"),
        ("pooled", {"budget": True}, "budget"),
        ("pooled", {"block_q": 0}, "block"),
        ("pooled", {"block_q": 2.5}, "block"),
        ("pooled", {"block_k": "64"}, "block"),
        ("duo", {"sink": -1}, "sink"),
        ("duo", {"recent": 0.5}, "recent"),
        ("duo", {"sink": 1.5}, "sink"),
        ("duo", {"sink": True}, "sink"),
        ("tidal", {"budget": 0}, "budget"),
        ("tidal", {"first": -1}, "first"),
        ("random", {"seed": -1}, "seed"),
        ("lightning", {}, "weights"),
        ("routing", {"width": 4}, "weights"),
    ],
)
def test_what_cannot_be_built(name, args, says):
    with pytest.raises(PlanError, match=f"(?s){says}") as found:
        build(name, args)
    assert isinstance(found.value, SaccadeError)
    assert name in str(found.value)


@pytest.mark.parametrize("name", METHODS)
def test_an_unknown_argument_says_what_there_is(name):
    with pytest.raises(PlanError, match=name):
        build(name, {"nonsense": 1})
