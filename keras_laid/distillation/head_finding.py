"""The distiller's retrieval heads: found on the first batches, and saved."""

import contextlib
import logging
import warnings
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np

from keras_laid.backbones.linear_memory import linear_blocks
from keras_laid.backbones.linear_memory import named
from keras_laid.backbones.retrieval_heads import RetrievalHeads
from keras_laid.backbones.retrieval_heads import find_retrieval_heads
from keras_laid.backbones.teacher_inputs import inputs_of_teacher
from keras_laid.distillation.first_batches import first_batches
from keras_laid.distillation.retrieval_shares import Heads
from keras_laid.distillation.terms.retrieval import RetrievalMatching

HEADS = "retrieval_heads"  # Their name in weight files.
logger = logging.getLogger("keras_laid")


def as_teacher_reads(batch: Any) -> tuple[Any, Any, Any]:
    """A batch with the inputs of the teacher in place of the student's."""
    x, y, sample_weight = keras.utils.unpack_x_y_sample_weight(batch)
    if isinstance(x, dict):
        x = inputs_of_teacher(x)
    return x, y, sample_weight


class HeadFinding:
    """A base class of the distiller: finds the heads of its retrieval term."""

    @property
    def retrieval_heads(self) -> Heads | None:
        """Pairs `(layer, head)` that are matched; `None` until found."""
        retrieval = self.term(RetrievalMatching)
        return retrieval.heads if retrieval else ()

    def find_heads(self, data: Iterable[Any]) -> RetrievalHeads | None:
        """Finds the teacher's retrieval heads, and matches them from now on.

        `fit`, `evaluate`, `train_on_batch` and `test_on_batch` call this on
        their first batches, unless the heads are known. Call it yourself if
        those batches are not typical, or can be read only once.

        Args:
            data: Iterable of batches, as in `keras_laid.find_retrieval_heads`.
                The first 4 are read, and more until there are 32 examples.

        Returns:
            The result of `keras_laid.find_retrieval_heads`, or `None` if no
            prompt has two images or segments, and text after them: the term is
            0 then.
        """
        retrieval = self.term(RetrievalMatching)
        if retrieval is None:
            raise ValueError(
                "`find_heads` needs a retrieval term. Received: a distiller "
                f"with the terms {[*self.term_weights]}. Give it a "
                "`retrieval_weight`, or a `RetrievalMatching` in its `terms`."
            )
        batches = first_batches(data)
        for batch in batches:
            self.check_tokens(*keras.utils.unpack_x_y_sample_weight(batch))
        with contextlib.ExitStack() as scopes:
            if self.linear_memory:
                scopes.enter_context(
                    linear_blocks(self.teacher, named(self.linear_memory))
                )
            found = find_retrieval_heads(
                self.teacher,
                [as_teacher_reads(batch) for batch in batches],
                max(1, len(batches)),
                num_segments=retrieval.num_segments,
            )
        if found is None:
            warnings.warn(
                "The retrieval term is 0: the first batches have no prompt "
                'with two images or `"segments"`, and text after them. Pass '
                "`retrieval_weight=0` to leave it out.",
                stacklevel=2,
            )
        self.set_heads(retrieval, found.heads if found else ())
        logger.info(
            "Retrieval heads (layer, head) of the teacher: %s",
            self.retrieval_heads,
        )
        return found

    def find_heads_once(
        self,
        x: Any,
        y: Any = None,
        sample_weight: Any = None,
        batch_size: int | None = None,
    ) -> None:
        if self.retrieval_heads is None:
            self.find_heads(first_batches(x, y, sample_weight, batch_size))

    def set_heads(self, retrieval: RetrievalMatching, heads: Heads) -> None:
        if heads == retrieval.heads:
            return
        retrieval.heads = heads
        # Steps that were compiled for other heads must be compiled again.
        if self.train_function is not None:
            self.make_train_function(force=True)
        if self.test_function is not None:
            self.make_test_function(force=True)

    def save_own_variables(self, store: Any) -> None:
        super().save_own_variables(store)
        if self.retrieval_heads:
            store[HEADS] = np.asarray(self.retrieval_heads, "int32")

    def load_own_variables(self, store: Any) -> None:
        retrieval = self.term(RetrievalMatching)
        if retrieval is not None and HEADS in store.keys():
            heads = np.asarray(store[HEADS]).tolist()
            self.set_heads(retrieval, tuple(map(tuple, heads)))
        super().load_own_variables(
            {name: store[name] for name in store.keys() if name != HEADS}
        )
