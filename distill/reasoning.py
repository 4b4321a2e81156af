"""The reasoning part of a completion: what the rewards and the filters that look at reasoning both judge."""

from __future__ import annotations


def reasoning_of(text: str) -> str:
    """The text between `<think>` and the last `</think>`.

    An unclosed `<think>` reaches to the end. Without a `<think>` (the prompt opened it) the reasoning starts with the text;
    without either tag it is the whole text.
    """
    _, opened, rest = text.partition("<think>")
    if opened:
        return rest.rpartition("</think>")[0] if "</think>" in rest else rest
    before, closed, _ = text.rpartition("</think>")
    return before if closed else text
