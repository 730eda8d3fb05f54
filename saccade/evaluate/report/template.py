"""Fills the templates of pages; all share one style."""

from __future__ import annotations

from pathlib import Path
from string import Template


def part(name: str) -> str:
    """A file beside this one."""
    return Path(__file__).with_name(name).read_text(encoding="utf-8")


def fill(name: str, **parts: str) -> str:
    """A page from its template, with the style of all pages; the parts are HTML already."""
    return Template(part(name)).substitute(style=part("style.html").rstrip(), **parts)
