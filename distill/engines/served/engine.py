"""An engine at the other end of a network: any endpoint with OpenAI's API, such as vLLM's server, SGLang or a provider.

In: requests, taken lazily, `batch_size` of them in flight. Out: Completions in the order of their arrival (`generate`) or of
the requests (`score`). Every answer is in the journal, if there is one, before it is yielded; a request whose answer the
journal holds is not sent. What the endpoint offers is found out by `probe` before the first request.
"""

from __future__ import annotations

import threading
from collections import deque
from collections.abc import Callable, Container, Iterable, Iterator, Mapping
from concurrent.futures import FIRST_COMPLETED, Future, wait
from pathlib import Path
from typing import TYPE_CHECKING, Any

from distill import models
from distill.engines import completions
from distill.engines.served import answers, probe
from distill.engines.served.answers import Answer, LocalTokens
from distill.engines.served.client import Client, MalformedError, RefusedError
from distill.engines.served.journal import AnswerJournal, mark_of
from distill.recipe import EngineConfig
from distill.records import Completion, Request, Sampling, UserError

if TYPE_CHECKING:
    import torch


class ServedEngine:
    """A model behind an endpoint (see distill.records.Engine).

    model_dir: a folder with the tokenizer and config.json of the stage's model; its weights are not read. Raises UserError
    if the endpoint cannot be reached, does not have the model or does not give what is needed.
    """

    def __init__(self, model_dir: Path, config: EngineConfig, *, max_model_len: int, max_top_k: int) -> None:
        assert config.model is not None
        self.vocab_size, self._stop_ids = completions.vocabulary(model_dir)
        self.max_model_len = max_model_len
        self.version = 0
        self._model, self._batch_size = config.model, config.batch_size
        self._tokens = LocalTokens(models.load_tokenizer(model_dir), self.vocab_size)
        self._journal: AnswerJournal | None = None
        self._can_score = -1  # entries a position
        self._client = Client(config)
        self._offer = probe.offer_of(self._client, self._model, self._tokens, max_top_k)
        self._check_length()
        self.note = f"{self._model}: {self._offer.note}"
        if self._offer.given < max_top_k:
            self.note += f"; it gives {self._offer.given} of {max_top_k} entries a position, the rest is in the tail"

    def _check_length(self) -> None:
        limit = self._offer.tokens
        if self._offer.mode == "ids" and limit is not None and self.max_model_len > limit:
            raise UserError(
                f"engine.max_model_len: the stage needs {self.max_model_len} tokens, but the endpoint's context has {limit}; set "
                f"engine.max_model_len: {limit}, or lower sampling.max_tokens."
            )

    def keep_answers(self, folder: Path, stored: Container[str]) -> AnswerJournal:
        """Keep every answer in a journal in `folder` from now on; stored: ids of traces in complete shards."""
        if self._journal is not None:
            self._journal.close()
        self._journal = AnswerJournal(folder, stored)
        return self._journal

    # --------------------------------------------------------------------------------------------- generation

    def generate(self, requests: Iterable[Request], sampling: Sampling, *, top_k: int = 0) -> Iterator[Completion]:
        """Yield completions as they arrive. With `top_k`, one whose tokens are not all known here has `top` None."""
        if top_k and not self._offer.raw and (sampling.temperature, sampling.top_p) != (1.0, 1.0):
            raise UserError(
                "sampling: the endpoint's log-probabilities are those after temperature and top_p, so only temperature: 1 and "
                "top_p: 1 give the teacher's distribution; set both, or top_logprobs: 0."
            )
        # A token beyond the entries that the endpoint gives is none of them.
        top_k = min(top_k, self._offer.given)
        ids = self._offer.mode == "ids"
        asked = (self._asked_by_ids if ids else self._asked_by_chat)(sampling, top_k)
        running: set[Future[Completion]] = set()
        with _Threads(self._client) as threads:
            for request in requests:
                mark = mark_of("generate", self._model, request.prompt_ids, request.seed, sampling, top_k)
                running.add(threads.start(self._answered, request, mark, *asked(request)))
                if len(running) >= self._batch_size:
                    yield from _finished(running)
            while running:
                yield from _finished(running)

    def _asked_by_ids(self, sampling: Sampling, top_k: int) -> Callable[[Request], tuple[Any, ...]]:
        stop_ids = sorted(self._stop_ids)

        def asked(request: Request) -> tuple[Any, ...]:
            limit = completions.room(request, self.max_model_len, sampling.max_tokens)
            body = {
                **self._offer.body,
                "prompt": [int(each) for each in request.prompt_ids],
                "max_tokens": limit,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": request.seed & 0x7FFFFFFFFFFFFFFF,
                "stop_token_ids": stop_ids,
                "logprobs": top_k,
            }

            def parse(tree: Any) -> Answer:
                return answers.from_ids(
                    tree,
                    request,
                    top_k=top_k,
                    stop_ids=self._stop_ids,
                    vocab_size=self.vocab_size,
                    version=self.version,
                )

            return "/completions", body, parse, len(request.prompt_ids) + limit

        return asked

    def _asked_by_chat(self, sampling: Sampling, top_k: int) -> Callable[[Request], tuple[Any, ...]]:
        def asked(request: Request) -> tuple[Any, ...]:
            if not request.messages:
                raise UserError(
                    "engine: this endpoint takes no token ids, and the stage does not pass the text of its prompts; use an "
                    "endpoint of vLLM with the same tokenizer."
                )
            limit = completions.room(request, self.max_model_len, sampling.max_tokens)
            body = {
                **self._offer.body,
                "messages": [dict(message) for message in request.messages],
                self._offer.limit: limit,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "seed": request.seed & 0x7FFFFFFF,
                **({"logprobs": True, "top_logprobs": top_k} if top_k else {}),
            }

            def parse(tree: Any) -> Answer:
                return answers.from_chat(tree, request, self._tokens, top_k=top_k, version=self.version)

            return "/chat/completions", body, parse, len(request.prompt_ids) + limit

        return asked

    # ------------------------------------------------------------------------------------------------ scoring

    def score(self, requests: Iterable[Request], *, top_k: int = 0) -> Iterator[Completion]:
        """Yield the given completions' log-probabilities in the order of the requests, by `prompt_logprobs`."""
        if top_k > self._can_score:
            probe.check_scores(self._client, self._model, self._tokens, self._offer, top_k)
            self._can_score = top_k
        running: deque[Future[Completion]] = deque()
        with _Threads(self._client) as threads:
            for request in requests:
                mark = mark_of("score", self._model, request.prompt_ids, request.completion_ids, top_k)
                running.append(threads.start(self._answered, request, mark, *self._asked_to_score(request, top_k)))
                if len(running) >= self._batch_size:
                    yield running.popleft().result()
            while running:
                yield running.popleft().result()

    def _asked_to_score(self, request: Request, top_k: int) -> tuple[Any, ...]:
        ids_T = completions.given(request, self.max_model_len)
        whole = [int(each) for each in (*request.prompt_ids, *ids_T)]
        body = {**self._offer.body, "prompt": whole, "max_tokens": 1, "temperature": 0, "prompt_logprobs": top_k}

        def parse(tree: Any) -> Answer:
            return answers.scored(
                tree,
                request,
                ids_T,
                top_k=top_k,
                stop_ids=self._stop_ids,
                vocab_size=self.vocab_size,
                version=self.version,
            )

        return "/completions", body, parse, len(whole) + 1

    # ------------------------------------------------------------------------------------------------- common

    def _answered(
        self,
        request: Request,
        mark: str,
        path: str,
        body: Mapping[str, Any],
        parse: Callable[[Any], Answer],
        tokens: int,
    ) -> Completion:
        """Return the answer to a request: from the journal, or from the endpoint and then in the journal.

        mark: hash of what the request asks for.
        """
        journal = self._journal
        if journal is not None and (known := journal.find(request.request_id, mark)) is not None:
            return known

        def checked(tree: Any) -> Answer:
            try:
                return parse(tree)
            except MalformedError as error:
                if journal is not None:
                    journal.add_usage(answers.usage_of(error.usage))
                raise
            except (KeyError, TypeError, ValueError, AttributeError, IndexError) as error:
                raise MalformedError(f"it is not in the form of an answer ({type(error).__name__})") from None

        try:
            answer = self._client.post(path, body, checked, once=f"{request.request_id}-{mark}", tokens=tokens)
        except RefusedError as refused:
            raise UserError(self._client.message(refused)) from None
        if journal is not None:
            journal.add(request.request_id, mark, answer)
        return answer.completion

    def sync(self, weights: Iterable[tuple[str, torch.Tensor]], version: int) -> None:
        """Raises ValueError: an endpoint's weights cannot be replaced from here."""
        raise ValueError("the weights of a model behind an endpoint cannot be replaced")

    def close(self) -> None:
        """End all requests and close the journal."""
        self._client.close()
        if self._journal is not None:
            self._journal.close()
            self._journal = None


class _Threads:
    """A thread for each request in flight. After an error those requests are still answered and kept, but none is repeated."""

    def __init__(self, client: Client) -> None:
        self._client = client
        self._running: set[Future[Completion]] = set()

    def start(self, work: Callable[..., Completion], *given: Any) -> Future[Completion]:
        """Run work(*given) in a new thread, which does not keep the process from ending."""
        future: Future[Completion] = Future()

        def run() -> None:
            try:
                future.set_result(work(*given))
            except BaseException as error:
                future.set_exception(error)

        self._running = {each for each in self._running if not each.done()} | {future}
        threading.Thread(target=run, name="request", daemon=True).start()
        return future

    def __enter__(self) -> _Threads:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        # Where the caller wants no more, or the process is interrupted, the threads are left to what they do.
        if kind is not None and issubclass(kind, Exception):
            with self._client.limits.stopped():
                wait(self._running)


def _finished(running: set[Future[Completion]]) -> Iterator[Completion]:
    """Wait for one of the running requests; yield and remove all that are done."""
    for future in wait(running, return_when=FIRST_COMPLETED).done:
        running.remove(future)
        yield future.result()
