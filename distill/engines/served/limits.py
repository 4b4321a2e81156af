"""Limits on requests and tokens in any minute, and pauses that the endpoint asks for; shared by all threads of an engine."""

from __future__ import annotations

import threading
import time
from collections import deque
from collections.abc import Callable, Iterator
from contextlib import contextmanager

WINDOW = 60.0


class RateLimits:
    """Holds requests back so that no minute has more requests or tokens than allowed.

    requests, tokens: the limits; None = none. A request's tokens are its prompt and its longest completion, as providers
    count them; a request that is larger than the limit goes alone.
    """

    def __init__(self, requests: int | None, tokens: int | None, clock: Callable[[], float] = time.monotonic) -> None:
        self._requests, self._tokens, self._clock = requests, tokens, clock
        self._sent: deque[tuple[float, int]] = deque()
        self._paused_until = 0.0
        self._changed = threading.Condition()
        self._closed = False

    def wait(self, tokens: int) -> None:
        """Return when a request of so many tokens may be sent, and count it. Returns at once after `close`."""
        with self._changed:
            while not self._closed and (delay := self._delay(tokens)) > 0:
                self._changed.wait(delay)
            self._sent.append((self._clock(), tokens))

    def pause(self, seconds: float) -> None:
        """Send nothing for so many seconds."""
        with self._changed:
            self._paused_until = max(self._paused_until, self._clock() + seconds)

    def sleep(self, seconds: float) -> None:
        """Wait so many seconds, or until `close`."""
        end = self._clock() + seconds
        with self._changed:
            while not self._closed and (left := end - self._clock()) > 0:
                self._changed.wait(left)

    def close(self) -> None:
        """Hold nothing back any more: the engine stops."""
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    @contextmanager
    def stopped(self) -> Iterator[None]:
        """Within the context nothing is held back and nothing is sent any more: as after `close`."""
        self.close()
        yield
        self._closed = False

    @property
    def closed(self) -> bool:
        return self._closed

    def _delay(self, tokens: int) -> float:
        """Seconds until the request may be sent."""
        now = self._clock()
        if self._paused_until > now:
            return self._paused_until - now
        while self._sent and self._sent[0][0] <= now - WINDOW:
            self._sent.popleft()
        if not self._sent:
            return 0.0
        many = self._requests is not None and len(self._sent) >= self._requests
        large = self._tokens is not None and sum(each for _, each in self._sent) + tokens > self._tokens
        return self._sent[0][0] + WINDOW - now if many or large else 0.0
