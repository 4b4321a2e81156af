"""Write sums.jsonl: worked two-digit additions from the train split of the quickstart's task.

python data/cold_start/make_sums.py
"""

from __future__ import annotations

import json
import re
from pathlib import Path

from distill.tasks import reasoning_gym

ROWS = 960
OPTIONS = {
    "min_terms": 2,
    "max_terms": 2,
    "min_digits": 2,
    "max_digits": 2,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}


def worked(question: str) -> str:
    """The worked completion of a question: units, then tens with the carry, such as `7+8=15, 4+3+1=8` for 47 + 38."""
    a, b = (int(number) for number in re.findall(r"\d+", question))
    units = a % 10 + b % 10
    carry = units // 10
    tens = a // 10 + b // 10 + carry
    steps = f"{a % 10}+{b % 10}={units}, {a // 10}+{b // 10}+{carry}={tens}"
    return f"<think>{steps}</think><answer>{a + b}</answer>"


def main() -> None:
    task = reasoning_gym("sums", dataset="basic_arithmetic", options=OPTIONS)
    rows = [
        {"question": problem.question, "completion": worked(problem.question)}
        for problem in task.problems("train", ROWS, seed=1)
    ]
    lines = "".join(json.dumps(row) + "\n" for row in rows)
    Path(__file__).with_name("sums.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
