"""Train by stored distributions in transformers' Trainer, or in a trainer made of it such as TRL's SFTTrainer.

    class KLSFTTrainer(KLTrainerMixin, SFTTrainer): ...

    trainer = KLSFTTrainer(model, args, train_dataset=distill.load_traces(folder), processing_class=tokenizer, loss="forward_kl")

`KLTrainerMixin` makes the batches (`distill.traces.batches.collate`) and the loss (`distill.losses`); everything else is the
trainer's: optimiser, schedule, logging, checkpoints, PEFT. A step's loss is the mean over the learned tokens of the whole step,
over all accumulated micro-batches and all processes, and the evaluation's loss the mean over the tokens of the evaluation set, so
neither depends on how the data were cut into batches.

In one process the logits of all tokens are never held: the loss takes the last hidden states and the output head. A model that is
wrapped (several processes, torch.compile) is called as a whole, and the loss takes its logits.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Iterator, Mapping
from typing import Any

import torch
import transformers
from torch import Tensor

from distill import losses, models
from distill.errors import UserError
from distill.losses import Head
from distill.traces.batches import IGNORED, collate
from distill.training.forward import base_model, decoder_of, is_adapted
from distill.training.loss.head import LossFn

_REFUSED: Mapping[str, tuple[Any, str]] = {
    "packing": (
        False,
        "it cuts and joins rows by their tokens alone, which tears the distributions off the tokens that they are about",
    ),
    "padding_free": (
        False,
        "the trainer then makes the batches itself, without the distributions; padding never reaches the head anyway",
    ),
    "assistant_only_loss": (False, "the stored completions are what is learned"),
    "completion_only_loss": (None, "the stored completions are what is learned"),
    "truncation_mode": ("keep_start", "a trace is cut at its end, where nothing follows that was predicted from it"),
    "loss_type": ("nll", "the loss is the one of `loss=`"),
    "label_smoothing_factor": (0, "the loss is the one of `loss=`"),
    "group_by_length": (False, "the rows have no column `input_ids` to measure; leave them in random order"),
}
"""Settings of the trainers' arguments that have no meaning here: the only value that is taken, and the reason."""

_EXACT, _ROUNDED = 1e-4, 2e-2
"""Relative errors below which the model's logits count as its head's product: in float32, and in half precision."""


class KLTrainerMixin:
    """Put before a transformers Trainer: `class KLSFTTrainer(KLTrainerMixin, SFTTrainer)`.

    loss, loss_options: a loss on stored distributions by its name in a recipe, or a function (`losses.loss_function`).
    vocab_size: ids that take part in the softmax; None = the length of processing_class, if it is a tokenizer.

    train_dataset and eval_dataset hold traces: `distill.load_traces(folder)`, its `to_datasets()`, or rows like them. Traces longer
    than `args.max_length`, where the arguments have it, are cut. Raises UserError for settings that would be ignored or wrong.
    """

    def __init__(
        self,
        model: Any = None,
        args: Any = None,
        data_collator: Any = None,
        train_dataset: Any = None,
        eval_dataset: Any = None,
        *more: Any,
        loss: str | LossFn = "forward_kl",
        loss_options: Mapping[str, Any] | None = None,
        vocab_size: int | None = None,
        **rest: Any,
    ) -> None:
        tokenizer: Any = rest.get("processing_class", more[0] if more else None)
        _refuse(args, rest)
        _check_tokenizer(tokenizer, train_dataset, eval_dataset)
        self._kl_loss = losses.loss_function(loss, loss_options)
        self._kl_named = loss
        self._kl_vocab_size = vocab_size or (len(tokenizer) if hasattr(tokenizer, "get_vocab") else None)
        self._kl_fused: bool | None = None
        self._kl_eval: list[Tensor] = []
        args.remove_unused_columns = False
        if hasattr(args, "dataset_kwargs"):
            args.dataset_kwargs = {**(args.dataset_kwargs or {}), "skip_prepare_dataset": True}
        if data_collator is None:
            pad_id = getattr(tokenizer, "pad_token_id", None)
            data_collator = functools.partial(
                collate,
                pad_id=pad_id or 0,
                max_length=getattr(args, "max_length", None),
                pad_to_multiple_of=getattr(args, "pad_to_multiple_of", None),
                tail_draws=_tail_draws(train_dataset),
            )
        train, held_out = _tables(train_dataset), _tables(eval_dataset)
        super().__init__(model, args, data_collator, train, held_out, *more, **rest)  # type: ignore[call-arg]
        # The Trainer counts the labels of a whole step only for models that take the count, and `compute_loss` does.
        self.model_accepts_loss_kwargs = True
        _refuse_made(self)

    def compute_loss(
        self: Any, model: Any, inputs: Any, return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """Return the sum over the learned tokens / num_items_in_batch (their number over the whole step; None: in this batch)."""
        if return_outputs:
            outputs = model(**_read(inputs))
            student, head = outputs.logits, None
        else:
            outputs = None
            student, head = self._kl_student(model, inputs)
        state = self.state
        loss = losses.on_batch(
            self._kl_loss,
            student,
            inputs,
            head=head,
            vocab_size=self._kl_vocab_size,
            denominator=num_items_in_batch,
            progress=state.global_step / state.max_steps if state.max_steps > 0 else 0.0,
        )
        if num_items_in_batch is not None and self.args.average_tokens_across_devices:
            # The gradients are averaged over the processes; the number of tokens is that of all of them.
            loss = loss * self.accelerator.num_processes
        return (loss, outputs) if return_outputs else loss

    def prediction_step(
        self: Any, model: Any, inputs: Any, prediction_loss_only: bool, ignore_keys: list[str] | None = None
    ) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """Return the batch's loss and, for metrics of the caller's, its logits and labels."""
        inputs = self._prepare_inputs(inputs)
        with torch.no_grad(), self.compute_loss_context_manager():
            if prediction_loss_only:
                logits, (student, head) = None, self._kl_student(model, inputs)
            else:
                student, head = model(**_read(inputs)).logits, None
                logits = student
            loss_BT = losses.on_batch(
                self._kl_loss, student, inputs, head=head, vocab_size=self._kl_vocab_size, reduction="none"
            )
        sums_B = torch.stack([loss_BT.sum(1), (inputs["labels"][:, 1:] != IGNORED).sum(1).to(loss_BT.dtype)], dim=1)
        # Rows that fill up the last batch of several processes are left out here.
        self._kl_eval.append(self.accelerator.gather_for_metrics(sums_B).double().sum(0).cpu())
        total, num = sums_B.sum(0)
        labels = None if prediction_loss_only else inputs["labels"]
        return total / num.clamp(min=1), logits, labels

    def evaluation_loop(
        self: Any,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """As the trainer's, with the mean over the tokens of the whole set as the loss, not over batches."""
        self._kl_eval = []
        output = super().evaluation_loop(  # type: ignore[misc]
            dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix
        )
        if self._kl_eval:
            total, num = torch.stack(self._kl_eval).sum(0).tolist()
            output.metrics[f"{metric_key_prefix}_loss"] = total / max(num, 1)
        return output

    def _kl_student(self: Any, model: Any, inputs: Any) -> tuple[Tensor, Head | None]:
        """Return the last hidden states and the head, or the logits and None where the model must be called as a whole."""
        wrapped = self.accelerator.unwrap_model(model) is not model
        if not wrapped and self.accelerator.num_processes > 1 and torch.is_grad_enabled():
            raise UserError(
                "the model is not wrapped for several processes, so their gradients would not be added up. If the script calls evaluate() "
                "before train(), the trainer leaves it unwrapped: call it after, or set eval_on_start=True."
            )
        if wrapped or not self._kl_can_fuse(model, inputs):
            return model(**_read(inputs)).logits, None
        with self.accelerator.autocast():
            hidden = decoder_of(model)(**_read(inputs)).last_hidden_state
        return hidden, _head(model, self._kl_vocab_size, hidden.dtype)

    def _kl_can_fuse(self: Any, model: Any, inputs: Any) -> bool:
        """Whether this model's logits are its head's product, tried once on a few tokens of the first batch."""
        if self._kl_fused is None:
            few = {name: value[:1, :16] for name, value in _read(inputs).items() if isinstance(value, Tensor)}
            with torch.no_grad(), _evaluating(model), self.accelerator.autocast():
                logits = model(**few, use_cache=False).logits[0].float()
                hidden = decoder_of(model)(**few, use_cache=False).last_hidden_state[0]
                product = _logits(hidden, _head(model, None, hidden.dtype))
            error = (logits - product).abs().max() / logits.abs().max().clamp(min=1e-6)
            self._kl_fused = bool(error < (_EXACT if hidden.dtype == torch.float32 else _ROUNDED))
        return bool(self._kl_fused)


class KLTrainer(KLTrainerMixin, transformers.Trainer):  # type: ignore[misc]
    """transformers' Trainer on stored distributions; see `KLTrainerMixin`."""


def _read(inputs: Mapping[str, Any]) -> dict[str, Any]:
    """Return what the model reads of a batch."""
    return {"input_ids": inputs["input_ids"], "attention_mask": inputs["attention_mask"], "use_cache": False}


def _head(model: Any, vocab_size: int | None, dtype: torch.dtype) -> Head:
    """Return the head in the dtype of the hidden states, as a layer under autocast has it."""
    head = Head.of(model, vocab_size)
    return Head(head.weight.to(dtype), None if head.bias is None else head.bias.to(dtype), head.form)


def _logits(hidden: Tensor, head: Head) -> Tensor:
    assert head.form is not None, "Head.of fills it in"
    z = torch.nn.functional.linear(hidden, head.weight, head.bias).float() * head.form.scale
    cap = head.form.softcap
    return z if cap is None else cap * torch.tanh(z / cap)


@contextlib.contextmanager
def _evaluating(model: Any) -> Iterator[None]:
    before = model.training
    model.eval()
    try:
        yield
    finally:
        model.train(before)


def _refuse(args: Any, rest: Mapping[str, Any]) -> None:
    """Raise UserError for settings that would have no effect, or a wrong one."""
    if args is None:
        raise UserError("KLTrainerMixin: give the trainer its arguments (TrainingArguments, SFTConfig) as `args`.")
    for name, (value, reason) in _REFUSED.items():
        found = getattr(args, name, value)
        if found != value and found not in (None, True if name == "completion_only_loss" else value):
            raise UserError(f"{name}={found!r}: {reason}. Leave it at {value!r}.")
    for name in ("compute_loss_func", "formatting_func"):
        if rest.get(name) is not None:
            raise UserError(f"{name}: the loss and the batches are made from the stored traces. Remove it.")


def _refuse_made(trainer: Any) -> None:
    """Raise UserError for models and machines that this loss does not support, once the trainer has found them out."""
    args, model = trainer.args, trainer.model
    if args.n_gpu > 1:
        raise UserError(
            "one process for several GPUs (nn.DataParallel) is not supported: start the script with `accelerate launch` or `torchrun`."
        )
    if args.world_size > 1 and not args.average_tokens_across_devices:
        raise UserError(
            "average_tokens_across_devices=False weighs the processes' tokens unequally: remove it (True is the default)."
        )
    parallelism = getattr(trainer.accelerator, "parallelism_config", None)
    if parallelism is not None and (parallelism.cp_enabled or parallelism.sp_enabled or parallelism.tp_enabled):
        raise UserError(
            "context, sequence and tensor parallelism divide a trace over processes, which the loss does not support. Use "
            "data parallelism (DDP, FSDP)."
        )
    if is_adapted(model) and any(config.is_prompt_learning for config in model.peft_config.values()):
        raise UserError("prompt learning (prefix or prompt tuning) puts tokens before the trace's own. Use LoRA.")
    if getattr(trainer, "aux_loss_enabled", False):
        raise UserError(
            "the router's auxiliary loss of a mixture-of-experts model is not added to the loss: set router_aux_loss_coef=0.0."
        )
    if not hasattr(base_model(model), "get_output_embeddings") or base_model(model).get_output_embeddings() is None:
        raise UserError("the model has no output head over the vocabulary: load it with AutoModelForCausalLM.")


def _check_tokenizer(tokenizer: Any, *datasets: Any) -> None:
    """Raise UserError if the traces' tokenizer is not the student's."""
    if not hasattr(tokenizer, "get_vocab"):
        return
    for dataset in datasets:
        theirs = _metadata(dataset).get("tokenizer")
        if theirs is not None and theirs != models.tokenizer_fingerprint(tokenizer):
            raise UserError(
                "the traces were made with another tokenizer than processing_class, and their distributions are over its ids. Use a "
                "student with the teacher's tokenizer; a train stage of a recipe can learn across tokenizers (loss: uld)."
            )


def _tables(dataset: Any) -> Any:
    """Return traces as a `datasets` table, which is all that SFTTrainer takes; other data sets as they are."""
    if isinstance(dataset, dict):
        return {name: _tables(each) for name, each in dataset.items()}
    return dataset.to_datasets() if hasattr(dataset, "to_datasets") else dataset


def _metadata(dataset: Any) -> Mapping[str, Any]:
    """Return how the traces were made, where the data set says it."""
    found = getattr(dataset, "metadata", None)
    return found if isinstance(found, Mapping) else {}


def _tail_draws(dataset: Any) -> int:
    return int(_metadata(dataset).get("tail_draws", 0))
