"""The records and protocols that the subpackages exchange: problems, completions, distributions, traces, costs.

Records are numpy arrays and plain Python. Nothing here imports torch, so that the command line, the trace store and the
reports start quickly.

Shape suffixes, used throughout the package:
    T positions (tokens)    K kept candidates per position    E entries, flat over positions (sum of counts)
    N traces in a block     D hidden size                     V vocabulary                C tokens in a chunk
"""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, fields
from functools import cached_property
from typing import TYPE_CHECKING, Any, Literal, Protocol, cast

import numpy as np
import numpy.typing as npt

from distill.errors import UserError as UserError
from distill.tail_draws import BeyondTop as BeyondTop
from distill.tail_draws import Draws as Draws

if TYPE_CHECKING:
    import torch

Split = Literal["train", "held_out"]
FinishReason = Literal["stop", "length"]
Message = Mapping[str, Any]
"""One turn: `role` and `content`."""
Messages = tuple[Message, ...]
"""A conversation. Problems, prompts and traces all use this form."""
Array = npt.NDArray[Any]

SHORT = 256
"""Attention spans up to this many tokens are computed as plain matrix products, which is quick at that length."""

IGNORED = -100
"""The label of a token that is not learned, as transformers has it."""

NO_TAIL = 1e-6
"""Tail masses below this are rounding noise of float32 log-probabilities and count as no tail."""


def stable_hash(*parts: object, length: int = 16) -> str:
    """Hex digest of the parts as text; the same on every machine and in every process."""
    joined = "\x1f".join(str(part) for part in parts)
    return hashlib.sha256(joined.encode("utf-8", "surrogatepass")).hexdigest()[:length]


def draw_seed(*parts: object) -> int:
    """A 63-bit seed from parts such as (run seed, stage, problem id, sample, purpose); independent of order and batch."""
    return int(stable_hash(*parts, length=16), 16) >> 1


# ---------------------------------------------------------------------------------------------- problems


@dataclass(frozen=True, slots=True)
class Problem:
    """One problem of a task.

    problem_id: hash of the task's name and the normalised content; decides the split.
    question: the problem's own text, without instructions.
    messages: the conversation that asks it, without the template's instructions.
    gold: the reference answer as text; None if the task judges in another way.
    payload: further data for the task's judge (JSON-serialisable).
    """

    problem_id: str
    task: str
    question: str
    messages: Messages
    gold: str | None = None
    payload: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class Verdict:
    """The judgement of a completion. correct: True means a full score, None that it could not be judged.

    score: in [0, 1], partial credit included (for rewards only). answer: the extracted answer, or None.
    reason: why it is not correct, in a word or two; empty if it is correct.
    """

    correct: bool | None
    score: float | None
    answer: str | None
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Template:
    """The prompt of a task's problems, and how the answer is extracted from a completion.

    system: the system message, rendered by the tokenizer's chat template (None: no system message).
    plain: the whole prompt as text with one `{question}`, for models without a chat template.
    question: what the user's turn says under a chat template, with one `{question}`.
    chat: False always uses `plain`. prefill: text that the assistant's turn starts with; `extract` gets it with the
    completion. extract: completion text -> answer text, or None if the format is broken (an unclosed <think>, no answer).
    """

    name: str
    system: str | None
    plain: str
    extract: Callable[[str], str | None]
    chat: bool = True
    prefill: str = ""
    options: Mapping[str, Any] = field(default_factory=dict)
    question: str = "{question}"


class Task(Protocol):
    """A source of problems, and the judge of their completions that rewards, filters and eval share."""

    name: str
    template: Template
    fingerprint: str

    def problems(self, split: Split, num: int | None, seed: int) -> Iterator[Problem]:
        """Yield `num` distinct problems of a split; a larger `num` continues the same sequence.

        None yields all of them (finite tasks only). Raises UserError, with the number that exists, if there are fewer.
        """
        ...

    @property
    def is_endless(self) -> bool:
        """Whether problems are generated, not listed. Such a task judges only its own problems and needs a `num`."""
        ...

    def holds_out(self, question: str) -> bool:
        """Whether a question is one of the task's held-out problems, which are never trained on."""
        ...

    def judge(self, problem: Problem, completion: str, finished: bool = True) -> Verdict:
        """Judge the text of a completion. An unfinished completion is never correct."""
        ...

    def same_answer(self, one: str, other: str) -> bool:
        """Whether two extracted answers are equivalent, correct or not; used by the majority vote."""
        ...


# ------------------------------------------------------------------------------------------- distributions


@dataclass(frozen=True, eq=False)
class TopK:
    """The most probable entries of the next-token distribution at T positions, ragged, and the mass of the rest (tail).

    count_T:  number of entries at each position.
    ids_E:    token ids, position after position, by descending probability within a position.
    logp_E:   their natural-log probabilities (float32), normalised over the whole vocabulary.
    tail_T:   natural log of the probability mass outside the entries (-inf for none).
    """

    count_T: Array
    ids_E: Array
    logp_E: Array
    tail_T: Array

    def __len__(self) -> int:
        return len(self.count_T)

    @staticmethod
    def from_dense(ids_TK: Array, logp_TK: Array, tail_T: Array | None = None) -> TopK:
        """From rectangular [T, K] candidates in any order; -inf entries are dropped.

        tail_T: log of the mass outside the candidates, summed over the other ids; None = 1 - sum of the candidates, which
        in float32 is rounding noise for a small tail.
        """
        ids_TK, logp_TK = np.asarray(ids_TK), np.asarray(logp_TK, dtype=np.float32)
        if (logp_TK[:, 1:] > logp_TK[:, :-1]).any():
            order_TK = np.argsort(-logp_TK, axis=1, kind="stable")
            ids_TK = np.take_along_axis(ids_TK, order_TK, 1)
            logp_TK = np.take_along_axis(logp_TK, order_TK, 1)
        kept_TK = logp_TK > -np.inf
        return TopK(
            count_T=kept_TK.sum(1).astype(np.int32),
            ids_E=ids_TK[kept_TK].astype(np.int64),
            logp_E=logp_TK[kept_TK],
            tail_T=_log_rest(np.exp(logp_TK.astype(np.float64)).sum(1)) if tail_T is None else tail_T,
        )

    @staticmethod
    def concat(parts: Sequence[TopK]) -> TopK:
        """Concatenate along positions."""
        if not parts:
            return TopK(
                np.empty(0, np.int32),
                np.empty(0, np.int64),
                np.empty(0, np.float32),
                np.empty(0, np.float32),
            )
        return TopK(*(np.concatenate([getattr(part, f.name) for part in parts]) for f in fields(TopK)))

    @property
    def width(self) -> int:
        """The largest number of entries at a position."""
        return int(self.count_T.max(initial=0))

    @cached_property
    def offsets(self) -> Array:
        """[T+1] start of each position's entries in the flat arrays."""
        return np.concatenate([[0], np.cumsum(self.count_T, dtype=np.int64)])

    def slice(self, start: int, stop: int) -> TopK:
        """Positions start to stop - 1."""
        offsets = self.offsets
        a, b = offsets[start], offsets[stop]
        return TopK(self.count_T[start:stop], self.ids_E[a:b], self.logp_E[a:b], self.tail_T[start:stop])

    def truncate(self, *, top_k: int | None = None, mass: float | None = None) -> TopK:
        """Keep at each position the fewest most probable entries that reach `mass`: at least one, at most `top_k`.

        The mass of dropped entries is added to the tail.
        """
        if len(self) == 0 or (top_k is None and mass is None):
            return self
        start_T, num_T = self.offsets[:-1], np.asarray(self.count_T)
        running = np.concatenate([[0.0], np.cumsum(np.exp(self.logp_E.astype(np.float64)))])
        count_T = num_T
        if mass is not None:
            # The first entry at which the sum of those before it has reached the mass.
            count_T = np.searchsorted(running, running[start_T] + mass) - start_T
        limit = len(self.ids_E) if top_k is None else max(top_k, 1)
        count_T = np.minimum(np.clip(count_T, 1, limit), num_T)
        keep_E = np.arange(len(self.ids_E)) < np.repeat(start_T + count_T, num_T)
        tail_T = np.exp(self.tail_T.astype(np.float64))
        tail_T += running[start_T + num_T] - running[start_T + count_T]
        with np.errstate(divide="ignore"):
            log_tail_T = np.log(tail_T).astype(np.float32)
        return TopK(count_T.astype(np.int32), self.ids_E[keep_E], self.logp_E[keep_E], log_tail_T)

    def dense(self, width: int | None = None) -> tuple[Array, Array]:
        """Rectangular ids [T, K] (padded with -1) and log-probabilities [T, K] (padded with -inf)."""
        width = self.width if width is None else width
        ids_TK = np.full((len(self), width), -1, np.int64)
        logp_TK = np.full((len(self), width), -np.inf, np.float32)
        filled_TK = np.arange(width) < np.asarray(self.count_T)[:, None]
        ids_TK[filled_TK], logp_TK[filled_TK] = self.ids_E, self.logp_E
        return ids_TK, logp_TK


def _log_rest(kept_T: Array) -> Array:
    with np.errstate(divide="ignore"):
        return np.asarray(np.log(np.maximum(1.0 - kept_T, 0.0)).astype(np.float32))


# ------------------------------------------------------------------------------------------------ engines


@dataclass(frozen=True, slots=True)
class Sampling:
    """Sampling parameters. temperature 0 is greedy; max_tokens counts completion tokens, the stop token included."""

    temperature: float = 1.0
    top_p: float = 1.0
    max_tokens: int = 256


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """A prompt for an engine to continue or, with completion_ids, to score. Engines of this machine read the ids only.

    messages, opened: for an endpoint that takes no ids: the conversation of the prompt (empty: not known), and the text with
    which the prompt's ids begin the completion. tail_draws: number of ids to draw at each position from all but the top entries;
    the requests of one call ask for the same number.
    """

    request_id: str
    prompt_ids: Array
    seed: int = 0
    completion_ids: Array | None = None
    messages: Messages = ()
    opened: str = ""
    tail_draws: int = 0


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """A finished completion, or a scored one.

    ids_T: the ids sampled (or given), the stop id included.
    logprob_T: log-probability of each under the raw distribution (temperature 1, before top-p), float32; empty where an
    endpoint gives none.
    top: the distribution at each position; position t is that of token t of the completion. None if not requested.
    finish_reason: "stop" at a stop id, "length" at the token limit. version: version of the weights that wrote it.
    text: what an endpoint wrote, of which ids_T are this side's encoding; None: the ids decide. beyond: the engine's draws from the
    ids that `top` does not list, if the request asked for any. draws: those from the whole tail, once `top` is cut to what is kept.
    """

    request_id: str
    ids_T: Array
    logprob_T: Array
    top: TopK | None
    finish_reason: FinishReason
    version: int = 0
    text: str | None = None
    beyond: BeyondTop | None = None
    draws: Draws | None = None


class Engine(Protocol):
    """A model that generates completions and scores given ones, with log-probabilities."""

    vocab_size: int
    max_model_len: int
    version: int

    def generate(self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0) -> Iterator[Completion]:
        """Yield completions as they finish, in any order. Raises ValueError if a prompt does not fit the context."""
        ...

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        """Yield the log-probabilities of the given completions (teacher-forcing), in the order of the requests."""
        ...

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Replace the weights of the running engine, a tied head included; later completions carry `version`.

        Wakes an engine that sleeps (`SleepingEngine`).
        """
        ...

    def close(self) -> None:
        """Free the model's memory."""
        ...


class SleepingEngine(Engine, Protocol):
    """An engine that can free its memory while the model trains; needed only for `engine: {sleep: true}`."""

    def sleep(self) -> None:
        """Free the memory of weights and cache until the next `sync`, which brings all weights."""
        ...


def rest(engine: Engine, sleeps: bool) -> None:
    """Let an engine sleep until its next sync, if the recipe says that it does (`engine: {sleep: true}`)."""
    if sleeps:
        cast(SleepingEngine, engine).sleep()


@dataclass(frozen=True, slots=True, eq=False)
class Prompt:
    """A problem and its prompt as token ids [T] of a model."""

    problem: Problem
    ids: Array


@dataclass(frozen=True, slots=True, eq=False)
class Group:
    """All completions of one problem, as rewards see them; every tuple has one entry per completion.

    texts: the template's prefill and what the model wrote. num_tokens: of the completion, the stop id included.
    finished: whether it ended at a stop id. verdicts: the task's judgements. max_tokens: the sampling limit.
    seed: for rewards that draw random numbers.
    """

    problem: Problem
    template: Template
    texts: tuple[str, ...]
    num_tokens: tuple[int, ...]
    finished: tuple[bool, ...]
    verdicts: tuple[Verdict, ...]
    max_tokens: int
    seed: int = 0

    def __len__(self) -> int:
        return len(self.texts)


@dataclass(frozen=True, slots=True, eq=False)
class GradedGroup:
    """The completions of a prompt, and the same as the `Group` that rewards see; both ordered by sample.

    judge_seconds: time that the task's judge took.
    """

    prompt: Prompt
    completions: list[Completion]
    group: Group
    judge_seconds: float = 0.0


class GroupSampler(Protocol):
    """Samples groups of completions with the policy's engine and judges them."""

    @property
    def engine(self) -> Engine: ...

    def groups(self, rollout: int, num: int, *, version: int, attempt: int = 0) -> list[GradedGroup]:
        """Sample this process's share of `num` groups of a rollout; the same arguments and weights give the same groups.

        version: version of the weights that must write them. attempt: 0, 1, ... when groups of a rollout are resampled.
        """
        ...


class Reward(Protocol):
    """A score for each completion of a group; None (not 0) if a completion could not be judged."""

    def __call__(self, group: Group) -> Sequence[float | None]: ...


@dataclass(frozen=True, slots=True, eq=False)
class Scores:
    """The rewards of a group's completions: parts, the unweighted rewards by name, and total, their weighted sum.

    A total is None if a reward with a weight is None. failed: names of rewards that raised an exception or timed out.
    """

    total: list[float | None]
    parts: dict[str, list[float | None]]
    failed: tuple[str, ...] = ()


# ------------------------------------------------------------------------------------------------- traces


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """N rows of unequal length: row n is values[offsets[n]:offsets[n + 1]]."""

    values: Array
    offsets: Array

    def __len__(self) -> int:
        return len(self.offsets) - 1

    def __getitem__(self, n: int) -> Array:
        return np.asarray(self.values[self.offsets[n] : self.offsets[n + 1]])

    @property
    def lengths(self) -> Array:
        return np.asarray(np.diff(self.offsets))

    @staticmethod
    def from_rows(rows: Sequence[Array], dtype: npt.DTypeLike) -> Ragged:
        offsets = np.concatenate([[0], np.cumsum([len(row) for row in rows], dtype=np.int64)]).astype(np.int64)
        values = np.concatenate([np.asarray(row, dtype) for row in rows]) if rows else np.empty(0, dtype)
        return Ragged(values.astype(dtype, copy=False), offsets)

    def take(self, index: Array) -> Ragged:
        return Ragged.from_rows([self[int(n)] for n in index], self.values.dtype)


@dataclass(frozen=True, slots=True, eq=False)
class Traces:
    """A block of N traces, in columns. Token columns are ragged arrays (flat values and offsets).

    Text and verdict columns are lists of length N. rewards: a column for each named reward. top: distributions at all
    completion positions of the block, in the order of `completion_ids`; None if none were captured. draws: from their tails, at the
    same positions; None if none were captured. correct, reward: None for traces that could not be judged.
    """

    trace_id: list[str]
    problem_id: list[str]
    sample: Array
    messages: list[Messages]
    completion: list[str]
    answer: list[str | None]
    gold: list[str | None]
    prompt_ids: Ragged
    completion_ids: Ragged
    logprob: Ragged
    top: TopK | None
    reward: list[float | None]
    rewards: dict[str, list[float | None]]
    correct: list[bool | None]
    finish_reason: list[str]
    draws: Draws | None = None

    def __len__(self) -> int:
        return len(self.trace_id)

    def top_of(self, n: int) -> TopK | None:
        """Return the distribution of trace n."""
        if self.top is None:
            return None
        return self.top.slice(int(self.completion_ids.offsets[n]), int(self.completion_ids.offsets[n + 1]))

    def draws_of(self, n: int) -> Draws | None:
        """Return the draws from the tails of trace n."""
        if self.draws is None:
            return None
        return self.draws.slice(int(self.completion_ids.offsets[n]), int(self.completion_ids.offsets[n + 1]))


# --------------------------------------------------------------------------------------------------- cost


@dataclass(frozen=True, slots=True)
class Cost:
    """The cost of a stage. A multiply-add counts as two FLOPs. dollars: what endpoints charge, at the recipe's prices."""

    tokens_trained: int = 0
    tokens_scored: int = 0
    tokens_generated: int = 0
    tokens_prompt: int = 0
    flops: float = 0.0
    bytes_written: int = 0
    wall_seconds: float = 0.0
    cpu_seconds: float = 0.0
    judge_seconds: float = 0.0
    samples_failed: int = 0
    samples_filtered: int = 0
    dollars: float = 0.0

    @staticmethod
    def of(tree: Mapping[str, Any]) -> Cost:
        """From a mapping; missing fields are 0, other keys are ignored."""
        return Cost(**{f.name: tree[f.name] for f in fields(Cost) if f.name in tree})

    def __add__(self, other: Cost) -> Cost:
        return Cost(**{f.name: getattr(self, f.name) + getattr(other, f.name) for f in fields(Cost)})
