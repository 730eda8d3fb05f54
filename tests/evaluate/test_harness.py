"""lm-evaluation-harness on an attached model: a local task of needles and one of choices, no network."""

import json

import pytest
import torch

from saccade.cli.main import main
from saccade.core.errors import FileError, InputError, PlanError, UnsupportedError
from saccade.core.plan import Plan
from saccade.evaluate import harness
from saccade.evaluate.harness import Ask, run, serving
from saccade.evaluate.model import load
from saccade.evaluate.tasks.needle import Needle
from saccade.hf.attach import attach

needed = pytest.mark.skipif(
    not harness.installed(), reason="lm-evaluation-harness is not installed: pip install 'saccade[lm-eval]'"
)
LENGTH, COUNT = 768, 3
NEEDLE = """
task: local_needle
output_type: generate_until
doc_to_text: "{{text}}"
doc_to_target: "{{answer}}"
generation_kwargs: {until: ["\\n"], max_gen_toks: 12, do_sample: false}
filter_list:
  - name: number
    filter:
      - {function: regex, regex_pattern: "([0-9]+)"}
      - {function: take_first}
metric_list:
  - {metric: exact_match, aggregation: mean, higher_is_better: true}
"""
CHOICE = """
task: local_choice
output_type: multiple_choice
doc_to_text: "{{text}}"
doc_to_choice: "{{choices}}"
doc_to_target: "{{label}}"
metric_list:
  - {metric: acc, aggregation: mean, higher_is_better: true}
"""
ROLLING = """
task: local_text
output_type: loglikelihood_rolling
doc_to_text: ""
doc_to_target: "{{text}}"
metric_list:
  - {metric: bits_per_byte, aggregation: bits_per_byte, higher_is_better: false}
"""


@pytest.fixture(scope="module")
def reader():
    return load("reader", device="cpu")


@pytest.fixture(scope="module")
def tasks(reader, tmp_path_factory):
    """A folder of three YAML tasks over one small file: a fact in a book, its code, and three wrong codes."""
    folder = tmp_path_factory.mktemp("tasks")
    samples = [Needle(depth=0.3).sample(reader.tokenizer, LENGTH, index) for index in range(COUNT)]
    with open(folder / "needles.json", "w", encoding="utf-8") as file:
        for at, sample in enumerate(samples):
            text = reader.tokenizer.decode(sample.ids, skip_special_tokens=True)
            choices = [samples[(at + i) % COUNT].answer for i in range(COUNT)]
            choices[0], choices[at] = choices[at], choices[0]
            row = {"text": text, "answer": sample.answer, "choices": choices, "label": at}
            file.write(json.dumps(row) + "\n")
    for name, body in (("needle", NEEDLE), ("choice", CHOICE), ("text", ROLLING)):
        data = f"dataset_kwargs: {{data_files: {{test: {folder / 'needles.json'}}}, cache_dir: {folder / 'cache'}}}\n"
        (folder / f"local_{name}.yaml").write_text(f"dataset_path: json\n{data}test_split: test\n{body}")
    return folder


def ask(folder, *names, **more):
    return Ask("reader", tuple(f"local_{name}" for name in names), lengths=(LENGTH,), include=str(folder), **more)


def values(rows, method):
    return {row["task"].removeprefix("local_"): row["value"] for row in rows if row["method"] == method}


@needed
def test_a_window_loses_the_needle_and_minference_keeps_it(reader, tasks):
    rows = run(reader, ask(tasks, "needle", "choice"), ["streaming", "minference"])
    assert values(rows, "dense") == values(rows, "minference") == {"needle": 1.0, "choice": 1.0}
    lost = values(rows, "streaming")
    assert lost["needle"] == 0.0 and lost["choice"] < 1.0
    assert all(row["dense"] == 1.0 and row["n"] == COUNT and row["higher"] for row in rows)


def told(lm, requests):
    """What a model of the harness says to (kind, arguments) pairs, in their order."""
    from lm_eval.api.instance import Instance

    found = {}
    for kind in dict.fromkeys(kind for kind, _ in requests):
        mine = [
            Instance(kind, {}, arguments, at, metadata=("task", at, 1))
            for at, (its, arguments) in enumerate(requests)
            if its == kind
        ]
        found[kind] = getattr(lm, kind)(mine, disable_tqdm=True)
    return found


TEXT = "the old house by the river was empty and nobody had seen the boat since the storm of that winter"
WORDS = TEXT.split()


def words(start, count):
    return " ".join(WORDS[(start + i * i) % len(WORDS)] for i in range(count))


UNTIL = {"until": ["\n", "zz"], "max_gen_toks": 6}
REQUESTS = [
    ("generate_until", (words(1, 90), UNTIL)),
    # a shorter one in the same batch: padded on the left
    ("generate_until", (words(5, 20), UNTIL)),
    ("generate_until", (words(2, 50), UNTIL | {"num_beams": 2})),
    ("loglikelihood", (words(3, 60), " " + words(9, 7))),
    # one token; a continuation again; the beginning of another one; no context
    ("loglikelihood", (words(3, 60), " the")),
    ("loglikelihood", (words(4, 30), " boat by the river")),
    ("loglikelihood", (words(3, 60), " boat by the river")),
    ("loglikelihood", (words(3, 60), " boat by the")),
    ("loglikelihood", ("", words(6, 12))),
    # more than the model takes
    ("loglikelihood", (words(7, 400), " " + words(8, 5))),
    ("loglikelihood_rolling", (words(0, 40),)),
    ("loglikelihood_rolling", (words(7, 300),)),
]


@needed
def test_dense_through_a_session_is_the_harness_s_own_class(tiny):
    with serving(tiny, None, batch=2, max_length=200) as lm:
        want = told(lm, REQUESTS)
        assert type(lm).__name__ == "HFLM"
    with serving(tiny, Plan.uniform(tiny.model), batch=2, max_length=200) as lm:
        found = told(lm, REQUESTS)
    assert found["generate_until"] == want["generate_until"] and len(set(want["generate_until"])) == 3
    for one, other in zip(found["loglikelihood"], want["loglikelihood"], strict=True):
        assert one == (pytest.approx(other[0], rel=1e-4), other[1])
    assert found["loglikelihood_rolling"] == pytest.approx(want["loglikelihood_rolling"], rel=1e-4)
    assert tiny.model.config._attn_implementation == "sdpa"


@needed
def test_likelihoods_under_a_window_are_those_of_its_mask(tiny):
    """A forward of stock transformers under the window's mask, context and continuation in one piece."""
    sink, recent = 3, 12
    window = ("streaming", {"sink": sink, "recent": recent})
    asked = [arguments for kind, arguments in REQUESTS if kind == "loglikelihood" and arguments[0]][:5]
    with serving(tiny, Plan.uniform(tiny.model, prefill=window, decode=window)) as lm:
        found = told(lm, [("loglikelihood", arguments) for arguments in asked])["loglikelihood"]
        pairs = [lm._encode_pair(*arguments) for arguments in asked]
    for (context, continuation), (value, greedy) in zip(pairs, found, strict=True):
        ids = torch.tensor([context + continuation])
        i, j = torch.arange(ids.shape[1])[:, None], torch.arange(ids.shape[1])
        seen = (j <= i) & ((j < sink) | (i - j < recent))
        bias = torch.zeros(seen.shape).masked_fill(~seen, float("-inf"))[None, None]
        with torch.no_grad():
            logits = tiny.model(ids, attention_mask=bias).logits[0, len(context) - 1 : -1]
        right = logits.log_softmax(-1)[range(len(continuation)), continuation].sum()
        assert value == pytest.approx(float(right), rel=1e-4)
        assert greedy == bool((logits.argmax(-1) == torch.tensor(continuation)).all())


@needed
def test_what_a_policy_drops_is_missed_in_the_continuation(tiny):
    asked = [("loglikelihood", (words(3, 90), " " + words(9, 7))), ("loglikelihood", (words(3, 90), " the"))]
    with serving(tiny, None) as lm:
        dense = told(lm, asked)["loglikelihood"]
    with serving(tiny, Plan.uniform(tiny.model, cache=("duo", {"sink": 1, "recent": 2}))) as lm:
        found = told(lm, asked)["loglikelihood"]
    # "duo" hides tokens in the prefill too; what matters is that the steps behind it are not dense
    assert abs(found[0][0] - dense[0][0]) > 1e-3
    with attach(tiny.model, Plan.uniform(tiny.model, cache=("duo", {"sink": 1, "recent": 2}))) as session:
        # the same text, generated without the harness
        ids = torch.tensor([tiny.tokenizer(words(1, 90))["input_ids"]])
        want = tiny.model.generate(ids, past_key_values=session.cache(), max_new_tokens=6, do_sample=False)
        want = tiny.tokenizer.decode(want[0, ids.shape[1] :], skip_special_tokens=True)
    with serving(tiny, session.plan, batch=2) as lm:
        asked_both = [("generate_until", (words(start, count), UNTIL)) for start, count in ((1, 90), (5, 20))]
        assert told(lm, asked_both)["generate_until"][0] == want.split("\n")[0].split("zz")[0]
    snap = Plan.uniform(tiny.model, cache=("snapkv", {"capacity": 40, "window": 8, "slack": 0}))
    with serving(tiny, snap) as lm:
        found = told(lm, asked)["loglikelihood"]
    # snapkv reads the prompt whole, so its first token is dense, and only that
    assert found[1][0] == pytest.approx(dense[1][0], rel=1e-5)
    assert abs(found[0][0] - dense[0][0]) > 1e-4


@needed
def test_an_evaluation_goes_on_where_it_stopped(reader, tasks, tmp_path, monkeypatch):
    real, ran = harness._evaluated, []

    def counted(loaded, plan, manager, asked, task):
        ran.append(task)
        return real(loaded, plan, manager, asked, task)

    monkeypatch.setattr(harness, "_evaluated", counted)
    plan = tmp_path / "plan.json"
    Plan.uniform(reader.model, prefill=("streaming", {"sink": 4, "recent": 60})).save(plan)
    one = ask(tasks, "text", limit=1)
    rows = run(reader, one, [str(plan)], tmp_path / "out")
    assert [row["metric"] for row in rows] == ["bits_per_byte"] * 2 and len(ran) == 2
    # a window that long text is read through costs bits; less is better, and the row says so
    assert rows[1]["value"] > rows[0]["value"] == rows[1]["dense"] and rows[0]["higher"] is False
    assert run(reader, one, [str(plan)], tmp_path / "out") == rows and len(ran) == 2
    # a line that was cut off is done again
    file = tmp_path / "out" / harness.ROWS
    file.write_text(file.read_text()[:-30])
    assert run(reader, one, [str(plan)], tmp_path / "out") == rows and len(ran) == 3
    # another plan under the same name is another method
    Plan.uniform(reader.model, prefill=("streaming", {"sink": 4, "recent": 90})).save(plan)
    assert run(reader, one, [str(plan)], tmp_path / "out")[1]["value"] != rows[1]["value"] and len(ran) == 4
    with pytest.raises(FileError, match="limit 1; ask for the same"):
        run(reader, ask(tasks, "text"), [], tmp_path / "out")


@needed
def test_the_command(tasks, tmp_path, capsys):
    argv = ["lm-eval", "--tasks", "local_needle", "--methods", "streaming", "--include-path", str(tasks)]
    argv += ["--lengths", str(LENGTH), "--limit", "1", "--out", str(tmp_path)]
    assert main(argv) == 0
    said = capsys.readouterr()
    lines = said.out.splitlines()
    assert lines[2].split()[:6] == ["dense", "local_needle", "exact_match", "number", "1", "1.0000"]
    assert lines[3].split()[0] == "streaming" and lines[3].split()[-2:] == ["1.0000", "-1.0000"]
    assert (tmp_path / "lm_eval.txt").read_text().splitlines() == lines[:4]
    assert "streaming on local_needle" in said.err
    assert main([*argv, "--json"]) == 0
    assert [row["value"] for row in json.loads(capsys.readouterr().out)["rows"]] == [1.0, 0.0]


@needed
def test_mistakes(reader, tasks, tmp_path):
    with pytest.raises(InputError, match="did you mean 'local_needle'"):
        harness._named(["local_nedle"], ["local_needle", "local_text"])
    with pytest.raises(FileError, match="no folder"):
        run(reader, Ask("reader", ("local_needle",), include=str(tmp_path / "none")), [])
    with pytest.raises(PlanError, match="did you mean 'streaming'"):
        run(reader, ask(tasks, "needle"), ["streming"])
    with (
        pytest.raises(UnsupportedError, match="whole number"),
        serving(reader, Plan.uniform(reader.model), batch="auto"),
    ):
        pass


def test_without_the_harness_one_line_says_what_to_install(reader, monkeypatch, capsys):
    monkeypatch.setattr(harness, "installed", lambda: False)
    with pytest.raises(UnsupportedError, match=r"pip install 'saccade\[lm-eval\]'"):
        run(reader, Ask("reader", ("ruler",)), [])
    assert main(["lm-eval", "--tasks", "ruler"]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1
