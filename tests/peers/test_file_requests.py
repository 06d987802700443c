"""A rank answers about what it has offered, and about nothing else."""

from __future__ import annotations

import hashlib
import json
import socket
import threading

import pytest

from p2p_llm_forge.peers.file_requests import (
    Lacks,
    Offers,
    Part,
    answer_all,
    ask_for_digest,
    ask_for_list,
    ask_for_part,
)
from p2p_llm_forge.peers.file_stream import FRAME_BYTES, FileStream
from p2p_llm_forge.peers.signed_stream import Gone, Stranger

BUFFER = memoryview(bytearray(FRAME_BYTES))


class Served:
    """One that asks, and how often the one that answers has stood back."""

    def __init__(self, tmp_path) -> None:
        self.offers, self.stood_back, self.ended = Offers(), 0, None
        near, far = socket.socketpair()
        self.stream, self._answering = FileStream(near, None, None), FileStream(far, None, None)
        near.settimeout(30)
        self._thread = threading.Thread(target=self._answer)
        self._thread.start()
        self.folder = tmp_path / "offered"
        (self.folder / "sub").mkdir(parents=True)
        (tmp_path / "secret").write_text("not offered")
        (self.folder / "b").write_bytes(bytes(range(256)) * 4000)
        (self.folder / "sub/a").write_text("short")
        (self.folder / "hidden").write_text("not offered either")
        self.offers.add("key", self.folder, ["sub/a", "b", "gone"])

    def _answer(self) -> None:
        def stand_back():
            self.stood_back += 1
            return True

        try:
            answer_all(self._answering, self.offers, stand_back)
        except (Gone, Stranger) as error:
            self.ended = error
        finally:
            self._answering.close()

    def part(self, *part) -> bytes:
        content = bytearray()

        def write(at, frame):
            assert at == part[2] + len(content)
            content.extend(frame)

        ask_for_part(self.stream, Part(*part), write, BUFFER)
        return bytes(content)

    def end(self):
        self.stream.close()
        self._thread.join()


@pytest.fixture
def served(tmp_path):
    made = Served(tmp_path)
    yield made
    made.end()


def test_names_and_sizes_are_listed_and_parts_and_hashes_given(served):
    content = (served.folder / "b").read_bytes()
    assert ask_for_list(served.stream, "key") == {
        "b": (0, 1_024_000), "gone": (1, -1), "sub/a": (2, 5)
    }  # fmt: skip
    assert served.part("key", 2, 0, 5) == b"short"
    assert served.part("key", 0, 0, 1_024_000) == content
    assert served.part("key", 0, 7, 500_001) == content[7:500_008]
    assert ask_for_digest(served.stream, "key", 0) == hashlib.sha256(content).hexdigest()
    assert served.stood_back == 0
    assert served.part("key", 0, 7, 500_001, True) == content[7:500_008]
    assert served.stood_back == 31, "once for each frame of 16 KiB"


def test_a_long_list_arrives_whole(served):
    names = [f"{'n' * 100}/{number:05}" for number in range(6000)]
    served.offers.add("long", served.folder, names)
    listed = ask_for_list(served.stream, "long")
    assert listed == {name: (number, -1) for number, name in enumerate(names)}


def test_what_is_not_offered_is_not_given(served):
    for ask in (
        lambda: ask_for_list(served.stream, "another key"),
        lambda: served.part("another key", 0, 0, 5),
        lambda: served.part("key", 3, 0, 5),
        lambda: served.part("key", 1, 0, 5),
        lambda: ask_for_digest(served.stream, "key", 1),
        lambda: ask_for_digest(served.stream, "key", 2**62),
        lambda: served.part("key", 2, 0, 6),
        lambda: served.part("key", 2, 2**62, 1),
    ):
        with pytest.raises(Lacks):
            ask()
    served.offers.remove("key")
    with pytest.raises(Lacks):
        served.part("key", 0, 0, 5)
    assert served.ended is None
    served.offers.add("key", served.folder, ["sub/a"])
    assert served.part("key", 0, 0, 5) == b"short", "it goes on answering"


@pytest.mark.parametrize(
    "question",
    [
        {"ask": "part", "of": "key", "file": "../secret", "offset": 0, "size": 5},
        {"ask": "part", "of": "key", "file": -1, "offset": 0, "size": 5},
        {"ask": "part", "of": "key", "file": True, "offset": 0, "size": 5},
        {"ask": "part", "of": "key", "file": 0, "offset": -5, "size": 5},
        {"ask": "part", "of": "key", "file": 0, "offset": 0, "size": 1e3},
        {"ask": "digest", "of": "key"},
        {"ask": "delete", "of": "key"},
        {"of": "key"},
    ],
)
def test_what_is_no_question_ends_the_connection(served, question):
    served.stream.send_json(question)
    with pytest.raises(Gone):
        while True:
            served.stream.receive_json()
    served.end()
    assert isinstance(served.ended, Stranger)


@pytest.mark.parametrize("key", [["key"], {"a": 1}, None, 5])
def test_a_key_that_is_no_text_is_none(served, key):
    served.stream.send_json({"ask": "list", "of": key})
    assert "no" in served.stream.receive_json()


@pytest.mark.parametrize("text", ["{}", "[1]", '[["a"]]', "[", '[["a", "b"]]', '[["a", null]]'])
def test_a_list_that_is_none_is_refused(text):
    near, far = socket.socketpair()
    far_stream = FileStream(far, None, None)
    far_stream.send_json({"size": len(text)})
    far_stream.send(text.encode())
    with pytest.raises(Stranger, match="list"):
        ask_for_list(FileStream(near, None, None), "key")


@pytest.mark.parametrize("frames", [[b""], [b"[", b"]"], [b"[]", b""]])
def test_a_list_comes_in_no_more_frames_than_it_needs(frames):
    """Else a rank could send empty ones for ever."""
    near, far = socket.socketpair()
    near.settimeout(30)
    far_stream = FileStream(far, None, None)
    far_stream.send_json({"size": 3})
    for frame in frames:
        far_stream.send(frame)
    far.shutdown(socket.SHUT_WR)
    with pytest.raises(Stranger, match="its list of files is cut up"):
        ask_for_list(FileStream(near, None, None), "key")


def test_more_than_was_asked_for_is_refused():
    near, far = socket.socketpair()
    far_stream, written = FileStream(far, None, None), []
    far_stream.send_json({})
    far_stream.send(b"123456")
    with pytest.raises(Stranger, match="more than it was asked for"):
        ask_for_part(
            FileStream(near, None, None), Part("key", 0, 0, 5), lambda *w: written.append(w), BUFFER
        )
    assert not written
    assert json.loads(far.recv(1000)[4:])["size"] == 5
