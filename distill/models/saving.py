"""Save a model, and prove that what is on the disk is what was in memory."""

from __future__ import annotations

import tempfile
from pathlib import Path
from typing import Any

import numpy as np

from distill.records import UserError

LENGTHS = (40, 24, 7)
"""Tokens of the documents on which a saved model is compared."""
EXACT = 1e-3
"""Nats by which log-probabilities of a model and its reloaded copy may differ: the same weights in the same dtype."""


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


def label_logps(model: Any) -> Any:
    """Return the log-probabilities of random documents' tokens under a model's own forward pass, float32 [T]."""
    import torch

    training = model.training
    model.eval()
    rng = np.random.default_rng(1)
    size = model.get_input_embeddings().weight.shape[0]
    device = model.get_input_embeddings().weight.device
    parts = []
    with torch.no_grad():
        for length in LENGTHS:
            ids = torch.from_numpy(rng.integers(0, size, (1, length))).to(device)
            logits = model(input_ids=ids, use_cache=False).logits[0, :-1].float()
            parts.append(logits.log_softmax(-1).gather(1, ids[0, 1:, None])[:, 0].cpu())
    model.train(training)
    return torch.cat(parts)


def prove_saved(model: Any, folder: Path, trust_remote_code: bool = False) -> None:
    """Load a saved model with transformers and compare its log-probabilities with the model in memory.

    model: in the dtype that was saved. Raises UserError, naming weights that differ, if it is another model.
    """
    import torch

    from distill.models.loading import model_class

    saved, info = model_class(folder, trust_remote_code).from_pretrained(
        folder,
        dtype=next(model.parameters()).dtype,
        trust_remote_code=trust_remote_code,
        local_files_only=True,
        output_loading_info=True,
        attn_implementation="eager",
    )
    saved = saved.to(next(model.parameters()).device).eval()
    _take_computed_buffers(model, saved)
    attention = model.config._attn_implementation
    model.set_attn_implementation("eager")
    gap = (label_logps(saved) - label_logps(model)).abs()
    model.set_attn_implementation(attention)
    missing = sorted(info["missing_keys"]) if isinstance(info["missing_keys"], set | list) else []
    if missing or not bool((gap <= EXACT).float().mean() > 0.95):
        theirs = dict(saved.named_parameters())
        differ = [
            name for name, p in model.named_parameters()
            if name not in theirs or p.shape != theirs[name].shape or not torch.equal(p.detach(), theirs[name].detach())
        ]  # fmt: skip
        names = ", ".join((missing + differ)[:4]) or "none by name: its config computes another model from them"
        raise UserError(
            f"{folder}: the saved model is not the one in memory (log-probabilities differ by {float(gap.mean()):.2g} nats on "
            f"average). Weights that differ: {names}."
        )


def _take_computed_buffers(model: Any, saved: Any) -> None:
    """Give a model the buffers of its reloaded copy that no checkpoint holds: a cast rounds them, such as rotary frequencies."""
    stored, theirs = set(saved.state_dict()), dict(saved.named_buffers())
    for name, buffer in model.named_buffers():
        if name not in stored and name in theirs and buffer.shape == theirs[name].shape:
            buffer.data = theirs[name].clone()
