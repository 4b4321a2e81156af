"""A user's loss in a module beside the recipe, in every place where a loss can be named.

Each is a copy of a loss that comes with the project, so each stage must come to the very numbers of its twin.
"""

from __future__ import annotations

import json
from dataclasses import replace

import pytest
import torch
from head_problems import problem
from project import REFERENCE, SUMS, Project

from distill.training.loss.dense import Logits, dense_loss, top_entries
from distill.training.loss.divergences import forward_kl
from distill.training.loss.head import HeadForm, head_loss
from distill.training.loss.sparse import forward_kl as stored_forward_kl

MODULE = '''
from distill.training.loss import divergences, sparse
from distill.training.loss.cross_tokenizer import losses


def stored(student, targets, *, scale: float = 1.0):
    """A loss on stored targets: the student's K+1 log-probabilities."""
    return scale * sparse.forward_kl(student, targets)


def rows(logp, logq, *, scale: float = 1.0):
    """A divergence of two distributions over the same outcomes."""
    return scale * divergences.forward_kl(logp, logq)


def pair(pair):
    """A loss between models with different tokenizers."""
    return losses.uld(pair)


def odd(one, two, three):
    return one
'''


@pytest.fixture(scope="module")
def project(tiny_dir, foreign_dir, tmp_path_factory):
    folder = tmp_path_factory.mktemp("own_losses")
    (folder / "ownlosses.py").write_text(MODULE)
    train = {
        "kind": "train", "model": "base", "task": "sums", "data": "traces", "steps": 2, "lr": 1e-3, "batch_traces": 4,
        "keep_truncated": True, "dtype": "float32",
    }  # fmt: skip
    policy = {
        "kind": "on_policy", "model": "base", "task": "sums", "teacher": "taught", "steps": 1, "prompts": 2,
        "group_size": 2, "sampling": {"max_tokens": 6}, "engine": REFERENCE, "dtype": "float32",
    }  # fmt: skip
    score = {"kind": "score", "data": "traces", "top_logprobs": 8, "engine": REFERENCE}
    own = {"stored": {"fn": "ownlosses:stored"}, "rows": {"fn": "ownlosses:rows"}, "built": {"fn": "forward_kl"}}
    stages = {
        "taught": {**train, "data": str(rows_file(folder)), "loss": {"fn": "cross_entropy"}},
        "traces": {
            "kind": "generate", "model": "taught", "task": "sums", "problems": 4, "top_logprobs": 8, "mass": 1.0,
            "sampling": {"max_tokens": 8}, "engine": REFERENCE,
        },
        "again": {**score, "model": "base"},
    }  # fmt: skip
    for name, loss in own.items():
        stages |= {
            f"{name}_on_stored": {**train, "loss": loss},
            f"{name}_on_two": {**train, "data": {"traces": 0.5, "again": 0.5}, "loss": loss},
            f"{name}_by_engine": {**policy, "loss": loss, "scoring": "engine", "top_logprobs": 8},
            f"{name}_with_teacher": {**train, "teacher": "taught", "loss": loss},
            f"{name}_on_policy": {**policy, "loss": loss},
        }
    for name, loss in {"pair": {"fn": "ownlosses:pair"}, "uld": {"fn": "uld"}}.items():
        stages[f"{name}_across"] = {**train, "teacher": "foreign", "loss": loss}
    made = Project(
        folder,
        {
            "name": "own",
            "models": {"base": str(tiny_dir), "foreign": str(foreign_dir)},
            "tasks": {"sums": SUMS},
            "stages": stages,
        },
    )
    done = made.distill("run", "own.yaml")
    assert done.returncode == 0, done.stderr
    return made


def rows_file(folder):
    path = folder / "rows.jsonl"
    path.write_text(
        "".join(json.dumps({"question": f"{n} + 1 = ?", "completion": f"{n + 1}"}) + "\n" for n in range(8))
    )
    return path


def losses(project, stage):
    lines = (project.run_dir / stage / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["loss"] for line in lines]


@pytest.mark.parametrize("where", ["on_stored", "on_two"])
@pytest.mark.parametrize("form", ["stored", "rows"])
def test_on_stored_distributions_it_is_its_twin(project, form, where):
    assert losses(project, f"{form}_{where}") == losses(project, f"built_{where}")


def test_as_a_divergence_it_sees_the_whole_vocabulary_of_a_teacher_in_the_trainer(project):
    assert losses(project, "rows_with_teacher") == losses(project, "built_with_teacher")


def test_as_a_loss_on_entries_it_sees_the_likeliest_of_a_teacher_in_the_trainer(project):
    """The divergence over entries and tail is a lower bound of the whole divergence."""
    for bound, whole in zip(losses(project, "stored_with_teacher"), losses(project, "built_with_teacher"), strict=True):
        assert 0 < bound < whole


@pytest.mark.parametrize(
    ("form", "where", "least"),
    [
        ("stored", "by_engine", 0.5),
        ("rows", "by_engine", 0.5),
        ("rows", "on_policy", 0.5),
        ("stored", "on_policy", 0.0),
    ],
)
def test_on_the_students_own_completions(project, form, where, least):
    """Completions depend on the stage's name, so the numbers are near those of the built-in loss; on entries, a lower bound."""
    (mine,), (twin,) = losses(project, f"{form}_{where}"), losses(project, f"built_{where}")
    assert least * twin < mine < 2 * twin


def test_between_tokenizers_it_is_its_twin(project):
    assert losses(project, "pair_across") == losses(project, "uld_across")


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("stages.rows_on_stored.loss.scal=2", "Did you mean 'scale'"),
        ("stages.rows_on_stored.loss.fn=ownlosses:odd", "a loss takes (student, targets)"),
        ("stages.rows_on_stored.loss.fn=ownlosses:nothing", "cannot import 'ownlosses:nothing'"),
        ("stages.pair_across.teacher=null", "needs one teacher in the trainer"),
        ("stages.stored_with_teacher.temperature=2", "only at temperature 1"),
    ],
)
def test_mistakes_are_one_message(project, override, message):
    done = project.distill("check", "own.yaml", override)
    assert done.returncode == 2, done.stdout
    assert message in done.stderr


def test_with_all_ids_the_entries_of_a_teacher_are_its_whole_distribution():
    hidden, weight, targets = problem(T=9, V=40, K=6)
    generator = torch.Generator().manual_seed(3)
    taught = Logits(
        torch.randn(9, 5, dtype=torch.float64, generator=generator),
        torch.randn(40, 5, dtype=torch.float64, generator=generator),
        HeadForm(40),
    )
    ids, logp, tail = top_entries([taught], 40)
    logits = taught.hidden_TD @ taught.weight_VD.T
    torch.testing.assert_close(logp, logits.log_softmax(1).gather(1, ids))
    assert (tail < -30).all()
    stored = replace(targets, teacher_ids_TK=ids, teacher_logp_TK=logp, teacher_tail_T=tail)
    one = head_loss(hidden, weight, stored_forward_kl, stored)
    whole = dense_loss(Logits(hidden, weight, HeadForm(40)), [taught], forward_kl, targets)
    torch.testing.assert_close(one.loss_T, whole.loss_T)
    few_ids, few_logp, few_tail = top_entries([taught], 4)
    total = torch.logaddexp(few_logp.logsumexp(1), few_tail)
    torch.testing.assert_close(total, torch.zeros_like(total), atol=1e-12, rtol=0)
    assert (few_logp[:, :-1] >= few_logp[:, 1:]).all()
    assert few_ids.shape == (9, 4)
