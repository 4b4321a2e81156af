"""Write worded_sums.jsonl: worked sums of three numbers, in many orders and many wordings.

    python data/cold_start/make_worded_sums.py

The numbers are added in any order, and each clause picks its words at random from near-equal ones, so a model that learns
these rows has several right ways to go on at most positions.
"""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

from distill.tasks import reasoning_gym

ROWS = 960
SEED = 1
OPTIONS = {
    "min_terms": 3,
    "max_terms": 3,
    "min_digits": 1,
    "max_digits": 1,
    "operators": ["+"],
    "allow_parentheses": False,
    "allow_negation": False,
}

OPENINGS = ["Okay", "Well", "Right", "So", "Now", "First", "Sure", "Fine", "Yes", "Good", "Look", "Here"]
MARKS = [",", ":"]
JOINS = ["and", "plus", "with"]
MAKES = ["makes", "is", "gives", "equals", "becomes", "totals"]
LINKS = [",", ";"]
ORDERS = ["then", "next", "now", "so", "also"]
WAYS = ["with", "adding", "plus", "including"]
THINGS = ["it", "that", "this", "all"]
PEOPLE = ["we", "you", "I", "they"]
GET = ["get", "have", "reach", "find"]


def worked(numbers: list[int], draw: random.Random) -> str:
    """A worked completion, such as ` Well, 8 and 7 makes 15; then adding 4 we get 19.`"""
    first, second, third = draw.sample(numbers, 3)
    one = draw.choice
    total = first + second + third
    says = f"{one(THINGS)} {one(MAKES)}" if draw.random() < 0.5 else f"{one(PEOPLE)} {one(GET)}"
    return (
        f" {one(OPENINGS)}{one(MARKS)} {first} {one(JOINS)} {second} {one(MAKES)} {first + second}{one(LINKS)} {one(ORDERS)} "
        f"{one(WAYS)} {third} {says} {total}."
    )


def main() -> None:
    task = reasoning_gym("sums", dataset="basic_arithmetic", options=OPTIONS, template="raw")
    draw = random.Random(SEED)
    rows = [
        {
            "question": problem.question,
            "completion": worked([int(number) for number in re.findall(r"\d+", problem.question)], draw),
        }
        for problem in task.problems("train", ROWS, seed=SEED)
    ]
    lines = "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)
    Path(__file__).with_name("worded_sums.jsonl").write_text(lines, encoding="utf-8")


if __name__ == "__main__":
    main()
