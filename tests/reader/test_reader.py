"""The reader: data that keeps test words and books apart, a trainer that resumes, an export that is Llama, weights that
answer.
"""

import json
import re
import shutil
import socket
import subprocess
import sys
from pathlib import Path
from random import Random

import numpy as np
import pytest
import torch
from torch.nn import functional as F

import saccade
from saccade import reader
from saccade.core.errors import FileError, InputError
from saccade.evaluate.tasks.needle import Needle
from saccade.nn import Attention
from saccade.reader import books
from saccade.reader.words import KEYS, VALUES, words
from saccade.recipe import export, score
from saccade.recipe.books import tokenise
from saccade.recipe.mixture import SHARES, TAGS, WEIGHTS, Mixture
from saccade.recipe.model import Shape

SHARED = Path(saccade.__file__).parents[2] / "shared" / "data" / "books"
SMALL = Shape(width=32, layers=2, heads=2, kv_heads=1, head_dim=16, mlp_width=48)


@pytest.fixture(autouse=True)
def no_network(monkeypatch):
    def refuse(*_, **__):
        raise AssertionError("the reader wanted the network")

    monkeypatch.setattr(socket.socket, "connect", refuse)
    monkeypatch.setattr(socket, "getaddrinfo", refuse)


@pytest.fixture(scope="module")
def raw():
    pytest.importorskip("tokenizers")
    from saccade.recipe.tokenizer import raw

    return raw()


@pytest.fixture(scope="module")
def ids(raw):
    """Two 'books' of 90,000 characters."""
    text = books.held_out("voyage-of-the-beagle")
    bos = raw.token_to_id("<bos>")
    parts = [raw.encode(text[i : i + 90_000], add_special_tokens=False).ids for i in (100_000, 300_000)]
    return np.array([bos, *parts[0], bos, *parts[1]], dtype=np.uint16)


@pytest.fixture(scope="module")
def mixture(raw, ids):
    return Mixture(ids, raw)


@pytest.fixture(scope="module")
def loaded():
    pytest.importorskip("transformers")
    return reader.load()


# words and books


def test_test_words_are_no_training_words():
    train, test = words("train"), words("test")
    for side in ("adjectives", "nouns"):
        seen, kept = set(getattr(train, side)), set(getattr(test, side))
        assert not seen & kept
        assert 0.15 < len(kept) / len(seen | kept) < 0.25
    with pytest.raises(InputError, match="unknown split 'dev'"):
        words("dev")


def test_training_draws_no_test_words(mixture):
    known, rng = words("test"), Random(0)
    names = [key for _ in range(200) for key, _, _ in mixture.draw(rng, 20, ["{key} {value}"], "")]
    pairs = [name.split("-") for name in names if "-" in name]
    assert len(pairs) > 1000
    assert not {adjective for adjective, _ in pairs} & set(known.adjectives)
    assert not {noun for _, noun in pairs} & set(known.nouns)


def test_names_look_as_documented():
    rng, source = Random(0), words("train")
    patterns = {"pair": r"[a-z-]+-[a-z]+", "numbered": r"[a-z-]+ \d{1,3}", "number": r"\d{7}", "hex": r"[0-9a-f]{8}"}
    for kind in {*KEYS, *VALUES}:
        names = source.distinct(rng, kind, 50)
        assert len(set(names)) == 50
        assert all(re.fullmatch(patterns[kind], name) for name in names)
    alike = source.similar(rng, 20)
    assert len(alike.adjectives) < 10
    assert len(set(alike.distinct(rng, "pair", 20))) == 20
    with pytest.raises(InputError, match="unknown kind"):
        source.draw(rng, "colour")
    with pytest.raises(InputError, match="cannot be drawn"):
        source.similar(rng, 2).distinct(rng, "pair", 1000)


def test_clean_joins_lines_and_keeps_paragraphs():
    assert books.clean("\ufeffOne\r\ntwo _three_\n  four.\n\n \n\nFive.\n") == "One two three four.\n\nFive."


def test_held_out_books_are_never_trained_on(tmp_path):
    with pytest.raises(FileError, match=r"no \.txt books"):
        list(books.training(tmp_path))
    for name in (*books.HELD_OUT, "emma"):
        (tmp_path / f"{name}.txt").write_text("It was\nlate.")
    assert list(books.training(tmp_path)) == [("emma", "It was late.")]
    with pytest.raises(InputError, match="unknown book 'emma'"):
        books.held_out("emma")


def test_tokens_of_a_book_are_those_of_its_text(raw):
    text = "One day.\n\nIt rained; 42 ducks.\n\nEnd."
    row = tokenise([("a", text), ("b", "Next.")], raw)
    assert raw.decode(row.tolist(), skip_special_tokens=False) == f"<bos>{text}<bos>Next."
    assert row[1:-3].tolist()[: len(raw.encode(text).ids) - 1] == raw.encode(text).ids[1:]


@pytest.mark.skipif(not SHARED.is_dir(), reason=f"the training books are not in {SHARED}")
def test_bundled_books_are_the_cleaned_files():
    files = dict(books.training(SHARED))
    assert len(files) == 42
    for name in books.HELD_OUT:
        text = books.clean((SHARED / f"{name}.txt").read_text(encoding="utf-8"))
        assert books.held_out(name) == text
        # no training book holds a stretch of a held-out one
        stretch = text[len(text) // 2 :][:200]
        assert not any(stretch in other for other in files.values())


# the mixture


@pytest.mark.parametrize("kind", SHARES)
@pytest.mark.parametrize("length", [64, 129, 1025, 4097])
def test_documents_have_their_length(mixture, kind, length):
    for seed in range(5):
        row, tags = mixture.document(Random(seed), length, kind)
        assert len(row) == len(tags) == length
        assert row[0] == mixture.bos
        assert row.min() >= 0 and row.max() < mixture.vocab
        assert tags.max() < len(TAGS)


@pytest.mark.parametrize("kind", ["facts", "pairs", "chains"])
def test_rows_have_the_tokens_of_their_text(mixture, raw, kind):
    for seed in range(10):
        row, _ = mixture.document(Random(seed), 700, kind)
        assert raw.encode(raw.decode(row.tolist())).ids == row.tolist()


def test_answers_and_their_newline_count_and_questions_do_not(mixture, raw):
    tag = TAGS.index("needle")
    told = 0
    for seed in range(20):
        row, tags = mixture.document(Random(seed), 1024, "facts")
        for start in np.flatnonzero((tags == tag) & (np.roll(tags, 1) != tag)):
            stop = start + np.argmin(np.append(tags[start:], 0) == tag)
            answer = raw.decode(row[start:stop].tolist())
            assert answer.endswith("\n")
            assert answer.startswith(" ")
            # stated before it is asked for
            assert answer.strip() in raw.decode(row[:start].tolist())
            assert tags[start - 1] == TAGS.index("ignored")
            told += 1
    assert told > 30
    assert WEIGHTS[tag] > WEIGHTS[TAGS.index("text")] > WEIGHTS[TAGS.index("filler")] > WEIGHTS[0] == 0


def test_chains_end_where_the_answer_says(mixture, raw):
    row, tags = mixture.document(Random(3), 2048, "chains")
    text = raw.decode(row.tolist())
    answers = raw.decode(row[tags == TAGS.index("chain")].tolist()).split()
    assert answers
    assert all(answer in text[: text.rindex("\n\n")] for answer in answers)


def test_copies_come_after_their_original(mixture):
    row, tags = mixture.document(Random(1), 1024, "copies")
    copied = np.flatnonzero(tags == TAGS.index("copy"))
    assert len(copied)
    start = copied[0]
    stop = start + np.argmin(np.append(tags[start:], 0) == TAGS.index("copy"))
    span = row[start - 3 : stop]
    assert any(np.array_equal(row[i : i + len(span)], span) for i in range(1, start - len(span)))


def test_shares_and_weights_of_the_mixture(mixture):
    assert sum(SHARES.values()) == pytest.approx(1)
    rng, count = Random(0), np.zeros(len(TAGS))
    for _ in range(150):
        _, tags = mixture.row(rng, 1025)
        count += np.bincount(tags, minlength=len(TAGS))
    part = dict(zip(TAGS, count * WEIGHTS / (count @ WEIGHTS), strict=True))
    assert part["ignored"] == 0
    assert part["needle"] > 0.1
    assert 0.05 < part["text"] + part["filler"] < 0.7
    assert all(part[name] > 0.005 for name in TAGS[1:])


def test_the_same_seed_draws_the_same_row(mixture):
    one, two, other = (mixture.row(Random(seed), 1025) for seed in (5, 5, 6))
    assert np.array_equal(one[0], two[0])
    assert np.array_equal(one[1], two[1])
    assert not np.array_equal(one[0], other[0])


def test_spans_stay_within_a_book(mixture):
    rng = Random(0)
    for _ in range(200):
        start = mixture.span(rng, 9000)
        assert mixture.bos not in mixture.books[start : start + 9000]
    with pytest.raises(InputError, match="no book holds"):
        mixture.span(rng, 10**6)


# the trainer and the export


def test_training_resumes_after_a_stage(ids, tmp_path, capsys):
    pytest.importorskip("transformers")
    from saccade.recipe import train

    stages = (train.Stage(128, 4, 0.5), train.Stage(256, 2, 0.5))
    options = {"shape": SMALL, "workers": 0, "device": "cpu", "compiled": False}
    first = train.train(ids, tmp_path, minutes=0.01, stages=stages[:1], **options)
    before = {name: weight.clone() for name, weight in first.state_dict().items()}
    second = train.train(ids, tmp_path, minutes=0.02, stages=stages, **options)
    log = json.loads((tmp_path / "log.json").read_text())
    shown = capsys.readouterr().out
    assert "going on after stage 1 of 2" in shown
    assert shown.count("stage 1: 128") == 1
    assert log[-1]["step"] > log[0]["step"] > 0
    assert [row["tokens"] for row in log] == sorted(row["tokens"] for row in log)
    assert any(not torch.equal(before[name], weight) for name, weight in second.state_dict().items())
    assert 3 < log[-1]["held_out_256"] < 4
    third = train.train(ids, tmp_path, minutes=0.02, stages=stages, **options)
    assert all(torch.equal(weight, third.state_dict()[name]) for name, weight in second.state_dict().items())
    assert export.difference(tmp_path / "export", 64) < 0.05


def test_steps_learn(mixture):
    from saccade.recipe.train import Stage, Stream, optimizers, token_losses

    torch.manual_seed(0)
    model, weights = SMALL.build(), torch.tensor(WEIGHTS)
    optims, stream = optimizers(model), iter(Stream(mixture, Stage(128, 4, 1.0), seed=0))
    assert sum(len(group["params"]) for optim in optims for group in optim.param_groups) == len([*model.parameters()])
    found = []
    for _ in range(60):
        rows, tags = (torch.from_numpy(array) for array in next(stream))
        loss, losses = token_losses(model, rows, tags, weights)
        assert losses.shape == (4 * 128,)
        loss.backward()
        for optim in optims:
            optim.step()
            optim.zero_grad()
        found.append(loss.item())
    # a model that knows nothing needs log(4096) = 8.3
    assert found[0] == pytest.approx(8.3, abs=0.2)
    assert sum(found[-10:]) / 10 < 6.5


def test_the_rate_warms_up_stays_and_falls():
    from saccade.recipe.train import WARM_UP, rate

    assert rate(0.0, 0) == pytest.approx(1 / WARM_UP)
    assert rate(0.3, WARM_UP) == rate(0.49, 10**6) == 1.0
    assert rate(0.75, 10**6) == pytest.approx(0.515)
    assert [rate(progress, 10**6) for progress in (1.0, 2.0)] == pytest.approx([0.03, 0.03])


def test_losses_by_hand():
    from saccade.recipe.train import by_tag

    losses, tags = torch.tensor([1.0, 2.0, 4.0]), torch.tensor([[0, 1, 3, 3]], dtype=torch.uint8)
    assert by_tag(losses, tags) == {"text": 1.0, "needle": 3.0}


def test_the_export_is_llama(tmp_path):
    pytest.importorskip("transformers")
    torch.manual_seed(1)
    model = SMALL.build()
    export.write(model, SMALL, tmp_path, torch.float32)
    assert export.shape_of(tmp_path) == SMALL
    assert export.difference(tmp_path, 64) < 1e-5
    back = export.read(tmp_path)
    assert all(torch.equal(a, b) for a, b in zip(model.state_dict().values(), back.state_dict().values(), strict=True))


def test_bundled_weights_are_those_of_our_own_decoder():
    pytest.importorskip("transformers")
    assert export.shape_of(reader.path()) == Shape()
    assert export.difference(reader.path(), 128) < 1e-3
    assert (reader.path() / "model.safetensors").stat().st_size < 16 * 2**20


# the acceptance test's own tools


def test_the_window_control_reads_window_and_sinks():
    window, dense = score.WindowAttention(16, 2).double(), Attention(16, 2).double()
    dense.load_state_dict(window.state_dict())
    place = torch.arange(1300)
    seen = (place <= place[:, None]) & ((place > place[:, None] - score.WINDOW) | (place < score.SINK))
    dense.attend = lambda q, k, v: F.scaled_dot_product_attention(q, k, v, attn_mask=seen)
    x = torch.randn(1, 1300, 16, dtype=torch.float64)
    with torch.no_grad():
        torch.testing.assert_close(window(x).y, dense(x).y)
        state = window(x[:, :1290]).state
        torch.testing.assert_close(window(x[:, 1290:], state).y, dense(x).y[:, 1290:])


# the bundled weights


def test_answers_lookups_and_cannot_guess(loaded):
    _, tokenizer = loaded
    model = export.read(reader.path())
    planted = [Needle(distractors=3).sample(tokenizer, 1024, index, seed=11) for index in (0, 3, 6, 9)]
    absent = [Needle(planted=False, distractors=3).sample(tokenizer, 1024, index, seed=11) for index in (0, 3)]
    said = score.answers(model, planted + absent, tokenizer, "cpu")
    right = [Needle().score(text, sample) for text, sample in zip(said, planted + absent, strict=True)]
    assert right == [1.0] * 4 + [0.0] * 2
    found = score.summary(Needle(), planted + absent, said)
    assert found["exact"] == pytest.approx(4 / 6, abs=1e-4)
    assert [row["said"] for row in found["wrong"]] == [text[:40] for text in said[4:]]


def test_transformers_generates_the_answer(loaded):
    model, tokenizer = loaded
    sample = Needle(depth=0.4).sample(tokenizer, 1024, 0, seed=12)
    ids = torch.tensor([sample.ids])
    out = model.generate(ids, attention_mask=torch.ones_like(ids), max_new_tokens=8, do_sample=False)
    assert tokenizer.decode(out[0, ids.shape[1] :]) == f" {sample.answer}"


def test_load_is_silent_and_puts_the_bar_back(capfd):
    logging = pytest.importorskip("transformers").utils.logging
    before = logging.is_progress_bar_enabled()
    model, tokenizer = reader.load(torch.bfloat16)
    assert (model.dtype, model.training, len(tokenizer)) == (torch.bfloat16, False, 4096)
    assert logging.is_progress_bar_enabled() == before
    assert capfd.readouterr() == ("", "")


def test_importing_the_reader_imports_no_transformers():
    code = "import saccade.reader, sys; assert not {'transformers', 'tokenizers', 'torch'} & set(sys.modules)"
    subprocess.run([sys.executable, "-W", "error", "-c", code], check=True)


@pytest.mark.parametrize("name", reader.FILES)
def test_a_missing_file_is_said(name, tmp_path, monkeypatch):
    for file in set(reader.FILES) - {name}:
        shutil.copyfile(reader.path() / file, tmp_path / file)
    monkeypatch.setattr(reader, "path", lambda: tmp_path)
    with pytest.raises(FileError, match=f"{name} is not in .*reinstall"):
        reader.load()


@pytest.mark.parametrize("name", reader.FILES)
@pytest.mark.parametrize("size", [0, 9, 0.5])
def test_a_damaged_file_is_said(name, size, tmp_path, monkeypatch):
    pytest.importorskip("transformers")
    for file in reader.FILES:
        shutil.copyfile(reader.path() / file, tmp_path / file)
    content = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(content[: size if isinstance(size, int) else int(size * len(content))])
    monkeypatch.setattr(reader, "path", lambda: tmp_path)
    with pytest.raises(FileError, match="reinstall"):
        reader.load()
