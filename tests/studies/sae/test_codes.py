"""Which codes tell a region: a planted feature is found at IoU 1, and a set where none does alone."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from torch import Tensor

from pipeline.errors import RecipeError
from pipeline.interventions import BlockAutoencoder, ConceptFeatures, Telling
from pipeline.recordings import RecordingKey
from pipeline.studies.sae.codes import (
    CodedImages,
    amounts_of,
    best_threshold,
    chosen_set,
    coded,
    covered_places,
    iou_of,
    mean_iou,
    single_ious,
)
from pipeline.studies.sae.gallery import GalleryEntry, page_of
from pipeline.studies.sae.labelling import concept_rows, dictionary_rows, place_of, split
from pipeline.studies.sae.layout import best_rows, constant_iou, rows_of
from pipeline.studies.sae.plugins import attended_regions, hashed_words, in_turn, named
from tests.editing.test_concepts import UP, autoencoder
from tests.studies.sae.jobs import DOWN

GRID = (4, 4)
KEY = RecordingKey(UP, 1.0, "cond")


def images_of(features: Tensor, values: Tensor, covered: Tensor, tags: tuple[str, ...], num: int = 12) -> CodedImages:
    count = len(features) // 16
    return CodedImages(
        ids=tuple(f"image {number}" for number in range(count)),
        grid=GRID,
        features=features,
        values=values,
        num_features=num,
        tags=tags,
        covered=covered,
    )


def planted(count: int = 12, seed: int = 0) -> CodedImages:
    """Feature 7 is where "hat" is; "sky" is where feature 2 is and feature 3 is not; the others say nothing."""
    rng = torch.Generator().manual_seed(seed)
    places = count * 16
    hat = torch.rand(places, generator=rng) < 0.3
    two, three = (torch.rand(places, generator=rng) < 0.5 for _ in range(2))
    sky = two & ~three
    noise = torch.randint(8, 12, (places,), generator=rng)
    features = torch.stack([torch.full((places,), 7), torch.full((places,), 2), torch.full((places,), 3), noise], dim=1)
    values = torch.stack([hat * 1.5, two * 1.0, three * 1.0, torch.rand(places, generator=rng)], dim=1).float()
    return images_of(features, values, torch.stack([hat, sky], dim=1).float(), ("hat", "sky"))


def test_a_planted_feature_with_a_known_region_and_name_is_told_at_iou_1() -> None:
    images = planted()
    ious, thresholds = single_ious(images)
    assert float(ious[7, 0]) == 1.0
    assert int(ious[:, 0].argmax()) == 7
    assert float(thresholds[7, 0]) < 1.5
    for feature in range(images.num_features):  # as counted one by one
        score = images.score([feature], [1.0])
        assert float(ious[feature, 1]) == pytest.approx(best_threshold(score, images.covered[:, 1]).iou, abs=1e-5)


def test_a_signed_set_tells_what_no_feature_tells_alone() -> None:
    images = planted()
    features, weights = chosen_set(images, 1, 2)
    assert set(features) == {2, 3}
    signs = dict(zip(features, weights, strict=True))
    assert signs[2] > 0 > signs[3]
    ious, _ = single_ious(images)
    alone = float(ious[:, 1].max())
    together = best_threshold(images.score(features, weights), images.covered[:, 1]).iou
    assert alone < 0.6
    assert together == 1.0
    by_feature = dict(zip(features, amounts_of(images, 1, features), strict=True))
    assert by_feature[2] > 0.4
    assert by_feature[3] < -0.4


def test_concepts_are_chosen_on_some_images_and_judged_on_others() -> None:
    chosen = planted(seed=1)
    rows = {row["concept"]: row for row in concept_rows(chosen, planted(seed=2), 2)}
    assert rows["hat"]["single_feature"] == 7
    assert rows["hat"]["iou"] == rows["sky"]["iou"] == 1.0
    assert len(rows["sky"]["features"]) == 2
    elsewhere = planted(seed=3)
    blank = images_of(elsewhere.features, elsewhere.values, torch.zeros_like(elsewhere.covered), elsewhere.tags)
    assert all(row["iou"] == 0.0 for row in concept_rows(chosen, blank, 2)), "what was chosen is not what is judged"
    assert not list(concept_rows(blank, chosen, 2)), "nothing to choose by"
    ids = [str(number) for number in range(1000)]
    one, other = split(ids, 0.3)
    assert sorted(one + other) == list(range(1000))
    assert 250 < len(one) < 350
    assert [ids[number] for number in one] == [name for name in ids if split([name], 0.3)[0]]


def test_every_feature_has_the_tags_that_it_covers_best_and_none_by_default() -> None:
    rows = list(dictionary_rows(planted(), hashed_words))
    assert [row["feature"] for row in rows] == list(range(12))
    assert rows[7]["tags"][0] == "hat"
    assert rows[7]["mean_iou"] == pytest.approx(1.0, abs=0.05)
    assert rows[7]["votes"] == 12
    np.testing.assert_allclose(sum(rows[7]["weights"]), 1.0)
    assert (rows[0]["tags"], rows[0]["embedding"], rows[0]["density"]) == ([], [], 0.0)
    assert rows[7]["density"] == pytest.approx(float(planted().covered[:, 0].mean()))
    mean_code = planted().intensity()[:, 7]
    assert rows[7]["top_images"][0] == f"image {mean_code.tolist().index(float(mean_code.max()))}"


def test_a_layout_of_planted_features_is_told_at_iou_1_by_codes_and_by_words() -> None:
    images = planted()
    told = Telling(features=(7,), weights=(1.0,), threshold=0.1, iou=1.0)
    hat = ConceptFeatures(telling=told, amounts=(1.0,), placing=told)
    entry = BlockAutoencoder(
        autoencoder=autoencoder(UP),
        block=UP,
        branch="cond",
        timestep=1.0,
        model="",
        model_digest="",
        concepts={"hat": hat},
    )
    embeddings = torch.zeros((12, 300))
    embeddings[7] = torch.from_numpy(hashed_words("hat"))
    rows = {row["concept"]: row for row in rows_of(KEY, entry, images, embeddings, "hash")}
    assert rows["hat"]["concepts_iou"] == rows["hat"]["shown_iou"] == 1.0
    assert rows["hat"]["words_iou"] == 1.0
    assert rows["sky"]["concepts_iou"] is rows["sky"]["shown_iou"] is None
    assert rows["sky"]["words_iou"] == 0.0
    assert max(rows["hat"]["constant_iou"], rows["hat"]["shown_constant_iou"]) < 0.5


def test_of_two_blocks_each_question_takes_the_one_that_answered_it_best_where_it_was_labelled() -> None:
    def entry(block: str, telling: float, placing: float) -> BlockAutoencoder:
        told, placed = (Telling(features=(7,), weights=(1.0,), threshold=0.1, iou=iou) for iou in (telling, placing))
        hat = ConceptFeatures(telling=told, amounts=(1.0,), placing=placed)
        return BlockAutoencoder(
            autoencoder=autoencoder(block),
            block=block,
            branch="cond",
            timestep=1.0,
            model="",
            model_digest="",
            concepts={"hat": hat},
        )

    other = RecordingKey(DOWN, KEY.time, KEY.branch)
    entries = {KEY: entry(UP, 0.9, 0.2), other: entry(DOWN, 0.4, 0.8)}
    common = {"time": KEY.time, "branch": KEY.branch, "concept": "hat", "images": 3}
    of_up = {"concepts_iou": 0.1, "constant_iou": 0.2, "shown_iou": 0.3, "words_iou": 0.4, "shown_constant_iou": 0.5}
    rows = [
        {**common, "block": UP, **of_up},
        {**common, "block": DOWN, **{name: value + 0.5 for name, value in of_up.items()}},
    ]
    (best,) = best_rows(rows, entries)
    expected = {"concepts_iou": 0.1, "constant_iou": 0.2, "shown_iou": 0.8, "words_iou": 0.9, "shown_constant_iou": 1.0}
    assert {name: best[name] for name in expected} == expected
    assert best["block"] == "best"


def test_a_constant_mask_is_the_one_that_suits_all_images_best() -> None:
    covered = torch.tensor([[1.0, 1.0, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0], [1.0, 1.0, 0.0, 0.0]])
    assert constant_iou(covered, mean_iou) == pytest.approx((1 + 0.5 + 1) / 3)
    rare = torch.cat([covered, torch.zeros((17, 4))])
    joint = constant_iou(rare, lambda found, there: iou_of(found.flatten(), there.flatten()))
    assert joint == pytest.approx(3 / 22), "images without the concept count: the first place, of all of them"
    assert mean_iou(covered, covered) == 1.0


def test_a_region_has_the_places_that_it_covers_by_half_and_one_at_least() -> None:
    mask = np.zeros((16, 16), dtype=bool)
    mask[:4, :6] = True  # the first place, and half of the second
    mask[4, :4] = True  # a quarter of the first one below
    assert covered_places(mask, GRID).tolist() == [1.0, 1.0] + [0.0] * 14
    small = np.zeros((16, 16), dtype=bool)
    small[5, 5:7] = True
    assert covered_places(small, GRID).nonzero().tolist() == [[5]]
    assert not covered_places(np.zeros((16, 16), dtype=bool), GRID).any()
    found, region = torch.zeros(16), torch.zeros(16)
    found[:2], region[:4] = 1.0, 1.0
    assert float(iou_of(found, region)) == 0.5
    assert float(iou_of(torch.zeros(16), torch.zeros(16))) == 0.0


def test_a_place_is_told_by_images_that_show_the_concept_alone() -> None:
    """Feature 5 is where things are, in images with a hat as in others: it tells the hat's place, not the hat."""
    places = torch.arange(12 * 16) % 16 < 6
    with_hat = (torch.arange(12) % 2 == 0).repeat_interleave(16)
    hat = places & with_hat
    values = torch.stack([places * 1.0, torch.rand(192, generator=torch.Generator().manual_seed(0)) * 0.1], dim=1)
    features = torch.tensor([[5, 9]]).expand(192, 2)
    images = images_of(features, values, hat[:, None].float(), ("hat",))
    (row,) = concept_rows(images, images, 1)
    assert row["iou"] == pytest.approx(0.5)
    assert row["place_features"] == [5]
    assert row["place_iou"] == 1.0
    far = images.of([1, 3])
    assert place_of(images, far, 0, 1)["place_iou"] == 1.0, "none shows it: that of those it was chosen on"


def test_places_are_coded_row_by_row() -> None:
    made = autoencoder(UP)
    written = torch.randn((made.size, 2, 3), generator=torch.Generator().manual_seed(0))
    features, values = coded(made, written)
    codes = made.encode(written[:, 1, 2][None])
    assert torch.equal(features[5].sort().values, codes.features[0].sort().values)
    assert values[5].sum() == pytest.approx(float(codes.values.sum()))


def test_a_pipeline_of_three_plug_ins_joins_the_boxes_of_a_tag() -> None:
    def segment(image: np.ndarray, box: tuple[float, float, float, float]) -> np.ndarray:
        found = np.zeros(image.shape[:2], dtype=bool)
        left, top, right, bottom = map(int, box)
        found[top:bottom, left:right] = True
        return found

    boxes = {"hat": [(0, 0, 1, 1), (2, 2, 4, 4)], "beard": []}
    labels = in_turn(lambda image, prompt: prompt.split(), lambda image, tag: boxes[tag], segment)
    found = labels(np.zeros((4, 4, 3), dtype=np.uint8), "hat beard")
    assert list(found) == ["hat"]
    assert found["hat"].sum() == 5


def test_a_word_is_where_it_is_attended_to_half_as_much_as_where_it_is_most() -> None:
    maps = {"hat": np.array([[1.0, 0.6], [0.4, 0.0]]), "nothing": np.zeros((2, 2))}
    found = attended_regions(maps, (4, 6))
    assert list(found) == ["hat"]
    assert found["hat"].tolist() == [[True] * 6] * 2 + [[False] * 6] * 2


def test_a_plug_in_that_is_not_there_is_named() -> None:
    for where in ("nowhere:labels", "json:nothing", "json", "json:decoder"):
        with pytest.raises(RecipeError, match=where):
            named(where, "labels")
    assert named("json:loads", "labels")("1") == 1
    np.testing.assert_allclose(hashed_words("Hat ") @ hashed_words("hat"), 1.0)
    assert abs(float(hashed_words("hat") @ hashed_words("beard"))) < 0.3


def test_a_gallery_shows_names_as_text() -> None:
    entry = GalleryEntry(
        concept="<script>", block="b", time=0.5, features=(1, 2), iou=0.5, images=(('a"b', 1.0, b"jpeg"),)
    )
    page = page_of([entry])
    assert "<script>" not in page
    assert "&lt;script&gt;" in page
    assert "a&#34;b" in page
    assert "data:image/jpeg;base64,anBlZw==" in page
