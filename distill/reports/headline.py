"""The headline of a report: what the run found, in full sentences with numbers and intervals, or how far it is.

Which question a recipe asks is read off its arms. Students that do not build on one another were trained in several ways, and the
ways are compared. A single student at the end of a line is compared with its start and its teacher. A single arm is stated.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from distill.reports.arm_groups import Group, groups
from distill.reports.run_report import ArmRow, ComparisonRow, IntervalRow, RunReport, StageRow
from distill.reports.wording import duration, listed, minus, p_text, percent, ratio_text, span

NAMED = 4
"""The largest number of ways of training that the headline names one by one; of more, those with the best scores."""


def verdict(report: RunReport) -> str:
    """The headline of a run: its result, preceded by what is under way if the run has not ended; a line for each evaluation."""
    standing = _standing(report)
    found = groups(report)
    if not found:
        near = _distances(report)
        if near:
            return f"{standing}\nSo far: {near}" if any(s["status"] != "done" for s in report["stages"]) else near
        evaluates = any(stage["kind"] in ("eval", "compare") for stage in report["stages"])
        none = "No model of this run has been evaluated yet." if evaluates else "This recipe evaluates no model."
        return f"{standing} {none}".strip()
    answers = "\n".join(_answer(group, report, len(found) > 1) for group in found)
    return f"{standing}\nSo far: {answers}" if standing else answers


def _standing(report: RunReport) -> str:
    """Where a run that has not ended stands; "" for one that has."""
    stages = report["stages"]
    for number, stage in enumerate(stages, 1):
        if stage["status"] in ("failed", "running"):
            what = {"failed": "Failed", "running": "Under way"}[stage["status"]]
            return f"{what}: stage {number} of {len(stages)}, {stage['name']} ({stage['kind']}{_step(stage)}).{_message(stage)}"
    done = sum(stage["status"] in ("done", "skipped") for stage in stages)
    if done == len(stages):
        return "" if report["arms"] else f"All {done} stages are done." if done > 1 else "The run is done."
    waiting = next(stage["name"] for stage in stages if stage["status"] not in ("done", "skipped"))
    return f"{done} of {len(stages)} stages are done; {waiting} is next." if done else "Not begun."


def _step(stage: StageRow) -> str:
    progress, said = stage.get("progress", {}), ""
    if "step" in progress:
        said += f", step {progress['step']:.0f}" + (f" of {progress['steps']:.0f}" if "steps" in progress else "")
    if stage["seconds"]:
        expected = stage["predicted"]["seconds"] if stage["status"] == "running" and "predicted" in stage else 0.0
        said += f", {duration(stage['seconds'])}" + (f" of about {duration(expected)}" if expected else "")
    return said


def _message(stage: StageRow) -> str:
    lines = stage.get("error", "").splitlines()
    return f" {lines[0]}" if lines else ""


# ------------------------------------------------------------------------------------------------- answers


def _answer(group: Group, report: RunReport, several: bool) -> str:
    """The finding of one group of arms."""
    arms = group.arms
    students = [name for name, arm in arms.items() if arm["role"] == "student"]
    lead = f"On {group.title}: " if several else ""
    most = max((arms[name]["traces"]["number"] for name in students if "traces" in arms[name]), default=None)
    if most is not None:  # of arms that differ in their number of traces, those with the most
        ways = [name for name in students if "traces" not in arms[name] or arms[name]["traces"]["number"] == most]
        shown = {name: arms[name]["traces"]["way"] if "traces" in arms[name] else name for name in ways}
        compared = _ways(group, ways, shown, measures=("accuracy",))
        return f"{lead}{'with' if lead else 'With'} {most:,} traces, {compared}{_worth(group, report)}"
    ends = [name for name in students if not any(name in _about(arms[other], "builds_on") for other in students)]
    if len(ends) == 1:
        return lead + _one(group, ends[0])
    if not ends:
        ends = list(arms)
        return lead + (_one(group, ends[0]) if len(ends) == 1 else _ways(group, ends, {name: name for name in ends}))
    return lead + _ways(group, ends, _with_methods(arms, ends))


def _about(arm: ArmRow, key: str) -> Any:
    return arm["about"][key] if "about" in arm else ()  # type: ignore[literal-required]


def _with_methods(arms: Mapping[str, ArmRow], names: Sequence[str]) -> dict[str, str]:
    """The names of arms with their ways of training, where these tell the arms apart."""
    methods = {name: arms[name]["about"]["method"] for name in names if "about" in arms[name]}
    distinct = len({*methods.values()}) == len(names) and all(methods.values())
    return {name: f"{name} ({methods[name]})" if distinct and methods[name] != name else name for name in names}


def _one(group: Group, name: str) -> str:
    """One student against its start and its teacher; without either, its accuracy with its interval."""
    arms, arm = group.arms, group.arms[name]
    others = [one for one in arms if one != name]
    line = [one for one in _about(arm, "begins_with") if one in others]
    starts = [one for one in line if arms[one]["role"] == "start"] or [
        one for one in others if arms[one]["role"] == "start"
    ]
    first = starts[-1:]  # the earliest in its line
    if "about" in arm:
        taught = [one for one in _about(arm, "teachers") if one in others and not _same_line(arms, one, line)]
    else:
        taught = [one for one in others if arms[one]["role"] == "teacher"]
    said = [_against(group, name, one, "start") for one in first]
    said += [_against(group, name, one, "teacher") for one in taught]
    layers = _about(arm, "size").rpartition(", ")[2] if taught and "about" in arm else ""
    title = f"{name} ({layers})" if "layers" in layers else name
    head = f"{title} solved {percent(arm['accuracy']['value'])} of {arm['accuracy']['n']:,} held-out problems"
    head += f", {' and '.join(said)}" if said else f" (95% CI {_ends(arm['accuracy'])})"
    way = [one for one in others if one not in first and one not in taught]
    way.sort(key=lambda one: len(_about(arms[one], "builds_on")))
    stations = [
        f"{one} {'solved ' if not n else ''}{percent(arms[one]['accuracy']['value'])}" for n, one in enumerate(way)
    ]
    on_the_way = f" On the way, {listed(stations)}." if way else ""
    return f"{head}.{on_the_way}{_divergence(group, [name, *first])}"


def _same_line(arms: Mapping[str, ArmRow], teacher: str, line: Sequence[str]) -> bool:
    """Whether a teacher was trained from the student's own start, so that it is a station of one pipeline."""
    start = {one for one in _about(arms[teacher], "begins_with") if one in arms and arms[one]["role"] == "start"}
    return bool(start & {*line})


def _against(group: Group, name: str, other: str, role: str) -> str:
    """One arm's difference to another in words."""
    accuracy = percent(group.arms[other]["accuracy"]["value"])
    title = f"its {role}" if other == role else f"its {role} {other}" if role == "teacher" else other
    row = _pair(group, name, other)
    if row is None:
        return f"{title} {accuracy}"
    value, low, high = _points(row, name)
    if _apart(row):
        ends = (low, high) if value > 0 else (-high, -low)
        more = "more" if value > 0 else "fewer"
        return f"{abs(value):.1f} points {more} than {title} ({accuracy}; 95% CI of the difference {span(*ends)})"
    return (
        f"with no difference shown to {title} ({accuracy}; {minus(f'{value:+.1f}')} points, 95% CI {span(low, high)})"
    )


def _ways(
    group: Group, names: Sequence[str], shown: Mapping[str, str], measures: Sequence[str] = ("accuracy", "kl")
) -> str:
    """Several ways of training, best first; each with its difference to the best, and how far the claim goes."""
    arms, best = group.arms, names[0]
    kept, rest = (names, ()) if len(names) <= NAMED + 1 else (names[:NAMED], names[NAMED:])
    n = arms[best]["accuracy"]["n"]
    parts = [f"{shown[best]} solved {percent(arms[best]['accuracy']['value'])} of {n:,} held-out problems"]
    rows: list[ComparisonRow] = []
    for name in kept[1:]:
        row = _pair(group, best, name)
        parts.append(f"{shown[name]} {percent(arms[name]['accuracy']['value'])}{_bracket(row, best, first=not rows)}")
        rows += [row] if row is not None else []
    if rest:
        values = [arms[name]["accuracy"]["value"] for name in rest]
        parts.append(f"{len(rest)} others {span(100 * min(values), 100 * max(values))}%")
    claim = _claim(rows, best, len(kept) - 1)
    context = [name for name, arm in arms.items() if name not in names and arm["role"] != "student"]
    beside = [_beside(name, arms[name], first=not n) for n, name in enumerate(context)]
    said = f" {_capital(', '.join(beside))}." if beside else ""
    return f"{listed(parts)}. {claim}{said}{_divergence(group, kept) if 'kl' in measures else ''}"


def _beside(name: str, arm: ArmRow, first: bool) -> str:
    title = f"the {arm['role']}" if name == arm["role"] else f"the {arm['role']} {name}"
    return f"{title} {'solved ' if first else ''}{percent(arm['accuracy']['value'])}"


def _capital(text: str) -> str:
    return text[:1].upper() + text[1:]


def _bracket(row: ComparisonRow | None, best: str, first: bool) -> str:
    if row is None:
        return " (not compared)"
    value, low, high = _points(row, best)
    words = "difference " if _apart(row) else "no difference shown: "
    return f" ({words}{minus(f'{value:.1f}')} points, {'95% CI ' if first else ''}{span(low, high)}{_corrected(row)})"


def _corrected(row: ComparisonRow) -> str:
    """Why no difference is shown although the interval leaves 0 out: the p-value after the correction for several pairs."""
    outside = row["difference"]["low"] > 0 or row["difference"]["high"] < 0
    return (
        f", p = {p_text(row['p_holm'])} after Holm's correction"
        if outside and not _apart(row) and row["p_holm"] >= 0.05
        else ""
    )


def _claim(rows: Sequence[ComparisonRow], best: str, pairs: int) -> str:
    """What the comparisons say about the ways of training."""
    over = [row for row in rows if row["unit"] == "training seeds"]
    if not rows:
        return "They were not compared." if pairs > 1 else "The two were not compared."
    if not over:
        return "One training seed each: no claim about the methods."
    seeds = " and ".join(str(n) for n in sorted({n for row in over for n in row.get("seeds", [])}))
    supported = sum(row["verdict"] == "supported" for row in over)
    what = "difference" if len(over) == 1 else "differences"
    if supported == len(over):
        verb = "is" if len(over) == 1 else "are"
        return f"Over {seeds} training seeds each, the {what} {verb} supported."
    if not supported:
        return f"Over {seeds} training seeds each, this is inconclusive."
    found = listed([row["b"] if row["a"] == best else row["a"] for row in over if row["verdict"] == "supported"])
    return f"Over {seeds} training seeds each, {supported} of {len(over)} {what} are supported (to {found})."


def _pair(group: Group, a: str, b: str) -> ComparisonRow | None:
    """The comparison of two arms, over training seeds if there is one, else of checkpoints."""
    found = [row for row in group.comparisons if {row["a"], row["b"]} == {a, b}]
    return next((row for row in found if row["unit"] == "training seeds"), found[0] if found else None)


def _points(row: ComparisonRow, a: str) -> tuple[float, float, float]:
    """The difference of `a` to the other arm, in points: value, low, high."""
    difference = row["difference"]
    value, low, high = (100 * difference[key] for key in ("value", "low", "high"))
    return (value, low, high) if row["a"] == a else (-value, -high, -low)


def _apart(row: ComparisonRow) -> bool:
    return row["verdict"] in ("differ", "supported")


def _ends(row: IntervalRow) -> str:
    return span(100 * row["low"], 100 * row["high"])


# ---------------------------------------------------------------------------------- held-out KL, traces of text


def _divergence(group: Group, names: Sequence[str]) -> str:
    """The held-out KL to the teacher, nearest first, with differences to the nearest; "" where it was not measured."""
    kl = {name: arm["divergence"]["kl"] for name in names if "divergence" in (arm := group.arms[name])}
    if not kl:
        return ""
    ranked = sorted(kl, key=lambda name: kl[name]["value"])
    parts = [f"{ranked[0]}'s held-out KL to the teacher is {_nats(kl[ranked[0]]['value'])} nats a token"]
    pairs = {(row["a"], row["b"]): row["difference"] for row in group.divergence_pairs}
    for name in ranked[1:]:
        row, sign = (pairs[name, ranked[0]], 1) if (name, ranked[0]) in pairs else (pairs.get((ranked[0], name)), -1)
        bracket = ""
        if row is not None:
            low, high = sorted(sign * row[key] for key in ("low", "high"))
            words = "difference" if low > 0 else "no difference shown:"
            bracket = f" ({words} {_nats(sign * row['value'])}, 95% CI {span(low, high, 3)})"
        parts.append(f"{name}'s {_nats(kl[name]['value'])}{bracket}")
    return f"\n{listed(parts)}."


def _distances(report: RunReport) -> str:
    """The held-out KL of models that stages measure by themselves, nearest first: of recipes whose answers no judge can read."""
    rows = {stage["name"]: stage["divergence"]["kl"] for stage in report["stages"] if "divergence" in stage}
    parts = [
        f"{name} measured {_nats(row['value'])}{' nats a token of held-out KL to the teacher' if not n else ''} "
        f"(95% CI {span(row['low'], row['high'], 3)})"
        for n, (name, row) in enumerate(sorted(rows.items(), key=lambda one: one[1]["value"]))
    ]
    return f"{listed(parts)}." if parts else ""


def _nats(value: float) -> str:
    return minus(f"{value:.3f}")


def _worth(group: Group, report: RunReport) -> str:
    """Traces of text for one trace of each way of training; "" if the run does not compare numbers of traces."""
    places = {arm["traces"]["comparison"] for arm in group.arms.values() if "traces" in arm}
    by_measure: dict[str, list[str]] = {}
    for row in report.get("trace_ratios", []):
        if row.get("comparison") in places or "comparison" not in row:
            by_measure.setdefault(row["measure"], []).append(f"{row['way']} {ratio_text(row)}")
    measures = {"accuracy": "accuracy", "kl": "held-out KL"}
    said = [f"by {measures[measure]} {listed(ratios)}" for measure, ratios in by_measure.items()]
    return f"\nOne trace is worth this many traces of text: {'; '.join(said)}." if said else ""
