"""Texts and numbers as a page and a picture show them."""

import html
import re
from datetime import UTC, datetime

# Characters that no page may hold: control characters, and halves of surrogate pairs.
UNWRITABLE = re.compile("[\x00-\x08\x0b-\x1f\x7f-\x9f\ud800-\udfff\ufffe\uffff]")
LONG_NUMBER = re.compile(r"(?<![\w.])[+-]?\d+\.\d{5,}(?![\w.])")


def plain(text: object) -> str:
    """Return the text with a replacement mark for what cannot be written."""
    return UNWRITABLE.sub("\ufffd", str(text))


def escape(text: object) -> str:
    """Return the text as HTML may hold it, in quotes as well as between tags."""
    return html.escape(plain(text))


def clip(text: str, chars: int) -> str:
    """Return the text, or its beginning and three dots."""
    return text if len(text) <= chars else text[: max(0, chars - 3)].rstrip() + "..."


def plural(number: int, word: str) -> str:
    return f"{number} {word}" if number == 1 else f"{number} {word}s"


def round_numbers(text: str, digits: int) -> str:
    """Return a sentence with its numbers of five decimals and more rounded to `digits` of them."""

    def rounded(found: re.Match[str]) -> str:
        sign = "+" if found[0].startswith("+") else ""
        return f"{float(found[0]):{sign}.{digits}f}"

    return LONG_NUMBER.sub(rounded, text)


def with_error(value: float, error: float | None, digits: int, sign: str = "") -> str:
    """Return a number with its error, where it has one. sign: "+" to write it always."""
    text = f"{value:{sign}.{digits}f}"
    if not float(text):
        text = text.lstrip("+-")  # no sign of what is rounded to nothing
    return f"{text} \u00b1 {error:.{digits}f}" if error else text


def duration(seconds: float) -> str:
    """Return a time in the two largest units that it has."""
    whole = round(seconds)
    if whole < 60:
        return f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02} min"


def clock(seconds: float | None, offset: float, form: str = "%b %d %H:%M") -> str:
    """Return a moment as a clock shows it that is `offset` seconds ahead of UTC; "" without one."""
    if seconds is None:
        return ""
    try:
        return format(datetime.fromtimestamp(seconds + offset, UTC), form)
    except (ValueError, OverflowError, OSError):
        return ""
