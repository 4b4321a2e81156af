"""Measure the judge of answers: labelled pairs by kind, another library's own test suite, model answers, speed.

    python tests/bench/bench_answers.py                               our table
    python tests/bench/bench_answers.py --math-verify CHECKOUT        the pairs in that checkout's tests/
    python tests/bench/bench_answers.py --gsm8k example_model_solutions.jsonl

Math-Verify extracts an answer from a whole completion and then compares; the judge only compares, so the answer is
cut out first: the last boxes, else the last formula, else the text. Its policy is laxer on purpose in places (a
restatement, a contradiction whose end is right, a decimal comma); these pairs are printed, not hidden.
"""

from __future__ import annotations

import argparse
import ast
import json
import re
import sys
import time
from collections.abc import Iterable, Iterator
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tasks"))

from answer_table import KINDS

from distill.tasks import templates
from distill.tasks.judge.verdict import math_verdict

Pair = tuple[str, str]


def measure(kinds: Iterable[tuple[str, list[Pair], list[Pair]]], show: bool) -> None:
    """A row a kind: recall of its right pairs, and how many of its wrong ones are accepted or undecided."""
    print(f"{'kind':44} {'right':>6} {'found':>6} {'recall':>7} {'wrong':>6} {'accepted':>9} {'precision':>10}")
    totals = [0, 0, 0, 0]
    for kind, right, wrong in kinds:
        missed = [pair for pair in right if math_verdict(pair[1], pair[0]).correct is not True]
        accepted = [pair for pair in wrong if math_verdict(pair[1], pair[0]).correct is not False]
        found = len(right) - len(missed)
        row = (len(right), found, len(wrong), len(accepted))
        totals = [total + value for total, value in zip(totals, row, strict=True)]
        print(_row(kind, *row))
        if show:
            for word, pairs in (("missed", missed), ("accepted", accepted)):
                for gold, answer in pairs:
                    print(f"    {word}: gold {gold[:70]!r} answer {answer[:70]!r}")
    print(_row("all", *totals))


def _row(kind: str, right: int, found: int, wrong: int, accepted: int) -> str:
    recall = found / right if right else 1.0
    precision = found / (found + accepted) if found + accepted else 1.0
    return f"{kind:44} {right:6} {found:6} {recall:7.3f} {wrong:6} {accepted:9} {precision:10.3f}"


# ------------------------------------------------------------------------------------- Math-Verify's own tests


def suite(checkout: Path) -> Iterator[tuple[str, list[Pair], list[Pair]]]:
    """By test function: the (gold, answer) pairs that it wants equal, and those it wants unequal."""
    for file in sorted((checkout / "tests").glob("test_*.py")):
        for function in ast.walk(ast.parse(file.read_text())):
            if isinstance(function, ast.FunctionDef):
                right: list[Pair] = []
                wrong: list[Pair] = []
                for row in _rows(function):
                    gold, answer, *rest = row
                    if not (isinstance(gold, str) and isinstance(answer, str)):
                        continue
                    wanted = next((value for value in rest if value in (0, 1)), None)
                    if wanted is not None:
                        (right if wanted else wrong).append((cut_out(gold), cut_out(answer)))
                if right or wrong:
                    yield f"{file.stem[5:]}: {function.name[5:]}", right, wrong


def _rows(function: ast.FunctionDef) -> Iterator[tuple[object, ...]]:
    for decorator in function.decorator_list:
        if isinstance(decorator, ast.Call) and ast.unparse(decorator.func).endswith("parametrize"):
            for row in getattr(decorator.args[1], "elts", ()):
                try:
                    value = ast.literal_eval(row)
                except ValueError:  # computed, not written out
                    continue
                if isinstance(value, tuple) and len(value) >= 3:
                    yield value


_FORMULA = re.compile(r"\$\$(.+?)\$\$|(?<!\\)\$((?:\\\$|[^$\n])+)\$|\\\[(.+?)\\\]|\\\((.+?)\\\)", re.DOTALL)


_COMMANDS = re.compile(r"\\\\(?=(?:boxed|text|left|right|frac|le|sqrt|pi)(?![a-zA-Z]))")
_NUMBER = re.compile(r"(?<![\w.,])-?\d[\d,]*(?:\.\d+)?(?:/\d+)?(?!\w)")
_FORMULAS_ONLY = re.compile(r"(?:\s|[,.]|and|or|solutions are:|\$\$[^$]*\$\$|\$[^$]*\$)*")


def cut_out(text: str) -> str:
    """The answer in a completion: the last boxes, else what `final answer is` announces, else formulas, else a number."""
    text = _COMMANDS.sub(r"\\", text)
    rest = templates.after_thinking(text) or text
    starts = [found.start() for found in re.finditer(r"\\boxed", rest)]
    if starts:
        boxes = [(start, templates.last_box(rest[start : start + _end(rest, start)])) for start in starts]
        return _together(rest, boxes)
    if len(announced := re.split(r"final answer is:?", rest, flags=re.IGNORECASE)) > 1:
        rest = announced[1].split("I hope")[0]
    formulas = [next(filter(None, found.groups())) for found in _FORMULA.finditer(rest)]
    if not formulas:
        return rest if len(rest) < 20 else templates.find("raw").extract(rest.split("<|")[0]) or rest
    if re.search(r"(?:percent|pct|%|meters\}?)\W*$", rest):
        return rest.replace("$", "")
    if _FORMULAS_ONLY.fullmatch(rest):
        return ", ".join(formulas)
    *_, last = _FORMULA.finditer(rest)
    numbers = _NUMBER.findall(rest[last.end() :])
    return numbers[-1] if numbers else formulas[-1]


def _end(text: str, start: int) -> int:
    depth = 0
    for at in range(start, len(text)):
        depth += (text[at] == "{") - (text[at] == "}")
        if depth == 0 and text[at] == "}":
            return at - start + 1
    return len(text)


def _together(text: str, boxes: list[tuple[int, str | None]]) -> str:
    """The last box, with those before it that only `,`, `and` or a few characters separate from it."""
    kept = [boxes[-1]]
    for box in reversed(boxes[:-1]):
        end = box[0] + _end(text, box[0])
        if kept[0][0] - end > 30 or not re.search(r",|and", text[end : kept[0][0]]):
            break
        kept.insert(0, box)
    return ", ".join(dict.fromkeys(content for _, content in kept if content))


# ------------------------------------------------------------------------------------------- model answers


def gsm8k(path: Path) -> Iterator[tuple[str, list[Pair], list[Pair]]]:
    """By model: answers that people called right and wrong."""
    pairs: dict[str, tuple[list[Pair], list[Pair]]] = {}
    for line in path.read_text().splitlines():
        row = json.loads(line)
        gold = _last(row["ground_truth"]).replace(",", "")
        for model, reply in row.items():
            if isinstance(reply, dict):
                right, wrong = pairs.setdefault(model, ([], []))
                (right if reply["is_correct"] else wrong).append((gold, _last(reply["solution"])))
    for model, (right, wrong) in pairs.items():
        yield f"gsm8k: {model}", right, wrong


def _last(text: str) -> str:
    return text.rpartition("A:")[2].strip()


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--math-verify", type=Path, help="a checkout of huggingface/Math-Verify")
    parser.add_argument("--gsm8k", type=Path, help="example_model_solutions.jsonl of grade-school-math")
    parser.add_argument("--quiet", action="store_true", help="only the table")
    options = parser.parse_args()
    start = time.perf_counter()
    if options.math_verify:
        measure(suite(options.math_verify), not options.quiet)
    elif options.gsm8k:
        measure(gsm8k(options.gsm8k), not options.quiet)
    else:
        measure(((kind, *pairs) for kind, pairs in KINDS.items()), not options.quiet)
    print(f"{time.perf_counter() - start:.1f} s")


if __name__ == "__main__":
    main()
