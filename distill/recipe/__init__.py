"""The config tree of a recipe.

Frozen pydantic models; an unknown key is an error that names the nearest one. The options of plugs (losses, objectives,
rewards, filters, tasks) are parameters of their functions; here a plug is `fn` and a mapping of options.
"""

from distill.recipe.engine import EngineConfig
from distill.recipe.fields import (
    Config,
    DistributedConfig,
    Dtype,
    HiddenConfig,
    LoraConfig,
    ModelConfig,
    PlugConfig,
    RewardConfig,
    Role,
    RowsConfig,
    SamplingConfig,
    TaskConfig,
    WeightsConfig,
    base_name,
)
from distill.recipe.lineage import served_models
from distill.recipe.load import load, parse_overrides, validate
from distill.recipe.policy_stages import GrpoStage, OnPolicyStage, PolicyStage
from distill.recipe.stage import Input, StageConfig
from distill.recipe.stages import (
    KINDS,
    CompareStage,
    DivergenceStage,
    EvalStage,
    FilterStage,
    GenerateStage,
    PruneStage,
    ScoreStage,
    divergence_name,
    kind_class,
)
from distill.recipe.training_stages import (
    OptimStage,
    TrainStage,
    data_of,
    teachers_of,
)
from distill.recipe.tree import Recipe, order

__all__ = [
    "KINDS",
    "CompareStage",
    "Config",
    "DistributedConfig",
    "DivergenceStage",
    "Dtype",
    "EngineConfig",
    "EvalStage",
    "FilterStage",
    "GenerateStage",
    "GrpoStage",
    "HiddenConfig",
    "Input",
    "LoraConfig",
    "ModelConfig",
    "OnPolicyStage",
    "OptimStage",
    "PlugConfig",
    "PolicyStage",
    "PruneStage",
    "Recipe",
    "RewardConfig",
    "Role",
    "RowsConfig",
    "SamplingConfig",
    "ScoreStage",
    "StageConfig",
    "TaskConfig",
    "TrainStage",
    "WeightsConfig",
    "base_name",
    "data_of",
    "divergence_name",
    "kind_class",
    "load",
    "order",
    "parse_overrides",
    "served_models",
    "teachers_of",
    "validate",
]
