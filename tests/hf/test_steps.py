"""Steps of a fixed shape give what ordinary steps give, and hand back a cache that goes on as if nothing had been."""

import pytest
import torch
import transformers as tf

from saccade import Assign, Plan, attach
from saccade.core.errors import InputError, UnsupportedError

TINY = dict(
    hidden_size=64,
    intermediate_size=96,
    num_hidden_layers=4,
    num_attention_heads=4,
    num_key_value_heads=2,
    vocab_size=97,
    max_position_embeddings=512,
)


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    return tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval()


def plans(model):
    share = Assign((1,), "duo", {"sink": 2, "recent": 9}, phase="cache")
    razor = Assign((0,), "razor", {"sink": 2, "least": 9, "slack": 0}, phase="cache")
    return {
        "dense": Plan.uniform(model),
        "streaming": Plan.uniform(model, decode=("streaming", {"sink": 3, "recent": 20})),
        "tidal": Plan.uniform(model, decode=("tidal", {"budget": 12, "first": 0, "correct": 2})),
        "duo": Plan.per_head(model, [[share]] * 4),
        "razor": Plan.per_head(model, [[razor]] * 4),
        "everyone evicts": Plan.uniform(model, cache=("duo", {"sink": 2, "recent": 30})),
    }


def plain(model, plan, ids, cut):
    """Logits after each token from `cut` on, fed one by one."""
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(ids[:, :cut], past_key_values=cache)
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(cut, ids.shape[1])], 1)


@pytest.mark.parametrize("name", ["dense", "streaming", "tidal", "duo", "razor", "everyone evicts"])
def test_same_numbers_as_ordinary_steps(model, name):
    plan = plans(model)[name]
    ids = torch.randint(0, 97, (2, 60))
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(ids[:, :45], past_key_values=cache)
        got = []
        with session.steps(cache, room=6) as step:
            got += [step(ids[:, i : i + 1]).clone() for i in range(45, 50)]
        assert cache.get_seq_length() == 50
        # closed early, then steps again, then the usual way
        with session.steps(cache, room=7) as step:
            got += [step(ids[:, i : i + 1]).clone() for i in range(50, 57)]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(57, 60)]
    got, want = torch.cat(got, 1), plain(model, plan, ids, 45)
    if name == "razor":
        # nothing is folded while steps are made: a head sees more than it would
        torch.testing.assert_close(got[:, :1], want[:, :1], atol=1e-5, rtol=1e-4)
        assert (got - want).abs().max() < 0.2
        return
    torch.testing.assert_close(got, want, atol=1e-5, rtol=1e-4)


def test_bytes_are_given_back_after_the_steps(model):
    plan = Plan.uniform(model, cache=("duo", {"sink": 2, "recent": 30}))
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(torch.randint(0, 97, (1, 60)), past_key_values=cache)
        with session.steps(cache, room=400) as step:
            for _ in range(400):
                step(torch.zeros(1, 1, dtype=torch.long))
            assert cache.layers[0].store.groups[0].k.shape[2] >= 400
        group = cache.layers[0].store.groups[0]
    assert group.lengths == [2 + 30 + 16] and group.k.shape[2] < 48 + 128


def test_more_steps_than_room(model):
    with attach(model, Plan.uniform(model)) as session, torch.no_grad():
        cache = session.cache()
        model(torch.zeros(1, 9, dtype=torch.long), past_key_values=cache)
        with session.steps(cache, room=1) as step:
            step(torch.zeros(1, 1, dtype=torch.long))
            with pytest.raises(InputError, match="room for 1"):
                step(torch.zeros(1, 1, dtype=torch.long))


def test_what_cannot_be_stepped_is_refused_and_leaves_the_cache_usable(model):
    ids = torch.randint(0, 97, (2, 20))
    with attach(model, Plan.uniform(model)) as session, torch.no_grad():
        with pytest.raises(InputError, match="empty"):
            session.steps(session.cache(), room=4)
        with pytest.raises(InputError, match="room"):
            session.steps(session.cache(), room=0)
        cache = session.cache()
        mask = torch.ones(2, 20, dtype=torch.long)
        mask[0, :3] = 0
        model(ids, attention_mask=mask, past_key_values=cache)
        with pytest.raises(UnsupportedError, match="equal length"):
            session.steps(cache, room=4)
        more = torch.cat((mask, mask.new_ones(2, 1)), 1)
        assert model(ids[:, :1], attention_mask=more, past_key_values=cache).logits.isfinite().all()


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
def test_a_replayed_graph_gives_the_same_numbers():
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval().cuda()
    ids = torch.randint(0, 97, (2, 60), device="cuda")
    for name, plan in plans(model).items():
        with attach(model, plan) as session, torch.no_grad():
            cache = session.cache()
            model(ids[:, :45], past_key_values=cache)
            with session.steps(cache, room=15) as step:
                got = torch.cat([step(ids[:, i : i + 1]).clone() for i in range(45, 60)], 1)
        if name != "razor":
            torch.testing.assert_close(got, plain(model, plan, ids, 45), atol=1e-4, rtol=1e-3)
