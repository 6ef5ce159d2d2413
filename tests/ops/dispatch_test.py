import pytest

from keras_laid.ops.dispatch import Implementation
from keras_laid.ops.dispatch import select

REFUSED = Implementation("fast", sum, lambda x: "It is a list.")
PLAIN = Implementation("plain", sum)


def test_first_that_accepts_is_chosen():
    assert select("op", [PLAIN, REFUSED], None, [1]) is PLAIN
    assert select("op", [REFUSED, PLAIN], None, [1]) is PLAIN


def test_named_implementation_is_used_or_refused():
    assert select("op", [REFUSED, PLAIN], "plain", [1]) is PLAIN
    with pytest.raises(NotImplementedError, match=r"'fast': It is a list\."):
        select("op", [REFUSED, PLAIN], "fast", [1])
    with pytest.raises(ValueError, match=r"one of \['fast', 'plain'\]"):
        select("op", [REFUSED, PLAIN], "slow", [1])


def test_reasons_are_given_when_none_accepts():
    with pytest.raises(NotImplementedError, match=r"fast: It is a list\."):
        select("op", [REFUSED], None, [1])
