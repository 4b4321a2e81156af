"""Checkpoints on disk: damaged ones are set aside, unknown ones refused, the best one kept."""

from __future__ import annotations

import json

import pytest
import torch

from distill.records import UserError
from distill.training import checkpoint


def write(folder, step, value, keep=5, **facts):
    tensors = {"master/w": torch.full((4, 4), float(value)), "exp_avg/w": torch.full((4, 4), value / 2)}
    checkpoint.save(folder, step, tensors, {"counts": {}, **facts}, keep=keep).finish()


def read(folder):
    tensors = {"master/w": torch.zeros(4, 4), "exp_avg/w": torch.zeros(4, 4), "exp_avg/new": torch.ones(2)}
    said = []
    facts = checkpoint.resume(folder, tensors, said.append)
    return facts, tensors, said


def test_the_newest_is_read_in_place_with_the_random_state(tmp_path):
    torch.manual_seed(7)
    write(tmp_path, 1, 1)
    write(tmp_path, 2, 2)
    wanted = torch.rand(3)
    torch.manual_seed(8)
    facts, tensors, said = read(tmp_path)
    assert facts["step"] == 2
    assert sorted(facts["tensors"]) == ["exp_avg/w", "master/w"]
    assert tensors["master/w"].eq(2).all()
    assert tensors["exp_avg/new"].eq(1).all()
    assert torch.equal(torch.rand(3), wanted)
    assert said == []


@pytest.mark.parametrize("how", ["flipped", "cut", "missing", "facts", "other_step"])
@pytest.mark.fault(29)
def test_a_damaged_one_is_set_aside_and_the_one_before_it_read(tmp_path, how):
    write(tmp_path, 1, 1)
    write(tmp_path, 2, 2)
    newest = tmp_path / "step-00000002"
    (file,) = (newest / "state").glob("*.distcp")
    content = bytearray(file.read_bytes())
    if how == "flipped":
        content[len(content) // 2] ^= 1
        file.write_bytes(content)
    elif how == "cut":
        file.write_bytes(content[:-1])
    elif how == "missing":
        file.unlink()
    elif how == "facts":
        (newest / "state.json").write_text("{")
    else:
        newest.rename(tmp_path / "step-00000003")
    facts, tensors, said = read(tmp_path)
    assert facts["step"] == 1
    assert tensors["master/w"].eq(1).all()
    assert len(said) == 1
    assert "is damaged" in said[0]
    assert len(list(tmp_path.glob("damaged-*"))) == 1


def test_another_format_is_refused(tmp_path):
    write(tmp_path, 1, 1)
    path = tmp_path / "step-00000001/state.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), "format": 99}))
    with pytest.raises(UserError, match=r"format 99, but this version of distill reads format 2"):
        read(tmp_path)
    (path.parent / "state.json").write_text('{"step": 1}')
    with pytest.raises(UserError, match=r"format 1"):
        read(tmp_path)


def test_the_newest_and_the_best_are_kept(tmp_path):
    for step in range(1, 6):
        write(tmp_path, step, step, keep=2, best={"step": 2, "value": 0.5})
    assert [checkpoint.step_of(path) for path in checkpoint.every(tmp_path)] == [2, 4, 5]


def test_an_asynchronous_one_is_visible_when_it_is_whole(tmp_path):
    tensors = {"master/w": torch.ones(1000, 100)}
    pending = checkpoint.save(tmp_path, 1, tensors, {"counts": {}}, keep=1, asynchronous=True)
    tensors["master/w"].fill_(2)  # training goes on
    assert checkpoint.every(tmp_path) == []
    pending.finish()
    facts, found, _ = read_like(tmp_path, tensors)
    assert facts["step"] == 1
    assert found["master/w"].eq(1).all()


def read_like(folder, tensors):
    found = {name: torch.zeros_like(tensor) for name, tensor in tensors.items()}
    return checkpoint.resume(folder, found), found, []
