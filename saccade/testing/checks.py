"""The contract: what must hold of every method. A check that does not apply to a method skips with the reason."""

from __future__ import annotations

import copy
import inspect
import re
from collections.abc import Callable, Mapping
from dataclasses import fields, is_dataclass, replace
from typing import Any, NoReturn

import pytest
import torch
from torch import Tensor
from torch.autograd.gradcheck import GradcheckError

from saccade.cache.group import ROOM
from saccade.core.call import Call
from saccade.core.errors import UnsupportedError
from saccade.core.pattern import Full
from saccade.core.plan import ModelShape, Plan
from saccade.core.table import METHODS
from saccade.kernels.attend import attend
from saccade.methods.base import Attention, CachePolicy, Layer, Method, Selector, budget_tokens
from saccade.testing.inputs import LAYERS, Feed, Look, Stream, instances, looks, rope_for, run, stream, usual_pieces

LIFTED = {name: 1 << 20 for name in ("budget", "recent", "diagonals")}  # what limits a method
Check = Callable[[Any], None]


def same(got: Tensor, want: Tensor) -> None:
    """Equal as float64 can tell; NaN equals nothing."""
    torch.testing.assert_close(got, want, atol=1e-8, rtol=1e-6)


def skip(reason: str) -> NoReturn:
    """This check says nothing about this method, and why."""
    pytest.skip(reason)


def at_full_budget(method: Method) -> Method:
    """The method with everything lifted that limits it: `budget`, `recent`, `diagonals`."""
    if not is_dataclass(method):
        return method
    lifted = {f.name: LIFTED[f.name] for f in fields(method) if f.name in LIFTED}
    return replace(method, **lifted)


def dense_at_full_budget(method: Method) -> None:
    """With its budget lifted a method is dense causal attention, as PyTorch computes it."""
    if isinstance(method, Layer):
        skip("a layer's own weights have no dense twin")
    if not method.exact:
        skip("declared: not dense at any budget")
    full = at_full_budget(method)
    if full == method and is_dataclass(method) and fields(method):
        skip(f"none of {', '.join(LIFTED)} to lift")
    sequence = stream(150)
    q, k, v = (t.squeeze(1) for t in sequence[:3])
    want = torch.nn.functional.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    same(run(full, sequence)[0], want)


def value_causal(method: Method) -> None:
    """A value never reaches an output before it: not even where the choice of keys looks at later ones."""
    sequence = stream()
    if isinstance(method, Layer):
        # the values of a layer are inside: what an output's gradient reaches is what was summed
        for cut in (1, 77, 199):
            x = sequence.x.clone().requires_grad_()
            run(method, sequence._replace(x=x))[:, :cut].square().sum().backward()
            assert x.grad is not None and not x.grad[:, cut:].any() and x.grad[:, :cut].any()
        return
    before = run(method, sequence)
    for cut in (1, 77, 195):
        after = run(method, sequence.changed(cut, "v"))
        same(after[..., :cut, :], before[..., :cut, :])
        changed = not torch.allclose(after[..., cut:, :], before[..., cut:, :])
        assert changed or cut > 100, "other values changed nothing"


def strictly_causal(method: Method) -> None:
    """Nothing of a later token reaches an output: neither its value nor its say in what is looked at."""
    if not method.strictly_causal:
        skip("declared: the choice of keys looks at later tokens")
    sequence = stream()
    before = run(method, sequence)
    for cut in (1, 77, 195):
        after = run(method, sequence.changed(cut, "q", "k", "v", "x"))
        same(after[..., :cut, :], before[..., :cut, :])
        assert not torch.allclose(after[..., cut:, :], before[..., cut:, :])


def within_budget(method: Method) -> None:
    """No query reads more keys than the budget, in whole blocks; a method may leave some layers dense, not all."""
    names = {f.name for f in fields(method)} if is_dataclass(method) else set()
    if ("budget" not in names and not {"sink", "recent"} <= names) or "last" in names:
        skip("declares no budget for a single query")
    if isinstance(method, CachePolicy) and method.lossless:
        skip("declared: what leaves the store is still read")
    mine = [look for look in looks(method, stream()) if look.phase in method.phases or isinstance(method, CachePolicy)]
    sparse = [look for look in mine if not isinstance(look.pattern, Full)]
    assert sparse, "every layer was dense"
    for look in sparse:
        call, block = look.seen.call, getattr(method, "block_k", 1)
        limit = budget_tokens(method.budget, call.shape.M) if "budget" in names else method.sink + method.recent
        most = -(-limit // block) * block
        read = look.pattern.mask(call).sum(-1)
        if method.full_steps:
            read = read[read < Full().mask(call).sum(-1)]
        assert int(read.max()) <= most < call.shape.M
        assert look.pattern.density(call) < 1.0


def reference_equals_tiled(method: Method) -> None:
    """What came out is softmax attention to the pattern's keys, output and log-sum-exp, whatever computes it."""
    for look in _patterns(method, stream()):
        args = (look.seen.q, look.seen.k, look.seen.v, look.pattern, look.seen.call)
        want, tiled = (attend(*args, key_bias=look.seen.bias, impl=impl) for impl in ("reference", "tiled"))
        same(look.o, want.o)
        same(tiled.o, want.o)
        assert tiled.lse is not None and want.lse is not None
        same(tiled.lse, want.lse)


def head_slices(method: Method) -> None:
    """Some heads under the method give what the same heads give when all are under it; the others stay dense."""
    if isinstance(method, Layer):
        skip("a layer's heads share one projection")
    if not method.separate:
        skip("declared: heads of one call choose together")
    policy = isinstance(method, CachePolicy)
    sequence, dense = stream(), instances()["dense"]
    whole, rest = run(method, sequence), run(dense, sequence)
    for heads in [(1,), (0,)] if policy else [(0, 1), (1, 2), (3,), (0, 2, 3)]:
        got = run(method, sequence, heads=heads)
        mine = [h * 2 + i for h in heads for i in (0, 1)] if policy else list(heads)
        others = [h for h in range(4) if h not in mine]
        same(got[:, :, mine], whole[:, :, mine])
        same(got[:, :, others], rest[:, :, others])
    # as many key heads as the call has, but not the same ones
    sequence, heads = stream(150, H=8, G=4), [0, 1, 2, 4]
    if not policy:
        got = run(method, sequence, heads=tuple(heads))
        same(got[:, :, heads], run(method, sequence)[:, :, heads])


def gqa(method: Method) -> None:
    """Query heads that share a key head see what they would see with a copy of it each."""
    if isinstance(method, Layer):
        skip("a layer has its own projections")
    if method.grouped:
        skip("declared: query heads that share a key head choose together")
    for G in (1, 2):
        sequence = stream(G=G)
        same(run(method, sequence), run(method, sequence.repeated()))


def padding(method: Method) -> None:
    """A row padded left, right, on both sides or not at all gives the numbers it gives alone, and padding gives 0."""
    if isinstance(method, Layer):
        skip("a layer takes rows of one length")
    N, ends = 150, [(0, 150), (40, 150), (0, 110), (17, 127)]
    sequence = stream(N + 3, B=len(ends))
    valid = torch.ones(len(ends), N + 3, dtype=torch.bool)
    for row, (a, b) in enumerate(ends):
        valid[row, :a], valid[row, b:N] = False, False
    for rows in [(0, 1, 2, 3), (1, 2), (1,)]:
        real = valid[list(rows)]
        got = run(method, sequence.row(rows), [N, 1, 2], real)
        assert not got.transpose(1, 3)[~real].any(), "padding gave something else than 0"
        for at, row in enumerate(rows):
            a, b = ends[row]
            alone = Stream(*(t[..., valid[row], :] for t in sequence.row([row])))
            same(got[at, ..., valid[row], :], run(method, alone, [b - a, 1, 2])[0])


def batch_of_two(method: Method) -> None:
    """Two rows in one batch do not see each other."""
    sequence = stream(B=2)
    both = run(method, sequence)
    for row in (0, 1):
        same(both[row : row + 1], run(method, sequence.row([row])))


def chunked_prefill(method: Method) -> None:
    """A prompt in chunks gives what it gives in one shot, for methods that declare it."""
    if method.chunked != "exact":
        skip(f"declared: {method.chunked}")
    if not {"prefill", "cache", "layer"} & set(method.phases):
        skip("has no part in prefill")
    sequence = stream()
    whole = run(method, sequence, [200])
    for pieces in [(100, 100), (17, 64, 65, 54), (129, 71)]:
        same(run(method, sequence, pieces), whole)


def prefill_then_decode(method: Method) -> None:
    """Token by token after a prompt gives what one call gives: the whole sequence, or the same tokens in one step."""
    if isinstance(method, Layer):
        _continues(method)
        return
    if not {"decode", "cache"} & set(method.phases):
        skip("has no part in decoding, which is dense")
    sequence = stream()
    one_by_one = run(method, sequence, [190, *[1] * 10])
    if method.chunked == "exact":
        same(run(method, sequence, [190, 4, 6]), one_by_one)
    if method.chunked == "exact" and {"prefill", "cache"} & set(method.phases):
        same(run(method, sequence, [200]), one_by_one)


def crop_and_reorder(method: Method) -> None:
    """Tokens that are taken back leave no trace, and rows of the batch may be swapped, repeated and dropped."""
    if isinstance(method, Layer):
        skip("a layer's state is a value: whoever takes tokens back keeps the old one")
    sequence, draft = stream(B=2), stream(B=2, seed=1)
    want = run(method, sequence, [180, 1, 2])
    for drafted in (1, 3, 15):
        feed = Feed(method)
        feed(sequence.part(0, 180))
        feed(draft.part(180, 180 + drafted))
        feed.crop(drafted)
        got = [feed(sequence.part(180, 181))]
        feed(draft.part(181, 184))
        feed.crop(3)
        got.append(feed(sequence.part(181, 183)))
        same(torch.cat(got, -2), want[..., 180:183, :])
    feed = Feed(method)
    feed(draft.row([0, 1, 1]).part(0, 10))
    for store in feed.stores:
        store.reset()
    feed(sequence.part(0, 180))
    feed.select([1, 0, 1])
    feed(sequence.row([1, 0, 1]).part(180, 181))
    feed.select([1, 2])
    same(feed(sequence.part(181, 183)), want[..., 181:183, :])


def draft_in_the_prompt(method: Method) -> None:
    """A draft that comes with the prompt in one call and is taken back in part leaves no trace (prompt lookup)."""
    if isinstance(method, Layer):
        skip("a layer's state is a value: whoever takes tokens back keeps the old one")
    if method.chunked != "exact":
        skip(f"declared: {method.chunked}")
    sequence, draft = stream(), stream(seed=1)
    want = run(method, sequence, [180, 2, 1])[..., 180:, :][..., :3, :]
    joined = Stream(
        *(torch.cat((a[..., :180, :], b[..., 180:190, :]), -2) for a, b in zip(sequence, draft, strict=True))
    )
    feed = Feed(method)
    feed(joined)
    feed.crop(10)
    same(torch.cat([feed(sequence.part(180, 182)), feed(sequence.part(182, 183))], -2), want)


def interleaved(method: Method) -> None:
    """Two sequences that take turns do not see each other's state."""
    one, two = stream(seed=1), stream(seed=2)
    feeds = Feed(method), Feed(method)
    got: tuple[list[Tensor], list[Tensor]] = ([], [])
    for a, b in [(0, 180), (180, 181), (181, 182), (182, 185)]:
        for out, feed, sequence in zip(got, feeds, (one, two), strict=True):
            out.append(feed(sequence.part(a, b)))
    for out, sequence in zip(got, (one, two), strict=True):
        same(torch.cat(out, -2), run(method, sequence.part(0, 185), [180, 1, 1, 3]))


def query_lengths(method: Method) -> None:
    """1, 2 and 17 queries at the end of a sequence: every row sees something, and what its pattern says."""
    for n in (1, 2, 17):
        sequence = stream(150)
        if isinstance(method, Layer):
            assert run(method, sequence, [150 - n, n]).isfinite().all()
            continue
        _follows(method, sequence, [150 - n, n])


def awkward_lengths(method: Method) -> None:
    """Lengths around block edges, and one that is long for the budget."""
    for N in (1, 7, 63, 64, 65, 127, 128, 129, 1000):
        sequence = stream(N, layers=2 if N == 1000 else LAYERS, D=_width(method, 8))
        if isinstance(method, Layer):
            got = run(method, sequence)
            assert got.shape == sequence.x.shape and got.isfinite().all()
            continue
        _follows(method, sequence, usual_pieces(method, N))


def widths(method: Method) -> None:
    """Head widths of real models, and values of another width than keys."""
    if isinstance(method, Layer):
        skip("a layer's head width is an argument of its own")
    if method.weights_for is not None:
        skip(f"its weights are for heads of width {method.weights_for.width}")
    for D, Dv in ((64, 64), (80, 80), (96, 96), (128, 128), (256, 256), (24, 16)):
        _follows(method, stream(65, H=2, G=1, D=D, Dv=Dv, layers=2), usual_pieces(method, 65))


def fully_masked_rows(method: Method) -> None:
    """A query that is not real, or that no key is real for, gives 0 and not NaN."""
    if isinstance(method, Layer):
        skip("a layer takes rows without padding")
    sequence = stream(40, B=2, layers=2)
    q_pos = torch.arange(28, 40).repeat(2, 1)
    q_pos[0, :3] = -1
    k_pos = torch.arange(40).repeat(2, 2, 1)
    k_pos[1, 1] = -1
    step: dict[str, Any] = {}
    for at in range(2):
        q, k, v = (t[at] for t in sequence[:3])
        q = q[:, :, 28:]
        call = Call.of(q, k, layer=at, q_pos=q_pos, k_pos=k_pos, step=step)
        try:
            o = _attend(method, q, k, v, call)
        except UnsupportedError as error:
            skip(f"declared: {error}")
        assert o.isfinite().all()
        assert not o[0, :, :3].any() and not o[1, 2:].any() and o[0, :, 3:].any(-1).all() and o[1, :2].any(-1).all()


def gradients(method: Method) -> None:
    """Gradients of the output are those of finite differences, in float64."""
    torch.manual_seed(0)
    if isinstance(method, Layer):
        layer = copy.deepcopy(method)
        x = stream(20).x.requires_grad_()
        _gradcheck(lambda x: layer(x).y, [x])
        layer(x).y.square().sum().backward()
        assert all(p.grad is not None and p.grad.isfinite().all() for p in layer.parameters())
        return
    past = 30 if "prefill" not in method.phases and isinstance(method, Attention) else 0
    leaves = [t.requires_grad_() for t in stream(40, H=2, G=1, D=_width(method, 4), layers=2)[:3]]

    def outputs(q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        step: dict[str, Any] = {}
        outs = []
        for at in range(2):
            mine = q[at][:, :, past:]
            outs.append(_attend(method, mine, k[at], v[at], Call.of(mine, k[at], layer=at, step=step)))
        return torch.stack(outs)

    _gradcheck(outputs, leaves)


def seeded(method: Method) -> None:
    """The same seed gives the same numbers, and no one else's random numbers are used up."""
    sequence = stream()
    state = torch.get_rng_state()
    results = [run(method, sequence, rng=torch.Generator().manual_seed(seed)) for seed in (7, 7, 8)]
    assert torch.equal(results[0], results[1])
    assert torch.equal(state, torch.get_rng_state()), "torch's own generator was used"


def inputs_unchanged(method: Method) -> None:
    """Nothing is written into the tensors that were given."""
    sequence = stream()
    kept = Stream(*(t.clone() for t in sequence))
    run(method, sequence)
    assert all(torch.equal(a, b) for a, b in zip(sequence, kept, strict=True))


def plan_round_trip(method: Method) -> None:
    """The method goes into a plan's JSON and comes out equal."""
    if isinstance(method, Layer):
        skip("a layer has weights and no place in a plan")
    if f"{type(method).__module__}:{type(method).__qualname__}" not in METHODS.values():
        skip("not in the method table")
    made = method.weights_for
    shape = ModelShape(2, 4, 2) if made is None else ModelShape(made.layers, made.heads, made.heads)
    for phase in method.phases:
        plan = Plan.uniform(shape, **{phase: method})
        back = Plan.from_json(plan.to_json())
        assert back == plan
        built = [assign.build() for row in back.layers for assign in row]
        assert [assign.phase for row in back.layers for assign in row] == [phase] * shape.layers
        assert built == [method] * shape.layers


def bytes_held(method: Method) -> None:
    """A policy holds no more slots than it claims, and no more bytes than those slots and the room to grow."""
    if not isinstance(method, CachePolicy):
        skip("evicts nothing")
    sequence, most = stream(700, layers=1), method.claim(700)
    assert most < 700 // 2, "give this policy a smaller claim: nothing is proved by 700 tokens"
    feed = Feed(method, layers=1)
    store = feed.stores[0]
    slot = 2 * (16 + 16) * 8 + 2 * 4  # keys, values and positions of two heads
    for a, b in [(0, 600), (600, 601), (601, 650), (650, 700)]:
        feed(sequence.part(a, b))
        store.settle()
        held = store.views()[0].k.shape[2]
        assert held <= method.claim(b), f"{held} slots are held after {b} tokens, {method.claim(b)} are claimed"
        assert store.bytes() <= max(2 * most, most + 4 * ROOM) * slot


def repr_and_doc(method: Method) -> None:
    """The method says what it is: paper, arguments, departures, an example; its module has one line."""
    cls, doc = type(method), inspect.getdoc(type(method)) or ""
    module = inspect.getmodule(cls)
    line = inspect.getdoc(module) if module else None
    assert line and len(line.splitlines()) == 1 and ": " in line, "the module docstring is one line: `Name: what`"
    assert method.paper or "No paper" in doc, "name the paper, or say `No paper`"
    assert not method.paper or re.search(r"arXiv [\w/-]+\.?\d+|https?://", doc), "link the paper in the docstring"
    for part in ("Departs from the paper:", "Example:", "Shapes:"):
        assert part in doc, f"the docstring has no `{part}`"
    named = [f.name for f in fields(cls)] if is_dataclass(cls) else [*inspect.signature(cls).parameters]
    assert not named or "Args:" in doc
    for name in named:
        assert re.search(rf"\b{name}: ", doc) or re.search(rf"\b{name}, \w+: ", doc), (
            f"Args does not say what {name} is"
        )
    assert cls.__name__ in repr(method)
    assert all(name in repr(method) for name in named) or isinstance(method, Layer)


def loss_is_returned(method: Method) -> None:
    """A layer returns its loss and its state and keeps neither: no tensor stays behind, no state is written into."""
    if not isinstance(method, Layer):
        skip("has no weights and no loss")
    layer = copy.deepcopy(method).train()
    x = stream(60).x
    before = {name: sorted(vars(module)) for name, module in layer.named_modules()}
    out = layer(x[:, :40])
    assert out.loss is None or (out.loss.ndim == 0 and out.loss.requires_grad)
    layer.eval()
    assert layer(x).loss is None, "a loss outside of training"
    again = [layer(x[:, 40:], out.state).y for _ in range(2)]
    assert torch.equal(*again), "the state was written into"
    after = {name: sorted(vars(module)) for name, module in layer.named_modules()}
    assert before == after
    kept = [v for module in layer.modules() for v in vars(module).values() if isinstance(v, (Tensor, list, tuple))]
    assert not any(isinstance(t, Tensor) for v in kept for t in (v if isinstance(v, (list, tuple)) else [v]))


CHECKS: dict[str, Check] = {
    check.__name__: check
    for check in (
        dense_at_full_budget,
        value_causal,
        strictly_causal,
        within_budget,
        reference_equals_tiled,
        head_slices,
        gqa,
        padding,
        batch_of_two,
        chunked_prefill,
        prefill_then_decode,
        crop_and_reorder,
        draft_in_the_prompt,
        interleaved,
        query_lengths,
        awkward_lengths,
        widths,
        fully_masked_rows,
        gradients,
        seeded,
        inputs_unchanged,
        plan_round_trip,
        bytes_held,
        repr_and_doc,
        loss_is_returned,
    )
}


def contract(methods: Mapping[str, Method]) -> pytest.MarkDecorator:
    """Parametrise a test over (method, check) pairs with ids like "tidal-value_causal".

    Args:
        methods: names -> instances; small hyperparameters, so that a method leaves things out at 200 tokens.

    Example:
        @contract({"mine": Mine(budget=48)})
        def test_contract(method, check):
            check(method)
    """
    pairs = [
        pytest.param(method, check, id=f"{name}-{title}")
        for name, method in methods.items()
        for title, check in CHECKS.items()
    ]
    return pytest.mark.parametrize(("method", "check"), pairs)


def _attend(method: Method, q: Tensor, k: Tensor, v: Tensor, call: Call) -> Tensor:
    """One call, without a store."""
    call = replace(call, rope=rope_for(q.shape[3]))
    if isinstance(method, Attention):
        return method.attend(q, k, v, call).o
    assert isinstance(method, CachePolicy)
    return attend(q, k, v, method.pattern(call), call).o


def _width(method: Method, width: int) -> int:
    """A head width, or the one that the method's weights are for."""
    return width if method.weights_for is None else method.weights_for.width


def _gradcheck(function: Callable[..., Tensor], leaves: list[Tensor]) -> None:
    """Gradients against finite differences; a mismatch is a failed assertion."""
    try:
        torch.autograd.gradcheck(function, leaves, fast_mode=True)
    except GradcheckError as error:
        raise AssertionError(str(error)) from None


def _patterns(method: Method, sequence: Stream, pieces: list[int] | None = None) -> list[Look]:
    """The calls of a run, for methods that choose a pattern."""
    if not isinstance(method, (Selector, CachePolicy)):
        skip("chooses no pattern")
    found = looks(method, sequence, pieces)
    # a policy that has moved tokens out of the store answers for them itself
    lossless = isinstance(method, CachePolicy) and method.lossless
    return [look for look in found if not lossless or look.seen.pattern is not None]


def _follows(method: Method, sequence: Stream, pieces: list[int]) -> None:
    """Every output is softmax attention to the pattern's keys, and every query has some."""
    if not isinstance(method, (Selector, CachePolicy)):
        assert run(method, sequence, pieces).isfinite().all()
        return
    for look in _patterns(method, sequence, pieces):
        seen = look.seen
        want = attend(seen.q, seen.k, seen.v, look.pattern, seen.call, key_bias=seen.bias, impl="reference")
        same(look.o, want.o)
        assert want.lse is not None and want.lse.isfinite().all(), "a query sees no key"


def _continues(layer: Layer) -> None:
    """The rows of a continued sequence are the last rows of one call; where declared, all rows are."""
    sequence = stream()
    whole = run(layer, sequence)
    for pieces in ([190, *[1] * 10], [150, 50]):
        got = run(layer, sequence, pieces)
        same(got[:, -1], whole[:, -1])
        if layer.chunked == "exact":
            same(got, whole)
