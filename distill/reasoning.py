"""The reasoning part of a completion, in whatever markers the model's family writes it.

`canonical` writes all of them as `<think>` and `</think>`, which is what rewards, filters and templates look for.
"""

from __future__ import annotations

import re

MARKERS = (
    ("<think>", "</think>"),
    ("<thinking>", "</thinking>"),
    ("<thought>", "</thought>"),
    ("<reasoning>", "</reasoning>"),
    ("<seed:think>", "</seed:think>"),
    ("<|begin_of_thought|>", "<|end_of_thought|>"),
    ("<|START_THINKING|>", "<|END_THINKING|>"),
    ("<|think_start|>", "<|think_end|>"),
    ("[THINK]", "[/THINK]"),
    ("◁think▷", "◁/think▷"),
    ("<|channel|>analysis<|message|>", "<|end|>"),
    ("<|channel>thought", "<channel|>"),
)
"""The pairs that open and close reasoning, by family: DeepSeek and Qwen; Claude-like data; Gemini-like data; generic data;
Seed-OSS; OpenThoughts and Sky-T1; Command-A; generic; Magistral; Kimi; GPT-OSS; Gemma 4."""
SOLUTION = re.compile(
    r"<\|(?:begin|end)_of_solution\|>|<\|(?:START|END)_RESPONSE\|>|<\|START_TEXT\|>|<\|END_TEXT\|>"
    r"|<\|start\|>assistant<\|channel\|>final<\|message\|>|<\|channel\|>final<\|message\|>"
)
"""Markers around the answer, which follow reasoning in some families and say nothing of their own."""


def canonical(text: str) -> str:
    """Return a completion's text with its reasoning between `<think>` and `</think>`, without markers around the answer."""
    for opening, closing in MARKERS[1:]:
        if opening in text or (closing in text and closing != "<|end|>"):
            text = text.replace(opening, "<think>").replace(closing, "</think>")
    return SOLUTION.sub("", text)


def reasoning_of(text: str) -> str:
    """Return the text between `<think>` (or a family's own marker) and the last `</think>`.

    An unclosed `<think>` reaches to the end. Without a `<think>` (the prompt opened it) the reasoning starts with the text;
    without either tag it is the whole text.
    """
    text = canonical(text)
    _, opened, rest = text.partition("<think>")
    if opened:
        return rest.rpartition("</think>")[0] if "</think>" in rest else rest
    before, closed, _ = text.rpartition("</think>")
    return before if closed else text


def split_reasoning(text: str) -> tuple[str | None, str]:
    """Return (reasoning, answer) of a reply that holds its reasoning inline; (None, text) for one without. A prompt may have
    opened the reasoning."""
    plain = canonical(text)
    found = re.fullmatch(r"\s*(?:<think>)?(.*)</think>(.*)", plain, re.DOTALL)
    return (found[1], found[2]) if found else (None, text)
