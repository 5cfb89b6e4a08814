"""The special tokens that mark tool calls, in every format. Without a parser, a detokenizer hides them."""

from __future__ import annotations

from stretto.text.tools.harmony_parser import HARMONY_TOKENS
from stretto.text.tools.parser import MARKERS
from stretto.text.tools.tag_formats import TAGS

VISIBLE = MARKERS | TAGS | HARMONY_TOKENS
