"""A stage that runs out of memory says what to lower, whoever notices it."""

from __future__ import annotations

import errno
import os

import numpy as np
import pytest
import torch

from distill.run.stage_process import _memory_hint


def error_of(action) -> BaseException:
    with pytest.raises(BaseException) as raised:
        action()
    return raised.value


def system():
    raise OSError(errno.ENOMEM, os.strerror(errno.ENOMEM))


@pytest.mark.parametrize(
    "action",
    [lambda: torch.empty(2**56, dtype=torch.float64), lambda: np.empty(2**58), lambda: bytearray(2**60), system],
)
@pytest.mark.fault(32)
def test_memory_that_is_not_there_is_answered_with_what_to_lower(action):
    assert "Lower micro_tokens" in _memory_hint(error_of(action))


def test_other_errors_get_no_such_hint():
    assert _memory_hint(RuntimeError("shape mismatch")) == ""
