"""Strings that a server writes are tokens of the student's tokenizer."""

import keras_hub
import pytest

from keras_laid.backbones.token_strings import TokenStrings
from keras_laid.backbones.token_strings import byte_letters
from tests.support import sentence_piece

REPLACEMENT = "ï¿½"  # The piece of "\ufffd".


@pytest.fixture(scope="module")
def sentence_tokenizer():
    """One with byte fallback, and with `yes` with and without a space."""
    proto = sentence_piece(
        ["yes no yes no ayes noyes é"] * 4,
        model_type="char",
        byte_fallback=True,
        vocab_size=290,
        user_defined_symbols=["yes", "▁yes", "▁yes▁no", "▁▁"],
    )
    return keras_hub.tokenizers.SentencePieceTokenizer(proto=proto)


def pair_tokenizer():
    pieces = [*byte_letters(), "Ġy", "Ġyes", "yes", "Ã©", REPLACEMENT]
    pieces.append("<|end of text|>")
    return keras_hub.tokenizers.BytePairTokenizer(
        vocabulary={piece: number for number, piece in enumerate(pieces)},
        merges=["Ġ y"],
        unsplittable_tokens=["<|end of text|>"],
    )


@pytest.mark.parametrize(
    ("written", "piece"),
    [
        (" yes", "▁yes"),
        ("▁yes", "▁yes"),
        ("yes", "yes"),
        (" yes no", "▁yes▁no"),
        ("  ", "▁▁"),
        ("é", "é"),
        ("<eos>", "<eos>"),
        ("A", "<0x41>"),  # No other piece is.
        ("a", "a"),  # There is a byte for it too.
        ("<0x61>", "<0x61>"),
    ],
)
def test_sentence_piece(written, piece, sentence_tokenizer):
    found = TokenStrings(sentence_tokenizer).find(written.encode())
    assert found is not None
    assert sentence_tokenizer.id_to_token(found) == piece


@pytest.mark.parametrize(
    ("written", "piece"),
    [
        (b" yes", "Ġyes"),
        ("Ġyes".encode(), "Ġyes"),
        (b"yes", "yes"),
        ("é".encode(), "Ã©"),
        (b"<|end of text|>", "<|end of text|>"),
        (b"\n", "Ċ"),
        (b"\xe9", "é"),
        (b"A", "A"),
    ],
)
def test_byte_pair(written, piece):
    tokenizer = pair_tokenizer()
    assert TokenStrings(tokenizer).find(written) == tokenizer.vocabulary[piece]


def test_strings_of_no_single_token(sentence_tokenizer):
    strings = TokenStrings(sentence_tokenizer)
    for written in ("", "maybe", "\ufffd", "yes\ufffd"):
        assert strings.find(written.encode()) is None
    assert TokenStrings(pair_tokenizer()).find("\ufffd".encode()) is None
    # Two tokens of one text.
    pieces = {"Ġ": 0, "y": 1, "Ġy": 2, " y": 3}
    tokenizer = keras_hub.tokenizers.BytePairTokenizer(pieces, ["Ġ y"])
    assert TokenStrings(tokenizer).find(b" y") is None


def test_bytes_have_a_letter_each():
    letters = byte_letters()
    assert sorted(letters.values()) == list(range(256))
    assert letters["Ġ"] == ord(" ")


@pytest.mark.parametrize(
    "tokenizer", [None, keras_hub.tokenizers.ByteTokenizer()]
)
def test_other_tokenizers_are_refused(tokenizer):
    with pytest.raises(TypeError, match="Received: .* Ask the server for ids"):
        TokenStrings(tokenizer)
