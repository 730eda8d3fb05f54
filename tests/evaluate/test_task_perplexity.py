import json
import math

import pytest
import torch

from saccade.core.errors import InputError
from saccade.core.plan import Plan
from saccade.evaluate.generate import serving
from saccade.evaluate.measure import losses
from saccade.evaluate.run import FIELDS, Ask, run
from saccade.evaluate.tasks.base import Outcome
from saccade.evaluate.tasks.perplexity import Perplexity, positions, spread, windows
from saccade.reader.books import HELD_OUT, held_out


def plain(tiny, ids):
    """The loss of each token but the first, one forward pass of stock transformers, in float64."""
    with torch.inference_mode():
        logits = tiny.model(torch.tensor([ids])).logits[0].double()
    return -logits[:-1].log_softmax(-1)[torch.arange(len(ids) - 1), torch.tensor(ids[1:])]


def size(tiny, ids):
    return len(tiny.tokenizer.decode(ids).encode())


@pytest.mark.parametrize("plan", [None, "dense"])
@pytest.mark.parametrize(("scored", "steps"), [(99, 0), (99, 7), (20, 20), (20, 1), (1, 1), (1, 0)])
def test_losses_are_those_of_one_pass(tiny, plan, scored, steps):
    ids = torch.randint(3, 4096, (100,), generator=torch.Generator().manual_seed(scored + steps)).tolist()
    if steps == 99:
        steps = 98
    with serving(tiny, plan and Plan.uniform(tiny.model)) as cache:
        nats, took = losses(tiny, ids, cache(100), scored=scored, steps=steps)
    assert nats.numpy() == pytest.approx(plain(tiny, ids)[-scored:].numpy(), rel=1e-4)
    assert took.ttft_s > 0 and (took.tpot_s is None) == (steps == 0)
    # keys and values of all tokens but the last: layers x (k, v) x kv heads x width x float32
    assert took.kv_bytes >= 4 * 2 * 2 * 8 * 4 * 99


def test_losses_refuse_what_does_not_fit(tiny):
    for scored, steps in ((10, 0), (5, 6), (9, 9), (3, -1)):
        with pytest.raises(InputError, match="do not fit"):
            losses(tiny, list(range(10)), None, scored=scored, steps=steps)


@pytest.mark.parametrize("total", [2, 10, 64, 99, 100])
@pytest.mark.parametrize("window", [2, 7, 64, 200])
@pytest.mark.parametrize("stride", [1, 3, 64])
def test_every_token_is_scored_once(total, window, stride):
    if stride > window:
        return
    seen = []
    for start, stop, scored in windows(total, window, stride):
        assert 0 <= start < stop <= total and stop - start <= window and 0 < scored < stop - start + 1
        seen += range(stop - scored, stop)
    assert seen == list(range(1, total))


@pytest.mark.parametrize(("window", "stride"), [(None, None), (200, 50), (100, None)])
def test_bits_by_brute_force(tiny, window, stride):
    task = Perplexity(window=window, stride=stride, steps=5)
    sample = task.sample(tiny.tokenizer, 331, 0)
    with serving(tiny, None) as cache:
        found = task.run(tiny, cache, sample)
    nats = 0.0
    bins = {}
    for start, stop, scored in windows(331, window or 331, stride or window or 331):
        part = plain(tiny, sample.ids[start:stop])
        nats += float(part[-scored:].sum())
        for at in range(stop - start - scored, stop - start):
            low = max([0] + [64 * 2**i for i in range(9) if 64 * 2**i <= at])
            bins.setdefault(low, []).append((float(part[at - 1]), sample.ids[start + at]))
    assert found.score == pytest.approx(nats / math.log(2) / size(tiny, sample.ids[1:]), rel=1e-4)
    rows = dict(zip(sorted(bins), found.parts["by_position"], strict=True))
    for low, losses_here in bins.items():
        bits = sum(loss for loss, _ in losses_here) / math.log(2) / size(tiny, [token for _, token in losses_here])
        # bytes of pieces of a text may differ where a letter is cut
        assert rows[low][2] == pytest.approx(bits, rel=0.02)
        assert rows[low][:2] == [max(low, 1), max(2 * low, 64)]
    last = plain(tiny, sample.ids[-(window or 331) :])[-5:]
    assert found.parts["decode"] == pytest.approx(
        float(last.sum()) / math.log(2) / size(tiny, sample.ids[-5:]), rel=1e-4
    )


def test_stretches_by_hand():
    assert list(positions(1, 300)) == [(1, 64), (64, 128), (128, 256), (256, 300)]
    assert list(positions(100, 101)) == [(100, 101)]


def test_samples_are_books_of_the_exact_length(tokenizer, tmp_path):
    special = len(tokenizer("")["input_ids"])
    for length in (100, 1001):
        for index, book in enumerate(HELD_OUT):
            sample = Perplexity().sample(tokenizer, length, index)
            assert len(sample.ids) == length and sample.max_new_tokens == 0
            assert tokenizer.decode(sample.ids[special:]).strip() in held_out(book)
    mine = tmp_path / "mine.txt"
    mine.write_text("alpha beta " * 60)
    ids = Perplexity(text=str(mine)).sample(tokenizer, 50, 0).ids[special:]
    assert set(tokenizer.decode(ids).split()[1:-1]) == {"alpha", "beta"}


def test_the_interval_by_hand():
    # standard error of 1, 2, 3: sqrt(1 / 3)
    assert spread([1.0, 2.0, 3.0]) == {"n": 3, "score": 2.0, "low": 0.8684, "high": 3.1316}
    assert spread([1.5]) == {"n": 1, "score": 1.5, "low": None, "high": None}
    parts = {"prefill": 1.0, "decode": None, "by_position": [[1, 64, 2.0]]}
    row = Perplexity().summary([Outcome(1.0, None, parts), Outcome(2.0, None, parts | {"prefill": 4.0})])
    assert row["prefill"] == 2.5 and row["decode"] is None and row["by_position"] == [[1, 64, 2.0]]
    assert "lower is better" in row["unit"]


def test_rows_keep_their_fields(tiny, tmp_path):
    ask = Ask(
        "tiny", ("dense", "streaming", "snapkv"), ("perplexity", "copy-perplexity", "multi-turn"), (700,), samples=2
    )
    rows = run(tiny, ask, tmp_path)
    assert not [row["error"] for row in rows if "error" in row]
    assert all(tuple(row)[: len(FIELDS)] == FIELDS for row in rows)
    assert [row["n"] for row in rows] == [2] * 9
    kept = {(row["method"], row["task"]): row for row in rows}
    for task in ("perplexity", "copy-perplexity"):
        assert kept["dense", task]["unit"] == "bits per byte, lower is better"
        assert kept["streaming", task]["density"] < 1
        # a cache policy prunes after the prompt: what is read in one pass is as dense, later tokens are not
        assert kept["snapkv", task]["prefill"] == pytest.approx(kept["dense", task]["prefill"], abs=1e-3)
        assert kept["snapkv", task]["decode"] != kept["dense", task]["decode"]
        assert kept["snapkv", task]["kv_bytes"] < kept["dense", task]["kv_bytes"]
    assert len(kept["dense", "multi-turn"]["turns"]) == 3
    assert rows == run(tiny, ask, tmp_path)
    assert json.loads((tmp_path / "rows.jsonl").read_text().splitlines()[0])["by_position"][0][:2] == [1, 64]


def test_errors():
    for options in ({"window": 1}, {"stride": 3}, {"window": 4, "stride": 5}, {"steps": -1}, {"book": "emma"}):
        with pytest.raises(InputError, match="Perplexity"):
            Perplexity(**options)
