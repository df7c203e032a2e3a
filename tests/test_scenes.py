import pickle
import re

import numpy as np
import pytest

from align_jax.data import images
from align_jax.data.sources import scene_captions, scenes
from align_jax.data.sources.open_source import open_labelled, open_source
from align_jax.data.sources.scenes import COLOURS, SHAPES, SIZES, TONES, LabelledScenes, Scenes


def true_scene(index, source):
    """The drawn scene behind an item."""
    return source._write(index)[0]


def names_in(caption, names):
    """Those of `names` that the caption mentions, by themselves or by a synonym, in its order."""
    found = []
    for name in names:
        words = sorted(scene_captions._SYNONYMS.get(name, (name,)), key=len, reverse=True)
        pattern = rf"\b({'|'.join(words)})\b".replace("-", " ")
        for match in re.finditer(pattern, caption.lower().replace("-", " ")):
            found.append((match.start(), name))
    return [name for _, name in sorted(found)]


# A gradient makes parts of a background nearly black, white, blue, purple or green; these it never
# resembles, so that an object's pixels can be told by colour alone.
VIVID = ("red", "orange", "yellow", "cyan", "pink")


def object_pixels(image, colour):
    """Number of pixels about as coloured as the object, and the middle (x, y) of their extent."""
    distance = np.linalg.norm(image.astype(float) - COLOURS[colour], axis=-1)
    y, x = np.nonzero(distance < 50)
    if not len(x):
        return 0, 0.5, 0.5
    # Percentiles, since a few pixels of the background may qualify.
    middle_x, middle_y = (np.percentile(v, [2, 98]).mean() + 0.5 for v in (x, y))
    return len(x), middle_x / image.shape[1], middle_y / image.shape[0]


def side(value, low, high):
    return int(value > high) - int(value < low)


def test_scene_is_a_pure_function_of_seed_and_index():
    source, other = Scenes(100, seed=3), Scenes(5000, seed=3)
    backwards = [source[index] for index in reversed(range(20))][::-1]
    for index, record in enumerate(backwards):
        again = other[index]
        assert (record.key, record.captions) == (again.key, again.captions)
        np.testing.assert_array_equal(record.image, again.image)


def test_scenes_of_two_seeds_share_nothing():
    train = {Scenes(300, seed=0)[index].image.tobytes() for index in range(300)}
    held_out = {Scenes(300, seed=1)[index].image.tobytes() for index in range(300)}
    assert len(train) == len(held_out) == 300 and not train & held_out


def test_scene_fields_are_image_captions_and_unique_key():
    source = Scenes(50, image_size_px=48)
    records = [source[index] for index in range(50)]
    assert len({record.key for record in records}) == len(source) == 50
    for record in records:
        assert record.image.shape == (48, 48, 3) and record.image.dtype == np.uint8
        assert 2 <= len(record.captions) <= 3
        assert all(caption.strip() for caption in record.captions)


def test_scenes_iteration_ends_and_negative_index_is_an_error():
    assert len(list(Scenes(3))) == 3
    with pytest.raises(IndexError):
        Scenes(3)[-1]


@pytest.mark.parametrize("max_objects", [1, 2])
def test_clean_captions_name_every_attribute(max_objects):
    source = Scenes(200, seed=5, max_objects=max_objects, noise=0)
    counts = set()
    for index in range(200):
        scene = true_scene(index, source)
        counts.add(len(scene.objects))
        for caption in source[index].captions:
            for names, field in ((SHAPES, "shape"), (COLOURS, "colour"), (SIZES, "size")):
                expected = sorted(getattr(item, field) for item in scene.objects)
                assert sorted(names_in(caption, names)) == expected, caption
            assert names_in(caption, TONES) == [scene.tone], caption
    assert counts == set(range(1, max_objects + 1))


def test_noisy_captions_join_only_colours_shapes_and_places_of_one_object():
    source = Scenes(400, seed=2)
    unrelated = 0
    for index in range(400):
        scene = true_scene(index, source)
        joined = {item.colour: item.shape for item in scene.objects}
        for number, caption in enumerate(source[index].captions):
            colours, shapes = names_in(caption, COLOURS), names_in(caption, SHAPES)
            assert [joined[colour] for colour in colours] == shapes, caption
            assert set(names_in(caption, TONES)) <= {scene.tone}, caption
            if number == 0:
                assert sorted(colours) == sorted(joined) or len(joined) == 2, caption
            unrelated += not colours
            if len(colours) == 1:
                position = next(o.position for o in scene.objects if o.colour == colours[0])
                places = re.findall("top|upper|bottom|lower|left|right", caption.lower())
                as_named = {"upper": "top", "lower": "bottom"}
                assert {as_named.get(p, p) for p in places} <= set(position.split()), caption
    assert 0 < unrelated < 30


def test_first_captions_are_nearly_complete_and_tell_512_scenes_apart():
    source = Scenes(512, seed=7)
    facts, complete = set(), 0
    for index in range(512):
        caption, scene = source[index].captions[0], true_scene(index, source)
        facts.add((scene.tone, scene.pattern, scene.objects))
        # Shape, colour, size of each object and the tone; places are checked by pixels below.
        words = sum(len(names_in(caption, names)) for names in (SHAPES, COLOURS, SIZES, TONES))
        complete += words == 3 * len(scene.objects) + 1
    assert len(facts) >= 470  # 2,000 scenes of one object, many more of two
    assert complete > 0.8 * 512  # expected 0.95 (background) * 0.95 to 0.95**2 (sizes)


def test_words_for_left_right_top_bottom_agree_with_the_pixels():
    source = Scenes(400, seed=9, max_objects=1, noise=0)
    checked = 0
    for index in range(400):
        scene, record = true_scene(index, source), source[index]
        area, x, y = object_pixels(record.image, scene.objects[0].colour)
        item = scene.objects[0]
        # Dark or bright pictures lose colour; a crescent does not lie around its centre.
        if area < 20 or item.colour not in VIVID or item.shape == "crescent":
            continue
        checked += 1
        for caption in map(str.lower, record.captions):
            horizontal = ("right" in caption) - ("left" in caption)
            vertical = bool(re.search("bottom|lower", caption)) - bool(
                re.search("top|upper", caption)
            )
            # A large object is moved in from the edge: its centre then lies at 0.4 or 0.6.
            assert (horizontal, vertical) == (side(x, 0.45, 0.55), side(y, 0.45, 0.55)), caption
    assert checked > 150


def test_words_for_relations_agree_with_the_pixels():
    source = Scenes(1500, seed=4, noise=0)
    checked = 0
    for index in range(1500):
        scene, record = true_scene(index, source), source[index]
        if not scene.relation or not {item.colour for item in scene.objects} <= set(VIVID):
            continue
        for caption in map(str.lower, record.captions):
            words = re.findall(r"above|below|left of|right of", caption)
            first, second = (object_pixels(record.image, c) for c in names_in(caption, COLOURS))
            if not words or min(first[0], second[0]) < 20:
                continue
            checked += 1
            horizontal = ("right of" in words) - ("left of" in words)
            vertical = ("below" in words) - ("above" in words)
            # Places differ by 0, 0.24 or more.
            assert horizontal == side(first[1] - second[1], -0.12, 0.12), caption
            assert vertical == side(first[2] - second[2], -0.12, 0.12), caption
    assert checked > 50


def test_object_area_grows_with_its_size_word():
    source = Scenes(600, seed=1, max_objects=1)
    areas = {size: [] for size in SIZES}
    for index in range(600):
        item = true_scene(index, source).objects[0]
        if item.shape == "circle":
            areas[item.size].append(object_pixels(source[index].image, item.colour)[0])
    small, medium, large = (np.median(areas[size]) for size in ("small", "medium", "large"))
    assert 50 < small < 0.7 * medium < 0.5 * large


@pytest.mark.parametrize("shape", SHAPES)
def test_outline_fills_its_square_and_is_unlike_the_others(shape):
    assert 0.8 <= np.abs(scenes._OUTLINES[shape][0]).max() <= 1
    item = scenes._Object(shape, "red", "large", "center")
    covered = scenes._object_mask(item, 1.0, np.random.default_rng(0), 64).mean()
    assert 0.1 < covered < 0.46  # of the image; the circle around it covers pi * 0.38**2 = 0.454
    masks = [
        scenes._object_mask(
            scenes._Object(name, "red", "large", "center"), 1.0, np.random.default_rng(0), 64
        )
        for name in SHAPES
        if name != shape
    ]
    mask = scenes._object_mask(item, 1.0, np.random.default_rng(0), 64)
    assert min(np.abs(mask - other).mean() for other in masks) > 0.015


def test_edges_are_smooth():
    item = scenes._Object("triangle", "red", "large", "center")
    mask = scenes._object_mask(item, 1.0, np.random.default_rng(0), 64)
    assert ((mask > 0.1) & (mask < 0.9)).sum() > 30


def test_objects_differ_from_their_background():
    source = Scenes(500, seed=6)
    for index in range(500):
        scene = true_scene(index, source)
        for item in scene.objects:
            difference = np.subtract(COLOURS[item.colour], TONES[scene.tone])
            assert np.linalg.norm(difference) >= 110


@pytest.mark.parametrize("attribute, classes", [("shape", SHAPES), ("colour", tuple(COLOURS))])
def test_labelled_scenes_are_balanced_and_show_their_class(attribute, classes):
    source = LabelledScenes(200, seed=1, attribute=attribute)
    assert source.classes == classes
    items = [source[index] for index in range(200)]
    assert np.ptp(np.bincount([item.label for item in items], minlength=len(classes))) <= 1
    assert len({item.image.tobytes() for item in items}) == 200
    if attribute == "colour":
        for item in items:
            areas = [object_pixels(item.image, colour)[0] for colour in classes]
            # 20 pixels: a ring of the small size; brightness may take a colour out of reach.
            assert areas[item.label] > 20 or np.argmax(areas) == item.label or max(areas) < 20


def test_labelled_scenes_are_a_pure_function_of_seed_and_index():
    source = LabelledScenes(100, seed=3, attribute="shape")
    np.testing.assert_array_equal(
        source[40].image, LabelledScenes(50, seed=3, attribute="shape")[40].image
    )
    assert not np.array_equal(
        source[40].image, LabelledScenes(50, seed=4, attribute="shape")[40].image
    )


def test_scene_sources_pickle_and_describe_themselves():
    for source in (Scenes(10, 1), LabelledScenes(10, 1, "colour")):
        again = pickle.loads(pickle.dumps(source))
        np.testing.assert_array_equal(again[4].image, source[4].image)
        assert again.describe() == source.describe()
        assert "10" in source.describe() and "\n" not in source.describe()


@pytest.mark.parametrize(
    "make, message",
    [
        (lambda: Scenes(-1), "size=-1"),
        (lambda: Scenes(1, seed=-2), "seed=-2"),
        (lambda: Scenes(1, image_size_px=8), "image_size_px=8 .* at least 16"),
        (lambda: Scenes(1, max_objects=3), "max_objects=3 .* 1 or 2"),
        (lambda: Scenes(1, noise=2), r"noise=2 .* \[0, 1\]"),
        (lambda: LabelledScenes(1, 0, "size"), "label=size .* shape or colour"),
    ],
)
def test_scenes_argument_out_of_range_names_it(make, message):
    with pytest.raises(ValueError, match=message):
        make()


def test_scenes_spec_reaches_the_generator():
    source = open_source("scenes?size=5&seed=3&image_size_px=48")
    assert len(source) == 5 and images.decode_image(source[4].image).shape == (48, 48, 3)
    other = open_source("scenes?size=5&seed=4&image_size_px=48")
    assert not np.array_equal(
        images.decode_image(source[0].image), images.decode_image(other[0].image)
    )


def test_labelled_scenes_spec_reaches_the_generator():
    source = open_labelled("scenes?size=20&label=shape")
    assert len(source) == 20 and len(source.classes) > 1
    assert {source[index].label for index in range(20)} <= set(range(len(source.classes)))
