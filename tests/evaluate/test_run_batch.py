"""Prompts read together against prompts read alone."""

from dataclasses import replace
from types import SimpleNamespace

import pytest
import torch

from saccade.core.errors import InputError
from saccade.evaluate import cells
from saccade.evaluate.cells import TOKENS, batch_of
from saccade.evaluate.generate import serving, together
from saccade.evaluate.measure import answers, answers_together, in_batches, losses, losses_together
from saccade.evaluate.presets import resolve
from saccade.evaluate.run import Ask, run
from saccade.evaluate.tasks.perplexity import Perplexity

METHODS = ("dense", "streaming", "random", "oracle", "minference", "trishape", "xattention", "quest", "tidal", "snapkv")
METHODS += ("h2o", "hip", "recycled", "longheads", "flexprefill", "hyper", "trishape+snapkv")


def prompts_of(sizes, seed=0):
    source = torch.Generator().manual_seed(seed)
    return [torch.randint(3, 4096, (size,), generator=source).tolist() for size in sizes]


@pytest.mark.parametrize("method", METHODS)
def test_texts_are_those_of_prompts_alone(tiny, method):
    # two lengths, mixed; more of one than fit in a batch
    prompts = prompts_of([300, 417, 300, 300, 417])
    plan = resolve(method, tiny, 417)
    alone = answers(tiny, plan, prompts, max_new_tokens=9, stop="")
    found, most = answers_together(tiny, plan, prompts, 2, max_new_tokens=9, stop="")
    assert most == 2
    assert [one.text for one in found] == [one.text for one in alone]
    assert len({one.text for one in found}) > 1
    assert [one.kv_bytes for one in found] == [one.kv_bytes for one in alone]
    assert all(one.ttft_s is None and one.tpot_s is None for one in found)


def test_a_row_that_has_ended_is_not_heard_again(tiny):
    prompts = prompts_of([60] * 4)
    with serving(tiny, None) as cache:
        free = together(tiny, prompts, cache(), max_new_tokens=12, stop="")
        # a letter that some texts hold early, some late
        stop = max("aeinorst", key=lambda letter: len({one.text.find(letter) for one in free}))
        found = together(tiny, prompts, cache(), max_new_tokens=12, stop=stop)
    assert [one.text for one in found] == [one.text.split(stop)[0].strip() for one in free]
    assert len({one.tokens for one in found}) == 1


def test_each_row_ends_at_its_own_end_of_sequence(tiny):
    prompts, said = prompts_of([60] * 4), []
    with serving(tiny, None) as cache:
        for ids in prompts:
            step, past, tokens = torch.tensor([ids]), cache(), []
            for _ in range(12):
                step = tiny.model(step, past_key_values=past).logits[:, -1:].argmax(-1)
                tokens.append(int(step))
            said.append(tokens)
        # a token that comes, but not in every row at the same place
        end = max(range(4096), key=lambda token: len({[*row, token].index(token) for row in said}))
        until = [[*row, end].index(end) for row in said]
        tiny.model.generation_config.eos_token_id = end
        try:
            found = together(tiny, prompts, cache(), max_new_tokens=12, stop="")
        finally:
            tiny.model.generation_config.eos_token_id = 1
    assert len(set(until)) > 1
    want = [tiny.tokenizer.decode(row[:stop]).strip() for row, stop in zip(said, until, strict=True)]
    assert [one.text for one in found] == want


def test_losses_are_those_of_texts_alone(tiny):
    texts = prompts_of([90] * 3)
    for method in ("dense", "streaming", "snapkv"):
        with serving(tiny, resolve(method, tiny, 90)) as cache:
            alone = torch.stack([losses(tiny, ids, cache(90), scored=50, steps=7)[0] for ids in texts])
            found, took = losses_together(tiny, texts, cache(90), scored=50, steps=7)
        torch.testing.assert_close(found, alone, rtol=1e-5, atol=1e-5)
        assert took.ttft_s is None and took.tpot_s is None


def test_windows_of_texts_are_read_together(tiny):
    task = Perplexity(window=120, stride=50, steps=5)
    samples = [task.sample(tiny.tokenizer, 300, index) for index in range(3)]
    with serving(tiny, resolve("streaming", tiny, 300)) as cache:
        alone = [task.run(tiny, cache, sample) for sample in samples]
        found = task.run_together(tiny, cache, samples)
    assert [one.score for one in found] == pytest.approx([one.score for one in alone], rel=1e-5)
    assert task.summary(found) == task.summary(alone)
    assert len({one.score for one in found}) == 3


def test_lengths_may_not_be_mixed_in_one_pass(tiny):
    with serving(tiny, None) as cache:
        with pytest.raises(InputError, match=r"\[5, 6\]"):
            together(tiny, [[3] * 5, [3] * 6], cache())
        with pytest.raises(InputError, match="2 lengths"):
            losses_together(tiny, [[3] * 5, [3] * 6], cache(), scored=2)


def test_rows_of_a_batch_are_those_of_single_prompts(tiny, tmp_path):
    ask = Ask("tiny", ("snapkv",), ("copy-perplexity", "multi-turn", "kv"), (512,), 3)
    alone, batched = run(tiny, ask, tmp_path / "1"), run(tiny, ask, tmp_path / "2", batch=2)
    for one, other in zip(alone, batched, strict=True):
        assert one["batch"] == 1 and other["batch"] == 2
        assert other["score"] == pytest.approx(one["score"], abs=2e-4)
        # a few samples are read alone once more, for the clock
        assert other["ttft_s"] > 0 and other["tpot_s"] > 0 and other["kv_bytes"] == one["kv_bytes"]
        same = ("method", "task", "n", "density", "mass", "kl_answer", "ceiling")
        assert [other[key] for key in same] == [one[key] for key in same]


def test_no_more_are_read_together_than_there_are(tiny, tmp_path):
    ask = Ask("tiny", ("streaming",), ("kv",), (400,), samples=2)
    assert run(tiny, ask, tmp_path, batch=64)[0]["batch"] == 2


def test_half_as_many_where_memory_runs_out():
    tried = []

    def read(at):
        tried.append(list(at))
        if len(at) > 3:
            raise torch.OutOfMemoryError("no room")
        return [10 * i for i in at]

    assert in_batches([1] * 9 + [2] * 2, 8, read) == ([10 * i for i in range(11)], 2)
    assert tried[:3] == [list(range(8)), list(range(4)), [0, 1]]
    with pytest.raises(torch.OutOfMemoryError):
        in_batches([1, 1], 2, lambda at: read([0] * 4))


def test_the_batch_of_a_gpu_goes_by_its_size(tiny, monkeypatch):
    assert batch_of(tiny, 4096) == 1
    gpu = SimpleNamespace(device=torch.device("cuda"), model=tiny.model)
    # 4 layers of width 32 in float32: 4 * 32 * (2 * 4 + 12) bytes a token, a sixteenth of three quarters of the memory
    memory = 4 * 32 * 20 * 6000 * 16 * 4 // 3
    monkeypatch.setattr(torch.cuda, "get_device_properties", lambda _: SimpleNamespace(total_memory=memory))
    assert [batch_of(gpu, 1000), batch_of(gpu, 3000), batch_of(gpu, 9000)] == [6, 2, 1]
    memory *= 10**6
    assert batch_of(gpu, 1000) == TOKENS // 1000


def test_the_batch_that_was_used_is_told(tiny, tmp_path, monkeypatch):
    real = cells.answers_together

    def small(loaded, plan, prompts, batch, **kwargs):
        return real(loaded, plan, prompts, 2, **kwargs)

    monkeypatch.setattr(cells, "answers_together", small)
    ask = Ask("tiny", ("streaming",), ("kv",), (400,), samples=3)
    assert run(tiny, replace(ask), tmp_path, batch=3)[0]["batch"] == 2
