"""AxFormer's greedy search against a plain loop on random losses, and what is taken out of a model and put back."""

import random
from itertools import pairwise

import pytest
import torch
import transformers as tf

from saccade import attach
from saccade.core.errors import InputError, PlanError, UnsupportedError
from saccade.core.plan import ModelShape
from saccade.fit.axformer import Hard, answer_loss, hard_layers, plan_of, prune
from saccade.fit.greedy import greedy
from saccade.fit.parts import Element, elements, parts, remove, without
from saccade.nn import Attention, Transformer


def table(rng, digits):
    """A loss for each set of elements, drawn when it is first asked for; few digits make ties."""
    drawn = {}

    def loss(chosen):
        return drawn.setdefault(frozenset(chosen), round(rng.random(), digits))

    return loss


def card(blocks, inside, loss, tolerance):
    """The search as one would write it down: the blocks, then what is inside the blocks that were left."""
    gone, best, tried, passed = [], loss([]), [], []
    for block in blocks:
        value = loss([*gone, block])
        tried.append((block, value))
        if value <= best + tolerance:
            gone.append(block)
            if value < best:
                best = value
    for block in blocks:
        for piece in inside[block]:
            if block in gone:
                passed.append(piece)
                continue
            value = loss([*gone, piece])
            tried.append((piece, value))
            if value <= best + tolerance:
                gone.append(piece)
                if value < best:
                    best = value
    return gone, tried, passed


@pytest.mark.parametrize("tolerance", [0.0, 0.1, 0.25])
@pytest.mark.parametrize("digits", [1, 6])
def test_the_search_is_the_plain_loop(tolerance, digits):
    ties = drops = slack = 0
    for seed in range(60):
        rng = random.Random(seed)
        blocks = [f"b{i}" for i in range(rng.randint(1, 5))]
        inside = {block: [f"{block}.{i}" for i in range(rng.randint(0, 4))] for block in blocks}
        loss = table(rng, digits)
        want, tried, passed = card(blocks, inside, loss, tolerance)
        told = []
        found = greedy(
            [*blocks, *(piece for block in blocks for piece in inside[block])],
            loss,
            tolerance=tolerance,
            settled=lambda name, gone: "." in name and name.split(".")[0] in gone,
            progress=told.append,
        )
        assert list(found.accepted) == want and list(found.passed) == passed
        assert [(t.element, t.loss) for t in found.trials] == tried and told == list(found.trials)
        assert sorted(found.accepted + found.rejected) == sorted(name for name, _ in tried)
        assert found.before == loss(()) and found.after == loss(want) and found.held is None
        # nothing inside a block that is gone was looked at
        assert not any(piece in dict(tried) for block in blocks if block in want for piece in inside[block])
        reached = [found.before, *found.losses]
        if tolerance == 0:
            assert reached == sorted(reached, reverse=True)
        assert found.after <= min(reached) + tolerance
        ties += any(a == b for a, b in pairwise(reached))
        slack += any(a < b for a, b in pairwise(reached))
        drops += len(passed)
    # the cases that matter did come up
    assert drops and (ties > 0 or digits > 1) and (slack > 0) == (tolerance > 0)


def test_the_tolerance_counts_from_the_best_loss_so_losses_do_not_add_up():
    found = greedy(range(9), lambda chosen: 1.0 + 0.06 * len(chosen), tolerance=0.1)
    assert found.accepted == (0,) and found.after == 1.06
    # exactly at the tolerance is within it
    assert greedy("a", lambda chosen: 0.5 * len(chosen), tolerance=0.5).accepted == ("a",)


def test_a_second_set_says_what_was_overfitted():
    asked = []

    def held(chosen):
        asked.append(chosen)
        return {(): 2.0, ("a",): 1.5, ("a", "c"): 1.75, ("a", "c", "d"): 1.625}[chosen]

    def loss(chosen):
        return 1.0 - 0.25 * len(chosen) + ("b" in chosen)

    for tolerance, over in ((0.0, ("c",)), (0.25, ())):
        asked.clear()
        found = greedy("abcd", loss, held=held, tolerance=tolerance)
        assert found.accepted == ("a", "c", "d") and asked == [(), ("a",), ("a", "c"), ("a", "c", "d")]
        # it is read, it decides nothing
        assert found.held == (2.0, 1.5, 1.75, 1.625) and found.overfitted == over
    found = greedy("abcd", loss, held=held)
    lines = [line.split() for line in str(found).splitlines()]
    assert lines[1] == ["1.0000", "2.0000", "with", "nothing"] and lines[2] == ["0.7500", "1.5000", "accepted", "a"]
    assert lines[3] == ["1.5000", "rejected", "b"] and lines[4] == ["0.5000", "1.7500", "accepted", "c"]
    assert " ".join(lines[-2]) == "3 accepted, 1 rejected, 0 not looked at" and lines[-1] == ["over-fitted:", "c"]
    alone = greedy("abcd", loss)
    assert alone.held is None and alone.overfitted == () and alone.trials == found.trials
    lines = [line.split() for line in str(alone).splitlines()]
    assert lines[2:4] == [["0.7500", "accepted", "a"], ["1.5000", "rejected", "b"]] and len(lines) == 7


def test_bad_losses_are_never_accepted():
    nan, inf = float("nan"), float("inf")
    found = greedy("abc", lambda chosen: {"a": nan, "b": inf, "c": -inf}[chosen[-1]] if chosen else 1.0, tolerance=9.0)
    assert found.accepted == () and len(found.rejected) == 3
    for loss, held in ((nan, 1.0), (1.0, inf)):
        with pytest.raises(InputError, match="finite"):
            greedy("a", lambda chosen, value=loss: value, held=lambda chosen, value=held: value)
    for tolerance in (-0.1, nan, inf):
        with pytest.raises(InputError, match="tolerance"):
            greedy("a", lambda chosen: 1.0, tolerance=tolerance)
    with pytest.raises(InputError, match="b is there twice"):
        greedy("abcb", lambda chosen: 1.0)


def llama(**more):
    torch.manual_seed(0)
    sizes = dict(hidden_size=32, intermediate_size=44, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**sizes, num_key_value_heads=2, **more)).eval()
    with torch.no_grad():
        for p in model.parameters():
            # no element may be too small to matter, and no bias zero
            p.normal_(std=0.2)
    return model


@pytest.fixture
def model():
    return llama(attention_bias=True, mlp_bias=True)


def hooks(model):
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def without_by_hand(model, gone):
    """A copy with columns of its last projections set to zero, and the biases of whole blocks."""
    twin = type(model)(model.config).eval()
    twin.load_state_dict(model.state_dict())
    for layer, kind, start, stop in gone:
        attention = kind in ("attention", "head")
        linear = twin.model.layers[layer].self_attn.o_proj if attention else twin.model.layers[layer].mlp.down_proj
        each = 8 if kind == "head" else 1
        with torch.no_grad():
            if stop:
                linear.weight[:, start * each : stop * each] = 0
            else:
                linear.weight.zero_()
                linear.bias.zero_()
    return twin


GONE = [
    [(0, "head", 2, 3)],
    [(1, "neurons", 30, 44)],
    [(1, "attention", 0, 0)],
    [(0, "ffn", 0, 0)],
    [(0, "head", 0, 1), (0, "head", 3, 4), (0, "neurons", 0, 7), (1, "ffn", 0, 0), (1, "neurons", 2, 3)],
    [(1, "head", 1, 2), (1, "attention", 0, 0)],
]


@pytest.mark.parametrize("gone", GONE)
def test_what_is_taken_away_adds_exactly_nothing(model, gone):
    ids = torch.randint(0, 50, (2, 11))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    removed = [Element(*one) for one in gone]
    with torch.no_grad():
        dense = model(ids).logits
        with without(model, removed):
            got = model(ids).logits
        want = without_by_hand(model, gone)(ids).logits
        assert torch.equal(got, want) and not torch.equal(got, dense)
        # given back to the last bit
        assert torch.equal(model(ids).logits, dense) and hooks(model) == 0
        assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
        remove(model, removed)
        assert torch.equal(model(ids).logits, want)
    assert {n: p.shape for n, p in model.state_dict().items()} == {n: p.shape for n, p in before.items()}


def test_a_head_that_is_not_a_number_still_adds_nothing(model):
    with torch.no_grad():
        model.model.layers[1].self_attn.v_proj.weight[:8] = float("nan")
        with without(model, [Element(1, "head", 0, 2)]):
            out = model(torch.tensor([[1, 2, 3]])).logits
    assert out.isfinite().all()


def test_elements_from_coarse_to_fine(model):
    got = elements(model, group=20)
    assert [str(e) for e in got[:4]] == ["layer 1 attention", "layer 1 ffn", "layer 0 attention", "layer 0 ffn"]
    rest = [(e.layer, e.kind, e.start, e.stop) for e in got[4:]]
    heads = [("head", h, h + 1) for h in range(4)]
    groups = [("neurons", 0, 20), ("neurons", 20, 40), ("neurons", 40, 44)]
    assert rest == [(layer, *one) for layer in (1, 0) for one in heads + groups]
    assert len(set(got)) == len(got) and got[-1].block == Element(0, "ffn") and got[4].block == Element(1, "attention")


def test_prune_is_the_plain_loop_over_models_pruned_by_hand(model):
    samples = [(torch.randint(0, 50, (12,)), torch.arange(12) > 4) for _ in range(3)]
    blocks = [(layer, kind, 0, 0) for layer in (1, 0) for kind in ("attention", "ffn")]
    inside = {
        (layer, kind, 0, 0): [
            (layer, "head", h, h + 1) if kind == "attention" else (layer, "neurons", 11 * h, 11 * h + 11)
            for h in range(4)
        ]
        for layer in (1, 0)
        for kind in ("attention", "ffn")
    }
    want, tried, passed = card(blocks, inside, lambda gone: answer_loss(without_by_hand(model, gone), samples), 0.02)
    others = [(torch.randint(0, 50, (12,)), torch.arange(12) > 4)]
    loss, held = (lambda: answer_loss(model, samples)), (lambda: answer_loss(model, others))
    found = prune(model, loss, group=11, tolerance=0.02, held=held)

    def plain(trial):
        e = trial.element
        return (e.layer, e.kind, e.start, e.stop), trial.loss

    assert [plain(trial) for trial in found.trials] == tried and len(found.passed) == len(passed)
    assert len(found.accepted) == len(want) and 0 < len(want) < 20 and passed
    with without(model, found.accepted):
        assert answer_loss(model, samples) == found.after
    # the second set is asked about the same models
    assert found.held == tuple(answer_loss(without_by_hand(model, want[:i]), others) for i in range(len(want) + 1))
    assert hooks(model) == 0


@pytest.mark.parametrize("fails", [1, 2, 5])
def test_a_loss_that_raises_leaves_the_model_as_it_was(model, fails):
    ids = torch.randint(0, 50, (1, 9))
    before = {name: p.clone() for name, p in model.state_dict().items()}
    with torch.no_grad():
        dense = model(ids).logits
    calls = []

    def loss():
        calls.append(1)
        if len(calls) == fails:
            raise RuntimeError("out of luck")
        return 1.0

    with pytest.raises(RuntimeError, match="out of luck"):
        prune(model, loss)
    assert len(calls) == fails and hooks(model) == 0
    assert all(torch.equal(p, before[name]) for name, p in model.state_dict().items())
    with torch.no_grad():
        assert torch.equal(model(ids).logits, dense)


def test_the_rest_can_be_trained_and_what_is_gone_learns_nothing(model):
    gone = [Element(0, "head", 1, 2), Element(1, "ffn"), Element(0, "neurons", 5, 9)]
    with without(model, gone):
        model(torch.randint(0, 50, (2, 9))).logits.square().mean().backward()
    first, last = model.model.layers
    assert (first.self_attn.o_proj.weight.grad[:, 8:16] == 0).all()
    assert (first.self_attn.o_proj.weight.grad[:, :8] != 0).any()
    assert (first.self_attn.q_proj.weight.grad[8:16] == 0).all()
    assert (first.mlp.down_proj.weight.grad[:, 5:9] == 0).all() and (first.mlp.up_proj.weight.grad[5:9] == 0).all()
    assert last.mlp.down_proj.weight.grad is None and last.mlp.up_proj.weight.grad is None


def test_under_a_plan_too_and_in_our_own_transformer(model):
    ids, gone = torch.randint(0, 50, (1, 24)), [Element(1, "head", 0, 1), Element(0, "ffn")]
    plan = plan_of(model, [Hard(0, 6)], phases=("prefill",))
    with torch.no_grad(), attach(model, plan), without(model, gone):
        got = model(ids, use_cache=False).logits
    twin = without_by_hand(model, [(1, "head", 0, 1), (0, "ffn", 0, 0)])
    with torch.no_grad(), attach(twin, plan):
        assert torch.equal(twin(ids, use_cache=False).logits, got)
    own = Transformer(50, 24, [Attention(24, heads=3, head_dim=4, kv_heads=1) for _ in range(2)], mlp_width=20)
    assert [part.heads for part in parts(own)] == [3, 3]
    with torch.no_grad():
        with without(own, [Element(1, "head", 1, 2)]):
            got = own(ids).y
        own.blocks[1].layer.o_proj.weight[:, 4:8] = 0
        assert torch.equal(own(ids).y, got)


def test_models_and_elements_that_are_not_there(model):
    gpt = tf.GPT2LMHeadModel(tf.GPT2Config(n_embd=16, n_layer=1, n_head=2, vocab_size=20))
    with pytest.raises(UnsupportedError, match="GPT2LMHeadModel has 0 layers"):
        elements(gpt)
    model.model.layers[0].mlp.down_proj = torch.nn.Identity()
    with pytest.raises(UnsupportedError, match="has 1 layers that hold an o_proj and a down_proj, of 2"):
        elements(model)
    model = llama()
    for gone in (Element(2, "ffn"), Element(0, "head", 3, 5), Element(1, "neurons", 40, 45)):
        with pytest.raises(InputError, match=f"layer {gone.layer}"), without(model, [Element(0, "ffn"), gone]):
            pass
        with pytest.raises(InputError, match=f"layer {gone.layer}"):
            remove(model, [Element(0, "ffn"), gone])
        assert hooks(model) == 0
    # nothing was half removed
    assert (model.model.layers[0].mlp.down_proj.weight != 0).any()
    for wrong in ((0, "mlp"), (-1, "ffn"), (0, "head"), (0, "head", 2, 2), (0, "head", -1, 2), (0, "ffn", 0, 3)):
        with pytest.raises(InputError, match="Element"):
            Element(*wrong)
    for group in (0, 1.5, True):
        with pytest.raises(InputError, match="group"):
            elements(model, group=group)


@pytest.mark.parametrize("tolerance", [0.0, 0.2])
def test_hard_layers_is_the_plain_loop(tolerance):
    taken = passed = 0
    for seed in range(40):
        rng = random.Random(seed)
        layers, budgets = rng.randint(1, 5), rng.sample([4, 8, 16, 0.25, 64], rng.randint(1, 3))
        loss = table(rng, 1)
        served, best, trials = {}, loss({}.items()), []
        for layer in reversed(range(layers)):
            for budget in budgets:
                value = loss({**served, layer: budget}.items())
                trials.append(((layer, budget), value))
                if value <= best + tolerance:
                    served[layer], best = budget, min(best, value)
                    break

        def of(plan, loss=loss):
            rows = {at: row[0].args["budget"] for at, row in enumerate(plan.layers) if row}
            assert all([a.phase for a in row] == ["prefill", "decode"] for row in plan.layers if row)
            return loss(rows.items())

        plan, found = hard_layers(ModelShape(layers, 4, 2), of, budgets=budgets, tolerance=tolerance)
        assert [(t.element, t.loss) for t in found.trials] == trials
        assert {at: row[0].args["budget"] for at, row in enumerate(plan.layers) if row} == served
        assert all(a.method == "hard" and a.heads is None for row in plan.layers for a in row)
        assert f"{len(served)} of {layers} layers" in plan.note
        taken, passed = taken + len(served), passed + len(found.passed)
    assert taken and passed


def test_hard_layers_on_a_model_and_its_arguments():
    model = llama()
    samples = [(torch.randint(0, 50, (20,)), torch.arange(20) > 3) for _ in range(2)]

    def loss(plan):
        with attach(model, plan):
            return answer_loss(model, samples)

    plan, found = hard_layers(
        model, loss, budgets=[3], layers=[0, 1], tolerance=0.5, candidates=9, phases=("prefill",), held=loss
    )
    assert [t.element for t in found.trials] == [(0, 3), (1, 3)]
    # the budget is felt, and the second set is asked under the plan that comes out
    assert len({found.before, *(t.loss for t in found.trials)}) == 3
    assert found.held == (found.before, *found.losses) and found.after == loss(plan)
    for row in plan.layers:
        assert [(a.phase, a.args) for a in row] in ([], [("prefill", {"budget": 3, "candidates": 9})])
    # everything kept is dense attention
    whole, found = hard_layers(model, loss, budgets=[20], tolerance=1e-6, phases=("prefill",))
    assert len(found.accepted) == 2 and found.after == pytest.approx(found.before, abs=1e-6)

    def never(plan):
        raise AssertionError("arguments are looked at first")

    for more in ({"budgets": []}, {"layers": [2]}, {"layers": [-1]}, {"phases": ()}):
        with pytest.raises(InputError, match=r"hard_layers|layers must be"):
            hard_layers(model, never, **more)
    for more, word in (({"phases": ("cache",)}, "not in cache"), ({"budgets": [4, 0]}, "budget")):
        with pytest.raises(PlanError, match=word):
            hard_layers(model, never, **more)
    with pytest.raises(InputError, match="there twice"):
        hard_layers(model, never, layers=[1, 1])
    with pytest.raises(InputError, match="distinct"):
        plan_of(model, [Hard(1, 4), Hard(1, 8)])


def test_the_loss_of_answers_is_a_plain_mean_over_their_tokens():
    model = llama().train()
    samples = [(torch.randint(0, 50, (n,)), torch.rand(n) < 0.5) for n in (9, 14)]
    values = []
    with torch.no_grad():
        for ids, supervised in samples:
            logits = model(ids[None]).logits[0].double()
            values += [-logits[i - 1].log_softmax(0)[ids[i]] for i in range(1, len(ids)) if supervised[i]]
    assert answer_loss(model, samples) == pytest.approx(float(torch.stack(values).mean()), rel=1e-5)
    assert model.training
    with pytest.raises(InputError, match="supervise no token"):
        answer_loss(model, [(torch.arange(4), torch.tensor([True, False, False, False]))])
