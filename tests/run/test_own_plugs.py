"""A user's filter, template, engine, reward and objective in one module beside the recipe, through the command line."""

from __future__ import annotations

import pytest
from project import SUMS, Project

MODULE = '''
import numpy as np

from distill.engines import factories
from distill.records import Template
from distill.training.rl import policy_objectives as objectives


def parity(group, *, rest: int = 0):
    """Keep completions whose first id leaves `rest` when divided by 2.

    Dropped: the first id has another parity
    """
    return np.array([row[0] % 2 == rest for row in group.completion_ids])


SAY = Template(name="say", system="Say the sum.", plain="{question} =", extract=lambda text: text.strip() or None)


def engine(model_dir, config, **limits):
    """The reference engine under another name."""
    return factories.reference(model_dir, config, **limits)


def even(group, *, odd: float = 0.0):
    """1 for completions with an even number of tokens."""
    return [1.0 if n % 2 == 0 else odd for n in group.num_tokens]


def plain(*, beta: float = 0.0):
    """GRPO without clipping."""
    return objectives.grpo(eps_low=1e9, eps_high=1e9, beta=beta, mask_truncated=False)
'''


@pytest.fixture(scope="module")
def project(tiny_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("plugs")
    (folder / "mine.py").write_text(MODULE)
    engine = {"fn": "mine:engine", "dtype": "float32"}
    tree = {
        "name": "plugs",
        "models": {"base": str(tiny_dir)},
        "tasks": {"sums": {**SUMS, "template": "mine:SAY"}},
        "stages": {
            "traces": {
                "kind": "generate", "model": "base", "task": "sums", "problems": 6, "sampling": {"max_tokens": 5},
                "engine": engine, "rewards": [{"fn": "mine:even", "odd": -1.0}],
            },
            "few": {"kind": "filter", "data": "traces", "keep": [{"fn": "mine:parity", "rest": 1}, {"fn": "best_of_n"}]},
            "rl": {
                "kind": "grpo", "model": "base", "task": "sums", "steps": 1, "prompts": 2, "group_size": 4, "lr": 1e-3,
                "sampling": {"max_tokens": 5}, "engine": engine, "dtype": "float32",
                "rewards": [{"fn": "mine:even"}], "objective": {"fn": "mine:plain", "beta": 0.1},
            },
        },
    }  # fmt: skip
    made = Project(folder, tree)
    done = made.distill("run", "plugs.yaml")
    assert done.returncode == 0, done.stderr
    return made


def test_each_is_used(project, tokenizer):
    rows = project.rows("traces")
    assert len(rows) == 6
    for row in rows:
        earned = 1.0 if len(row["completion_ids"]) % 2 == 0 else -1.0
        assert row["rewards"] == [{"name": "even", "value": earned}]
        assert row["reward"] == earned
    few = project.state("few")["metrics"]
    assert 0 < few["kept"] < 6
    assert few["dropped"]["mine:parity"] == sum(row["completion_ids"][0] % 2 == 0 for row in rows)
    assert "Say the sum." in tokenizer.decode(rows[0]["prompt_ids"])
    rl = project.state("rl")["metrics"]
    assert "reward_first" in rl
    (line,) = (project.run_dir / "rl" / "metrics.jsonl").read_text().splitlines()
    assert "reward/even" in line
    assert "kl_ref" in line


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.few.keep=[{fn: 'mine:parity', rst: 1}]", "Did you mean 'rest'"),
        ("stages.rl.rewards=[{fn: 'mine:evn'}]", "cannot import 'mine:evn'"),
        ("stages.rl.objective={fn: 'mine:plain', bet: 1}", "Did you mean 'beta'"),
        ("stages.traces.engine=mine:none", "cannot import 'mine:none'"),
        ("tasks.sums.template=mine:NONE", "mine:NONE"),
    ],
)
def test_mistakes_are_one_message(project, override, message):
    done = project.distill("check", "plugs.yaml", override)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr
    assert "Traceback" not in done.stderr
