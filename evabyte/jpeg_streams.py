"""JPEG streams without their tables: reading the header, telling damage, putting the tables back.

EvaByte sees a picture as a JPEG stream from which the quantisation and Huffman tables are left out (an abbreviated
stream, ITU-T T.81, B.4). Both are known: libjpeg scales the quantisation tables of Annex K by the quality, and streams
that are not optimised use the Huffman tables of Annex K. The quality itself is in no stream: it has to be remembered.
"""

import re
from dataclasses import dataclass

START, END = b"\xff\xd8", b"\xff\xd9"
_START_OF_SCAN, _QUANTIZATION, _HUFFMAN, _RESTART_INTERVAL = 0xDA, 0xDB, 0xC4, 0xDD
_FRAMES = {*range(0xC0, 0xD0)} - {0xC4, 0xC8, 0xCC}  # these three are tables and reserved, no frames
_SEGMENT = re.compile(rb"\xff+([\x01-\xfe])(..)", re.DOTALL)  # marker and size; FF before a marker is filling
_MARKER = re.compile(rb"\xff+([\x01-\xfe])")  # in a scan, FF 00 is the byte FF

# T.81 Annex K, tables K.1 and K.2, row by row.
_LUMINANCE = [
    *(16, 11, 10, 16, 24, 40, 51, 61, 12, 12, 14, 19, 26, 58, 60, 55, 14, 13, 16, 24, 40, 57, 69, 56),
    *(14, 17, 22, 29, 51, 87, 80, 62, 18, 22, 37, 56, 68, 109, 103, 77, 24, 35, 55, 64, 81, 104, 113, 92),
    *(49, 64, 78, 87, 103, 121, 120, 101, 72, 92, 95, 98, 112, 100, 103, 99),
]
_CHROMINANCE = [
    *(17, 18, 24, 47, 99, 99, 99, 99, 18, 21, 26, 66, 99, 99, 99, 99, 24, 26, 56, 99, 99, 99, 99, 99),
    *(47, 66, 99, 99, 99, 99, 99, 99, *(99,) * 32),
]
_ZIGZAG = sorted(range(64), key=lambda i: (i // 8 + i % 8, i // 8 if (i // 8 + i % 8) % 2 else i % 8))

# T.81 Annex K, tables K.3 to K.6: class and number, 16 counts of codes by length, and the symbols in code order.
_HUFFMAN_TABLES = tuple(
    map(
        bytes.fromhex,
        (
            "00 00010501010101010100000000000000 000102030405060708090a0b",
            "10 0002010303020403050504040000017d 01020300041105122131410613516107227114328191a1082342b1c1"
            "1552d1f02433627282090a161718191a25262728292a3435363738393a434445464748494a535455565758595a6364656667"
            "68696a737475767778797a838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7b8b9bac2c3c4c5"
            "c6c7c8c9cad2d3d4d5d6d7d8d9dae1e2e3e4e5e6e7e8e9eaf1f2f3f4f5f6f7f8f9fa",
            "01 00030101010101010101010000000000 000102030405060708090a0b",
            "11 00020102040403040705040400010277 0001020311040521310612415107617113223281081442"
            "91a1b1c109233352f0156272d10a162434e125f11718191a262728292a35363738393a434445464748494a53545556575859"
            "5a636465666768696a737475767778797a82838485868788898a92939495969798999aa2a3a4a5a6a7a8a9aab2b3b4b5b6b7"
            "b8b9bac2c3c4c5c6c7c8c9cad2d3d4d5d6d7d8d9dae2e3e4e5e6e7e8e9eaf2f3f4f5f6f7f8f9fa",
        ),
    )
)


@dataclass(frozen=True)
class JpegHeader:
    """What a stream says before its first pixel; `sampling` is (horizontal, vertical) for each component."""

    width: int
    height: int
    sampling: tuple[tuple[int, int], ...]
    restart_interval: int
    scan_start: int
    has_quantization_tables: bool
    has_huffman_tables: bool

    @property
    def restart_markers(self) -> int:
        """How many restart markers a whole scan holds."""
        if self.restart_interval == 0:
            return 0
        # A scan of one component goes block by block, whatever its sampling (T.81, A.2.2).
        across, down = map(max, zip(*self.sampling, strict=True)) if len(self.sampling) > 1 else (1, 1)
        units = -(-self.width // (8 * across)) * -(-self.height // (8 * down))
        return -(-units // self.restart_interval) - 1


def read_header(stream: bytes) -> JpegHeader:
    """Read a stream up to its first scan.

    Raises:
        ValueError: this is no JPEG stream, or it breaks off before the first scan.
    """
    if not stream.startswith(START):
        raise ValueError("not a JPEG stream: it does not begin with FF D8.")
    frame = b""
    restart_interval = 0
    tables = set()
    marker, position = 0, 2
    while marker != _START_OF_SCAN:
        found = _SEGMENT.match(stream, position)
        if found is None and len(stream) - position >= 4:
            raise ValueError(f"not a JPEG stream: no marker at byte {position} of the header.")
        size = int.from_bytes(found[2], "big") if found else 0
        if found is None or len(stream) < found.start(2) + size:
            raise ValueError("the JPEG stream breaks off in its header, before any pixel.")
        marker, position = found[1][0], found.start(2) + size
        segment = stream[found.end() : position]
        if marker in _FRAMES:
            frame = segment
        elif marker == _RESTART_INTERVAL:
            restart_interval = int.from_bytes(segment[:2], "big")
        elif marker in (_QUANTIZATION, _HUFFMAN):
            tables.add(marker)
    height, width = int.from_bytes(frame[1:3], "big"), int.from_bytes(frame[3:5], "big")
    sampling = tuple((factors >> 4, factors & 15) for factors in frame[7::3])
    if not (height and width and sampling) or any(0 in factors for factors in sampling):
        raise ValueError("the JPEG stream names no size in its header.")
    return JpegHeader(width, height, sampling, restart_interval, position, _QUANTIZATION in tables, _HUFFMAN in tables)


def find_damage(stream: bytes, header: JpegHeader) -> str | None:
    """What shows that the pixels are not all there, in words; None when nothing does.

    A stream with restart markers has to hold each of them, in turn. Without them a change inside the scan does not
    show: JPEG has no checksum.
    """
    end = stream.find(END, header.scan_start)
    if end < 0:
        return "it breaks off before its end marker"
    found = [marker[0] for marker in _MARKER.findall(stream, header.scan_start, end)]
    expected = [0xD0 + i % 8 for i in range(header.restart_markers)]
    one_scan = _START_OF_SCAN not in found
    if header.restart_interval and one_scan and found != expected:
        return f"of its {len(expected)} restart markers some are missing, or not in turn"
    return None


def quantization_tables(quality: int) -> tuple[bytes, bytes]:
    """The luminance and chrominance tables of a quality from 1 to 100, 64 bytes each, in zigzag order.

    libjpeg's scaling of the tables of Annex K (`jpeg_quality_scaling` and `jpeg_add_quant_table`, with 8-bit entries).
    """
    percent = 5000 // quality if quality < 50 else 200 - 2 * quality

    def scaled(table: list[int]) -> bytes:
        return bytes(min(max((table[i] * percent + 50) // 100, 1), 255) for i in _ZIGZAG)

    return scaled(_LUMINANCE), scaled(_CHROMINANCE)


def add_tables(stream: bytes, quality: int, huffman_tables: bool = True) -> bytes:
    """Put the tables that a stream leaves out back after its first marker. Tables that it has stay as they are.

    Args:
        stream: a JPEG stream, with or without tables.
        quality: the quality it was written with, from 1 to 100.
        huffman_tables: add those too. Decoders based on libjpeg-turbo know them, other viewers may not.

    Raises:
        ValueError: `stream` is no JPEG stream, or breaks off in its header.
    """
    header = read_header(stream)
    segments = []
    if not header.has_quantization_tables:
        tables = quantization_tables(quality)
        segments += [b"\xff\xdb\x00\x43" + bytes([number]) + table for number, table in enumerate(tables)]
    if huffman_tables and not header.has_huffman_tables:
        segments += [b"\xff\xc4" + (2 + len(table)).to_bytes(2, "big") + table for table in _HUFFMAN_TABLES]
    return START + b"".join(segments) + stream[2:]
