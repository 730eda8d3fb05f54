"""What is true of Above: dense up to the length to the bit, the inner method from there on, in plans as in code."""

import pytest
import torch

from saccade.core.call import Call
from saccade.core.errors import InputError, PlanError
from saccade.core.pattern import Full
from saccade.core.plan import Assign, ModelShape, Plan
from saccade.methods.controls import above as module
from saccade.methods.controls.above import Above
from saccade.methods.select.streaming import Streaming

INNER = {"method": "streaming", "args": {"sink": 1, "recent": 3}}


def pair(M):
    return torch.randn(1, 2, M, 4), torch.randn(1, 1, M, 4)


@pytest.mark.parametrize("M", [19, 20, 21])
def test_dense_below_and_the_method_from_there_on(M):
    q, k = pair(M)
    call = Call.of(q, k)
    above = Above(INNER, 20)
    want = Full() if M < 20 else Streaming(1, 3).select(q, k, call)
    assert torch.equal(above.select(q, k, call).mask(call), want.mask(call))


def test_auto_is_what_was_measured_for_this_device(monkeypatch):
    monkeypatch.setattr(module, "crossovers", lambda: {"cpu/streaming": 20, "cuda/streaming": 5})
    for M in (19, 20):
        q, k = pair(M)
        assert isinstance(Above(INNER).select(q, k, Call.of(q, k)), Full) == (M < 20)
    q, k = pair(30)
    with pytest.raises(InputError, match=r"no measured break-even length for trishape on cpu.*cpu/streaming"):
        Above({"method": "trishape"}).select(q, k, Call.of(q, k))


def test_what_is_measured_is_shipped():
    assert module.crossovers()
    for name, tokens in module.crossovers().items():
        device, _, method = name.partition("/")
        assert device in {"cpu", "cuda"} and 1 <= tokens <= 1 << 20
        Above({"method": method})


def test_it_says_of_itself_what_the_inner_method_says():
    above = Above({"method": "minference"}, 100)
    assert above.phases == ("prefill",) and not above.strictly_causal and "chunk" in above.chunked
    assert Above({"method": "tidal"}, 100).whole_store
    q, k = pair(99)
    assert above.estimate(Call.of(q, k)) == 0.0
    q, k = pair(100)
    assert above.estimate(Call.of(q, k)) == above.method.estimate(Call.of(q, k)) > 0


def test_in_a_plan_with_a_length_rule_inside():
    shape = ModelShape(1, 2, 1)
    args = {"inner": {"method": "streaming", "args": {"sink": 1, "recent": {"base": 2, "slope": 0.5}}}, "length": 8}
    plan = Plan.from_json(Plan.uniform(shape, prefill=("above", args)).to_json())
    assign = plan.phase(0, "prefill")[0]
    assert assign.rules and assign.build(100).method == Streaming(1, 52)
    assert Plan.uniform(shape, prefill=Above(INNER, 8)).phase(0, "prefill")[0].build() == Above(INNER, 8)


def test_an_inner_method_with_its_defaults_needs_no_arguments():
    above = Above({"method": "streaming"}, 100)
    assert Plan.uniform(ModelShape(1, 2, 1), prefill=above).phase(0, "prefill")[0].build().method == above.method


@pytest.mark.parametrize(
    ("args", "words"),
    [
        ({"inner": {"method": "streaming", "args": {}}, "length": 0}, "length"),
        ({"inner": {"method": "streaming", "args": 3}}, "inner: args: must be dict"),
        ({"inner": {"method": "streaming", "arguments": {}}}, "inner"),
        ({"inner": {"method": "streaming", "args": {}}, "length": "soon"}, "auto"),
        ({"inner": {"method": "streeming", "args": {}}}, "streaming"),
        ({"inner": {"method": "streaming", "args": {"recent": 0}}}, "recent"),
        ({"inner": {"method": "duo", "args": {}}}, "gives the answer itself|where"),
        ({"inner": "streaming"}, "inner must be"),
        ({"inner": {"method": "minference", "args": {}}}, "not in decode"),
    ],
)
def test_bad_arguments_are_refused_by_the_plan(args, words):
    with pytest.raises(PlanError, match=words):
        Plan(ModelShape(1, 2, 1), ((Assign(None, "above", args, "decode"),),))
