"""Which student layer learns from which teacher layer."""

from collections.abc import Sequence

from keras_laid.arguments import is_integer
from keras_laid.backbones.decoder import indices_of_global
from keras_laid.distillation.description import Description


def resolve_layer_map(
    layer_map: str | Sequence[tuple[int, int]],
    student: Description,
    teacher: Description,
) -> tuple[tuple[int, int], ...]:
    """Pairs of layers whose attention is matched.

    Args:
        layer_map: `"last"`: the student's last layer learns from the teacher's
            last one (the paper's choice). `"uniform"`: every student layer
            learns, from teacher layers at even steps up to the last. Or a
            sequence of pairs `(student_layer, teacher_layer)`, where negative
            indices count from the end. Only layers with full attention are
            matched, since those with a sliding window see no long range and
            linear ones have no map: `"last"` and `"uniform"` skip all others,
            and pairs must not name them.
        student: The student's `Description`.
        teacher: The teacher's `Description`.

    Returns:
        A tuple of pairs of non-negative integers.

    Raises:
        ValueError: If a layer does not exist or does not have full attention,
            or a student layer is named twice.
    """
    student_indices = indices_of_global(student.layers, student.model)
    teacher_indices = indices_of_global(teacher.layers, teacher.model)
    if not (isinstance(layer_map, str) or is_pairs(layer_map)):
        raise refusal(layer_map)
    if layer_map == "last":
        return ((student_indices[-1], teacher_indices[-1]),)
    if layer_map == "uniform":
        step = len(teacher_indices) / len(student_indices)
        return tuple(
            (layer, teacher_indices[max(0, round((i + 1) * step) - 1)])
            for i, layer in enumerate(student_indices)
        )
    if isinstance(layer_map, str):
        raise refusal(layer_map)
    pairs = tuple(
        (
            resolve_index(
                "layer_map", "student", student, student_indices, student_layer
            ),
            resolve_index(
                "layer_map", "teacher", teacher, teacher_indices, teacher_layer
            ),
        )
        for student_layer, teacher_layer in layer_map
    )
    if len({student_layer for student_layer, _ in pairs}) < len(pairs):
        raise ValueError(
            "`layer_map` must name each student layer once. "
            f"Received: layer_map={layer_map}"
        )
    return pairs


def is_pairs(layer_map: object) -> bool:
    return bool(
        isinstance(layer_map, (list, tuple))
        and layer_map
        and all(
            isinstance(pair, (list, tuple))
            and len(pair) == 2
            and all(map(is_integer, pair))
            for pair in layer_map
        )
    )


def refusal(layer_map: object) -> ValueError:
    return ValueError(
        '`layer_map` must be "last", "uniform", or pairs of indices '
        f"(student_layer, teacher_layer). Received: layer_map={layer_map!r:.80}"
    )


def resolve_index(
    argument: str,
    name: str,
    model: Description,
    allowed: Sequence[int],
    index: int,
) -> int:
    count = len(model.layers)
    resolved = index + count if index < 0 else index
    if resolved not in allowed:
        raise ValueError(
            f"`{argument}` must name {name} layers with full attention, of "
            f"{allowed}. Received: {name} layer {index}"
        )
    return resolved
