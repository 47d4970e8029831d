"""What stands in a prompt beside a caption, and the sizes and numbers of pictures that keep their own."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from conceptmaster.errors import InputError
from conceptmaster.runtime.grids import own_size, sources
from conceptmaster.runtime.naming import named
from conceptmaster.runtime.pictures import fit


@pytest.mark.parametrize(
    ("caption", "labels", "said"),
    [
        ("a cat runs", ["cat"], "a cat from image0 runs"),
        ("A Cat runs, the cat sits.", ["cat"], "A Cat from image0 runs, the cat sits."),
        ("a ball and a cat", ["cat", "ball"], "a ball from image1 and a cat from image0"),
        ("a cat, a black cat", ["cat", "black cat"], "a cat from image0, a black cat from image1"),
        ("a black cat, a cat", ["cat", "black cat"], "a black cat from image1, a cat from image0"),
        ("the cat's tail and the cat", ["cat"], "the cat's tail and the cat from image0"),
        ("the cat's tail", ["cat"], "the cat from image0's tail"),
        ("a catfish and a cat", ["cat"], "a catfish and a cat from image0"),
        ("the statue from image0 sits", ["statue"], "the statue from image0 sits"),
        ("image1 beside the cat", ["cat", "dog"], "image1 beside the cat from image0"),
        ("cat food from image1, a cat", ["cat", "cat food"], "cat food from image1, a cat from image0"),
        ("image1 is cat food, a cat", ["cat", "cat food"], "image1 is cat food, a cat from image0"),
        ("cat from image1, cat", ["cat", "dog"], "cat from image1, cat from image0"),
        ("Image0 runs", ["cat"], "Image0 runs"),
        ("image0里的猫在跑", ["猫"], "image0里的猫在跑"),
        ("image00 and a cat", ["cat"], "image00 and a cat from image0"),
        ("image0, image1 and image10", [str(n) for n in range(11)], None),
        ("a c++ (beta) mug", ["c++ (beta) mug"], "a c++ (beta) mug from image0"),
        ("猫在跑", ["猫"], "猫 from image0 在跑"),
        ("ein Kätzchen läuft", ["Kätzchen"], "ein Kätzchen from image0 läuft"),
        ("no pictures", [], "no pictures"),
    ],
)
def test_a_caption_is_told_which_picture_is_which(caption, labels, said):
    if said is None:  # where names are numbers of two digits, and labels are not in it
        with pytest.raises(InputError, match="does not say what the picture of '2' shows"):
            named(caption, labels, "image")
        return
    assert named(caption, labels, "image") == said


@pytest.mark.parametrize(
    ("caption", "labels", "message"),
    [
        (
            "a dog runs",
            ["cat"],
            "does not say what the picture of 'cat' shows: write 'cat' in it, or .* image0",
        ),
        ("two cats run", ["cat"], "does not say what the picture of 'cat' shows"),
        ("a black cat runs", ["cat", "black cat"], "labels 'black cat' and 'cat' stand for the same words"),
        ("image0 and image2", ["cat", "dog"], "names image2, but the pictures are image0 to image1"),
        ("image1 runs", ["cat"], "names image1, but the pictures are image0"),
        ("image0 runs", [], "names image0, and there are no pictures"),
        ("image123456789012 and a cat", ["cat"], "but the pictures are image0"),
        ("cat food from image1", ["cat", "cat food"], "labels 'cat food' and 'cat' stand for the same words"),
    ],
)
def test_a_picture_that_cannot_be_asked_for(caption, labels, message):
    with pytest.raises(InputError, match=message):
        named(caption, labels, "image")


def published(width, height, most):
    """MaxLongEdgeMinShortEdgeResize of Bernini's data_utils.py."""

    def nearest(value):
        return max(16, int(round(value / 16) * 16))

    scale = max(min(most / max(width, height), 1.0), 1 / min(width, height))
    new = nearest(round(width * scale)), nearest(round(height * scale))
    if max(new) > most:
        scale = most / max(new)
        new = nearest(round(new[0] * scale)), nearest(round(new[1] * scale))
    return new


def test_sizes_are_the_published_ones():
    rng = np.random.default_rng(0)
    sizes = [tuple(map(int, rng.integers(1, 3000, 2))) for _ in range(3000)]
    sizes += [(1, 100_000), (848, 480), (856, 8), (24, 40), (8, 8), (5000, 1), (847, 849), (16, 16)]
    for width, height in sizes:
        for most in (848, 96, 16, 624):
            found = own_size((width, height), most)
            assert found == published(width, height, most)
            assert max(found) <= most and not found[0] % 16 and not found[1] % 16


def test_a_picture_of_its_own_size_is_pillows():
    rng = np.random.default_rng(1)
    for size in ((37, 90), (64, 48), (300, 40)):
        image = Image.fromarray(rng.integers(0, 256, (*size[::-1], 3), dtype=np.uint8))
        wanted = published(*size, 96)
        expected = image if size == wanted else image.resize(wanted, Image.Resampling.BICUBIC)
        np.testing.assert_array_equal(fit(image, (96, 96), "own", (255, 255, 255)), np.asarray(expected))


def test_the_numbers_of_pictures():
    for count in range(1, 6):
        assert sources(count).tolist() == list(range(1, count + 1))
    for count in (6, 8):
        np.testing.assert_allclose(sources(count), [1 + 4 * n / (count - 1) for n in range(count)], rtol=1e-6)
