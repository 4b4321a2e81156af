"""docs/glossary.md has a line for every metric that the code can write, and none for a metric that is gone."""

from __future__ import annotations

import re

from glossary_names import explained, in_code, pattern_of, unexplained

RUN_WIDE = {"step", "peak_memory", "processes", "peak_memory_of_processes"}
"""Written beside the metrics: the number of the step, by the loop, and what the stage's process adds."""


def test_every_metric_of_the_code_is_explained():
    assert not unexplained(in_code())


def test_a_name_that_is_not_there_is_found():
    assert unexplained({"loss", "no_such_metric", "reward/anything", "kept/<>", "kl/0-15"}) == {"no_such_metric"}


def test_the_collector_finds_the_metrics_of_each_place():
    wanted = {
        "loss",
        "kl",
        "label_nll",
        "hidden",
        "clip_fraction",
        "kl_teacher",
        "wait_seconds",
        "sync_seconds",
        "reward/<>",
    }
    assert (
        wanted | {"layers_kept", "mean_nll", "kept/<>", "steps", "accuracy", "p_holm", "flops", "mean_support"}
        <= in_code()
    )


def test_no_line_is_about_a_metric_that_is_gone():
    code = in_code()
    patterns = [pattern_of(name) for name in code if "<>" in name]
    gone = {
        name for name in explained() - code - RUN_WIDE if not any(re.fullmatch(pattern, name) for pattern in patterns)
    }
    assert not gone
