"""`saccade cab`: the table, its JSON, times, and what is refused before anything runs."""

import json

import pytest

from saccade.evaluate.cab import FUTURE, PATTERNS, card


def test_cards_in_a_table_and_as_json(saccade):
    code, out, err = saccade("cab", "--methods", "streaming,pooled,s2")
    assert code == 0 and err.count("patterns") == 3
    lines = {line.split()[0]: line.split()[1:] for line in out.splitlines()[2:5]}
    assert lines["pooled"][-1] == "no" and lines["s2"].count("no") == 3 and "no" not in lines["streaming"]
    assert f"pooled, causal-cross: {FUTURE}" in out
    # one line for all patterns that one reason closes
    assert sum(line.startswith("s2, ") for line in out.splitlines()) == 1
    code, out, err = saccade("cab", "--methods", "streaming,pooled", "--json")
    found = json.loads(out)
    assert code == 0 and found["patterns"] == list(PATTERNS) and found["rows"] == [card("streaming"), card("pooled")]
    assert float(lines["streaming"][1]) == pytest.approx(found["rows"][0]["index"]["causal-self"], abs=5e-3)


def test_small_budgets_do_not_hide_support():
    assert set(card("random")["support"].values()) == {"yes"}


def test_times_give_an_efficiency_length(saccade):
    argv = ["cab", "--methods", "streaming", "--times", "--lengths", "64,128,256", "--runs", 4]
    code, out, _ = saccade(*argv)
    assert code == 0 and "pays from" in out.splitlines()[0]
    row = json.loads(saccade(*argv, "--json")[1])["rows"][0]["efficiency"]
    assert row["lengths"] == [64, 128, 256] and len(row["dense_s"]) == len(row["method_s"]) == 3


@pytest.mark.parametrize(
    ("argv", "said"),
    [
        (["--methods", ","], "nothing to look at"),
        (["--methods", "duo"], "does not read whole sequences"),
        (["--methods", "quest"], "does not read whole sequences"),
        (["--methods", "seer"], "trained weights"),
        (["--methods", "streamng"], "did you mean 'streaming'"),
        (["--times", "--lengths", "64,128"], "three --lengths"),
        (["--device", "abacus"], "unknown device"),
    ],
)
def test_mistakes(saccade, argv, said):
    code, out, err = saccade("cab", *argv)
    assert (code, out) == (2, "") and said in err and len(err.splitlines()) == 1
