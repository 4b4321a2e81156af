"""Models of a run that are no longer what was written, or that training has ruined: said before they are used."""

from __future__ import annotations

import shutil
import subprocess
from pathlib import Path

import pytest
from project import REFERENCE, SUMS, Project

from distill import models, run_folder
from distill.errors import DataError
from distill.files import room_for
from distill.models import integrity
from distill.records import UserError
from distill.run import model_card
from distill.run.collect import collect_run

TRACES = {
    "kind": "generate", "model": "base", "task": "sums", "problems": 6, "sampling": {"max_tokens": 6}, "top_logprobs": 8,
    "engine": REFERENCE,
}  # fmt: skip
STUDENT = {
    "kind": "train", "model": "base", "data": "traces", "keep_truncated": True, "steps": 2, "batch_traces": 2,
    "dtype": "float32", "loss": {"fn": "forward_kl"}, "checkpoint_every": 1,
}  # fmt: skip
VERDICT = {
    "kind": "eval",
    "model": "kl",
    "task": "sums",
    "problems": 4,
    "sampling": {"max_tokens": 4},
    "engine": REFERENCE,
}


def tree(tiny_dir: Path, **student) -> dict:
    return {
        "name": "damaged", "models": {"base": str(tiny_dir)}, "tasks": {"sums": SUMS},
        "stages": {"traces": TRACES, "kl": {**STUDENT, **student}, "verdict": VERDICT},
    }  # fmt: skip


@pytest.fixture(scope="module")
def finished(tiny_dir, tmp_path_factory) -> Project:
    project = Project(tmp_path_factory.mktemp("damaged"), tree(tiny_dir))
    done = project.run()
    assert done.returncode == 0, done.stderr
    return project


def flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def empty(path: Path) -> None:
    path.write_bytes(b"")


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
@pytest.mark.parametrize("name", ["model.safetensors", "config.json", "tokenizer.json", integrity.SUMS])
def test_a_damaged_file_of_a_model_is_named_before_the_model_is_used(finished, damage, name):
    if name == integrity.SUMS and damage is Path.unlink:
        pytest.skip("a folder without hashes is one that another program wrote")
    folder = finished.run_dir / "kl" / "model"
    shutil.copytree(folder, kept := finished.folder / "kept")
    try:
        damage(folder / name)
        again = finished.run("--redo", "verdict")
        assert again.returncode == 4
        said = again.stdout + again.stderr
        assert "not as written" in said
        assert name in said or name == integrity.SUMS  # of damaged hashes, any file may be the wrong one
        assert "--redo kl" in said
        assert "Traceback" not in said
    finally:
        shutil.rmtree(folder)
        kept.rename(folder)
    assert finished.run("--redo", "verdict").returncode == 0


@pytest.mark.parametrize("damage", [flip, cut, empty, Path.unlink])
def test_reports_and_cards_name_a_damaged_file_and_do_not_go_without_it(finished, damage):
    folder = finished.run_dir / "kl" / "model"
    resolved = run_folder.recipe(finished.run_dir)
    names = [path.name for path in sorted(folder.iterdir()) if path.suffix in (".json", ".jinja")]
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "generation_config.json"} <= {*names}
    for name in names:
        shutil.copytree(folder, kept := finished.folder / "kept")
        try:
            damage(folder / name)
            for reader in (collect_run, lambda run: model_card.describe(resolved, run, "kl")):
                with pytest.raises(DataError, match=rf"{name}: not as written.*--redo kl"):
                    reader(finished.run_dir)
        finally:
            shutil.rmtree(folder)
            kept.rename(folder)
    assert model_card.describe(resolved, finished.run_dir, "kl").usage


@pytest.mark.parametrize("damage", [flip, cut, empty])
def test_a_tokenizer_that_nobody_has_sealed_is_one_message(tiny_dir, tmp_path, damage):
    folder = shutil.copytree(tiny_dir, tmp_path / "model")
    text = (folder / "tokenizer.json").read_text(encoding="utf-8")
    damage(folder / "tokenizer.json")
    if damage is flip:  # a merge of tokens that the vocabulary lacks, for which `tokenizers` raises a plain Exception
        (folder / "tokenizer.json").write_text(text.replace('"Ġexercises":', '"Ġexercisez":'), encoding="utf-8")
    with pytest.raises(DataError, match=r"model: the tokenizer cannot be loaded \(.+\): copy its files again"):
        models.load_tokenizer(folder)


def test_a_whole_folder_is_hashed_once_and_sha256sum_can_check_it(finished, monkeypatch):
    folder = finished.run_dir / "kl" / "model"
    subprocess.run(["sha256sum", "-c", "--quiet", integrity.SUMS], cwd=folder, check=True)
    integrity.verify(folder, "")

    def refuse(path):
        raise AssertionError(f"hashed again: {path}")

    integrity._verify.cache_clear()
    with monkeypatch.context() as patched:
        patched.setattr(integrity, "file_hash", refuse)
        integrity.verify(folder, "")
    (folder / "added.safetensors").write_bytes(b"x")
    with pytest.raises(UserError, match=r"added\.safetensors: not as written"):
        integrity.verify(folder, "")
    (folder / "added.safetensors").unlink()
    (folder / "README.md").write_text("a card may be edited")
    integrity.verify(folder, "")


def test_the_copy_of_a_gguf_file_is_verified(smollm2_dir, tmp_path, monkeypatch):
    folder = tmp_path / smollm2_dir.name
    shutil.copytree(smollm2_dir, folder)
    models.verify(folder, "")
    assert (folder / integrity.SUMS).is_file()
    flip(folder / "model.safetensors")
    with pytest.raises(UserError, match="not as written"):
        models.verify(folder, "")


@pytest.mark.parametrize("steps", [3, 4])
def test_training_that_ends_in_bad_steps_does_not_end_well_however_often_it_is_run(tiny_dir, tmp_path, steps):
    """Fewer bad steps than `max_bad_steps` are left after the weights are ruined; each start counted them from 0 once."""
    project = Project(tmp_path, tree(tiny_dir, lr=1e30, steps=steps, max_grad_norm=1e30))
    for _ in range(3):
        done = project.run()
        assert done.returncode == 2
        assert "not finite" in " ".join((done.stdout + done.stderr).split())
        assert not (project.run_dir / "kl" / "model").exists()


def test_a_model_with_numbers_that_are_none_is_not_saved(tiny_dir):
    model = models.load(tiny_dir, dtype="float32")
    models.check_finite(model, "stages.kl")
    model.model.layers[0].mlp.up_proj.weight.data[0, 0] = float("nan")
    with pytest.raises(
        UserError, match=r"1 of the model's tensors .*model\.layers\.0\.mlp\.up_proj\.weight.*--redo kl"
    ):
        models.check_finite(model, "stages.kl")


@pytest.mark.fault(4)
def test_a_full_disk_in_a_librarys_own_words_is_the_same_message(tmp_path):
    class SafetensorError(Exception):
        pass

    with pytest.raises(UserError, match=r"no room to write it \(No space left on device"), room_for(tmp_path / "model"):
        raise SafetensorError("Error while serializing: I/O error: No space left on device (os error 28)")
    with pytest.raises(SafetensorError), room_for(tmp_path / "model"):
        raise SafetensorError("something else")
