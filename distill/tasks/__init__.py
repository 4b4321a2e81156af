"""Tasks: sources of problems with their judge. Every public function here is a task that a recipe can name."""

from distill.tasks.hub_task import hub
from distill.tasks.humaneval import humaneval
from distill.tasks.jsonl_task import jsonl
from distill.tasks.reasoning_gym_task import reasoning_gym

__all__ = ["hub", "humaneval", "jsonl", "reasoning_gym"]
