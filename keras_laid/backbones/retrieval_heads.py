"""Which attention heads of a model find the image that a question is about."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
import numpy as np

from keras_laid.arguments import check_choice
from keras_laid.arguments import check_integer
from keras_laid.arguments import check_number
from keras_laid.arguments import check_switch
from keras_laid.backbones.decoder import global_layers
from keras_laid.backbones.families import attention_layers
from keras_laid.backbones.families import layers_with_maps
from keras_laid.backbones.head_examples import Batch
from keras_laid.backbones.head_examples import examples_of
from keras_laid.backbones.head_examples import first_batches
from keras_laid.backbones.head_examples import matters as matters
from keras_laid.backbones.head_statistics import Examples
from keras_laid.backbones.head_statistics import HeadStatistics
from keras_laid.backbones.head_statistics import head_statistics
from keras_laid.backbones.without_heads import answers_kept

ROW_KINDS = ("text", "image")
# The share of the best score that a head needs to be chosen. Where needles are
# known, heads that do not retrieve score near 0. Where needles are not known,
# any sharp head scores well, so the share is larger.
KNOWN_NEEDLE = 0.5
UNKNOWN_NEEDLE = 0.9


@dataclasses.dataclass(frozen=True, eq=False)
class RetrievalHeads:
    """The result of `keras_laid.find_retrieval_heads`.

    Attributes:
        heads: Tuple of pairs of integers `(layer, head)`, the chosen heads,
            best first.
        score: Float array of shape `(layers, heads)`: the score by which heads
            are chosen. It is NaN for layers without full attention.
        threshold: Float: a chosen head has at least this share of the best
            score.
        by_rows: Dictionary from a kind of row, `"text"` or `"image"`, to
            `HeadStatistics`.
        ablation: Dictionary, or `None` if it was not requested.
            `"without_chosen"` is the share of answers that stay the same when
            the chosen heads output zeros. `"without_others"` is this share when
            as many other heads output zeros, those with the lowest scores (all
            others if they are fewer). Answers are the most likely next tokens
            where `sample_weight` marks them, or after the last token of a
            prompt if there is no `sample_weight`.
    """

    heads: tuple[tuple[int, int], ...]
    score: np.ndarray
    threshold: float
    by_rows: dict[str, HeadStatistics]
    ablation: dict[str, float] | None = None

    def table(
        self, count: int = 10, rows: Literal["text", "image"] = "text"
    ) -> str:
        """The best heads as a table in Markdown.

        Args:
            count: Integer, the number of heads. Defaults to `10`.
            rows: `"text"` or `"image"`, the kind of row whose statistics are
                shown. Defaults to `"text"`.

        Returns:
            A string, with a line for each head.

        Raises:
            TypeError: If `count` is not an integer.
            ValueError: If `count` is less than 1, or there are no statistics
                for `rows`.
        """
        check_integer("count", count)
        check_choice("rows", rows, self.by_rows)
        names = [field.name for field in dataclasses.fields(HeadStatistics)]
        lines = [
            ["layer", "head", "chosen", "score", *names],
            ["---"] * (4 + len(names)),
        ]
        for layer, head in ranked(self.score)[:count]:
            numbers = [self.score[layer, head]]
            numbers += [
                getattr(self.by_rows[rows], name)[layer, head] for name in names
            ]
            chosen = "yes" if (layer, head) in self.heads else ""
            cells = [f"{number:.2f}" for number in numbers]
            lines.append([str(layer), str(head), chosen, *cells])
        return "\n".join("| " + " | ".join(line) + " |" for line in lines)


def find_retrieval_heads(
    model: keras.Model,
    data: Iterable[Any],
    batches: int = 4,
    threshold: float | None = None,
    row_kinds: Sequence[Literal["text", "image"]] = ("text",),
    num_segments: int | None = None,
    ablate: bool = False,
) -> RetrievalHeads | None:
    """Finds the attention heads by which a model retrieves.

    A retrieval head attends sharply to one image (or other segment of the
    prompt), and to a different one for a different question. Where the data
    name the *needle*, the image that the question is about, the head attends
    to the needle. In each example, a head is measured in the row with the
    largest product of mass and sharpness. The score of a head is

    - `needle`, where the data say which segment is the needle: the attention
      that the needle gets, minus the mean attention of the other segments;
    - `mass * selectivity` otherwise.

    The chosen heads are those in layers with full attention whose score in rows
    of text is above 0 and at least `threshold` times the best score. Look at
    the best score too: a model that retrieves nothing also has a best head.

    The statistics take memory linear in the length of the prompt. The model's
    own call may take more; `keras_laid.linear_memory_attention` makes its
    memory linear too.

    Args:
        model: A `keras_hub.models.CausalLM` of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`. It is not changed.
        data: Iterable of batches, such as `keras_laid.Haystacks`. A batch is a
            dictionary of the model's inputs, or a tuple `(x, y, sample_weight)`
            whose `x` is such a dictionary. Each image is a segment, unless the
            dictionary has `"segments"`, integers of shape `(batch, keys)`: the
            number of each key's segment, from 1, or 0 for no segment. Leave the
            first token of text in no segment: most heads attend it where they
            find nothing, and would seem to look at its segment. The optional
            entry `"needle"`, integers of shape `(batch,)`, says which segment
            is the needle, from 0; pass -1 for an example whose needle is not
            known. If there is a `sample_weight`, of shape `(batch, length)`,
            text after the last token with a weight above 0 does not count.
        batches: Integer, the number of batches to read. Examples are compared
            with each other, so some tens of examples are needed. Defaults to
            `4`.
        threshold: Float in `(0, 1]`, the share of the best score that a head
            needs to be chosen: a smaller share chooses more heads. Defaults to
            `0.5` where needles are known and `0.9` where they are not.
        row_kinds: Sequence of `"text"`, `"image"` or both, the kinds of rows
            that get statistics. `"text"` is the text after the last segment,
            which can attend all segments (in PaliGemma, all text), and
            `"image"` the tokens of images. There are always statistics for
            `"text"`. Defaults to `("text",)`.
        num_segments: Integer, the largest number of a segment; keys with larger
            numbers are in no segment. Defaults to the largest number in each
            batch.
        ablate: Boolean, whether to measure how many answers stay the same
            without the chosen heads, and without as many others. Defaults to
            `False`.

    Returns:
        A `RetrievalHeads`, or `None` if no prompt has two segments or more, and
        text after them.

    Raises:
        TypeError: If an argument has the wrong type.
        ValueError: If an argument is out of range, `data` has no batch, inputs
            are missing or have the wrong shape, or no needle is known and no
            two examples have the same number of segments.

    Example:

    ```python
    found = keras_laid.find_retrieval_heads(teacher, haystacks)
    print(found.table())
    print(found.heads)  # Such as ((1, 3), (1, 2), (1, 1)).
    ```

    Reference:
     - [Wu et al., 2024](https://arxiv.org/abs/2404.15574), "Retrieval head
       mechanistically explains long-context factuality". They count copied
       tokens; attention to segments also works for answers that copy nothing.
     - [Xiao et al., 2024](https://arxiv.org/abs/2309.17453), "Efficient
       streaming language models with attention sinks", on the first token.
    """
    check_integer("batches", batches)
    if threshold is not None:
        check_number("threshold", threshold, "(0, 1]")
    kinds = checked_row_kinds(row_kinds)
    if num_segments is not None:
        check_integer("num_segments", num_segments)
    check_switch("ablate", ablate)
    some = first_batches(data, batches)
    by_rows = statistics_of(model, some, kinds, num_segments)
    if by_rows is None:
        return None
    text = by_rows["text"]
    knows_needles = np.isfinite(text.needle).any()
    score = text.needle if knows_needles else text.mass * text.selectivity
    if threshold is None:
        threshold = KNOWN_NEEDLE if knows_needles else UNKNOWN_NEEDLE
    order = ranked(score)
    if not order:
        raise ValueError(
            "Where no needle is known, two examples or more must have the same "
            "number of segments, to be compared with each other. Received: "
            f"{len(some)} batches without such examples. Pass more batches, or "
            'inputs with `"needle"`.'
        )
    least = threshold * score[order[0]]
    heads = tuple(h for h in order if score[h] >= least and score[h] > 0)
    found = RetrievalHeads(heads, score, threshold, by_rows)
    if ablate:
        others = [head for head in order[::-1] if head not in heads]
        ablations = {
            "without_chosen": heads,
            "without_others": others[: len(heads)],
        }
        ablation = answers_kept(model, some, ablations)
        found = dataclasses.replace(found, ablation=ablation)
    return found


def checked_row_kinds(row_kinds: object) -> list[str]:
    """Returns the kinds of rows, with `"text"` first and each kind once."""
    if (
        not isinstance(row_kinds, Sequence)
        or isinstance(row_kinds, str)
        or any(kind not in ROW_KINDS for kind in row_kinds)
    ):
        raise ValueError(
            f"`row_kinds` must be a sequence of some of {ROW_KINDS}. Received: "
            f"row_kinds={row_kinds!r:.80}. Pass a tuple, such as `('text',)`."
        )
    return list(dict.fromkeys(("text", *row_kinds)))


def ranked(score: np.ndarray) -> list[tuple[int, int]]:
    """Pairs `(layer, head)`, highest score first, without scores of NaN."""
    order = np.argsort(-score, axis=None, kind="stable")
    pairs = zip(*np.unravel_index(order, score.shape), strict=True)
    return [
        (int(layer), int(head))
        for layer, head in pairs
        if np.isfinite(score[layer, head])
    ]


def statistics_of(
    model: keras.Model,
    batches: Sequence[Batch],
    kinds: Sequence[str],
    num_segments: int | None,
) -> dict[str, HeadStatistics] | None:
    """Statistics of rows of each kind; `None` if no example counts."""
    layers = global_layers(model)
    known = layers_with_maps(model)
    by_kind: dict[str, list[Examples]] = {kind: [] for kind in kinds}
    for batch in batches:
        found = examples_of(model, batch, layers, kinds, num_segments)
        for kind, examples in found.items():
            by_kind[kind].append(examples)
    if not by_kind["text"]:
        return None
    width = max(known[layer].num_query_heads for layer in layers)
    return {
        kind: head_statistics(examples, len(attention_layers(model)), width)
        for kind, examples in by_kind.items()
    }
