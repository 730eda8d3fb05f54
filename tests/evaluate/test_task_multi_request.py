"""Multi-request: what each copy of the cache is asked, that requests do not meet, and what pruning early costs."""

import re
from dataclasses import replace

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import serving
from saccade.evaluate.measure import outcomes
from saccade.evaluate.model import load
from saccade.evaluate.presets import preset, resolve
from saccade.evaluate.tasks.base import Outcome
from saccade.evaluate.tasks.multi_request import MultiRequest

FACT = re.compile(r"[Tt]he code (?:of|to use is)? ?(\S+?),? is (\S+)\.|For (\S+), the code to use is (\S+)\.")
ASKED = re.compile(r"code of (\S+?)(?:\?| is)")


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize(("requests", "distractors"), [(1, 0), (3, 3), (2, 8)])
def test_each_request_asks_for_a_fact_of_its_own(requests, distractors, asked, tokenizer):
    task = MultiRequest(requests=requests, distractors=distractors, asked=asked)
    for index in range(3):
        sample = task.sample(tokenizer, 1800, index)
        # the longest request and its answer use the length up, but for the rest of a multiple of 32
        spent = len(sample.ids) + max(map(len, sample.turns)) + sample.max_new_tokens
        assert 1800 - 32 < spent <= 1800 and len(sample.ids) % 32 == 0
        text = tokenizer.decode(sample.ids)
        known = {(a or c): (b or d) for a, b, c, d in FACT.findall(text)}
        assert len(known) == requests + distractors
        # all that a request knows: the shared text and its own question
        whole = [tokenizer.decode([*sample.ids, *ids]) for ids in sample.turns]
        if asked:
            # the question is there already; its last token is taken back and read again
            assert list(sample.turns[0]) == sample.ids[-1:]
            whole[0] = text
        assert whole[0].endswith(sample.question) and len(whole) == len(sample.answers) == requests
        keys = [ASKED.findall(one[-80:])[-1] for one in whole]
        assert [known[key] for key in keys] == list(sample.answers) and len(set(keys)) == requests
        assert bool(re.search(r"(What is|stated earlier,) the code of \S+", text[-80:])) == asked


def test_requests_know_nothing_of_each_other(wild, monkeypatch):
    """Stock transformers without any cache, over the text and one question, says the same; in any order."""
    task = MultiRequest(requests=3, max_new_tokens=5)
    sample = task.sample(wild.tokenizer, 300, 0)
    said = []
    monkeypatch.setattr("saccade.evaluate.tasks.multi_request.exact", lambda text, want: said.append(text) or 1.0)
    for order in ((0, 1, 2), (2, 0, 1)):
        turns = tuple(sample.turns[i] for i in order)
        for plan in (None, Plan.uniform(wild.model)):
            said.clear()
            with serving(wild, plan) as cache:
                task.run(wild, cache, replace(sample, turns=turns))
            for ids, text in zip(turns, said, strict=True):
                tokens = [*sample.ids, *ids]
                for _ in range(5):
                    with torch.inference_mode():
                        tokens.append(int(wild.model(torch.tensor([tokens])).logits[0, -1].argmax()))
                    if "\n" in wild.tokenizer.decode([tokens[-1]]) or tokens[-1] == 1:
                        break
                alone = wild.tokenizer.decode(tokens[len(sample.ids) + len(ids) :])
                assert alone.split("\n")[0].strip() == text
        assert len(set(said)) == 3


@pytest.mark.parametrize("asked", [False, True])
@pytest.mark.parametrize("method", ["dense", "quest", "snapkv"])
def test_samples_are_read_together_as_alone(method, asked, wild, alike, monkeypatch):
    task = MultiRequest(asked=asked, max_new_tokens=4)
    samples = alike(task, wild.tokenizer, 300, 3)
    assert len({tuple(map(len, sample.turns)) for sample in samples}) > 1
    said = []
    monkeypatch.setattr("saccade.evaluate.tasks.multi_request.exact", lambda text, want: said.append(text) or 1.0)
    plan = resolve(method, wild, 300)
    alone, _ = outcomes(wild, plan, task, samples)
    texts = said.copy()
    said.clear()
    found, most = outcomes(wild, plan, task, samples, batch=8)
    assert most == 3 and said == texts and len(set(texts)) > 5
    assert task.summary(found) == task.summary(alone)
    assert all(one.answer.ttft_s > 0 for one in alone)
    assert all(one.answer.ttft_s is None and one.answer.tpot_s is None for one in found)
    assert [(one.answer.tokens, one.answer.text) for one in found] == [
        (one.answer.tokens, one.answer.text) for one in alone
    ]


def test_what_is_pruned_before_the_question_is_missed(alike):
    loaded = load("reader", device="cpu")
    plans = {
        "dense": None,
        # looks at the prompt's last queries
        "snapkv": Plan.uniform(loaded.model, cache=("snapkv", {"capacity": 150, "kernel": 25})),
        # chose its heads before there was a prompt
        "duo": preset("duo", loaded.model, 1024, bundled=True),
        "window": Plan.uniform(loaded.model, cache=("duo", {"sink": 50, "recent": 100})),
    }
    found = {}
    for asked in (False, True):
        task = MultiRequest(requests=2, asked=asked, max_new_tokens=12)
        samples = alike(task, loaded.tokenizer, 1024, 2)
        for name, plan in plans.items():
            found[name, asked] = task.summary(outcomes(loaded, plan, task, samples, batch=2)[0])
    for asked in (False, True):
        assert found["dense", asked]["requests"] == found["duo", asked]["requests"] == [1.0, 1.0]
        assert found["window", asked]["score"] <= 0.5
    # pruned by the first question, the cache answers that one; pruned by none, it answers none
    first, *others = found["snapkv", True]["requests"]
    assert first == 1.0 and max(others) <= 0.5
    assert found["snapkv", False]["requests"][0] <= 0.5
    # a window knows nothing of questions, and gains nothing by being shown one
    assert found["window", True]["requests"][0] <= found["window", False]["requests"][0]


def test_summary_by_hand():
    row = MultiRequest().summary([Outcome(1.0, None, {"requests": [1, 1]}), Outcome(0.5, None, {"requests": [1, 0]})])
    assert row["n"] == 2 and row["score"] == 0.75 and row["requests"] == [1.0, 0.5]
    for options in ({"requests": 0}, {"distractors": -1}, {"value": "word"}):
        with pytest.raises(InputError, match="MultiRequest"):
            MultiRequest(**options)
