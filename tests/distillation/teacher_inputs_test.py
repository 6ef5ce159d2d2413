"""A teacher that reads other positions, or another prompt."""

import keras
import numpy as np
import pytest
from keras import ops

import keras_laid
from keras_laid.backbones.forward import forward
from keras_laid.haystacks import aligned_tokens
from keras_laid.ops import Unembedding
from keras_laid.ops import logits_divergence
from tests.backbones import small_models
from tests.haystacks.families import PREPROCESSORS
from tests.haystacks.families import make_pair
from tests.haystacks.long_prompts_test import EACH
from tests.haystacks.long_prompts_test import make_prompts
from tests.support import FEW_STEPS
from tests.support import make_haystacks
from tests.support import make_multi_image
from tests.support import make_preprocessor
from tests.support import to_numpy


def make_distiller(models, **weights):
    weights = {"retrieval_weight": 0.0, "supervised_weight": 0.0} | weights
    distiller = keras_laid.DistanceWeightedAttentionDistillation(
        *models, keras_laid.DistanceWeighting(0.0), **weights
    )
    distiller.compile("sgd", **FEW_STEPS)
    return distiller


@pytest.fixture(scope="module")
def models():
    preprocessor = make_preprocessor()
    return [make_multi_image(preprocessor=preprocessor, seed=s) for s in (5, 0)]


@pytest.fixture(scope="module")
def batch(models):
    return make_haystacks(models[0].preprocessor, sizes=(3,))[0]


def loss_of(distiller, x, y, sample_weight):
    logs = distiller.test_on_batch(x, y, sample_weight, return_dict=True)
    return {name: float(to_numpy(value)) for name, value in logs.items()}


def test_marked_tokens_are_aligned_in_their_order():
    marked = np.array([[0, 0, 1, 1], [1, 0, 0, 1], [0, 0, 0, 0]])
    teacher_marked = np.array([[1, 1, 0], [0, 1, 1], [0, 0, 0]])
    index = aligned_tokens(marked, teacher_marked)
    assert index.dtype == "int32"
    assert index[0, 2:].tolist() == [0, 1]
    assert index[1, [0, 3]].tolist() == [1, 2]
    assert ((index >= 0) & (index < 3)).all()


def test_the_same_prompt_gives_the_same_loss(models, batch):
    distiller = make_distiller(models)
    x, y, sample_weight = batch
    own = {name: value for name, value in x.items() if name != "needle"}
    own["aligned"] = aligned_tokens(sample_weight, sample_weight)
    found = loss_of(distiller, x | {"teacher": own}, y, sample_weight)
    expected = loss_of(distiller, x, y, sample_weight)
    assert found == pytest.approx(expected, rel=1e-6)


@pytest.mark.extra_large_but_on("tensorflow", "torch")
@EACH
def test_logits_are_those_of_the_teachers_own_prompt(family):
    prompts = make_prompts(family, sizes=(3,), teacher_images=1)
    teacher, student = make_pair(family, prompts.form.preprocessor)
    x, y, sample_weight = prompts[0]
    distiller = make_distiller((teacher, student))
    found = loss_of(distiller, x, y, sample_weight)["logits"]
    own = dict(x["teacher"])
    index = own.pop("aligned")
    logits = to_numpy(forward(teacher, as_tensors(own)).tokens.logits())
    logits = np.take_along_axis(logits, index[:, :, None], axis=1)
    student_logits = forward(student, as_tensors(x)).tokens.logits()
    expected = logits_divergence(
        Unembedding(student_logits),
        Unembedding(ops.convert_to_tensor(logits)),
        weights=ops.convert_to_tensor(sample_weight),
    ).divergence
    np.testing.assert_allclose(found, to_numpy(expected), rtol=1e-4)


def images_in(inputs, row):
    """The images of a prompt."""
    if "images" in inputs:
        return inputs["images"][row]
    pixels = inputs["pixel_values"][row]
    if "image_grid_thw" not in inputs:
        return pixels
    # Qwen 3.5 has the patches of all images one after another.
    images = inputs["image_grid_thw"].shape[1]
    return pixels.reshape(images, -1, *pixels.shape[1:])


@EACH
def test_the_teacher_is_shown_the_needle(family):
    whole = make_prompts(family, sizes=(4,))
    for shown in (1, 2):
        prompts = make_prompts(family, sizes=(4,), teacher_images=shown)
        x, y, sample_weight = prompts[0]
        own = x["teacher"]
        # The student's prompts are as before.
        np.testing.assert_array_equal(y, whole[0][1])
        for row, number in enumerate(prompts.order[:4]):
            place = int(x["needle"][row])
            first = min(place, 4 - shown)
            example = prompts.examples[number]
            if family is small_models.llama:
                count = own["segments"][row].max()
                same = x["token_ids"][row][x["segments"][row] == place + 1]
                mine = own["token_ids"][row][
                    own["segments"][row] == place - first + 1
                ]
                np.testing.assert_array_equal(mine, same)
                assert example.images[0].split()[1] in example.prompt
            else:
                mine = images_in(own, row)
                count = len(mine)
                np.testing.assert_allclose(
                    mine, images_in(x, row)[first : first + shown]
                )
            assert count == shown
        # Tokens of the response but the last, whose next one has no place.
        marked = sample_weight > 0
        row, place = np.nonzero(marked[:, :-1] & marked[:, 1:])
        inner = own["aligned"][row, place]
        np.testing.assert_array_equal(
            own["token_ids"][row, inner + 1], y[row, place]
        )


@pytest.mark.parametrize("shown", [1, 2])
def test_haystacks_show_the_teacher_the_needle(shown):
    preprocessor = make_preprocessor()
    haystacks = make_haystacks(preprocessor, sizes=(2, 3), teacher_images=shown)
    same = make_haystacks(preprocessor, sizes=(2, 3))
    for index in range(len(haystacks)):
        x, y, _ = haystacks[index]
        np.testing.assert_array_equal(x["images"], same[index][0]["images"])
        own = x["teacher"]
        assert own["images"].shape[1] == shown
        first = np.minimum(x["needle"], x["images"].shape[1] - shown)
        for row, start in enumerate(first):
            np.testing.assert_array_equal(
                own["images"][row], x["images"][row, start : start + shown]
            )
        np.testing.assert_array_equal(own["token_ids"], x["token_ids"])


def test_positions_of_the_teachers_own(models, batch):
    distiller = make_distiller(models, retrieval_weight=1.0)
    x, y, sample_weight = batch
    length = x["token_ids"].shape[1] + 3 * 4
    others = np.tile(3 * np.arange(length), (len(y), 1))
    # Found as the teacher reads, and saved with the distiller.
    found = distiller.find_heads(
        [(x | {"teacher": {"positions": others}}, y, sample_weight)]
    )
    again = keras_laid.find_retrieval_heads(
        models[0], [(x | {"positions": others}, y, sample_weight)], 1
    )
    assert found.heads == again.heads
    targets = [
        keras.tree.flatten(distiller.run_teacher(as_tensors(inputs)))
        for inputs in (
            x | {"teacher": {"positions": others}},
            x | {"positions": others},
            x,
        )
    ]
    own, alike, plain = (
        [to_numpy(each) for each in some if hasattr(each, "shape")]
        for some in targets
    )
    for one, other in zip(own, alike, strict=True):
        np.testing.assert_allclose(one, other, rtol=1e-5, atol=1e-6)
    assert any(
        np.abs(one - other).max() > 1e-3
        for one, other in zip(own, plain, strict=True)
        if one.shape == other.shape
    )
    logs = loss_of(
        distiller, x | {"teacher": {"positions": others}}, y, sample_weight
    )
    assert logs["retrieval"] > 0


def as_tensors(x):
    return keras.tree.map_structure(ops.convert_to_tensor, x)


def test_a_student_learns_from_a_teacher_of_the_needle(models):
    data = make_haystacks(
        models[0].preprocessor, sizes=(2, 3), teacher_images=1
    )
    preprocessor = make_preprocessor()
    student = make_multi_image(preprocessor=preprocessor, seed=1)
    distiller = make_distiller((models[0], student))
    distiller.compile(keras.optimizers.Adam(3e-3), **FEW_STEPS)
    history = distiller.fit(data, epochs=3, verbose=0).history
    assert history["logits"][-1] < history["logits"][0]


def other_prompt(x, sample_weight, **changes):
    own = {name: value for name, value in x.items() if name != "needle"}
    own["aligned"] = aligned_tokens(sample_weight, sample_weight)
    own |= changes
    return {name: value for name, value in own.items() if value is not None}


@pytest.mark.parametrize(
    ("changes", "words", "error"),
    [
        (
            dict(aligned=None),
            "must have both 'token_ids' and 'aligned'",
            ValueError,
        ),
        (
            dict(token_ids=None),
            "must have both 'token_ids' and 'aligned'",
            ValueError,
        ),
        (dict(aligned=np.zeros((4, 3), "int32")), "aligned", ValueError),
        (dict(aligned=np.zeros((4, 14), "float32")), "aligned", TypeError),
    ],
)
def test_wrong_inputs_are_refused(models, batch, changes, words, error):
    x, y, sample_weight = batch
    own = other_prompt(x, sample_weight, **changes)
    with pytest.raises(error, match=words):
        loss_of(make_distiller(models), x | {"teacher": own}, y, sample_weight)


def test_terms_that_need_the_same_prompt_are_refused(models, batch):
    x, y, sample_weight = batch
    own = other_prompt(x, sample_weight)
    distiller = make_distiller(models, retrieval_weight=1.0)
    with pytest.raises(ValueError, match=r"only next tokens .*'retrieval'"):
        loss_of(distiller, x | {"teacher": own}, y, sample_weight)
    with pytest.raises(TypeError, match="must be a dictionary of the inputs"):
        loss_of(distiller, x | {"teacher": x["images"]}, y, sample_weight)


def test_a_stored_teacher_reads_nothing(models, tmp_path):
    data = make_haystacks(models[0].preprocessor, sizes=(2,), teacher_images=1)
    with pytest.raises(ValueError, match="A stored teacher reads nothing"):
        keras_laid.store_teacher(models[0], data, tmp_path, [(0, 0)], top_k=4)


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(ValueError, match="as many marked tokens.*row 1"):
        aligned_tokens(np.array([[1, 0], [1, 1]]), np.array([[1], [1]]))
    image = np.zeros((16, 16, 3), "uint8")
    with pytest.raises(
        ValueError, match="room for the images of each.*example 0"
    ):
        keras_laid.LongPrompts(
            [([image, image], "Is it?", "yes")] * 4,
            PREPROCESSORS[small_models.pali_gemma](),
            sizes=(3,),
            teacher_images=1,
        )
