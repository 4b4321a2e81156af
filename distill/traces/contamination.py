"""An evaluation set as the `decontaminate` filter sees it: is this problem, or a piece of it, in there?

In: the questions, and how two of them are compared (the tasks' own normalisation, handed in because the
rooms do not import each other). Left out on purpose: completions; a reply may well say what a question says.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_WORD = re.compile(r"\w+")


class HeldOut:
    """The questions of an evaluation set.

    prose: whether a shared run of words gives a question away; False for generated problems, whose template
    makes every run of words match. normalise: text -> what is equal for the same question.
    """

    def __init__(self, questions: Iterable[str], normalise: Callable[[str], str], prose: bool) -> None:
        self._normalise, self._prose = normalise, prose
        self._texts = frozenset(normalise(question) for question in questions)
        self._runs: dict[int, frozenset[tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def holds(self, question: str, ngram: int) -> bool:
        """Whether a question is in the set or, in prose, shares `ngram` words in a row with one that is.

        Ten words are what DeepSeekMath takes (section 2.1); a question of the set that has fewer is matched as a
        whole only. ngram 0: whole questions only.
        """
        text = self._normalise(question)
        if text in self._texts:
            return True
        if not self._prose or ngram <= 0:
            return False
        if ngram not in self._runs:
            self._runs[ngram] = frozenset(run for known in self._texts for run in _runs_of(known, ngram))
        return any(run in self._runs[ngram] for run in _runs_of(text, ngram))


def _runs_of(text: str, length: int) -> Iterable[tuple[str, ...]]:
    words = _WORD.findall(text)
    return zip(*(words[start:] for start in range(length)), strict=False)
