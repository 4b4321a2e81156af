"""Hand-made rollouts: groups of completions with rewards, lengths and every log-probability a loss may read."""

from __future__ import annotations

import numpy as np

from distill.records import Completion, GradedGroup, Group, Problem, Prompt, Scores, Verdict
from distill.tasks.templates import raw
from distill.training.rl.reward_rollout import RewardRollouts, Rollout

MAX_TOKENS = 9


class Numbers:
    """Log-probabilities of the sampled tokens under each model, by (problem, sample)."""

    def __init__(self, rewards, *, seed=0, spread=0.4, truncated=(), empty=()):
        """rewards: a list a group, None where it could not be judged. truncated: (group, sample) cut at the limit."""
        rng = np.random.default_rng(seed)
        self.rewards, self.truncated = rewards, set(truncated)
        self.engine, self.old, self.new, self.ref = {}, {}, {}, {}
        for g, group in enumerate(rewards):
            for i in range(len(group)):
                n = MAX_TOKENS if (g, i) in self.truncated else int(rng.integers(1, MAX_TOKENS))
                base = -rng.gamma(1.0, 1.0, n)
                key = f"p{g}", i
                self.old[key] = base.astype(np.float32)
                for name in ("engine", "new", "ref"):
                    noise = rng.normal(0, spread, n)
                    getattr(self, name)[key] = (base + noise).astype(np.float32)

    def groups(self, scale_of):
        """The groups as a rollout holds them; scale_of: the RewardRollouts whose conventions give the advantages."""
        out = []
        for g, rewards in enumerate(self.rewards):
            size = len(rewards)
            problem = Problem(f"p{g}", "t", "q", ({"role": "user", "content": "q"},), "1")
            finished = tuple((g, i) not in self.truncated for i in range(size))
            completions = [
                Completion(
                    f"{g}/{i}",
                    np.arange(len(self.old[f"p{g}", i]), dtype=np.int32) + 5,
                    self.engine[f"p{g}", i],
                    None,
                    "stop" if finished[i] else "length",
                )
                for i in range(size)
            ]
            group = Group(
                problem,
                raw,
                ("x",) * size,
                tuple(len(c.ids_T) for c in completions),
                finished,
                (Verdict(True, 1.0, "1"),) * size,
                MAX_TOKENS,
            )
            graded = GradedGroup(Prompt(problem, np.array([3, 4], np.int32)), completions, group)
            scores = Scores(list(rewards), {"r": list(rewards)})
            out.append(scale_of.score(graded, scores))
        return out

    def stub(self):
        return StubPolicy(self)


class StubPolicy:
    """A stand-in for Policy that returns hand-made log-probabilities of a batch."""

    def __init__(self, numbers):
        self.numbers = numbers
        self.asked = {"old": 0, "ref": 0}

    def logp(self, batch):
        self.asked["old"] += 1
        return by_row(batch, self.numbers.old)

    def reference_logp(self, batch):
        self.asked["ref"] += 1
        return by_row(batch, self.numbers.ref)


def key_of(trace_id):
    _, problem, sample = trace_id.split("/")
    return problem, int(sample)


def by_row(batch, table):
    """[T]: the table's numbers at the rows that have a weight."""
    out = np.zeros(len(batch.ids_T), np.float32)
    for n, trace_id in enumerate(batch.trace_ids):
        values, stop = table[key_of(trace_id)], batch.doc_offsets[n + 1] - 1
        out[stop - len(values) : stop] = values
    return out


def rollouts(objective, config):
    """Return a source without an engine; only its conventions are used."""
    return RewardRollouts(sampler=None, rewards=None, config=config, objective=objective, seed=1)


def rollout_of(numbers, source):
    groups = numbers.groups(source)
    return Rollout(groups, list(groups))


__all__ = ["MAX_TOKENS", "Numbers", "by_row", "key_of", "rollout_of", "rollouts"]
