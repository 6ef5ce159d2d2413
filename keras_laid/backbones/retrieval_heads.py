"""Which attention heads of a model find the image that a question is about."""

import dataclasses
from collections.abc import Iterable
from collections.abc import Mapping
from collections.abc import Sequence
from typing import Any
from typing import Literal

import keras
import numpy as np
from keras import ops

from keras_laid.arguments import check_number
from keras_laid.backbones.attention_capture import attention_mask
from keras_laid.backbones.attention_capture import no_gradients
from keras_laid.backbones.attention_capture import text_rows
from keras_laid.backbones.decoder import check_inputs
from keras_laid.backbones.decoder import global_layers
from keras_laid.backbones.families import attention_layers
from keras_laid.backbones.forward import forward
from keras_laid.backbones.segments import Segments
from keras_laid.backbones.segments import segments_of
from keras_laid.backbones.without_heads import without_heads
from keras_laid.ops.attention import Attention
from keras_laid.ops.attention import AttentionMask
from keras_laid.ops.retrieval_divergence import retrieval
from keras_laid.ops.segment_attention import segment_attention
from keras_laid.typing import Tensor

ROWS = 512  # Whose attention exists at a time.
ROW_KINDS = ("text", "image")
# Of the best head's score, what a head must have to be chosen: where needles
# are known, others score near 0; where they are not, any sharp head scores.
KNOWN_NEEDLE = 0.5
UNKNOWN_NEEDLE = 0.9


@dataclasses.dataclass(frozen=True)
class HeadStatistics:
    """How the heads of a model look at segments, in rows of one kind.

    Each example counts by its sharpest row, the one with the largest product of
    mass and sharpness. All attributes are float arrays of shape
    `(layers, heads)`, means over examples; they are NaN for layers without full
    attention.

    Attributes:
        mass: Share of the row's attention that goes to segments, in `[0, 1]`.
        sharpness: `1 - entropy / log(segments)` of the shares of segments, in
            `[0, 1]`.
        selectivity: How much the segment looked at differs between examples, in
            `[0, 1]`: the entropy of the mean of their shares less the mean of
            their entropies, over `log(segments)`. It is 0 for a head that looks
            at the same place whatever it is asked.
        needle: Share of the row's attention that the needle gets, less what
            other segments get on average; NaN where needles are unknown.
    """

    mass: np.ndarray
    sharpness: np.ndarray
    selectivity: np.ndarray
    needle: np.ndarray


@dataclasses.dataclass(frozen=True)
class RetrievalHeads:
    """What `keras_laid.find_retrieval_heads` found.

    Attributes:
        heads: Tuple of pairs of integers `(layer, head)`, the chosen ones, best
            first.
        score: Float array of shape `(layers, heads)`: what they were chosen by.
        threshold: Float: a chosen head has at least this share of the best
            score.
        by_rows: Dictionary from a kind of row, `"text"` or `"image"`, to
            `HeadStatistics`.
        ablation: Dictionary, or `None` if it was not asked for: the share of
            marked tokens whose most likely next token stays the same
            `"without_chosen"` heads, and `"without_others"`, as many heads with
            the lowest scores.
    """

    heads: tuple[tuple[int, int], ...]
    score: np.ndarray
    threshold: float
    by_rows: dict[str, HeadStatistics]
    ablation: dict[str, float] | None = None

    def table(self, count: int = 10, rows: str = "text") -> str:
        """The best heads as a table in Markdown.

        Args:
            count: Integer, how many heads.
            rows: `"text"` or `"image"`, whose statistics are shown.
        """
        names = [field.name for field in dataclasses.fields(HeadStatistics)]
        lines = [
            ["layer", "head", "chosen", "score", *names],
            ["---"] * (4 + len(names)),
        ]
        for layer, head in ranked(self.score)[:count]:
            numbers = [self.score[layer, head]]
            numbers += [
                getattr(self.by_rows[rows], name)[layer, head]
                for name in names
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

    A retrieval head looks sharply at one image (or other segment of the
    prompt), at another one for another question, and, where it is known, at
    the *needle*, the image that the question is about. In each example the
    row with the largest product of mass and sharpness counts. The score of a
    head is

    - `needle`, where the data say which segment is the needle: the attention
      that it gets, less what other segments get on average;
    - else `mass * selectivity`.

    Chosen are the heads in layers with full attention whose score in rows of
    text is at least `threshold` times the best one. Memory is linear in the
    length of the prompt.

    Args:
        model: A `keras_hub.models.CausalLM` of a family that
            `keras_laid.backbones.attention_layers` knows, or a
            `keras_laid.MultiImagePaliGemmaCausalLM`.
        data: Iterable of batches: dictionaries of the model's inputs, or tuples
            `(x, y, sample_weight)` that begin with one, such as
            `keras_laid.Haystacks`. Each image is a segment, or inputs have
            `"segments"`, integers of shape `(batch, keys)` that number them
            from 1; 0 is none. `"needle"`, integers of shape `(batch,)`, says
            which segment is the needle, from 0. Where `sample_weight` is there,
            rows after the last marked token do not count.
        batches: Integer, how many batches are read. Examples are compared with
            each other, so that some tens are needed. Defaults to `4`.
        threshold: Float in `(0, 1]`. Defaults to `0.5` where needles are known
            and `0.9` where they are not.
        row_kinds: Which rows have statistics: `"text"`, `"image"` or both.
            Defaults to `("text",)`.
        num_segments: Integer, the largest number of a segment, where it is not
            the number of images. Defaults to the largest number in the data.
        ablate: Boolean, whether the model also answers without the chosen
            heads. Defaults to `False`.

    Returns:
        A `RetrievalHeads`, or `None` if no prompt has two segments or more.

    Raises:
        TypeError: If an argument is of another kind.
        ValueError: If an argument is out of range.

    Example:

    ```python
    found = keras_laid.find_retrieval_heads(teacher, haystacks)
    print(found.table())
    found.heads  # ((1, 3), (1, 2), (1, 1))
    ```

    Reference:
     - [Wu et al., 2024](https://arxiv.org/abs/2404.15574), "Retrieval head
       mechanistically explains long-context factuality". They count copied
       tokens; attention to segments also works for answers that copy nothing.
    """
    if threshold is not None:
        check_number("threshold", threshold, "(0, 1]")
    some = [batch for _, batch in zip(range(batches), data, strict=False)]
    by_rows = {}
    for kind in {"text": None, **dict.fromkeys(row_kinds)}:
        if kind not in ROW_KINDS:
            raise ValueError(
                f"`row_kinds` must be among {ROW_KINDS}. "
                f"Received: row_kinds={row_kinds!r:.80}"
            )
        parts = [
            statistics_of_batch(model, batch, kind, num_segments)
            for batch in some
        ]
        parts = [part for part in parts if part is not None]
        if not parts:
            return None
        by_rows[kind] = HeadStatistics(
            **{
                field.name: np.mean([getattr(p, field.name) for p in parts], 0)
                for field in dataclasses.fields(HeadStatistics)
            }
        )
    text = by_rows["text"]
    knows_needles = np.isfinite(text.needle).any()
    score = text.needle if knows_needles else text.mass * text.selectivity
    if threshold is None:
        threshold = KNOWN_NEEDLE if knows_needles else UNKNOWN_NEEDLE
    order = ranked(score)
    best = score[order[0]]
    heads = tuple(head for head in order if score[head] >= threshold * best)
    found = RetrievalHeads(heads, score, threshold, by_rows)
    if not ablate:
        return found
    others = order[::-1][: len(heads)]
    return dataclasses.replace(
        found,
        ablation={
            "without_chosen": agreement(model, some, heads),
            "without_others": agreement(model, some, others),
        },
    )


def ranked(score: np.ndarray) -> list[tuple[int, int]]:
    """Pairs `(layer, head)`, highest score first, those without one left out."""
    order = np.argsort(-score, axis=None, kind="stable")
    pairs = zip(*np.unravel_index(order, score.shape), strict=True)
    return [
        (int(layer), int(head))
        for layer, head in pairs
        if np.isfinite(score[layer, head])
    ]


def statistics_of_batch(
    model: keras.Model, batch: Any, kind: str, num_segments: int | None
) -> HeadStatistics | None:
    """Statistics of a batch; `None` if prompts have less than two segments."""
    x, sample_weight = inputs_of(batch)
    check_inputs(model, x)
    layers = global_layers(model)
    with no_gradients():
        _, attention = forward(model, x, layers)
    if "segments" in x and num_segments is None:
        num_segments = max(int(np.max(to_numpy(x["segments"]))), 1)
    key_length = attention[layers[0]].key.shape[1]
    segments = segments_of(model, x, key_length, num_segments)
    if segments is None or segments.count < 2:
        return None
    needle = x.get("needle")
    row_index, counts = rows_of_kind(model, x, sample_weight, key_length, kind)
    known = attention_layers(model)
    width = max(known[layer].num_query_heads for layer in layers)
    table = {
        field.name: np.full((len(known), width), np.nan)
        for field in dataclasses.fields(HeadStatistics)
    }
    for layer in layers:
        sharpest = Sharpest()
        for start in range(0, len(row_index), ROWS):
            some = row_index[start : start + ROWS]
            mask = attention_mask(model, x, key_length, ops.convert_to_tensor(some))
            of_rows = attention[layer]._replace(
                query=ops.take(attention[layer].query, some, axis=1)
            )
            sharpest.add(of_rows, mask, segments, counts[:, start : start + ROWS])
        found = sharpest.statistics(needle)
        for name, values in found.items():
            table[name][layer, : len(values)] = values
    return HeadStatistics(**table)


class Sharpest:
    """Of each example and head, the row that retrieves most."""

    def __init__(self) -> None:
        self.weight: np.ndarray | None = None

    def add(
        self,
        attention: Attention,
        mask: AttentionMask,
        segments: Segments,
        counts: np.ndarray,
    ) -> None:
        """Looks at some more rows, those of `counts` alone."""
        with no_gradients():
            log_shares = segment_attention(attention, mask, *segments)
            # [batch * heads, rows, segments]: each head by itself.
            batch, heads, rows, count = log_shares.shape
            of_heads = retrieval(
                ops.reshape(log_shares, (batch * heads, 1, rows, count))
            )
        shares, mass, sharpness = (
            to_numpy(each).reshape(batch, heads, *each.shape[1:])
            for each in of_heads
        )
        weight = np.where(counts[:, None], mass * sharpness, -1.0)
        best = weight.argmax(axis=-1)[..., None]
        found = [
            np.take_along_axis(each, best, axis=-1)[..., 0]
            for each in (weight, mass, sharpness)
        ]
        found.append(
            np.take_along_axis(shares, best[..., None], axis=2)[..., 0, :]
        )
        if self.weight is None:
            self.weight, self.mass, self.sharpness, self.shares = found
            return
        better = found[0] > self.weight
        self.weight, self.mass, self.sharpness = (
            np.where(better, new, old)
            for new, old in zip(
                found, (self.weight, self.mass, self.sharpness), strict=False
            )
        )
        self.shares = np.where(better[..., None], found[-1], self.shares)

    def statistics(self, needle: Tensor | None) -> dict[str, np.ndarray]:
        """Means over examples, of shape `(heads,)`."""
        segments = self.shares.shape[-1]
        # Examples in which no row counts, or none attends a segment.
        some = (self.weight > 0).any(axis=1)
        shares, mass, sharpness = (
            each[some] for each in (self.shares, self.mass, self.sharpness)
        )
        heads = self.shares.shape[1]
        if not some.any():
            nothing = np.zeros(heads)
            return dict(
                mass=nothing,
                sharpness=nothing,
                selectivity=nothing,
                needle=np.full(heads, np.nan),
            )
        mean = shares.mean(axis=0)
        entropy = -(mean * np.log(np.maximum(mean, 1e-30))).sum(axis=-1)
        spread = entropy / np.log(segments)
        selectivity = spread - (1.0 - sharpness.mean(axis=0))
        found = np.full(heads, np.nan)
        if needle is not None:
            is_needle = to_numpy(needle)[some].reshape(-1, 1) == np.arange(segments)
            attention = shares * mass[..., None]
            on_needle = (attention * is_needle[:, None]).sum(axis=-1)
            elsewhere = (mass - on_needle) / (segments - 1)
            found = (on_needle - elsewhere).mean(axis=0)
        return dict(
            mass=mass.mean(axis=0),
            sharpness=sharpness.mean(axis=0),
            selectivity=np.maximum(selectivity, 0.0),
            needle=found,
        )


def rows_of_kind(
    model: keras.Model,
    x: Mapping[str, Tensor],
    sample_weight: Tensor | None,
    key_length: int,
    kind: str,
) -> tuple[np.ndarray, np.ndarray]:
    """Places of rows, and which of them count in each example."""
    length = x["token_ids"].shape[1]
    first = key_length - length  # PaliGemma's images stand before.
    mask = attention_mask(model, x, key_length, ops.arange(key_length))
    present = to_numpy(ops.logical_or(mask.bidirectional, mask.causal))
    is_text = np.zeros_like(present)
    is_text[:, first:] = to_numpy(text_rows(x))
    if kind == "image":
        counts = present & ~is_text
    else:
        counts = present & is_text
        if sample_weight is not None:
            counts[:, first:] &= to_numpy(matters(sample_weight))
    rows = np.flatnonzero(counts.any(axis=0))
    return rows, counts[:, rows]


def matters(sample_weight: Tensor) -> Tensor:
    """Which tokens stand at or before an example's last marked token."""
    marked = ops.cast(ops.cast(sample_weight, "float32") > 0, "int32")
    after = ops.flip(ops.cumsum(ops.flip(marked, axis=1), axis=1), axis=1)
    return after > 0


def agreement(
    model: keras.Model, batches: Sequence[Any], heads: Sequence[tuple[int, int]]
) -> float:
    """Share of marked tokens whose likeliest next token stays without heads."""
    same = []
    for batch in batches:
        x, sample_weight = inputs_of(batch)
        whole = likeliest(model, x)
        with without_heads(model, heads):
            part = likeliest(model, x)
        marked = np.ones(whole.shape, "bool")
        if sample_weight is not None:
            marked = to_numpy(sample_weight) > 0
        same.append((whole == part)[marked])
    return float(np.concatenate(same).mean())


def likeliest(model: keras.Model, x: dict[str, Tensor]) -> np.ndarray:
    with no_gradients():
        return to_numpy(ops.argmax(forward(model, x)[0].logits(), axis=-1))


def inputs_of(batch: Any) -> tuple[dict[str, Tensor], Tensor | None]:
    """A batch's inputs and sample weights."""
    if isinstance(batch, dict):
        return batch, None
    x, _, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    return x, sample_weight


def to_numpy(tensor: Tensor) -> np.ndarray:
    return np.asarray(ops.convert_to_numpy(tensor))
