"""Cost predictions for stages whose model runs behind an endpoint: money and time, and nothing of this machine."""

from __future__ import annotations

from distill.compute import estimate
from distill.recipe import EngineConfig
from distill.run.predictions.row import Row, make_amounts

TOKEN_RATE = 50.0
"""Assumed tokens per second of one completion at an endpoint."""
PROMPT_RATE = 2000.0
"""Assumed tokens of a prompt per second."""


def row(
    name: str,
    kind: str,
    engine: EngineConfig,
    *,
    requests: float,
    prompt: float,
    reply: float,
    written: float,
    top_logprobs: int,
) -> Row:
    """The prediction for a stage that sends `requests` of mean tokens `prompt` and `reply`; written: bytes of its shards."""
    latency = prompt / PROMPT_RATE + reply / TOKEN_RATE
    seconds = requests * latency / min(engine.batch_size, max(requests, 1))
    if engine.requests_per_minute is not None:
        seconds = max(seconds, 60.0 * requests / engine.requests_per_minute)
    if engine.tokens_per_minute is not None:
        seconds = max(seconds, 60.0 * requests * (prompt + reply) / engine.tokens_per_minute)
    price = engine.price
    paid = 0.0 if price is None else requests * (prompt * price.input + reply * price.output) / 1e6
    amounts = make_amounts(
        tokens=requests * (prompt + reply),
        bytes=written,
        seconds=estimate.PROCESS_START + seconds,
        dollars=paid,
    )
    return Row(name, kind, amounts, notes=_notes(name, engine, top_logprobs), start=estimate.PROCESS_START)


def _notes(name: str, engine: EngineConfig, top_logprobs: int) -> tuple[str, ...]:
    notes = [f"{name}: {engine.base_url} answers; its time is a guess of {TOKEN_RATE:g} tokens per second and request"]
    if engine.price is None:
        notes.append(
            f"{name}: what it costs is not known; set engine.price: {{input: …, output: …}} in dollars per million tokens"
        )
    if top_logprobs > 20:
        notes.append(
            f"{name}: top_logprobs is {top_logprobs}, but providers give 20 or fewer, and vLLM's server gives more only with "
            "--max-logprobs; the endpoint is asked before the first request"
        )
    return tuple(notes)
