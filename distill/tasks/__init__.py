"""Problems and the one judge of answers: every public function here is a task that a recipe can name."""

from distill.tasks.files import jsonl
from distill.tasks.generated import reasoning_gym
from distill.tasks.hosted import hub
from distill.tasks.humaneval import humaneval

__all__ = ["hub", "humaneval", "jsonl", "reasoning_gym"]
