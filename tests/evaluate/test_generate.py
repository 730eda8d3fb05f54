import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import answer, held, serving

IDS = list(range(3, 60))


def plain(tiny, count):
    """Greedy tokens without any cache."""
    ids = list(IDS)
    for _ in range(count):
        ids.append(int(tiny.model(torch.tensor([ids])).logits[0, -1].argmax()))
    return ids[len(IDS) :]


@pytest.mark.parametrize("plan", [None, "dense"])
def test_answers_as_the_model_does_without_a_cache(tiny, plan):
    plan = plan and Plan.uniform(tiny.model)
    with serving(tiny, plan) as cache:
        found = answer(tiny, IDS, cache(len(IDS)), max_new_tokens=6, stop="")
    assert found.text == tiny.tokenizer.decode(plain(tiny, 6)).strip()
    assert found.tokens == 6
    assert found.ttft_s > 0 and found.tpot_s > 0


def test_stops_at_the_text_and_goes_on_for_the_clock(tiny):
    said = tiny.tokenizer.decode(plain(tiny, 10))
    stop = said[2:4]
    with serving(tiny, None) as cache:
        found = answer(tiny, IDS, cache(), max_new_tokens=10, stop=stop, least=5)
    assert found.text == said.split(stop, 1)[0].strip()
    assert 5 <= found.tokens < 10


def test_ends_at_end_of_sequence(tiny):
    first = plain(tiny, 1)[0]
    tiny.model.generation_config.eos_token_id = first
    try:
        with serving(tiny, None) as cache:
            found = answer(tiny, IDS, cache(), max_new_tokens=10, least=2)
    finally:
        tiny.model.generation_config.eos_token_id = 1
    assert (found.text, found.tokens) == ("", 2)


def test_stock_has_nothing_of_saccade_on_it(tiny):
    seen = []
    with serving(tiny, None) as cache:
        hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in tiny.model.modules())
        seen = [tiny.model.config._attn_implementation, hooks, type(cache()).__name__]
    assert seen == ["sdpa", 0, "DynamicCache"]


def test_bytes_of_stock_are_those_of_keys_and_values(tiny):
    with serving(tiny, None) as cache:
        mine = cache()
        found = answer(tiny, IDS, mine, max_new_tokens=1)
    # layers x (keys, values) x kv heads x width x float32; one token alone has no time per token
    assert found.kv_bytes == held(mine) == 4 * 2 * 2 * 8 * 4 * len(IDS)
    assert found.tpot_s is None


def test_refuses_an_empty_prompt(tiny):
    with pytest.raises(InputError, match="prompt"):
        answer(tiny, [], None)
