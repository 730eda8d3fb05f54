"""Numbers as people read them: percentages, seconds, bytes, signed differences."""

from __future__ import annotations

MINUS = "\N{MINUS SIGN}"


def percent(share: float | None) -> str:
    """A share as a percentage, with one decimal below ten.

    Example:
        >>> percent(0.0275), percent(1.0), percent(None)
        ('2.8%', '100%', '-')
    """
    return "-" if share is None else f"{share:.1%}" if share < 0.0995 else f"{share:.0%}"


def seconds(value: float | None) -> str:
    """Seconds from a second on, else milliseconds.

    Example:
        >>> seconds(31.2951), seconds(0.04734), seconds(0.00052)
        ('31.3 s', '47 ms', '0.52 ms')
    """
    if value is None:
        return "-"
    if value >= 1:
        return f"{value:.2f} s" if value < 10 else f"{value:.1f} s"
    return f"{1000 * value:.0f} ms" if value >= 0.01 else f"{1000 * value:.2g} ms"


def tick(value: float) -> str:
    """Seconds on an axis.

    Example:
        >>> tick(5.0), tick(0.05)
        ('5 s', '50 ms')
    """
    return f"{value:g} s" if value >= 1 else f"{1000 * value:g} ms"


def size(count: float | None) -> str:
    """Bytes.

    Example:
        >>> size(268_304_384), size(512)
        ('268 MB', '512 B')
    """
    if count is None:
        return "-"
    for unit, least in (("GB", 1e9), ("MB", 1e6), ("kB", 1e3)):
        if count >= least:
            return f"{count / least:.3g} {unit}"
    return f"{count:.0f} B"


def signed(value: float) -> str:
    """A difference with its sign, small ones with a digit more.

    Example:
        >>> signed(0.25), signed(0.0), signed(0.0123)
        ('+0.25', '0.00', '+0.012')
    """
    text = f"{abs(value):.3f}" if 0 < abs(value) < 0.0995 else f"{abs(value):.2f}"
    return text if float(text) == 0 else ("+" if value > 0 else MINUS) + text


def span(low: float | None, high: float | None) -> str:
    """An interval of a difference.

    Example:
        >>> span(-0.5, 0.25) == MINUS + "0.50 to +0.25"
        True
    """
    return "no interval" if low is None or high is None else f"{signed(low)} to {signed(high)}"


def tokens(length: int) -> str:
    """A length.

    Example:
        >>> tokens(32768)
        '32,768'
    """
    return f"{length:,}"


def chance(p: float) -> str:
    """A p-value.

    Example:
        >>> chance(0.03125), chance(0.00001)
        ('p = 0.031', 'p < 0.001')
    """
    return "p < 0.001" if p < 0.001 else f"p = {p:.3f}" if p < 0.0995 else f"p = {p:.2f}"


def several(names: list[str]) -> str:
    """Names in a sentence.

    Example:
        >>> several(["a"]), several(["a", "b", "c"])
        ('a', 'a, b and c')
    """
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"
