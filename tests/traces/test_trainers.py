"""KL from stored traces in transformers' Trainer and TRL's SFTTrainer, against a train stage's own loop."""

from __future__ import annotations

import functools
import json

import datasets
import numpy as np
import pytest
import torch
import trace_samples as samples
import transformers
from peft import LoraConfig
from trl import SFTConfig

from distill import losses, models
from distill.errors import UserError
from distill.integrations.trainer import KLTrainer
from distill.integrations.trl import KLSFTTrainer
from distill.recipe import TrainStage
from distill.traces.batches import collate, rows_of
from distill.training.loop import train
from distill.training.loss.metrics import distribution_metrics
from distill.training.loss.objective import StoredObjective
from distill.training.packing import examples_of, pack
from distill.training.step import Length, Step

NUMBERS = range(8, 20)
STEPS, LR, BETAS = 3, 1e-2, (0.9, 0.95)
PLAIN = {
    "max_steps": STEPS, "learning_rate": LR, "adam_beta1": BETAS[0], "adam_beta2": BETAS[1], "max_grad_norm": 1.0,
    "lr_scheduler_type": "constant", "logging_steps": 1, "report_to": "none", "use_cpu": True, "bf16": False,
    "per_device_train_batch_size": 2, "gradient_accumulation_steps": 6, "per_device_eval_batch_size": 5,
    "gradient_checkpointing": False, "save_strategy": "no", "disable_tqdm": True,
}  # fmt: skip
KINDS = {"trl": (KLSFTTrainer, SFTConfig), "transformers": (KLTrainer, transformers.TrainingArguments)}


def rows(numbers=NUMBERS):
    return list(rows_of(samples.traces(numbers, tokens=8)))


class Stored(list):
    """Rows with the metadata of their folder, as `distill.load_traces` has them."""

    metadata: dict = {}  # noqa: RUF012

    def to_datasets(self):
        return datasets.Dataset.from_list([{k: np.asarray(v).tolist() for k, v in row.items()} for row in self])


@functools.cache
def tokenizer_in(folder):
    return models.load_tokenizer(folder)


def trainer(kind, tiny_dir, tmp_path, *, model=None, train_rows=None, more=None, **arguments):
    make, config = KINDS[kind]
    args = config(output_dir=str(tmp_path / kind), **{**PLAIN, **arguments})
    return make(
        model or models.load(tiny_dir, dtype="float32"),
        args,
        train_dataset=Stored(rows() if train_rows is None else train_rows),
        processing_class=tokenizer_in(tiny_dir),
        **(more or {}),
    )


def logged(found, key="loss"):
    return [line[key] for line in found.state.log_history if key in line]


@functools.cache
def stage(tiny_dir, folder, loss="forward_kl"):
    """What a train stage does in STEPS steps over all traces: its model, and the losses."""
    config = TrainStage(
        kind="train", model="m", data="./d", steps=STEPS, lr=LR, betas=BETAS, warmup_ratio=0, min_lr_ratio=1.0,
        max_grad_norm=1.0, dtype="float32", micro_tokens=64,
    )  # fmt: skip
    model = models.load(tiny_dir, dtype="float32")
    examples = list(examples_of(samples.traces(NUMBERS, tokens=8)))
    folder.mkdir()
    train(
        model,
        lambda start, policy: iter([Step(pack(examples, micro_tokens=64)) for _ in range(STEPS)]),
        StoredObjective(losses.loss_function(loss), distribution_metrics),
        config,
        length=Length(STEPS),
        vocab_size=samples.VOCAB,
        folder=folder,
    )
    lines = (folder / "metrics.jsonl").read_text().splitlines()
    return model, [json.loads(line)["loss"] for line in lines]


def check_same(model, expected):
    for (name, value), other in zip(model.named_parameters(), expected.parameters(), strict=True):
        torch.testing.assert_close(value.data, other.data, atol=2e-4, rtol=1e-3, msg=name)


@pytest.fixture(scope="module")
def by_stage(tiny_dir, tmp_path_factory):
    return stage(tiny_dir, tmp_path_factory.mktemp("stage") / "kl")


@pytest.mark.parametrize(("kind", "size"), [("trl", 2), ("trl", 6), ("transformers", 2)])
def test_losses_and_weights_follow_a_train_stage_however_a_step_is_accumulated(
    kind, size, by_stage, tiny_dir, tmp_path
):
    model, expected = by_stage
    found = trainer(
        kind, tiny_dir, tmp_path, per_device_train_batch_size=size, gradient_accumulation_steps=12 // size
    )  # fmt: skip
    found.train()
    assert found._kl_fused
    assert logged(found) == pytest.approx(expected, rel=2e-4)
    check_same(found.model, model)


def test_a_model_that_must_be_called_as_a_whole_learns_the_same(by_stage, tiny_dir, tmp_path):
    found = trainer("trl", tiny_dir, tmp_path)
    found._kl_fused = False
    found.train()
    assert logged(found) == pytest.approx(by_stage[1], rel=2e-4)
    check_same(found.model, by_stage[0])


def test_gradient_checkpointing_and_plain_rows(by_stage, tiny_dir, tmp_path):
    found = trainer("transformers", tiny_dir, tmp_path, gradient_checkpointing=True)
    found.train_dataset = rows()
    found.train()
    assert logged(found) == pytest.approx(by_stage[1], rel=2e-4)
    check_same(found.model, by_stage[0])


@pytest.mark.parametrize(("kind", "fused"), [("trl", True), ("transformers", False)])
def test_the_evaluation_loss_is_a_mean_over_tokens(kind, fused, tiny_dir, tmp_path):
    held_out = rows(range(30, 42))
    found = trainer(kind, tiny_dir, tmp_path, more={"eval_dataset": Stored(held_out)})
    found._kl_fused = fused
    result = found.evaluate()
    batch = collate(held_out)
    with torch.no_grad():
        logits = found.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    assert result["eval_loss"] == pytest.approx(losses.forward_kl(logits, batch).item(), rel=1e-5)


def test_metrics_of_one_s_own_get_logits_and_labels(tiny_dir, tmp_path):
    seen = {}

    def compute_metrics(prediction):
        seen["shapes"] = prediction.predictions.shape[:2], prediction.label_ids.shape
        return {"one": 1.0}

    more = {"eval_dataset": Stored(rows(range(30, 34))), "compute_metrics": compute_metrics}
    result = trainer("transformers", tiny_dir, tmp_path, more=more).evaluate()
    assert result["eval_one"] == 1.0
    assert seen["shapes"][0] == seen["shapes"][1]


def test_lora_trains_the_adapter_alone(tiny_dir, tmp_path):
    lora = LoraConfig(r=4, target_modules=["q_proj", "v_proj"], task_type="CAUSAL_LM", lora_dropout=0.0)
    found = trainer("trl", tiny_dir, tmp_path, more={"peft_config": lora})
    before = {name: value.detach().clone() for name, value in found.model.named_parameters()}
    expected = found.model
    batch = collate(rows())
    logits = expected(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits
    first = losses.forward_kl(logits, batch)
    found.train()
    assert found._kl_fused
    assert logged(found)[0] == pytest.approx(first.item(), rel=1e-4)
    assert logged(found)[-1] < logged(found)[0]
    for name, value in found.model.named_parameters():
        assert ("lora_" in name) == (not torch.equal(value, before[name])), name


def test_other_losses_and_one_s_own(tiny_dir, tmp_path):
    def twice(student, targets):
        return 2 * losses.loss_function("jsd", {"beta": 0.3})(student, targets)

    one = trainer("trl", tiny_dir, tmp_path / "1", more={"loss": "jsd", "loss_options": {"beta": 0.3}}, max_steps=1)
    other = trainer("trl", tiny_dir, tmp_path / "2", more={"loss": twice}, max_steps=1)
    one.train()
    other.train()
    assert logged(other)[0] == pytest.approx(2 * logged(one)[0], rel=1e-5)


def test_weights_of_a_loss_change_with_the_progress(tiny_dir, tmp_path):
    options = {"ce_weight": 1.0, "kl_weight": 0.0, "final_ce_weight": 0.0, "final_kl_weight": 0.0}
    found = trainer("trl", tiny_dir, tmp_path, more={"loss": "ce_kl", "loss_options": options}, learning_rate=0.0)
    found.train()
    first, second, third = logged(found)
    assert second == pytest.approx(first * 2 / 3, rel=1e-5)
    assert third == pytest.approx(first / 3, rel=1e-5)


def test_a_model_that_is_not_wrapped_for_several_processes_is_not_trained(tiny_dir, tmp_path, monkeypatch):
    found = trainer("transformers", tiny_dir, tmp_path)
    monkeypatch.setattr(type(found.accelerator), "num_processes", 2)
    with pytest.raises(UserError, match="their gradients would not be added up"):
        found.compute_loss(found.model, collate(rows()))
    with torch.no_grad():
        assert found.compute_loss(found.model, collate(rows())) > 0


def test_long_traces_are_cut(tiny_dir, tmp_path):
    found = trainer("trl", tiny_dir, tmp_path, max_length=9)
    batch = next(iter(found.get_train_dataloader()))
    assert batch["input_ids"].shape[1] == 9


def test_bfloat16_autocast(tiny_dir, tmp_path):
    exact = trainer("trl", tiny_dir, tmp_path / "1", max_steps=1)
    exact.train()
    found = trainer("trl", tiny_dir, tmp_path / "2", max_steps=1, bf16=True)
    found.train()
    assert found._kl_fused
    assert logged(found)[0] == pytest.approx(logged(exact)[0], rel=0.02)
    assert logged(found)[0] != logged(exact)[0]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ({"packing": True}, "packing=True: it cuts and joins rows"),
        ({"padding_free": True}, "padding_free=True: the trainer then makes the batches itself"),
        ({"assistant_only_loss": True}, "the stored completions are what is learned"),
        ({"completion_only_loss": False}, "the stored completions are what is learned"),
        ({"loss_type": "dft"}, "the loss is the one of `loss=`"),
        ({"label_smoothing_factor": 0.1}, "the loss is the one of `loss=`"),
    ],
)
def test_settings_that_would_be_ignored_or_wrong_are_refused(arguments, said, tiny_dir, tmp_path):
    with pytest.raises(UserError, match=said):
        trainer("trl", tiny_dir, tmp_path, model="not loaded", **arguments)


def test_a_wrong_loss_tokenizer_or_adapter_is_refused(tiny_dir, tmp_path, mistral):
    from peft import PromptTuningConfig

    with pytest.raises(UserError, match="Did you mean 'forward_kl'"):
        trainer("trl", tiny_dir, tmp_path, model="not loaded", more={"loss": "foward_kl"})
    with pytest.raises(UserError, match="beta: must lie between 0 and 1"):
        trainer("trl", tiny_dir, tmp_path, model="not loaded", more={"loss": "jsd", "loss_options": {"beta": 1}})

    more = {"eval_dataset": Stored(rows())}
    more["eval_dataset"].metadata = {"tokenizer": models.tokenizer_fingerprint(mistral)}
    with pytest.raises(UserError, match="another tokenizer than processing_class"):
        trainer("trl", tiny_dir, tmp_path, model="not loaded", more=more)
    prompts = PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=2)
    with pytest.raises(UserError, match="Use LoRA"):
        trainer("trl", tiny_dir, tmp_path, more={"peft_config": prompts})
