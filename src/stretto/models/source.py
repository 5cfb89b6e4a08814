"""Where a model comes from: a local directory, the hub, or the package itself. Ends in a checked directory.

Imports no torch: the HTTP process uses it too. Knows nothing of what the files hold.
"""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[str, int, int], None]
BUNDLED = "desk"
WANTED = ["*.json", "*.safetensors", "*.jinja", "tokenizer*", "*.model", "vocab.txt", "merges.txt"]
