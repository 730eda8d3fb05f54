"""Plans: the JSON round trip, what they check, and files that are not what they say."""

import dataclasses
import json
import types

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from saccade.core.errors import FileError, PlanError
from saccade.core.plan import PHASES, VERSION, Assign, ModelShape, Plan
from saccade.core.table import METHODS, build, family
from saccade.methods.select.streaming import Streaming

SHAPE = ModelShape(3, 4, 2, "tiny")
ARGS = {
    "prefill": [
        ("dense", {}),
        ("streaming", {"sink": 4, "recent": {"base": 64, "slope": 0.05}}),
        ("pooled", {"budget": 0.25}),
        ("minference", {"columns": 8}),
    ],
    "decode": [("dense", {}), ("streaming", {"recent": 9}), ("tidal", {"budget": 9, "first": 0})],
    "cache": [("duo", {"sink": 1, "recent": {"base": 5, "slope": 0.0}})],
}


@st.composite
def plans(draw):
    shape = ModelShape(draw(st.integers(1, 4)), 4, draw(st.sampled_from([1, 2, 4])), draw(st.text(max_size=8)))
    layers = []
    for _ in range(shape.layers):
        row = []
        for phase in PHASES:
            count = shape.kv_heads if phase == "cache" else shape.heads
            ids = draw(st.permutations(range(count)))
            cut = draw(st.integers(0, count))
            for heads in draw(st.sampled_from([(), (None,), (ids[:cut], ids[cut:])])):
                if heads is None or heads:
                    method, args = draw(st.sampled_from(ARGS[phase]))
                    row.append(Assign(None if heads is None else tuple(heads), method, args, phase))
        layers.append(tuple(row))
    return Plan(shape, tuple(layers), draw(st.text(max_size=20)))


@settings(max_examples=50, deadline=None)
@given(plans())
def test_json_and_back(plan):
    assert Plan.from_json(plan.to_json()) == plan
    assert json.loads(plan.to_json())["saccade_plan"] == VERSION


@settings(max_examples=10, deadline=None)
@given(plans())
def test_file_and_back(tmp_path_factory, plan):
    path = tmp_path_factory.mktemp("plan") / "plan.json"
    plan.save(path)
    assert Plan.load(path) == plan
    assert [p.name for p in path.parent.iterdir()] == ["plan.json"]


def test_uniform():
    plan = Plan.uniform(SHAPE, prefill=build("streaming", {"sink": 4}), decode="dense", cache=("duo", {}), skip=[1])
    assert [len(row) for row in plan.layers] == [3, 0, 3]
    assert plan.phase(0, "prefill")[0].build() == build("streaming", {"sink": 4})
    assert plan.phase(1, "prefill") == ()
    assert plan.phase(2, "cache")[0].heads is None


def test_per_head_and_also():
    one = Plan.per_head(SHAPE, [[Assign((0, 3), "streaming")], [], []], note="a")
    two = Plan.uniform(SHAPE, cache="duo")
    both = one.also(two)
    assert [len(row) for row in both.layers] == [2, 1, 1]
    assert both.note == "a"
    with pytest.raises(PlanError, match="3 layers"):
        one.also(Plan.uniform(ModelShape(2, 4, 2)))
    with pytest.raises(PlanError, match=r"heads \[0, 1, 2, 3\] already|heads \[0, 3\] already"):
        one.also(Plan.uniform(SHAPE, prefill="dense"))


def test_length_rules():
    assign = Assign(None, "streaming", {"sink": 4, "recent": {"base": 100, "slope": 0.1}})
    assert assign.rules and not Assign(None, "dense").rules
    assert [assign.build(length).recent for length in (0, 1000, 10_000)] == [100, 200, 1100]
    assert Assign(None, "streaming", {"recent": {"base": -5, "slope": 0}}).build(10).recent == 1


def test_model_shapes():
    config = types.SimpleNamespace(num_hidden_layers=2, num_attention_heads=8, num_key_value_heads=None, model_type="x")
    assert ModelShape.of(config) == ModelShape(2, 8, 8, "x")
    outer = types.SimpleNamespace(config=types.SimpleNamespace(get_text_config=lambda: config))
    assert ModelShape.of(outer) == ModelShape(2, 8, 8, "x")
    with pytest.raises(PlanError, match="ModelShape"):
        ModelShape.of(object())


@pytest.mark.parametrize("other", [ModelShape(2, 4, 2), ModelShape(3, 8, 2), ModelShape(3, 4, 4)])
def test_a_plan_for_another_model(other):
    plan = Plan.uniform(SHAPE, prefill="streaming")
    plan.check_model(ModelShape(3, 4, 2, "another name"))
    with pytest.raises(PlanError, match="tiny: 3 layers, 4 query heads, 2 kv heads, the model has"):
        plan.check_model(other)


@pytest.mark.parametrize(
    ("row", "says"),
    [
        ([Assign((0, 4), "streaming")], r"query heads in 0\.\.3"),
        ([Assign((-1,), "streaming")], r"query heads in 0\.\.3"),
        ([Assign((0, 0), "streaming")], "distinct"),
        ([Assign((), "streaming")], "distinct"),
        ([Assign((2,), "duo", phase="cache")], r"key-value heads in 0\.\.1"),
        ([Assign((0,), "streaming"), Assign(None, "dense")], r"heads \[0\] already have a prefill method"),
        ([Assign(None, "duo", phase="prefill")], "works in cache, not in prefill"),
        ([Assign(None, "minference", phase="decode")], "works in prefill, not in decode"),
        ([Assign(None, "streaming", phase="training")], "prefill, decode, cache, got 'training'"),
        ([Assign(None, "streeming")], "did you mean 'streaming'"),
        ([Assign(None, "streaming", {"recent": {"base": 1}})], "length rule"),
        ([Assign(None, "streaming", {"recent": {"base": "1", "slope": 2}})], "length rule"),
        ([Assign(None, "streaming", {"recent": {"base": float("nan"), "slope": 0}})], "length rule"),
        ([Assign(None, "streaming", {"recent": {"base": float("inf"), "slope": 0}})], "length rule|too large"),
        ([Assign(None, "streaming", {"recent": {"base": 1, "slope": 1e300}})], "too large"),
        ([Assign(None, "lightning")], "layer|weights"),
    ],
)
def test_assignments_that_cannot_be(row, says):
    with pytest.raises(PlanError, match=says):
        Plan.per_head(SHAPE, [row, [], []])


def test_not_a_method():
    for thing in (3, object(), ("a", {}, 1), ModelShape, SHAPE):
        with pytest.raises(PlanError):
            Plan.uniform(SHAPE, prefill=thing)


GOOD = json.loads(Plan.uniform(SHAPE, prefill=("streaming", {"sink": 1}), cache="duo").to_json())


def spoiled(*path, to):
    """The good plan with one place changed."""
    data = json.loads(json.dumps(GOOD))
    at = data
    for key in path[:-1]:
        at = at[key]
    at[path[-1]] = to
    return json.dumps(data)


HOSTILE = {
    "empty": ("", "JSON"),
    "truncated": (json.dumps(GOOD)[:-20], "whole"),
    "not an object": ("[1, 2]", "not a saccade plan"),
    "a number": ("3", "not a saccade plan"),
    "another file": ('{"layers": []}', "not a saccade plan"),
    "newer": (spoiled("saccade_plan", to=VERSION + 1), "version 2"),
    "version is true": (spoiled("saccade_plan", to=True), "version"),
    "version is a list": (spoiled("saccade_plan", to=[1]), "version"),
    "unknown field": (spoiled("extra", to=1), "unknown fields.*extra"),
    "no model": (json.dumps({k: v for k, v in GOOD.items() if k != "model"}), "model"),
    "model is a list": (spoiled("model", to=[]), "model"),
    "unknown model field": (spoiled("model", "width", to=1), "width"),
    "model without a field": (spoiled("model", to={"layers": 3, "heads": 4}), r"has layers, heads, kv_heads.*got"),
    "layers as text": (spoiled("model", "layers", to="3"), "layers.*int"),
    "layers as float": (spoiled("model", "layers", to=3.0), "layers.*int"),
    "layers true": (spoiled("model", "layers", to=True), "layers.*int"),
    "no layers": (spoiled("model", "layers", to=0), "1 to 65536"),
    "huge": (spoiled("model", "heads", to=10**30), "1 to 65536"),
    "negative": (spoiled("model", "kv_heads", to=-2), "1 to 65536"),
    "kv heads do not divide": (spoiled("model", "kv_heads", to=3), "kv_heads|multiple|share"),
    "name is a list": (spoiled("model", "name", to=[1]), "name"),
    "note is a number": (spoiled("note", to=1), "note"),
    "rows missing": (spoiled("layers", to=GOOD["layers"][:2]), "2 layers are listed"),
    "rows is an object": (spoiled("layers", to={}), "layers.*list"),
    "row is text": (spoiled("layers", 0, to="dense"), "layer 0.*list"),
    "entry is text": (spoiled("layers", 1, 0, to="dense"), "layer 1.*dict"),
    "entry without method": (spoiled("layers", 1, 0, to={"heads": None}), "layer 1"),
    "unknown entry field": (spoiled("layers", 1, 0, "speed", to=9), "speed"),
    "heads as text": (spoiled("layers", 0, 0, "heads", to="all"), "heads.*list"),
    "heads as floats": (spoiled("layers", 0, 0, "heads", to=[0.0]), "heads.*int"),
    "heads nested": (spoiled("layers", 0, 0, "heads", to=[[0]]), "heads.*int"),
    "heads beyond": (spoiled("layers", 0, 0, "heads", to=[7]), r"0\.\.3"),
    "heads huge": (spoiled("layers", 0, 0, "heads", to=[10**40]), r"0\.\.3"),
    "method is a number": (spoiled("layers", 0, 0, "method", to=3), "method.*str"),
    "method unknown": (spoiled("layers", 0, 0, "method", to="stream"), "did you mean"),
    "method is a path": (spoiled("layers", 0, 0, "method", to="os:system"), "unknown method"),
    "args is a list": (spoiled("layers", 0, 0, "args", to=[1]), "args.*dict"),
    "argument unknown": (spoiled("layers", 0, 0, "args", to={"sinks": 1}), "did you mean 'sink'"),
    "argument is text": (spoiled("layers", 0, 0, "args", to={"sink": "1"}), "sink"),
    "argument is a list": (spoiled("layers", 0, 0, "args", to={"sink": [1]}), "sink"),
    "argument is null": (spoiled("layers", 0, 0, "args", to={"sink": None}), "sink"),
    "argument is huge": (spoiled("layers", 0, 0, "args", to={"sink": 10**40}), "sink"),
    "argument is NaN": (spoiled("layers", 0, 0, "args", to={"sink": float("nan")}), "sink"),
    "rule is odd": (spoiled("layers", 0, 0, "args", to={"sink": {"base": 1}}), "length rule"),
    "rule is NaN": (spoiled("layers", 0, 0, "args", to={"sink": {"base": float("nan"), "slope": 1}}), "length rule"),
    "rule is true": (spoiled("layers", 0, 0, "args", to={"sink": {"base": True, "slope": 1}}), "length rule"),
    "cache argument": (spoiled("layers", 0, 1, "args", to={"recent": 1.5}), "recent"),
    "phase unknown": (spoiled("layers", 0, 0, "phase", to="train"), "phase"),
    "phase is null": (spoiled("layers", 0, 0, "phase", to=None), "phase.*str"),
    "deep": ("[" * 100_000, "JSON"),
    "deep inside": ('{"saccade_plan": 1, "note": ' + "[" * 100_000, "JSON"),
    "digits": ('{"saccade_plan": ' + "1" * 5000 + "}", "JSON|version"),
    "surrogates": ('{"saccade_plan": 1, "note": "\\ud800"}', "model"),
    "twice": ('{"saccade_plan": 1, "saccade_plan": 2}', "version 2"),
}


@pytest.mark.parametrize("name", HOSTILE)
def test_hostile_text(name):
    text, says = HOSTILE[name]
    with pytest.raises(PlanError, match=f"(?s){says}") as found:
        Plan.from_json(text, "given.json")
    assert len(str(found.value)) < 500
    # of several files the person must know which
    assert str(found.value).startswith("given.json: ")


ODD = {
    "heads as floats": (lambda: Assign((0.0, 1.0), "streaming"), "heads must be"),
    "heads as booleans": (lambda: Assign((True, False), "streaming"), "heads must be"),
    "heads as a number": (lambda: Assign(3, "streaming"), "heads must be"),
    "heads as text": (lambda: Assign("01", "streaming"), "heads must be"),
    "args as a list": (lambda: Assign(None, "streaming", [1]), "args must be a dict"),
    "args are None": (lambda: Plan.uniform(SHAPE, prefill=("streaming", None)), "neither a method"),
    "a layer to skip that is not there": (lambda: Plan.uniform(SHAPE, prefill="dense", skip=[0, 3]), r"skip.*0\.\.2"),
    "a layer to skip from the end": (lambda: Plan.uniform(SHAPE, prefill="dense", skip=[-1]), r"skip.*\[-1\]"),
    "one layer to skip": (lambda: Plan.uniform(SHAPE, prefill="dense", skip=1), "skip must be a list"),
    "names for layers": (lambda: Plan.per_head(SHAPE, ["dense"] * 3), "list of Assign for each layer"),
    "assigns for layers": (lambda: Plan.per_head(SHAPE, [Assign(None, "dense")] * 3), "list of Assign for each layer"),
    "names for assigns": (lambda: Plan.per_head(SHAPE, [["dense"]] * 3), "layer 0: a list of Assign"),
    "no heads": (lambda: Plan.uniform(ModelShape(3, 0, 0), prefill="dense"), "heads must be 1 to"),
    "heads that do not share": (lambda: Plan.uniform(ModelShape(3, 4, 3), prefill="dense"), "cannot share 3"),
    "layers as a float": (lambda: Plan.per_head(ModelShape(3.0, 4, 2), [[]] * 3), "layers: must be int"),
}


@pytest.mark.parametrize("name", ODD)
def test_odd_python_is_refused_in_words(name):
    make, says = ODD[name]
    with pytest.raises(PlanError, match=says):
        make()


@dataclasses.dataclass(frozen=True)
class Mine(Streaming):
    """A method that is not in the package."""


def test_a_method_from_elsewhere_needs_a_name_and_then_is_like_all_others(monkeypatch):
    with pytest.raises(PlanError, match=r"Mine has no name.*METHODS\['name'\] = '.*test_plan:Mine'"):
        Plan.uniform(SHAPE, prefill=Mine(recent=5))
    monkeypatch.setitem(METHODS, "mine", f"{__name__}:Mine")
    plan = Plan.uniform(SHAPE, prefill=Mine(recent=5))
    assert Plan.from_json(plan.to_json()) == plan and plan.layers[0][0].build() == Mine(recent=5)
    assert family("mine") == "own"


@pytest.mark.parametrize("heads", [[0, 2], range(0, 3, 2), (0, 2)])
def test_heads_may_come_in_any_list_and_come_back_from_json_the_same(heads):
    plan = Plan.per_head(SHAPE, [[Assign(heads, "dense")]] * 3)
    assert Plan.from_json(plan.to_json()) == plan and plan.layers[0][0].heads == (0, 2)


@settings(max_examples=150, deadline=None)
@given(st.data())
def test_any_change_is_read_or_refused(data):
    # one place of a good plan becomes anything JSON can say
    text = json.loads(json.dumps(GOOD))
    at, path = text, []
    while isinstance(at, (dict, list)) and at and (not path or data.draw(st.booleans())):
        key = data.draw(st.sampled_from(sorted(at) if isinstance(at, dict) else range(len(at))))
        parent, at = at, at[key]
        path.append(key)
    parent[key] = data.draw(
        st.recursive(
            st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
            lambda inner: st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=5), inner, max_size=3),
            max_leaves=4,
        )
    )
    try:
        plan = Plan.from_json(json.dumps(text))
    except PlanError:
        return
    assert Plan.from_json(plan.to_json()) == plan


@settings(max_examples=60, deadline=None)
@given(st.integers(0, len(json.dumps(GOOD)) - 1))
def test_any_truncation_is_refused(length):
    with pytest.raises(PlanError):
        Plan.from_json(json.dumps(GOOD)[:length])


def test_files_that_are_not_there_or_not_text(tmp_path, monkeypatch):
    (tmp_path / "bytes").write_bytes(b"\xff\xfe\x00\x9f")
    for path in (tmp_path / "none.json", tmp_path, tmp_path / "bytes"):
        with pytest.raises(FileError, match=str(path)):
            Plan.load(path)
    monkeypatch.setattr("saccade.core.plan.LIMIT", 3)
    with pytest.raises(FileError, match="4 bytes"):
        Plan.load(tmp_path / "bytes")


def test_a_plan_that_cannot_be_written_leaves_the_old_one(tmp_path):
    plan, path = Plan.uniform(SHAPE), tmp_path / "plan.json"
    plan.save(path)
    with pytest.raises(OSError):
        plan.save(tmp_path / "nowhere" / "plan.json")
    bad = Plan.uniform(SHAPE)
    object.__setattr__(bad, "note", {1, 2})
    with pytest.raises(TypeError):
        bad.save(path)
    assert Plan.load(path) == plan
    assert [p.name for p in tmp_path.iterdir()] == ["plan.json"]
