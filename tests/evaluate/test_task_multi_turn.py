import re

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import serving
from saccade.evaluate.measure import outcomes
from saccade.evaluate.model import load
from saccade.evaluate.presets import resolve
from saccade.evaluate.tasks.base import Outcome
from saccade.evaluate.tasks.multi_turn import MultiTurn

FACT = re.compile(r"[Tt]he code (?:of|to use is)? ?(\S+?),? is (\S+)\.|For (\S+), the code to use is (\S+)\.")


def facts(text):
    return {(a or c): (b or d) for a, b, c, d in FACT.findall(text)}


@pytest.mark.parametrize(("turns", "distractors"), [(1, 0), (3, 3), (2, 8)])
def test_each_turn_asks_for_a_fact_of_its_own(turns, distractors, tokenizer):
    task = MultiTurn(turns=turns, distractors=distractors)
    for index in range(3):
        sample = task.sample(tokenizer, 1800, index)
        spent = len(sample.ids) + sum(map(len, sample.turns)) + turns * sample.max_new_tokens
        assert 1800 - 32 < spent <= 1800 and len(sample.ids) % 32 == 0
        text = tokenizer.decode(sample.ids)
        assert text.endswith(sample.question)
        known = facts(text)
        assert len(known) == turns + distractors
        asked = [sample.question, *(tokenizer.decode(list(ids)) for ids in sample.turns)]
        keys = [re.search(r"code of (\S+?)(?:\?| is)", question).group(1) for question in asked]
        assert [known[key] for key in keys] == list(sample.answers) and len(set(keys)) == turns


def test_turns_are_one_dialogue(tiny, monkeypatch):
    """Stock transformers without any cache, over the whole dialogue so far, says the same in each turn."""
    task = MultiTurn(turns=3, max_new_tokens=5)
    sample = task.sample(tiny.tokenizer, 300, 0)
    said = []
    monkeypatch.setattr(
        "saccade.evaluate.tasks.multi_turn.exact", lambda text, want: said.append(text) or float(len(said))
    )
    with serving(tiny, None) as cache:
        found = task.run(tiny, cache, sample)
    assert found.parts["turns"] == [1.0, 2.0, 3.0] and found.score == 2.0
    dialogue = []
    for turn, ids in enumerate((sample.ids, *sample.turns)):
        dialogue += ids
        for _ in range(5):
            with torch.inference_mode():
                dialogue.append(int(tiny.model(torch.tensor([dialogue])).logits[0, -1].argmax()))
            if "\n" in tiny.tokenizer.decode([dialogue[-1]]) or dialogue[-1] == 1:
                break
        count = len(dialogue)
        start = count - next(n for n in range(1, 6) if dialogue[: count - n][-len(ids) :] == list(ids))
        assert tiny.tokenizer.decode(dialogue[start:]).split("\n")[0].strip() == said[turn]
        # the last token of an answer is not read again
        dialogue.pop()


@pytest.fixture
def said(monkeypatch):
    texts = []
    monkeypatch.setattr(
        "saccade.evaluate.tasks.multi_turn.exact", lambda text, want: texts.append(text) or float("e" in text)
    )
    return texts


@pytest.mark.parametrize("method", ["dense", "quest", "snapkv", "trishape+h2o"])
def test_samples_are_read_together_as_alone(method, wild, said, alike):
    task = MultiTurn(max_new_tokens=5)
    samples = alike(task, wild.tokenizer, 300, 3)
    assert len({tuple(map(len, sample.turns)) for sample in samples}) > 1
    plan = resolve(method, wild, 300)
    alone, _ = outcomes(wild, plan, task, samples)
    texts = said.copy()
    said.clear()
    found, most = outcomes(wild, plan, task, samples, batch=8)
    assert most == 3 and said == texts and len(set(texts)) > 3
    assert [one.parts for one in found] == [one.parts for one in alone]
    assert task.summary(found) == task.summary(alone)
    # the times are those of the first turn, and only of one that was read alone
    assert all(one.answer.ttft_s > 0 and one.answer.tokens <= 5 for one in alone)
    assert all(one.answer.ttft_s is None and one.answer.tpot_s is None for one in found)
    assert [one.answer.tokens for one in found] == [one.answer.tokens for one in alone]


def test_half_as_many_are_read_where_memory_runs_out(wild, said, alike):
    task = MultiTurn(turns=2, max_new_tokens=4)
    samples = alike(task, wild.tokenizer, 300, 5)
    plan = resolve("snapkv", wild, 300)
    alone, _ = outcomes(wild, plan, task, samples)
    texts = said.copy()
    said.clear()
    calls = []

    def full(model, args):
        rows = len(args[0])
        calls.append(rows)
        # in the middle of a dialogue
        if rows > 2 and calls.count(rows) == 9:
            raise torch.OutOfMemoryError("no room")

    hook = wild.model.register_forward_pre_hook(full)
    try:
        found, most = outcomes(wild, plan, task, samples, batch=4)
    finally:
        hook.remove()
    assert most == 2 and set(calls) == {4, 2, 1} and calls.count(4) == 9
    assert said == texts and [one.parts for one in found] == [one.parts for one in alone]


def test_a_cache_pruned_by_the_first_question_shows_its_price(alike):
    loaded = load("reader", device="cpu")
    task = MultiTurn()
    samples = alike(task, loaded.tokenizer, 2048, 2)
    dense = task.summary(outcomes(loaded, None, task, samples, batch=2)[0])
    plan = Plan.uniform(loaded.model, cache=("snapkv", {"capacity": 204, "kernel": 15}))
    pruned = task.summary(outcomes(loaded, plan, task, samples, batch=2)[0])
    assert dense["turns"] == [1.0, 1.0, 1.0]
    assert pruned["turns"][0] == 1.0 and max(pruned["turns"][1:]) <= 0.5
    assert pruned["score"] < dense["score"]


def test_summary_by_hand():
    row = MultiTurn().summary([Outcome(1.0, None, {"turns": [1, 1]}), Outcome(0.5, None, {"turns": [1, 0]})])
    assert row["n"] == 2 and row["score"] == 0.75 and row["turns"] == [1.0, 0.5]
    for options in ({"turns": 0}, {"distractors": -1}, {"value": "word"}):
        with pytest.raises(InputError, match="MultiTurn"):
            MultiTurn(**options)
