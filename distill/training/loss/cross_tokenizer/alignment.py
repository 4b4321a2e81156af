"""Alignment of two tokenizers: the byte positions where both cut a text, and the tokens with the same text.

Everything is in bytes: a token stands for the bytes it decodes to. The student's ids are those that were sampled; only the
teacher's ids are re-tokenised from the text. The end of the text is a token of both vocabularies.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

import numpy as np

from distill import models
from distill.errors import UserError
from distill.records import Array, Message, Template

END = b"\xff\xffend"
"""The bytes that stand for the end-of-text token; no other token or text has them."""


def token_bytes(tokenizer: Any, end: int | None = None) -> list[bytes]:
    """Return the bytes of every id, empty for special tokens (END for the end of text).

    end: the id that ends a completion; None = the tokenizer's EOS, which may differ from the end of a chat template's turn.

    Raises UserError for a tokenizer that is neither byte-level nor sentencepiece-like.
    """
    found = models.vocabulary_bytes(tokenizer)
    if found is None:
        raise UserError(
            "tokens cannot be aligned: the tokenizer is neither byte-level nor sentencepiece-like, so the bytes of its "
            "tokens are not known. Use loss: {fn: cross_entropy}, which learns from the text."
        )
    for index, token in tokenizer.added_tokens_decoder.items():
        if token.special and index < len(found):
            found[index] = b""
    end = tokenizer.eos_token_id if end is None else end
    if end is not None:
        found[end] = END
    return found


@dataclass(frozen=True, slots=True, eq=False)
class VocabularyMap:
    """Ids of the tokens that both vocabularies have [M], pair by pair, and the ids that only one has."""

    student_shared_M: Array
    teacher_shared_M: Array
    student_other: Array
    teacher_other: Array

    @staticmethod
    def of_tokenizers(
        student: Any, student_size: int, teacher: Any, teacher_size: int, template: Template
    ) -> VocabularyMap:
        """Map two tokenizers for heads of these sizes; ids beyond a head are ignored, ids without a token have no text.

        template: decides which tokens end a completion; they correspond to each other.
        """

        def texts(tokenizer: Any, size: int) -> list[bytes]:
            found = token_bytes(tokenizer, models.end_id(tokenizer, template))[:size]
            return found + [b""] * (size - len(found))

        return VocabularyMap.of(texts(student, student_size), texts(teacher, teacher_size))

    @staticmethod
    def of(student: Sequence[bytes], teacher: Sequence[bytes]) -> VocabularyMap:
        """Map two vocabularies from the bytes of every id. Of several ids with the same bytes the lowest counts."""
        by_bytes = _lowest_id(teacher)
        pairs = [(s, by_bytes[text]) for text, s in _lowest_id(student).items() if text in by_bytes]
        shared_s, shared_t = np.array(sorted(pairs), dtype=np.int64).reshape(-1, 2).T
        return VocabularyMap(
            shared_s,
            shared_t,
            np.setdiff1d(np.arange(len(student)), shared_s),
            np.setdiff1d(np.arange(len(teacher)), shared_t),
        )


def _lowest_id(texts: Sequence[bytes]) -> dict[bytes, int]:
    return {text: index for index, text in reversed(list(enumerate(texts))) if text}


@dataclass(frozen=True, slots=True, eq=False)
class Alignment:
    """The G shortest spans of one text between cuts of both tokenizers.

    student_start_G, teacher_start_G: each side's first token in a span; both predict from the same text.
    student_span_T, teacher_span_T: the span of each token, -1 after the last common cut.
    """

    student_start_G: Array
    teacher_start_G: Array
    student_span_T: Array
    teacher_span_T: Array

    @property
    def num_spans(self) -> int:
        return len(self.student_start_G)

    def is_split(self) -> Array:
        """Whether either side has more than one token in a span, bool [G]."""
        student_G, teacher_G = (
            np.bincount(span_T[span_T >= 0], minlength=self.num_spans)
            for span_T in (self.student_span_T, self.teacher_span_T)
        )
        return np.asarray((student_G > 1) | (teacher_G > 1))

    @staticmethod
    def concat(parts: Sequence[Alignment]) -> Alignment:
        """Concatenate the alignments of several texts; tokens and spans are numbered consecutively."""
        columns: list[list[Array]] = [[np.empty(0, np.int64)] for _ in fields(Alignment)]
        num_student = num_teacher = num_spans = 0
        for part in parts:
            columns[0].append(part.student_start_G + num_student)
            columns[1].append(part.teacher_start_G + num_teacher)
            for column, span_T in zip(columns[2:], (part.student_span_T, part.teacher_span_T), strict=True):
                column.append(np.where(span_T < 0, -1, span_T + num_spans))
            num_student += len(part.student_span_T)
            num_teacher += len(part.teacher_span_T)
            num_spans += part.num_spans
        return Alignment(*(np.concatenate(column) for column in columns))


def align(student: Sequence[bytes], teacher: Sequence[bytes]) -> Alignment:
    """Align one text's tokens on both sides, given as bytes.

    Raises ValueError if neither side's text is a prefix of the other's.
    """
    a, b = b"".join(student), b"".join(teacher)
    common = min(len(a), len(b))
    if a[:common] != b[:common]:
        raise ValueError("the two sides are not tokens of the same text")
    ends_s = np.cumsum([len(text) for text in student], dtype=np.int64)
    ends_t = np.cumsum([len(text) for text in teacher], dtype=np.int64)
    cuts = np.intersect1d(ends_s, ends_t)
    cuts = cuts[cuts > 0]

    def side(ends: Array) -> tuple[Array, Array]:
        span = np.searchsorted(cuts, ends)  # a token that ends at a cut belongs to that span
        return np.searchsorted(span, np.arange(len(cuts))), np.where(span < len(cuts), span, -1)

    start_s, span_s = side(ends_s)
    start_t, span_t = side(ends_t)
    return Alignment(start_s, start_t, span_s, span_t)


@dataclass(frozen=True, slots=True, eq=False)
class RetokenizedTrace:
    """One trace re-tokenised for a teacher: prompt and completion in its ids, and the alignment of the completions."""

    prompt_ids: Array
    completion_ids: Array
    alignment: Alignment


class Retokenizer:
    """Re-tokenises a student's traces for a teacher, with the teacher's own chat template.

    Where only one of the two chat templates opens the reasoning (as R1-Distill's writes `<think>` into the prompt), the
    teacher's prompt is changed so that the mark stands once in what the teacher reads.
    """

    def __init__(self, student: Any, teacher: Any, template: Template) -> None:
        self._student, self._teacher, self._template = student, teacher, template
        self._end = models.end_id(teacher, template)
        self._teacher_bytes = token_bytes(teacher, self._end)
        self._student_bytes = token_bytes(student, models.end_id(student, template))
        if student.eos_token_id is not None:  # a sampled completion may end with either
            self._student_bytes[student.eos_token_id] = END

    def __call__(self, messages: Sequence[Message], completion_ids: Array) -> RetokenizedTrace | None:
        """Re-tokenise a prompt, given as messages, and a completion, given in the student's ids.

        None if the two sides' tokens do not spell the same text: a completion cut inside a character, or a tokenizer that
        changes the text.
        """
        ids = [int(i) for i in completion_ids]
        text = models.decode(self._student, completion_ids)
        student_bytes = _bytes_by_token(self._student_bytes, ids, text)
        teacher_ids = models.render_completion(self._teacher, text, finished=False)
        if student_bytes is not None and student_bytes[-1:] == [END] and self._end is not None:
            teacher_ids = np.append(teacher_ids, np.int32(self._end))
        teacher_bytes = _bytes_by_token(self._teacher_bytes, [int(i) for i in teacher_ids], text)
        if student_bytes is None or teacher_bytes is None:
            return None
        prompt = models.encode_prompt(self._teacher, self._template, self._prompt(messages, text))
        return RetokenizedTrace(prompt, teacher_ids, align(student_bytes, teacher_bytes))

    def _prompt(self, messages: Sequence[Message], completion: str) -> str:
        """The text of the teacher's prompt for a completion of the student's prompt."""
        ours, theirs = (models.prompt_text(each, self._template, messages) for each in (self._student, self._teacher))
        student_opened, teacher_opened = models.opened_by(ours), models.opened_by(theirs)
        if student_opened and not teacher_opened:
            return theirs + student_opened
        if teacher_opened and not student_opened and completion.lstrip().startswith(teacher_opened.strip()):
            return theirs.removesuffix(teacher_opened)
        return theirs


def _bytes_by_token(table: Sequence[bytes], ids: Sequence[int], text: str) -> list[bytes] | None:
    """Return the bytes of each token if together they spell the text, with or without its end; else None.

    The leading space that sentencepiece-like tokenizers add is no part of the text.
    """
    parts = [table[i] for i in ids]
    whole, wanted = b"".join(part for part in parts if part != END), text.encode()
    if parts and whole == b" " + wanted:
        first = next(n for n, part in enumerate(parts) if part)
        parts[first] = parts[first][1:]
        return parts
    return parts if whole == wanted else None
