"""The writer of docs/results/reader.md on made-up rows: who is like dense, at what cost, from which folder."""

import importlib.util
import json
import shlex
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TASKS = ("needle", "kv")


@pytest.fixture(scope="module")
def writer():
    spec = importlib.util.spec_from_file_location("reader_table", ROOT / "bench" / "reader_table.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def row(method, task="needle", length=16384, score=1.0, **more):
    base = dict(n=50, low=0.9, high=1.0, density=1.0, mass=1.0, ttft_s=10.0, tpot_s=0.02, kv_bytes=1000)
    return {"method": method, "task": task, "length": length, "score": score, **base, **more}


def folder(path, rows, **about):
    path.mkdir()
    (path / "rows.jsonl").write_text("".join(json.dumps(r) + "\n" for r in rows))
    if about:
        (path / "conditions.jsonl").write_text(json.dumps(about) + "\n")
    return path


def write(writer, tmp_path, folders, times=()):
    out = tmp_path / "page.md"
    writer.main([*map(str, folders), *(["--times", *map(str, times)] if times else []), "--out", str(out)])
    return out.read_text()


def cells(text, method, length=16384):
    """The method's line in the table of a length, by column."""
    lines = text.split(f"## {length} tokens\n")[1].splitlines()
    head = next(line for line in lines if line.startswith("| method"))
    mine = next(line for line in lines if line.startswith(f"| `{method}` "))
    return dict(zip(*([c.strip() for c in line.strip("|").split("|")] for line in (head, mine)), strict=True))


def priced(text, start):
    line = next(line for line in text.splitlines() if line.startswith(f"- {start}"))
    return line.partition(": ")[2]


def everyone():
    rows = []
    for task, top in zip(TASKS, (1.0, 0.9), strict=True):
        rows += [
            row("dense", task, score=top, read_bytes=2000),
            # within two points to the last digit, and cheap
            row("minference", task, score=top - 0.02, density=0.2, estimate=0.01, mass_low=0.5, ttft_s=4.0),
            # fails in one task
            row("pooled", task, score=top if task == "needle" else 0.85, density=0.1),
            row("trishape", task, score=top, density=0.21),
            row("seer", task, score=top if task == "needle" else top - 0.03, density=0.05),
            row("hip", task, score=top, density=0.08, read_bytes=380),
            row("infinitehip", task, score=top, density=0.08, read_bytes=660),
            row("quest", task, score=top, density=0.5, read_bytes=200),
            # no bytes were measured: the density of decoding stands for them
            row("tidal", task, score=top, density=0.3),
            # reads much of what it holds little of: the dearer counts
            row("snapkv", task, score=top, kv_bytes=100, read_bytes=400),
            row("h2o", task, score=top, kv_bytes=150),
            row("minference+duo", task, score=top, density=0.05, kv_bytes=600),
            row("random", task, score=0.0, density=0.1),
        ]
    return rows


def test_summary_and_costs(writer, tmp_path):
    text = write(writer, tmp_path, [folder(tmp_path / "a", everyone())])
    assert priced(text, "prefill, 2 in every task") == "`hip` (0.08), `minference` (0.20)"
    assert priced(text, "decode or cache, 4 in every task") == (
        "`quest` (0.10), `h2o` (0.15), `hip` (0.19), `snapkv` (0.20)"
    )
    # 3 points below in one task, 1.5 in the mean of the two
    assert priced(text, "prefill, 1 more over the tasks together") == "`seer` (0.05)"
    assert "decode or cache, 0 more" not in text
    # hip at a third: its prefill is cheap, what its steps read is not
    assert priced(text, "like dense, but dearer, 4") == (
        "`trishape` (0.21), `tidal` (0.30), `infinitehip` (0.33), `minference+duo` (0.60)"
    )
    assert priced(text, "not like dense, 1") == "`pooled` (0.10)"
    got = cells(text, "minference")
    assert got["kind"] == "prefill" and (got["needle"], got["key-value"]) == ("0.98", "0.88")
    assert (got["density"], got["choosing"], got["5 %"], got["first token"]) == ("0.20", "0.01", "0.50", "2.50x")
    assert cells(text, "quest")["read"] == "10%" and cells(text, "tidal")["read"] == "-"
    assert cells(text, "minference+duo")["kind"] == "prefill, cache" and cells(text, "h2o")["held"] == "15%"


def test_reasons_only_of_those_that_fall_short(writer, tmp_path):
    rows = [row("dense"), row("h2o", score=0.5), row("snapkv"), row("pooled", score=0.5, length=16384)]
    text = write(writer, tmp_path, [folder(tmp_path / "a", rows)])
    part = text.split("## Why some fall short")[1].split("## ")[0]
    assert "- `h2o`, needle (16384): nobody asks for a fact" in part and "snapkv" not in part
    assert "- `pooled`, needle (16384): " in part


def test_a_task_that_a_method_was_not_given_is_not_passed(writer, tmp_path):
    rows = [row("dense"), row("dense", "kv"), row("minference", density=0.1)]
    text = write(writer, tmp_path, [folder(tmp_path / "a", rows)])
    assert priced(text, "not run in every task, 1") == "`minference` (0.10)"
    assert "not like dense" not in text and "prefill, 0 in every task: none" in text
    assert cells(text, "minference")["key-value"] == "-"


def test_the_later_folder_counts_and_times_compare_within_one(writer, tmp_path):
    slow = folder(
        tmp_path / "slow", [row("dense", ttft_s=100.0), row("minference", ttft_s=50.0, score=0.1)], machine="A"
    )
    fast = folder(tmp_path / "fast", [row("minference", ttft_s=1.0, score=0.7)], machine="B")
    text = write(writer, tmp_path, [slow, fast])
    # the second folder has no dense row: its times say nothing
    assert cells(text, "minference")["needle"] == "0.70" and cells(text, "minference")["first token"] == "-"
    text = write(writer, tmp_path, [slow, fast], times=[slow])
    assert cells(text, "minference")["needle"] == "0.70" and cells(text, "minference")["first token"] == "2.00x"
    assert "`slow`: A." in text and "`fast`: B." in text and "--times slow" in text
    text = write(writer, tmp_path, [slow], times=[fast])
    assert "first token |" not in text and "(dense: 1 kB" not in text


def test_errors_old_rows_and_budgets(writer, tmp_path):
    old = {"method": "streaming", "task": "needle", "length": 4096, "n": 6, "score": 0.0, "density": 0.1, "mass": None}
    rows = [old, row("dense", length=4096), row("hip", length=4096, score=None, error="InputError: no")]
    rows += [row(f"quest@{s}", length=4096, score=y) for s, y in ((0.05, 0.25), (0.1, 1.0))]
    path = folder(tmp_path / "a", rows)
    with (path / "rows.jsonl").open("a") as file:
        file.write('{"method": "cut o')
    text = write(writer, tmp_path, [path])
    assert "- `hip`, needle, 4096: InputError: no" in text
    assert cells(text, "streaming", 4096)["mass"] == "-" and "5 %" not in cells(text, "dense", 4096)
    assert "| `quest` | 4096 | 0.25 | 1.00 |" in text and "quest@" not in text.split("## Budgets")[0]


def test_only_some_tasks_and_lengths(writer, tmp_path):
    rows = [
        row(m, t, n, score=1.0 if t == "needle" else 0.1)
        for m in ("dense", "quest")
        for t in TASKS
        for n in (4096, 16384)
    ]
    out = tmp_path / "page.md"
    writer.main([str(folder(tmp_path / "a", rows)), "--out", str(out), "--tasks", "needle", "--lengths", "16384"])
    text = out.read_text()
    assert "**16384 tokens.**" in text and "**4096 tokens.**" not in text and "key-value |" not in text
    assert "(needle)" in text and "--tasks needle --lengths 16384" in text
    absent = next(line for line in text.splitlines() if line.startswith("Not run here: "))
    assert "`minference`" in absent and "`quest`" not in absent


def test_the_command_of_a_page_writes_it_again(writer, tmp_path):
    out, run = tmp_path / "page.md", folder(tmp_path / "a", [row("dense"), row("quest")])
    writer.main([str(run), "--out", str(out), "--title", "A reader's page"])
    first = out.read_text()
    said = shlex.split(first.rsplit("`", 2)[1])
    assert first.startswith("# A reader's page\n") and said[:2] == ["python", "bench/reader_table.py"]
    # paths outside the repository are shown by their names
    writer.main([str(run), "--out", str(out), *said[said.index("--title") :]])
    assert out.read_text() == first


def test_the_committed_run(writer, tmp_path):
    out = tmp_path / "page.md"
    writer.main(["--out", str(out)])
    text = out.read_text()
    assert cells(text, "dense", 4096)["needle"] == "1.00" and cells(text, "random", 4096)["kind"] == "control"
    assert "—" not in text and "!" not in text


@pytest.mark.parametrize(("count", "judged"), [(1, False), (9, False), (10, True)])
def test_a_handful_of_answers_is_no_verdict(writer, tmp_path, count, judged):
    rows = [row("dense", n=count), row("minference", n=count, score=0.5, density=0.1)]
    text = write(writer, tmp_path, [folder(tmp_path / "run", rows)])
    assert ("## In short" in text) == ("Why some fall short" in text) == judged
    assert ("too few to say who is like dense" in text) != judged
    assert cells(text, "minference")["first token"] == "1.00x"
