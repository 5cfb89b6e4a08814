from typing import Any

class constexpr(Any):
    value: Any
    def __init__(self, value: Any) -> None: ...

def __getattr__(name: str) -> Any: ...
