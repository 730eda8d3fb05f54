"""Rows as an evaluation writes them, and a page as a browser reads it: for tests of the report."""

from html.parser import HTMLParser

from saccade.evaluate.metrics import wilson


def row(method, score, n=10, ttft=2.0, tpot=0.02, kv=1_000_000, **more):
    low, high = wilson(score * n, n)
    found = {"method": method, "n": n, "score": score, "low": round(low, 4), "high": round(high, 4)}
    return found | {"density": 0.1, "mass": 0.9, "ttft_s": ttft, "tpot_s": tpot, "kv_bytes": kv} | more


def failed(method, error, **more):
    names = ("n", "score", "low", "high", "density", "mass", "ttft_s", "tpot_s", "kv_bytes")
    return {"method": method} | dict.fromkeys(names) | more | {"error": error}


def lines(method, scores, task="needle", length=4096, depths=None, prompt="p", ttft=2.0):
    return [
        {
            "method": method,
            "task": task,
            "length": length,
            "index": index,
            "prompt": f"{prompt}{index}",
            "depth": None if depths is None else depths[index],
            "score": score,
            "ttft_s": ttft * (1 + 0.01 * index),
            "tpot_s": 0.02,
        }
        for index, score in enumerate(scores)
    ]


class Nested(HTMLParser):
    """Tags must close in the order they were opened; `start` takes note of one."""

    void: tuple[str, ...] = ()

    def __init__(self):
        super().__init__()
        self.open = []

    def handle_starttag(self, tag, attrs):
        self.start(tag, attrs)
        if tag not in self.void:
            self.open.append(tag)

    def handle_startendtag(self, tag, attrs):
        self.start(tag, attrs)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


class Page(Nested):
    """The cells of each table, all text, all links."""

    void = ("meta", "input")

    def __init__(self, path):
        super().__init__()
        self.tags, self.tables, self.links, self.words = [], {}, [], []
        self.feed(path.read_text(encoding="utf-8"))
        assert self.open == []

    def start(self, tag, attrs):
        attrs = dict(attrs)
        self.tags.append(tag)
        self.links += [attrs[name] for name in ("src", "href", "srcset", "action") if name in attrs]
        assert not any(name.startswith("on") for name in attrs)
        if tag == "table":
            self.table = self.tables.setdefault(attrs["id"], [])
        elif tag == "tr":
            self.table.append([])
        elif tag in ("th", "td"):
            self.table[-1].append("")

    def handle_data(self, data):
        if self.open and self.open[-1] not in ("style", "script"):
            self.words.append(data)
        if "tbody" in self.open and ("td" in self.open or "th" in self.open):
            self.table[-1][-1] += ("|" if self.table[-1][-1] else "") + data

    @property
    def text(self):
        return " ".join(self.words)
