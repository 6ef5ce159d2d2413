"""Chooses which implementation of an op runs. The only place that decides."""

import dataclasses
import logging
from collections.abc import Callable
from collections.abc import Sequence
from typing import Any

logger = logging.getLogger("keras_laid")


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to compute an op.

    Attributes:
        name: The string that a caller passes as `implementation=`.
        run: The op itself. Every implementation has the same signature.
        why_not: Called with the op's arguments before `run`. Returns `None` if
            `run` can take them, or else one sentence that says why it cannot.
            It looks only at shapes, dtypes, platform and static values.
    """

    name: str
    run: Callable[..., Any]
    why_not: Callable[..., str | None] = lambda *args, **kwargs: None


def select(
    op_name: str,
    implementations: Sequence[Implementation],
    requested: str | None,
    *args: Any,
    **kwargs: Any,
) -> Implementation:
    """Returns the first implementation that accepts the arguments.

    A named implementation is used or refused; it is never replaced. With
    `requested=None` the first in the list that accepts the arguments is used.
    Exceptions from `run` are never caught, so that a broken kernel is noticed.
    """
    check_requested(op_name, implementations, requested)
    by_name = {impl.name: impl for impl in implementations}
    if requested is not None:
        reason = by_name[requested].why_not(*args, **kwargs)
        if reason is not None:
            raise NotImplementedError(
                f"`{op_name}` cannot use implementation={requested!r}: "
                f"{reason} Pass `implementation=None` to choose another."
            )
        return by_name[requested]

    refusals: list[str] = []
    for impl in implementations:
        reason = impl.why_not(*args, **kwargs)
        if reason is None:
            logger.info("%s uses %s. %s", op_name, impl.name, refusals)
            return impl
        refusals.append(f"{impl.name}: {reason}")
    raise NotImplementedError(
        f"No implementation of `{op_name}` accepts these arguments. "
        + " ".join(refusals)
    )


def check_requested(
    op_name: str,
    implementations: Sequence[Implementation],
    requested: str | None,
) -> None:
    """Refuses a name that no implementation has."""
    names = sorted(impl.name for impl in implementations)
    if requested is not None and requested not in names:
        raise ValueError(
            f"Unknown `implementation` for `{op_name}`. Expected one of "
            f"{names} or `None`. Received: implementation={requested!r}"
        )
