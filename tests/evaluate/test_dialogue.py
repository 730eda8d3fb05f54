"""Dialogues against a model that reads the whole history anew for each token, and what a batch of them costs."""

import copy
import time
from dataclasses import replace

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.dialogue import Dialogue, Ending, hold
from saccade.evaluate.generate import replies, serving

LETTERS = "bcdfgklmpu"


def drawn(sizes, seed):
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 4096, (size,), generator=source).tolist() for size in sizes]


def plain(wild, turns, end, stop, most):
    """One dialogue by itself, without a cache: what is said in each turn, and how it ended."""
    history, said, why = [], [], []
    for question in turns:
        history = history + list(question)
        answer, text = [], ""
        while True:
            with torch.no_grad():
                token = wild.model(torch.tensor([history + answer])).logits[0, -1].argmax().item()
            if token == end:
                why.append("end")
                break
            answer.append(token)
            text = wild.tokenizer.decode(answer)
            if stop and stop in text:
                why.append("stop")
                break
            if len(answer) == most:
                why.append("most")
                break
        said.append((text[: text.index(stop)] if why[-1] == "stop" else text).strip())
        # what ended the answer is not read; neither is the last token of one that grew too long
        history += answer if why[-1] == "end" else answer[:-1]
    return said, why


@pytest.fixture(scope="module")
def talks(wild):
    """Four dialogues of one prompt length that have little else in common, and how they go with some endings."""
    turns = [
        [drawn([40], 50 + row)[0], *drawn(sizes, row)] for row, sizes in enumerate([(3, 17), (1, 1), (20, 2), (5,)])
    ]
    free = [plain(wild, each, None, "", 9)[0] for each in turns]
    # a letter and a token that end some of the answers
    stop = max(LETTERS, key=lambda letter: len({text.find(letter) for said in free for text in said}))
    found = {}
    for end in {row[at] for row in _tokens(wild, turns) for at in (2, 4, 6)}:
        found[end] = [plain(wild, each, end, stop, 9) for each in turns]
        if {"end", "stop", "most"} <= {why for _, whys in found[end] for why in whys}:
            return turns, end, stop, found[end]
    raise AssertionError("no token ends an answer beside others that end by text or at their longest")


def _tokens(wild, turns):
    """The first tokens that each row says to its prompt."""
    for each in turns:
        ids = list(each[0])
        with torch.no_grad():
            for _ in range(9):
                ids.append(wild.model(torch.tensor([ids])).logits[0, -1].argmax().item())
        yield ids[len(each[0]) :]


def rows_of(wild, turns, end, stop, most):
    return [Dialogue(each, Ending(wild.tokenizer, frozenset({end}), stop, most)) for each in turns]


@pytest.mark.parametrize("own", [False, True])
@pytest.mark.parametrize("members", [(0,), (1,), (2, 3), (3, 2, 1, 0)])
def test_each_dialogue_is_the_one_that_is_read_anew_for_each_token(own, members, wild, talks):
    turns, end, stop, want = talks
    rows = rows_of(wild, [turns[i] for i in members], end, stop, 9)
    shapes = []
    seen = wild.model.register_forward_pre_hook(
        lambda model, args, kwargs: shapes.append(tuple(args[0].shape)), with_kwargs=True
    )
    try:
        with serving(wild, Plan.uniform(wild.model) if own else None) as cache:
            done = hold(wild, rows, cache(40))
    finally:
        seen.remove()
    assert [row.texts for row in rows] == [want[i][0] for i in members]
    assert all(row.over for row in rows)
    # the prompts in one call, then a token a row; as many calls as the longest dialogue needs
    calls = [
        sum(map(len, row.said)) + sum(len(ids) - 1 for ids in turns[i][1:])
        for row, i in zip(rows, members, strict=True)
    ]
    assert shapes == [(len(rows), 40)] + [(len(rows), 1)] * (max(calls) - 1) and len(done) == max(calls)


def test_the_dialogues_end_in_every_way(talks):
    """What the test above compares: answers of many lengths, ended by token, text and length."""
    turns, _, _, want = talks
    assert {why for _, whys in want for why in whys} == {"end", "stop", "most"}
    assert len({text for said, _ in want for text in said}) > 5
    assert len({len(said) for said, _ in want}) > 1 and len({len(ids) for each in turns for ids in each}) > 4


def test_a_prompt_may_be_read_token_by_token(wild, talks):
    """Behind a text that was read before, as requests are; rows whose questions differ in length."""
    turns, end, stop, _ = talks
    shared = drawn([30], 99)[0]
    asked = [each[1] for each in turns]
    want = [plain(wild, [shared + ids], end, stop, 6)[0] for ids in asked]
    rows = [Dialogue([ids], Ending(wild.tokenizer, frozenset({end}), stop, 6), at_once=1) for ids in asked]
    with serving(wild, None) as cache:
        past = cache()
        with torch.inference_mode():
            wild.model(torch.tensor([shared] * 4), past_key_values=past)
        done = hold(wild, rows, past)
    assert [row.texts for row in rows] == want
    assert [row.first for row in rows] == [len(ids) for ids in asked]
    # the first token of an answer is known after as many calls as its question has tokens
    alone = rows[2]
    clock = [0.0, *(float(n) for n in range(1, len(done) + 1))]
    took = replies([alone], clock, past)[0]
    assert took.ttft_s == len(asked[2]) and took.tokens == len(alone.said[0])
    assert took.tpot_s == (1.0 if took.tokens > 1 else None)
    assert all(one.ttft_s is None and one.tpot_s is None for one in replies(rows, clock, past))


def test_times_are_those_of_the_first_turn(wild, talks):
    row = Dialogue(talks[0][0], Ending(wild.tokenizer, stop="", most=4))
    with serving(wild, None) as cache:
        past = cache()
        started = time.perf_counter()
        clock = [started, *hold(wild, [row], past)]
        ended = time.perf_counter()
    took = replies([row], clock, past)[0]
    assert took.text == wild.tokenizer.decode(row.said[0]).strip() and took.tokens == 4
    assert clock == sorted(clock) and clock[-1] <= ended
    assert took.ttft_s == clock[1] - started
    # later turns are in the clock, and not in the times
    assert took.tpot_s == (clock[4] - clock[1]) / 3 and len(clock) > 20


def test_the_host_waits_once_a_call(wild, talks, monkeypatch):
    turns, end, stop, _ = talks
    rows, waits, real = rows_of(wild, turns, end, stop, 9), [], torch.Tensor.tolist
    monkeypatch.setattr(torch.Tensor, "tolist", lambda tensor: waits.append(tensor.shape) or real(tensor))
    for name in ("item", "cpu", "__bool__", "__int__"):
        monkeypatch.setattr(torch.Tensor, name, lambda *_: pytest.fail("the device was waited for once more"))
    model = replace(wild, model=Still(wild.model))
    done = hold(model, rows, None)
    assert waits == [(4,)] * len(done)


class Still(torch.nn.Module):
    """Says the token after the one it has read; nothing of transformers is in the way."""

    def __init__(self, model):
        super().__init__()
        self.weight = next(model.parameters())

    def forward(self, ids, **_):
        return type("Out", (), {"logits": torch.nn.functional.one_hot((ids[:, -1:] + 1) % 4096, 4096)})


def test_a_row_by_hand():
    class Digits:
        def decode(self, ids):
            return "".join("\n" if token == 10 else str(token) for token in ids)

    row = Dialogue([[9, 9], [7], [5, 6]], Ending(Digits(), frozenset({99}), "\n", 3))
    # 1 ended by the text; 2, 3, 4 by length; then the end of sequence at once; what comes later is nobody's
    heard = [1, 10, 2, 3, 4, 8, 99, 1, 2]
    assert [row.hear(token) for token in heard] == [1, 7, 2, 3, 5, 6, 99, 1, 2]
    assert row.said == [[1, 10], [2, 3, 4], [99]] and row.texts == ["1", "234", ""] and row.over
    assert row.prompt == [9, 9] and row.first == 1


def test_refuses_what_cannot_be_held(wild):
    ending = Ending(wild.tokenizer)
    for turns, at_once in (([], None), ([[]], None), ([[3], []], None), ([[3, 4]], 0), ([[3, 4]], 3)):
        with pytest.raises(InputError, match="needs a prompt, tokens in each turn"):
            Dialogue(turns, ending, at_once)
    with pytest.raises(InputError, match="max_new_tokens"):
        Ending(wild.tokenizer, most=0)
    with pytest.raises(InputError, match=r"got 2 of \[1, 2\]"):
        hold(wild, [Dialogue([[3]], ending), Dialogue([[3, 4]], ending)], None)
    with pytest.raises(InputError, match="got 0"):
        hold(wild, [], None)
    model = replace(wild, model=copy.copy(wild.model))
    for ends, want in ((None, set()), (7, {7}), ([7, 8], {7, 8})):
        model.model.generation_config = type("Config", (), {"eos_token_id": ends})
        assert Ending.of(model).ends == want
