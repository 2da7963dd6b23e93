"""Images as ids and back: the reference's goldens, Pillow as the independent truth, batches, hostile files, folders."""

import base64
import io
import struct
import sys
import zlib

import numpy as np
import PIL.Image
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from image_cases import GOLDEN, IMAGES, STREAMS, file_bytes, image_processor, noise, pixels, processor

from evabyte.image_processing_evabyte import fitted_size
from evabyte.jpeg_streams import add_tables, quantization_tables, read_header


@pytest.mark.compatibility("Images", "EvaByte")
@pytest.mark.parametrize("case", GOLDEN.facts["texts"], ids=lambda case: case["name"])
def test_texts_with_images_have_the_reference_ids(case):
    inputs = processor(text=case["text"], images=[IMAGES[i] for i in case["images"]], return_tensors="pt")
    assert inputs.input_ids.tolist() == [GOLDEN[case["ids"]].tolist()]
    assert inputs.attention_mask.all()
    assert processor.decode(inputs.input_ids[0]) == case["decoded_text"]
    answer = processor.post_process(inputs.input_ids[0], skip_special_tokens=False)
    assert answer.text == case["decoded_text"]
    for image, index in zip(answer.images, case["images"], strict=True):
        assert image.size == tuple(GOLDEN.facts["images"][index]["resized_wh"])


def test_streams_of_the_reference():
    assert image_processor(IMAGES).image_bytes == STREAMS
    for option in GOLDEN.facts["options"]:
        stream = image_processor(IMAGES[0], **option["arguments"]).image_bytes[0]
        assert stream == GOLDEN[option["tensor"]].numpy().tobytes(), option["arguments"]


@pytest.mark.parametrize(("size", "expected"), GOLDEN.facts["resize_rule_max_384"], ids=str)
def test_sizes_of_the_reference(size, expected):
    assert fitted_size(*size, 384) == tuple(expected)


def test_tables_of_the_reference_but_for_its_one_error():
    # The reference's chrominance tables begin with the scaled 16; that of Annex K, by which libjpeg writes, with 17.
    first_of_chrominance = 2 + 69 + 5
    for option in GOLDEN.facts["options"]:
        if "with_tables" in option:
            quality = option["arguments"]["jpeg_quality"]
            ours = bytearray(add_tables(GOLDEN[option["tensor"]].numpy().tobytes(), quality, huffman_tables=False))
            theirs = GOLDEN[option["with_tables"]].numpy().tobytes()
            percent = 5000 // quality if quality < 50 else 200 - 2 * quality
            assert ours[first_of_chrominance] == max(1, (17 * percent + 50) // 100)
            ours[first_of_chrominance] = theirs[first_of_chrominance]
            assert ours == theirs


@pytest.mark.parametrize("case", GOLDEN.facts["vl_chat"], ids=lambda case: case["text"][-20:])
def test_chat_text_of_the_reference(case):
    text = processor.apply_chat_template(case["messages"], add_generation_prompt=case["add_generation_prompt"])
    assert text == case["text"]


# Pillow is the truth


@pytest.mark.parametrize("quality", range(1, 101))
def test_tables_of_every_quality_are_libjpegs(quality):
    image = noise(24, 16)
    written = PIL.Image.open(io.BytesIO(file_bytes(image, "JPEG", quality=quality)))
    stream = (
        image_processor.encode(image)
        if quality == 25
        else image_processor(image, jpeg_quality=quality)["image_bytes"][0]
    )
    restored = PIL.Image.open(io.BytesIO(add_tables(stream, quality)))
    assert restored.quantization == written.quantization
    assert np.array_equal(pixels(restored), pixels(image_processor.with_settings(jpeg_quality=quality).decode(stream)))
    assert [len(table) for table in quantization_tables(quality)] == [64, 64]


def test_huffman_tables_are_libjpegs():
    whole = file_bytes(noise(16, 16), "JPEG")
    restored = add_tables(image_processor.encode(noise(16, 16)), 25)

    def huffman(data):
        found, position = [], 2
        while data[position + 1] != 0xDA:
            size = int.from_bytes(data[position + 2 : position + 4], "big")
            found += [data[position + 4 : position + 2 + size]] if data[position + 1] == 0xC4 else []
            position += 2 + size
        return found

    assert len(huffman(whole)) == 4
    assert huffman(restored) == huffman(whole)


@given(
    width=st.integers(1, 60),
    height=st.integers(1, 60),
    mode=st.sampled_from(["RGB", "L", "RGBA", "P", "1", "LA", "CMYK"]),
    quality=st.integers(1, 100),
    subsampling=st.sampled_from(["4:4:4", "4:2:2", "4:2:0"]),
    restart=st.sampled_from([0, 1, 3, 100]),
    seed=st.integers(0, 9),
)
def test_round_trip_is_what_pillow_reads_from_the_whole_file(width, height, mode, quality, subsampling, restart, seed):
    image = noise(width, height, mode if mode != "LA" else "L", seed).convert(mode)
    options = {"quality": quality, "subsampling": subsampling}
    mine = image_processor.with_settings(
        jpeg_quality=quality, jpeg_subsampling=subsampling, jpeg_restart_marker_blocks=restart, do_resize=False
    )
    stream = mine.encode(image)
    assert not read_header(stream).has_quantization_tables and not read_header(stream).has_huffman_tables
    truth = PIL.Image.open(io.BytesIO(file_bytes(image.convert("RGB"), "JPEG", **options)))
    assert np.array_equal(pixels(mine.decode(stream)), pixels(truth))
    # A stream that already is one passes unchanged, so encoding twice loses nothing more.
    assert mine.encode(stream) == stream


@given(st.integers(1, 3000), st.integers(1, 3000), st.integers(16, 500))
def test_fitted_pictures_are_within_the_edge_and_in_proportion(width, height, longest_edge):
    fitted = fitted_size(width, height, longest_edge)
    assert min(fitted) >= 16 and max(fitted) <= max(longest_edge + 1, 16)
    if max(width, height) <= longest_edge:
        assert fitted == (max(width, 16), max(height, 16))
    else:
        scale = longest_edge / max(width, height)
        assert all(abs(new - max(16, old * scale)) <= 1 for new, old in zip(fitted, (width, height), strict=True))


def test_gray_stays_gray_where_asked():
    gray = image_processor.with_settings(do_convert_rgb=False)
    stream = gray.encode(noise(30, 20, "L"))
    assert len(read_header(stream).sampling) == 1
    decoded = gray.decode(stream)
    assert decoded.mode == "L"
    assert np.abs(pixels(decoded) - pixels(noise(30, 20, "L"))).mean() < 8
    with pytest.raises(ValueError, match="do_convert_rgb"):
        gray.encode(noise(30, 20, "RGBA"))


def test_sixteen_bit_gray_is_scaled_not_clipped():
    deep = PIL.Image.fromarray((np.arange(32 * 32, dtype=np.uint16) * 64).reshape(32, 32))
    shallow = PIL.Image.fromarray((np.asarray(deep) >> 8).astype(np.uint8))
    assert image_processor.encode(deep) == image_processor.encode(shallow)
    with pytest.raises(ValueError, match="unknown range"):
        image_processor.encode(PIL.Image.new("F", (20, 20)))


def test_images_stay_as_they_are_and_nothing_but_pixels_is_written():
    image = noise(20, 20)
    image.info["comment"] = b"where it was taken"
    before = pixels(image)
    assert b"taken" not in image_processor.encode(image)
    assert np.array_equal(pixels(image), before)
    assert image.info == {"comment": b"where it was taken"}


# What an image may be


def test_every_kind_of_image_gives_the_same_stream(tmp_path):
    image = noise(40, 30)
    array = np.asarray(image)
    png = file_bytes(image)
    (tmp_path / "image.png").write_bytes(png)
    encoded = base64.b64encode(png).decode()
    kinds = [
        image,
        array,
        array.transpose(2, 0, 1),
        array.astype(np.int64),
        array.astype(np.float32) / 255,
        torch.from_numpy(array.copy()).permute(2, 0, 1),
        torch.from_numpy(array.copy()).permute(2, 0, 1).float() / 255,
        png,
        bytearray(png),
        memoryview(png),
        tmp_path / "image.png",
        str(tmp_path / "image.png"),
        f"data:image/png;base64,{encoded}",
        encoded,
    ]
    streams = image_processor(kinds).image_bytes
    assert streams == [image_processor.encode(image)] * len(kinds)
    assert image_processor(np.stack([array, array])).image_bytes == streams[:2]


def test_shapes_that_could_be_read_both_ways():
    array = np.random.default_rng(0).integers(0, 256, (3, 20, 3), dtype=np.uint8)
    tall = image_processor.with_settings(do_resize=False)
    assert tall.decode(tall.encode(array)).size == (20, 3)
    assert tall.decode(tall.encode(torch.from_numpy(array))).size == (3, 20)
    assert tall.decode(tall.encode(array, input_data_format="channels_first")).size == (3, 20)
    with pytest.raises(ValueError, match="input_data_format"):
        tall.encode(array, input_data_format="first")


def test_photos_are_turned_the_way_viewers_show_them():
    exif = PIL.Image.Exif()
    exif[0x0112] = 6
    turned = file_bytes(noise(40, 24), "PNG", exif=exif)
    assert image_processor.decode(image_processor.encode(turned)).size == (24, 40)


@pytest.mark.parametrize(
    ("image", "error", "message"),
    [
        (np.zeros((5, 4, 2), np.uint8), ValueError, r"shape \[5, 4, 2\]"),
        (np.zeros((0, 4, 3), np.uint8), ValueError, "shape"),
        (np.full((4, 4), 256), ValueError, "0 to 255"),
        (np.full((4, 4), -1), ValueError, "0 to 255"),
        (np.full((4, 4), 200.0), ValueError, "floats from 0 to 1"),
        (torch.full((4, 4), float("nan")), ValueError, "floats from 0 to 1"),
        (None, TypeError, "NoneType"),
        (3, TypeError, "int"),
        ("no such file.png", FileNotFoundError, "no such file"),
        ("data:image/png,rest", ValueError, "base64"),
        ("data:image/png;base64,!!!", ValueError, "base64"),
        (b"", ValueError, "cannot be opened"),
        (b"no image at all", ValueError, "cannot be opened"),
        (b"%!PS-Adobe-3.0 EPSF-3.0\n%%BoundingBox: 0 0 9 9\n", ValueError, "cannot be opened"),
        (b"\xff\xd8\xff", ValueError, "breaks off in its header"),
        (b"\xff\xd8 neither this", ValueError, "no marker"),
        (file_bytes(noise(60, 60))[:2000], ValueError, "damaged or cut"),
        (file_bytes(noise(60, 60), "JPEG")[:900], ValueError, "damaged or cut"),
        (file_bytes(noise(60, 60), "WEBP")[:200], ValueError, "cannot be opened|damaged or cut"),
        (STREAMS[1][:2000], ValueError, "breaks off before its end marker"),
    ],
    ids=lambda value: None if isinstance(value, type) else str(value)[:24],
)
def test_what_is_no_image_is_refused(image, error, message):
    with pytest.raises(error, match=message):
        image_processor.encode(image)


@pytest.mark.parametrize("url", ["http://example.invalid/a.png", "HTTPS://example.invalid/a.png"])
def test_urls_are_fetched_only_when_asked(url, monkeypatch):
    fetched = []

    def urlopen(request, timeout):
        fetched.append(request.full_url)
        return io.BytesIO(file_bytes(noise(20, 20)))

    monkeypatch.setattr("urllib.request.urlopen", urlopen)
    for refused in (
        lambda: image_processor(url),
        lambda: processor(text="<image_placeholder>", images=url),
        lambda: processor.encode_chat([{"role": "user", "content": [{"type": "image", "url": url}]}]),
    ):
        with pytest.raises(ValueError, match="allow_urls=True"):
            refused()
    assert not fetched
    assert image_processor(url, allow_urls=True).image_bytes == [image_processor.encode(noise(20, 20))]
    assert len(fetched) == 1
    monkeypatch.setattr("evabyte.image_loading._MAX_DOWNLOAD", 20)
    with pytest.raises(ValueError, match="larger than 20 bytes"):
        image_processor(url, allow_urls=True)


def test_without_pillow_the_error_says_what_to_install(monkeypatch):
    monkeypatch.setitem(sys.modules, "PIL.Image", None)
    with pytest.raises(ImportError, match=r"pip install 'evabyte\[image\]'"):
        image_processor.encode(IMAGES[0])


def huge_png(width, height):
    """A PNG of a few bytes that says it is huge."""

    def chunk(name, data):
        return struct.pack(">I", len(data)) + name + data + struct.pack(">I", zlib.crc32(name + data))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", zlib.compress(b"")) + chunk(b"IEND", b"")


@pytest.mark.parametrize(("size", "message"), [((9000, 9000), "max_pixels"), ((60000, 60000), "more pixels than")])
def test_decompression_bombs_are_refused_by_their_header(size, message, monkeypatch):
    monkeypatch.setattr(PIL.Image.Image, "load", lambda *_: pytest.fail("decoded"))
    with pytest.raises(ValueError, match=message):
        image_processor.encode(huge_png(*size))


def test_the_pixel_limit_counts_for_all_kinds_and_for_streams():
    small = image_processor.with_settings(max_pixels=99)
    for image in (noise(10, 10), np.zeros((10, 10)), file_bytes(noise(10, 10)), STREAMS[2]):
        with pytest.raises(ValueError, match="max_pixels=99"):
            small.encode(image)
    with pytest.raises(ValueError, match="max_pixels=99"):
        small.decode(STREAMS[2])
    forged = STREAMS[2].replace(b"\xff\xc0\x00\x11\x08\x00\x10\x00\x10", b"\xff\xc0\x00\x11\x08\xff\xff\xff\xff")
    with pytest.raises(ValueError, match="65535 x 65535"):
        image_processor.decode(forged, allow_partial=True)


@pytest.mark.parametrize(
    ("setting", "error", "message"),
    [
        ({"jpeg_quality": 0}, ValueError, "jpeg_quality"),
        ({"jpeg_quality": 101}, ValueError, "jpeg_quality"),
        ({"jpeg_quality": 50.0}, ValueError, "jpeg_quality"),
        ({"jpeg_subsampling": "4:1:1"}, ValueError, "jpeg_subsampling"),
        ({"jpeg_streamtype": 1}, ValueError, "jpeg_streamtype"),
        ({"jpeg_restart_marker_blocks": -1}, ValueError, "jpeg_restart_marker_blocks"),
        ({"size": {"shortest_edge": 30}}, ValueError, "size must be"),
        ({"size": {"longest_edge": 15}}, ValueError, "at least 16"),
        ({"size": {"width": 0, "height": 20}}, ValueError, "edges in size"),
        ({"quality": 50}, TypeError, "no setting"),
    ],
    ids=str,
)
def test_settings_out_of_range_are_refused_before_work(setting, error, message):
    with pytest.raises(error, match=message):
        image_processor("no such file", **setting)
    with pytest.raises(error, match=message):
        processor(text="<image_placeholder>", images="no such file", **setting)


# Streams that models write


@given(st.integers(0, len(STREAMS[1])))
@settings(max_examples=60)
def test_of_a_stream_that_breaks_off_the_beginning_is_shown(length):
    cut = STREAMS[1][:length]
    if length < len(STREAMS[1]):
        with pytest.raises(ValueError, match=r"breaks off|not a JPEG"):
            image_processor.decode(cut)
    if length < read_header(STREAMS[1]).scan_start:
        with pytest.raises(ValueError, match=r"breaks off in its header|not a JPEG"):
            image_processor.decode(cut, allow_partial=True)
        return
    whole, partial = pixels(image_processor.decode(STREAMS[1])), pixels(image_processor.decode(cut, allow_partial=True))
    assert partial.shape == whole.shape
    # Each restart marker closes a block of 16 x 16; colours are smoothed across borders, so the last row is left out.
    blocks = cut.count(b"\xff", read_header(cut).scan_start) - cut.count(b"\xff\x00", read_header(cut).scan_start)
    safe_rows = max(0, (blocks - 1) // (384 // 16)) * 16 - 1
    assert np.array_equal(partial[: max(0, safe_rows)], whole[: max(0, safe_rows)])


@given(st.integers(0, len(STREAMS[0]) - 1), st.integers(0, 255), st.booleans())
@settings(max_examples=150)
def test_damaged_streams_are_pictures_or_clear_errors(position, byte, allow_partial):
    damaged = STREAMS[0][:position] + bytes([byte]) + STREAMS[0][position + 1 :]
    try:
        image = image_processor.decode(damaged, allow_partial)
    except ValueError as error:
        assert "JPEG" in str(error) or "max_pixels" in str(error)
    else:
        assert image.width * image.height <= image_processor.max_pixels


@given(st.binary(max_size=80))
def test_nonsense_is_a_clear_error(data):
    for allow_partial in (False, True):
        with pytest.raises(ValueError, match=r"JPEG|max_pixels"):
            image_processor.decode(b"\xff\xd8" + data, allow_partial)


def test_a_missing_restart_marker_is_damage():
    first = STREAMS[0].index(b"\xff\xd0")
    with pytest.raises(ValueError, match="of its 5 restart markers some are missing"):
        image_processor.decode(STREAMS[0][:first] + STREAMS[0][first + 2 :])
