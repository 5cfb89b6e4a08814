from typing import Any

cuda: Any
