"""toy/scenes.py: the picture, the depth, the caption and the labels of a scene agree with each other."""
import dataclasses

import numpy as np
import pytest
import torch

from toy import scenes
from toy.scenes import COLOURS, LABELS, Scene, Scenes, Thing, random_scene, render

both_styles = pytest.mark.parametrize("style", ["solid", "outline"])


def many_scenes(style, n=300):
    return [random_scene(np.random.default_rng((7, i)), style) for i in range(n)]


def two_things(relation, swapped=False):
    front = Thing("circle", "red", "large", 0.40, -0.2, 0.0)
    behind = Thing("square", "blue", "small", 0.26, 0.25, 0.0)
    return Scene("solid", "grey", (front, behind), None, relation, swapped)


@both_styles
def test_an_item_depends_on_seed_and_index_alone_and_repeats_after_n(style):
    first, longer, other = Scenes(9, 32, 48, style, 3), Scenes(500, 32, 48, style, 3), Scenes(9, 32, 48, style, 4)
    for i in 8, 0, 5:
        for key in i, 9 + i, 36 + i:
            assert first[key]["caption"] == longer[i]["caption"]
            assert torch.equal(first[key]["image"], longer[i]["image"])
            assert torch.equal(first[key]["depth"], longer[i]["depth"])
    assert [first.scene(i) for i in range(9)] != [other.scene(i) for i in range(9)]
    item = first[0]
    assert item["image"].shape == (3, 32, 48) and item["image"].dtype == torch.float32
    assert item["image"].abs().max() <= 1
    assert item["depth"].shape == (1, 32, 48) and item["depth"].dtype == torch.float32


@pytest.mark.parametrize("style, key, caption, brightness, depth", [
    ("solid", 5, "a large orange triangle in front of a small blue square on a pink background", 0.361146, 6.686310),
    ("outline", 1, "an outline of a small green circle behind a large orange square on a dark gradient",
     -0.565726, 6.396624)])
def test_scenes_are_those_that_the_bundled_priors_were_trained_on(style, key, caption, brightness, depth):
    item = Scenes(9, 64, 64, style, 0)[key]
    assert item["caption"] == caption
    assert item["image"].mean().item() == pytest.approx(brightness, abs=1e-4)
    assert item["depth"].mean().item() == pytest.approx(depth, abs=1e-4)


@both_styles
def test_a_scene_looks_the_same_at_every_resolution(style):
    for scene in many_scenes(style, 40):
        fine, coarse = render(scene, 128, 128)[0].astype(float), render(scene, 64, 64)[0].astype(float)
        difference = np.abs(fine.reshape(64, 2, 64, 2, 3).mean((1, 3)) - coarse)
        assert difference.mean() < 0.5 and difference.max() < 70


@pytest.mark.parametrize("height, width", [(64, 96), (96, 64)])
def test_a_wide_or_tall_picture_shows_the_same_central_square(height, width):
    top, left = (height - 64) // 2, (width - 64) // 2
    for scene in many_scenes("solid", 20):
        for square, whole in zip(render(scene, 64, 64), render(scene, height, width)):
            assert np.array_equal(whole[top:top + 64, left:left + 64], square)


@both_styles
def test_the_front_thing_is_nearer_and_larger_and_hides_part_of_the_other(style):
    found = [scene for scene in many_scenes(style) if scene.relation == "in front of"]
    assert len(found) > 20
    for scene in found:
        front, behind = scene.things
        assert front.depth < behind.depth and front.radius > behind.radius
        depth = render(scene, 64, 64)[1]
        covers = [render(dataclasses.replace(scene, things=(thing,)), 64, 64)[1] == np.float32(thing.depth)
                  for thing in scene.things]
        assert (depth[covers[0]] == np.float32(front.depth)).all()
        assert 0.5 < (depth[covers[1]] == np.float32(behind.depth)).mean() < 0.95


def test_depth_is_that_of_the_wall_or_of_a_thing_by_its_radius():
    for scene in many_scenes("solid", 100):
        image, depth = render(scene, 48, 48)
        wall = np.broadcast_to((20 / (3 + (np.arange(48) + 0.5) / 24 - 1))[:, None], (48, 48))
        for thing in scene.things:
            np.testing.assert_allclose(thing.depth * thing.radius, 1.15)
            assert thing.depth < wall.min()
        if scene.things:
            before_the_wall = ~np.isclose(depth, wall, rtol=1e-5)
            assert set(depth[before_the_wall]) == {np.float32(thing.depth) for thing in scene.things}
            assert image[0, 0].sum() < image[-1, 0].sum() - 30          # far is dark


def test_things_lie_where_place_and_relation_say_and_colours_differ():
    for scene in many_scenes("solid", 1000) + many_scenes("outline", 1000):
        assert len({thing.colour for thing in scene.things}) == len(scene.things)
        for thing in scene.things:
            assert max(abs(thing.x), abs(thing.y)) + thing.radius + scenes.LINE / 2 < 1
        if scene.place == "centre":
            assert max(abs(scene.things[0].x), abs(scene.things[0].y)) < 0.15
        elif scene.place:
            (thing,), (right, down) = scene.things, scenes.PLACES[scene.place]
            assert thing.x * right + thing.y * down > 0.4 and abs(thing.x * down + thing.y * right) < 0.15
        elif scene.relation in ("left of", "above"):
            a, b = scene.things
            apart = (b.x - a.x, b.y - a.y)
            along, across = apart if scene.relation == "left of" else reversed(apart)
            assert along > a.radius + b.radius + scenes.LINE and abs(across) < along / 2


def test_a_room_has_three_things_above_a_floor_the_nearest_first():
    for scene in many_scenes("room", 100):
        depths = [thing.depth for thing in scene.things]
        assert len(depths) == 3 and depths == sorted(depths) and 2.6 <= depths[0] and depths[-1] <= 6
        assert len({thing.colour for thing in scene.things}) == 3
        _, depth = render(scene, 64, 64)
        floor = 1 / depth.max(1)                                            # each row has some floor beside the things
        assert 9.8 < depth.max() < 20 and 4.5 < depth[-1].max() < 6.1       # half a pixel from the edges
        assert np.abs(np.diff(floor, 2)).max() < 1e-6, "a plane has linear inverse depth"
        for thing in scene.things:
            assert max(abs(thing.x), abs(thing.y)) + thing.radius < 1
            assert thing.depth < scene.wall_depth(thing.y + thing.radius), "below the floor"
            assert np.isclose(depth, thing.depth).any(), "hidden"


def test_captions_have_the_form_that_toys_readme_shows():
    thing = Thing("circle", "red", "small", 0.26, -0.5, 0.0)
    assert Scene("solid", "grey", (thing,), "left").caption == "a small red circle at the left on a grey background"
    assert Scene("solid", "grey", (thing,), "centre").caption.startswith("a small red circle in the centre on")
    assert (Scene("outline", "dark gradient", (thing,), "left").caption
            == "an outline of a small red circle at the left on a dark gradient")
    assert Scene("solid", "orange").caption == "an orange image" and Scene("solid", "teal").caption == "a teal image"


@pytest.mark.parametrize("relation, converse", scenes.RELATIONS.items())
def test_a_swapped_caption_has_the_same_picture_and_labels(relation, converse):
    plain, swapped = two_things(relation), two_things(relation, swapped=True)
    assert plain.caption == f"a large red circle {relation} a small blue square on a grey background"
    assert swapped.caption == f"a small blue square {converse} a large red circle on a grey background"
    assert plain.labels() == swapped.labels()
    assert np.array_equal(render(plain, 32, 32)[0], render(swapped, 32, 32)[0])


@both_styles
def test_the_caption_determines_the_labels(style):
    found = {}
    for scene in many_scenes(style, 2000):
        labels = scene.labels()
        assert found.setdefault(scene.caption, labels) == labels and labels.keys() == LABELS.keys()
        for attribute in "colour1", "size1", "shape1", "place", "background":
            assert labels[attribute] == -100 or LABELS[attribute][labels[attribute]] in scene.caption


def test_labels_that_do_not_apply_are_minus_100():
    plain = Scene("solid", "teal").labels()
    assert plain.pop("count") == 0 and plain.pop("background") == 2 and set(plain.values()) == {-100}
    two = two_things("above").labels()
    assert two.pop("place") == -100 and -100 not in two.values() and two["count"] == 2


@both_styles
def test_the_share_of_plain_pictures_and_their_colours_follow_the_style(style):
    plain = [scene.background for scene in many_scenes(style, 3000) if not scene.things]
    share, colours = (0.04, {*scenes.BACKGROUNDS, *scenes.COLOURS}) if style == "solid" else (0.10, {"black", "white"})
    assert len(plain) / 3000 == pytest.approx(share, abs=0.02) and set(plain) == colours


@pytest.mark.parametrize("colour, value", [("black", 0), ("white", 255)])
def test_plain_black_and_white_are_exact(colour, value):
    image, depth = render(Scene("outline", colour), 40, 24)
    assert image.shape == (40, 24, 3) and (image == value).all() and (depth == 10).all()


@pytest.mark.parametrize("shape, corners", [("circle", 0), ("square", 4), ("triangle", 3), ("star", 5)])
def test_a_shape_has_its_corners_on_its_circle_and_its_distance_is_exact(shape, corners):
    axis = np.linspace(-1, 1, 801)
    x, y = axis[None], axis[:, None]
    distance = scenes.signed_distance(Thing(shape, "red", "large", 0.4, 0.05, -0.1), x, y)
    inside, from_centre = distance < 0, np.hypot(x - 0.05, y + 0.1)
    assert from_centre[inside].max() <= 0.4 + 1e-6 and inside.mean() > 0.03
    slope = np.hypot(*np.gradient(distance, axis, axis))    # |grad d| = 1, but for differences taken across a ridge
    assert np.quantile(np.abs(slope - 1), 0.95) < 2e-3 and slope.max() < 1.1
    ring = np.linspace(0, 2 * np.pi, 3600, endpoint=False)
    in_shape = scenes.signed_distance(Thing(shape, "red", "large", 0.4), 0.38 * np.sin(ring), 0.38 * np.cos(ring)) < 0
    assert np.count_nonzero(in_shape & ~np.roll(in_shape, 1)) == corners


def test_an_unknown_style_is_refused():
    with pytest.raises(ValueError, match="'sketch'.*solid, outline, room"):
        Scenes(4, 8, 8, "sketch", 0)


def test_left_is_left_and_top_is_top_in_the_picture():
    where = {"left": lambda x, y: x < -0.3, "right": lambda x, y: x > 0.3, "top": lambda x, y: y < -0.3,
             "bottom": lambda x, y: y > 0.3, "centre": lambda x, y: max(abs(x), abs(y)) < 0.3}
    scenes = [random_scene(np.random.default_rng((7, i)), "solid") for i in range(300)]
    alone = [scene for scene in scenes if scene.place]
    assert {scene.place for scene in alone} == set(where)
    for scene in alone:
        colour = np.array(COLOURS[scene.things[0].colour])
        rows, columns = np.nonzero(np.abs(render(scene, 64, 64)[0] - colour).sum(-1) < 40)
        assert where[scene.place](columns.mean() / 31.5 - 1, rows.mean() / 31.5 - 1), scene


def test_labels_name_the_first_thing_first():
    scene = Scene("solid", "grey", (Thing("star", "red", "small", 0.25, -0.5, 0.0),
                                    Thing("circle", "blue", "large", 0.4, 0.4, 0.0)), relation="left of")
    labels = {head: LABELS[head][i] for head, i in scene.labels().items() if i >= 0}
    assert (labels["shape1"], labels["colour1"], labels["size1"]) == ("star", "red", "small")
    assert (labels["shape2"], labels["colour2"], labels["size2"]) == ("circle", "blue", "large")
