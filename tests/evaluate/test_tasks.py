"""Tasks: budgets exact to the token, answers where they should be, nothing left to chance, errors that say why."""

import json
import subprocess
import sys

import pytest

from saccade.core.errors import InputError
from saccade.evaluate.tasks import TASKS, load_task
from saccade.evaluate.tasks.base import Sample, exact, fit, source
from saccade.evaluate.tasks.kv import KeyValue
from saccade.evaluate.tasks.needle import Needle, compose, plant, sentence_end
from saccade.reader.books import HELD_OUT, held_out
from saccade.reader.words import words

CELLS = [
    Needle(),
    Needle(distractors=5, value="pair"),
    Needle(value="hex", depth=1.0),
    Needle(planted=False),
    KeyValue(),
    KeyValue(key="numbered", value="hex"),
    KeyValue(key="hex", value="pair", max_new_tokens=5),
]


@pytest.mark.parametrize("length", [512, 1000, 2048])
@pytest.mark.parametrize("task", CELLS, ids=repr)
def test_budgets_and_answers(task, length, tokenizer):
    for index in range(4):
        sample = task.sample(tokenizer, length, index)
        assert len(sample.ids) + sample.max_new_tokens == length
        assert sample.max_new_tokens == task.max_new_tokens
        text = tokenizer.decode(sample.ids)
        assert text.endswith(sample.question)
        assert text.count(sample.answer) == int(getattr(task, "planted", True))


@pytest.mark.parametrize("depth", [0.0, 0.3, 0.6, 0.9])
def test_needles_stand_at_their_depth(depth, bpe):
    for index in range(4):
        sample = Needle(depth=depth).sample(bpe, 4096, index)
        text = bpe.decode(sample.ids)
        # after the next sentence end, in a body whose first few sentences are kept free
        assert depth - 0.01 <= text.index(sample.answer) / len(text) <= depth + 0.12


def test_depths_and_books_take_turns(bpe):
    samples = [Needle().sample(bpe, 512, index) for index in range(10)]
    assert [s.depth for s in samples] == [0.0, 0.0, 0.2, 0.2, 0.4, 0.4, 0.6, 0.6, 0.8, 0.8]
    for book in HELD_OUT:
        text = bpe.decode(Needle(book=book).sample(bpe, 512, 0).ids)
        assert text[10:150] in held_out(book)


def test_key_value_questions_ask_for_the_pair_of_the_answer(bpe):
    for index in range(6):
        sample = KeyValue().sample(bpe, 700, index)
        lines = bpe.decode(sample.ids).split("\n")
        row = next(line for line in lines if sample.answer in line)
        key = next(word for word in sample.question.split() if "-" in word).rstrip("?.")
        assert row.removeprefix("- ").startswith(key)


@pytest.mark.parametrize("task", CELLS, ids=repr)
def test_same_key_same_sample(task, bpe):
    one = task.sample(bpe, 600, 3, seed=7)
    assert one == task.sample(bpe, 600, 3, seed=7)
    assert one != task.sample(bpe, 600, 3, seed=8)
    assert one != task.sample(bpe, 600, 4, seed=7)


def test_samples_do_not_depend_on_the_process():
    code = "from saccade.evaluate.tasks.base import source; print(source('needle', 512, 0, 1).random())"
    done = subprocess.run([sys.executable, "-W", "error", "-c", code], capture_output=True, text=True, check=True)
    assert float(done.stdout) == source("needle", 512, 0, 1).random()


def test_keys_are_test_words(bpe):
    known = words("test")
    for task in (Needle(), KeyValue()):
        for index in range(5):
            sample = task.sample(bpe, 512, index)
            key = next(word for word in sample.question.split() if "-" in word).rstrip("?.")
            adjective, noun = key.split("-", 1)
            assert adjective in known.adjectives
            assert noun in known.nouns


@pytest.mark.parametrize(
    ("said", "score"),
    [(" 123", 1.0), ("123\nWhat", 1.0), (" 123 \n", 1.0), ("1234", 0.0), ("12", 0.0), ("", 0.0), ("\n123", 0.0)],
)
def test_only_the_whole_answer_counts(said, score):
    assert exact(said, "123") == score
    for name in ("needle", "kv"):
        assert load_task(name).score(said, Sample([], "123", 5)) == score


def test_plant_by_hand():
    text = "One day. Two days. Three days."
    assert plant(text, ["A.", "B."], [0.9, 0.1], margin=0) == "One day. B. Two days. A. Three days."
    assert plant(text, ["A."], [1.0], margin=0) == "One day. Two days. Three days. A."
    assert sentence_end(text, 0) == 8
    assert sentence_end(text, 25) == 18


def test_fit_cuts_at_the_end_asked_for(letters):
    def grow(size):
        return "0123456789" * 3 + "x" * size

    assert bytes(fit(letters, 35, grow, size=9)) == grow(9)[-35:].encode()
    assert bytes(fit(letters, 35, grow, size=9, front=False)) == grow(9)[:35].encode()
    with pytest.raises(InputError, match="no text of 10 tokens"):
        fit(letters, 10, grow, size=9)


@pytest.mark.parametrize(("length", "facts"), [(3000, 4), (6000, 10)])
def test_documents_hold_their_facts(length, facts, tokenizer):
    document = compose(tokenizer, length, facts)
    assert len(document.ids) == length
    assert document == compose(tokenizer, length, facts)
    assert document != compose(tokenizer, length, facts, seed=1)
    assert len(set(document.questions)) == len(document.facts) == len(document.answers) == facts
    for fact, answer, place in zip(document.facts, document.answers, document.places, strict=True):
        assert answer in fact
        assert document.text.count(answer) == 1
        assert document.text.index(fact) / len(document.text) == pytest.approx(place, abs=0.25)
    found = [document.text.index(fact) for fact in document.facts]
    assert found == sorted(found)


def test_a_prompt_starts_with_the_tokens_of_its_document(bpe):
    document = compose(bpe, 2048)
    ids = bpe(document.text + "\n\n" + document.questions[0])["input_ids"]
    assert ids[: len(document.ids)] == document.ids


def test_errors_say_what_is_known():
    with pytest.raises(InputError, match="did you mean 'needle'"):
        load_task("needel")
    with pytest.raises(InputError, match="known are needle, kv"):
        load_task("babilong")
    with pytest.raises(InputError, match="unknown book 'emma'"):
        Needle(book="emma")
    with pytest.raises(InputError, match="depth=2"):
        Needle(depth=2)
    for cls in (Needle, KeyValue):
        with pytest.raises(InputError, match="unknown value 'word'"):
            cls(value="word")
    with pytest.raises(InputError, match="unknown key 'word'"):
        KeyValue(key="word")


@pytest.mark.parametrize("task", [Needle(), Needle(distractors=30), KeyValue()], ids=repr)
def test_too_short_is_said(task, bpe):
    with pytest.raises(InputError, match="ask for a longer one"):
        task.sample(bpe, 40, 0)


def test_wordings_take_their_key_and_value():
    for name in ("needle", "kv"):
        load_task(name)
        file = sys.modules[TASKS[name].split(":")[0]].__file__.removesuffix(".py") + ".json"
        with open(file, encoding="utf-8") as text:
            wording = json.load(text)
        for question in wording["questions"]:
            assert question.count("{key}") == 1
            assert "{value}" not in question
        for kind in wording.keys() - {"questions"}:
            assert all(said.count("{key}") == said.count("{value}") == 1 for said in wording[kind])
