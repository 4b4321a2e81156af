"""FLOPs, memory, cost views and time estimates, against counts by hand."""

from __future__ import annotations

from dataclasses import replace

import pytest

from distill.compute import estimate, flops
from distill.compute.adapters import lora_params
from distill.compute.flops import ModelShape
from distill.compute.ledger import StageCost, arm_cost, shares
from distill.compute.memory import engine_memory, train_memory
from distill.machine import DTYPES, Dtype, Machine, Rates
from distill.recipe import Input, LoraConfig
from distill.records import Cost, UserError

SMOLLM2 = {
    "model_type": "llama",
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_hidden_layers": 30,
    "num_key_value_heads": 3,
    "tie_word_embeddings": True,
    "vocab_size": 49152,
}


def shape() -> ModelShape:
    return ModelShape.from_config(SMOLLM2)


def test_parameters_of_smollm2() -> None:
    # A layer: q 576x576, k and v 576x192, o 576x576, three 576x1536.
    layer = 2 * 576 * 576 + 2 * 576 * 192 + 3 * 576 * 1536
    assert layer == 3_538_944
    assert shape().params_layer == layer
    assert shape().params_head == 28_311_552
    assert shape().params_matmul == 30 * layer + 28_311_552
    assert shape().params_total == 134_515_008  # as transformers counts it
    assert shape().with_layers(15).params_body == 15 * layer


def test_an_untied_model_with_its_own_head_size() -> None:
    # Qwen3-0.6B has heads wider than hidden / heads.
    qwen = ModelShape.from_config(
        {
            "model_type": "qwen3",
            "hidden_size": 1024,
            "intermediate_size": 3072,
            "num_attention_heads": 16,
            "num_hidden_layers": 28,
            "num_key_value_heads": 8,
            "head_dim": 128,
            "vocab_size": 151936,
            "tie_word_embeddings": False,
        }
    )
    assert qwen.params_layer == 2 * 1024 * 2048 + 2 * 1024 * 1024 + 3 * 1024 * 3072
    assert qwen.params_total - qwen.params_matmul == 1024 * 151936 + 57 * 1024


def test_gpt2s_names_and_plain_mlp() -> None:
    gpt2 = ModelShape.from_config(
        {"model_type": "gpt2", "n_embd": 768, "n_layer": 12, "n_head": 12, "vocab_size": 50257}
    )
    assert gpt2.params_layer == 12 * 768 * 768
    assert gpt2.tied


def test_an_architecture_that_cannot_be_counted_is_an_error() -> None:
    with pytest.raises(UserError, match="vocab_size is missing"):
        ModelShape.from_config({k: v for k, v in SMOLLM2.items() if k != "vocab_size"})


MIXTRAL = {"hidden_size": 4096, "intermediate_size": 14336, "num_hidden_layers": 32, "num_attention_heads": 32, "head_dim": 128,
           "num_key_value_heads": 8, "vocab_size": 32000, "num_local_experts": 8, "num_experts_per_tok": 2}  # fmt: skip
QWEN3_30B = {"hidden_size": 2048, "intermediate_size": 6144, "moe_intermediate_size": 768, "num_hidden_layers": 48,
             "num_attention_heads": 32, "num_key_value_heads": 4, "head_dim": 128, "vocab_size": 151936, "num_experts": 128,
             "num_experts_per_tok": 8}  # fmt: skip


@pytest.mark.parametrize(("config", "stored", "active"), [(MIXTRAL, 46.7e9, 12.9e9), (QWEN3_30B, 30.5e9, 3.3e9)])
def test_a_mixture_of_experts_counts_what_a_token_passes(config: dict[str, int], stored: float, active: float) -> None:
    """Against the published counts, which hold embeddings and routers."""
    shape = ModelShape.from_config(config)
    assert shape.params_total == pytest.approx(stored, rel=0.02)
    assert shape.params_matmul + shape.params_head == pytest.approx(active, rel=0.03)


def test_the_text_part_of_a_composite_model_and_layers_that_are_only_listed_are_counted() -> None:
    assert ModelShape.from_config({"text_config": MIXTRAL, "vision_config": {}}).layers == 32
    listed = {"hidden_size": 8, "vocab_size": 10, "layers_block_type": ["mamba", "attention", "moe"]}
    assert ModelShape.from_config(listed).layers == 3


@pytest.mark.parametrize("params", [5e7, 1.35e8, 3.6e8, 1.5e9, 7e9, 3.2e10, 7e10])
def test_a_shape_from_a_count_has_that_count(params: float) -> None:
    assert ModelShape.from_params(params).params_total == pytest.approx(params, rel=0.1)


def test_forward_by_hand() -> None:
    # 10 tokens, causal: contexts 1..10, mean 5.5. Attention: 4 x 30 layers x 576 x 10 x 5.5.
    assert flops.causal_context([10]) == 5.5
    assert flops.causal_context([1, 3]) == (1 + 1 + 2 + 3) / 4
    attention = 4 * 30 * 576 * 55
    assert flops.forward_flops(shape(), 10, 5.5) == 2 * 134_479_872 * 10 + attention
    body = 2 * 106_168_320 * 10
    assert flops.forward_flops(shape(), 10, 5.5, 0) == body + attention
    assert flops.forward_flops(shape(), 10, 5.5, 4) == body + 2 * 28_311_552 * 4 + attention


def test_training_is_six_lora_four_and_checkpointing_eight() -> None:
    n = shape().params_matmul
    assert flops.train_flops(shape(), 100, 0) == 6 * n * 100
    assert flops.train_flops(shape(), 100, 0, lora=True) == 4 * n * 100
    again = flops.train_flops(shape(), 100, 0, checkpointing=True)
    assert again == 6 * n * 100 + 2 * shape().params_body * 100
    attention = flops.attention_flops(shape(), 100, 7)
    for lora in (False, True):
        with_attention = flops.train_flops(shape(), 100, 7, lora=lora)
        assert with_attention - flops.train_flops(shape(), 100, 0, lora=lora) == pytest.approx(3 * attention)


def test_generation_is_one_pass_a_token_but_the_last() -> None:
    # Two completions of a 4-token prompt and 3 new tokens each: contexts 1..4, then 5 and 6; the last token passes no layer.
    counted = flops.generate_flops(shape(), 8, 6, 2)
    matmuls = 2 * shape().params_body * (8 + 4) + 2 * shape().params_head * 6
    contexts = 2 * (1 + 2 + 3 + 4) + 2 * (5 + 6)
    assert counted == pytest.approx(matmuls + 4 * 30 * 576 * contexts)
    assert flops.generate_flops(shape(), 0, 0, 0) == 0


def test_bytes_a_parameter_in_training() -> None:
    p = 134_515_008
    # 2 weight + 4 master + 8 moments; a float32 weight is its own master.
    narrow, wide = (train_memory(shape(), 2048, dtype=d) for d in ("bfloat16", "float32"))
    held = ("weights", "masters", "moments")
    assert [getattr(narrow, each) / p for each in held] == [2, 4, 8]
    assert [getattr(wide, each) / p for each in held] == [4, 0, 8]
    assert (narrow.least, wide.least) == (14 * p, 12 * p)
    assert narrow.gradients == 4 * p
    thin = train_memory(shape(), 2048, checkpointing=True)
    assert thin.activations < narrow.activations / 5
    taught = train_memory(shape(), 2048, teachers=[shape()])
    assert taught.teachers == 2 * p


def test_adapters_alone_have_moments() -> None:
    # Rank 8: q and o 8 x 2 x 576 each, k and v 8 x (576 + 192), three of the MLP 8 x (576 + 1536).
    adapter = 30 * 8 * (2 * 2 * 576 + 2 * (576 + 192) + 3 * (576 + 1536))
    assert lora_params(shape(), LoraConfig(rank=8)) == adapter
    held = train_memory(shape(), 2048, lora=LoraConfig(rank=8))
    assert (held.masters, held.moments, held.gradients) == (0, 8 * adapter, 4 * adapter)
    assert held.weights == 2 * 134_515_008 + 4 * adapter
    packed = train_memory(shape(), 2048, lora=LoraConfig(rank=8, quantised="int8"))
    assert held.weights - packed.weights == 30 * 3_538_944


def test_the_adapters_products_are_six_a_parameter() -> None:
    alone, both = (flops.train_flops(shape(), 100, 0, lora=True, adapters=n) for n in (0, 1e6))
    assert both - alone == 6e8


def test_the_key_value_cache_holds_each_head_of_a_group_once() -> None:
    # 30 layers x (k, v) x 3 heads x 64 x 2 bytes = 23,040 a token.
    plain = engine_memory(shape(), 64, 128, engine="transformers")
    assert plain.cache == 23_040 * 64 * 128
    # vLLM allocates the configured cache, whatever the requests need.
    assert engine_memory(shape(), 64, 128, engine="vllm").cache == 2**30
    scoring = engine_memory(shape(), 64, 128, scored=True)
    assert scoring.logits > engine_memory(shape(), 64, 128).logits


# --------------------------------------------------------------------------------------------- lineage


def spent(flops_spent: float) -> Cost:
    return Cost(flops=flops_spent, tokens_trained=int(flops_spent), wall_seconds=flops_spent / 2)


PARENTS = {
    "cold_start": [Input("model", "base"), Input("data", "data/cold.jsonl"), Input("task", "sums")],
    "teacher": [Input("model", "cold_start"), Input("task", "sums")],
    "traces": [Input("model", "teacher"), Input("task", "sums")],
    "clean": [Input("data", "traces")],
    "student": [Input("model", "base")],
    "kl": [Input("model", "student"), Input("data", "clean")],
    "polish": [Input("model", "kl"), Input("data", "clean")],
    "own_traces": [Input("model", "kl"), Input("task", "sums")],
    "own_clean": [Input("data", "own_traces")],
    "rejection": [Input("model", "kl"), Input("data", "own_clean")],
    "on_policy": [Input("model", "student"), Input("teacher", "teacher"), Input("task", "sums")],
}
KINDS = {
    "cold_start": "train",
    "teacher": "grpo",
    "traces": "generate",
    "clean": "filter",
    "student": "prune",
    "own_traces": "generate",
    "own_clean": "filter",
    "on_policy": "on_policy",
}
STAGES = {
    name: StageCost(KINDS.get(name, "train") in ("train", "grpo", "on_policy"), spent(2.0**i))
    for i, name in enumerate(PARENTS)
}


def total(*names: str) -> float:
    return sum(STAGES[name].cost.flops for name in names)


def test_three_views_of_a_distilled_student() -> None:
    cost = arm_cost("kl", STAGES, PARENTS)
    assert cost.student.flops == total("kl", "student")
    assert cost.with_inference.flops == total("kl", "student", "clean", "traces")
    assert cost.with_teacher.flops == total("kl", "student", "clean", "traces", "teacher", "cold_start")
    assert set(cost.stages["teacher"]) == {"teacher", "cold_start"}


def test_data_used_twice_counts_once() -> None:
    cost = arm_cost("polish", STAGES, PARENTS)
    assert cost.student.flops == total("polish", "kl", "student")
    assert cost.with_inference.flops - cost.student.flops == total("clean", "traces")


def test_what_arms_share_is_listed_once_and_the_parts_add_up_to_the_whole() -> None:
    """Three students of one teacher: its training is in the views of all three, and in one share."""
    arms = {name: [arm_cost(name, STAGES, PARENTS)] for name in ("kl", "polish", "on_policy", "teacher")}
    found = shares(STAGES, arms)
    assert sorted(name for one in found for name in one.stages) == sorted(STAGES)
    assert sum(one.cost.flops for one in found) == total(*STAGES)
    by_stage = {name: one for one in found for name in one.stages}
    assert by_stage["teacher"].arms == ["kl", "polish", "on_policy", "teacher"]
    assert by_stage["kl"].arms == ["kl", "polish"]
    assert by_stage["polish"].arms == ["polish"]
    assert by_stage["rejection"].arms == []


def test_the_copies_of_an_arm_for_its_seeds_are_one_share() -> None:
    stages = {name: StageCost(True, spent(n)) for n, name in enumerate(("start", "kl@1", "kl@2", "sft"), 1)}
    parents = {name: [Input("model", "start")] for name in ("kl@1", "kl@2", "sft")}
    arms = {
        "kl": [arm_cost(name, stages, parents) for name in ("kl@1", "kl@2")],
        "sft": [arm_cost("sft", stages, parents)],
    }
    assert [(one.stages, one.arms, one.cost.flops) for one in shares(stages, arms)] == [
        (["start"], ["kl", "sft"], 1),
        (["kl@1", "kl@2"], ["kl"], 5),
        (["sft"], ["sft"], 4),
    ]


def test_data_written_by_the_students_own_line_is_its_own_cost() -> None:
    cost = arm_cost("rejection", STAGES, PARENTS)
    assert cost.student.flops == total("rejection", "kl", "student", "own_traces", "own_clean")
    assert set(cost.stages["inference"]) == {"clean", "traces"}


def test_the_model_that_was_pruned_is_a_teacher_not_the_student() -> None:
    parents = {**PARENTS, "student": [Input("model", "teacher")]}
    cost = arm_cost("kl", STAGES, parents)
    assert cost.student.flops == total("kl", "student")
    assert set(cost.stages["inference"]) == {"clean", "traces"}
    assert set(cost.stages["teacher"]) == {"teacher", "cold_start"}


def test_traces_that_a_prune_stage_reads_count_for_its_student() -> None:
    parents = {**PARENTS, "student": [Input("model", "teacher"), Input("data", "traces")]}
    cost = arm_cost("student", STAGES, parents)
    assert cost.student.flops == total("student")
    assert set(cost.stages["inference"]) == {"traces"}
    assert set(cost.stages["teacher"]) == {"teacher", "cold_start"}


def test_a_teacher_in_the_loop() -> None:
    stages = {**STAGES, "on_policy": replace(STAGES["on_policy"], teacher=spent(7))}
    cost = arm_cost("on_policy", stages, PARENTS)
    assert cost.student.flops == total("on_policy", "student")
    assert cost.with_inference.flops == cost.student.flops + 7
    assert set(cost.stages["teacher"]) == {"teacher", "cold_start"}


def test_a_model_that_no_stage_made_costs_nothing() -> None:
    assert arm_cost("base", STAGES, PARENTS).with_teacher == Cost()


def test_every_stage_is_in_one_view_only() -> None:
    for name in STAGES:
        listed = [one for view in arm_cost(name, STAGES, PARENTS).stages.values() for one in view]
        assert len(listed) == len(set(listed))


# -------------------------------------------------------------------------------------------- estimates


def rates(speed: float) -> Rates:
    return Rates(speed, speed, speed, speed)


MACHINE = Machine(
    key="",
    device="cpu",
    name="two cores",
    cores=2,
    memory=16 * 2**30,
    bandwidth=1e10,
    rates={"576x1536": {"bfloat16": rates(2e11), "float32": rates(5e10)}},
)


def test_seconds_grow_with_the_work() -> None:
    def train(flops_spent: float, steps: int, dtype: Dtype = "bfloat16") -> float:
        return estimate.predict_train_seconds(shape(), flops_spent, 1000.0, steps, MACHINE, dtype)

    assert train(2e13, 10) - train(1e13, 10) == pytest.approx(1e13 / (2e11 * estimate.TRAIN_EFFICIENCY))
    # The dtype changes only the time of the products.
    assert train(1e13, 10, "float32") - train(1e13, 10) == pytest.approx(
        (1e13 / 5e10 - 1e13 / 2e11) / estimate.TRAIN_EFFICIENCY
    )
    assert train(1e13, 20) > train(1e13, 10) > estimate.PROCESS_START

    def generate(sequences: int, batch_size: int = 64) -> float:
        return estimate.predict_generate_seconds(
            shape(), sequences, 30 * sequences, 20 * sequences, MACHINE, batch_size=batch_size
        )

    assert generate(512) > generate(256) > generate(0)
    assert generate(256, batch_size=8) > generate(256)


def test_elementwise_work_takes_the_same_time_in_either_dtype() -> None:
    def train(tokens: float, dtype: Dtype) -> float:
        return estimate.predict_train_seconds(shape(), 1e12, tokens, 1, MACHINE, dtype)

    # 1000 tokens x 30 layers x (576 + 1536) at float32's rate.
    more = 1000 * 30 * 2112 * estimate.TRAIN_ELEMENTS / 5e10
    for dtype in DTYPES:
        assert train(2000, dtype) - train(1000, dtype) == pytest.approx(more)


def test_an_unmeasured_dtype_has_the_slowest_rates() -> None:
    old = replace(MACHINE, rates={"576x1536": {"float32": rates(5e10)}})
    assert estimate.predict_train_seconds(shape(), 1e13, 1.0, 1, old, "bfloat16") == estimate.predict_train_seconds(
        shape(), 1e13, 1.0, 1, old, "float32"
    )
