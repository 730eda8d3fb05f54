"""One stem, five places: table, file, class, contract instance, documentation page."""

import inspect
from pathlib import Path

import pytest

import saccade
from saccade.core.plan import PHASES
from saccade.core.table import METHODS, family, find
from saccade.methods.base import Attention, CachePolicy, Layer, Method
from saccade.testing import instances

ROOT = Path(saccade.__file__).parent
FAMILIES = {"controls", "select", "decode", "policy", "sparse", "linear", "variants"}


def test_table_names_every_file():
    files = {p.stem: p for p in (ROOT / "methods").glob("*/*.py") if p.stem != "__init__"}
    assert set(METHODS) == set(files)
    for name, place in METHODS.items():
        module = place.partition(":")[0]
        assert ROOT.parent.joinpath(*module.split(".")).with_suffix(".py") == files[name]


@pytest.mark.parametrize("name", METHODS)
def test_class(name):
    cls = find(name)
    assert issubclass(cls, Method)
    assert cls.__name__.lower().startswith(name)
    assert family(name) in FAMILIES
    assert cls.phases and set(cls.phases) <= {*PHASES, "layer"}
    assert issubclass(cls, Layer) == (cls.phases == ("layer",))
    assert issubclass(cls, CachePolicy) == (cls.phases == ("cache",))
    assert issubclass(cls, Attention) or not {"prefill", "decode"} & set(cls.phases)
    assert isinstance(cls.paper, str) and (cls.paper or "No paper" in inspect.getdoc(cls))
    assert isinstance(cls.chunked, str) and cls.chunked
    # one file, one method: helpers are functions
    module = inspect.getmodule(cls)
    mine = [c for _, c in inspect.getmembers(module, inspect.isclass) if c.__module__ == module.__name__]
    assert [c for c in mine if issubclass(c, Method)] == [cls]


@pytest.mark.parametrize("name", METHODS)
def test_contract_has_it(name):
    assert any(instance.split("-")[0] == name for instance in instances())


@pytest.mark.parametrize("name", METHODS)
def test_own_tests(name):
    found = list((Path(__file__).parent / "methods" / family(name)).glob(f"test_{name}.py"))
    assert found, f"tests/methods/{family(name)}/test_{name}.py is missing"


@pytest.mark.parametrize("name", METHODS)
def test_documented(name):
    page = ROOT.parent / "docs" / "methods" / f"{name}.md"
    assert page.is_file(), f"docs/methods/{name}.md is missing"
