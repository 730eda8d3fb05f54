import re

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import serving
from saccade.evaluate.measure import outcomes
from saccade.evaluate.model import load
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
        assert spent == 1800
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


def test_a_cache_pruned_by_the_first_question_shows_its_price():
    loaded = load("reader", device="cpu")
    task = MultiTurn()
    samples = [task.sample(loaded.tokenizer, 2048, index) for index in range(2)]
    dense = task.summary(outcomes(loaded, None, task, samples)[0])
    plan = Plan.uniform(loaded.model, cache=("snapkv", {"capacity": 204, "kernel": 15}))
    pruned = task.summary(outcomes(loaded, plan, task, samples)[0])
    assert dense["turns"] == [1.0, 1.0, 1.0]
    assert pruned["turns"][0] == 1.0 and max(pruned["turns"][1:]) <= 0.5
    assert pruned["score"] < dense["score"]


def test_summary_by_hand():
    row = MultiTurn().summary([Outcome(1.0, None, {"turns": [1, 1]}), Outcome(0.5, None, {"turns": [1, 0]})])
    assert row["n"] == 2 and row["score"] == 0.75 and row["turns"] == [1.0, 0.5]
    for options in ({"turns": 0}, {"distractors": -1}, {"value": "word"}):
        with pytest.raises(InputError, match="MultiTurn"):
            MultiTurn(**options)
