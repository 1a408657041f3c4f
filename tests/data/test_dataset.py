import concurrent.futures
import logging
import multiprocessing
import pickle
from dataclasses import replace

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from rsmtdf.data.dataset import Dataset, usable_tiles
from rsmtdf.data.listing import tiles_of
from rsmtdf.data.raster import Header
from rsmtdf.data.scene import Scene
from rsmtdf.errors import DatasetError


@given(st.integers(1, 100), st.integers(1, 100), st.integers(5, 64))
def test_windows_cover_every_pixel_once(width, height, tile_px):
    header = Header(width, height, 3, "uint8", ("red", "green", "blue"), (None,) * 3, False, None)
    covered = np.zeros((height, width), int)
    tiles = tiles_of(Scene("s", "s.png", None), header, tile_px)
    for tile in tiles:
        covered[tile.y0 : tile.y0 + tile.height, tile.x0 : tile.x0 + tile.width] += 1
        row, column = map(int, tile.id.removeprefix("s/").split("_"))
        assert (tile.y0, tile.x0) == (row * tile_px, column * tile_px)
        assert 1 <= tile.width <= tile_px
        assert 1 <= tile.height <= tile_px
    assert (covered == 1).all()
    assert len({t.id for t in tiles}) == len(tiles)


@pytest.mark.parametrize("cache_bytes", [0, 2**20], ids=["by window", "whole and kept"])
@pytest.mark.parametrize("name", ["a.png", "a.tif"])
def test_tiles_are_the_scene_padded_right_and_bottom(tmp_path, write, picture, spec, name, cache_bytes):
    image, labels = picture(50, 70), picture(50, 70, 1)[..., 0] % 3
    write(tmp_path / f"images/{name}", image)
    write(tmp_path / f"masks/{name}", labels)
    data = Dataset(replace(spec, min_valid=0.0), tmp_path, cache_bytes=cache_bytes)
    assert [t.id for t in data.tiles()] == ["a/0_0", "a/0_1", "a/0_2", "a/1_0", "a/1_1", "a/1_2"]
    for tile in data.tiles():
        pixels, valid = data.read_image(tile)
        area = np.s_[tile.y0 : tile.y0 + tile.height, tile.x0 : tile.x0 + tile.width]
        assert pixels.shape == (32, 32, 3)
        assert pixels.dtype == np.uint8
        assert np.array_equal(pixels[: tile.height, : tile.width], image[area])
        assert np.array_equal(valid, pixels.any(axis=2)), "the picture has no black, padding is nothing else"
        label = data.read_label(tile)
        assert label.dtype == np.uint8
        assert np.array_equal(label[: tile.height, : tile.width], labels[area])
        assert (label[~valid] == 255).all()
        pixels[:], valid[:], label[:] = 0, False, 0  # what a caller does to its arrays stays there
    tile = data.tile("a/0_0")
    assert np.array_equal(data.read_image(tile)[0], image[:32, :32])
    assert np.array_equal(data.read_label(tile), labels[:32, :32])


def test_tiles_mostly_outside_their_scene_are_left_out_and_counted(tmp_path, write, picture, spec):
    write(tmp_path / "images/a.png", picture(32, 39))  # 7 of 32 columns: 22 %
    write(tmp_path / "images/b.png", picture(32, 40))  # 8 of 32: 25 %
    data = Dataset(spec, tmp_path)
    assert [t.id for t in data.tiles()] == ["a/0_0", "b/0_0", "b/0_1"]
    assert data.left_out == ("a/0_1",)
    with pytest.raises(DatasetError, match="tile 'a/0_1' was left out"):
        data.tile("a/0_1")
    assert [t.id for t in data.resolve_name("a")] == ["a/0_0"]
    assert data.resolve_name("images/a.png") == data.resolve_name("a.png") == data.resolve_name("a")


def test_invalid_pixels_are_black_and_not_valid(tmp_path, write, picture, spec):
    image = picture(32, 32).astype(np.uint16) * 100
    image[:10] = 65535
    write(tmp_path / "images/a.tif", image, nodata=65535)
    data = Dataset(replace(spec, scaling=((0.0, 25500.0),) * 3), tmp_path)
    pixels, valid = data.read_image(data.tiles()[0])
    assert not valid[:10].any()
    assert not pixels[:10].any()
    assert valid[10:].all()
    assert np.array_equal(pixels[10:], image[10:] // 100)


def test_an_unlabelled_image_needs_no_mask(folder, spec):
    data = Dataset(spec, folder)
    tile = data.tile("u/0_1")
    assert tile.mask is None
    assert (data.read_label(tile) == 255).all()


def test_every_scene_is_decoded_once_and_the_cache_is_bounded(folder, spec):
    data = Dataset(spec, folder, cache_bytes=4 * 64 * 64 * 4)
    decoded = []
    original = data._decode
    data._decode = lambda image, *rest: (decoded.append(image), original(image, *rest))[1]
    with concurrent.futures.ThreadPoolExecutor(4) as pool:
        list(pool.map(lambda i: data.read_image(data.tile(f"a/{i // 2}_{i % 2}")), range(4)))
    assert decoded == ["images/a.png"]
    for tile in data.tiles():
        data.read_image(tile)
    assert len(decoded) == 11, "one more for each of the other ten scenes"
    assert 0 < data._cache.used_bytes <= 4 * 64 * 64 * 4


def test_an_empty_twin_decodes_anew_and_leaves_the_other_as_it_is(folder, spec):
    data = Dataset(spec, folder)
    data.read_image(data.tile("a/0_0"))
    used = data._cache.used_bytes
    twin = data.with_empty_cache()
    assert twin.listing is data.listing
    assert twin._cache.used_bytes == 0
    assert np.array_equal(twin.read_image(twin.tile("a/0_0"))[0], data.read_image(data.tile("a/0_0"))[0])
    assert twin._cache.used_bytes == used == data._cache.used_bytes


@pytest.mark.parametrize(("scenes", "reads"), [(100, 400), (6, 400), (4, 40), (1, 400)])
def test_expected_decodes_are_those_of_reads_in_random_order(folder, spec, scenes, reads):
    """Eleven scenes, of which the cache holds all, about half, a third, or none whole."""
    data = Dataset(spec, folder, cache_bytes=scenes * 64 * 64 * 4)
    decoded = []
    original = data._decode
    data._decode = lambda image, *rest: (decoded.append(image), original(image, *rest))[1]
    tiles, rng = data.tiles(), np.random.default_rng(0)
    for i in rng.integers(0, len(tiles), reads):
        data.read_image(tiles[i])
    assert data.expected_decodes(tiles, reads=reads) == pytest.approx(len(decoded), rel=0.15, abs=2)


def _digest(data):
    return [int(data.read_image(t)[0].sum()) * 7 + int(data.read_label(t).sum()) for t in data.tiles()]


def test_a_worker_process_reads_the_same(folder, spec):
    data = Dataset(spec, folder)
    expected = _digest(data)
    context = multiprocessing.get_context("spawn")  # the strictest: everything travels by pickle
    with concurrent.futures.ProcessPoolExecutor(1, mp_context=context) as pool:
        assert pool.submit(_digest, data).result() == expected


def test_a_forked_copy_starts_with_an_empty_cache_and_free_locks(folder, spec, monkeypatch):
    data = Dataset(spec, folder)
    expected = _digest(data)
    data._cache._lock.acquire()  # as another thread may hold it at the moment of the fork
    monkeypatch.setattr("rsmtdf.data.cache.os.getpid", lambda: -1)
    assert _digest(data) == expected


def test_a_pickled_copy_brings_the_listing_but_no_pixels(folder, spec):
    data = Dataset(spec, folder)
    before = len(pickle.dumps(data))
    _digest(data)
    copy = pickle.loads(pickle.dumps(data))
    assert copy.tiles() == data.tiles()
    assert len(pickle.dumps(data)) < before + 40_000
    assert copy._cache.used_bytes == 0


def test_no_root_or_an_empty_one(tmp_path, spec):
    with pytest.raises(DatasetError, match=r"data root \S+/gone of data set 'toy' does not exist; .*--root"):
        Dataset(spec, tmp_path / "gone")
    with pytest.raises(DatasetError, match=r"no folder 'images' in \S+ \(found: no folders\)"):
        Dataset(spec, tmp_path).tiles()


def test_near_names(folder, spec):
    data = Dataset(spec, folder)
    with pytest.raises(DatasetError, match=r"tile 'a/0_2' does not exist; did you mean a/0_"):
        data.tile("a/0_2")
    with pytest.raises(DatasetError, match=r"'images/a.pgn' is no tile.*did you mean images/a.png"):
        data.resolve_name("images/a.pgn")
    with pytest.raises(DatasetError, match="leads out of the data root"):
        data.resolve_name("../secrets.png")
    assert data.resolve_name(str(folder / "images/a.png")) == data.resolve_name("a")


def test_sixteen_bits_without_scaling_stop_with_the_line_to_paste(tmp_path, write, spec):
    import yaml

    ramp = np.arange(64 * 64, dtype=np.uint16).reshape(64, 64)
    write(tmp_path / "images/a.tif", np.dstack([ramp, ramp * 2, ramp * 4]))
    data = Dataset(spec, tmp_path)
    with pytest.raises(DatasetError, match=r"1 of 1 image\(s\) are uint16.*no scaling") as caught:
        data.tiles()
    line = yaml.safe_load(str(caught.value).splitlines()[-1])
    assert line == {"scaling": [[82, 4013], [164, 8026], [328, 16052]]}
    scaled = Dataset(replace(spec, scaling=tuple(map(tuple, line["scaling"]))), tmp_path)
    assert len(scaled.tiles()) == 4
    with pytest.raises(DatasetError, match="no scaling"):
        data.read_image(scaled.tiles()[0])


def test_one_band_stops_before_any_pixel_is_read(tmp_path, write, picture, spec):
    write(tmp_path / "images/a.png", picture(32, 32, 1)[..., 0])
    with pytest.raises(DatasetError, match=r"image images/a.png has 1 colour band.*`bands: \[1, 1, 1\]`"):
        Dataset(spec, tmp_path).tiles()
    data = Dataset(replace(spec, bands=(1, 1, 1)), tmp_path)
    pixels, _ = data.read_image(data.tiles()[0])
    assert np.array_equal(pixels[..., 0], pixels[..., 2])


def test_taking_the_first_bands_is_said_once(tmp_path, write, picture, spec, caplog):
    for name in "ab":
        write(tmp_path / f"images/{name}.tif", picture(32, 32, 4), photometric="MINISBLACK")
    data = Dataset(spec, tmp_path)
    with caplog.at_level(logging.INFO, "rsmtdf"):
        for _ in range(3):
            data.tiles()
            data.read_image(data.tiles()[0])
    assert [r.message.count("bands 1, 2, 3") for r in caplog.records] == [1]


def test_a_truncated_image_names_the_file_and_the_reason(folder, spec):
    data = Dataset(spec, folder)
    tile = data.tile("c/0_0")
    path = folder / "images/c.png"
    path.write_bytes(path.read_bytes()[:-200])
    with pytest.raises(DatasetError, match=r"images/c.png cannot be read: the PNG is truncated"):
        data.read_image(tile)
    path.unlink()
    with pytest.raises(DatasetError, match=r"images/c.png does not exist"):
        data.read_image(tile)


def test_an_image_that_never_opens_has_no_tiles_and_is_listed(folder, spec, caplog):
    path = folder / "images/c.png"
    path.write_bytes(path.read_bytes()[:100])
    data = Dataset(spec, folder)
    assert len(data.tiles()) == 40
    assert list(data.unreadable) == ["images/c.png"]
    assert "truncated" in data.unreadable["images/c.png"]
    assert "1 image(s) cannot be used" in caplog.text
    assert data.resolve_name("c") == []
    found = usable_tiles(data, data.tiles())
    assert list(found.unreadable) == ["images/c.png"]


def test_a_mask_of_another_size_names_both_files_and_sizes(folder, spec, write, picture):
    write(folder / "masks/a.png", picture(64, 63, 1)[..., 0] % 3)
    data = Dataset(spec, folder)
    with pytest.raises(DatasetError, match=r"masks/a.png is 63 x 64, but its image images/a.png is 64 x 64"):
        data.read_label(data.tile("a/0_0"))


def test_only_tiles_smaller_than_a_quarter(folder, spec):
    with pytest.raises(DatasetError, match=r"all 11 tile\(s\).*25% of 512 x 512 px: set a smaller `tile_px:`"):
        Dataset(replace(spec, tile_px=512), folder).tiles()


@pytest.mark.parametrize(
    ("field", "value", "message"),
    [
        ("palette", ((0, 0, 0),), "1 colours for 3 classes"),
        ("classes", ("a", "b", "a"), "a name appears twice"),
        ("excluded", ("rood",), "rood is no class; did you mean roof, road"),
        ("scaling", ((0.0, 1.0), (1.0, 1.0), (0.0, 1.0)), "low < high"),
        ("tile_px", 0, "tile_px: 0 is not positive"),
        ("min_valid", 1.5, "not between 0 and 1"),
        ("label_map", ((1, 3),), "maps 1 to 3"),
        ("layout", "fodler", "did you mean folder"),
    ],
)
def test_a_spec_that_contradicts_itself(folder, spec, field, value, message):
    with pytest.raises(DatasetError, match=message):
        Dataset(replace(spec, **{field: value}), folder)


def test_usable_tiles_looks_at_pixels_only_where_some_may_be_invalid(tmp_path, write, picture, spec):
    image = picture(64, 64)
    image[:32, :32] = 0
    image[:32, 32:56] = 0  # a quarter of the tile is left
    image[32:, :25] = 0  # less than a quarter
    write(tmp_path / "images/n.tif", image, nodata=0)
    write(tmp_path / "images/plain.png", picture(64, 64))
    broken = write(tmp_path / "images/z.tif", picture(64, 64, 4), photometric="RGB", alpha="YES")
    data = Dataset(spec, tmp_path)
    tiles = data.tiles()
    with broken.open("r+b") as file:  # the directory, at the file's start, stays
        file.truncate(broken.stat().st_size - 5000)
    (tmp_path / "images/plain.png").unlink()
    seen = []
    for workers in (0, 2):
        found = usable_tiles(data, tiles, workers=workers, progress=lambda *counts: seen.append(counts))
        assert [t.id for t in found.kept] == ["n/0_1", "n/1_1", *(f"plain/{i}_{j}" for i in (0, 1) for j in (0, 1))]
        assert found.left_out == ("n/0_0", "n/1_0")
        assert list(found.unreadable) == ["images/z.tif"]
        assert "images/z.tif cannot be" in found.unreadable["images/z.tif"]
    assert seen == [(1, 2), (2, 2)] * 2


def test_a_data_set_of_nothing_but_nodata(tmp_path, write, spec):
    write(tmp_path / "images/a.tif", np.zeros((64, 64, 3), np.uint8), nodata=0)
    data = Dataset(spec, tmp_path)
    with pytest.raises(DatasetError, match=r"none of the 4 tile\(s\).*25% valid pixels.*nodata is 0.0; `nodata:`"):
        usable_tiles(data, data.tiles())


def test_wrong_values_in_a_mask_stop_the_reader(folder, spec, write):
    write(folder / "masks/b.png", np.full((64, 64), 3, np.uint8))
    data = Dataset(spec, folder)
    with pytest.raises(DatasetError, match=r"masks/b.png holds value 3 \(4096 pixels\)"):
        data.read_label(data.tile("b/0_0"))
