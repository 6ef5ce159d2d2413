from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.attention import Distance
from keras_laid.ops.attention_divergence import attention_divergence
from keras_laid.ops.attention_output import attention_output
from keras_laid.ops.logits_divergence import logits_divergence
from keras_laid.ops.query_key_distance import query_key_distance
from keras_laid.ops.retrieval_divergence import Retrieval
from keras_laid.ops.retrieval_divergence import retrieval
from keras_laid.ops.retrieval_divergence import retrieval_divergence
from keras_laid.ops.segment_attention import segment_attention
from keras_laid.ops.top_logits import TopLogits
from keras_laid.ops.unembedding import Unembedding

__all__ = [
    "Attention",
    "AttentionMask",
    "Distance",
    "Retrieval",
    "TopLogits",
    "Unembedding",
    "attention_divergence",
    "attention_output",
    "logits_divergence",
    "query_key_distance",
    "retrieval",
    "retrieval_divergence",
    "segment_attention",
]
