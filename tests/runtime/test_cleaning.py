from __future__ import annotations

import html
import re
import string

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from conceptmaster.runtime.cleaning import clean


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a ball", "a ball"),
        ("", ""),
        (" \n", ""),
        ("  a\tball \n\n rolls  left ", "a ball rolls left"),
        ("R&D", "R&D"),
        ("cat &amp; dog", "cat & dog"),
        ("1 &amp;lt; 2", "1 < 2"),
    ],
)
def test_text_is_cleaned(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a&nbsp;ball", "a ball"),
        ("3 &amp;amp;lt; 4 &EACUTE;", "3 < 4 É"),
        ("a\u3000ball", "a ball"),
        ("“Ünïcödé”，🎈", '"Ünïcödé",🎈'),
        ("schÃ¶n â\x80\x94 ﬁne, it’s\x1b[31m", "schön — fine, it's"),
    ],
)
def test_text_is_repaired(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned


@given(st.text(max_size=40) | st.text(string.printable, max_size=40) | st.text("&amplt;#34 ", max_size=40))
@settings(max_examples=300, deadline=None)
def test_text_is_cleaned_as_diffusers_does(text: str) -> None:
    """Its rule in its own order: ftfy, entities twice, strip, then white space."""
    ftfy = pytest.importorskip("ftfy")
    fixed = html.unescape(html.unescape(ftfy.fix_text(text))).strip()
    assert clean(text) == re.sub(r"\s+", " ", fixed).strip()
