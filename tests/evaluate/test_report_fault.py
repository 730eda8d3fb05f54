"""A fault that leaves every shape right is a loss in the report: keys taken from the wrong key-value group."""

import pytest

from saccade.evaluate.model import load
from saccade.evaluate.report.report import write_report
from saccade.evaluate.run import Ask, run
from saccade.methods import apply

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def loaded():
    return load("reader", device="cpu")


def lost(loaded, folder):
    """What the page says is lost by minference, and its score beside dense attention's."""
    ask = Ask("reader", ("dense", "minference"), ("needle",), (2048,), samples=8, seed=11)
    rows = run(loaded, ask, folder)
    assert not any(row.get("error") for row in rows)
    said = write_report(folder / "report.html", [folder]).summaries[folder.name]
    scores = {row["method"]: row["score"] for row in rows}
    return [line for line in said.lose if line.startswith("minference")], scores["minference"], scores["dense"]


def test_the_wrong_key_value_group_is_shown_as_a_loss(loaded, tmp_path, monkeypatch):
    honest, score, dense = lost(loaded, tmp_path / "honest")
    assert dense >= 0.75 and score == dense
    assert not any("answers less than dense" in line for line in honest)

    def attend(q, k, v, *rest, **named):
        # query heads 0..3 of two groups read groups 0, 1, 0, 1 in place of 0, 0, 1, 1
        found = right(q[:, [0, 2, 1, 3]], k, v, *rest, **named)
        return found._replace(o=found.o[:, [0, 2, 1, 3]])

    right = apply.attend
    monkeypatch.setattr(apply, "attend", attend)
    faulty, score, again = lost(loaded, tmp_path / "faulty")
    assert again == dense and score <= dense - 0.5
    assert len(faulty) == 1 and "answers less than dense" in faulty[0] and "McNemar, exact, p = 0.0" in faulty[0]
