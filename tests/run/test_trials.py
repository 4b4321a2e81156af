"""Trials find planted faults, each with the part of the recipe it is in, and raise no false alarm."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

import pytest
import tiny_bytes
import yaml
from chat_families import FAMILIES, family_tokenizer
from needs import missing
from project import REFERENCE, Project

from distill import models, recipe
from distill.files import free_space
from distill.machine import Machine
from distill.progress import Screen
from distill.run import plan, trials
from distill.run.trials import rendering, resources
from distill.run.trials.trial import LocalModel, Trial, TrialSetup
from distill.tasks import templates
from distill.tasks.sandbox.isolation import UnavailableError, bubblewrap
from distill.tools.listing import RECIPES

SUMS: dict[str, Any] = {
    "fn": "reasoning_gym",
    "dataset": "basic_arithmetic",
    "options": {"min_terms": 2, "max_terms": 2, "min_digits": 1, "max_digits": 2},
    "template": "think_answer",
}
SHORT = {"temperature": 1.0, "max_tokens": 12}


def stages(**changes: dict[str, Any]) -> dict[str, Any]:
    """A teacher's traces, a student of them and its evaluation."""
    made: dict[str, Any] = {
        "traces": {"kind": "generate", "model": "teacher", "task": "sums", "problems": 8, "sampling": SHORT, "engine": "transformers"},
        "kl": {"kind": "train", "model": "student", "data": "traces", "loss": {"fn": "forward_kl"}, "steps": 2, "lr": 1e-3},
        "verdict": {"kind": "eval", "model": "kl", "task": "sums", "problems": 8, "sampling": SHORT, "engine": "transformers"},
    }  # fmt: skip
    return {name: {**made.get(name, {}), **changes.get(name, {})} for name in {**made, **changes}}


def load(folder: Path, teacher: Path, student: Path | None = None, **tree: Any) -> recipe.Recipe:
    """Write and load a recipe."""
    given = {
        "name": "probe",
        "seed": 3,
        "models": {"teacher": str(teacher), "student": str(student or teacher)},
        "tasks": {"sums": SUMS},
        "stages": stages(),
        **tree,
    }
    path = folder / "probe.yaml"
    path.write_text(yaml.safe_dump(given), encoding="utf-8")
    return recipe.load(path, [])


def tried(resolved: recipe.Recipe, run: Path, *names: str) -> list[Trial]:
    """The cheap trials, or those of some names."""
    found = list(trials.cheap(resolved, run, list(resolved.stages), ()))
    return [trial for trial in found if not names or trial.name in names]


def failures(found: list[Trial]) -> dict[str, Trial]:
    assert all(trial.remedy for trial in found if trial.status == "fail")
    return {trial.name: trial for trial in found if trial.status == "fail"}


def changed(folder: Path, source: Path, **tokenizer: Any) -> Path:
    """A copy of a model with attributes of its tokenizer changed."""
    shutil.copytree(source, folder)
    theirs = models.load_tokenizer(folder)
    for name, value in tokenizer.items():
        setattr(theirs, name, value)
    for file in folder.glob("chat_template*"):
        file.unlink()
    theirs.save_pretrained(folder)
    return folder


def test_nothing_is_wrong_with_a_sound_recipe(tmp_path, tiny_dir):
    found = tried(load(tmp_path, tiny_dir), tmp_path / "run")
    assert not failures(found)
    assert {"prompt and reply", "context", "tokenizers", "end of a completion", "judge", "disk"} <= {
        t.name for t in found
    }
    (reply,) = [trial for trial in found if trial.name == "prompt and reply"][:1]
    assert "⟦<think>" in reply.shown[0]
    assert reply.shown[0].endswith("<|im_end|>⟧")


def test_a_chat_template_that_drops_the_answer_s_end(tmp_path, tiny_dir):
    template = "{% for m in messages %}[{{ m['role'] }}] {{ m['content'] }} ;{% endfor %}[assistant] "
    endless = changed(tmp_path / "endless", tiny_dir, chat_template=template, eos_token=None)
    (endless / "generation_config.json").unlink(missing_ok=True)
    found = failures(tried(load(tmp_path, endless), tmp_path / "run"))
    assert "does not stop" in found["prompt and reply"].figure


def test_a_prompt_with_two_bos_tokens(tmp_path, tiny_dir):
    twice = changed(
        tmp_path / "twice",
        tiny_dir,
        bos_token="<|im_start|>",
        chat_template="{{ bos_token }}{% for m in messages %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}"
        "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}",
    )
    found = failures(tried(load(tmp_path, twice), tmp_path / "run", "prompt and reply"))
    assert "two BOS" in found["prompt and reply"].figure


def test_a_base_student_of_an_instructed_teacher_does_not_stop_where_its_teacher_does(tmp_path, tiny_dir):
    base = changed(tmp_path / "base", tiny_dir, eos_token="<|endoftext|>")
    settings = json.loads((base / "generation_config.json").read_text())
    settings["eos_token_id"] = models.load_tokenizer(base).eos_token_id
    (base / "generation_config.json").write_text(json.dumps(settings))
    plain = {"sums": {**SUMS, "template": "raw"}}
    found = failures(tried(load(tmp_path, tiny_dir, base, tasks=plain), tmp_path / "run"))
    assert "<|im_end|>" in found["end of a completion"].figure
    assert "eos_token_id" in found["end of a completion"].remedy
    # In the chat template both end the assistant's turn in the same token.
    assert not failures(tried(load(tmp_path, tiny_dir, base), tmp_path / "run"))


def test_a_student_with_another_tokenizer(tmp_path, tiny_dir, narrow_dir):
    found = failures(tried(load(tmp_path, tiny_dir, narrow_dir), tmp_path / "run", "tokenizers"))
    assert "two" in found["tokenizers"].figure
    text = stages(kl={"loss": {"fn": "cross_entropy"}, "task": "sums"})
    assert not failures(tried(load(tmp_path, tiny_dir, narrow_dir, stages=text), tmp_path / "run", "tokenizers"))


def test_a_student_whose_chat_template_asks_in_another_way_than_its_teacher_s(tmp_path, tiny_dir):
    other = "{% for m in messages %}<|im_start|>{{ m['role'] }}: {{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant: {% endif %}"
    student = changed(tmp_path / "student", tiny_dir, chat_template=other)
    (found,) = tried(load(tmp_path, tiny_dir, student), tmp_path / "run", "the same prompts")
    assert found.status == "warn"
    assert "different prompts" in found.figure
    assert [line.partition(":")[0] for line in found.shown] == ["teacher", "student"]
    plain = {"sums": {**SUMS, "template": "raw"}}
    assert not failures(tried(load(tmp_path, tiny_dir, student, tasks=plain), tmp_path / "run"))


def test_a_student_without_the_chat_template_of_its_teacher(tmp_path, tiny_dir):
    bare = changed(tmp_path / "bare", tiny_dir, chat_template=None)
    found = failures(tried(load(tmp_path, tiny_dir, bare), tmp_path / "run"))
    assert "different prompts" in found["the same prompts"].figure


@pytest.mark.parametrize("family", FAMILIES)
def test_no_family_s_chat_template_is_taken_for_a_fault(tmp_path, smollm2_dir, family):
    tokenizer = family_tokenizer(smollm2_dir, family)
    ask = ({"role": "user", "content": "What is 3+4?"},)
    for template in (templates.boxed, templates.think_answer, templates.raw):
        prompt = models.render_prompt(tokenizer, template, ask)
        found = rendering._reply(LocalModel(family, tmp_path, tokenizer), template, ask, prompt, family, "")
        assert found.status == "pass", found


def test_a_plain_template_without_a_place_for_the_question(tmp_path, tiny_dir, monkeypatch):
    text = "from dataclasses import replace\nfrom distill.tasks.templates import raw\nlost = replace(raw, name='lost', plain='Answer: ')\n"
    own_module(tmp_path, text, monkeypatch)
    found = failures(
        tried(load(tmp_path, tiny_dir, tasks={"sums": {**SUMS, "template": "mine_trials:lost"}}), tmp_path / "run")
    )
    assert "no place for the question" in found["prompt and reply"].figure


def test_a_completion_that_the_context_cuts_is_a_warning(tmp_path, tiny_dir):
    long = stages(traces={"sampling": {"temperature": 1.0, "max_tokens": 500}})
    found = {
        trial.subject: trial for trial in tried(load(tmp_path, tiny_dir, stages=long), tmp_path / "run", "context")
    }
    assert found["stages.traces"].status == "warn"
    assert found["stages.verdict"].status == "pass"


def test_a_chat_template_that_drops_the_instructions(tmp_path, tiny_dir):
    deaf = "{% for m in messages if m['role'] != 'system' %}<|im_start|>{{ m['role'] }}\n{{ m['content'] }}<|im_end|>\n{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    model = changed(tmp_path / "deaf", tiny_dir, chat_template=deaf)
    found = tried(load(tmp_path, model), tmp_path / "run", "prompt and reply")
    # The instructions go into the user's turn of such a template.
    assert not failures(found)
    assert "Reply as" in found[0].shown[0]


def own_module(folder: Path, text: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """A module of the user's own beside the recipe."""
    (folder / "mine_trials.py").write_text(text, encoding="utf-8")
    monkeypatch.syspath_prepend(str(folder))
    sys.modules.pop("mine_trials", None)


JUDGES = """
from distill.tasks.reasoning_gym_task import reasoning_gym
from distill.records import Verdict

def lenient(name, *, dataset, options=None, template="think_answer"):
    made = reasoning_gym(name, dataset=dataset, options=options, template=template)
    made.judge = lambda problem, completion, finished=True: Verdict(True, 1.0, "anything")
    return made

def strict(name, *, dataset, options=None, template="think_answer"):
    made = reasoning_gym(name, dataset=dataset, options=options, template=template)
    made.judge = lambda problem, completion, finished=True: Verdict(False, 0.0, None, "no answer")
    return made

def constant(group):
    return [1.0] * len(group)

def upside_down(group):
    return [-2.0 * v.score for v in group.verdicts]

def raises(group):
    raise ValueError("no")
"""


@pytest.mark.parametrize(("judge", "words"), [("lenient", "is accepted too"), ("strict", "no answer")])
def test_a_judge_that_accepts_or_refuses_everything(tmp_path, tiny_dir, monkeypatch, judge, words):
    own_module(tmp_path, JUDGES, monkeypatch)
    found = failures(
        tried(load(tmp_path, tiny_dir, tasks={"sums": {**SUMS, "fn": f"mine_trials:{judge}"}}), tmp_path / "run")
    )
    assert words in found["judge"].remedy


def test_a_template_that_does_not_read_the_form_of_the_answers(tmp_path, tiny_dir, monkeypatch):
    own_module(
        tmp_path,
        "from dataclasses import replace\nfrom distill.tasks.templates import boxed\n"
        "cut = replace(boxed, name='cut', extract=lambda text: (boxed.extract(text) or '')[:-1] or '0')\n",
        monkeypatch,
    )
    found = failures(
        tried(load(tmp_path, tiny_dir, tasks={"sums": {**SUMS, "template": "mine_trials:cut"}}), tmp_path / "run")
    )
    assert "gold" in found["judge"].remedy


GRPO = {"kind": "grpo", "model": "teacher", "task": "sums", "steps": 1, "prompts": 2, "group_size": 2, "sampling": SHORT, "engine": "transformers", "lr": 1e-6}  # fmt: skip


@pytest.mark.parametrize(
    ("rewards", "words"),
    [
        (["mine_trials:constant"], "same score"),
        (["accuracy", "mine_trials:upside_down"], "as much as the right one"),
        (["accuracy", "mine_trials:raises"], "Mend the reward"),
    ],
)
def test_rewards_that_do_not_tell_a_right_reply_from_others(tmp_path, tiny_dir, monkeypatch, rewards, words):
    own_module(tmp_path, JUDGES, monkeypatch)
    rl = stages(rl={**GRPO, "rewards": [{"fn": fn} for fn in rewards]})
    found = failures(tried(load(tmp_path, tiny_dir, stages=rl), tmp_path / "run"))
    assert words in found["rewards"].remedy


def test_a_reward_about_the_length_alone_is_not_called_constant(tmp_path, tiny_dir, monkeypatch):
    own_module(
        tmp_path, "def even(group):\n    return [1.0 if n % 2 == 0 else -1.0 for n in group.num_tokens]\n", monkeypatch
    )
    rl = stages(rl={**GRPO, "rewards": [{"fn": "mine_trials:even"}]})
    assert "rewards" not in failures(tried(load(tmp_path, tiny_dir, stages=rl), tmp_path / "run"))


def test_the_shipped_rewards_are_sound(tmp_path, tiny_dir):
    names = [{"fn": "accuracy"}, {"fn": "think_format"}, {"fn": "language"}, {"fn": "length", "cache": 4}]
    rl = stages(rl={**GRPO, "rewards": names}, control={**GRPO, "rewards": [{"fn": "random"}]})
    found = tried(load(tmp_path, tiny_dir, stages=rl), tmp_path / "run", "rewards")
    assert [trial.status for trial in found] == ["pass", "pass"]


def test_a_prompt_that_leaves_no_room_for_the_completion(tmp_path, tiny_dir):
    long = stages(traces={"sampling": {"temperature": 1.0, "max_tokens": 100_000}})
    found = failures(tried(load(tmp_path, tiny_dir, stages=long), tmp_path / "run"))
    assert "100000 of completion, of 512" in found["context"].figure


CODE: dict[str, Any] = {"fn": "humaneval"}


def code_stages() -> dict[str, Any]:
    return {"verdict": {"kind": "eval", "model": "teacher", "task": "code", "problems": 4, "sampling": SHORT, "engine": "transformers"}}  # fmt: skip


def test_a_sandbox_command_without_isolation_lets_a_hostile_program_out(tmp_path, tiny_dir):
    options = {"sandbox_command": sys.executable}
    resolved = load(tmp_path, tiny_dir, tasks={"code": {**CODE, **options}}, stages=code_stages())
    found = failures(tried(resolved, tmp_path / "run", "sandbox"))
    assert "reads files of this machine" in found["sandbox"].figure


def test_nothing_gets_out_of_bubblewrap(tmp_path, tiny_dir):
    try:
        bubblewrap()
    except UnavailableError as error:
        missing("bwrap", str(error))
    found = tried(
        load(tmp_path, tiny_dir, tasks={"code": CODE}, stages=code_stages()), tmp_path / "run", "sandbox", "judge"
    )
    assert {trial.name: trial.status for trial in found} == {"sandbox": "pass", "judge": "pass"}
    assert "does not get out" in next(trial for trial in found if trial.name == "sandbox").figure


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("", "no rows"),
        ('{"question": "1 + 1?"}\n' * 8, "left out"),
        ("not json\n" * 8, "not usable"),
    ],
)
def test_a_data_file_that_gives_nothing_to_learn(tmp_path, tiny_dir, text, words):
    file = tmp_path / "rows.jsonl"
    file.write_text(text, encoding="utf-8")
    learn = {"text": {"kind": "train", "model": "teacher", "task": "sums", "data": str(file), "loss": {"fn": "cross_entropy"}, "steps": 1, "lr": 1e-3}}  # fmt: skip
    resolved = load(tmp_path, tiny_dir, stages=learn)
    (found,) = rendering.data(TrialSetup(resolved, tmp_path / "run", ("text",)))
    assert found.status == "fail"
    assert words in found.remedy


def test_rows_that_are_longer_than_max_tokens_are_counted(tmp_path, tiny_dir):
    file = tmp_path / "rows.jsonl"
    rows = [{"prompt": f"{n} + 1?", "completion": "word " * (200 if n % 4 else 2)} for n in range(16)]
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    learn = {"text": {"kind": "train", "model": "teacher", "task": "sums", "data": str(file), "loss": {"fn": "cross_entropy"}, "steps": 1, "lr": 1e-3, "max_tokens": 100}}  # fmt: skip
    (found,) = rendering.data(TrialSetup(load(tmp_path, tiny_dir, stages=learn), tmp_path / "run", ("text",)))
    assert found.status == "fail"
    assert "12 left out: longer than max_tokens" in found.remedy


@pytest.mark.fault(4)
def test_a_disk_that_is_too_small(tmp_path, tiny_dir, monkeypatch):
    resolved = load(tmp_path, tiny_dir)
    rows = plan.predict(resolved, a_machine())
    setup = TrialSetup(resolved, tmp_path / "run", tuple(resolved.stages))
    assert resources.disk(setup, rows).status == "pass"
    monkeypatch.setattr(resources, "free_space", lambda folder: 1000)
    assert resources.disk(setup, rows).status == "fail"
    assert free_space(tmp_path) > 1000


def a_machine() -> Machine:
    from distill.machine import measure

    return measure([(64, 128)])


PERTURBED = """
from distill.engines.factories import transformers

def perturbed(model_dir, config, **given):
    engine = transformers(model_dir, config, **given)
    whole = engine.generate
    def generate(requests, sampling, *, top_k=0):
        for one in whole(requests, sampling, top_k=top_k):
            one.logprob_T[:] -= 0.5
            one.top.ids_E[:] = (one.top.ids_E + 1) % 49152
            yield one
    engine.generate = generate
    return engine
"""


def test_an_engine_that_computes_another_distribution_than_the_trainer(tmp_path, tiny_dir, monkeypatch):
    own_module(tmp_path, PERTURBED, monkeypatch)
    sound = paths(load(tmp_path, tiny_dir), tmp_path)
    assert {trial.name: trial.status for trial in sound} == dict.fromkeys(
        ("distribution", "engine and trainer", "sampled ids"), "pass"
    )
    off = stages(
        traces={"engine": {"fn": "mine_trials:perturbed"}}, verdict={"engine": {"fn": "mine_trials:perturbed"}}
    )
    found = failures(paths(load(tmp_path, tiny_dir, stages=off), tmp_path))
    assert {"distribution", "engine and trainer"} <= {*found}


def paths(resolved: recipe.Recipe, folder: Path, *more: str) -> list[Trial]:
    from distill.run.trials.engine_path import engine_paths

    with open(folder / "screen", "w", encoding="utf-8") as file:
        setup = TrialSetup(resolved, folder / "run", ("traces", *more))
        return list(engine_paths(setup, a_machine(), Screen(file)))


@pytest.mark.parametrize(("answer", "status"), [("4", "pass"), ("5", "warn")])
def test_a_teacher_that_is_never_right_before_a_filter_of_right_ones(tmp_path, answer, status):
    rows = [{"question": f"What is 2 + 2, time {n}?", "answer": answer} for n in range(40)]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    asked = tuple(f"<|user|>{row['question']}<|end|><|assistant|>" for row in rows[:16])
    teacher = tiny_bytes.save(tmp_path / "teacher", 2, tiny_bytes.tokenizer(), "4", asked)
    tasks = {"sums": {"fn": "jsonl", "path": str(tmp_path / "rows.jsonl"), "template": "direct"}}
    clean = {"kind": "filter", "data": "traces", "keep": [{"fn": "correct"}]}
    found = paths(load(tmp_path, teacher, tasks=tasks, stages=stages(clean=clean)), tmp_path, "clean")
    assert {trial.name: trial.status for trial in found}["right answers"] == status
    assert "right answers" not in {trial.name for trial in paths(load(tmp_path, teacher, tasks=tasks), tmp_path)}


@pytest.mark.parametrize("name", sorted(path.name for path in RECIPES.glob("*.yaml")))
def test_no_shipped_recipe_raises_a_false_alarm(tmp_path, name):
    """The trials that a run makes by itself; what lies on the hub is not tried here."""
    resolved = recipe.load(RECIPES / name, [])
    found = tried(resolved, tmp_path / "run")
    assert not failures(found)
    on_hub = any("/" in model.source and "://" not in model.source for model in resolved.models.values())
    assert on_hub or {"prompt and reply", "judge"} <= {trial.name for trial in found if trial.status == "pass"}


def test_the_command_prints_every_trial_and_its_status_is_its_exit_status(tmp_path, tiny_dir):
    engine = {"engine": REFERENCE}
    tree = {
        "name": "whole",
        "models": {"teacher": str(tiny_dir), "student": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": stages(traces=engine, verdict=engine),
    }
    made = Project(tmp_path, tree)
    done = made.distill("doctor", made.recipe.name, "--json")
    assert done.returncode == 0, done.stderr
    said = json.loads(done.stdout)
    assert said["ok"]
    names = {trial["name"] for trial in said["trials"]}
    assert {
        "prompt and reply",
        "judge",
        "disk",
        "memory",
        "time",
        "distribution",
        "engine and trainer",
        "sampled ids",
    } <= names
    assert not made.run_dir.exists()
    made.tree["stages"]["traces"]["sampling"] = {"max_tokens": 100_000}
    failed = made.rewrite().distill("doctor", made.recipe.name)
    assert failed.returncode == 1
    assert "FAILED    context  stages.traces" in failed.stdout
    assert "Lower sampling.max_tokens" in failed.stdout


def test_a_run_makes_the_cheap_trials_once_and_stops_if_one_fails(tmp_path, tiny_dir):
    engine = {"engine": REFERENCE}
    tree = {
        "name": "tried",
        "models": {"teacher": str(tiny_dir), "student": str(tiny_dir)},
        "tasks": {"sums": SUMS},
        "stages": {"traces": {**stages(traces=engine)["traces"], "sampling": {"max_tokens": 600}}},
    }
    made = Project(tmp_path, tree)
    refused = made.run()
    assert refused.returncode == 2
    assert "stages.traces: context: " in refused.stderr
    assert "distill doctor" in refused.stderr
    assert not (made.run_dir / "traces").exists()
    made.tree["stages"]["traces"]["sampling"] = {"max_tokens": 4}
    assert made.rewrite().run().returncode == 0
    assert json.loads((made.run_dir / ".tried").read_text())["stages"] == ["traces"]
    # What the trials refuse runs all the same if it is asked for.
    (tmp_path / "other").mkdir()
    forced = Project(tmp_path / "other", {**tree, "tasks": {"sums": {**SUMS, "fn": "mine_judge:strict"}}})
    (tmp_path / "other" / "mine_judge.py").write_text(JUDGES, encoding="utf-8")
    assert forced.run().returncode == 2
    assert forced.run("--no-trials").returncode == 0
