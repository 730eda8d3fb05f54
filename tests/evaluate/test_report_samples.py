"""The file of single samples: written by the runner, read again, whatever a crash left."""

import gzip
import json

import pytest

from saccade.core.errors import FileError
from saccade.evaluate import samples
from saccade.evaluate.run import Ask, run


def test_the_runner_writes_what_rows_are_means_of(tiny, tmp_path):
    ask = Ask("tiny", ("dense", "streaming"), ("needle",), (400,), samples=3)
    rows = run(tiny, ask, tmp_path)
    found = samples.read(tmp_path)
    assert list(found) == [("dense", "needle", 400), ("streaming", "needle", 400)]
    for row, lines in zip(rows, found.values(), strict=True):
        assert [line["index"] for line in lines] == [0, 1, 2]
        assert row["score"] == sum(line["score"] for line in lines) / 3
        assert sorted(line["ttft_s"] for line in lines)[1] == pytest.approx(row["ttft_s"], abs=1e-4)
        assert all(0 <= line["depth"] <= 1 for line in lines)
    dense, streaming = found.values()
    assert [line["prompt"] for line in dense] == [line["prompt"] for line in streaming]
    assert len({line["prompt"] for line in dense}) == 3


def line(**changes):
    return {"method": "m", "task": "t", "length": 8, "index": 0, "score": 0.0, "depth": None} | changes


def test_the_last_line_of_a_sample_counts_and_a_cut_one_does_not(tmp_path):
    samples.append(tmp_path, [line(score=0.0), line(index=1, score=0.5)])
    with (tmp_path / samples.FILE).open("a") as file:
        file.write('{"method": "m", "ta')
    samples.append(tmp_path, [line(score=1.0)])
    (lines,) = samples.read(tmp_path).values()
    assert [(x["index"], x["score"]) for x in lines] == [(0, 1.0), (1, 0.5)]


@pytest.mark.parametrize("bad", [{"score": "1"}, {"depth": 3}, {"length": None}, {"method": 1}])
def test_other_content_is_an_error(tmp_path, bad):
    (tmp_path / samples.FILE).write_text(json.dumps(line(**bad)) + "\n")
    with pytest.raises(FileError, match="line 1"):
        samples.read(tmp_path)


def test_no_file_no_samples(tmp_path):
    assert samples.read(tmp_path) == {}


def test_a_packed_file_reads_the_same(tmp_path):
    text = "".join(json.dumps(line(index=at)) + "\n" for at in range(3)).encode()
    (tmp_path / samples.FILE).write_bytes(text)
    plain = samples.read(tmp_path)
    (tmp_path / samples.FILE).unlink()
    packed = tmp_path / samples.PACKED
    packed.write_bytes(gzip.compress(text))
    assert samples.read(tmp_path) == plain and len(next(iter(plain.values()))) == 3
    packed.write_bytes(gzip.compress(text)[:-12])
    with pytest.raises(FileError, match="not readable as gzip"):
        samples.read(tmp_path)
