"""The typed schema of everything in `conf/`.

Sizes are in sequences, lengths in tokens, times in seconds (their names say so). Importing this
module costs no torch: a wrong configuration is an answer within a second.
"""

from llm_recipes.config.evaluate import EvaluateConfig, SuiteConfig, TaskConfig
from llm_recipes.config.instruct import ChatDataConfig, ChatSourceConfig, InstructConfig
from llm_recipes.config.judge import JudgeConfig
from llm_recipes.config.plan import PlanConfig
from llm_recipes.config.pretrain import (
    AdapterConfig,
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
    ProfileConfig,
    RunConfig,
    ScheduleConfig,
    SourceConfig,
    StageConfig,
    TrainConfig,
    TrainingConfig,
    ValidationConfig,
    ValidationSetConfig,
    WandbConfig,
)
from llm_recipes.config.search import RuleConfig, SearchConfig
from llm_recipes.config.verbs import ExportConfig, ExtendVocabConfig, ReportConfig, TokenizeConfig

__all__ = [
    "SCHEMAS", "AdapterConfig", "BatchWarmupConfig", "ChatDataConfig", "ChatSourceConfig", "CheckpointConfig",
    "DataConfig", "EvaluateConfig", "EvaluationConfig", "ExportConfig", "ExtendVocabConfig", "GuardConfig",
    "InstructConfig", "JudgeConfig", "LoggingConfig", "ModelConfig", "OptimConfig", "ParallelConfig", "PlanConfig",
    "PretrainConfig", "ProfileConfig", "ReportConfig", "RuleConfig", "RunConfig", "ScheduleConfig", "SearchConfig",
    "SourceConfig", "StageConfig", "SuiteConfig", "TaskConfig", "TokenizeConfig", "TrainConfig", "TrainingConfig",
    "ValidationConfig", "ValidationSetConfig", "WandbConfig",
]  # fmt: skip

SCHEMAS: dict[str, type] = {
    "pretrain": PretrainConfig,
    "instruct": InstructConfig,
    "tokenize": TokenizeConfig,
    "export": ExportConfig,
    "extend_vocab": ExtendVocabConfig,
    "evaluate": EvaluateConfig,
    "report": ReportConfig,
    "plan": PlanConfig,
}
