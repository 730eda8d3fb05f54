"""CAB offline: support by trying, the index and its constants, efficiency lengths by hand, a clock that waits."""

import time
from dataclasses import dataclass, replace

import numpy as np
import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.table import build
from saccade.evaluate.cab import (
    CONSTANTS,
    FUTURE,
    METRICS,
    PAST,
    PATTERNS,
    REFERENCES,
    YES,
    card,
    clocked,
    efficiency,
    efficiency_length,
    fidelity,
    freeze,
    index,
    support,
)
from saccade.evaluate.presets import arguments
from saccade.methods.base import Attention
from saccade.methods.controls.dense import Dense

ALL = dict.fromkeys(PATTERNS, YES)
# patterns served, by name of the method; blocks chosen for many queries at once see the later ones of them
SUPPORT = {
    "dense": ALL,
    "streaming": ALL,
    "random": ALL,
    "oracle": ALL | {"causal-cross": FUTURE},
    "pooled": ALL | {"causal-cross": FUTURE},
    "hyper": ALL | {"causal-self": FUTURE, "causal-cross": FUTURE},
    "s2": {"causal-self": YES},
    "xattention": {"causal-self": YES},
    "hard": {"causal-self": YES},
}


@pytest.mark.parametrize("name", SUPPORT)
def test_the_support_matrix(name):
    budget = {"budget": 0.5} if name in ("random", "oracle", "pooled") else arguments(name, 32, 512)
    for seed in range(2):
        found = support(build(name, budget), seed=seed)
        want = SUPPORT[name]
        assert {pattern: found[pattern] for pattern in want} == want
        assert all(found[pattern].startswith("refused") for pattern in PATTERNS.keys() - want)


@dataclass(frozen=True)
class Wrong(Attention):
    """Dense attention that gets one thing wrong."""

    fault: str

    def attend(self, q, k, v, call):
        if self.fault == "sees the future":
            call = replace(call, causal=False)
        if self.fault == "sees the past only":
            call = replace(call, causal=True)
        if self.fault == "looks at later queries":
            q = q + 1e-3 * q[:, :, -1:]
        out = Dense().attend(q, k, v, call)
        return out._replace(o=out.o * float("nan")) if self.fault == "nan" else out


@pytest.mark.parametrize(
    ("fault", "want"),
    [
        ("none", {}),
        ("sees the future", {"causal-self": FUTURE}),
        ("sees the past only", {"noncausal-self": PAST}),
        ("looks at later queries", {"causal-self": FUTURE, "causal-cross": FUTURE}),
    ],
)
def test_faults_are_found(fault, want):
    found = support(Wrong(fault))
    if fault == "sees the past only":
        # queries of a cross call then stand at the end of the keys, so that the first already sees most of them
        del found["noncausal-cross"], found["causal-cross"]
        assert found == {"noncausal-self": PAST, "causal-self": YES}
    else:
        assert found == ALL | want
    assert all("not numbers" in said for said in support(Wrong("nan")).values())


def test_the_constants_are_those_of_the_references():
    def scores(method):
        return {pattern: fidelity(method, kind) for pattern, kind in PATTERNS.items()}

    found = freeze([scores(build(name, args)) for name, args in REFERENCES.items()])
    for pattern in PATTERNS:
        for metric in METRICS:
            assert found[pattern][metric] == pytest.approx(CONSTANTS[pattern][metric], rel=1e-2)


def test_errors_by_brute_force():
    class Half(Attention):
        """Dense, but for every tenth row, which is twice what it should be."""

        def attend(self, q, k, v, call):
            out = Dense().attend(q, k, v, call)
            return out._replace(o=torch.where((torch.arange(q.shape[2]) % 10 == 0)[:, None], 2 * out.o, out.o))

    for kind in PATTERNS.values():
        assert fidelity(Dense(), kind) == {"error": 0.0, "worst": 0.0}
        found = fidelity(Half(), kind, length=400)
        # a tenth of the rows are wrong by their own size, and rows are about as large as one another
        assert 0.2 < found["error"] < 0.45 and found["worst"] > 0.7


def test_the_index_by_hand():
    constants = {"a": {"error": (0.5, 0.1), "score": (10.0, 2.0)}}
    assert index({"a": {"error": 0.4, "score": 13.0}}, constants, higher=["score"]) == {"a": pytest.approx(1.25)}
    assert index({"a": {"error": 0.4, "score": 13.0}}, constants) == {"a": pytest.approx(-0.25)}
    for scores in ({"b": {"error": 1.0}}, {"a": {"time": 1.0}}):
        with pytest.raises(InputError, match="no frozen constants"):
            index(scores, constants)
    # the mean of the references themselves is 0
    parts = [{"a": {"error": x}} for x in (1.0, 2.0, 6.0)]
    assert sum(index(one, freeze(parts))["a"] for one in parts) == pytest.approx(0, abs=1e-5)


def test_a_card_has_an_index_where_a_pattern_is_served():
    found = card("streaming")
    assert found["support"] == ALL and found["index"].keys() == PATTERNS.keys()
    assert card("s2")["index"].keys() == {"causal-self"}
    assert card("random")["index"]["causal-self"] < 0 < found["index"]["causal-self"]


def test_efficiency_lengths_by_hand():
    n = np.array([256, 512, 1024, 2048, 4096, 8192])
    # n^2 = 1000 n + 750000 at 1500 and -500
    assert efficiency_length(n, n**2, 1000 * n + 750_000) == pytest.approx(1500)
    # a first point that is off is left out, as in CAB
    method = [None, *(1000 * n + 750_000)[1:]]
    assert efficiency_length(n, n**2, method) == pytest.approx(1500)
    # dense costs more everywhere; the method costs as much per pair of tokens, and more
    assert efficiency_length(n, n**2 + 10_000_000, 10 * n) == 0.0
    assert efficiency_length(n, n**2, 2 * n**2, degree=2) is None
    # a method with a quarter of the pairs and an estimate to pay: 0.75 n^2 = 300 n
    assert efficiency_length(n, n**2, 0.25 * n**2 + 300 * n, degree=2) == pytest.approx(400)
    with pytest.raises(InputError, match="three lengths"):
        efficiency_length([1, 2], [1, 4], [1, 2])


def test_the_clock_takes_the_middle_half():
    naps = iter([0.0, 0.2, *[0.002] * 6, 0.0])  # the first is for warming up

    taken = clocked(lambda: time.sleep(next(naps)), runs=8)
    assert 0.002 <= taken < 0.05


def test_timing_gives_a_row_for_each_length():
    row = efficiency("streaming", lengths=(64, 128, 256), batch=1, heads=2, width=16, runs=4)
    assert row["lengths"] == [64, 128, 256] and len(row["dense_s"]) == len(row["method_s"]) == 3
    assert min(row["dense_s"] + row["method_s"]) > 0 and (row["tokens"] is None or row["tokens"] >= 0)
