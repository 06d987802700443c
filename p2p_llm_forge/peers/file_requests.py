"""What one rank may ask another about its files, and the answers, over a `FileStream`.

A rank serves what it has offered and nothing else: files are asked for by the key of an offer and
by their number in it. No path travels that anybody would open.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import threading
import time
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from p2p_llm_forge.files import parse_json
from p2p_llm_forge.peers.file_pace import Pace
from p2p_llm_forge.peers.file_stream import FRAME_BYTES, FileStream
from p2p_llm_forge.peers.signed_stream import Stranger
from p2p_llm_forge.shapes import is_count, require_shape

LONGEST_LIST = 32 << 20  # bytes
READ_BYTES = 1 << 20
ALIVE_S = 1.0  # between signs of life of a rank that is computing a hash


class Lacks(Exception):
    """The other side does not have (or no longer offers) what it was asked for."""


@dataclass(frozen=True)
class Offer:
    """Files that others may fetch."""

    folder: Path
    names: tuple[str, ...]

    def size(self, name: str) -> int:
        """What lies there by now; -1 for nothing."""
        try:
            return (self.folder / name).stat().st_size
        except OSError:
            return -1


class Offers:
    """All offers of a rank, by key. May be used from any thread."""

    def __init__(self) -> None:
        self._by_key: dict[str, Offer] = {}
        self._lock = threading.Lock()

    def add(self, key: str, folder: Path, names: Iterable[str]) -> None:
        """Offer files, instead of what was offered under this key before."""
        with self._lock:
            self._by_key[key] = Offer(folder, tuple(sorted(names)))

    def remove(self, key: str) -> None:
        """Offer them no longer: what is on its way ends with the next frame."""
        with self._lock:
            self._by_key.pop(key, None)

    def get(self, key: Any) -> Offer:
        """Raises Lacks."""
        with self._lock:
            if not isinstance(key, str) or key not in self._by_key:
                raise Lacks("it does not offer these files (any more)")
            return self._by_key[key]


# --- asking ---------------------------------------------------------------------------------------


def ask_for_list(stream: FileStream, key: str) -> dict[str, tuple[int, int]]:
    """By name each file of an offer: its number and size. Raises Lacks, Gone, Stranger."""
    stream.send_json({"ask": "list", "of": key})
    size = _count(_answer(stream), "size")
    if size > LONGEST_LIST:
        raise Stranger("its list of files is too long")
    text, buffer = bytearray(), memoryview(bytearray(FRAME_BYTES))
    while len(text) < size:
        frame = stream.receive_into(buffer)
        if frame != min(FRAME_BYTES, size - len(text)):
            raise Stranger("its list of files is cut up")
        text += buffer[:frame]
    try:
        names = parse_json(bytes(text))
        require_shape(names, [list])
        return {str(name): (number, int(size)) for number, (name, size) in enumerate(names)}
    except (ValueError, TypeError) as error:
        raise Stranger("its list of files is no list") from error


@dataclass(frozen=True)
class Part:
    """A part of a file of an offer. is_behind: it may wait for the training's own traffic."""

    key: str
    number: int
    offset: int
    size: int
    is_behind: bool = False


def ask_for_part(
    stream: FileStream, part: Part, write: Callable[[int, memoryview], None], buffer: memoryview
) -> None:
    """Have a part sent here. write: called with the offset and content of each frame, in order.

    buffer: of FRAME_BYTES. Raises Lacks, Gone, Stranger, and what `write` raises.
    """
    stream.send_json({"ask": "part", **_fields(part)})
    _answer(stream)
    done = 0
    while done < part.size:
        size = stream.receive_into(buffer)
        if size == 0:
            raise Lacks("it could not read the file to its end")
        if size > part.size - done:
            raise Stranger("it sent more than it was asked for")
        write(part.offset + done, buffer[:size])
        done += size


def ask_for_digest(stream: FileStream, key: str, number: int) -> str:
    """The SHA-256 of a file as it lies at the other side. Raises Lacks, Gone, Stranger."""
    stream.send_json({"ask": "digest", "of": key, "file": number})
    while not (digest := str(_answer(stream).get("digest", "?"))):
        pass  # a sign of life: it takes the time to read the file
    return digest


def _answer(stream: FileStream) -> dict[str, Any]:
    answer = stream.receive_json()
    if "no" in answer:
        raise Lacks(str(answer["no"])[:200])
    return answer


def _fields(part: Part) -> dict[str, Any]:
    return {
        "of": part.key,
        "file": part.number,
        "offset": part.offset,
        "size": part.size,
        "behind": part.is_behind,
    }


# --- answering ------------------------------------------------------------------------------------


def answer_all(stream: FileStream, offers: Offers, stand_back: Callable[[], bool]) -> None:
    """Answer until the other side closes. stand_back: see `Pace`.

    Raises Gone, Stranger.
    """
    way = _Way(offers, Pace(stand_back, FRAME_BYTES), memoryview(bytearray(FRAME_BYTES)))
    while True:
        request = stream.receive_json()
        try:
            kind, offer = request.get("ask"), offers.get(request.get("of"))
            if kind == "list":
                _send_list(stream, offer)
            elif kind == "part":
                _send_part(stream, offer, request, way)
            elif kind == "digest":
                _send_digest(stream, offer, request)
            else:
                raise Stranger("what it asks is no question about files")
        except Lacks as refusal:
            stream.send_json({"no": str(refusal)})


def _send_list(stream: FileStream, offer: Offer) -> None:
    text = json.dumps([[name, offer.size(name)] for name in offer.names]).encode()
    stream.send_json({"size": len(text)})
    for start in range(0, len(text), FRAME_BYTES):
        stream.send(text[start : start + FRAME_BYTES])


@dataclass(frozen=True)
class _Way:
    """How parts are sent."""

    offers: Offers
    pace: Pace
    buffer: memoryview

    def is_offered(self, key: str, offer: Offer) -> bool:
        with contextlib.suppress(Lacks):
            return self.offers.get(key) is offer
        return False


def _send_part(stream: FileStream, offer: Offer, request: dict[str, Any], way: _Way) -> None:
    """The part in frames; an empty one where the file ends too early or is not offered any more."""
    offset, left = _count(request, "offset"), _count(request, "size")
    is_behind = request.get("behind") is True
    frame = FRAME_BYTES
    try:
        with _path(offer, request).open("rb", buffering=0) as file:
            file.seek(offset)
            stream.send_json({})
            while left:
                if is_behind:
                    frame = way.pace.next_frame()
                    stream.limit_queue(way.pace.queue)
                size = 0
                if way.is_offered(request["of"], offer):
                    with contextlib.suppress(OSError):
                        size = file.readinto(way.buffer[: min(frame, left)]) or 0
                stream.send(way.buffer[:size])
                if size == 0:
                    return
                left -= size
                if is_behind:
                    way.pace.sent(size)
    except OSError as error:
        raise Lacks(f"it cannot read the file ({error.strerror or error})") from error


def _send_digest(stream: FileStream, offer: Offer, request: dict[str, Any]) -> None:
    digest, shown = hashlib.sha256(), time.monotonic()
    try:
        with _path(offer, request).open("rb", buffering=0) as file:
            while chunk := file.read(READ_BYTES):
                digest.update(chunk)
                if time.monotonic() > shown + ALIVE_S:
                    stream.send_json({"digest": ""})
                    shown = time.monotonic()
    except OSError as error:
        raise Lacks(f"it cannot read the file ({error.strerror or error})") from error
    stream.send_json({"digest": digest.hexdigest()})


def _path(offer: Offer, request: dict[str, Any]) -> Path:
    number = _count(request, "file")
    if number >= len(offer.names):
        raise Lacks("it has no such file")
    return offer.folder / offer.names[number]


def _count(message: dict[str, Any], name: str) -> int:
    """A number of a message. Raises Stranger."""
    value = message.get(name)
    if not isinstance(value, int) or not is_count(value):
        raise Stranger(f"what it sent has no {name}")
    return value
