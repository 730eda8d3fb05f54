"""MoA's influence against removing entries one by one, its masks by hand, and rules that keep the density."""

import pytest
import torch
import transformers as tf

from saccade import attach
from saccade.core.errors import InputError
from saccade.fit.moa import Rule, by_key_head, choose, influence, lost, plan_of, profile, rules_for


def test_exact_where_the_loss_is_linear_in_the_weights():
    n = 6
    weights = torch.rand(n, n).double().tril().softmax(-1).tril()
    weights = weights / weights.sum(-1, keepdim=True)
    slope = torch.randn(n, n).double()
    got = influence(weights, slope)
    for i in range(1, n):
        for j in range(i + 1):
            without = weights[i].clone()
            without[j] = 0
            change = (slope[i] * without / without.sum()).sum() - (slope[i] * weights[i]).sum()
            assert got[i, j].item() == pytest.approx(change.item(), abs=1e-12)
    # a single weight cannot be shared out
    assert got[0, 0] == -slope[0, 0]


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    config = dict(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=50)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**config, num_key_value_heads=2)).eval()


def test_profile_is_the_influence_of_every_layer_by_finite_differences(model):
    """The gradient that is used is dLoss/dWeights of the whole model: nudging one weight says the same."""
    ids, supervised = torch.randint(0, 50, (20,)), torch.arange(20) > 11
    got = profile(model, [(ids, supervised)], block=5)
    assert got.shape == (2, 4, 4, 4) and model.config._attn_implementation == "sdpa"
    assert not any(p.grad is not None for p in model.parameters())
    # nothing above the diagonal, and later rows matter more: only they are supervised
    assert torch.equal(got, got.tril()) and (got[1, :, 3].sum() > got[1, :, 0].sum())
    twice = profile(model, [(ids, supervised)] * 2, block=5)
    torch.testing.assert_close(twice, got)

    eager = tf.LlamaForCausalLM(model.config).eval()
    eager.load_state_dict(model.state_dict())
    eager.set_attn_implementation("eager")
    out = eager(ids[None], output_attentions=True)
    loss = torch.nn.functional.cross_entropy(out.logits[0, :-1][supervised[1:]], ids[1:][supervised[1:]])
    grads = torch.autograd.grad(loss, out.attentions)
    for layer in range(2):
        want = influence(out.attentions[layer][0].detach(), grads[layer][0]).abs()
        want = want.view(4, 4, 5, 4, 5).sum((2, 4))
        torch.testing.assert_close(got[layer], want, atol=1e-6, rtol=1e-4)


def test_masks_by_hand():
    blocks = torch.arange(16.0).view(4, 4).tril()
    # only the diagonal and the first column are covered
    assert lost(blocks, Rule(64, 0.0), 256) == blocks[2, 1] + blocks[3, 1] + blocks[3, 2]
    assert lost(blocks, Rule(0, 0.5), 256) == blocks[3, 1]
    assert lost(blocks, Rule(0, 1.0), 256) == 0
    assert lost(blocks, Rule(-256, 0.0), 256) == lost(blocks, Rule(64, 0.0), 256)


def test_grid():
    rules = rules_for([256, 1024], step=256, betas=5)
    assert Rule(0, 1.0) in rules and Rule(-256, 1.0) not in rules and Rule(256, 0.75) in rules
    assert all(0 < r.alpha + r.beta * n <= n for r in rules for n in (1024,))


@pytest.mark.parametrize("density", [0.3, 0.5, 0.8])
def test_heads_that_need_far_blocks_get_them_and_the_density_holds(density):
    local, far = torch.eye(8), torch.ones(8, 8).tril()
    # of eight heads two look far
    heads = torch.stack([local] * 3 + [far] + [local] * 3 + [far]).view(2, 4, 8, 8)
    rules = rules_for([512, 1024], step=128)
    rows = choose({512: heads}, rules, density=density, lengths=[1024])
    for length in (512, 1024):
        assert sum(r.share(length) for row in rows for r in row) / 8 <= density + 1e-9
    for row in rows:
        assert row[3].share(1024) >= 0.75
        assert max(r.share(1024) for r in row[:3]) <= row[3].share(1024)
    kept = lost(heads[0, 3], rows[0][3], 512)
    assert kept < lost(heads[0, 3], Rule(0, density), 512)


def test_no_rule_is_cheap_enough():
    with pytest.raises(InputError, match="density"):
        choose({128: torch.ones(1, 2, 2, 2).tril()}, [Rule(0, 1.0)], density=0.5)


def test_the_plan_attaches_and_frees(model):
    blocks = by_key_head(torch.rand(2, 4, 4, 4).tril(), 2)
    assert blocks.shape == (2, 2, 4, 4)
    rows = [[Rule(64, 0.0), Rule(0, 1.0)], [Rule(0, 0.5)] * 2]
    with attach(model, plan_of(model, rows)) as session, torch.no_grad():
        cache = session.cache(400)
        model(torch.randint(0, 50, (1, 400)), past_key_values=cache)
        held = [sorted(g.lengths[0] for g in layer.store.groups) for layer in cache.layers]
    # half of 400 in whole blocks of 64 is 256
    assert held == [[128 + 16, 400], [256 + 16]]


def test_prices_for_each_length_lose_no_more_than_one_for_all():
    """Heads that need a fixed window beside one that needs everything: fixed windows are dear at one length only."""
    far = torch.ones(16, 16).tril()
    near = torch.eye(16) + torch.diag(torch.ones(15), -1) + torch.diag(torch.ones(14), -2)
    profiles = {1024: torch.stack([near, near, near, far]).view(2, 2, 16, 16)}
    rules = rules_for([1024, 2048], step=64)
    rows = choose(profiles, rules, density=0.42, lengths=[2048, 8192])
    spans = [[r.alpha + r.beta * length for row in rows for r in row] for length in (1024, 2048, 8192)]
    for length, span in zip((1024, 2048, 8192), spans, strict=True):
        assert sum(span) / 4 / length <= 0.42 + 1e-9
        # every head has what it needs: three blocks, or all but the block that is always read
        assert min(span[:3]) >= 192 and span[3] >= 0.9 * length
    for bad in (0.0, 1.5, -1.0):
        with pytest.raises(InputError, match="density"):
            choose(profiles, rules, density=bad)


def test_the_reader_s_documents_supervise_answers_alone_and_its_plan_is_shipped():
    from saccade.evaluate.presets import preset
    from saccade.reader import load
    from saccade.recipe.moa import samples

    model, tokenizer = load()
    for ids, marks in samples(tokenizer, 512, facts=2, count=2):
        assert 512 - 64 < len(ids) <= 512 and len(marks) == len(ids)
        # a blank and seven digits, twice
        said = tokenizer.decode(ids[marks]).split()
        assert [len(word) for word in said] == [7, 7] and "".join(said).isdigit()
        text = tokenizer.decode(ids)
        assert all(text.count(word) == 2 for word in said)
    plan = preset("moa", model, 4096, bundled=True)
    rules = [a.args["span"] for row in plan.layers for a in row for _ in a.heads]
    assert len(rules) == 16 and sum(r["base"] / 32768 + r["slope"] for r in rules) / 16 <= 0.25 + 1e-9
