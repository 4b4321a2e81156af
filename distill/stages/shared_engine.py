"""The engine of a stage's process: started when it is first needed, and given other models' weights where they fit."""

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
"""Keys of config.json that do not say how the model is built."""


@dataclass(slots=True)
class SharedEngine:
    """At most one engine. kind: what an engine must have been started for to serve; holds: where its weights are from."""

    engine: Any = None
    kind: str = ""
    holds: str = ""

    def serves(self, config: EngineConfig, model_dir: Path, max_top_k: int, tokens: int) -> bool:
        """Whether the engine that is there can run this model once it has its weights."""
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
        """The engine with the model's weights, or those of a snapshot of its way.

        An engine that is there and serves takes new weights, which is a matter of a second; any other is closed first.
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
                print(f"started anew, since the engine cannot take new weights: {error}", flush=True)
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
    """How the model is built, its vocabulary and stop ids, and how the engine was asked to run it."""
    built = {k: v for k, v in models.config_of(model_dir).items() if k not in NAMES_ONLY}
    return stable_hash(
        config.model_dump_json(),
        max_top_k,
        json.dumps(built, sort_keys=True),
        *completions.vocabulary(model_dir),
    )


def _weights(model_dir: Path) -> Iterator[tuple[str, Any]]:
    """(name in the checkpoint, tensor) of a folder's safetensors files."""
    for path in sorted(model_dir.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                yield name, file.get_tensor(name)
