"""Names of others, shown without harm."""

import pytest

from etf_zoo.text import markdown, printable

NASTY = "rose\x1b[31m\n  99.00 %  fake\r\x07\x9b2J\u2028\u202eabc"


def test_nothing_steers_the_terminal():
    shown = printable(NASTY)
    assert len(shown.splitlines()) == 1
    assert not any(char in shown for char in "\x1b\x07\x9b\r\n\u2028\u202e")
    assert shown.startswith(r"rose\x1b[31m\n  99.00 %  fake\r\x07\x9b2J\u2028\u202eabc")


@pytest.mark.parametrize("name", ["Gänseblümchen", "菊花", "گل‌سرخ", "🌹", "a b (c)"])  # the Persian one has a joiner
def test_names_of_all_languages_stay(name):
    assert printable(name) == name


def test_neither_markup_nor_markdown():
    shown = markdown("<script>x</script> | **b** [a](http://x) ![i](u) `c` # $x$ &amp;")
    assert "<" not in shown
    assert ">" not in shown
    for mark in "|*[]()`#!$":
        assert shown.count(mark) == shown.count("\\" + mark) > 0
    assert "&amp;amp;" in shown
    assert markdown("a\n# heading") == r"a\\n\# heading"
