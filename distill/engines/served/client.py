"""HTTP requests to an endpoint: repeated after failures that may pass, with one message for the others.

Repeated, with exponential back-off and jitter or after the time that the endpoint states: status 408, 409, 425, 429 and 5xx,
a connection that is refused or cut, a body that is cut, that is not JSON or that is no answer to the request, and a request
without an answer within `timeout` seconds. Other statuses are refusals. The API key is in the request's header and nowhere
else: whatever an endpoint says is shown without it.
"""

from __future__ import annotations

import email.utils
import json
import random
import time
from collections.abc import Callable, Mapping
from typing import Any, TypeVar
from urllib.parse import quote

import httpx2
from pydantic import SecretStr

from distill.engines.served.limits import RateLimits
from distill.errors import MachineError
from distill.recipe import EngineConfig, served

FIRST_PAUSE = 0.5
LONGEST_PAUSE = 60.0
LONGEST_RETRY_AFTER = 600.0
CONNECT_TIMEOUT = 30.0
WORDS = 300
"""Characters of an endpoint's own words that a message repeats."""
PASSING = frozenset({408, 409, 425, 429, *range(500, 600)})

Answer = TypeVar("Answer")


class MalformedError(Exception):
    """An answer of status 200 that is none: half a body, wrong JSON, missing fields. `usage`: what it was billed for."""

    def __init__(self, reason: str, usage: Mapping[str, Any] | None = None) -> None:
        super().__init__(reason)
        self.usage = usage


class RefusedError(Exception):
    """The endpoint refused a request for good: its status and its own words."""

    def __init__(self, status: int, words: str) -> None:
        super().__init__(f"status {status}: {words}")
        self.status, self.words = status, words


class StoppedError(Exception):
    """The engine was closed while the request waited."""


class _PassingError(Exception):
    """A failure that may pass. after: seconds that the endpoint asks to wait; None if it does not say."""

    def __init__(self, reason: str, after: float | None = None) -> None:
        super().__init__(reason)
        self.after = after


class Client:
    """Requests to one endpoint, from many threads. Raises UserError if the key's variable is not set."""

    def __init__(self, config: EngineConfig) -> None:
        assert config.base_url is not None
        self._base = config.base_url.rstrip("/")
        self._key = SecretStr(served.secret(config.key))
        self._variable = served.variable(config.key) if config.key else None
        self._timeout, self._max_retries = config.timeout, config.max_retries
        self.limits = RateLimits(config.requests_per_minute, config.tokens_per_minute)
        key = self._key.get_secret_value()
        self._http = httpx2.Client(
            headers={"Authorization": f"Bearer {key}"} if key else {},
            timeout=httpx2.Timeout(config.timeout, connect=min(CONNECT_TIMEOUT, config.timeout)),
            limits=httpx2.Limits(max_connections=config.batch_size, max_keepalive_connections=config.batch_size),
        )

    def get(self, path: str) -> Any:
        """Return the JSON at a path. Raises RefusedError, or UserError if the endpoint cannot be reached."""
        return self._repeated("GET", path, None, "", 0, lambda tree: tree)

    def post(
        self, path: str, body: Mapping[str, Any], parse: Callable[[Any], Answer], *, once: str = "", tokens: int = 0
    ) -> Answer:
        """Send a request and return its parsed answer.

        parse: from the answer's JSON; raises MalformedError. once: an idempotency key, equal for repeated requests. tokens: the
        most that the request takes, for the limit on tokens. Raises RefusedError, StoppedError, or UserError after `max_retries`.
        """
        return self._repeated("POST", path, body, once, tokens, parse)

    def close(self) -> None:
        """End all requests, the waiting ones too."""
        self.limits.close()
        self._http.close()

    def message(self, refused: RefusedError) -> str:
        """Return a refusal as one message, with the remedy."""
        remedy = {
            400: "Change the setting that it names.",
            401: self._key_remedy(),
            403: self._key_remedy(),
            404: "Check engine.base_url (it usually ends in /v1) and engine.model.",
            413: "Lower sampling.max_tokens, or use shorter prompts.",
            422: "Change the setting that it names.",
        }
        if 300 <= refused.status < 400:
            remedy[refused.status] = "Write the address that it redirects to into engine.base_url."
        return (
            f"engine: the endpoint {self._base} refuses the request with status {refused.status}: {refused.words!r}. "
            f"{remedy.get(refused.status, 'Ask its operator.')}"
        )

    def _key_remedy(self) -> str:
        if self._variable is None:
            return "Name the environment variable that holds your key: key: $NAME."
        return f"Check the key in the environment variable {self._variable}."

    # --------------------------------------------------------------------------------------------- one request

    def _repeated(
        self,
        method: str,
        path: str,
        body: Mapping[str, Any] | None,
        once: str,
        tokens: int,
        parse: Callable[[Any], Answer],
    ) -> Answer:
        for attempt in range(self._max_retries + 1):
            self.limits.wait(tokens)
            if self.limits.closed:
                raise StoppedError
            try:
                return parse(self._sent(method, path, body, once))
            except MalformedError as error:
                failure = _PassingError(f"its answer is of no use: {self._shown(str(error))}")
            except _PassingError as error:
                failure = error
            if attempt < self._max_retries:
                self._pause(attempt, failure.after)
        raise MachineError(
            f"engine: the endpoint {self._base} did not answer a request in {self._max_retries + 1} "
            f"{'attempt' if self._max_retries == 0 else 'attempts'}; the last time: {failure}. Run the same command again when it "
            "works: what was answered is kept."
        )

    def _pause(self, attempt: int, after: float | None) -> None:
        if after is not None:
            # The limit is the account's, not the request's: all threads wait.
            self.limits.pause(min(after, LONGEST_RETRY_AFTER))
            return
        longest = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0**attempt)
        self.limits.sleep(longest * random.uniform(0.5, 1.0))

    def _sent(self, method: str, path: str, body: Mapping[str, Any] | None, once: str) -> Any:
        """Send a request once and return the answer's JSON. Raises RefusedError, StoppedError or _PassingError."""
        headers = {"Idempotency-Key": once} if once else {}
        deadline = time.monotonic() + self._timeout
        try:
            with self._http.stream(method, self._base + path, json=body, headers=headers) as response:
                data = bytearray()
                for chunk in response.iter_bytes():
                    data += chunk
                    if time.monotonic() > deadline:
                        raise _PassingError(f"no whole answer within {self._timeout:g} seconds (engine.timeout)")
        except (httpx2.TimeoutException, TimeoutError):
            raise _PassingError(f"no answer within {self._timeout:g} seconds (engine.timeout)") from None
        except (httpx2.TransportError, httpx2.DecodingError, httpx2.StreamError, OSError) as error:
            if self.limits.closed:
                raise StoppedError from None
            raise _PassingError(f"the connection failed ({self._shown(str(error)) or type(error).__name__})") from None
        except RuntimeError:
            if self.limits.closed:  # the client was closed by another thread
                raise StoppedError from None
            raise
        return self._json(response, bytes(data))

    def _json(self, response: httpx2.Response, data: bytes) -> Any:
        text = data.decode("utf-8", "replace")
        if response.status_code in PASSING:
            after = _retry_after(response.headers.get("Retry-After"))
            raise _PassingError(f"status {response.status_code}: {self._words(text)!r}", after)
        if response.status_code != 200:
            where = response.headers.get("Location", "")
            raise RefusedError(response.status_code, self._words(text) or self._shown(where))
        try:
            return json.loads(text)
        except ValueError:
            raise _PassingError(f"its answer is not JSON: {self._shown(text)[:WORDS]!r}") from None

    def _words(self, text: str) -> str:
        """Return the message in the body of an error."""
        try:
            tree = json.loads(text)
        except ValueError:
            return self._shown(text)[:WORDS]
        error = tree.get("error", tree) if isinstance(tree, dict) else tree
        for key in ("message", "detail", "error"):
            if isinstance(error, dict) and key in error:
                error = error[key]
        return self._shown(error if isinstance(error, str) else json.dumps(error))[:WORDS]

    def _shown(self, text: str) -> str:
        """Return a text in one line and without the key, however the endpoint wrote it."""
        key = self._key.get_secret_value()
        if key:
            for form in {key, json.dumps(key)[1:-1], quote(key), quote(key, safe="")}:
                text = text.replace(form, "[key]")
        return " ".join(text.split())


def _retry_after(header: str | None) -> float | None:
    """Return the seconds of a Retry-After header, which states seconds or a date; None without one."""
    if header is None:
        return None
    try:
        return max(0.0, float(header))
    except ValueError:
        pass
    try:
        return max(0.0, email.utils.parsedate_to_datetime(header).timestamp() - time.time())
    except ValueError:
        return None
