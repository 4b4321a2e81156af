"""Cost predictions, one public function per stage kind: `kind(stage, config, known, machine) -> rows`."""

from distill.run.predictions.inference import compare, divergence, eval, filter, generate, prune, score
from distill.run.predictions.policy import grpo, on_policy
from distill.run.predictions.training import train

__all__ = ["compare", "divergence", "eval", "filter", "generate", "grpo", "on_policy", "prune", "score", "train"]
