"""The drawn world, its captions and its oracle."""

from __future__ import annotations

import numpy as np
import pytest

from demo_world.oracle import VALUES, find, read
from pipeline.models.demo.world import VOCABULARY, Attribute, Scene, caption, changed_region, draw, edited, region


def scenes(count: int, seed: int = 0) -> list[Scene]:
    rng = np.random.default_rng(seed)
    return [Scene.random(rng) for _ in range(count)]


def test_a_seed_draws_the_same_scenes_and_captions_again() -> None:
    for first, second in zip(scenes(20), scenes(20), strict=True):
        assert first == second
        np.testing.assert_array_equal(draw(first), draw(second))
        assert caption(first, np.random.default_rng(1)) == caption(second, np.random.default_rng(1))


@pytest.mark.parametrize("attribute", ["sunglasses", "hat", "beard", "mouth", "face_color", "background"])
def test_a_change_redraws_only_its_own_region(attribute: Attribute) -> None:
    for scene in scenes(30):
        for value in VALUES[attribute]:
            after = edited(scene, **{attribute: value})
            allowed = region(scene, attribute) | region(after, attribute)
            if attribute == "sunglasses":  # the eyes show where the sunglasses do not
                allowed |= own_pixels(scene, after)
            assert not (changed_region(scene, after) & ~allowed).any()


def own_pixels(scene: Scene, after: Scene) -> np.ndarray:
    """A band of the face across the eyes."""
    size = 128
    y, x = np.mgrid[:size, :size] / size
    return (abs(y - scene.center_y + 0.13 * scene.radius) < 0.3 * scene.radius) & (
        abs(x - scene.center_x) < 0.9 * scene.radius
    )


def test_a_change_of_each_object_is_visible_and_undone_by_changing_it_back() -> None:
    for scene in scenes(30):
        for attribute, values in VALUES.items():
            for value in values:
                if value == getattr(scene, attribute):
                    continue
                after = edited(scene, **{attribute: value})
                assert changed_region(scene, after).sum() > 40
                assert edited(after, **{attribute: getattr(scene, attribute)}) == scene


def test_a_scene_looks_the_same_at_every_size() -> None:
    for scene in scenes(5):
        large = draw(scene, 256).reshape(128, 2, 128, 2, 3).mean(axis=(1, 3))
        assert np.abs(large - draw(scene, 128)).mean() < 1.5


def test_captions_use_the_vocabulary_and_name_nothing_that_is_absent() -> None:
    rng = np.random.default_rng(0)
    for scene in scenes(300):
        words = caption(scene, rng).replace(",", " ,").split()
        assert set(words) <= set(VOCABULARY)
        assert scene.sunglasses or "sunglasses" not in words
        assert scene.beard or "beard" not in words
        assert scene.hat or "hat" not in words
        if "hat" in words:
            assert words[words.index("hat") - 1] in ("a", scene.hat)


def test_captions_vary_and_sometimes_name_one_thing_alone() -> None:
    rng = np.random.default_rng(0)
    scene = Scene(sunglasses=True, hat="red", beard=True)
    captions = {caption(scene, rng) for _ in range(300)}
    assert len(captions) > 100
    assert "sunglasses" in captions
    assert "a red hat" in captions


def test_the_oracle_reads_every_attribute_of_fresh_drawings() -> None:
    fresh = scenes(60, seed=99)
    wrong = dict.fromkeys(VALUES, 0)
    for scene in fresh:
        for attribute, value in read(draw(scene)).items():
            wrong[attribute] += value != getattr(scene, attribute)
    assert all(count <= 0.01 * len(fresh) for count in wrong.values()), wrong


def test_the_oracle_says_how_far_an_image_is_from_any_drawing() -> None:
    noise = np.random.default_rng(0).integers(0, 256, (128, 128, 3), dtype=np.uint8)
    assert find(draw(Scene())).distance < 5 < find(noise).distance
