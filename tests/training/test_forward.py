"""How a model's forward pass is found: packed documents against the model's own plain forward pass, one at a time."""

from __future__ import annotations

import tomllib
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from tiny_architectures import NotTinyError, build
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING_NAMES

from distill import models
from distill.recipe import LoraConfig
from distill.training.forward import ForwardPlan, NotProvenError, prove
from distill.training.loss.objective import StoredObjective
from distill.training.loss.sparse import cross_entropy
from distill.training.packing import Example, pack
from distill.training.policy import StudentModule

VOCAB = 500
REFUSED = Path(__file__).with_name("architectures.toml")
SAMPLE = {
    "llama": "packed", "qwen3": "packed", "deepseek_v3": "packed", "glm4_moe_lite": "packed", "gemma2": "packed", "gemma3_text": "packed", "gpt_oss": "packed", "gpt2": "packed",
    "mixtral": "packed", "qwen3_moe": "packed", "cohere2": "packed", "granite": "packed", "mistral": "packed",
    "lfm2": "rows", "mamba": "rows", "qwen3_next": "rows", "bloom": "rows", "falcon_h1": "rows",
}  # fmt: skip


def _examples() -> list[Example]:
    """Documents longer than the tiny models' windows; two share the start of their prompt."""
    rng = np.random.default_rng(0)
    shared, made = rng.integers(0, VOCAB, 24), []
    for n, (prompt, completion) in enumerate(((40, 9), (44, 17), (5, 30), (70, 12))):
        ids = rng.integers(0, VOCAB, prompt + completion)
        if n < 2:
            ids[:24] = shared
        made.append(Example(str(n), ids[:prompt], ids[prompt:]))
    return made


def _proof(model: Any) -> Any:
    (batch,) = pack(_examples(), micro_tokens=4096)
    return prove(model, VOCAB, batch.to_torch("cpu"), 2e-3)


def _plain_loss(model: Any) -> torch.Tensor:
    """Mean cross entropy over all completion tokens by transformers alone, one document at a time."""
    losses = []
    for e in _examples():
        ids = torch.as_tensor(np.concatenate([e.prompt_ids, e.completion_ids]))
        logits = model(input_ids=ids[None], use_cache=False).logits[0, len(e.prompt_ids) - 1 : -1, :VOCAB]
        losses.append(torch.nn.functional.cross_entropy(logits.float(), ids[len(e.prompt_ids) :], reduction="sum"))
    return torch.stack(losses).sum() / sum(len(e.completion_ids) for e in _examples())


@pytest.mark.parametrize(("model_type", "layout"), SAMPLE.items())
def test_loss_and_gradient_are_those_of_plain_transformers(model_type: str, layout: str) -> None:
    model = build(model_type, 512)
    plan = _proof(model).plan
    assert plan.layout == layout
    plain = build(model_type, 512)
    loss = _plain_loss(plain)
    loss.backward()
    for micro_tokens in (4096, 90):
        model.zero_grad()
        module = StudentModule(model, StoredObjective(cross_entropy), VOCAB, plan=plan)
        total = 0.0
        for batch in pack(_examples(), micro_tokens=micro_tokens):
            rows = torch.from_numpy(batch.weight_T.nonzero()[0])
            out = module(batch.to_torch("cpu"), rows)
            out.loss.backward()
            total += float(out.loss)
        assert total == pytest.approx(float(loss), abs=1e-4)
        for (name, mine), theirs in zip(model.named_parameters(), plain.parameters(), strict=True):
            if theirs.grad is not None:
                scale = max(float(theirs.grad.norm()), 1e-3)
                assert float((mine.grad - theirs.grad).norm()) / scale < 5e-3, name


@pytest.mark.parametrize(("fields", "scale", "cap"), [({"logits_scaling": 8.0}, 0.125, None)])
def test_multipliers_of_the_logits_are_recognised(fields: dict[str, float], scale: float, cap: float | None) -> None:
    form = _proof(build("granite", 512, **fields)).plan.form
    assert (form.scale, form.softcap) == (scale, cap)


def test_a_soft_cap_is_recognised() -> None:
    form = _proof(build("gemma2", 512)).plan.form
    assert (form.scale, form.softcap) == (1.0, 30.0)


def test_a_multiplier_that_no_key_explains_is_measured() -> None:
    model = build("llama", 512)
    original = model.forward

    def scaled(*args: Any, **options: Any) -> Any:
        out = original(*args, **options)
        return replace(out, logits=out.logits * 0.7313) if hasattr(out, "__dataclass_fields__") else out

    model.forward = scaled
    assert _proof(model).plan.form.scale == pytest.approx(0.7313, rel=1e-4)


def test_a_model_whose_head_is_not_linear_or_that_looks_ahead_is_refused() -> None:
    with pytest.raises(NotProvenError, match="between the last hidden states and the output head"):
        _proof(build("roberta", 512))
    with pytest.raises(NotProvenError, match="not causal"):
        _proof(build("bert-generation", 512))


def test_leaking_documents_are_found_where_the_plan_is_wrong() -> None:
    """The proof itself can fail: with packed documents alone a convolution mixes neighbours."""
    model = build("lfm2", 512)
    proof = _proof(model)
    assert proof.rejected[0][0] == "packed"
    assert "differ by" in proof.rejected[0][1]
    (batch,) = pack(_examples(), micro_tokens=4096)
    rows = torch.from_numpy(batch.weight_T.nonzero()[0])
    packed, right = ForwardPlan(proof.plan.form, "packed"), proof.plan
    tensors = batch.to_torch("cpu")
    right_TD = right.hidden(model, tensors, rows)
    packed.apply(model)
    assert float((packed.hidden(model, tensors, rows) - right_TD).detach().abs().max()) > 1e-2


@pytest.mark.parametrize(
    "targets", [{"target_modules": ["q_proj", "lm_head"]}, {"modules_to_save": ["lm_head", "embed_tokens"]}]
)
def test_adapters_on_the_head_are_part_of_the_loss_and_get_a_gradient(targets: dict[str, Any]) -> None:
    adapted = models.add_lora(build("llama", 512), LoraConfig(rank=4, **{"target_modules": ["q_proj"], **targets}))
    with torch.no_grad():
        for parameter in adapted.parameters():
            if parameter.requires_grad:
                parameter.add_(0.2 * torch.randn(parameter.shape, generator=torch.Generator().manual_seed(3)))
    plan = _proof(adapted).plan
    assert plan.layout == "packed"
    adapted.get_base_model().set_attn_implementation("eager")
    plain = _plain_loss(adapted.get_base_model())
    names = [name for name, p in adapted.named_parameters() if p.requires_grad and "lm_head" in name]
    chosen = [dict(adapted.named_parameters())[name] for name in names]
    wanted = torch.autograd.grad(plain, chosen)
    module = StudentModule(adapted, StoredObjective(cross_entropy), VOCAB, plan=plan)
    (batch,) = pack(_examples(), micro_tokens=4096)
    out = module(batch.to_torch("cpu"), torch.from_numpy(batch.weight_T.nonzero()[0]))
    assert float(out.loss) == pytest.approx(float(plain), abs=1e-4)
    for mine, theirs in zip(torch.autograd.grad(out.loss, chosen), wanted, strict=True):
        torch.testing.assert_close(mine, theirs, atol=1e-4, rtol=1e-3)


@pytest.mark.slow
def test_every_causal_model_of_transformers_is_computed_rightly_or_refused_with_a_reason() -> None:
    listed = tomllib.loads(REFUSED.read_text(encoding="utf-8"))
    wrong = []
    for model_type in MODEL_FOR_CAUSAL_LM_MAPPING_NAMES:
        try:
            found = _proof(build(model_type, 512)).plan.layout
        except NotTinyError:
            found = "not built"
        except NotProvenError:
            found = "refused"
        expected = next((sort for sort, types in listed.items() if model_type in types), "packed")
        if found != expected:
            wrong.append(f"{model_type}: {found}, expected {expected}")
    assert not wrong, "\n".join(wrong)
