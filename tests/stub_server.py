"""An endpoint of ours for the tests of the served engine: deterministic, and it misbehaves as it is told.

A completion depends on the prompt and the seed alone. It speaks like vLLM's server (`/completions` with token ids), like a
provider (`/chat/completions` only), or like one with fewer features. `faults` maps the number of a request for a completion
(0, 1, …, probes not counted) to what goes wrong with it. `answered` counts the whole answers by Idempotency-Key.
"""

from __future__ import annotations

import json
import socket
import threading
import time
from collections import Counter
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from typing import Any

import numpy as np

STOP_SHARE = 0.25
"""The probability of the end at each position."""


class Stub:
    """A stub server on localhost. A context manager; `url` is its base_url.

    speaks: "ids" (vLLM's server), "chat" (chat completions only). tokenizer: the endpoint's own. max_logprobs: more entries
    are refused. gives: it returns this many entries at most, without a word. raw: whether log-probabilities are those before
    temperature. reasoning: the field of the reasoning in a chat answer, or None. key: the API key that it wants. listing:
    whether it has /models. delay: seconds for each answer.
    """

    def __init__(self, tokenizer: Any, **options: Any) -> None:
        self.tokenizer = tokenizer
        self.speaks, self.max_logprobs, self.gives, self.raw = "ids", 20, 20, True
        self.reasoning: str | None = None
        self.key, self.listing, self.delay, self.stop_id = "", True, 0.0, 2
        self.ends_listed, self.scores, self.extra_fields, self.hidden_reasoning = True, True, True, False
        self.faults: dict[int, Any] = {}
        for name, value in options.items():
            assert hasattr(self, name), name
            setattr(self, name, value)
        self.words = words_of(tokenizer)
        self.asked: list[dict[str, Any]] = []
        self.once: list[str] = []
        self.answered: Counter[str] = Counter()
        self.times: list[float] = []
        self._lock = threading.Lock()
        self._server = ThreadingHTTPServer(("127.0.0.1", 0), self._handler())
        self._server.daemon_threads = True
        # Clients that are killed cut their connections.
        self._server.handle_error = lambda *arguments: None  # type: ignore[method-assign]
        self.url = f"http://127.0.0.1:{self._server.server_address[1]}/v1"

    def __enter__(self) -> Stub:
        threading.Thread(target=self._server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return self

    def __exit__(self, *error: object) -> None:
        self._server.shutdown()
        self._server.server_close()

    # ------------------------------------------------------------------------------------------------- requests

    def _handler(self) -> type[BaseHTTPRequestHandler]:
        stub = self

        class Handler(BaseHTTPRequestHandler):
            protocol_version = "HTTP/1.1"

            def log_message(self, *arguments: Any) -> None:
                pass

            def do_GET(self) -> None:
                if not stub._allowed(self):
                    return
                if self.path != "/v1/models" or not stub.listing:
                    stub._error(self, 404, "no such path")
                    return
                row = {"id": "tiny"} | ({"max_model_len": 256} if stub.speaks == "ids" else {})
                stub._send(self, 200, {"data": [row]})

            def do_POST(self) -> None:
                body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
                if stub._allowed(self):
                    stub._post(self, body)

        return Handler

    def _allowed(self, request: BaseHTTPRequestHandler) -> bool:
        given = request.headers.get("Authorization", "")
        if self.key and given != f"Bearer {self.key}":
            self._error(request, 401, f"Incorrect API key provided: {given}")
            return False
        return True

    def _post(self, request: BaseHTTPRequestHandler, body: dict[str, Any]) -> None:
        once = request.headers.get("Idempotency-Key", "")
        with self._lock:
            number = len(self.asked) if once else -1
            if once:
                self.asked.append(body)
                self.once.append(once)
                self.times.append(time.monotonic())
        fault = self.faults.get(number)
        if isinstance(fault, tuple):  # (status, message, headers)
            self._error(request, fault[0], fault[1], fault[2] if len(fault) > 2 else {})
            return
        if fault == "hang":
            time.sleep(3.0)
            return
        if fault == "reset":
            request.connection.setsockopt(socket.SOL_SOCKET, socket.SO_LINGER, b"\x01\x00\x00\x00\x00\x00\x00\x00")
            request.connection.close()
            return
        status, tree = self._answer(request.path, body)
        if status != 200:
            self._error(request, status, tree)
            return
        time.sleep(self.delay)
        if callable(fault):
            tree = fault(tree)
        data = json.dumps(tree).encode()
        if fault == "no json":
            data = data[: len(data) // 2]
        self._headers(request, 200, len(data), {})
        if fault == "half":
            request.wfile.write(data[: len(data) // 2])
            request.close_connection = True
            return
        request.wfile.write(data)
        request.wfile.flush()
        if once and not fault:
            with self._lock:
                self.answered[once] += 1

    def _headers(self, request: BaseHTTPRequestHandler, status: int, length: int, headers: dict[str, str]) -> None:
        request.send_response(status)
        request.send_header("Content-Type", "application/json")
        request.send_header("Content-Length", str(length))
        for name, value in headers.items():
            request.send_header(name, value)
        request.end_headers()

    def _send(self, request: BaseHTTPRequestHandler, status: int, tree: Any) -> None:
        data = json.dumps(tree).encode()
        self._headers(request, status, len(data), {})
        request.wfile.write(data)

    def _error(self, request: BaseHTTPRequestHandler, status: int, message: str, headers: Any = None) -> None:
        data = json.dumps({"error": {"message": message}}).encode()
        self._headers(request, status, len(data), headers or {})
        request.wfile.write(data)

    # -------------------------------------------------------------------------------------------------- answers

    def _answer(self, path: str, body: dict[str, Any]) -> tuple[int, Any]:
        if path == "/v1/completions" and self.speaks == "ids":
            return self._by_ids(body)
        if path == "/v1/chat/completions":
            return self._by_chat(body)
        return 404, "no such path"

    def _by_ids(self, body: dict[str, Any]) -> tuple[int, Any]:
        prompt = body["prompt"]
        ids = prompt if isinstance(prompt, list) else self.tokenizer(prompt, add_special_tokens=False)["input_ids"]
        top = body.get("logprobs")
        if max(top or 0, body.get("prompt_logprobs") or 0) > self.max_logprobs:
            return 400, f"Requested sample logprobs of {top}, which is greater than max allowed: {self.max_logprobs}"
        new, rows = self._written(ids, body, body["max_tokens"])
        choice: dict[str, Any] = {"index": 0, "text": self.tokenizer.decode(new), "token_ids": new}
        choice["prompt_token_ids"] = ids
        choice["finish_reason"] = "stop" if new[-1] == self.stop_id else "length"
        if top is not None:
            choice["logprobs"] = {
                "tokens": [f"token_id:{each}" for each in new],
                "token_logprobs": [row[token] for token, row in zip(new, rows, strict=True)],
                "top_logprobs": [self._best(row, token, top) for token, row in zip(new, rows, strict=True)],
            }
        if body.get("prompt_logprobs") is not None and self.scores:
            given: list[Any] = [None]
            for n in range(1, len(ids)):
                row = distribution(ids[:n], self.words)
                best = self._best(row, ids[n], body["prompt_logprobs"])
                given.append({name.removeprefix("token_id:"): {"logprob": value} for name, value in best.items()})
            choice["prompt_logprobs"] = given
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new)}}

    def _best(self, row: dict[int, float], token: int, top: int) -> dict[str, float]:
        best = sorted(row, key=lambda each: -row[each])[: min(top, self.gives)]
        return {f"token_id:{each}": row.get(each, -20.0) for each in dict.fromkeys([*best, token])}

    def _by_chat(self, body: dict[str, Any]) -> tuple[int, Any]:
        unknown = body.keys() & {"top_k", "min_p", "repetition_penalty"}
        if unknown and not self.extra_fields:
            return 400, f"Unrecognized request argument supplied: {sorted(unknown)[0]}"
        top = body.get("top_logprobs")
        if (top or 0) > self.max_logprobs:
            return 400, f"Invalid value for 'top_logprobs': must be less than or equal to {self.max_logprobs}"
        said = "\n".join(message["content"] for message in body["messages"])
        ids = self.tokenizer(said, add_special_tokens=False)["input_ids"]
        new, rows = self._written(ids, body, body.get("max_tokens") or body["max_completion_tokens"])
        ended = new[-1] == self.stop_id
        text = self.tokenizer.decode(new[:-1] if ended else new)
        message: dict[str, Any] = {"role": "assistant", "content": text}
        if self.reasoning is not None:
            message = {"role": "assistant", self.reasoning: "Let me\nthink.", "content": text}
        choice: dict[str, Any] = {"index": 0, "message": message, "finish_reason": "stop" if ended else "length"}
        if body.get("logprobs"):
            listed = new if self.ends_listed or not ended else new[:-1]
            choice["logprobs"] = {
                "content": [self._item(token, row, top) for token, row in zip(listed, rows, strict=False)]
            }
        return 200, {"choices": [choice], "usage": {"prompt_tokens": len(ids), "completion_tokens": len(new)}}

    def _item(self, token: int, row: dict[int, float], top: int) -> dict[str, Any]:
        def named(each: int) -> dict[str, Any]:
            text = self.tokenizer.decode([each])
            return {"token": text, "bytes": list(text.encode()), "logprob": row[each]}

        best = sorted(row, key=lambda each: -row[each])[: min(top, self.gives)]
        return {**named(token), "top_logprobs": [named(each) for each in best]}

    def _written(self, ids: list[int], body: dict[str, Any], limit: int) -> tuple[list[int], list[dict[int, float]]]:
        """The completion of a prompt, and the distribution at each position."""
        new: list[int] = []
        rows = []
        generator = np.random.default_rng([body.get("seed", 0) & 0xFFFFFFFF, len(ids), *ids[-8:]])
        while len(new) < limit and (not new or new[-1] != self.stop_id):
            row = distribution([*ids, *new], self.words, self.stop_id)
            # No completion is empty: the end is never its first token.
            may = [each for each in row if new or each != self.stop_id]
            if body.get("temperature") == 0:
                token = max(may, key=lambda each: row[each])
            else:
                share = np.exp([row[each] for each in may])
                token = int(generator.choice(may, p=share / share.sum()))
            if not self.raw and body.get("temperature", 1.0) not in (0, 1.0):
                warm = np.array(list(row.values())) / body["temperature"]
                warm -= np.log(np.exp(warm).sum())
                row = dict(zip(row, warm.tolist(), strict=True))
            new.append(token)
            rows.append(row)
        return new, rows


def words_of(tokenizer: Any) -> list[int]:
    """Some tokens that are whole words, or the beginnings of some."""
    texts = [tokenizer.decode([each]) for each in range(1000, 2000)]
    return [1000 + n for n, text in enumerate(texts) if text.strip().isascii() and text.strip().isalpha()]


def distribution(ids: list[int], words: list[int], stop_id: int = 2) -> dict[int, float]:
    """A distribution of 40 tokens (and a little mass for all others) that depends on the last ids."""
    generator = np.random.default_rng([len(ids), *ids[-4:]])
    chosen = [stop_id, *(int(each) for each in generator.choice(words, 39, replace=False))]
    share = generator.dirichlet(np.ones(39)) * (0.99 - STOP_SHARE)
    return dict(zip(chosen, np.log([STOP_SHARE, *np.maximum(share, 1e-9)]).tolist(), strict=True))
