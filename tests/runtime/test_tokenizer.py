from __future__ import annotations

import pytest

from conceptmaster.runtime.tokenizer import clean


@pytest.mark.parametrize(
    ("text", "cleaned"),
    [
        ("a ball", "a ball"),
        ("", ""),
        (" \n", ""),
        ("  a\tball \n\n rolls\u3000left ", "a ball rolls left"),
        ("cat &amp; dog", "cat & dog"),
        ("1 &amp;lt; 2", "1 < 2"),
        ("a&nbsp;ball", "a ball"),
        ("R&D", "R&D"),
        ("“Ünïcödé”，🎈", "“Ünïcödé”，🎈"),
    ],
)
def test_text_is_cleaned(text: str, cleaned: str) -> None:
    assert clean(text) == cleaned
