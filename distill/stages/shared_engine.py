"""The engine of a stage's process: started when first needed, and reused for other models of the same architecture."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from safetensors import safe_open

from distill import engines, models
from distill.engines import completions
from distill.recipe import EngineConfig
from distill.records import stable_hash

if TYPE_CHECKING:
    from distill.stages.snapshots import Snapshot

NAMES_ONLY = ("_name_or_path", "transformers_version", "dtype", "torch_dtype")
"""Keys of config.json that do not affect the model's architecture."""


@dataclass(slots=True)
class SharedEngine:
    """Holds at most one engine. kind: the architecture and settings it was started with; holds: the source of its weights."""

    engine: Any = None
    kind: str = ""
    holds: str = ""

    def serves(self, config: EngineConfig, model_dir: Path, max_top_k: int, tokens: int) -> bool:
        """Return whether the current engine can run this model with new weights."""
        return (
            self.engine is not None
            and self.kind == _kind(config, model_dir, max_top_k)
            and tokens <= self.engine.max_model_len
        )

    def open(
        self,
        config: EngineConfig,
        model_dir: Path,
        *,
        max_model_len: int,
        max_top_k: int,
        snapshot: Snapshot | None = None,
    ) -> Any:
        """Return the engine with the model's weights, or with a snapshot's.

        A current engine that can run the model takes new weights, which takes about a second; otherwise it is closed first.
        """
        if not self.serves(config, model_dir, max_top_k, max_model_len):
            self._start(config, model_dir, max_model_len, max_top_k)
        wanted = str(model_dir if snapshot is None else snapshot.folder)
        if self.holds != wanted:
            weights = _weights(model_dir) if snapshot is None else iter(snapshot.weights())
            try:
                self.engine.sync(weights, version=self.engine.version + 1)
            except ValueError as error:
                if snapshot is not None:
                    raise
                print(f"the engine is restarted, because it cannot load new weights: {error}", flush=True)
                self._start(config, model_dir, max_model_len, max_top_k)
            self.holds = wanted
        return self.engine

    def _start(self, config: EngineConfig, model_dir: Path, max_model_len: int, max_top_k: int) -> None:
        self.close()
        self.engine = engines.open_engine(config, model_dir, max_model_len=max_model_len, max_top_k=max_top_k)
        self.kind, self.holds = _kind(config, model_dir, max_top_k), str(model_dir)

    def close(self) -> None:
        if self.engine is not None:
            self.engine.close()
        self.engine, self.kind, self.holds = None, "", ""


def _kind(config: EngineConfig, model_dir: Path, max_top_k: int) -> str:
    """Return the model's architecture, vocabulary and stop ids, and the engine's settings."""
    built = {k: v for k, v in models.config_of(model_dir).items() if k not in NAMES_ONLY}
    return stable_hash(
        config.model_dump_json(),
        max_top_k,
        json.dumps(built, sort_keys=True),
        *completions.vocabulary(model_dir),
    )


def _weights(model_dir: Path) -> Iterator[tuple[str, Any]]:
    """Yield (name in the checkpoint, tensor) of a folder's safetensors files."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
