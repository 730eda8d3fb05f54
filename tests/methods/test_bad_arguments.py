"""Every method's every number: what cannot be is refused when the method is made, what can be runs.

Numbers are taken from the classes themselves, so that a new method is held to this without a line here.
"""

import math
import re
from dataclasses import MISSING, fields, is_dataclass

import pytest

from saccade import Assign, ModelShape, Plan
from saccade.core.errors import PlanError, SaccadeError
from saccade.core.table import METHODS, build, find
from saccade.methods.base import Layer
from saccade.testing import inputs, run, stream

# a small instance of each method, whose other arguments stay while one is changed
SMALL = {name: inputs._INSTANCES[name][1] for name in METHODS}
NOT_WHOLE = [-1, 1.5, True, "all", math.nan, [1]]
NOT_A_SHARE = [-0.1, 1.5, math.nan, math.inf, True, "half"]
# floats with another range: a cosine, beyond 1 = always; anything above 0
WIDER = {
    ("recycled", "threshold"): [-1.5, math.nan, True, "half"],
    ("actqkv", "temperature"): [0.0, -1.0, math.nan, "hot"],
}
LENGTH, LARGE = 70, 300  # tokens; more than there are


def arguments(name):
    """The small instance's arguments; files are made where they are asked for."""
    return {key: value() if callable(value) else value for key, value in SMALL[name].items()}


def numbers(kinds):
    """(method, field) of all fields whose annotation is one of these."""
    found = []
    for name in METHODS:
        cls = find(name)
        if is_dataclass(cls):
            found += [(name, f.name) for f in fields(cls) if str(f.type) in kinds]
    return found


WHOLE = numbers(("int", "int | None", 'int | Literal["auto"]'))
SHARES = numbers(("float",))
BUDGETS = numbers(("int | float",))


def test_all_numbers_of_all_methods_are_here():
    others = numbers(("bool", "str", "str | None", "dict[str, Any]", "tuple[int, ...]"))
    for name in METHODS:
        if is_dataclass(find(name)):
            for f in fields(find(name)):
                known = (name, f.name) in WHOLE + SHARES + BUDGETS + others
                assert known or "Literal" in str(f.type), f"{name}: {f.name} is {f.type}, which no test here knows"


@pytest.mark.parametrize(("name", "field"), WHOLE + BUDGETS)
def test_what_is_no_whole_number_is_refused(name, field):
    for bad in NOT_WHOLE:
        with pytest.raises(PlanError, match=rf"(?s)^{name}: .*{field}"):
            build(name, arguments(name) | {field: bad})


@pytest.mark.parametrize(("name", "field"), SHARES + BUDGETS)
def test_what_is_no_share_is_refused(name, field):
    for bad in WIDER.get((name, field), NOT_A_SHARE):
        with pytest.raises(PlanError, match=rf"(?s)^{name}: .*{field}"):
            build(name, arguments(name) | {field: bad})


@pytest.mark.parametrize(("name", "field"), WHOLE + BUDGETS + SHARES)
@pytest.mark.parametrize("value", [0, 1, LARGE])
def test_ends_of_the_range_are_refused_at_once_or_run(name, field, value):
    """0 and 1, and more than there are tokens: an error that names what was given, or no NaN and no empty row."""
    if (name, field) in SHARES and value == LARGE:
        pytest.skip("a share above 1 is refused: see above")
    value = float(value) if (name, field) in SHARES else value
    try:
        method = find(name)(**arguments(name) | {field: value})
    except SaccadeError as error:
        # some sizes only cannot be together with others: then the others may be what is named
        assert re.match(r"\w+: ", str(error)) and (field in str(error) or str(value) in str(error))
        return
    try:
        out = run(method, stream(LENGTH), [60, 1, 9])
    except SaccadeError as error:
        # what a block takes is known when there are keys
        assert (name, field) in [("offload", "cache"), ("offload", "limit")] and "bytes" in str(error)
        return
    assert out.isfinite().all() and out.any(-1).all()


@pytest.mark.parametrize(("name", "field"), numbers(("bool",)) + numbers(("str", "str | None")))
def test_what_is_no_switch_and_no_text_is_refused(name, field):
    """ "no" would be taken for True."""
    for bad in ("no", 1, 0.0) if (name, field) in numbers(("bool",)) else (3, ["graph"], True):
        with pytest.raises(PlanError, match=rf"^{name}: {field} must be"):
            build(name, arguments(name) | {field: bad})


@pytest.mark.parametrize("name", [name for name in METHODS if not is_dataclass(find(name))])
def test_layers_refuse_what_cannot_be(name):
    cls, good = find(name), arguments(name)
    assert issubclass(cls, Layer)
    for field, value in good.items():
        if isinstance(value, int):
            for bad in (0, -1, 1.5, "all"):
                if bad == 0 and field in ("layer", "local_heads"):
                    continue
                with pytest.raises(SaccadeError, match=field):
                    cls(**good | {field: bad})


@pytest.mark.parametrize("name", METHODS)
def test_unknown_and_missing_arguments(name):
    cls = find(name)
    if not is_dataclass(cls):
        with pytest.raises(PlanError, match="weights"):
            build(name, {})
        return
    with pytest.raises(PlanError, match=rf"^{name}: unknown argument 'bugdet'"):
        build(name, arguments(name) | {"bugdet": 3})
    for f in fields(cls):
        if f.default is MISSING and f.default_factory is MISSING:
            with pytest.raises(PlanError, match=rf"(?s)^{name}: .*{f.name}"):
                build(name, {key: value for key, value in arguments(name).items() if key != f.name})


@pytest.mark.parametrize("weights", ["", "nowhere.safetensors", 3, None])
def test_a_trained_gate_without_its_weights(weights, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    shape = ModelShape(4, 8, 2)
    with pytest.raises(SaccadeError, match="seer"):
        Plan.uniform(shape, prefill=("seer", {"weights": weights}))
    with pytest.raises(SaccadeError, match=r"seer.*weights"):
        Plan(shape, tuple((Assign(None, "seer", {}),) for _ in range(4)))
    (tmp_path / "nowhere.safetensors").write_bytes(b"no weights")
    with pytest.raises(SaccadeError, match="seer"):
        Plan.uniform(shape, prefill=("seer", {"weights": "nowhere.safetensors"}))
