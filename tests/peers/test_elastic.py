"""One machine's place in an elastic launch, and who may be there."""

from __future__ import annotations

import asyncio
import socket

import pytest

from p2p_llm_forge.errors import ForgeError
from p2p_llm_forge.peers.elastic import ElasticLaunch, find_place, run_elastic, say
from tests.ports import free_port

HERE, ELSEWHERE = "127.0.0.1", "192.0.2.1"  # the second is for documentation only (RFC 5737)


@pytest.fixture
def outward(monkeypatch):
    """An address of this machine that others could reach, as the routes see it."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as probe:
        try:
            probe.connect(("10.255.255.255", 9))
        except OSError:
            pytest.skip("needs an interface beside loopback")
        return probe.getsockname()[0]


@pytest.fixture
def secret(tmp_path):
    file = tmp_path / "cluster.secret"
    file.write_text("of this cluster, and of no other")
    file.chmod(0o600)
    return str(file)


def launch(main, **settings):
    return ElasticLaunch(script=["train.py"], main=main, port=free_port(), **settings)


def test_loopback_needs_no_secret():
    place = find_place(launch(HERE))
    assert (place.own, place.is_main, place.secret) == (HERE, True, None)


def test_another_address_needs_a_secret(outward, secret):
    with pytest.raises(ForgeError, match="has no secret") as raised:
        find_place(launch(outward, allow_public_address=True))
    assert "--secret-file" in raised.value.problems[0].fix
    place = find_place(launch(outward, secret_file=secret, allow_public_address=True))
    assert place.is_main and place.own == outward and place.secret
    open_to_all = {"allow_unauthenticated": True, "allow_public_address": True}
    assert find_place(launch(outward, **open_to_all)).secret is None


def test_a_public_address_is_refused_with_a_secret_too(secret):
    public = "8.8.8.8"
    with pytest.raises(ForgeError, match="public address"):
        find_place(launch(public, secret_file=secret))


def test_a_name_that_means_nothing(secret):
    with pytest.raises(ForgeError, match="means nothing"):
        find_place(launch("nowhere.invalid", secret_file=secret))


def test_a_main_machine_that_does_not_come_is_named(outward, secret):
    settings = launch(ELSEWHERE, secret_file=secret, join_timeout=0.2, allow_public_address=True)
    with pytest.raises(ForgeError, match=f"did not come to {ELSEWHERE}:{settings.port}"):
        run_elastic(settings)


@pytest.mark.parametrize(("says", "found"), [(b"", "ends the connection"), (b"no!!", "not the")])
def test_another_program_at_the_main_port_is_named(says, found):
    settings = launch(HERE, join_timeout=0.2)

    async def run():
        async def answer(reader, writer):
            writer.write(says)
            writer.close()

        server = await asyncio.start_server(answer, HERE, settings.port)
        async with server:
            await asyncio.to_thread(run_elastic, settings)

    with pytest.raises(ForgeError, match=found):
        asyncio.run(run())


def test_what_is_said_is_one_line_whoever_wrote_it(capsys):
    say("lost fe80::1%\x1b[31m\nerror: your disk is broken" + "x" * 10**5)
    printed = capsys.readouterr().out
    assert printed.startswith("elastic: lost fe80::1% error: your") and "\x1b" not in printed
    assert printed.count("\n") == 1 and len(printed) < 3000
