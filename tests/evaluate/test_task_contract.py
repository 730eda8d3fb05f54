"""What holds for every task of prompts and answers: budget, score of the answer, determinism, wording, errors."""

import json
import re
import sys
from dataclasses import replace

import pytest

from saccade.core.errors import FileError, InputError
from saccade.evaluate.tasks import RULER, TASKS, load_task
from saccade.evaluate.tasks.base import aligned, contained, first_number, pack, passage, say
from saccade.reader.books import HELD_OUT, held_out

READINGS = ("perplexity", "copy-perplexity", "multi-turn", "multi-request")
PLAIN = [name for name in TASKS if name not in READINGS]


def file_of(name):
    return sys.modules[type(load_task(name)).__module__].__file__.removesuffix(".py") + ".json"


@pytest.mark.parametrize("name", [*PLAIN, *RULER])
def test_the_budget_is_exact_and_the_answer_is_right(name, tokenizer):
    task = load_task(name)
    for length in (2048, 2501):
        for index in range(3):
            sample = task.sample(tokenizer, length, index)
            assert len(sample.ids) + sample.max_new_tokens == length
            assert sample.ids[: len(tokenizer("")["input_ids"])] == tokenizer("")["input_ids"]
            assert tokenizer.decode(sample.ids).endswith(sample.question)
            # what was expected is worth everything, and can be said in the tokens that are left for it
            assert task.score(f" {sample.answer}\n", sample) == 1.0
            assert len(tokenizer(sample.answer)["input_ids"]) <= sample.max_new_tokens
            assert task.score("", sample) == task.score(" no\n", sample) == 0.0


@pytest.mark.parametrize("name", TASKS)
def test_samples_depend_on_their_key_only(name, bpe):
    task = load_task(name)
    one = task.sample(bpe, 1500, 3, seed=7)
    assert one == task.sample(bpe, 1500, 3, seed=7)
    for other in (task.sample(bpe, 1500, 3, seed=8), task.sample(bpe, 1500, 9, seed=7)):
        assert one.ids != other.ids


@pytest.mark.parametrize("name", [name for name in TASKS if name not in ("perplexity", "copy-perplexity")])
def test_the_wording_can_be_replaced(name, bpe, tmp_path):
    task = load_task(name)
    with open(file_of(name), encoding="utf-8") as file:
        wording = json.load(file)
    mine = tmp_path / "mine.json"

    def marked(value):
        # the last text of each kind, so that whichever is drawn is another one
        if isinstance(value, str):
            return value + "%" if value.strip() else value
        return {k: marked(v) for k, v in value.items()} if isinstance(value, dict) else [marked(v) for v in value]

    mine.write_text(json.dumps(marked(wording)))
    changed = replace(task, wording=str(mine)).sample(bpe, 1500, 0)
    assert changed.question.endswith("%") or name == "mqar"
    assert "%" in bpe.decode(changed.ids) and "%" not in bpe.decode(task.sample(bpe, 1500, 0).ids)
    lacking = dict(list(wording.items())[1:])
    mine.write_text(json.dumps(lacking))
    with pytest.raises(FileError, match=f"needs the keys {next(iter(wording))}"):
        replace(task, wording=str(mine)).sample(bpe, 1500, 0)
    mine.write_text("{")
    with pytest.raises(FileError, match="not readable as JSON"):
        replace(task, wording=str(mine)).sample(bpe, 1500, 0)


@pytest.mark.parametrize("name", [name for name in TASKS if name != "perplexity"])
def test_too_short_is_said(name, bpe):
    with pytest.raises(InputError, match=r"longer|different|twice"):
        load_task(name).sample(bpe, 30, 0)


def test_rulers_thirteen():
    assert len(RULER) == 13
    assert {task for task, _ in RULER.values()} <= set(TASKS)
    with pytest.raises(InputError, match="did you mean 'ruler-vt'"):
        load_task("ruler-vtt")


@pytest.mark.parametrize(("target", "most"), [(200, 1000), (201, 1000), (300, 1000), (300, 12)])
def test_pack_holds_as_many_units_as_fit(target, most, tokenizer):
    tried = []

    def compose(size):
        tried.append(size)
        return "one more line, " * size + "end"

    ids, size = pack(tokenizer, target, compose, 1, most, head="Start\n")
    assert len(ids) == target
    head, tail = tokenizer("Start\n")["input_ids"], tokenizer("\n" + compose(size))["input_ids"]
    tail = tail[len(tokenizer("")["input_ids"]) :]
    assert ids[: len(head)] == head and ids[len(ids) - len(tail) :] == tail
    longer = tokenizer("\n" + compose(size + 1))["input_ids"][len(tokenizer("")["input_ids"]) :]
    assert size == most or len(head) + len(longer) > target
    # what stands between them is a book's
    between = tokenizer.decode(ids[len(head) : len(ids) - len(tail)]).strip()
    assert between in held_out(HELD_OUT[0])
    assert len(tried) < 20
    with pytest.raises(InputError, match=r"no text of 8 tokens .* the shortest has") as found:
        pack(tokenizer, 8, compose, 1, most, head="Start\n")
    # what it says is missing is what is missing
    more = int(re.search(r"make the length about (\d+) tokens longer", str(found.value)).group(1))
    assert len(pack(tokenizer, 8 + more, compose, 1, most, head="Start\n")[0]) == 8 + more
    with pytest.raises(InputError):
        pack(tokenizer, 7 + more, compose, 1, most, head="Start\n")


def test_passages_are_whole(tokenizer, tmp_path):
    for place in (0.0, 0.5, 1.0):
        ids = passage(tokenizer, 500, place)
        assert len(ids) == 500
        assert tokenizer.decode(ids).strip() in held_out(HELD_OUT[0])
    mine = tmp_path / "mine.txt"
    mine.write_text("alpha beta " * 60)
    assert tokenizer.decode(passage(tokenizer, 40, file=str(mine))).strip().startswith("alpha")
    with pytest.raises(InputError, match="not 5000"):
        passage(tokenizer, 5000, file=str(mine))
    with pytest.raises(FileError, match="cannot be read"):
        passage(tokenizer, 5, file=str(tmp_path / "none.txt"))


def test_scores_by_hand():
    assert contained(" 12, 34 and 56", ["34", "99", "12", "5"]) == 0.75
    assert aligned("a b x d e\nf", "a b c d") == 0.75
    assert aligned("", "a") == aligned("\na", "a") == 0.0
    assert [first_number(text) for text in ("no", "is 007.", "x-3, 4", "4.5.6")] == ["", "007", "-3", "4.5"]
    with pytest.raises(InputError, match="fields may be key"):
        say("{key} {valeu}", key=1)
    with pytest.raises(InputError, match="fields may be key"):
        say("{key} {0}", key=1)
