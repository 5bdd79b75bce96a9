"""The typed schema of everything in `conf/`.

Sizes are in sequences, lengths in tokens, times in seconds (their names say so). Importing this
module costs no torch: a wrong configuration is an answer within a second.
"""

from llm_recipes.config.evaluate import EvaluateConfig, SuiteConfig, TaskConfig
from llm_recipes.config.plan import PlanConfig
from llm_recipes.config.pretrain import (
    BatchWarmupConfig,
    CheckpointConfig,
    DataConfig,
    EvaluationConfig,
    GuardConfig,
    LoggingConfig,
    ModelConfig,
    OptimConfig,
    ParallelConfig,
    PretrainConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
    ValidationConfig,
    ValidationSetConfig,
    WandbConfig,
)
from llm_recipes.config.search import RuleConfig, SearchConfig
from llm_recipes.config.verbs import ExportConfig, ExtendVocabConfig, ReportConfig, TokenizeConfig

__all__ = [
    "SCHEMAS", "BatchWarmupConfig", "CheckpointConfig", "DataConfig", "EvaluateConfig", "EvaluationConfig",
    "ExportConfig", "ExtendVocabConfig", "GuardConfig", "LoggingConfig", "ModelConfig", "OptimConfig",
    "ParallelConfig", "PlanConfig", "PretrainConfig", "ReportConfig", "RuleConfig", "RunConfig", "ScheduleConfig",
    "SearchConfig", "SourceConfig", "StageConfig", "SuiteConfig", "TaskConfig", "TokenizeConfig", "TrainConfig",
    "ValidationConfig", "ValidationSetConfig", "WandbConfig",
]  # fmt: skip

SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "tokenize": TokenizeConfig,
    "export": ExportConfig,
    "extend_vocab": ExtendVocabConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "plan": PlanConfig,
}
