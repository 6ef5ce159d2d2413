"""Finds the token of a tokenizer that has a given string or bytes."""

import functools
import re

import keras
from keras_hub.tokenizers import BytePairTokenizer
from keras_hub.tokenizers import SentencePieceTokenizer

# A piece of SentencePiece that stands for a single byte.
BYTE = re.compile(r"<0x([0-9A-F]{2})>")
# The decoded form of a part of a character, the same for many tokens.
REPLACEMENT = "\ufffd".encode()


class TokenStrings:
    """Finds tokens by their written form.

    The written form of a token is its text, with the space before it, if it
    has one. If no token has a given text, pieces of the vocabulary are compared
    too, such as `"▁yes"` or `"Ġyes"`, and the bytes that pieces of
    SentencePiece stand for, such as `"<0x41>"`.

    Args:
        tokenizer: A `keras_hub.tokenizers.SentencePieceTokenizer` or
            `keras_hub.tokenizers.BytePairTokenizer`.

    Raises:
        TypeError: If the tokenizer is of another kind.
    """

    def __init__(self, tokenizer: keras.layers.Layer) -> None:
        if isinstance(tokenizer, SentencePieceTokenizer):
            pieces = list(enumerate(tokenizer.get_vocabulary()))
            text = text_of_sentence_piece
        elif isinstance(tokenizer, BytePairTokenizer):
            pieces = [(i, piece) for piece, i in tokenizer.vocabulary.items()]
            text = text_of_byte_pair
        else:
            raise TypeError(
                "To read strings of tokens, the tokenizer must be a "
                "`keras_hub.tokenizers.SentencePieceTokenizer` or a "
                "`keras_hub.tokenizers.BytePairTokenizer`. Received: "
                f"{tokenizer!r:.80}. Ask the server for ids of tokens."
            )
        self._ids: dict[bytes, set[int]] = {}
        for token, piece in pieces:
            self._ids.setdefault(text(piece), set()).add(token)
        for token, piece in pieces:
            self._ids.setdefault(piece.encode(), {token})
            if byte := BYTE.fullmatch(piece):
                self._ids.setdefault(bytes.fromhex(byte[1]), {token})

    def find(self, written: bytes) -> int | None:
        """The token with a written form.

        Args:
            written: Bytes, the written form in UTF-8.

        Returns:
            An integer, or `None` if no token or more than one has this form, or
            if it holds U+FFFD, which replaces parts of characters.
        """
        ids = self._ids.get(written, set())
        if len(ids) != 1 or REPLACEMENT in written:
            return None
        (token,) = ids
        return token


def text_of_sentence_piece(piece: str) -> bytes:
    return piece.replace("▁", " ").encode()


def text_of_byte_pair(piece: str) -> bytes:
    letters = byte_letters()
    if all(letter in letters for letter in piece):
        return bytes(letters[letter] for letter in piece)
    return piece.encode()  # A special token, in letters of its own.


@functools.cache
def byte_letters() -> dict[str, int]:
    """The letter that stands for each byte in byte-level BPE.

    Bytes that are a visible letter of Latin-1 are this letter, the others
    those from 256 on.

    Reference:
     - [Radford et al., 2019](https://github.com/openai/gpt-2), `encoder.py`.
    """
    visible = [*range(33, 127), *range(161, 173), *range(174, 256)]
    others = [byte for byte in range(256) if byte not in visible]
    letters = {chr(byte): byte for byte in visible}
    return letters | {chr(256 + n): byte for n, byte in enumerate(others)}
