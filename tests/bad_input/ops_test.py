"""Wrong calls of ops, and of the classes that describe their inputs."""

import numpy as np
import pytest

from keras_laid.ops import Attention
from keras_laid.ops import AttentionMask
from keras_laid.ops import Distance
from keras_laid.ops import Retrieval
from keras_laid.ops import TopLogits
from keras_laid.ops import Unembedding
from keras_laid.ops import attention_divergence
from keras_laid.ops import attention_output
from keras_laid.ops import logits_divergence
from keras_laid.ops import query_key_distance
from keras_laid.ops import retrieval
from keras_laid.ops import retrieval_divergence
from keras_laid.ops import segment_attention
from tests.bad_input.table import assert_refused
from tests.bad_input.table import refused
from tests.bad_input.table import zeros

NAN, INFINITY = float("nan"), float("inf")


def attention(query=(2, 5, 4, 8), key=(2, 6, 2, 8), scale=1.0, soft_cap=None):
    return Attention(zeros(*query), zeros(*key), scale, soft_cap)


def mask(**changes):
    given = dict(
        bidirectional=zeros(2, 6, dtype="bool"),
        causal=zeros(2, 6, dtype="bool"),
        row_index=zeros(5, dtype="int32"),
    )
    return AttentionMask(**given | changes)


def distance(**changes):
    given = dict(row_positions=zeros(1, 5), key_positions=zeros(1, 6))
    return Distance(**given | changes)


def divergence(**changes):
    given = dict(
        student=attention(),
        teacher=attention(),
        mask=mask(),
        distance=distance(),
    )
    return attention_divergence(**given | changes)


def output(**changes):
    given = dict(attention=attention(), value=zeros(2, 6, 2, 3), mask=mask())
    return attention_output(**given | changes)


def queries_and_keys(**changes):
    given = dict(
        student=attention(),
        teacher=attention(),
        mixture=zeros(4, 4),
        row_mask=zeros(2, 5, dtype="bool"),
        key_mask=zeros(2, 6, dtype="bool"),
    )
    return query_key_distance(**given | changes)


def shares(**changes):
    given = dict(
        attention=attention(),
        mask=mask(),
        segments=zeros(2, 6, dtype="int32"),
        num_segments=3,
    )
    return segment_attention(**given | changes)


def where_it_looks(**changes):
    given = dict(shares=zeros(2, 5, 3), mass=zeros(2, 5), sharpness=zeros(2, 5))
    return Retrieval(**given | changes)


def compared_retrieval(**changes):
    given = dict(
        student=zeros(2, 4, 5, 3),
        teacher=where_it_looks(),
        row_mask=zeros(2, 5, dtype="bool"),
    )
    return retrieval_divergence(**given | changes)


def unembedding(hidden=(2, 3, 4), kernel=(4, 7), soft_cap=None):
    return Unembedding(zeros(*hidden), zeros(*kernel), soft_cap)


def tokens(**changes):
    given = dict(
        student=unembedding(),
        teacher=unembedding(),
        labels=zeros(2, 3, dtype="int32"),
    )
    return logits_divergence(**given | changes)


def top(**changes):
    whole = TopLogits.from_logits(zeros(2, 3, 7), 3)
    return tokens(teacher=whole._replace(**changes))


@pytest.mark.parametrize(
    ("call", "error", "words"),
    [
        refused(
            "a tensor for a student",
            lambda: divergence(student=zeros(2, 5, 4, 8)),
            TypeError,
            "`student` must be a `keras_laid.ops.Attention`",
        ),
        refused(
            "no teacher",
            lambda: divergence(teacher=None),
            TypeError,
            "`teacher` must be",
            "NoneType",
        ),
        refused(
            "a query without heads",
            lambda: divergence(student=attention(query=(2, 5, 8))),
            ValueError,
            "`student.query` must have shape (batch, rows, heads, head_dim)",
            "(2, 5, 8)",
        ),
        refused(
            "a list for a query",
            lambda: divergence(student=attention()._replace(query=[1.0])),
            TypeError,
            "`student.query` must be a tensor",
            "list",
        ),
        refused(
            "keys of another batch",
            lambda: divergence(student=attention(key=(3, 6, 2, 8))),
            ValueError,
            "`student.key` must have shape",
            "(3, 6, 2, 8)",
        ),
        refused(
            "head dims that differ",
            lambda: divergence(student=attention(key=(2, 6, 2, 7))),
            ValueError,
            "head dims must be equal",
            "student.key.shape=(2, 6, 2, 7)",
        ),
        refused(
            "heads that do not divide",
            lambda: divergence(teacher=attention(key=(2, 6, 3, 8))),
            ValueError,
            "multiple of key heads",
            "teacher.key.shape=(2, 6, 3, 8)",
        ),
        refused(
            "other rows",
            lambda: divergence(teacher=attention(query=(2, 4, 4, 8))),
            ValueError,
            "the same rows",
            "teacher rows=4",
        ),
        refused(
            "other keys",
            lambda: divergence(teacher=attention(key=(2, 5, 2, 8))),
            ValueError,
            "the same keys",
            "teacher keys=5",
        ),
        refused(
            "another batch",
            lambda: divergence(teacher=attention((1, 5, 4, 8), (1, 6, 2, 8))),
            ValueError,
            "the same batch",
            "teacher batch=1",
        ),
        refused(
            "other heads without a mixture",
            lambda: divergence(teacher=attention(query=(2, 5, 2, 8))),
            ValueError,
            "same number of heads",
            "Pass the mixture",
        ),
        refused(
            "a mixture of other heads",
            lambda: divergence(mixture=zeros(4, 3)),
            ValueError,
            "`mixture` must have shape (student_heads, teacher_heads) = (4, 4)",
            "(4, 3)",
        ),
        refused(
            "a number for a mixture",
            lambda: divergence(mixture=0.5),
            TypeError,
            "`mixture` must be a tensor",
            "float",
        ),
        *[
            refused(
                f"a scale of {scale}",
                lambda scale=scale: divergence(student=attention(scale=scale)),
                ValueError,
                "`student.scale` must be in (0, inf)",
                f"student.scale={scale}",
            )
            for scale in (0.0, -1.0, NAN, INFINITY)
        ],
        refused(
            "a string for a scale",
            lambda: divergence(student=attention(scale="1")),
            TypeError,
            "`student.scale` must be a number",
            "'1'",
        ),
        refused(
            "a soft cap of 0",
            lambda: divergence(teacher=attention(soft_cap=0.0)),
            ValueError,
            "`teacher.soft_cap` must be in (0, inf)",
        ),
        refused(
            "an array for a mask",
            lambda: divergence(mask=zeros(2, 6)),
            TypeError,
            "`mask` must be a `keras_laid.ops.AttentionMask`",
        ),
        refused(
            "a mask of other keys",
            lambda: divergence(mask=mask(causal=zeros(2, 5, dtype="bool"))),
            ValueError,
            "`mask.causal` must have shape (batch, keys) = (2, 6)",
            "(2, 5)",
        ),
        refused(
            "a mask of another batch",
            lambda: output(mask=mask(bidirectional=zeros(3, 6, dtype="bool"))),
            ValueError,
            "`mask.bidirectional` must have shape",
            "(3, 6)",
        ),
        refused(
            "a mask of floats",
            lambda: divergence(mask=mask(causal=zeros(2, 6))),
            TypeError,
            "`mask.causal` must be a tensor of dtype bool",
            "float32",
        ),
        refused(
            "a row index of other rows",
            lambda: output(mask=mask(row_index=zeros(6, dtype="int32"))),
            ValueError,
            "`mask.row_index` must have shape (rows) = (5,)",
        ),
        refused(
            "a row index of floats",
            lambda: output(mask=mask(row_index=zeros(5))),
            TypeError,
            "`mask.row_index` must be a tensor of dtype int",
        ),
        refused(
            "a window of 0",
            lambda: divergence(mask=mask(window=0)),
            ValueError,
            "`mask.window` must be at least 1",
        ),
        refused(
            "a window of half a token",
            lambda: output(mask=mask(window=1.5)),
            TypeError,
            "`mask.window` must be an integer",
        ),
        refused(
            "blocks of other keys",
            lambda: output(mask=mask(block=zeros(2, 5, dtype="int32"))),
            ValueError,
            "`mask.block` must have shape",
        ),
        refused(
            "no distance",
            lambda: divergence(distance=None),
            TypeError,
            "`distance` must be a `keras_laid.ops.Distance`",
        ),
        refused(
            "positions of other rows",
            lambda: divergence(distance=distance(row_positions=zeros(2, 4))),
            ValueError,
            "`distance.row_positions` must have shape (batch, rows) = (2, 5)",
        ),
        refused(
            "positions without a batch",
            lambda: divergence(distance=distance(key_positions=zeros(6))),
            ValueError,
            "`distance.key_positions` must have shape",
        ),
        refused(
            "a negative strength",
            lambda: divergence(distance=distance(strength=-1.0)),
            ValueError,
            "`distance.strength` must be in [0, inf)",
        ),
        refused(
            "a strength for each token",
            lambda: divergence(distance=distance(strength=zeros(5))),
            ValueError,
            "`distance.strength` must have shape () = ()",
        ),
        refused(
            "an exponent of 0",
            lambda: divergence(distance=distance(exponent=0.0)),
            ValueError,
            "`distance.exponent` must be in (0, inf)",
        ),
        *[
            refused(
                f"{requested!r} for an implementation",
                lambda requested=requested: divergence(
                    implementation=requested
                ),
                ValueError,
                "Expected one of ['chunked', 'definition', 'pallas', 'triton']",
                repr(requested),
            )
            for requested in ("fast", ["chunked"], True)
        ],
        refused(
            "a value for fewer keys",
            lambda: output(value=zeros(2, 5, 2, 3)),
            ValueError,
            "`value` must have shape (batch, keys, key_heads, value_dim)",
            "(2, 5, 2, 3)",
        ),
        refused(
            "no value",
            lambda: output(value=None),
            TypeError,
            "`value` must be a tensor",
        ),
        refused(
            "head dims that cannot be matched",
            lambda: queries_and_keys(
                teacher=attention((2, 5, 4, 6), (2, 6, 2, 6))
            ),
            ValueError,
            "equal head dims",
            "Match attention maps instead",
        ),
        refused(
            "no mixture of queries",
            lambda: queries_and_keys(mixture=None),
            TypeError,
            "`mixture` must be a tensor",
        ),
        refused(
            "a mask of other rows",
            lambda: queries_and_keys(row_mask=zeros(2, 6, dtype="bool")),
            ValueError,
            "`row_mask` must have shape (batch, rows) = (2, 5)",
        ),
        refused(
            "a key mask of one example",
            lambda: queries_and_keys(key_mask=zeros(6, dtype="bool")),
            ValueError,
            "`key_mask` must have shape",
        ),
        refused(
            "no keys",
            lambda: AttentionMask.from_lengths(0, [5]),
            ValueError,
            "`key_length` must be at least 1",
        ),
        refused(
            "a list for segments",
            lambda: shares(segments=[[1, 2]]),
            TypeError,
            "`segments` must be a tensor",
            "list",
        ),
        refused(
            "segments of other keys",
            lambda: shares(segments=zeros(2, 5, dtype="int32")),
            ValueError,
            "`segments` must have shape (batch, keys) = (2, 6)",
            "(2, 5)",
        ),
        refused(
            "segments of floats",
            lambda: shares(segments=zeros(2, 6)),
            TypeError,
            "`segments` must be a tensor of dtype int",
        ),
        refused(
            "pooled attention of a tensor",
            lambda: shares(attention=zeros(2, 5, 4, 8)),
            TypeError,
            "`attention` must be a `keras_laid.ops.Attention`",
        ),
        refused(
            "pooled attention under a mask of other rows",
            lambda: shares(mask=mask(row_index=zeros(6, dtype="int32"))),
            ValueError,
            "`mask.row_index` must have shape (rows) = (5,)",
        ),
        *[
            refused(
                f"{count} segments",
                lambda count=count: shares(num_segments=count),
                error,
                rule,
                f"num_segments={count}",
            )
            for count, error, rule in (
                (0, ValueError, "`num_segments` must be at least 1"),
                (2.5, TypeError, "`num_segments` must be an integer"),
                (True, TypeError, "`num_segments` must be an integer"),
            )
        ],
        refused(
            "a number of segments for each example",
            lambda: shares(num_segments=zeros(2, dtype="int32")),
            ValueError,
            "`num_segments` must have shape ()",
            "(2,)",
        ),
        refused(
            "a number of segments as a float tensor",
            lambda: shares(num_segments=zeros()),
            TypeError,
            "`num_segments` must be a tensor of dtype int",
        ),
        refused(
            "pooled attention by a kernel that does not exist",
            lambda: shares(implementation="pallas"),
            ValueError,
            "Expected one of ['chunked', 'definition']",
            "'pallas'",
        ),
        refused(
            "log shares without heads",
            lambda: retrieval(zeros(2, 5, 3)),
            ValueError,
            "`log_shares` must have shape (batch, heads, rows, segments)",
            "(2, 5, 3)",
        ),
        refused(
            "a list for log shares",
            lambda: retrieval([0.0]),
            TypeError,
            "`log_shares` must be a tensor",
        ),
        refused(
            "weights of other heads",
            lambda: retrieval(zeros(2, 4, 5, 3), zeros(3)),
            ValueError,
            "`head_weight` must have shape (heads) = (4,)",
            "(3,)",
        ),
        refused(
            "weights of a student's other heads",
            lambda: compared_retrieval(head_weight=zeros(3)),
            ValueError,
            "`head_weight` must have shape (heads) = (4,)",
            "(3,)",
        ),
        refused(
            "a student without heads",
            lambda: compared_retrieval(student=zeros(2, 5, 3)),
            ValueError,
            "`student` must have shape (batch, heads, rows, segments)",
            "(2, 5, 3)",
        ),
        refused(
            "log shares for a teacher",
            lambda: compared_retrieval(teacher=zeros(2, 4, 5, 3)),
            TypeError,
            "`teacher` must be a `keras_laid.ops.Retrieval`",
            "Pass what `keras_laid.ops.retrieval` returns",
        ),
        *[
            refused(
                f"a teacher whose {name} is of {shape}",
                lambda name=name, shape=shape: compared_retrieval(
                    teacher=where_it_looks(**{name: zeros(*shape)})
                ),
                ValueError,
                f"`teacher.{name}` must have shape (batch, rows",
                f"{shape}",
            )
            for name, shape in (
                ("shares", (2, 5, 4)),
                ("mass", (2, 4)),
                ("sharpness", (2, 5, 3)),
            )
        ],
        refused(
            "a row mask of another batch",
            lambda: compared_retrieval(row_mask=zeros(1, 5)),
            ValueError,
            "`row_mask` must have shape (batch, rows) = (2, 5)",
            "(1, 5)",
        ),
        refused(
            "an unknown pooling",
            lambda: compared_retrieval(pooling="mean"),
            ValueError,
            "`pooling` must be one of ['none', 'heads', 'rows']",
            "'mean'",
        ),
        refused(
            "a number for distances",
            lambda: compared_retrieval(distance=3.0),
            TypeError,
            "`distance` must be a `keras_laid.ops.Distance`",
            "float",
        ),
        refused(
            "distances to keys instead of segments",
            lambda: compared_retrieval(distance=distance()),
            ValueError,
            "`distance.key_positions` must have shape (batch, segments)",
            "(1, 6)",
        ),
        *[
            refused(
                f"distances to segments with {words}",
                lambda changes=changes: compared_retrieval(
                    distance=distance(key_positions=zeros(1, 3), **changes)
                ),
                ValueError,
                rule,
            )
            for words, changes, rule in (
                (
                    "an exponent of 0",
                    dict(exponent=0.0),
                    "`distance.exponent` must be in (0, inf)",
                ),
                (
                    "a negative strength",
                    dict(strength=-1.0),
                    "`distance.strength` must be in [0, inf)",
                ),
                (
                    "other rows",
                    dict(row_positions=zeros(1, 4)),
                    "`distance.row_positions` must have shape (batch, rows)",
                ),
            )
        ],
        refused(
            "a length for all examples",
            lambda: AttentionMask.from_lengths(5, 5),
            ValueError,
            "`lengths` must have shape (batch)",
        ),
        refused(
            "lengths of half a token",
            lambda: AttentionMask.from_lengths(5, [2.5]),
            TypeError,
            "`lengths` must be a tensor of dtype int",
        ),
        refused(
            "prefixes of another batch",
            lambda: AttentionMask.from_lengths(5, [5, 4], [1, 2, 3]),
            ValueError,
            "`prefix_lengths` must have shape (batch) = (2,)",
        ),
        refused(
            "a negative window",
            lambda: AttentionMask.from_lengths(5, [5], window=-3),
            ValueError,
            "`window` must be at least 1",
        ),
        refused(
            "logits for a student",
            lambda: tokens(student=zeros(2, 3, 7)),
            TypeError,
            "`student` must be a `keras_laid.ops.Unembedding`",
        ),
        refused(
            "a name for a teacher",
            lambda: tokens(teacher="teacher"),
            TypeError,
            "or `None`",
            "str",
        ),
        refused(
            "nothing to compare with",
            lambda: tokens(teacher=None, labels=None),
            ValueError,
            "something to compare",
        ),
        refused(
            "a kernel of another width",
            lambda: tokens(student=unembedding(kernel=(5, 7))),
            ValueError,
            "`student.kernel` must have shape (hidden_dim, vocabulary)",
            "(5, 7)",
        ),
        refused(
            "another vocabulary",
            lambda: tokens(teacher=unembedding(kernel=(4, 8))),
            ValueError,
            "same vocabulary",
            'Pass `vocabulary="shared"`',
        ),
        refused(
            "a teacher of other tokens",
            lambda: tokens(teacher=unembedding(hidden=(2, 4, 4))),
            ValueError,
            "`teacher.hidden` must have shape",
            "(2, 4, 4)",
        ),
        refused(
            "a soft cap of nan",
            lambda: tokens(teacher=unembedding(soft_cap=NAN)),
            ValueError,
            "`teacher.soft_cap` must be in (0, inf)",
        ),
        refused(
            "labels of floats",
            lambda: tokens(labels=zeros(2, 3)),
            TypeError,
            "`labels` must be a tensor of dtype int",
        ),
        refused(
            "labels beyond the vocabulary",
            lambda: tokens(labels=np.array([[0, 6, -1], [7, 0, 0]])),
            ValueError,
            "`labels` must be less than 7",
            "labels[1, 0]=7",
        ),
        refused(
            "labels of other tokens",
            lambda: tokens(labels=zeros(2, 5, dtype="int32")),
            ValueError,
            "`labels` must have shape (batch, length) = (2, 3)",
        ),
        refused(
            "weights of examples",
            lambda: tokens(weights=zeros(2)),
            ValueError,
            "`weights` must have shape (batch, length)",
            "(2,)",
        ),
        refused(
            "a negative weight",
            lambda: tokens(divergence_weight=-1.0),
            ValueError,
            "`divergence_weight` must be in [0, inf)",
        ),
        refused(
            "a boolean for a weight",
            lambda: tokens(cross_entropy_weight=True),
            TypeError,
            "`cross_entropy_weight` must be a number",
        ),
        *[
            refused(
                f"a temperature of {value}",
                lambda value=value: tokens(temperature=value),
                ValueError,
                "`temperature` must be in (0, inf)",
                f"temperature={value}",
            )
            for value in (0.0, NAN, INFINITY)
        ],
        *[
            refused(
                f"a beta of {value}",
                lambda value=value: tokens(beta=value),
                ValueError,
                "`beta` must be in [0, 1]",
                f"beta={value}",
            )
            for value in (-0.1, 1.5, NAN)
        ],
        refused(
            "an unknown vocabulary",
            lambda: tokens(vocabulary=["same"]),
            ValueError,
            "`vocabulary` must be one of ['same', 'shared']",
        ),
        refused(
            "an index of floats",
            lambda: top(index=zeros(2, 3, 3)),
            TypeError,
            "`teacher.index` must be a tensor of dtype int",
        ),
        refused(
            "an index of fewer logits",
            lambda: top(index=zeros(2, 3, 2, dtype="int32")),
            ValueError,
            "`teacher.index` must have shape (batch, length, count)",
        ),
        refused(
            "others at one temperature",
            lambda: top(others=zeros(2, 3, 1)),
            ValueError,
            "`teacher.others` must have shape",
        ),
        refused(
            "logits of another temperature",
            lambda: top(temperature=2.0),
            ValueError,
            "teacher.temperature=2.0",
        ),
        refused(
            "largest logits of more tokens",
            lambda: tokens(
                teacher=TopLogits.from_logits(zeros(2, 3, 8), 2),
                vocabulary="shared",
            ),
            ValueError,
            "largest of 8, 7 shared",
        ),
        refused(
            "more logits than there are",
            lambda: TopLogits.from_logits(zeros(2, 3, 7), 8),
            ValueError,
            "`count` must be at most",
            "count=8",
        ),
        refused(
            "no logit at all",
            lambda: TopLogits.from_logits(zeros(2, 3, 7), 0),
            ValueError,
            "`count` must be at least 1",
        ),
        refused(
            "logits without a batch",
            lambda: TopLogits.from_logits(zeros(3, 7), 2),
            ValueError,
            "`logits` must have shape (batch, length, vocabulary)",
        ),
        refused(
            "a string for a temperature",
            lambda: TopLogits.from_logits(zeros(2, 3, 7), 2, "1"),
            TypeError,
            "`temperature` must be a number",
        ),
    ],
)
def test_refused(call, error, words):
    assert_refused(error, words, call)
