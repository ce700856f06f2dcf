"""Says in an image's own bytes that a model edited it: XMP with IPTC's DigitalSourceType, in PNG, JPEG and WebP.

The packet is laid into the file beside the pixels, which are not encoded anew: what a decoder makes of them stays the
same to the bit. The same image and facts give the same bytes.
"""

from __future__ import annotations

import io
import struct
import zlib
from collections.abc import Iterator, Mapping
from xml.sax.saxutils import quoteattr

from PIL import Image

from pipeline.errors import EncodeError

SOURCE_TYPE = "http://cv.iptc.org/newscodes/digitalsourcetype/compositeWithTrainedAlgorithmicMedia"
"""IPTC's term for a picture that was partly made by a trained model, as by inpainting."""
NAMESPACES = {
    "Iptc4xmpExt": "http://iptc.org/std/Iptc4xmpExt/2008-02-29/",
    "xmp": "http://ns.adobe.com/xap/1.0/",
    "shardedit": "https://github.com/shardedit/ns/1.0/",
}
PNG, PNG_KEYWORD = b"\x89PNG\r\n\x1a\n", b"XML:com.adobe.xmp\0"
JPEG, JPEG_NAME = b"\xff\xd8", b"http://ns.adobe.com/xap/1.0/\0"
WITHOUT_LENGTH = {0x01, *range(0xD0, 0xDA)}  # markers of JPEG that are two bytes alone
START_OF_SCAN, APP0, APP1 = 0xDA, 0xE0, 0xE1
LONGEST_SEGMENT = 0xFFFF - 2  # bytes, of JPEG
HAS_XMP, HAS_ALPHA = 0x04, 0x10  # flags of WebP's VP8X


def packet(facts: Mapping[str, str], *, tool: str, model: str, version: str) -> bytes:
    """An XMP packet.

    Args:
        facts: more of what made the image, by names of XML; empty ones are left out.
        tool: name and version of the program.
        model: that made the edit.
        version: of the model; "" where it has none.
    """
    properties = {
        "Iptc4xmpExt:DigitalSourceType": SOURCE_TYPE,
        "Iptc4xmpExt:AISystemUsed": model,  # IPTC Photo Metadata 2025.1
        "Iptc4xmpExt:AISystemVersionUsed": version,
        "xmp:CreatorTool": tool,
        **{f"shardedit:{name}": value for name, value in facts.items()},
    }
    spaces = " ".join(f"xmlns:{name}={quoteattr(url)}" for name, url in NAMESPACES.items())
    said = " ".join(f"{name}={quoteattr(value)}" for name, value in properties.items() if value)
    text = (
        '<?xpacket begin="\ufeff" id="W5M0MpCehiHzreSzNTczkc9d"?>'
        '<x:xmpmeta xmlns:x="adobe:ns:meta/"><rdf:RDF xmlns:rdf="http://www.w3.org/1999/02/22-rdf-syntax-ns#">'
        f'<rdf:Description rdf:about="" {spaces} {said}/></rdf:RDF></x:xmpmeta><?xpacket end="r"?>'
    )
    return text.encode()


def marked(image: bytes, xmp: bytes) -> bytes:
    """The image with a packet, in place of one that it had.

    Raises:
        EncodeError: it is no whole PNG, JPEG or WebP.
    """
    try:
        if image.startswith(PNG):
            return _png(image, xmp)
        if image.startswith(JPEG):
            return _jpeg(image, xmp)
        if image[:4] == b"RIFF" and image[8:12] == b"WEBP":
            return _webp(image, xmp)
    except (struct.error, IndexError, OSError) as error:
        raise EncodeError(f"an image cannot be marked as edited, it is cut: {error}") from error
    raise EncodeError("an image cannot be marked as edited: it is no PNG, JPEG or WebP")


def _png(image: bytes, xmp: bytes) -> bytes:
    text = b"iTXt" + PNG_KEYWORD + bytes(4) + xmp  # not compressed; no language, no translated keyword
    chunk = struct.pack(">I", len(text) - 4) + text + struct.pack(">I", zlib.crc32(text))
    parts = [PNG]
    at = len(PNG)
    while at < len(image):
        (length,) = struct.unpack_from(">I", image, at)
        kind = image[at + 4 : at + 8]
        if kind != b"iTXt" or not image.startswith(PNG_KEYWORD, at + 8):
            parts.append(image[at : at + 12 + length])
        if kind == b"IHDR":
            parts.append(chunk)
        at += 12 + length
    if at != len(image) or len(parts) < 3:
        raise OSError("a chunk ends after the file")
    return b"".join(parts)


def _jpeg(image: bytes, xmp: bytes) -> bytes:
    body = JPEG_NAME + xmp
    if len(body) > LONGEST_SEGMENT:
        raise EncodeError(f"an image cannot be marked as edited: what is to be said takes {len(body)} bytes")
    segment = struct.pack(">BBH", 0xFF, APP1, len(body) + 2) + body
    kept, rest = [JPEG], len(JPEG)
    place = 1  # behind JFIF's and Exif's own segments, which readers want first
    for marker, start, end in _segments(image):
        if marker == APP1 and image.startswith(JPEG_NAME, start + 4):
            rest = end
            continue
        kept.append(image[start:end])
        rest = end
        if marker in (APP0, APP1) and place == len(kept) - 1:
            place = len(kept)
    return b"".join([*kept[:place], segment, *kept[place:], image[rest:]])


def _segments(image: bytes) -> Iterator[tuple[int, int, int]]:
    """Marker, start and end of what stands before the picture itself."""
    at = len(JPEG)
    while True:
        if image[at] != 0xFF:
            raise OSError("no marker where a segment ends")
        marker = image[at + 1]
        if marker == START_OF_SCAN:
            return
        length = 0 if marker in WITHOUT_LENGTH else int(struct.unpack_from(">H", image, at + 2)[0])
        yield marker, at, at + 2 + length
        at += 2 + length


def _webp(image: bytes, xmp: bytes) -> bytes:
    chunks = list(_chunks(image))
    if not chunks:
        raise OSError("it has no chunk")
    kept = [(kind, data) for kind, data in chunks if kind != b"XMP "]
    if kept[0][0] != b"VP8X":  # the simple format has no place for metadata
        with Image.open(io.BytesIO(image)) as opened:
            size, has_alpha = opened.size, opened.mode == "RGBA"
        sides = b"".join((side - 1).to_bytes(3, "little") for side in size)
        kept.insert(0, (b"VP8X", bytes([HAS_ALPHA * has_alpha, 0, 0, 0]) + sides))
    header = kept[0][1]
    kept[0] = b"VP8X", bytes([header[0] | HAS_XMP]) + header[1:]
    body = b"".join(
        kind + struct.pack("<I", len(data)) + data + bytes(len(data) % 2) for kind, data in [*kept, (b"XMP ", xmp)]
    )
    return b"RIFF" + struct.pack("<I", len(body) + 4) + b"WEBP" + body


def _chunks(image: bytes) -> Iterator[tuple[bytes, bytes]]:
    at = 12
    while at < len(image):
        kind, length = struct.unpack_from("<4sI", image, at)
        if at + 8 + length > len(image):
            raise OSError("a chunk ends after the file")
        yield kind, image[at + 8 : at + 8 + length]
        at += 8 + length + length % 2
