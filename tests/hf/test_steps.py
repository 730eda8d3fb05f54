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
HIP = {"sink": 2, "window": 6, "block_k": 2, "refresh": 4, "first": 0}
# what decodes, by the name of a case; budgets are so small that choosing matters, "late" ones are passed on the way
DECODE = {
    "streaming": ("streaming", {"sink": 3, "recent": 20}),
    "tidal": ("tidal", {"budget": 12, "first": 0, "correct": 2}),
    "tidal, a share": ("tidal", {"budget": 0.3, "first": 0, "correct": 2}),
    "tidal, late": ("tidal", {"budget": 52, "first": 0, "correct": 2}),
    "quest": ("quest", {"budget": 16, "block_k": 4, "first": 1}),
    "quest, together": ("quest", {"budget": 15, "block_k": 3, "first": 0, "together": True}),
    "quest, a share": ("quest", {"budget": 0.3, "block_k": 3, "first": 0}),
    "quest, nearly all": ("quest", {"budget": 0.97, "block_k": 4, "first": 0}),
    "quest, late": ("quest", {"budget": 52, "block_k": 4, "first": 0}),
    "hip": ("hip", {"budget": 24, **HIP}),
    "hip, a share": ("hip", {"budget": 0.6, **HIP}),
    "hip, late": ("hip", {"budget": 52, **HIP}),
    "hip, hardly a window": ("hip", {"budget": 24, **HIP, "window": 1, "block_k": 5, "refresh": 3}),
    "recycled": ("recycled", {"budget": 12, "stride": 4, "kernel": 3}),
    "recycled, a share": ("recycled", {"budget": 0.3, "stride": 4, "kernel": 3, "together": False}),
    "recycled, late": ("recycled", {"budget": 52, "stride": 4, "kernel": 3}),
    "recycled, by query": ("recycled", {"budget": 12, "stride": 3, "kernel": 3, "threshold": 0.6}),
    "recycled, once": ("recycled", {"budget": 12, "stride": 3, "kernel": 3, "threshold": -1.0}),
    "hard": ("hard", {"budget": 6}),
    "hard, a share": ("hard", {"budget": 0.2}),
    "above": ("above", {"inner": {"method": "quest", "args": {"budget": 16, "block_k": 4, "first": 0}}, "length": 52}),
}


@pytest.fixture(scope="module")
def model():
    torch.manual_seed(0)
    made = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval().double()
    with torch.no_grad():
        for name, weights in made.named_parameters():
            if "q_proj" in name or "k_proj" in name:
                # attention that is not nearly flat, so that what is chosen shows
                weights.mul_(6)
    return made.requires_grad_(False)


def plans(model):
    share = Assign((1,), "duo", {"sink": 2, "recent": 9}, phase="cache")
    razor = Assign((0,), "razor", {"sink": 2, "least": 9, "slack": 0}, phase="cache")
    some = Assign((0, 1), "quest", {"budget": 16, "block_k": 4, "first": 0}, phase="decode")
    found = {name: Plan.uniform(model, decode=decode) for name, decode in DECODE.items()}
    return found | {
        "dense": Plan.uniform(model),
        "duo": Plan.per_head(model, [[share]] * 4),
        "duo and quest": Plan.per_head(model, [[share, some]] * 4),
        "razor": Plan.per_head(model, [[razor]] * 4),
        "everyone evicts": Plan.uniform(model, cache=("duo", {"sink": 2, "recent": 30})),
    }


CASES = [*DECODE, "dense", "duo", "duo and quest", "everyone evicts"]


def plain(model, plan, ids, cut):
    """Logits after each token from `cut` on, fed one by one."""
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(ids[:, :cut], past_key_values=cache)
        return torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(cut, ids.shape[1])], 1)


def stepped(model, plan, ids):
    """Logits after each token from 40 on: 2 ordinary steps, 13 of 15 there is room for, 6 of 6, and ordinary ones."""
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(ids[:, :40], past_key_values=cache)
        got = [model(ids[:, i : i + 1], past_key_values=cache).logits for i in (40, 41)]
        with session.steps(cache, room=15) as step:
            got += [step(ids[:, i : i + 1]).clone() for i in range(42, 55)]
        assert cache.get_seq_length() == 55
        with session.steps(cache, room=6) as step:
            got += [step(ids[:, i : i + 1]).clone() for i in range(55, 61)]
        got += [model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(61, ids.shape[1])]
    return torch.cat(got, 1)


@pytest.mark.parametrize("name", CASES)
def test_same_numbers_as_ordinary_steps(model, name):
    plan = plans(model)[name]
    ids = torch.randint(0, 97, (2, 70))
    got, want = stepped(model, plan, ids), plain(model, plan, ids, 40)
    torch.testing.assert_close(got, want, atol=1e-9, rtol=1e-7)
    if name != "dense":
        # and it is the method that answers
        assert (got - plain(model, Plan.uniform(model), ids, 40)).abs().max() > 1e-4


def test_folded_heads_see_more_while_steps_are_made(model):
    plan, ids = plans(model)["razor"], torch.randint(0, 97, (2, 70))
    got, want = stepped(model, plan, ids), plain(model, plan, ids, 40)
    torch.testing.assert_close(got[:, :3], want[:, :3], atol=1e-9, rtol=1e-7)
    assert (got - want).abs().max() < 0.5


@pytest.mark.parametrize("name", ["dense", "quest", "quest, a share", "hip", "recycled", "recycled, by query", "tidal"])
def test_a_next_question_is_answered_as_if_there_had_been_no_steps(model, name):
    plan, ids = plans(model)[name], torch.randint(0, 97, (1, 60))
    question = torch.randint(0, 97, (1, 23))
    answers = []
    for steps in (False, True):
        with attach(model, plan) as session, torch.no_grad():
            cache = session.cache()
            model(ids[:, :40], past_key_values=cache)
            if steps:
                with session.steps(cache, room=30) as step:
                    for i in range(40, 60):
                        step(ids[:, i : i + 1])
            else:
                for i in range(40, 60):
                    model(ids[:, i : i + 1], past_key_values=cache)
            out = model.generate(
                torch.cat((ids, question), 1), past_key_values=cache, max_new_tokens=20, do_sample=False, pad_token_id=0
            )
            answers.append(out[0, 83:].tolist())
            if steps:
                # taken back, then another question, in steps again
                cache.crop(-40)
                more = model(question[:, 5:], past_key_values=cache).logits[:, -1:]
                with session.steps(cache, room=12) as step:
                    for _ in range(12):
                        more = step(more.argmax(-1)).clone()
            else:
                cache.crop(-40)
                more = model(question[:, 5:], past_key_values=cache).logits[:, -1:]
                for _ in range(12):
                    more = model(more.argmax(-1), past_key_values=cache).logits
            answers.append(more)
    assert answers[0] == answers[2]
    torch.testing.assert_close(answers[1], answers[3], atol=1e-9, rtol=1e-7)


@pytest.mark.parametrize("name", ["quest", "hip", "recycled", "recycled, by query"])
def test_a_rehearsal_leaves_nothing_behind(model, name):
    # before a capture a step is made with any token, perhaps more than once: the real one must then come out right
    plan, ids = plans(model)[name], torch.randint(0, 97, (2, 70))
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(ids[:, :40], past_key_values=cache)
        got = []
        with session.steps(cache, room=30) as step:
            for i in range(40, 70):
                step._token.copy_(torch.randint(0, 97, (2, 1)))
                step._forward()
                got.append(step(ids[:, i : i + 1]).clone())
    torch.testing.assert_close(torch.cat(got, 1), plain(model, plan, ids, 40), atol=1e-9, rtol=1e-7)


def test_kinds_of_steps_are_known_beforehand(model):
    with attach(model, plans(model)["hip"]) as session, torch.no_grad():
        cache = session.cache()
        model(torch.zeros(1, 41, dtype=torch.long), past_key_values=cache)
        kinds = []
        with session.steps(cache, room=12) as step:
            for _ in range(12):
                step(torch.zeros(1, 1, dtype=torch.long))
                kinds.append(step.kind)
    # the first step searches at once, then those at positions 44, 48 and 52
    assert [kind == kinds[0] for kind in kinds] == [at in (41, 44, 48, 52) for at in range(41, 53)]
    assert len(set(kinds)) == 2


def test_memory_stays_where_it_is_while_steps_are_made(model):
    # a captured graph goes on reading and writing the tensors that it was captured with
    for name in ("quest", "hip", "recycled", "recycled, by query"):
        with attach(model, plans(model)[name]) as session, torch.no_grad():
            cache = session.cache()
            model(torch.zeros(2, 41, dtype=torch.long), past_key_values=cache)
            with session.steps(cache, room=20) as step:
                held = []
                for _ in range(20):
                    step(torch.randint(0, 97, (2, 1)))
                    held.append(list(addresses(cache.layers[3].store.memory)))
            assert held[0] and all(one == held[0] for one in held), name


def addresses(value):
    """Where all tensors of nested dicts and lists lie, with their sizes."""
    if isinstance(value, torch.Tensor):
        yield value.data_ptr(), tuple(value.shape)
    elif isinstance(value, (dict, list)):
        for item in value.values() if isinstance(value, dict) else value:
            yield from addresses(item)


def test_bytes_are_given_back_after_the_steps(model):
    plan = Plan.uniform(model, cache=("duo", {"sink": 2, "recent": 30}))
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(torch.randint(0, 97, (1, 60)), past_key_values=cache)
        with session.steps(cache, room=400) as step:
            for _ in range(60):
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


@pytest.mark.parametrize(
    "decode",
    [
        ("actqkv", {"budget": 24, "window": 8, "block_k": 2, "sink": 2, "near": 4}),
        ("hard", {"budget": 4, "candidates": 8}),
        ("s2", {}),
    ],
)
def test_methods_that_need_the_host_say_so_and_leave_the_cache_usable(model, decode):
    ids = torch.randint(0, 97, (2, 60))
    plan = Plan.uniform(model, decode=decode)
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(ids[:, :45], past_key_values=cache)
        with (
            pytest.raises(UnsupportedError, match=r"steps: .*decode without steps, or choose dense.*It says:"),
            session.steps(cache, room=4) as step,
        ):
            step(ids[:, 45:46])
        got = torch.cat([model(ids[:, i : i + 1], past_key_values=cache).logits for i in range(45, 60)], 1)
    torch.testing.assert_close(got, plain(model, plan, ids, 45), atol=1e-9, rtol=1e-7)


def test_a_graph_cannot_read_what_is_offloaded(model):
    plan = Plan.uniform(model, cache=("offload", {"sink": 4, "recent": 16, "block": 8}))
    with attach(model, plan) as session, torch.no_grad():
        cache = session.cache()
        model(torch.randint(0, 97, (1, 60)), past_key_values=cache)
        with pytest.raises(UnsupportedError, match="steps: Offload keeps tokens where only the host"):
            session.steps(cache, room=4, graph=True)
        assert all(layer.fixed is None for layer in cache.layers)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="a CUDA graph needs a GPU")
@pytest.mark.parametrize("name", CASES)
def test_a_replayed_graph_gives_the_same_numbers(name):
    torch.manual_seed(0)
    model = tf.LlamaForCausalLM(tf.LlamaConfig(**TINY)).eval().cuda()
    ids = torch.randint(0, 97, (2, 70), device="cuda")
    plan = plans(model)[name]
    torch.testing.assert_close(stepped(model, plan, ids), plain(model, plan, ids, 40), atol=1e-4, rtol=1e-3)
