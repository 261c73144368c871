"""GeoJSON: outlines enclose their pixels and no others, and features say what QuPath reads."""

import json
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra.numpy import array_shapes, arrays
from PIL import Image
from skimage.draw import polygon2mask

from diffaugkit import TissueTiles, boxes_from_masks, to_geojson
from diffaugkit.metrics import label_instances

SHAPES = array_shapes(min_dims=2, max_dims=2, max_side=8)
MASKS = arrays(np.int64, SHAPES, elements=st.integers(0, 2))


def polygons(feature):
    """Rings (n, 2) of each polygon of a feature."""
    geometry = feature["geometry"]
    several = geometry["coordinates"]
    if geometry["type"] == "Polygon":
        several = [several]
    else:
        assert geometry["type"] == "MultiPolygon"
        assert len(several) > 1
    return [[np.array(ring) for ring in polygon] for polygon in several]


def area(ring):
    """Signed area: above 0 where a ring runs counterclockwise."""
    (x, y), (x_next, y_next) = ring[:-1].T, ring[1:].T
    return (x * y_next - x_next * y).sum() / 2


def pixels(feature, shape):
    """How often each pixel's centre lies in a feature."""
    found = np.zeros(shape, int)
    for rings in polygons(feature):
        for ring in rings:
            inside = polygon2mask(shape, ring[:, ::-1] - 0.5)
            found += np.where(inside, np.sign(area(ring)).astype(int), 0)
    return found


def properties(collection):
    return [feature["properties"] for feature in collection["features"]]


def names(collection):
    return [each.get("classification", {}).get("name") for each in properties(collection)]


# ---- outlines ------------------------------------------------------------------------------------


@pytest.mark.filterwarnings("ignore:objects has no label but")
@settings(max_examples=150, deadline=None)
@given(MASKS)
def test_outlines_enclose_the_pixels_of_an_object_and_no_others(mask):
    features = to_geojson(mask, instances=True)["features"]
    numbers = np.unique(mask[mask != 0])
    assert len(features) == len(numbers)
    for number, feature in zip(numbers, features, strict=True):
        np.testing.assert_array_equal(pixels(feature, mask.shape), mask == number)


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_each_connected_region_of_a_class_is_a_feature(mask):
    regions = label_instances(mask)
    collection = to_geojson(mask)
    assert len(collection["features"]) == regions.max(initial=0)
    for number, (name, feature) in enumerate(
        zip(names(collection), collection["features"], strict=True), start=1
    ):
        np.testing.assert_array_equal(pixels(feature, mask.shape), regions == number)
        assert {name} == set(map(str, mask[regions == number]))


@settings(max_examples=100, deadline=None)
@given(MASKS)
def test_rings_are_closed_and_simple_and_run_as_rfc_7946_wants(mask):
    for feature in to_geojson(mask)["features"]:
        for border, *holes in polygons(feature):
            assert area(border) > 0
            assert all(area(hole) < 0 for hole in holes)
            for ring in (border, *holes):
                assert ring.shape[0] >= 5
                assert (ring[0] == ring[-1]).all()
                assert len(np.unique(ring, axis=0)) == len(ring) - 1  # it never meets itself
                turns = np.diff(ring, axis=0) != 0
                assert (turns.sum(axis=1) == 1).all()
                assert (turns[1:] != turns[:-1]).all()  # no corner that is none


def test_a_hole_that_meets_the_border_at_a_corner_is_a_ring_of_its_own():
    ((border, hole),) = polygons(to_geojson([[1, 1, 1], [1, 0, 1], [0, 1, 1]])["features"][0])
    assert (area(border), area(hole)) == (8, -1)
    (rings,) = polygons(
        to_geojson([[1, 1, 1, 1], [1, 0, 1, 1], [1, 1, 0, 1], [1, 1, 1, 1]])["features"][0]
    )
    assert [area(ring) for ring in rings] == [16, -1, -1]


def test_pixels_that_touch_at_a_corner_are_one_object_of_two_polygons():
    (feature,) = to_geojson(np.eye(2, dtype=bool))["features"]
    assert feature["geometry"] == {
        "type": "MultiPolygon",
        "coordinates": [
            [[[0, 0], [1, 0], [1, 1], [0, 1], [0, 0]]],
            [[[1, 1], [2, 1], [2, 2], [1, 2], [1, 1]]],
        ],
    }


def test_an_object_in_a_hole_of_another():
    mask = np.ones((5, 5), int)
    mask[1:4, 1:4] = 0
    mask[2, 2] = 7
    outer, inner = to_geojson(mask, instances=True)["features"]
    assert [area(ring) for ring in polygons(outer)[0]] == [25, -9]
    assert [area(ring) for ring in polygons(inner)[0]] == [1]


@pytest.mark.parametrize(
    "form", [np.uint8, np.int16, np.uint64, torch.tensor, Image.fromarray, np.ndarray.tolist]
)
def test_masks_of_any_kind(form):
    mask = np.array([[0, 2, 2], [1, 0, 2]], np.uint8)
    assert to_geojson(form(mask)) == to_geojson(mask)
    assert names(to_geojson(mask)) == ["1", "2"]
    assert names(to_geojson(mask > 0)) == ["1"]


def test_a_mask_of_background_is_an_empty_collection():
    for kwargs in ({}, {"instances": True}, {"names": {1: "Tumor"}}):
        found = to_geojson(np.zeros((4, 5), int), **kwargs)
        assert found == {"type": "FeatureCollection", "features": []}


def test_scale_and_offset_lead_to_the_full_resolution():
    def ring(**kwargs):
        (feature,) = to_geojson([[0, 1]], **kwargs)["features"]
        return feature["geometry"]["coordinates"][0]

    assert ring(scale=4) == [[4, 0], [8, 0], [8, 4], [4, 4], [4, 0]]
    assert ring(scale=(4, 2), offset=(100, 1)) == [
        [104, 1], [108, 1], [108, 3], [104, 3], [104, 1]
    ]  # fmt: skip
    assert ring(scale=4.00012)[1] == [8, 0]
    assert ring(offset=(0.5, -2))[0] == [1.5, -2]


# ---- boxes and tiles -----------------------------------------------------------------------------


def test_boxes_as_detectors_give_them():
    found = {
        "boxes": np.array([[1, 2, 5, 4], [0.5, 0, 1, 3]], np.float32),
        "labels": np.array(["lymphocyte", "tumor"]),
        "scores": np.array([0.75, 0.5], np.float32),
    }
    collection = to_geojson(found, values={"size": [8, np.nan]})
    first, second = collection["features"]
    assert polygons(first)[0][0].tolist() == [[1, 2], [5, 2], [5, 4], [1, 4], [1, 2]]
    assert second["geometry"]["coordinates"][0][0] == [0.5, 0]
    assert area(polygons(first)[0][0]) == 8
    assert names(collection) == ["lymphocyte", "tumor"]
    assert [each["objectType"] for each in properties(collection)] == ["detection"] * 2
    assert [each["measurements"] for each in properties(collection)] == [
        {"score": 0.75, "size": 8},
        {"score": 0.5},
    ]


def test_boxes_from_masks_lie_around_the_outlines():
    mask = label_instances(np.random.default_rng(0).random((20, 30)) < 0.2)
    of_boxes = to_geojson(boxes_from_masks(mask, instances=True), names="nucleus")
    of_mask = to_geojson(mask, instances=True, names="nucleus")
    assert names(of_boxes) == names(of_mask)
    for box, outline in zip(of_boxes["features"], of_mask["features"], strict=True):
        corners = np.concatenate([ring for rings in polygons(outline) for ring in rings])
        (((ring,),),) = (polygons(box),)
        np.testing.assert_array_equal(ring.min(axis=0), corners.min(axis=0))
        np.testing.assert_array_equal(ring.max(axis=0), corners.max(axis=0))


@pytest.mark.parametrize("boxes", [[], np.zeros((0, 4), np.float32)])
def test_an_image_without_boxes_is_an_empty_collection(boxes):
    given = {"boxes": boxes, "labels": np.array([], str), "scores": np.zeros(0)}
    assert to_geojson(given)["features"] == []


@pytest.fixture(scope="module")
def tiles():
    slides = [np.full((64, 96, 3), color, np.uint8) for color in (90, 120, 240)]
    slides[2][:, :32] = 255
    return TissueTiles(slides, 32, tissue_threshold=None, slide_ids=["a", "b", "c"])


def test_tiles_of_one_slide_have_their_values(tiles):
    values = {"attention": np.arange(18, dtype=np.float32), "tumor": np.linspace(0, 1, 18)}
    found = to_geojson(tiles, slide="b", values=values, names=["benign", "tumor"] * 9)
    assert [each["measurements"]["attention"] for each in properties(found)] == [*range(6, 12)]
    assert [each["measurements"]["tumor"] for each in properties(found)] == pytest.approx(
        np.linspace(0, 1, 18)[6:12]
    )
    assert names(found) == ["benign", "tumor"] * 3
    assert {each["objectType"] for each in properties(found)} == {"tile"}
    for feature, (row, column) in zip(
        found["features"], tiles.table[["row", "column"]].to_numpy()[6:12], strict=True
    ):
        ((ring,),) = polygons(feature)
        assert ring.min(axis=0).tolist() == [column, row]
        assert ring.max(axis=0).tolist() == [column + 32, row + 32]


def test_tiles_need_no_slide_where_there_is_one(tiles):
    mine = tiles.take(tiles.groups == "b")
    whole = to_geojson(tiles, slide="b")
    assert to_geojson(mine) == to_geojson(mine.table) == to_geojson(tiles.table, slide="b") == whole
    assert "classification" not in properties(whole)[0]
    assert to_geojson(mine, slide="a")["features"] == []  # a slide without tiles
    of_table = to_geojson(mine, values=mine.table[["row", "tissue"]])
    assert properties(of_table)[0]["measurements"] == {"row": 0}  # tissue is NaN


def test_tiles_are_in_pixels_of_level_0():
    mine = TissueTiles(
        [np.zeros((90, 90, 3), np.uint8)], 20, mpp=0.75, slide_mpp=0.5, tissue_threshold=None
    )
    table = mine.table
    found = np.array([polygons(f)[0][0].max(axis=0) for f in to_geojson(mine)["features"]])
    assert (table[["height", "width"]] == 30).all(axis=None)
    np.testing.assert_array_equal(found, table[["column", "row"]] + 30)


# ---- classes and measurements --------------------------------------------------------------------


def test_classes_of_a_mapping_have_one_colour_in_all_files():
    named = {1: "Stroma", 2: "Tumor", 3: "Stroma"}
    both = properties(to_geojson([[1, 2, 3]], names=named))
    assert [each["classification"]["name"] for each in both] == ["Stroma", "Tumor", "Stroma"]
    (alone,) = properties(to_geojson([[2]], names=named))
    assert both[1]["classification"] == alone["classification"]
    colors = [each["classification"]["color"] for each in both]
    assert colors[0] == colors[2] != colors[1]
    assert all(type(value) is int and 0 <= value < 256 for color in colors for value in color)


def test_objects_have_values_and_names_by_ascending_number():
    mask = np.array([[9, 0, 4], [0, 0, 4], [2, 0, 4]], np.int32)
    values = {"area": torch.tensor([1.0, 3.0, float("inf")]), 7: np.array([1, 2, 3])}
    found = to_geojson(mask, instances=True, values=values, names=np.array(["a", "b", "c"]))
    assert names(found) == ["a", "b", "c"]
    assert [each["measurements"] for each in properties(found)] == [
        {"area": 1, "7": 1}, {"area": 3, "7": 2}, {"7": 3}
    ]  # fmt: skip
    assert names(to_geojson(mask, instances=True)) == [None] * 3
    assert names(to_geojson(mask, instances=True, names={2: "x", 4: "y", 9: "x"})) == list("xyx")


def test_kinds_of_objects():
    mask = np.array([[1, 2]])
    for kwargs, kind in (
        ({}, "annotation"),
        ({"instances": True}, "detection"),
        ({"instances": True, "object_type": "annotation"}, "annotation"),
    ):
        assert {each["objectType"] for each in properties(to_geojson(mask, **kwargs))} == {kind}


def test_points_and_colours_are_nobody_elses():
    features = to_geojson([[1, 0, 1]])["features"]
    ring = features[0]["geometry"]["coordinates"][0]
    ring[0][0] = 5
    features[0]["properties"]["classification"]["color"][0] = 5
    assert ring[-1] == [0, 0]
    assert features[1]["properties"]["classification"]["color"][0] != 5


# ---- the file ------------------------------------------------------------------------------------


def test_the_file_holds_what_is_returned(tmp_path):
    mask = np.random.default_rng(0).integers(0, 3, (20, 20)).astype(np.uint8)
    kwargs = {"names": {1: "Tümor", 2: np.str_("b")}, "scale": np.float32(1.5)}
    for path in (tmp_path / "a.geojson", str(tmp_path / "b.geojson")):
        assert to_geojson(mask, path, **kwargs) is None

        def refuse(name):
            raise AssertionError(f"{name} is no JSON")

        text = Path(path).read_text(encoding="utf-8")
        assert json.loads(text, parse_constant=refuse) == to_geojson(mask, **kwargs)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["a.geojson", "b.geojson"]


def test_a_write_that_fails_leaves_the_old_file(tmp_path, monkeypatch):
    path = tmp_path / "a.geojson"
    to_geojson([[1]], path)
    old = path.read_bytes()

    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr("os.fsync", full)
    with pytest.raises(OSError, match="No space left"):
        to_geojson([[1, 2]], path)
    assert path.read_bytes() == old
    assert list(tmp_path.iterdir()) == [path]


# ---- what is refused -----------------------------------------------------------------------------

BOXES = {"boxes": [[0, 0, 1, 1], [1, 1, 2, 2]]}
FRAME = pd.DataFrame({"slide": ["a", "b"], "row": 0, "column": 0, "height": 8, "width": 8})


@pytest.mark.parametrize(
    ("objects", "kwargs", "message"),
    [
        (np.zeros((4, 4)), {}, r"shape \(4, 4\) and dtype float64.*whole numbers"),
        (np.zeros((2, 4, 4), int), {}, r"shape \(2, 4, 4\).*an entry"),
        (np.zeros((0, 4), int), {}, "mask of one image"),
        ([BOXES, BOXES], {}, "mask of one image"),
        ("mask.png", {}, "mask of one image"),
        (np.eye(3, dtype=bool), {"instances": True}, "must hold numbers of objects, got bools"),
        ([[1, 2]], {"values": {"area": [1, 1]}}, "no order.*label_instances"),
        ([[1, 2]], {"names": ["a", "b"]}, "no order.*mapping"),
        ([[1, 2]], {"names": {1: "a"}}, "names has no entry for label 2"),
        ([[1, 2]], {"names": {1: "a", 2: None}}, "names has missing entries"),
        ([[1, 2]], {"names": ["a"], "instances": True}, "names has 1 entries for 2 objects"),
        ([[1, 2]], {"names": ["a", None], "instances": True}, "names has missing entries"),
        ([[1, 2]], {"values": {"x": [1]}, "instances": True}, r"'x'\] has shape \(1,\).*2 objects"),
        ([[1, 2]], {"values": np.ones(2), "instances": True}, "mapping of names to arrays"),
        ([[1, 2]], {"values": {"x": ["a", "b"]}, "instances": True}, r"'x'\] are no numbers"),
        ([[1]], {"scale": 0}, "scale=0 must be above 0"),
        ([[1]], {"scale": np.nan}, "scale=nan must be finite"),
        ([[1]], {"offset": (1, 2, 3)}, r"offset=\(1, 2, 3\) must be a number, or two"),
        ([[1]], {"slide": "a"}, "slide='a' is for tiles"),
        ([[1]], {"object_type": "nucleus"}, "object_type='nucleus' must be one of annotation"),
        (BOXES, {"instances": True}, "instances=True is for masks"),
        (BOXES, {"names": ["a", "b", "c"]}, "names has 3 entries for 2 objects"),
        ({**BOXES, "scores": [1.0]}, {}, r"'score'\] has shape \(1,\), but there are 2 objects"),
        ({**BOXES, "labels": [1]}, {}, "are 2, but have 1 labels"),
        ({"boxes": [[2, 2, 1, 1]]}, {}, "no area"),
        ({"boxes": np.zeros((2, 3))}, {}, r"shape \(2, 3\)"),
        (FRAME, {}, "tiles of several slides, a, b: give slide="),
        (FRAME, {"slide": "z"}, "no slide 'z', but a, b"),
        (FRAME, {"slide": "a", "values": {"x": [1.0]}}, "there are 2 objects"),
        (FRAME, {"slide": "a", "names": {1: "x"}}, "Tiles have no labels"),
        (FRAME.drop(columns="width"), {"slide": "a"}, "no column width"),
    ],
)
def test_what_is_no_use_is_refused_before_any_work(objects, kwargs, message, tmp_path, monkeypatch):
    def work(*args, **kwargs):
        raise AssertionError("work was begun")

    monkeypatch.setattr("diffaugkit.geojson._mask_outlines", work)
    with pytest.raises(ValueError, match=message):
        to_geojson(objects, tmp_path / "a.geojson", **kwargs)
    assert not list(tmp_path.iterdir())


def test_a_mask_of_one_number_in_several_regions_is_a_warning():
    with pytest.warns(UserWarning, match="objects has no label but 255"):
        to_geojson([[255, 0, 255]], instances=True)


def test_a_path_that_cannot_be_written_is_refused_at_once(tmp_path):
    with pytest.raises(IsADirectoryError, match="is a folder: name a file"):
        to_geojson([[1]], tmp_path)
    with pytest.raises(FileNotFoundError, match="There is no folder"):
        to_geojson([[1]], tmp_path / "missing" / "a.geojson")
