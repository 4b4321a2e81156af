"""Functions that score the tokens of a completion: `weights` of a stage keeps the share with the highest scores.

In: `TokenValues`, one completion. Out: a score a token. Your own function does the same, `weights: {fn: mymodule:score}`.

Shapes: C tokens of a completion, N outcomes a token.
"""

from __future__ import annotations

import numpy as np

from distill.records import Array
from distill.token_choice import TokenValues


def entropy(tokens: TokenValues) -> Array:
    """Entropy of the teacher's distribution, nats [C]: the tokens that the teacher is least certain of are kept.

    All ids that were not stored count as one outcome, so the value is a lower bound of the whole entropy. With a teacher in the
    trainer it is the entropy over the whole vocabulary.
    """
    assert tokens.logp_CK is not None and tokens.tail_C is not None  # noqa: PT018
    logp_CN = np.concatenate([tokens.logp_CK, tokens.tail_C[:, None]], axis=1).astype(np.float64)
    return np.asarray(-(np.exp(logp_CN) * np.where(logp_CN > -np.inf, logp_CN, 0.0)).sum(1))


def divergence(tokens: TokenValues) -> Array:
    """KL(teacher || student) under the student's current weights, nats [C]: the tokens that it has learned least are kept.

    Computed in the training step from one more product with the student's output head, without a gradient. All tokens pass
    through the model's body, so this saves the gradient of the output head only. Not for capture, where there is no student.
    """
    raise AssertionError("training computes it in the step")


def prefix(tokens: TokenValues) -> Array:
    """The first tokens of the completion are kept; training does not compute what comes after them."""
    return -np.arange(len(tokens), dtype=np.float64)
