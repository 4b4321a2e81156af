"""A GPU that a trainer shares with engines: what the policy's engine may take, and whether everything fits.

In: memory by parts (`compute.memory`), the GPU's size, the recipe's engine section. Out: `Split`, in bytes. `distill check
--gpu` and the stage itself use the same split: what training holds or needs is left out of the engine's share, also what comes
after the engine has started (the optimiser's state, the reference, gradients, a reward model).
"""

from __future__ import annotations

from dataclasses import dataclass, replace

from distill.compute.memory import Memory

USABLE = 0.95
"""Share of a GPU's memory that a stage may take; the rest is lost between the allocator's blocks."""
ASLEEP_BYTES = 1.5e9
"""What a sleeping engine keeps: captured CUDA graphs and workspaces. An estimate; not measured on a GPU."""


@dataclass(frozen=True, slots=True)
class Split:
    """engine: bytes that the policy's engine may take, its share. beside: what else is there while it is awake; asleep: all that
    is there while it sleeps (0 if it never does).

    short: bytes by which the GPU is too small; 0 if everything fits. when: the phase in which it is.
    """

    engine: float
    beside: float
    asleep: float = 0.0
    short: float = 0.0
    when: str = ""

    def peak(self, engine: float | None = None) -> float:
        """The most that is taken at a time, with an engine of its share or of `engine` bytes."""
        return max(self.beside + (self.engine if engine is None else engine), self.asleep)


def split(
    training: Memory,
    engine: Memory,
    *,
    total: float,
    others: float = 0.0,
    least_cache: float = 0.0,
    sleep: bool = False,
    share: float | None = None,
) -> Split:
    """Share a GPU of `total` bytes between a trainer, the policy's engine, and `others` (bytes of other engines).

    training, engine: each with its own parts; the process counts once, in `training`. least_cache: bytes of one sequence's
    cache, for an engine that takes what is left; 0 if its cache has a size in the recipe. share: of the GPU, by the recipe.

    An engine that sleeps while the model trains leaves ASLEEP_BYTES; while it is awake nothing but what training holds from step
    to step is there.
    """
    usable = USABLE * total
    held = training.held + others
    while_training = training.total + others
    beside = held if sleep else while_training
    asleep = while_training + ASLEEP_BYTES if sleep else 0.0
    least = engine.engine + engine.logits + (least_cache or engine.cache)
    room = usable - beside
    if share is not None:
        taken = share * total
    elif least_cache:
        taken = max(room, least)
    else:
        taken = least
    found = Split(taken, beside, asleep)
    if asleep > usable:
        return replace(found, short=asleep - usable, when="while the model trains and the engine sleeps")
    if share is not None and taken < least:
        return replace(found, short=least - taken, when="in the engine's share")
    if beside + taken > usable:
        when = "while the engine generates" if sleep else "while the model trains beside its engine"
        return replace(found, short=beside + taken - usable, when=when)
    return found
