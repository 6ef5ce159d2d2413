import json

import numpy as np
import pytest

from keras_laid.haystacks import Coco
from keras_laid.haystacks import draw_haystacks
from keras_laid.haystacks.coco import read_image
from tests.support import COCO
from tests.support import make_coco


@pytest.fixture
def root(tmp_path):
    make_coco(tmp_path)
    return tmp_path


def edit(root, change):
    path = root / "annotations/instances_train2017.json"
    data = json.loads(path.read_text())
    change(data)
    path.write_text(json.dumps(data))


def test_images_have_their_labels_and_one_split(root):
    splits = [Coco(root, split) for split in ("train", "validation", "test")]
    seen = [image for source in splits for image in source.images]
    assert len(seen) == len(set(seen)) == 10
    for source in splits:
        assert source.names == ("bus", "cat", "dog")
        for image, labels in zip(source.images, source.labels, strict=True):
            folder, file = image.split("/")
            shown = COCO[folder][int(file.removesuffix(".jpg"))]
            named = np.array(source.names)[labels].tolist()
            assert set(named) == shown


def test_answers_are_true(root):
    source = Coco(root, "train")
    for haystack in draw_haystacks(source, 40, (1, 2)):
        shown = [
            COCO["train2017"][int(image[-16:-4])] for image in haystack.images
        ]
        found = [i for i, names in enumerate(shown) if haystack.anchor in names]
        assert tuple(found) == haystack.needles
        assert len(found) == 1
        truth = haystack.target in shown[found[0]]
        assert haystack.answer == ("yes" if truth else "no")
        assert len(set(haystack.images)) == len(haystack.images)


def test_the_names_asked_for_say_nothing_about_the_answer(root):
    haystacks = list(draw_haystacks(Coco(root, "train"), 400, (2,)))
    asked = {
        answer: {h.question for h in haystacks if h.answer == answer}
        for answer in ("yes", "no")
    }
    assert asked["yes"] == asked["no"]
    assert len(asked["yes"]) > 1


def test_excluded_images_are_left_out(root):
    gone = "train2017/000000000001.jpg"
    assert gone in Coco(root, "train").images
    assert gone not in Coco(root, "train", exclude={gone}).images


def test_too_few_images_are_counted(root):
    with pytest.raises(ValueError, match="size=5, needles=1 for the 4 images"):
        list(draw_haystacks(Coco(root, "train"), 2, (5,)))
    everything = Coco(root, "train").images
    with pytest.raises(ValueError, match="for the 0 images"):
        list(draw_haystacks(Coco(root, "train", everything), 2, (1,)))


@pytest.mark.parametrize(
    ("change", "words"),
    [
        (lambda d: d.pop("images"), "`images` must be of type list.*None"),
        (lambda d: d.update(annotations=[3]), "element of `annotations` must"),
        (lambda d: d["images"][0].update(id="1"), "`id` of `images` must be"),
        (
            lambda d: d["images"][1].update(id=True),
            "Received: True of type bool",
        ),
        (lambda d: d["images"][0].pop("file_name"), "`file_name` of `images`"),
        (lambda d: d["categories"].pop(), "image and a category in the file"),
        (lambda d: d["images"].pop(), "an image and a category in the file"),
    ],
)
def test_annotations_out_of_the_format_are_refused(root, change, words):
    edit(root, change)
    with pytest.raises(ValueError, match=words):
        Coco(root, "train")


def test_truncated_annotations_are_refused(root):
    path = root / "annotations/instances_train2017.json"
    path.write_text(path.read_text()[:-20])
    with pytest.raises(ValueError, match="whole JSON file.*truncated"):
        Coco(root, "train")


def test_a_root_without_annotations_is_refused(tmp_path):
    with pytest.raises(FileNotFoundError, match="instances_val2017.json"):
        Coco(tmp_path, "test")
    with pytest.raises(ValueError, match="`split` must be one of .*'dev'"):
        Coco(tmp_path, "dev")


def test_images_are_made_square(root):
    image = read_image(root, "val2017/000000000002.jpg", 16)
    assert image.shape == (16, 16, 3)
    assert image.dtype == np.uint8
    assert image.std() > 5


def test_files_that_are_no_image_are_refused(root):
    path = root / "val2017/000000000002.jpg"
    for content in (b"", b"no image", path.read_bytes()[:500]):
        path.write_bytes(content)
        with pytest.raises(ValueError, match="whole JPEG or PNG file"):
            read_image(root, "val2017/000000000002.jpg", 16)


def test_annotations_cannot_leave_the_root(root):
    (root.parent / "secret.jpg").write_bytes(
        (root / "val2017/000000000002.jpg").read_bytes()
    )
    edit(root, lambda d: d["images"][0].update(file_name="../../secret.jpg"))
    (name,) = (n for n in Coco(root, "train").images if "secret" in n)
    with pytest.raises(ValueError, match="must not leave its root"):
        read_image(root, name, 16)
