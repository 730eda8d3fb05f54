"""`saccade report`: what eval wrote becomes a page; mistakes are one clear line."""

import json

import pytest

ROWS = [
    {"method": "dense", "score": 1.0, "low": 0.72, "high": 1.0, "ttft_s": 4.0},
    {"method": "pooled", "score": 0.1, "low": 0.02, "high": 0.4, "ttft_s": 2.0},
]


@pytest.fixture
def folder(tmp_path, monkeypatch):
    # plots as PNG have a test of their own
    monkeypatch.setattr("saccade.evaluate.report.pictures.Picture.save_png", lambda picture, path: path.touch())
    made = tmp_path / "run"
    made.mkdir()
    rows = [{"task": "needle", "length": 4096, "n": 10, "tpot_s": None, "kv_bytes": 1000} | row for row in ROWS]
    (made / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = {"model": "reader", "methods": ["dense", "pooled"], "tasks": ["needle"], "lengths": [4096], "seed": 0}
    (made / "config.json").write_text(json.dumps(config))
    return made


def test_page_and_summary(saccade, folder):
    code, out, err = saccade("report", folder)
    assert code == 0 and err == ""
    page = folder / "report.html"
    assert page.read_text().count("<tr>") == 3
    assert f"The page: {page}" in out and str(folder / "report-plots") in out
    assert out.split("\n")[0] == "Gain" and "first token 2.0 times as fast" in out
    assert "pooled answers less than dense: 0.10 against 1.00" in out
    assert max(map(len, out.split("\n\n")[0].splitlines())) <= 100


def test_json(saccade, folder, tmp_path):
    code, out, _ = saccade("report", folder, "--json", "--out", tmp_path / "pages" / "a.html")
    found = json.loads(out)
    assert code == 0 and found["page"] == str(tmp_path / "pages" / "a.html")
    assert list(found["summary"]["run"]) == ["gain", "lose", "limits"] and found["warnings"] == []
    assert all(path.startswith(str(tmp_path / "pages" / "a-plots")) for path in found["pictures"])


def test_two_runs_of_different_models_are_warned_about(saccade, folder, tmp_path):
    other = tmp_path / "other"
    other.mkdir()
    for name in ("rows.jsonl", "config.json"):
        (other / name).write_text((folder / name).read_text().replace('"reader"', '"llama"'))
    code, out, err = saccade("report", folder, other)
    assert code == 0 and "warning: Different models are compared: run has model reader" in err
    assert "Side by side" in out and "intervals, unpaired" in out


def test_mistakes(saccade, folder, tmp_path):
    for argv, says in (
        ([tmp_path / "none"], "no such folder"),
        ([tmp_path], "has no config.json"),
        ([folder, tmp_path], "has no config.json"),
        ([], "required: DIR"),
    ):
        code, out, err = saccade("report", *argv)
        assert code == 2 and out == "" and says in err and err.count("\n") == 1
    (folder / "rows.jsonl").write_text("")
    assert "no rows yet" in saccade("report", folder)[2]
    (folder / "rows.jsonl").write_text("{}\n")
    assert "line 1 is not a row" in saccade("report", folder)[2]
    assert not (folder / "report.html").exists()


def test_what_eval_writes_is_what_report_reads(saccade, tiny, tmp_path):
    argv = [
        "eval",
        "--model",
        tiny,
        "--methods",
        "dense,streaming",
        "--no-controls",
        "--tasks",
        "needle,perplexity",
        "--lengths",
        "512",
    ]
    assert saccade(*argv, "--samples", 2, "--out", tmp_path / "e")[0] == 0
    code, out, err = saccade("report", tmp_path / "e")
    assert code == 0 and err == ""
    page = (tmp_path / "e" / "report.html").read_text()
    assert "streaming on needle: mean score by depth and length" in page and "McNemar, exact" in page
    assert "perplexity at 512 tokens, by position" in page
    # under what conditions: one line, though eval was asked twice, because the second time nothing was left to run
    assert saccade(*argv, "--samples", 2, "--out", tmp_path / "e")[0] == 0
    (held,) = map(json.loads, (tmp_path / "e" / "conditions.jsonl").read_text().splitlines())
    assert held["command"].startswith("saccade eval") and held["software"].split(",")[0] in page
