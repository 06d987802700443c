"""The main machine of an elastic launch, over real sockets of this machine."""

from __future__ import annotations

import asyncio
import contextlib
import socket

import pytest

from p2p_llm_forge.peers.elastic_main import MainMachine, as_member
from p2p_llm_forge.peers.elastic_rounds import Rounds
from p2p_llm_forge.peers.signed_stream import Gone, SignedStream, Stranger

SECRET = b"of this cluster, and of no other"
SILENT = b"nothing at all is said"
ELSEWHERE = "127.0.0.2"  # no interface of this machine has it, though Linux lets it be used
WAIT_S = 30.0
JOIN = {"type": "join", "address": "10.0.0.1", "processes": 1, "is_main": True}


def with_main(course, lost_after_s=WAIT_S):
    """Run `course(connect, said)` beside a main machine; connect() gives a greeted stream."""

    async def run():
        said = []
        rounds = Rounds(
            token="token",
            min_peers=1,
            max_peers=None,
            last_call_s=0.0,
            join_timeout_s=60.0,
            max_restarts=1,
            say=said.append,
        )
        main = MainMachine(rounds, SECRET, lost_after_s)
        listener = socket.create_server(("127.0.0.1", 0))
        serving = asyncio.ensure_future(main.serve(listener))

        async def connect(secret=SECRET, local_addr=None):
            where = listener.getsockname()
            streams = await asyncio.open_connection(*where, local_addr=local_addr)
            if secret is SILENT:
                return streams
            stream = SignedStream(*streams, is_server=False)
            await stream.greet(secret, WAIT_S)
            return stream

        try:
            return await course(connect, said)
        finally:
            serving.cancel()

    return asyncio.run(run())


async def next_of(stream, kind):
    while (message := await stream.receive(WAIT_S))["type"] != kind:
        pass
    return message


def test_a_machine_starts_ends_and_the_launch_with_it():
    async def course(connect, said):
        stream = await connect()
        stream.send(JOIN)
        stream.send({"type": "idle", "port": 29999, "status": None})
        start = await next_of(stream, "start")
        stream.send({"type": "idle", "port": 29999, "status": 0})
        return start, await next_of(stream, "end")

    start, end = with_main(course)
    assert (start["world_size"], start["main_address"]) == (1, "10.0.0.1") and end["status"] == 0


def test_a_stranger_is_named_once_and_changes_nothing():
    async def course(connect, said):
        stream = await connect()
        stream.send(JOIN)
        for _ in range(2):
            with pytest.raises(Stranger):
                await connect(b"a guess that is wrong")
        stream.send({"type": "idle", "port": 29999, "status": None})
        await next_of(stream, "start")
        return said

    said = with_main(course)
    assert len([line for line in said if "refused a connection from 127.0.0.1" in line]) == 1


def only_linux_has_it():
    try:
        socket.create_server((ELSEWHERE, 0)).close()
    except OSError:
        pytest.skip(f"this system does not have {ELSEWHERE}")


def test_silent_strangers_keep_nobody_out_and_are_named_once():
    only_linux_has_it()

    async def course(connect, said):
        silent = [await connect(SILENT, (ELSEWHERE, 0)) for _ in range(120)]
        silent += [await connect(SILENT) for _ in range(20)]  # of this machine
        for reader, _ in silent[8:120]:
            with contextlib.suppress(ConnectionError):
                await asyncio.wait_for(reader.read(), WAIT_S)  # until it is refused
        for place in (None, ("127.0.0.3", 0)):
            await connect(local_addr=place)
        return said

    (line,) = [line for line in with_main(course) if ELSEWHERE in line]
    assert line.startswith(f"refused a connection from {ELSEWHERE}: too many connections")


def test_a_look_at_the_port_is_no_stranger_and_counts_only_while_it_lasts():
    only_linux_has_it()

    async def course(connect, said):
        for _ in range(20):
            reader, writer = await connect(SILENT, (ELSEWHERE, 0))
            writer.write_eof()
            await asyncio.wait_for(reader.read(), WAIT_S)
        await connect(local_addr=(ELSEWHERE, 0))
        return said

    assert with_main(course) == []


def test_a_stranger_that_says_nothing_is_named(monkeypatch):
    monkeypatch.setattr("p2p_llm_forge.peers.elastic_main.GREETING_S", 0.1)

    async def course(connect, said):
        reader, _ = await connect(SILENT)
        await asyncio.wait_for(reader.read(), WAIT_S)
        return said

    (line,) = with_main(course)
    assert line.startswith("refused a connection from 127.0.0.1: no sign of life")


def test_machines_with_other_numbers_of_processes_are_sent_away():
    async def course(connect, said):
        main, other = await connect(), await connect()
        main.send(JOIN)
        main.send({"type": "idle", "port": 29999, "status": None})
        await next_of(main, "start")
        other.send({**JOIN, "address": "10.0.0.2", "is_main": False, "processes": 2})
        return await next_of(other, "end")

    end = with_main(course)
    assert end["status"] == 2 and "--processes 2, the others with 1" in end["reason"]


def test_a_machine_that_falls_silent_is_lost():
    async def course(connect, said):
        main, other = await connect(), await connect()
        main.send(JOIN)
        other.send({**JOIN, "address": "10.0.0.2", "is_main": False})
        other.send({"type": "idle", "port": 29999, "status": None})
        main.send({"type": "idle", "port": 29999, "status": None})
        while (await next_of(main, "start"))["world_size"] == 1:  # the other came a moment later
            await next_of(main, "stop")
            main.send({"type": "idle", "port": 29999, "status": 143})

        async def beat():
            while True:
                main.send({"type": "alive"})
                await asyncio.sleep(0.05)

        beating = asyncio.ensure_future(beat())
        stop = await next_of(main, "stop")
        beating.cancel()
        return stop

    stop = with_main(course, lost_after_s=1.0)
    assert stop["reason"].startswith("lost a peer: 10.0.0.2: no sign of life")


@pytest.mark.parametrize(
    "wrong",
    [
        {"address": "\x1b[2J"},
        {"address": None},
        {"processes": "many"},
        {"processes": 0},
        {"processes": 10**9},
        {"processes": float("inf")},
        {"processes": 1.5},
        {"processes": True},
        {"address": 5},
        {"address": "fe80::1%\x1b[31m\nerror: your disk is broken"},
        {"address": "fe80::1%eth0\n"},
        {"address": "fe80::1%" + "x" * 16},
    ],
)
def test_a_machine_that_says_nonsense_is_a_stranger(wrong):
    with pytest.raises(Stranger):
        as_member({**JOIN, **wrong}, SignedStreamOfNobody())


@pytest.mark.parametrize("address", ["10.0.0.1", "fd00::1", "fe80::1%eth0", "fe80::1%br-lan.2"])
def test_a_machine_has_its_address(address):
    assert as_member({**JOIN, "address": address}, SignedStreamOfNobody()).address == address


class SignedStreamOfNobody:
    send = None


@pytest.mark.parametrize("nonsense", [{"status": "0"}, {"port": []}])
def test_a_member_that_sends_nonsense_is_put_out(nonsense):
    async def course(connect, said):
        stream = await connect()
        stream.send(JOIN)
        stream.send({"type": "idle", "port": 1, "status": 0, **nonsense})
        with pytest.raises(Gone):
            while True:
                await stream.receive(WAIT_S)
        return said

    assert "no message of a launcher" in " ".join(with_main(course))
