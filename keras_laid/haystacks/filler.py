"""Sentences that fill a haystack of text, and have nothing to do with needles.

They are written for this library: parts of sentences, put together at random.
"""

import numpy as np

WHO = (
    "the baker",
    "an old teacher",
    "the gardener",
    "a tired driver",
    "the librarian",
    "our neighbour",
    "a young painter",
    "the fisherman",
    "the shopkeeper",
    "a tailor from the next village",
    "the night nurse",
    "the clockmaker",
    "a farmer with muddy boots",
    "one of the students",
    "the postman",
    "the carpenter and his sister",
)
DID = (
    "carried a heavy box",
    "looked for a warm coat",
    "talked about the weather",
    "wrote a long letter",
    "repaired the wooden gate",
    "swept the floor",
    "opened the tall windows",
    "counted the empty chairs",
    "waited for the bus",
    "cut some fresh bread",
    "watered the herbs in the yard",
    "folded a pile of clean towels",
    "painted the old fence",
    "read the newspaper twice",
    "hung up a small lamp",
    "closed the door without a sound",
)
WHERE = (
    "near the market",
    "behind the mill",
    "at the station",
    "by the small bridge",
    "in front of the school",
    "beside the well",
    "on the upper floor",
    "under the chestnut trees",
    "across the street",
    "in a narrow lane",
    "next to the harbour office",
    "at the end of the hall",
)
WHEN = (
    "before breakfast",
    "in the late afternoon",
    "while it rained",
    "after the bell had rung",
    "on a quiet morning",
    "until it got dark",
    "for almost an hour",
    "during the holidays",
    "as on every other day",
    "when nobody was there",
    "at the first light of day",
    "shortly after lunch",
)
# For pass keys: the same few sentences again and again.
NOISE = (
    "The road is long and the hills are low.",
    "Rain falls on the roof.",
    "A train goes by, and then another one.",
    "The lamps are lit and the streets are still.",
    "It is the same as before.",
)


def story(rng: np.random.Generator) -> str:
    """A sentence of four parts that hardly ever repeats."""
    who, did, where, when = (
        str(part[rng.integers(len(part))]) for part in (WHO, DID, WHERE, WHEN)
    )
    if rng.integers(2):
        text = f"{who} {did} {where} {when}."
    else:
        text = f"{when}, {who} {did} {where}."
    return text[0].upper() + text[1:]


def noise(rng: np.random.Generator) -> str:
    """One of the sentences of `NOISE`."""
    return NOISE[rng.integers(len(NOISE))]
