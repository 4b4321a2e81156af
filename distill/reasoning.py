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
    (" to=self<|message|>", "<|eom|>"),
)
"""The pairs that open and close reasoning, by family: DeepSeek and Qwen; Claude-like data; Gemini-like data; generic data;
Seed-OSS; OpenThoughts and Sky-T1; Command-A; generic; Magistral; Kimi; GPT-OSS; Gemma 4; Muse."""
SHARED = ("<|end|>", "<|eom|>")
"""Closing markers that other families write elsewhere: they close reasoning only where the opening one stands."""
REASONING_KEYS = ("reasoning_content", "reasoning", "thinking")
"""Keys under which data sets and templates keep an assistant's reasoning beside its content."""
SOLUTION = (
    r"(?:<\|(?:begin|end)_of_solution\|>|<\|(?:START|END)_RESPONSE\|>|<\|START_TEXT\|>|<\|END_TEXT\|>"
    r"|(?:<\|start\|>assistant)?(?:<\|channel\|>final| to=user)<\|message\|>)+"
)
"""Markers around the answer, which follow reasoning in some families and say nothing of their own."""
_AROUND_ANSWER = re.compile(rf"\A(\s*){SOLUTION}|{SOLUTION}(\s*)\Z")
_OPENED = re.compile(r"\A\s*<think>\s*")
_NEXT_BLOCK = r"\s*(?:<\|start\|>assistant)?"
"""What may stand between two blocks of reasoning that follow each other."""


def canonical(text: str) -> str:
    """Return a completion's text with its reasoning between `<think>` and `</think>`, without markers around the answer.

    Reasoning begins the text, or was opened by the prompt and ends at the first closing marker. An answer that mentions
    such markers keeps them.
    """
    for opening, closing in MARKERS:
        begun = re.match(rf"\s*{re.escape(opening)}", text)
        if begun:
            made, rest = text[: begun.end() - len(opening)], text[begun.end() :]
            while True:
                inside, closed, rest = rest.partition(closing)
                made += f"<think>{inside}" + ("</think>" if closed else "")
                again = re.match(_NEXT_BLOCK + re.escape(opening), rest)
                if again is None:
                    return made + _AROUND_ANSWER.sub(r"\1\2", rest)
                rest = rest[again.end() :]
    closings = [(text.find(c), o, c) for o, c in MARKERS if c in text and c not in SHARED]
    place, opening, closing = min(closings, default=(0, "", ""))
    if not closings or opening in text[:place]:
        return _AROUND_ANSWER.sub(r"\1\2", text)
    return f"{text[:place]}</think>" + _AROUND_ANSWER.sub(r"\1\2", text[place + len(closing) :])


def begins_with(text: str, prefill: str) -> bool:
    """Return whether a completion's text holds the prompt's prefill at its start, be it after `<think>`."""
    rest = _OPENED.sub("", prefill)
    return text.startswith(prefill) or bool(rest.strip() and _OPENED.sub("", canonical(text)).startswith(rest))


def without_prefill(text: str, prefill: str) -> str:
    """Return a completion's text without the prompt's prefill at its start; a `<think>` before that stays."""
    if text.startswith(prefill):
        return text.removeprefix(prefill)
    opened, rest = _OPENED.match(text), _OPENED.sub("", prefill)
    return opened[0] + text[opened.end() :].removeprefix(rest) if opened else text


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
    """Return (reasoning, answer) of a reply that holds its reasoning inline; (None, text) for one without.

    Reasoning ends at the first `</think>`; the prompt may have opened it. Markers inside the answer are part of the answer.
    """
    inside, closed, answer = re.sub(r"\A\s*<think>", "", canonical(text)).partition("</think>")
    return (inside, answer) if closed and "<think>" not in inside else (None, text)
