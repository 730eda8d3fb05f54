"""Echo and induction scores: constructed heads, a loop, a model's own weights, and the plan that follows."""

import pytest
import torch
import transformers as tf

from saccade import attach
from saccade.core.call import Call
from saccade.core.errors import InputError
from saccade.core.plan import ModelShape
from saccade.fit.razor import Scores, plan_of, repeat_masses, score_heads


def one_hot(offsets, N, period):
    """q and k whose head h looks at nothing but the token `offsets[h]` back."""
    k = torch.eye(N)[None, None] * 60
    q = torch.stack([torch.eye(N)[(torch.arange(N) - back).clamp_min(0)] for back in offsets])[None]
    return q * N**0.5, k


@pytest.mark.parametrize("start", [0, 1])
def test_constructed_heads(start):
    period, N = 5, 20 + start
    # back to the copy of itself; to the token after it; to the token before; two copies back
    q, k = one_hot([period, period - 1, 1, 2 * period], N, period)
    # rows that cannot look so far look at the first token: for one of them that is its own copy, or the token in front
    far = 10 + (start == 0)
    echo, induction = repeat_masses(q, k, Call.of(q, k), period, start)
    torch.testing.assert_close(echo, torch.tensor([[1.0, 0, 0, far / 15]]), atol=1e-4, rtol=0)
    torch.testing.assert_close(induction, torch.tensor([[0, 1.0, 0, 0]]), atol=1e-4, rtol=0)


def test_against_a_loop():
    B, H, G, D, period, start = 2, 4, 2, 6, 7, 1
    N = start + 4 * period
    q, k = torch.randn(B, H, N, D), torch.randn(B, G, N, D)
    got = repeat_masses(q, k, Call.of(q, k, scale=0.5), period, start)
    want = torch.zeros(2, B, H)
    for b in range(B):
        for h in range(H):
            for i in range(start + period, N):
                p = torch.softmax(0.5 * k[b, h // 2, : i + 1] @ q[b, h, i], 0)
                j = i - period
                while j >= start:
                    want[0, b, h] += p[j] / (N - start - period)
                    want[1, b, h] += p[j + 1] / (N - start - period)
                    j -= period
    torch.testing.assert_close(torch.stack(got), want)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=90)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config, num_key_value_heads=2)).eval()


def test_a_model_is_scored_as_its_eager_weights_say(model):
    scores = score_heads(model, period=20, repeats=3, bos=1, seed=4)
    assert model.config._attn_implementation == "sdpa"
    rng = torch.Generator().manual_seed(4)
    ids = torch.cat((torch.tensor([1]), torch.randint(9, 90, (20,), generator=rng).repeat(3)))
    model.set_attn_implementation("eager")
    weights = model(ids[None], output_attentions=True).attentions
    model.set_attn_implementation("sdpa")
    for layer, p in enumerate(weights):
        want = torch.zeros(4)
        for i in range(21, 61):
            want += p[0, :, i, [j for j in (i - 20, i - 40) if j >= 1]].sum(-1) / 40
        torch.testing.assert_close(scores.echo[layer], want.detach(), atol=1e-5, rtol=1e-4)


def test_the_plan_keeps_the_best_of_each_score_and_attaches(model):
    echo, induction = torch.zeros(2, 4), torch.zeros(2, 4)
    induction[1, 3], echo[0, 0] = 0.9, 0.8
    plan = plan_of(model, Scores(echo, induction), induction=0.25, echo=0.25, sink=2, least=8, ratio=9)
    assert [[a.heads for a in row] for row in plan.layers] == [[(1,)], [(0,)]]
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(torch.randint(9, 90, (1, 300)), past_key_values=cache)
        held = [g.lengths for g in cache.layers[0].store.groups]
    assert held == [[300], [2 + 1 + 300 // 9 + 16]]


def test_ratios_round_over_all_heads():
    scores = Scores(torch.rand(10, 8), torch.rand(10, 8))
    plan = plan_of(ModelShape(10, 8, 8), scores)
    kept = 80 - sum(len(a.heads) for row in plan.layers for a in row)
    assert kept in {11, 12}  # round(0.14 * 80) and round(0.01 * 80), which may be the same head


@pytest.mark.parametrize("bad", [{"repeats": 1}, {"period": 1}, {"first": 90}])
def test_bad_probes(model, bad):
    with pytest.raises(InputError, match="score_heads"):
        score_heads(model, **{"period": 10, **bad})
