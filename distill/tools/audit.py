"""Audit traces: score random positions again to check that the distributions are those of the named weights.

In: a folder of traces (or a selection), and the model, found by name or through the run that the folder lies in. Out:
a certificate, printed and stored beside the manifest, for the data card. It is valid for the content's fingerprint.

The differences include everything between two computations of one number: the codec's rounding, other summation orders in
other batches, another engine if one is named. Files are checked by `traces.verify`.
"""

from __future__ import annotations

import os
import time
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np

from distill import engines, models, recipe, run_folder
from distill.progress import PATIENCE, Screen
from distill.recipe import EngineConfig, GenerateStage, ModelConfig, ScoreStage
from distill.records import Array, Completion, Engine, Request, TopK, Traces, UserError
from distill.stages.sampling import context_length
from distill.stages.trace_sampling import package_versions
from distill.traces import provenance
from distill.traces.reader import TraceReader, open_traces

MARGIN = 16
"""The number of entries requested beyond the stored ones: near the end of the list two computations may order them differently."""
MAX_MEAN = 0.05
"""Nats. In bfloat16 engines differ by less than 0.02 on average; other weights differ by tenths of a nat or more."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The result of an audit; all differences are absolute, in nats.

    token_*: of the trace's own token. entry_*: of a kept entry; an entry that the engine does not return counts with the
    lowest value that it returns (`unlisted` is the number of these). kl_*: KL of the stored distribution from the
    new one, on the kept entries and the tail. fingerprint: of the traces' content.
    """

    positions: int
    traces: int
    token_mean: float
    token_worst: float
    entry_mean: float
    entry_worst: float
    kl_mean: float
    kl_worst: float
    unlisted: int
    seed: int
    model: str
    weights: str
    engine: str
    dtype: str
    fingerprint: str
    date: str
    versions: dict[str, str]

    @property
    def ok(self) -> bool:
        """Whether these can be the weights: the sampled tokens differ no more than between engines."""
        return self.token_mean <= MAX_MEAN

    def __str__(self) -> str:
        lines = [
            f"{self.positions:,} positions of {self.traces:,} traces scored again with {self.model} "
            f"(weights {self.weights}, {self.engine}, {self.dtype}):",
            f"  the trace's token: mean difference {self.token_mean:.2g} nat, worst {self.token_worst:.2g}",
        ]
        if self.entry_worst or self.kl_worst:
            lines += [
                f"  kept entries: mean difference {self.entry_mean:.2g} nat, worst {self.entry_worst:.2g}",
                f"  KL of stored from scored again: mean {self.kl_mean:.2g} nat, worst {self.kl_worst:.2g}",
            ]
        if not self.ok:
            lines.append(
                f"  these are not the distributions of that model: engines differ by less than {MAX_MEAN} on average"
            )
        return "\n".join(lines)


def audit(
    path: Path,
    num: int,
    *,
    model: str | None = None,
    engine: str | None = None,
    seed: int = 0,
    screen: Screen | None = None,
) -> Certificate:
    """Score `num` random positions again (all, if there are fewer) and store the certificate beside the traces.

    model: a folder, hub id or package:// source; None: the model of the run's recipe. engine: by name; None: the one
    that wrote the traces. screen: shows progress; None: one on stdout. Raises UserError if the model cannot
    be found or its weights are not those that the traces name.
    """
    screen = screen or Screen()
    reader = open_traces(path)
    if not path.is_dir():
        raise UserError(f"{path}: audit a folder: the certificate stands beside its manifest.")
    claim = reader.metadata
    model_dir, config = _model(reader, model, screen)
    if engine is not None and engine != config.fn:
        config = config.model_copy(update={"fn": engine})
    screen.phase(f"reading the weights of {model_dir.name}", after=PATIENCE)
    found = models.weights_fingerprint(model_dir)
    if found != claim.weights:
        raise UserError(
            f"{path}: its traces are by {claim.model} with the weights {claim.weights}; {model_dir} has {found}. Those "
            "cannot vouch for them: give the model that wrote the traces with --model."
        )
    chosen = _choose(reader, num, seed)
    # Before the engine's first import of vLLM.
    os.environ.update(engines.environment(config))
    differences = _differences(reader, chosen, config, model_dir, screen)
    certificate = Certificate(
        positions=len(differences.token),
        traces=len(chosen),
        token_mean=_mean(differences.token),
        token_worst=_worst(differences.token),
        entry_mean=_mean(differences.entry),
        entry_worst=_worst(differences.entry),
        kl_mean=_mean(differences.kl),
        kl_worst=_worst(differences.kl),
        unlisted=differences.unlisted,
        seed=seed,
        model=claim.model,
        weights=claim.weights,
        engine=config.fn,
        dtype="float32" if config.fn == "reference" else config.dtype,
        fingerprint=reader.fingerprint,
        date=time.strftime("%Y-%m-%d"),
        versions=package_versions(),
    )
    provenance.write_certificate(path, asdict(certificate))
    return certificate


# ------------------------------------------------------------------------------------------------ the model


def _model(reader: TraceReader, model: str | None, screen: Screen) -> tuple[Path, EngineConfig]:
    """Return the model's folder, and the engine that wrote the traces if known."""
    made = _stage(reader)
    config = made[1].engine if made is not None else EngineConfig(fn=reader.metadata.engine)
    if config.fn == engines.AUTO:
        config = config.model_copy(update={"fn": reader.metadata.engine})
    if reader.metadata.dtype:
        config = config.model_copy(update={"dtype": reader.metadata.dtype})
    if model is not None:
        return models.resolve(ModelConfig(source=model), screen.phase), config
    if made is None:
        raise UserError(
            f"{reader.path}: does not lie in a run, so nothing says where its model {reader.metadata.model!r} is. Name it "
            "with --model: a folder, a hub id or a package:// source."
        )
    tree, stage = made
    run = reader.base.parent.parent
    if stage.model in tree.stages:
        return run / stage.model / "model", config
    return models.resolve(tree.models[stage.model], screen.phase), config


def _stage(reader: TraceReader) -> tuple[recipe.Recipe, GenerateStage | ScoreStage] | None:
    """Return the recipe and the stage that wrote the traces, if they lie in RUN/STAGE/traces."""
    stage_folder = reader.base.resolve().parent
    if not run_folder.is_run(stage_folder.parent):
        return None
    tree = run_folder.recipe(stage_folder.parent)
    stage = tree.stages.get(stage_folder.name)
    return (tree, stage) if isinstance(stage, GenerateStage | ScoreStage) else None


# -------------------------------------------------------------------------------------------- the positions


def _choose(reader: TraceReader, num: int, seed: int) -> dict[int, Array]:
    """Choose positions uniformly: row (in the order of `blocks`) -> its positions, ascending."""
    lengths = reader.lengths().completion.astype(np.int64)
    total = int(lengths.sum())
    if not total:
        raise UserError(f"{reader.path}: has no position to audit.")
    drawn = np.sort(np.random.default_rng(seed).choice(total, min(num, total), replace=False))
    ends = np.cumsum(lengths)
    row = np.searchsorted(ends, drawn, side="right")
    position = drawn - (ends - lengths)[row]
    return {int(n): position[row == n] for n in np.unique(row)}


@dataclass(slots=True)
class _Differences:
    token: list[float]
    entry: list[float]
    kl: list[float]
    unlisted: int = 0


def _differences(
    reader: TraceReader,
    chosen: dict[int, Array],
    config: EngineConfig,
    model_dir: Path,
    screen: Screen,
) -> _Differences:
    lengths = reader.lengths()
    longest = max(int(lengths.prompt[n]) + int(p[-1]) + 1 for n, p in chosen.items())
    limit = models.config_of(model_dir).get("max_position_embeddings") or 1 << 60
    top_k = reader.metadata.top_k
    top_k = min(top_k + MARGIN, reader.metadata.vocab_size) if top_k else 0
    screen.phase(f"starting the {config.fn} engine")
    engine = engines.open_engine(config, model_dir, max_model_len=context_length(longest, limit), max_top_k=top_k)
    live = screen.live(len(chosen), "traces")
    found = _Differences([], [], [])
    try:
        for number, (block, n, positions) in enumerate(_rows(reader, chosen), 1):
            _compare(found, block, n, positions, _score(engine, block, n, positions, top_k))
            live.update(number)
    finally:
        live.close()
        engine.close()
    return found


def _rows(reader: TraceReader, chosen: dict[int, Array]) -> Iterator[tuple[Traces, int, Array]]:
    """Yield (block, row in it, positions) of the chosen traces; shards without one are not read."""
    flags = np.zeros(reader.num_rows, bool)
    flags[list(chosen)] = True
    positions = iter(chosen.values())
    for block in reader.where(flags).blocks(64):
        for n in range(len(block)):
            yield block, n, next(positions)


def _score(engine: Engine, block: Traces, n: int, positions: Array, top_k: int) -> Completion:
    """Score the trace up to the last chosen position."""
    ids = np.array(block.completion_ids[n][: positions[-1] + 1])
    request = Request(block.trace_id[n], np.array(block.prompt_ids[n]), completion_ids=ids)
    return next(iter(engine.score([request], top_k=top_k)))


def _compare(found: _Differences, block: Traces, n: int, positions: Array, again: Completion) -> None:
    stored = block.top_of(n)
    found.token += np.abs(block.logprob[n][positions] - again.logprob_T[positions]).tolist()
    if stored is None or again.top is None:
        return
    for t in positions.tolist():
        entry, kl, unlisted = _compare_position(stored.slice(t, t + 1), again.top.slice(t, t + 1))
        found.entry += entry.tolist()
        found.kl.append(kl)
        found.unlisted += unlisted


def _compare_position(stored: TopK, again: TopK) -> tuple[Array, float, int]:
    """Return (differences of the kept entries, KL on entries and tail, number of unlisted entries) at a position."""
    listed = dict(zip(again.ids_E.tolist(), again.logp_E.tolist(), strict=True))
    least = float(again.logp_E.min())
    logq = np.array([listed.get(i, least) for i in stored.ids_E.tolist()], np.float64)
    logp = stored.logp_E.astype(np.float64)
    unlisted = sum(i not in listed for i in stored.ids_E.tolist())
    p_tail = float(np.exp(np.float64(stored.tail_T[0])))
    q_tail = max(1.0 - float(np.exp(logq).sum()), 1e-12)
    kl = float((np.exp(logp) * (logp - logq)).sum())
    if p_tail > 0:
        kl += p_tail * float(np.log(p_tail) - np.log(q_tail))
    return np.abs(logp - logq), max(kl, 0.0), unlisted


def _mean(values: list[float]) -> float:
    return float(np.mean(values)) if values else 0.0


def _worst(values: list[float]) -> float:
    return max(values, default=0.0)
