from typing import Any

def __getattr__(name: str) -> Any: ...  # pointers and numbers; clone_fast/cuda knows what they mean
