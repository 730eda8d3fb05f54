"""RefreshKV's claim: keys chosen once answer the first question, keys that are chosen anew the next ones too."""

import pytest
import torch

from saccade.core.pattern import Full
from saccade.core.plan import ModelShape, Plan
from saccade.evaluate.tasks.multi_turn import MultiTurn
from saccade.hf.attach import attach
from saccade.reader import load

BUDGET, QUESTIONS = 64, 3  # keys of about 2000 between full steps


@torch.inference_mode()
def talk(reader, tokenizer, args, sample):
    """Which of the questions are answered, all but the first asked token by token; full steps per layer."""
    shape, full = ModelShape.of(reader), 0

    def watch(seen):
        nonlocal full
        full += seen.call.shape.N == 1 and isinstance(seen.pattern, Full)

    right = []
    with attach(reader, Plan.uniform(shape, decode=("recycled", {"budget": BUDGET, "kernel": 15} | args))) as session:
        session.watch, cache = watch, session.cache()
        for turn, answer in enumerate(sample.answers):
            asked = [sample.ids] if turn == 0 else [[token] for token in sample.turns[turn - 1]]
            said = []
            while len(said) < 12 and "\n" not in tokenizer.decode(said):
                for step in asked:
                    logits = reader(torch.tensor([step]), past_key_values=cache, logits_to_keep=1).logits
                said.append(int(logits[0, -1].argmax()))
                asked = [[said[-1]]]
            right.append(tokenizer.decode(said).split("\n")[0].strip() == answer)
    return right, full / shape.layers


@pytest.mark.slow
def test_later_questions_need_keys_that_are_chosen_anew():
    reader, tokenizer = load()
    samples = [MultiTurn(QUESTIONS, distractors=2).sample(tokenizer, 2048, i, 8) for i in range(4)]
    first, later, full = {}, {}, {}
    for name, args in (
        ("never", {"threshold": -1.0}),
        ("regular", {"stride": 5}),
        ("called", {"stride": 2, "threshold": 0.7}),
    ):
        found = [talk(reader, tokenizer, args, sample) for sample in samples]
        first[name] = sum(right[0] for right, _ in found)
        later[name] = sum(sum(right[1:]) for right, _ in found)
        full[name] = sum(count for _, count in found) / len(found)
    assert min(first.values()) >= 3
    assert abs(full["regular"] - full["called"]) < 2.5 < full["regular"]
    # measured with six samples, of 12 later questions: 0 never anew, 7 by the clock, 9 by the query, 13 full steps each
    assert later["never"] <= 1
    assert later["regular"] >= later["never"] + 2
    assert later["called"] >= max(later["never"] + 3, later["regular"] - 1)
