"""Long-window anchoring distillation of vision-language models, for Keras 3."""

# `as` tells type checkers that these are names of the package.
from keras_laid import backbones as backbones
from keras_laid import devices as devices
from keras_laid import distillation as distillation
from keras_laid import haystacks as haystacks
from keras_laid import layers as layers
from keras_laid import ops as ops
from keras_laid import presets
from keras_laid.backbones.gain_modulation import attach_gain_modulation
from keras_laid.backbones.gain_modulation import fold_gain_modulation
from keras_laid.backbones.linear_memory import linear_memory_attention
from keras_laid.backbones.multi_image_pali_gemma import (
    MultiImagePaliGemmaCausalLM,
)
from keras_laid.backbones.retrieval_heads import find_retrieval_heads
from keras_laid.backbones.rotary_positions import rotary_positions
from keras_laid.backbones.self_extend import self_extend
from keras_laid.backbones.yarn import yarn
from keras_laid.devices.memory_plan import plan
from keras_laid.devices.model_parallel import ModelParallel
from keras_laid.distillation.distance_weighting import DistanceWeighting
from keras_laid.distillation.distiller import (
    DistanceWeightedAttentionDistillation,
)
from keras_laid.distillation.group_optimizer import group_optimizer
from keras_laid.distillation.position_stretching import PositionStretching
from keras_laid.distillation.resumable_training import ResumableTraining
from keras_laid.distillation.store_log_probabilities import (
    store_log_probabilities,
)
from keras_laid.distillation.store_teacher import store_teacher
from keras_laid.distillation.stored_teacher import StoredTeacher
from keras_laid.haystacks.callback import HaystackEvaluation
from keras_laid.haystacks.dataset import Haystacks
from keras_laid.haystacks.digits import Digits
from keras_laid.haystacks.drawing import draw_haystacks
from keras_laid.haystacks.effective_window import effective_window
from keras_laid.haystacks.effective_window import effective_window_interval
from keras_laid.haystacks.evaluation import evaluate_haystacks
from keras_laid.haystacks.long_prompts import LongPrompts
from keras_laid.layers.gain_modulated_rotary_embedding import (
    GainModulatedRotaryEmbedding,
)
from keras_laid.layers.head_mixer import HeadMixer

__version__ = "0.1.0"

__all__ = [
    "Digits",
    "DistanceWeightedAttentionDistillation",
    "DistanceWeighting",
    "GainModulatedRotaryEmbedding",
    "HaystackEvaluation",
    "Haystacks",
    "HeadMixer",
    "LongPrompts",
    "ModelParallel",
    "MultiImagePaliGemmaCausalLM",
    "PositionStretching",
    "ResumableTraining",
    "StoredTeacher",
    "attach_gain_modulation",
    "draw_haystacks",
    "effective_window",
    "effective_window_interval",
    "evaluate_haystacks",
    "find_retrieval_heads",
    "fold_gain_modulation",
    "group_optimizer",
    "linear_memory_attention",
    "plan",
    "presets",
    "rotary_positions",
    "self_extend",
    "store_log_probabilities",
    "store_teacher",
    "yarn",
]
