"""What a test says that the model does, in no wire's own words."""
from __future__ import annotations

from dataclasses import dataclass
from typing import Any

JSON = dict[str, Any]


@dataclass(frozen=True)
class Text:
    text: str


@dataclass(frozen=True)
class Reasoning:
    text: str
    encrypted: str = ""


@dataclass(frozen=True)
class Call:
    """A function call; `namespace` is where the client declared the tool, not how the provider sees it."""
    name: str
    arguments: JSON
    namespace: str = ""


@dataclass(frozen=True)
class Custom:
    """A freeform call (apply_patch)."""
    name: str
    input: str
    namespace: str = ""


Item = Text | Reasoning | Call | Custom


@dataclass(frozen=True)
class ResponsesAnswer:
    """One response. `end`: whole | drop (finished, no terminal event) | cut (in the middle) | length."""
    items: tuple[Item, ...]
    end: str = "whole"
    input_tokens: int = 120
    cached_tokens: int = 20
    output_tokens: int = 15

    @property
    def total_tokens(self) -> int:
        return self.input_tokens + self.output_tokens


def pieces(text: str, size: int = 7) -> list[str]:
    return [text[i:i + size] for i in range(0, len(text), size)]
