"""Audit: check that stored distributions are those of the model that the traces name, by scoring random positions again.

Input: a folder of traces (or a selection), and the model, given or found through the run that contains the folder. Output:
a certificate, printed and stored beside the manifest for the data card. It is valid while the content's fingerprint is
unchanged.

The differences include everything in which two computations of one number may differ: the codec's rounding, the order of
sums in other batches, another engine if one is given. Checksums of the files are the work of `verify`.
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
from distill.recipe import EngineConfig, GenerateStage, ModelConfig, ScoreStage, served
from distill.records import Array, Completion, Engine, Request, TopK, Traces, UserError
from distill.run.trials.engine_path import MAX_MEAN
from distill.stages.sampling import context_length
from distill.stages.trace_sampling import package_versions
from distill.traces import provenance
from distill.traces.reader import TraceReader, open_traces

MARGIN = 16
"""Entries requested beyond the stored number: near the end of the list two computations rank them differently."""


@dataclass(frozen=True, slots=True)
class Certificate:
    """The result of an audit; all differences are absolute, in nats.

    token_*: of the log-probability of the trace's own token. entry_*: of the log-probabilities of stored entries; an entry
    that the engine does not list counts with the smallest log-probability listed (there are `unlisted` of them). kl_*:
    KL(stored || scored again), over the stored entries and the tail. fingerprint: of the traces' content.
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
        """Whether the model can have written the traces: sampled tokens differ by no more than between engines."""
        return self.token_mean <= MAX_MEAN

    def __str__(self) -> str:
        lines = [
            f"{self.positions:,} positions of {self.traces:,} traces scored again with {self.model} "
            f"(weights {self.weights}, {self.engine}, {self.dtype}):",
            f"  sampled tokens: mean difference {self.token_mean:.2g} nat, largest {self.token_worst:.2g}",
        ]
        if self.entry_worst or self.kl_worst:
            lines += [
                f"  stored entries: mean difference {self.entry_mean:.2g} nat, largest {self.entry_worst:.2g}",
                f"  KL(stored || scored again): mean {self.kl_mean:.2g} nat, largest {self.kl_worst:.2g}",
            ]
        if not self.ok:
            lines.append(
                f"  these are not the distributions of that model: the mean difference between two engines is below {MAX_MEAN}"
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

    model: a folder, hub id or package:// source; None: the one of the run's recipe. engine: a name; None: the one that
    wrote the traces. screen: progress display; None: one on stdout. Raises UserError if the model cannot be found or its
    weights are not those that the traces name.
    """
    screen = screen or Screen()
    reader = open_traces(path)
    if not path.is_dir():
        raise UserError(f"{path}: an audit needs a folder of traces, because it stores its certificate there.")
    claim = reader.metadata
    model_dir, config = _model(reader, model, screen)
    if engine is not None and engine != config.fn:
        config = config.model_copy(update={"fn": engine})
    screen.phase(f"reading the weights of {model_dir.name}", after=PATIENCE)
    found = models.weights_fingerprint(model_dir)
    if found != claim.weights:
        raise UserError(
            f"{path}: its traces were written by {claim.model} with the weights {claim.weights}; those in {model_dir} are "
            f"{found}. Give the model that wrote the traces with --model."
        )
    chosen = _choose(reader, num, seed)
    # These must be set before vLLM is first imported.
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
    """The model's folder, and the config of the engine that wrote the traces as far as it is known."""
    if reader.metadata.engine == served.FN:
        raise UserError(
            f"{reader.path}: the weights of {reader.metadata.model!r} are behind an endpoint, so that the traces cannot be scored "
            "again here."
        )
    origin = _stage(reader)
    config = origin[1].engine if origin is not None else EngineConfig(fn=reader.metadata.engine)
    if config.fn == engines.AUTO:
        config = config.model_copy(update={"fn": reader.metadata.engine})
    if reader.metadata.dtype:
        config = config.model_copy(update={"dtype": reader.metadata.dtype})
    if model is not None:
        return models.resolve(ModelConfig(source=model), screen.phase), config
    if origin is None:
        raise UserError(
            f"{reader.path}: is not inside a run, so its model {reader.metadata.model!r} cannot be found. Give it with "
            "--model: a folder, a hub id or a package:// source."
        )
    tree, stage = origin
    run = reader.base.parent.parent
    if stage.model in tree.stages:
        return run / stage.model / "model", config
    return models.resolve(run_folder.at_commit(run, tree.models[stage.model]), screen.phase), config


def _stage(reader: TraceReader) -> tuple[recipe.Recipe, GenerateStage | ScoreStage] | None:
    """The recipe and the stage that wrote the traces, if their folder is RUN/STAGE/traces; else None."""
    stage_folder = reader.base.resolve().parent
    if not run_folder.is_run(stage_folder.parent):
        return None
    tree = run_folder.recipe(stage_folder.parent)
    stage = tree.stages.get(stage_folder.name)
    return (tree, stage) if isinstance(stage, GenerateStage | ScoreStage) else None


# -------------------------------------------------------------------------------------------- the positions


def _choose(reader: TraceReader, num: int, seed: int) -> dict[int, Array]:
    """Draw `num` positions uniformly. Returns row (in the order of `blocks`) -> its positions, ascending."""
    lengths = reader.lengths().completion.astype(np.int64)
    total = int(lengths.sum())
    if not total:
        raise UserError(f"{reader.path}: holds no completion tokens to audit.")
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
    """Yield (block, row in the block, positions) of the chosen traces; shards without any are not read."""
    flags = np.zeros(reader.num_rows, bool)
    flags[list(chosen)] = True
    positions = iter(chosen.values())
    for block in reader.where(flags).blocks(64):
        for n in range(len(block)):
            yield block, n, next(positions)


def _score(engine: Engine, block: Traces, n: int, positions: Array, top_k: int) -> Completion:
    """Score a trace up to its last chosen position."""
    ids = np.array(block.completion_ids[n][: positions[-1] + 1])
    request = Request(block.trace_id[n], np.array(block.prompt_ids[n]), completion_ids=ids)
    return next(iter(engine.score([request], top_k=top_k)))


def _compare(found: _Differences, block: Traces, n: int, positions: Array, again: Completion) -> None:
    stored = block.top_of(n)
    found.token += np.abs(block.logprob[n][positions] - again.logprob_T[positions]).tolist()
    if stored is None or again.top is None:
        return
    for t in positions[stored.count_T[positions] > 0].tolist():
        entry, kl, unlisted = _compare_position(stored.slice(t, t + 1), again.top.slice(t, t + 1))
        found.entry += entry.tolist()
        found.kl.append(kl)
        found.unlisted += unlisted


def _compare_position(stored: TopK, again: TopK) -> tuple[Array, float, int]:
    """At one position: (differences of the stored entries, KL over entries and tail, entries that the engine does not list)."""
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
