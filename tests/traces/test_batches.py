"""Batches of traces: every value stands at its token, padding is marked, what does not fit together is refused."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import trace_samples as samples

from distill.errors import UserError
from distill.tail_draws import Draws
from distill.traces.batches import collate, rows_of


def row(prompt, completion, entries, tails, **more):
    """A row whose position t has the (id, log-probability) pairs entries[t]."""
    flat = [pair for position in entries for pair in position]
    return {
        "trace_id": "one",
        "prompt_ids": prompt,
        "completion_ids": completion,
        "top_count": [len(position) for position in entries],
        "top_ids": [pair[0] for pair in flat],
        "top_logprobs": [pair[1] for pair in flat],
        "tail_logprob": tails,
        **more,
    }


LONG = row([5, 6], [7, 8, 9], [[(7, -0.5), (1, -2.0)], [(8, -0.1)], [(3, -1.0), (9, -1.5)]], [-1.5, -2.5, -1.0])
SHORT = row([4], [2], [[(2, -0.25)]], [-1.5])
GAP = -np.inf


def test_every_value_stands_at_its_token():
    batch = collate([LONG, SHORT], pad_id=99)
    assert batch["input_ids"].tolist() == [[5, 6, 7, 8, 9], [4, 2, 99, 99, 99]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1, 1], [1, 1, 0, 0, 0]]
    assert batch["labels"].tolist() == [[-100, -100, 7, 8, 9], [-100, 2, -100, -100, -100]]
    assert batch["top_ids"][0].tolist() == [[-1, -1], [-1, -1], [7, 1], [8, -1], [3, 9]]
    assert batch["top_logprobs"][0, 2:].tolist() == [[-0.5, -2.0], [pytest.approx(-0.1), GAP], [-1.0, -1.5]]
    assert batch["tail_logprob"].tolist() == [[GAP, GAP, -1.5, -2.5, -1.0], [GAP, -1.5, GAP, GAP, GAP]]
    assert batch["top_ids"][1].tolist() == [[-1, -1], [2, -1], [-1, -1], [-1, -1], [-1, -1]]
    assert {name: value.dtype for name, value in batch.items()} == {
        "input_ids": torch.int64, "attention_mask": torch.int64, "labels": torch.int64,
        "top_ids": torch.int64, "top_logprobs": torch.float32, "tail_logprob": torch.float32,
    }  # fmt: skip


def test_a_longer_trace_is_cut_with_its_distributions():
    batch = collate([LONG, SHORT], max_length=3, pad_to_multiple_of=4)
    assert batch["labels"].tolist() == [[-100, -100, 7, -100], [-100, 2, -100, -100]]
    assert batch["top_ids"].tolist()[0] == [[-1, -1], [-1, -1], [7, 1], [-1, -1]]
    nothing = collate([LONG], max_length=2)
    assert nothing["labels"].tolist() == [[-100, -100]]


def test_a_position_without_a_distribution_is_not_learned():
    some = row([5], [7, 8], [[], [(8, -0.1)]], [0.0, -2.4])
    assert collate([some])["labels"].tolist() == [[-100, -100, 8]]
    text = {name: some[name] for name in ("trace_id", "prompt_ids", "completion_ids")}
    assert collate([text])["labels"].tolist() == [[-100, 7, 8]]


def test_rows_of_stored_traces_hold_what_the_shards_hold():
    block = samples.traces(range(1, 9))
    rows = list(rows_of(block))
    batch = collate(rows)
    for n, found in enumerate(rows):
        start, num = len(block.prompt_ids[n]), len(block.completion_ids[n])
        top = block.top_of(n)
        ids, logps = top.dense(batch["top_ids"].shape[2])
        np.testing.assert_array_equal(batch["input_ids"][n, start : start + num], block.completion_ids[n])
        np.testing.assert_array_equal(batch["top_ids"][n, start : start + num], ids)
        np.testing.assert_array_equal(batch["top_logprobs"][n, start : start + num], logps)
        np.testing.assert_array_equal(batch["tail_logprob"][n, start : start + num], top.tail_T)
        np.testing.assert_array_equal(batch["logprob"][n, start : start + num], block.logprob[n])
        assert found["trace_id"] == block.trace_id[n]
    assert "draw_ids" not in batch


def test_draws_from_the_tail_stand_at_their_tokens():
    draws = Draws(np.array([0, 2, 1]), np.array([11, 12, 13]), np.array([-4.0, -5.0, -6.0], np.float32))
    drawn = LONG | {
        "draw_count": draws.count_T,
        "draw_ids": draws.ids_E,
        "draw_logprobs": draws.logp_E,
        "draw_mass": [0.1, 0.2, 0.3],
    }
    batch = collate([drawn], max_length=4)
    assert batch["draw_ids"].tolist() == [[[-1, -1], [-1, -1], [-1, -1], [11, 12]]]
    assert batch["draw_mass"].tolist() == [[0, 0, pytest.approx(0.1), pytest.approx(0.2)]]
    assert "draw_ids" not in collate([drawn, SHORT])


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"prompt_ids": []}, "empty prompt"),
        ({"completion_ids": [7, 8]}, "top_count has 3 values for 2 of completion_ids"),
        ({"top_ids": [7]}, "top_ids has 1 values where top_count adds up to 5"),
        ({"logprob": [0.0]}, "logprob has 1 values for 3"),
    ],
)
def test_columns_that_do_not_belong_together_are_refused(changes, said):
    with pytest.raises(UserError, match=said):
        collate([LONG | changes])


def test_an_empty_batch_is_refused():
    with pytest.raises(UserError, match="no traces"):
        collate([])


def test_nested_and_padded_rows_give_the_same_batch():
    nested = LONG | {"top_ids": [[7, 1], [8], [3, 9]], "top_logprobs": [[-0.5, -2.0], [-0.1], [-1.0, -1.5]]}
    padded = LONG | {
        "top_ids": torch.tensor([[7, 1], [8, 0], [3, 9]]),
        "top_logprobs": torch.tensor([[-0.5, -2.0], [-0.1, GAP], [-1.0, -1.5]]),
    }
    flat = collate([LONG])
    for row in (nested, padded):
        found = collate([{name: value for name, value in row.items() if name != "top_count"}])
        assert found.keys() == flat.keys()
        assert all(torch.equal(found[name], flat[name]) for name in flat)


def test_the_mass_of_a_draw_follows_from_the_metadata():
    drawn = LONG | {"draw_ids": [[], [11, 12], [13]], "draw_logprobs": [[], [-4.0, -5.0], [-6.0]]}
    assert "draw_ids" not in collate([drawn])
    batch = collate([drawn], tail_draws=4)
    assert batch["draw_ids"].tolist()[0][3:] == [[11, 12], [13, -1]]
    np.testing.assert_allclose(batch["draw_mass"][0, 2:], np.exp([-1.5, -2.5, -1.0]) / 4, rtol=1e-6)
