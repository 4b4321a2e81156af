"""TRL's SFTTrainer on stored distributions. Needs `pip install trl`; see `trainer.KLTrainerMixin`."""

from __future__ import annotations

from trl import SFTTrainer

from distill.integrations.trainer import KLTrainerMixin


class KLSFTTrainer(KLTrainerMixin, SFTTrainer):  # type: ignore[misc]
    """Train by a loss on stored distributions in SFTTrainer; arguments as SFTTrainer's, and those of `KLTrainerMixin`."""
