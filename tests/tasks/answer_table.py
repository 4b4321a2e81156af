r"""Answers with their verdicts, as a person would give them.

`answers.jsonl` has a pair a line: kind, gold, answer, and whether the answer is right. The right ones are right answers in
odd clothes, the wrong ones are wrong in good ones: what models write under `\boxed{}` and `<answer>`, and the traps
known of the libraries for it. The right answers that the judge is known to miss are in the file as well.
"""

import json
from pathlib import Path

ROWS = [json.loads(line) for line in (Path(__file__).parent / "answers.jsonl").read_text(encoding="utf-8").splitlines()]
KINDS = {
    kind: tuple(
        [(row["gold"], row["answer"]) for row in ROWS if row["kind"] == kind and row["right"] is right]
        for right in (True, False)
    )
    for kind in dict.fromkeys(row["kind"] for row in ROWS)
}

# Whole completions: (template, gold, completion). The answer is the last one after the reasoning, and nothing else is.
RIGHT_COMPLETIONS = [
    ("think_answer", "4", "<think>2+2 is 4</think><answer>4</answer>"),
    ("think_answer", "4", "<think>3? no, 4</think>\nSo:\n<answer> 4. </answer>\n"),
    ("think_answer", "4", r"<think>so</think><answer>\boxed{4}</answer>"),
    ("think_answer", "4", r"<think>so</think><answer>$\boxed{4}$</answer>"),
    ("think_answer", "4", "<think>so</think><answer>3</answer> Wait, no. <answer>4</answer>"),
    ("think_answer", "4", "<think><answer>3</answer></think><answer>4</answer>"),
    ("think_answer", "4", "<answer>The answer is 4</answer>"),
    ("think_answer", "1/2", "<think>so</think><answer>\n0.5\n</answer> I am sure."),
    ("boxed", "4", r"Two and two make \boxed{4}."),
    ("boxed", "4", r"First \boxed{3}; I was wrong: \boxed{4}"),
    ("boxed", "4", r"<think>\boxed{3}</think> The sum is \boxed{4}"),
    ("boxed", "4", r"so</think> The sum is \boxed{4}"),
    ("boxed", r"\frac{1}{2}", r"It is $\boxed{\dfrac{1}{2}}$ of them."),
    ("boxed", r"\{1,2\}", r"\[ \boxed{\{2, 1\}} \]"),
    ("boxed", "4", r"\boxed{4} (not \boxed{5"),
    ("raw", "4", "2 and 2 is 4"),
    ("raw", "1234", "I count 3 of them, 1,234 in all."),
    ("raw", "Tuesday", "Let me see.\nTuesday\n"),
]

WRONG_COMPLETIONS = [
    ("think_answer", "4", "4"),
    ("think_answer", "4", "<think>so <answer>4</answer>"),
    ("think_answer", "4", "<think>so <answer>4</answer></think>"),
    ("think_answer", "4", "<think>so</think><answer>4"),
    ("think_answer", "4", "<think>so</think>4"),
    ("think_answer", "4", r"<think>so</think>\boxed{4}"),
    ("think_answer", "4", "<think>so</think><answer>4</answer> Wait, no. <answer>5</answer>"),
    ("think_answer", "4", "<think>so</think><answer>3, no, 4</answer>"),
    ("think_answer", "4", "<think>so</think><answer>3 or 4</answer>"),
    ("think_answer", "4", "<think>so</think><answer></answer>"),
    ("think_answer", "4", "<answer>4</answer><think>but then"),
    ("boxed", "4", r"<think>so \boxed{4}</think> The sum is four."),
    ("boxed", "4", r"<think>so \boxed{4}"),
    ("boxed", "4", r"\boxed{4}, no, \boxed{5}"),
    ("boxed", "4", r"\boxed{3}\boxed{5}"),
    ("boxed", "4", r"\boxed{4"),
    ("boxed", "4", r"\boxed{}"),
    ("boxed", "4", "The answer is 4."),
    ("boxed", "45", r"\boxed{4}\boxed{5}"),
    ("raw", "4", "4 and 5"),
    ("raw", "4", ""),
    ("raw", "4", "<think>4"),
    ("raw", "4", "<think>4</think>"),
    ("raw", "Tuesday", "Tuesday\nor Wednesday"),
]
