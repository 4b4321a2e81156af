"""An evaluation set for the `decontaminate` filter: find out whether it contains a problem or a part of it.

In: the questions and the tasks' normalisation of them (passed in, because rooms do not import each other). Completions are
not compared: a reply may repeat the question.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterable

_WORD = re.compile(r"\w+")


class HeldOut:
    """The questions of an evaluation set.

    prose: whether a shared run of words counts as contamination; False for generated problems, whose templates
    share runs of words. normalise: maps a text to a form that is equal for equal questions.
    """

    def __init__(self, questions: Iterable[str], normalise: Callable[[str], str], prose: bool) -> None:
        self._normalise, self._prose = normalise, prose
        self._texts = frozenset(normalise(question) for question in questions)
        self._runs: dict[int, frozenset[tuple[str, ...]]] = {}

    def __len__(self) -> int:
        return len(self._texts)

    def holds(self, question: str, ngram: int) -> bool:
        """Return whether a question is in the set or, in prose, shares `ngram` consecutive words with one in the set.

        DeepSeekMath uses ten words (section 2.1). A question of the set with fewer words is compared as a whole. ngram 0:
        whole questions only.
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
