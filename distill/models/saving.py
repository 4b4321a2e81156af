"""Save a model, and prove that what is on the disk is what was in memory.

`rehearse_save` runs before training: whatever can make the save fail, fails then. `label_logps` of the trained model, taken
before its adapter is merged, are what `prove_saved` compares the reloaded model with.
"""

from __future__ import annotations

import copy
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from distill import machine
from distill.models.loading import model_class
from distill.models.lora import checkpoint_weights
from distill.models.tokenizer import load_tokenizer, template_hash, tokenizer_fingerprint
from distill.records import Array, UserError

LENGTHS = (40, 24, 7)
"""Tokens of the documents on which a saved model is compared."""
EXACT, ROUNDED = 1e-3, 0.2
"""Nats by which log-probabilities of one model, computed in two ways, may differ: in float32, and in half precision."""
OUTLIERS = 0.05
"""Share of tokens that may differ by more: rounding moves a router's or a threshold's choice."""
COPY_SHARE = 0.4
"""The share of the memory that a reloaded copy of a model may take."""


# ------------------------------------------------------------------------------------------- before training


def mend_generation_config(model: Any) -> str:
    """Make a generation config savable; return what was changed, for the user, or an empty text.

    transformers loads generation configs that contradict themselves, and refuses to save them: after training.
    """
    config = getattr(model, "generation_config", None)
    if config is None or _savable(config):
        return ""
    if not config.do_sample:
        config.do_sample = True
        if _savable(config):
            return "generation_config: do_sample set to true, without which its sampling settings cannot be saved"
    kept = {key: getattr(config, key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
    model.generation_config = type(config)(**kept)
    return "generation_config: contradicts itself and cannot be saved; only its token ids are kept"


def _savable(config: Any) -> bool:
    with tempfile.TemporaryDirectory() as folder:
        try:
            config.save_pretrained(folder)
        except ValueError:
            return False
    return True


def rehearse_save(model: Any, tokenizer: Any, name: str) -> None:
    """Save a model without its weights to a temporary folder, and read it again. Raises UserError if that does not work.

    Checked: config, tokenizer and chat template come back the same, and the weights have a name each in the format of
    the checkpoint. model: without an adapter. name: of the model in the recipe, for errors.
    """
    from transformers import AutoConfig
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    with tempfile.TemporaryDirectory() as folder:
        try:
            model.save_pretrained(folder, state_dict={})
            named = {key: tensor.to("meta") for key, tensor in model.state_dict().items()}
            checkpoint_weights(remove_tied_weights_from_state_dict(named, model), model)
            tokenizer.save_pretrained(folder)
            AutoConfig.from_pretrained(folder, trust_remote_code=model.is_remote_code())
            again = load_tokenizer(folder, trust_remote_code=model.is_remote_code())
        # Configs and tokenizers of any architecture may refuse to be written or read, in their own words.
        except Exception as error:
            raise UserError(
                f"{name}: cannot be saved by transformers, so nothing is trained ({type(error).__name__}: {error}). Correct its "
                "config.json or tokenizer files."
            ) from error
    if (tokenizer_fingerprint(again), template_hash(again)) != (
        tokenizer_fingerprint(tokenizer),
        template_hash(tokenizer),
    ):
        raise UserError(
            f"{name}: its tokenizer is not the same after it is saved and loaded by transformers, so the trained model would "
            "read other ids. Save the tokenizer once with save_pretrained, look at the difference, and name that folder."
        )


def rehearse_merge(model: Any) -> None:
    """Merge a copy of a model's adapter, with random numbers in it, and compare the two. Raises UserError if they differ.

    Not done where a copy does not fit the memory.
    """
    import torch

    if not _fits_twice(model):
        return
    copied = copy.deepcopy(model)
    generator = torch.Generator().manual_seed(0)
    with torch.no_grad():
        for parameter in copied.parameters():
            if parameter.requires_grad:
                noise = torch.randn(parameter.shape, generator=generator)
                parameter.add_(0.02 * noise.to(parameter.device, parameter.dtype))
    trained_T = label_logps(copied)
    check_merged(copied.merge_and_unload(), trained_T)


# -------------------------------------------------------------------------------------------- after training


def check_finite(model: Any, where: str) -> None:
    """Raise UserError if a weight of a model is infinite or not a number. where: whose model, for the message."""
    import torch

    bad = [
        name
        for name, tensor in model.state_dict().items()
        if tensor.is_floating_point() and not bool(torch.isfinite(tensor).all())
    ]
    if bad:
        raise UserError(
            f"{where}: {len(bad)} of the model's tensors hold infinite or undefined numbers ({', '.join(bad[:3])}), so it is not "
            f"saved. Training has diverged: lower lr, raise warmup_ratio, and begin again with --redo {where.removeprefix('stages.')}."
        )


def cast(model: Any, dtype: str) -> Any:
    """Convert what a model saves to a dtype ("bfloat16", "float32") in place, as loading in that dtype would.

    Weights that their model keeps in float32, and tables that it computes (rotary frequencies), stay.
    """
    import torch

    wanted = getattr(torch, dtype)
    if next(model.parameters()).dtype == wanted:
        return model
    kept = getattr(model, "_keep_in_fp32_modules_strict", None) or ()
    for name, tensor in model.state_dict(keep_vars=True).items():
        if tensor.is_floating_point() and not any(part in name for part in kept):
            tensor.data = tensor.data.to(wanted)
    return model


def label_logps(model: Any) -> Any:
    """Return the log-probabilities of random documents' tokens under a model's own forward pass, float32 [T]."""
    import torch

    rng = np.random.default_rng(1)
    ends = (model.get_input_embeddings(), model.get_output_embeddings())
    rows = min(end.weight.shape[0] for end in ends if getattr(end, "weight", None) is not None)
    return torch.cat([plain_logps(model, rng.integers(0, rows, length)) for length in LENGTHS])


def plain_logps(model: Any, ids_T: Array, vocab_size: int | None = None) -> Any:
    """Return the log-probabilities of a document's tokens after the first, float32 [T - 1], on the CPU.

    By the model's own forward pass with transformers' eager attention. vocab_size: of the tokenizer, if the output head has
    more rows.
    """
    import torch

    with torch.no_grad(), _plain(model):
        ids_1T = torch.from_numpy(np.asarray(ids_T, np.int64))[None].to(model.get_input_embeddings().weight.device)
        logits_TV = model(input_ids=ids_1T, use_cache=False).logits[0, :-1, :vocab_size].float()
        return logits_TV.log_softmax(-1).gather(1, ids_1T[0, 1:, None])[:, 0].cpu()


@contextmanager
def _plain(model: Any) -> Iterator[None]:
    """Put a model into evaluation mode with transformers' eager attention inside the context."""
    base = model.get_base_model() if hasattr(model, "get_base_model") else model
    training, attention = model.training, base.config._attn_implementation
    model.eval()
    if attention != "eager":
        base.set_attn_implementation("eager")
    try:
        yield
    finally:
        model.train(training)
        if attention != "eager":
            base.set_attn_implementation(attention)


def check_merged(model: Any, trained_T: Any) -> None:
    """Compare a model, its adapter merged, with its `label_logps` before. Raises UserError if the merge changed it."""
    import torch

    gap_T = (label_logps(model) - trained_T).abs()
    exact = next(model.parameters()).dtype == torch.float32
    gap = float(gap_T.quantile(1 - OUTLIERS) if exact else gap_T.median())
    if not gap <= (EXACT if exact else ROUNDED):
        raise UserError(
            "lora: the model with its adapter merged is not the model that is trained (log-probabilities differ by "
            f"{float(gap_T.mean()):.2g} nats on average), so it cannot be saved. Train without lora, or leave modules out of "
            "target_modules and modules_to_save."
        )


def prove_saved(model: Any, folder: Path, trust_remote_code: bool = False) -> str:
    """Load a saved model with transformers and compare it, weight by weight and by log-probabilities, with the one in memory.

    model: in the dtype that was saved. Returns a note for the user if two copies do not fit the memory: then each weight in
    the files is compared alone. Raises UserError, naming weights that differ, if it is another model.
    """
    if not _fits_twice(model):
        _refuse_different(folder, _different_in_files(model, folder))
        return "the saved weights were compared file by file: a second copy of the model does not fit the memory"
    parameter = next(model.parameters())
    with _plain(model):
        # Some architectures choose their attention when they are built, and keep it.
        attention = model.config._attn_implementation
    saved, info = model_class(folder, trust_remote_code).from_pretrained(
        folder,
        dtype=parameter.dtype,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation=attention,
        use_safetensors=True,
    )
    saved = saved.to(parameter.device).eval()
    _refuse_different(folder, sorted(info["missing_keys"]) + _different(model, saved))
    gap = float((label_logps(saved) - label_logps(model)).abs().mean())
    if not gap <= EXACT:
        raise UserError(
            f"{folder}: the saved config computes another model from the same weights (log-probabilities differ by {gap:.2g} "
            "nats on average). Its layers follow a rule that the config cannot say for this model."
        )
    return ""


def _refuse_different(folder: Path, names: list[str]) -> None:
    if names:
        raise UserError(
            f"{folder}: the saved model is not the one in memory. Weights that differ: {', '.join(names[:4])}"
            f"{f' and {len(names) - 4} more' if len(names) > 4 else ''}."
        )


def _fits_twice(model: Any) -> bool:
    """Return whether a second copy of a model fits the memory of its device."""
    import torch

    size = sum(p.numel() * p.element_size() for p in model.parameters())
    device = next(model.parameters()).device
    if device.type == "cuda":
        torch.cuda.empty_cache()
        return bool(size <= 0.9 * torch.cuda.mem_get_info(device)[0])
    return bool(size <= COPY_SHARE * machine.memory_bytes())


def _different(model: Any, saved: Any) -> list[str]:
    """Return the names of weights that differ. The model's tensors take the dtype that loading has chosen for the saved ones."""
    import torch

    loaded = dict(saved.named_buffers())
    for name, buffer in model.named_buffers():
        if name in loaded and buffer.is_floating_point():
            buffer.data = buffer.data.to(loaded[name].dtype)

    mine, theirs = model.state_dict(keep_vars=True), saved.state_dict()
    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    found = sorted(name for name in mine.keys() ^ theirs.keys() if name not in ignored)
    for name in mine.keys() & theirs.keys():
        tensor = mine[name]
        if tensor.dtype != theirs[name].dtype and tensor.is_floating_point():
            tensor.data = tensor.data.to(theirs[name].dtype)
        if not torch.equal(tensor.detach(), theirs[name]) and name not in ignored:
            found.append(name)
    return sorted(found)


def _different_in_files(model: Any, folder: Path) -> list[str]:
    """Return the names of weights that differ between a model and its safetensors files, read one at a time."""
    import torch
    from safetensors import safe_open
    from transformers.modeling_utils import remove_tied_weights_from_state_dict

    ignored = getattr(model, "_keys_to_ignore_on_save", None) or ()
    kept = {name: tensor for name, tensor in model.state_dict().items() if name not in ignored}
    expected = checkpoint_weights(remove_tied_weights_from_state_dict(kept, model), model)
    found, seen = [], set()
    for path in sorted(folder.glob("*.safetensors")):
        with safe_open(path, framework="pt") as file:
            for name in file.keys():  # noqa: SIM118
                seen.add(name)
                if name not in expected or not torch.equal(file.get_tensor(name), expected[name].cpu()):
                    found.append(name)
    return sorted(found + list(expected.keys() - seen))
