"""Names that others chose, made harmless where they are shown: in a terminal, in a card's Markdown."""

from __future__ import annotations

import re
import unicodedata

__all__ = ["code", "markdown", "printable", "quoted"]

# Controls, line breaks and lone surrogates; what turns the direction of writing could show one name as another.
_CATEGORIES = ("Cc", "Zl", "Zp", "Cs")
_DIRECTION = "\u200e\u200f\u202a\u202b\u202c\u202d\u202e\u2066\u2067\u2068\u2069"
_MARKUP = re.compile(r"([\\`*{}\[\]()#+!|~$]|(?<!\w)_|_(?!\w))")  # an underscore within a word is none


def printable(text: object) -> str:
    r"""A text in one line, with control characters written out, so that it cannot steer a terminal.

    Example:
        >>> printable("rose\x1b[2J")
        'rose\\x1b[2J'
    """
    return "".join(_spelled(char) if _is_control(char) else char for char in str(text))


def markdown(text: object) -> str:
    r"""A text that Markdown and HTML show as it is, in one line.

    Example:
        >>> markdown("<b>a*</b>")
        '&lt;b&gt;a\\*&lt;/b&gt;'
    """
    shown = printable(text).replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return _MARKUP.sub(r"\\\1", shown)


def code(text: object) -> str:
    """A text for between the backticks of Markdown, in one line, which it cannot end.

    Example:
        >>> code("a`<b>`")
        "a'<b>'"
    """
    return printable(text).replace("`", "'")


def quoted(text: object) -> str:
    r"""A text for between the double quotes of a Python string in a block of code.

    Example:
        >>> quoted('a"; import os')
        'a\"; import os'
    """
    return printable(text).replace("\\", "\\\\").replace('"', '\\"').replace("`", "\N{APOSTROPHE}")


def _is_control(char: str) -> bool:
    return unicodedata.category(char) in _CATEGORIES or char in _DIRECTION


def _spelled(char: str) -> str:
    return char.encode("unicode_escape").decode()
