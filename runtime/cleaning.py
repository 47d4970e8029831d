"""Text as every model reads it, before its own tokenizer. The only file that imports ftfy."""

from __future__ import annotations

import html
import re

PLAIN, ENTITY = re.compile(r"[ -~\t\n\r]*"), re.compile(r"&#?\w+;")


def clean(text: str) -> str:
    """`text` as diffusers' WanPipeline gives it to its tokenizer: broken encodings repaired and quotes made
    straight (ftfy), HTML entities read, twice, since some are escaped twice, any white space as one space.
    """
    read = _read_entities(text)
    if not PLAIN.fullmatch(text + read) or ENTITY.search(read):  # else ftfy has nothing to do
        import ftfy  # here, because it takes 50 ms to load, and most texts do not need it

        read = _read_entities(ftfy.fix_text(text))
    return " ".join(read.split())


def _read_entities(text: str) -> str:
    return html.unescape(html.unescape(text))
