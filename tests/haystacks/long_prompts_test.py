"""Long prompts made of a user's examples, for every kind of family."""

import json

import keras
import numpy as np
import pytest
from PIL import Image

import keras_laid
from keras_laid import LongPrompts
from keras_laid import PositionStretching
from keras_laid.haystacks import Example
from keras_laid.haystacks import read_examples
from tests.backbones import small_models
from tests.haystacks.families import COLOURS
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair
from tests.support import FEW_STEPS
from tests.support import make_preprocessor
from tests.support import to_numpy

WITH_IMAGES = [
    small_models.pali_gemma,
    small_models.gemma_3,
    small_models.gemma_4,
    small_models.qwen_3_5_images,
]
# Positions that an image adds to a prompt.
POSITION_LENGTH = {
    small_models.pali_gemma: 4,
    small_models.gemma_3: 8,
    small_models.gemma_4: 6,
    small_models.qwen_3_5_images: 4,
}
EACH = pytest.mark.parametrize(
    "family", PREPROCESSORS, ids=small_models.name_of
)
EACH_WITH_IMAGES = pytest.mark.parametrize(
    "family", WITH_IMAGES, ids=small_models.name_of
)


def make_examples(family, count=8, responses=True):
    """Examples with a random image, or a page of text that names a colour."""
    rng = np.random.default_rng(0)
    examples = []
    for number in range(count):
        colour = COLOURS[number % len(COLOURS)]
        image = rng.integers(0, 256, (16, 16, 3)).astype("uint8")
        if family is small_models.llama:
            image = f"A {colour} page, the {number}th of these."
        response = ("yes", "no")[number % 2] if responses else None
        examples.append((image, f"Is there a {colour} page?", response))
    return examples


def make_prompts(family, sizes=(3,), responses=True, **kwargs):
    kwargs = {"batch_size": 4, "seed": 3} | kwargs
    return LongPrompts(
        make_examples(family, responses=responses),
        PREPROCESSORS[family](),
        sizes,
        **kwargs,
    )


def assert_same_batch(one, other):
    for a, b in zip(
        keras.tree.flatten(one), keras.tree.flatten(other), strict=True
    ):
        np.testing.assert_array_equal(a, b)


@pytest.mark.parametrize("family", WITH_IMAGES[:3], ids=small_models.name_of)
def test_prompts_are_those_that_kerashub_makes_itself(family):
    prompts = make_prompts(family, sizes=(3,))
    x, y, sample_weight = prompts[0]
    preprocessor = PREPROCESSORS[family]()
    length = x["token_ids"].shape[1]
    for row, number in enumerate(prompts.order[:4]):
        image, prompt, response = (
            prompts.examples[number].images[0],
            *(
                prompts.examples[number].prompt,
                prompts.examples[number].response,
            ),
        )
        images = np.stack([image] * 3)
        if family is not small_models.pali_gemma:
            preprocessor.max_images_per_prompt = 3
            prompt = prompts.form.placeholder * 3 + prompt
        else:
            images = image  # Its tokens are not part of the text.
        expected = preprocessor(
            {
                "images": images[None],
                "prompts": [prompt],
                "responses": [response],
            },
            sequence_length=length,
        )
        for name in ("token_ids", "padding_mask", "vision_mask"):
            if name in x:
                np.testing.assert_array_equal(
                    x[name][row], to_numpy(expected[0][name])[0], name
                )
        np.testing.assert_array_equal(y[row], to_numpy(expected[1])[0])
        np.testing.assert_array_equal(
            sample_weight[row], to_numpy(expected[2])[0]
        )


def test_prompts_of_qwen_are_those_that_kerashub_makes_itself():
    prompts = make_prompts(small_models.qwen_3_5_images, sizes=(3,))
    x, y, sample_weight = prompts[1]
    images, _ = prompts.drawn(1)
    examples = [prompts.examples[number] for number in prompts.order[4:8]]
    # KerasHub's preprocessor takes no responses.
    own = prompts.form.preprocessor.generate_preprocess(
        {
            "images": [image for each in images for image in each],
            "prompts": [
                "<|vision_start|><|image_pad|><|vision_end|>" * 3 + each.prompt
                for each in examples
            ],
        },
        sequence_length=x["token_ids"].shape[1],
    )
    own = {name: to_numpy(value) for name, value in own.items()}
    for row, length in enumerate(own["padding_mask"].astype("int32").sum(1)):
        np.testing.assert_array_equal(
            x["token_ids"][row, :length], own["token_ids"][row, :length]
        )
        tokenizer = prompts.form.preprocessor.tokenizer
        response = [*to_numpy(tokenizer(examples[row].response))]
        expected = [*response, tokenizer.end_token_id]
        assert y[row][sample_weight[row] > 0].tolist() == expected
        assert x["padding_mask"][row].sum() == length + len(expected)
    for name, own_name in (
        ("positions", "position_ids"),
        ("vision_indices", "vision_indices"),
        ("image_grid_thw", "image_grid_thw"),
        ("pixel_values", "pixel_values"),
    ):
        found = x[name].reshape(own[own_name].shape)
        np.testing.assert_array_equal(found, own[own_name], name)


def images_in(x, size):
    """The images of a batch, as the model reads them."""
    name = "images" if "images" in x else "pixel_values"
    if "image_grid_thw" not in x:
        return x[name]
    assert x["image_grid_thw"].shape[:2] == (len(x[name]), size)
    return x[name].reshape(len(x[name]), size, -1)


@EACH_WITH_IMAGES
def test_the_needle_is_the_examples_own_image(family):
    prompts = make_prompts(family, sizes=(3, 5))
    seen = set()
    for batch in range(len(prompts)):
        x, _, _ = prompts[batch]
        size = prompts.batch_images[batch]
        rows = prompts.order[4 * batch : 4 * batch + 4]
        shown = images_in(x, size)
        assert shown.shape[:2] == (4, size)
        for row, number in enumerate(rows):
            alone, _, _ = prompts.form.encode(
                np.stack([prompts.examples[number].images]),
                ["Is there a red page?"],
                ["yes"],
                64,
            )
            needle = x["needle"][row]
            seen.add(int(needle))
            own = images_in(alone, 1)[0, 0]
            np.testing.assert_allclose(shown[row, needle], own)
            others = np.delete(shown[row], needle, axis=0)
            assert all((other != own).any() for other in others)
    assert len(seen) > 2


def test_documents_are_segments():
    prompts = make_prompts(small_models.llama, sizes=(3,))
    x, y, sample_weight = prompts[0]
    tokenizer = prompts.form.preprocessor.tokenizer
    for row, number in enumerate(prompts.order[:4]):
        example = prompts.examples[number]
        segments = x["segments"][row]
        assert sorted({*segments}) == [0, 1, 2, 3]
        own = x["token_ids"][row][segments == x["needle"][row] + 1]
        expected = tokenizer(example.images[0] + "\n\n")
        np.testing.assert_array_equal(own, to_numpy(expected))
        marked = sample_weight[row] > 0
        response = [*to_numpy(tokenizer(example.response))]
        assert y[row][marked].tolist() == [
            *response,
            tokenizer.end_token_id,
        ]
        assert (x["padding_mask"][row] > 0).sum() == (
            x["token_ids"][row] != tokenizer.pad_token_id
        ).sum()


@EACH
def test_without_responses_the_token_after_the_prompt_is_marked(family):
    x, y, sample_weight = make_prompts(family, responses=False)[0]
    with_response, _, marks = make_prompts(family)[0]
    for row in range(4):
        (place,) = np.flatnonzero(sample_weight[row])
        assert y[row, place] == -1
        # The marked token is the first one of the response.
        assert place == np.flatnonzero(marks[row])[0]
        np.testing.assert_array_equal(
            x["token_ids"][row, : place + 1],
            with_response["token_ids"][row, : place + 1],
        )


@EACH
def test_without_responses_prompts_need_an_end(family):
    prompts = make_prompts(family, responses=False)
    prompts.form.preprocessor.add_end_token = False
    with pytest.raises(ValueError, match="must add an end token"):
        prompts[0]


@EACH
def test_a_batch_depends_on_seed_and_number(family):
    one, again = make_prompts(family), make_prompts(family)
    assert_same_batch(one[1], again[1])
    again.on_epoch_end()
    assert_same_batch(one[1], again[1])
    other = make_prompts(family, seed=4)[1][0]
    assert (other["needle"] != one[1][0]["needle"]).any() or (
        other["token_ids"] != one[1][0]["token_ids"]
    ).any()


def test_positions_of_mrope_move_with_their_image():
    family = small_models.qwen_3_5_images
    own = make_prompts(family)[0][0]["positions"]
    stretching = PositionStretching(9, 4)
    x = make_prompts(family, stretching=stretching)[0][0]
    moved = x["positions"] - own
    # All four kinds of positions move by whole images.
    assert (moved == moved[:, :1]).all() and (moved % 4 == 0).all()
    moved = moved[:, 0]
    # An image with its two marks moves as a whole, and text follows.
    for row in moved:
        images = row[:18].reshape(3, 6)
        assert (images == images[:, :1]).all()
        assert (np.diff(row) >= 0).all()
        assert (row[18:] == row[-1]).all()
    assert moved.max() > 0


@EACH_WITH_IMAGES
def test_positions_are_stretched_anew_in_each_epoch(family):
    length = POSITION_LENGTH[family]
    prompts = make_prompts(family, stretching=PositionStretching(9, length))
    first = prompts[0][0]["positions"]
    np.testing.assert_array_equal(prompts[0][0]["positions"], first)
    prompts.on_epoch_end()
    second = prompts[0][0]["positions"]
    assert (first != second).any()
    # The tokens of an image may have one position in time, with M-RoPE.
    is_plain = family is not small_models.qwen_3_5_images
    assert (np.diff(first, axis=-1) >= (1 if is_plain else -1)).all()
    assert first.max() <= 9 * length + 40


def test_each_example_comes_once_in_a_round():
    prompts = make_prompts(small_models.pali_gemma, num_prompts=20)
    assert len(prompts) == 5
    assert sorted(prompts.order[:8]) == [*range(8)]
    assert sorted(prompts.order[8:16]) == [*range(8)]


@pytest.mark.extra_large_but_on("torch")
@EACH
@pytest.mark.parametrize("responses", [True, False])
def test_a_student_learns_from_them(family, responses):
    prompts = make_prompts(family, sizes=(3,), responses=responses)
    teacher, student = make_pair(family, prompts.form.preprocessor)
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        teacher,
        student,
        keras_laid.DistanceWeighting(0.0),
        supervised_weight=float(responses),
    )
    distiller.compile(keras.optimizers.Adam(3e-3), **FEW_STEPS)
    history = distiller.fit(prompts, epochs=4, verbose=0).history
    assert np.isfinite(history["loss"]).all()
    assert history["loss"][-1] < history["loss"][0]
    assert history["retrieval"][0] > 0
    assert distiller.retrieval_heads


def save_images(folder):
    """JPEGs of several sizes, of which one lies on its side."""
    rng = np.random.default_rng(0)
    names = []
    for number in range(6):
        shape = (20 + 3 * number, 30, 3)
        image = Image.fromarray(rng.integers(0, 256, shape).astype("uint8"))
        exif = Image.Exif()
        if number == 2:
            exif[0x0112] = 6  # To be turned by 90 degrees.
        image.save(folder / f"{number}.jpg", exif=exif)
        names.append(f"{number}.jpg")
    return names


@pytest.mark.parametrize("kind", ["csv", "jsonl"])
def test_a_folder_of_images_with_a_table(tmp_path, kind):
    names = save_images(tmp_path)
    table = tmp_path / f"examples.{kind}"
    if kind == "csv":
        lines = [f'{n},"Is it red, or not?",yes' for n in names[:-2]]
        lines.append(f"{names[-2]}; {names[-1]},Is it blue?,")
        table.write_text("\n".join(["images,prompt,response", *lines]))
    else:
        rows = [
            {"image": n, "prompt": "Is it red, or not?", "response": "yes"}
            for n in names[:-2]
        ]
        rows.append({"images": names[-2:], "prompt": "Is it blue?"})
        table.write_text("\n\n".join(map(json.dumps, rows)))
    examples = read_examples(table)
    assert [len(example.images) for example in examples] == [1, 1, 1, 1, 2]
    assert examples[0].prompt == "Is it red, or not?"
    assert [e.response for e in examples] == ["yes"] * 4 + [None]
    prompts = LongPrompts(
        examples, PREPROCESSORS[small_models.pali_gemma](), (2, 6), batch_size=5
    )
    x, _, _ = prompts[0]
    assert x["images"].shape == (5, prompts.batch_images[0], 16, 16, 3)
    # The one on its side is turned.
    with Image.open(tmp_path / "2.jpg") as image:
        turned = image.rotate(-90, expand=True).resize((16, 16))
    np.testing.assert_array_equal(
        prompts.load.load(examples[2].images[0]), np.asarray(turned)
    )


@pytest.mark.parametrize(
    ("lines", "error", "words"),
    [
        (
            ["missing.png,Is it?,yes"],
            FileNotFoundError,
            "line 2: .*missing.png",
        ),
        (["broken.jpg,Is it?,yes"], ValueError, "line 2: .*whole JPEG or PNG"),
        (["0.jpg,Is it?,yes", "0.jpg, ,yes"], ValueError, "line 3: `prompt`"),
        (["0.jpg,Is it?"], ValueError, "as many cells.*line 2"),
        ([",Is it?,yes"], ValueError, "line 2: .*at least one image"),
        ([], ValueError, "without any"),
    ],
)
def test_wrong_rows_are_named(tmp_path, lines, error, words):
    save_images(tmp_path)
    (tmp_path / "broken.jpg").write_bytes(
        (tmp_path / "0.jpg").read_bytes()[:300]
    )
    table = tmp_path / "examples.csv"
    table.write_text("\n".join(["images,prompt,response", *lines]))
    with pytest.raises(error, match=words):
        read_examples(table)


@pytest.mark.parametrize(
    ("line", "words"),
    [
        ("{", "must be a whole JSON object.*line 1"),
        ("[1]", "a line must be.*line 1"),
        ('{"image": "0.jpg"}', "line 1: .*without .'prompt'."),
        ('{"image": 3, "prompt": "Is it?"}', "line 1: "),
    ],
)
def test_wrong_lines_of_json_are_named(tmp_path, line, words):
    save_images(tmp_path)
    table = tmp_path / "examples.jsonl"
    table.write_text(line)
    with pytest.raises((ValueError, TypeError), match=words):
        read_examples(table)


IMAGE = np.zeros((16, 16, 3), "uint8")


@pytest.mark.parametrize(
    ("changes", "error", "words"),
    [
        ({"examples": []}, ValueError, "There must be examples"),
        ({"examples": [(IMAGE, "a"), (IMAGE, "")]}, ValueError, "Example 1: "),
        ({"examples": [(IMAGE, "a", "")]}, ValueError, "Example 0: `response`"),
        (
            {"examples": [(IMAGE[..., 0], "a")]},
            ValueError,
            "Example 0: An image",
        ),
        ({"examples": [7]}, TypeError, "Example 0: "),
        ({"examples": [([], "a")]}, ValueError, "at least one image"),
        ({"sizes": (9,)}, ValueError, "at most the images of all examples"),
        ({"sizes": ()}, ValueError, "`sizes`"),
        (
            {"examples": [([IMAGE, IMAGE], "a"), (IMAGE, "b")], "sizes": (1,)},
            ValueError,
            "example 0 with 2 images",
        ),
        ({"image_size": (16,)}, ValueError, "must be height and width"),
        ({"image_size": (16, 0)}, ValueError, "`image_size` must be"),
        ({"num_prompts": 0}, ValueError, "`num_prompts` must be"),
        ({"batch_size": 0}, ValueError, "`batch_size` must be"),
        ({"stretching": 3}, TypeError, "`stretching` must be"),
        ({"preprocessor": None}, TypeError, "`preprocessor` must be"),
    ],
)
def test_wrong_arguments_are_refused(changes, error, words):
    arguments = dict(
        examples=make_examples(small_models.pali_gemma),
        preprocessor=PREPROCESSORS[small_models.pali_gemma](),
        sizes=(2,),
    )
    with pytest.raises(error, match=words):
        LongPrompts(**arguments | changes)


def test_images_are_made_to_have_a_size():
    preprocessor = make_preprocessor()  # It keeps the size of images.
    examples = make_examples(small_models.pali_gemma)
    with pytest.raises(ValueError, match="The size of images must be known"):
        LongPrompts(examples, preprocessor, (2,))
    prompts = LongPrompts(examples, preprocessor, (2,), image_size=(24, 20))
    assert prompts[0][0]["images"].shape[2:] == (24, 20, 3)


def test_a_prompt_that_is_too_long_is_named():
    prompts = make_prompts(small_models.gemma_3, sizes=(3,), max_length=30)
    with pytest.raises(ValueError, match=r"max_length=30, and example \d"):
        prompts[0]


def test_documents_cannot_be_stretched():
    with pytest.raises(ValueError, match="Only prompts with images"):
        make_prompts(small_models.llama, stretching=PositionStretching(9, 4))


def test_examples_of_several_kinds():
    kinds = [
        Example([IMAGE], "Is it red?"),
        {"image": IMAGE, "prompt": b"Is it red?", "response": b""},
        {"images": [IMAGE, IMAGE], "prompt": "Is it red?", "response": "no"},
        (IMAGE, "Is it red?"),
        ([IMAGE, IMAGE], "Is it red?", "no"),
    ]
    prompts = LongPrompts(kinds, PREPROCESSORS[small_models.pali_gemma](), (2,))
    found = [(len(e.images), e.prompt, e.response) for e in prompts.examples]
    assert found == [
        (1, "Is it red?", None),
        (1, "Is it red?", None),
        (2, "Is it red?", "no"),
        (1, "Is it red?", None),
        (2, "Is it red?", "no"),
    ]


AMONG_TEXT = pytest.mark.parametrize(
    "family", WITH_IMAGES[1:], ids=small_models.name_of
)


def make_haystacks(family, **kwargs):
    return keras_laid.Haystacks(
        keras_laid.Digits("train", 16),
        PREPROCESSORS[family](),
        num_questions=12,
        sizes=(2, 3),
        batch_size=4,
        **kwargs,
    )


@AMONG_TEXT
def test_haystacks_for_other_families_than_pali_gemma(family):
    haystacks = make_haystacks(family)
    for_pali_gemma = make_haystacks(small_models.pali_gemma)
    seen = set()
    for index in range(3):
        x, y, sample_weight = haystacks[index]
        same, _, _ = for_pali_gemma[index]
        size = haystacks.batch_images[index]
        seen.add(size)
        # The same questions about the same images.
        np.testing.assert_array_equal(x["needle"], same["needle"])
        images = np.round((same["images"] + 1.0) * 127.5).astype("uint8")
        prompts = [haystacks._prompts[row] for row in haystacks._rows]
        responses = [haystacks._responses[row] for row in haystacks._rows]
        rows = slice(4 * index, 4 * index + 4)
        expected = haystacks.form.encode(
            images, prompts[rows], responses[rows], y.shape[1]
        )
        for name, value in expected[0].items():
            np.testing.assert_allclose(x[name], value, atol=1e-6, err_msg=name)
        np.testing.assert_array_equal(y, expected[1])
        np.testing.assert_array_equal(sample_weight, expected[2])
        assert (sample_weight.sum(axis=1) >= 1).all()
        # Nothing is cut.
        assert not x["padding_mask"][:, -1].any()
    assert seen == {2, 3}


@AMONG_TEXT
def test_their_positions_are_stretched(family):
    length = POSITION_LENGTH[family]
    haystacks = make_haystacks(family, stretching=PositionStretching(9, length))
    first = haystacks[0][0]["positions"]
    haystacks.on_epoch_end()
    assert (haystacks[0][0]["positions"] != first).any()
