import os
from dataclasses import replace

import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from rsmtdf.data.dataset import Dataset
from rsmtdf.data.labelled import labelled_tiles
from rsmtdf.data.splits import PARTS, Splits, make_splits, select_tiles, summary
from rsmtdf.errors import ConfigError, DatasetError
from rsmtdf.specs import SplitSpec, Tile

LETTERS = "abcdefghij"


class Names:
    """What splits need of a data set: tiles by id, their domain, no files."""

    def __init__(self, spec, tiles, domain=lambda tile: ""):
        self.spec, self.root, self._tiles, self._domain = spec, "root", {t.id: t for t in tiles}, domain

    def tile(self, tile_id):
        return self._tiles[tile_id]

    def scene(self, tile):
        from rsmtdf.data.scene import Scene

        return Scene(tile.scene, tile.image, tile.mask, domain=self._domain(tile))


def tiles_of(counts, masked=lambda scene: True):
    return [
        Tile(f"s{s}/{i}_0", f"s{s}.png", f"m{s}.png" if masked(s) else None, 0, i * 32, 32, 32)
        for s, n in enumerate(counts)
        for i in range(n)
    ]


@given(
    st.lists(st.integers(1, 6), min_size=3, max_size=12),
    st.sampled_from(["scene", "tile", "group"]),
    st.integers(0, 5),
    st.randoms(use_true_random=False),
)
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_splits_are_disjoint_exhaustive_whole_and_independent_of_order(spec, tmp_path, counts, by, seed, random):
    tiles = tiles_of(counts, masked=lambda s: s < 3 or s % 4)
    data, how = Names(spec, tiles), SplitSpec(by=by, seed=seed, group=r"s(\d+)")
    splits = make_splits(data, tiles, how, base=tmp_path)
    assert sorted(splits.train + splits.val + splits.test) == sorted(t.id for t in tiles)
    assert all(data.tile(i).mask for i in splits.val + splits.test)
    assert splits.train
    assert splits.val
    assert splits.test
    if by != "tile":
        for scene in {t.scene for t in tiles}:
            assert sum(any(i.startswith(f"{scene}/") for i in getattr(splits, p)) for p in PARTS) == 1
    shuffled = list(tiles)
    random.shuffle(shuffled)
    assert make_splits(Names(spec, shuffled), shuffled, how, base=tmp_path) == splits


@given(st.integers(1, 400), st.integers(0, 3))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_shares_and_counts_are_nested_and_of_the_stated_size(spec, tmp_path, n, seed):
    tiles = tiles_of([n])
    data, ids = Names(spec, tiles, domain=lambda t: "ab"[int(t.id[3:-2]) % 3 == 0]), [t.id for t in tiles]
    domains = [sum(i % 3 == 0 for i in range(n)), sum(i % 3 != 0 for i in range(n))]
    previous = set()
    for percent in (1, 5, 10, 50, 100):
        expected = sum(int(d * percent // 100) for d in domains)
        if not expected:
            continue
        chosen = set(labelled_tiles(data, ids, f"{percent}%", seed=seed, base=tmp_path))
        assert len(chosen) == expected
        assert previous <= chosen
        previous = chosen
    previous = set()
    for count in range(1, n + 1, max(1, n // 7)):
        chosen = set(labelled_tiles(data, ids, str(count), seed=seed, base=tmp_path))
        assert len(chosen) == count
        assert previous <= chosen
        previous = chosen
    assert labelled_tiles(data, ids, "all", seed=seed, base=tmp_path) == tuple(sorted(ids))


def test_loveda_counts_of_the_published_protocol(spec, tmp_path):
    tiles = tiles_of([4624 + 5464])
    data = Names(spec, tiles, domain=lambda t: "urban" if int(t.id[3:-2]) < 4624 else "rural")
    ids = [t.id for t in tiles]
    sizes = [len(labelled_tiles(data, ids, share, seed=0, base=tmp_path)) for share in ("1%", "5%", "10%")]
    assert sizes == [100, 504, 1008]


def test_potsdam_counts_of_the_published_protocol(spec, tmp_path):
    tiles = tiles_of([144] * 38)
    splits = make_splits(Names(spec, tiles), tiles, SplitSpec(by="tile"), base=tmp_path)
    assert [len(getattr(splits, p)) for p in PARTS] == [3283, 1094, 1095]


def test_another_seed_is_another_split(spec, tmp_path):
    tiles = tiles_of([1] * 30)
    one, other = (make_splits(Names(spec, tiles), tiles, SplitSpec(seed=s), base=tmp_path) for s in (0, 1))
    assert one != other


def test_large_scenes_do_not_unbalance_the_parts(spec, tmp_path):
    tiles = tiles_of([40, 1, 1, 1, 10, 10, 2, 2, 20, 3, 5, 5])
    splits = make_splits(Names(spec, tiles), tiles, SplitSpec(seed=3), base=tmp_path)
    assert 0.5 <= len(splits.train) / 100 <= 0.75


def test_too_few_scenes_say_what_else_there_is(spec, tmp_path):
    tiles = tiles_of([9, 9])
    data = Names(spec, tiles)
    with pytest.raises(DatasetError, match=r"2 labelled scenes cannot be cut into train, val, test.*`by: tile`"):
        make_splits(data, tiles, SplitSpec(), base=tmp_path)
    no_test = make_splits(data, tiles, SplitSpec(fractions=(0.5, 0.5, 0.0)), base=tmp_path)
    assert (len(no_test.train), len(no_test.val), len(no_test.test)) == (9, 9, 0)
    assert len(make_splits(data, tiles, SplitSpec(by="tile"), base=tmp_path).test) == 5


@pytest.mark.parametrize(
    ("fields", "error", "message"),
    [
        ({"fractions": (0.6, 0.2, 0.3)}, ConfigError, "add up to 1"),
        ({"fractions": (1.2, -0.2, 0.0)}, ConfigError, "must not be negative"),
        ({"by": "group"}, ConfigError, "need `group:`"),
        ({"by": "group", "group": "(s"}, ConfigError, "is no regular expression"),
        ({"by": "group", "group": "^x"}, DatasetError, "does not match scene 'a'"),
        ({"by": "official"}, DatasetError, "has no official split"),
        ({"val": "gone.txt"}, DatasetError, "the val list: there is no file"),
    ],
)
def test_rules_that_make_no_sense(folder, spec, fields, error, message):
    data = Dataset(spec, folder)
    with pytest.raises(error, match=message):
        make_splits(data, data.tiles(), SplitSpec(**fields), base=folder)


def test_lists_are_taken_as_they_are_and_the_rest_is_generated(folder, spec):
    data = Dataset(spec, folder)
    (folder / "val.txt").write_text(
        "images/a.png masks/a.png  # as in the official lists\n\n./images/b.png\n# c\nc/0_1\r\n"
    )
    splits = make_splits(data, data.tiles(), SplitSpec(val="val.txt", fractions=(0.5, 0.0, 0.5)), base=folder)
    assert splits.val == ("a/0_0", "a/0_1", "a/1_0", "a/1_1", "b/0_0", "b/0_1", "b/1_0", "b/1_1", "c/0_1")
    assert len(splits.train + splits.test) == 44 - 9
    assert {i for i in splits.train if i.startswith("u/")} == {"u/0_0", "u/0_1", "u/1_0", "u/1_1"}
    (folder / "train.txt").write_text("d\ne\n")
    splits = make_splits(data, data.tiles(), SplitSpec(train="train.txt", val="val.txt"), base=folder)
    assert {i[0] for i in splits.train} == {"d", "e"}, "a given train list is the pool"
    assert {i[0] for i in splits.test} == set("cfghij")


def test_tiles_that_are_not_usable_are_no_error_in_a_list(folder, spec):
    data = Dataset(spec, folder)
    (folder / "val.txt").write_text("a\n")
    tiles = [t for t in data.tiles() if t.id != "a/0_0"]
    splits = make_splits(data, tiles, SplitSpec(val="val.txt"), base=folder)
    assert splits.val == ("a/0_1", "a/1_0", "a/1_1")


def test_lists_that_overlap(folder, spec):
    data = Dataset(spec, folder)
    (folder / "train.txt").write_text("a\nb\n")
    (folder / "val.txt").write_text("# one\nb/0_1\n")
    with pytest.raises(
        DatasetError, match=r"tile b/0_1 is in the train list \(line 2\) and in the val list \(line 2\)"
    ):
        make_splits(data, data.tiles(), SplitSpec(train="train.txt", val="val.txt"), base=folder)


def test_a_wrong_list_reports_every_line(folder, spec):
    data = Dataset(spec, folder)
    (folder / "l.txt").write_text("a\nimages/a.png\nimages/x.png\n../../etc/passwd\nb masks/c.png\na b c\n")
    with pytest.raises(DatasetError) as caught:
        make_splits(data, data.tiles(), SplitSpec(train="l.txt"), base=folder)
    lines = str(caught.value).splitlines()
    assert "the train list" in lines[0]
    assert "l.txt has 5 wrong line(s)" in lines[0]
    assert "line 2: 'images/a.png' repeats line 1 (tile a/0_0)" in lines[1]
    assert "line 3: 'images/x.png' is no tile, scene or image" in lines[2]
    assert "line 4" in lines[3]
    assert "leads out of the data root" in lines[3]
    assert "line 5: pairs b with masks/c.png, but its mask here is masks/b.png" in lines[4]
    assert "line 6: 3 columns" in lines[5]


def test_near_names_are_looked_up_for_the_lines_shown_only(folder, spec, monkeypatch):
    """One look-up takes seconds in a large data set; a list of another one has thousands of wrong lines."""
    data, asked = Dataset(spec, folder), []
    monkeypatch.setattr("rsmtdf.data.dataset.near", lambda name, known: asked.append(name) or "; did you mean it?")
    lines = [f"images/x{i}.png" + " masks/a.png" * (i % 2) for i in range(40)]
    (folder / "l.txt").write_text("\n".join(["a", *lines]))
    with pytest.raises(DatasetError) as caught:
        make_splits(data, data.tiles(), SplitSpec(train="l.txt"), base=folder)
    assert asked == [f"images/x{i}.png" for i in range(5)]
    assert str(caught.value).count("did you mean it?") == 5
    assert str(caught.value).endswith("and 35 more")


def test_lists_of_nothing(folder, spec):
    data = Dataset(spec, folder)
    (folder / "empty.txt").write_text("# nothing\n\n")
    (folder / "bytes.txt").write_bytes(b"\xff\xfe\x00")
    for name, message in [("empty.txt", "names no tile"), ("bytes.txt", "cannot be read as text")]:
        with pytest.raises(DatasetError, match=message):
            select_tiles(data, Splits((), (), ()), name, base=folder)


def test_names_with_spaces(tmp_path, write, picture, spec):
    for name in ("site one.png", "site two east.png"):
        write(tmp_path / "images" / name, picture(32, 32))
        write(tmp_path / "masks" / name, picture(32, 32, 1)[..., 0] % 3)
    (tmp_path / "l.txt").write_text("images/site one.png\nsite two east\n")
    data = Dataset(spec, tmp_path)
    assert select_tiles(data, Splits((), (), ()), "l.txt", base=tmp_path) == ("site one/0_0", "site two east/0_0")


def test_images_without_mask_where_one_is_needed(folder, spec):
    data = Dataset(spec, folder)
    (folder / "l.txt").write_text("a\nu\n")
    with pytest.raises(DatasetError, match=r"1 image\(s\) named in \S+l.txt have no mask.*line 2 \(images/u.png\)"):
        make_splits(data, data.tiles(), SplitSpec(val="l.txt"), base=folder)
    with pytest.raises(DatasetError, match="have no mask"):
        labelled_tiles(data, [t.id for t in data.tiles()], "l.txt", seed=0, base=folder)
    with pytest.raises(DatasetError, match="have no mask"):
        select_tiles(data, Splits((), (), ()), "l.txt", base=folder)
    unlabelled = [t.id for t in data.tiles() if t.mask is None]
    for labels in ("all", "5%", "3"):
        with pytest.raises(DatasetError, match=r"none of the 4 training tiles has a mask: expected masks in 'masks'"):
            labelled_tiles(data, unlabelled, labels, seed=0, base=folder)


def test_labels_from_a_list(folder, spec):
    data = Dataset(spec, folder)
    (folder / "l.txt").write_text("images/a.png\nb/0_0\n")
    train = [t.id for t in data.tiles() if t.scene in "ab"]
    assert labelled_tiles(data, train, "l.txt", seed=0, base=folder) == ("a/0_0", "a/0_1", "a/1_0", "a/1_1", "b/0_0")
    with pytest.raises(DatasetError, match=r"names 1 tile\(s\) that are not in the train split: line 2 \(b/0_0\)"):
        labelled_tiles(data, [t for t in train if t[0] == "a"], "l.txt", seed=0, base=folder)
    some = labelled_tiles(data, [t for t in train if t[0] == "a"], "l.txt", seed=0, base=folder, left_out=["b/0_0"])
    assert len(some) == 4


@pytest.mark.parametrize(
    ("labels", "error", "message"),
    [
        ("0%", ConfigError, "not between 0 % and 100 %"),
        ("120%", ConfigError, "not between 0 % and 100 %"),
        ("1%", DatasetError, "1% of 40 training tiles with masks is less than one tile.*--labels 20"),
        ("41", DatasetError, "41 labelled tiles asked for, but 40 training tiles have masks"),
        ("0", DatasetError, "0 labelled tiles"),
        ("some", DatasetError, "labels 'some': expected `all`, a share such as 5%, .*there is no file"),
    ],
)
def test_labels_that_cannot_be(folder, spec, labels, error, message):
    data = Dataset(spec, folder)
    with pytest.raises(error, match=message):
        labelled_tiles(data, [t.id for t in data.tiles()], labels, seed=0, base=folder)


def test_select_names_a_split_or_a_file(folder, spec):
    data = Dataset(spec, folder)
    splits = Splits(("a/0_0", "u/0_0"), ("b/0_0",), ("u/0_1",))
    assert select_tiles(data, splits, "train", base=folder) == ("a/0_0",)
    with pytest.raises(DatasetError, match=r"split 'test' of data set 'toy' has no tile with a mask \(1 without\)"):
        select_tiles(data, splits, "test", base=folder)
    with pytest.raises(
        DatasetError, match=r"no split or list file 'vale': expected train, val, test.*did you mean val"
    ):
        select_tiles(data, splits, "vale", base=folder)


def test_the_file_systems_order_does_not_matter(folder, spec, monkeypatch):
    def outcome():
        data = Dataset(spec, folder)
        splits = make_splits(data, data.tiles(), SplitSpec(), base=folder)
        return data.tiles(), splits, labelled_tiles(data, splits.train, "5", seed=1, base=folder)

    expected = outcome()
    walk = os.walk
    monkeypatch.setattr(os, "walk", lambda *a, **k: ((p, d, f[::-1]) for p, d, f in walk(*a, **k)))
    assert outcome() == expected


def test_loveda_official_split_by_the_published_rule(tmp_path, write, picture):
    from rsmtdf.data.loveda import LOVEDA

    for number, (part, domain) in enumerate(
        [
            ("Train", "Rural"),
            ("Train", "Urban"),
            ("Val", "Rural"),
            ("Val", "Urban"),
            ("Val", "Urban"),
            ("Test", "Rural"),
        ]
    ):
        write(tmp_path / f"{part}/{domain}/images_png/{number}.png", picture(64, 64))
        if part != "Test":
            write(tmp_path / f"{part}/{domain}/masks_png/{number}.png", picture(64, 64, 1)[..., 0] % 8)
    data = Dataset(replace(LOVEDA, tile_px=32), tmp_path)
    splits = make_splits(data, data.tiles(), SplitSpec(by="official"), base=tmp_path)
    assert {i.split("/")[0] for i in splits.train} == {"0", "1"}
    assert len(splits.train) == 8
    assert len(splits.val) == len(splits.test) == 6
    assert {i.split("/")[0] for i in splits.val + splits.test} == {"2", "3", "4"}
    other = make_splits(data, data.tiles(), SplitSpec(by="official", seed=1), base=tmp_path)
    assert other.train == splits.train
    assert other.val != splits.val


def test_a_line_tells_where_the_parts_come_from():
    splits = Splits(("a_1/0_0", "a_2/0_0", "lone/0_0"), ("b_1/0_0", "b_1/0_1"), ())
    by_group = SplitSpec(by="group", group=r"^([a-z])_")
    assert summary(splits, by_group) == "train 3 (a, lone), val 2 (b), test 0"
    assert summary(splits, SplitSpec(by="scene")) == "train 3 (a_1, a_2, lone), val 2 (b_1), test 0"
    many = Splits(tuple(f"s{i}/0_0" for i in range(9)), (), ())
    assert summary(many, SplitSpec()).startswith("train 9 (9 scenes)")


def test_a_label_list_outside_the_train_split_is_named_by_its_lines(folder, spec, tmp_path):
    data = Dataset(spec, folder)
    scene = data.tiles()[0].scene
    (tmp_path / "labels.txt").write_text(f"{scene}\n")
    with pytest.raises(DatasetError, match=rf"line 1 \({scene}\); label others"):
        labelled_tiles(data, [t.id for t in data.tiles() if t.scene != scene], "labels.txt", seed=0, base=tmp_path)


@given(st.integers(4, 14), st.sampled_from(["scene", "group"]), st.integers(0, 5))
@settings(suppress_health_check=[HealthCheck.function_scoped_fixture])
def test_a_folder_that_grows_moves_no_tile_between_the_parts(spec, tmp_path, scenes, by, seed):
    how = SplitSpec(by=by, seed=seed, group=r"s(\d+)")
    before = tiles_of([2] * scenes, masked=lambda s: s % 3 != 1)
    drawn = make_splits(Names(spec, before), before, how, base=tmp_path)
    held_out = {"val": drawn.val, "test": drawn.test}
    # Two more scenes, one of them in front, and every unlabelled scene gets a mask.
    grown = [Tile(f"s-1/{i}_0", "new.png", None, 0, i * 32, 32, 32) for i in range(2)] + tiles_of([2] * (scenes + 1))
    after = make_splits(Names(spec, grown), grown, how, base=tmp_path, held_out=held_out)
    assert (after.val, after.test) == (drawn.val, drawn.test)
    assert set(drawn.train) <= set(after.train)
    assert {t.id for t in grown} == set(after.train + after.val + after.test)


@pytest.mark.parametrize("again", [False, True])
def test_unlabelled_tiles_of_a_held_out_scene_are_in_no_part(spec, tmp_path, again):
    tiles = tiles_of([2] * 6)
    how = SplitSpec(by="scene")
    drawn = make_splits(Names(spec, tiles), tiles, how, base=tmp_path)
    scene = drawn.test[0].split("/")[0]
    # A third tile of the same test scene, without a mask: the student must not see that ground either.
    more = [
        *tiles,
        Tile(f"{scene}/2_0", f"{scene}.png", None, 0, 64, 32, 32),
        Tile("u/0_0", "u.png", None, 0, 0, 32, 32),
    ]
    held_out = {"val": drawn.val, "test": drawn.test} if again else None
    after = make_splits(Names(spec, more), more, how, base=tmp_path, held_out=held_out)
    assert after.test == drawn.test
    assert f"{scene}/2_0" not in after.train + after.val + after.test
    assert "u/0_0" in after.train


def test_one_more_mask_moves_at_most_one_labelled_tile(spec, tmp_path):
    ids = [t.id for t in tiles_of([3] * 20)]
    before = labelled_tiles(Names(spec, tiles_of([3] * 20)), ids, "20", seed=0, base=tmp_path)
    grown = tiles_of([3] * 20 + [1])
    after = labelled_tiles(Names(spec, grown), [t.id for t in grown], "20", seed=0, base=tmp_path)
    assert len(set(before) - set(after)) <= 1
