"""Start a run on machines that come and go. The same line on every machine:

    python launch/elastic.py --main 10.0.0.1 --secret-file cluster.secret \\
        train.py --dataset-path data/prepared/x --output-dir artifacts/x --resume auto

The machine that has the address 10.0.0.1 is the main one, and has to stay. When another is lost,
or one comes (back), the workers of all are started again, and resume. Ctrl-C takes this machine
out, after all have saved. Flags of this script stand before train.py, those of train.py after it.
"""

from __future__ import annotations

import argparse
import difflib
import math
import re
import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parent.parent))

from p2p_llm_forge.config.other_names import (
    Meaning,
    Typed,
    all_of,
    answer,
    key_of,
    renamed,
    translated,
    typed_in,
)
from p2p_llm_forge.errors import ForgeError, Problems, run_script
from p2p_llm_forge.peers.elastic import DEFAULT_PORT, ElasticLaunch, run_elastic
from p2p_llm_forge.peers.launcher import value_of

AT_LEAST = {"port": 1, "processes": 1, "min_peers": 1, "max_peers": 1, "max_restarts": 0}
ABOVE_0 = ("last_call", "join_timeout", "lost_after")


class Parser(argparse.ArgumentParser):
    """Raises ForgeError where argparse would print a usage and exit."""

    def error(self, message: str) -> None:  # type: ignore[override]
        unknown = re.match(r"unrecognized arguments: (--?[\w-]+)", message)
        found = f"unknown argument {unknown[1]}" if unknown else message
        raise ForgeError(found, self.nearest(unknown[1] if unknown else ""))

    def nearest(self, flag: str) -> str:
        """A fix: the few flags that look most like this one."""
        known = [name for action in self._actions for name in action.option_strings]
        alike = difflib.get_close_matches(flag.replace("_", "-"), known)
        see = "see launch/elastic.py --help"
        return f"did you mean {' or '.join(alike)}? Else {see}" if alike else see


def on_one_screen(prog: str) -> argparse.HelpFormatter:
    """A line of at most 100 columns for each flag."""
    return argparse.RawDescriptionHelpFormatter(prog, max_help_position=28, width=101)


def _peers(typed: Typed) -> list[str]:
    """Machines as torchrun writes them: so many, or from:to."""
    least, _, most = typed.value.partition(":")
    return ["--min-peers", least, "--max-peers", most or least]


def _endpoint(typed: Typed) -> list[str]:
    address, colon, port = typed.value.rpartition(":")
    return ["--main", address, "--port", port] if colon else ["--main", typed.value]


OF_TORCHRUN = {
    "nnodes": Meaning(_peers),
    "rdzv_endpoint": Meaning(_endpoint),
    "nproc_per_node": renamed("--processes"),
    "master_addr": renamed("--main"),
    "master_port": renamed("--port"),
    "cluster_secret_file": renamed("--secret-file"),
    "main_process_ip": renamed("--main"),
    "main_process_port": renamed("--port"),
    "num_processes": answer("use --processes N, of each machine"),
    "num_machines": answer("use --min-peers N, and --max-peers N if more shall wait"),
    **all_of(
        "node_rank machine_rank rdzv_id rdzv_backend rdzv_conf standalone start_method",
        answer("leave it out: --main says which machine all meet at"),
    ),
}


def make_parser() -> Parser:
    """The flags that stand before the script."""
    usage = "launch/elastic.py --main ADDRESS [--FLAG VALUE ...] train.py [ITS FLAGS]"
    parser = Parser("launch/elastic.py", usage, __doc__, formatter_class=on_one_screen)
    add = parser.add_argument
    parser.allow_abbrev = False
    add("--help-all", action="help", help="this page: it shows all flags")
    add("--main", metavar="ADDRESS", help="of the main machine, as all reach it")
    add("--port", type=int, default=DEFAULT_PORT, help="that is free there (default: %(default)s)")
    add("--secret-file", metavar="FILE", help="with a secret that all machines must know")
    add(
        "--allow-unauthenticated",
        action="store_true",
        help="without a secret beyond this machine: whoever reaches the port can join, or end it",
    )
    add(
        "--allow-public-address",
        action="store_true",
        help="an address that the internet can reach, because a firewall guards it",
    )
    add("--processes", type=int, default=1, help="on each machine (default: %(default)s)")
    add("--min-peers", type=int, default=1, help="machines to begin with (default: %(default)s)")
    add("--max-peers", type=int, help="machines that take part; further ones wait (default: all)")
    seconds = {"type": float, "metavar": "SECONDS"}
    add(
        "--last-call",
        **seconds,
        default=5.0,
        help="wait for further machines after one came (default: %(default)s)",
    )
    add(
        "--join-timeout",
        **seconds,
        default=600.0,
        help="wait for the main machine, and for --min-peers (default: %(default)s)",
    )
    add(
        "--lost-after",
        **seconds,
        default=8.0,
        help="a machine is lost when its launcher shows no sign of life (default: %(default)s)",
    )
    add(
        "--max-restarts",
        type=int,
        default=10,
        help="after failures in a row, where no machine was lost (default: %(default)s)",
    )
    add("script", nargs=argparse.REMAINDER, help="train.py and its flags")
    return parser


def in_our_words(words: list[str], problems: Problems) -> list[str]:
    """The words before the script with dashes, and with torchrun's names as ours."""
    end = next((at for at, word in enumerate(words) if word.endswith(".py")), len(words))
    own = [action for action in make_parser()._actions if action.option_strings]
    dashed = {
        key_of(name): renamed(name, is_switch=action.nargs == 0)
        for action in own
        for name in action.option_strings
        if key_of(name)
    }

    def answered(flag: str, fix: str) -> None:
        problems.require(False, f"launch/elastic.py has no {flag}", fix)

    head = words[:end]
    return translated(head, dashed | OF_TORCHRUN, typed_in(head), answered) + words[end:]


def parse(words: list[str]) -> ElasticLaunch:
    """The launch that a command line asks for. Raises one ForgeError with all problems."""
    problems = Problems()
    parser = make_parser()
    try:
        given = parser.parse_args(in_our_words(words, problems))
    except ForgeError as error:
        problems.add(error)
        raise ForgeError.of(problems.found) from None
    script = given.script
    if script and script[0].startswith("-"):
        flag = script[0].partition("=")[0]
        problems.require(False, f"unknown argument {flag}", parser.nearest(flag))
    else:
        problems.require(bool(script), "no script to start", "add train.py and its flags")
        is_there = not script or Path(script[0]).is_file()
        problems.require(is_there, f"{(script or [''])[0]}: no such file", "check the path")
    problems.require(bool(given.main), "--main is missing", "add --main and the main address")
    for name, least in AT_LEAST.items():
        value = getattr(given, name)
        flag = "--" + name.replace("_", "-")
        problems.require(
            value is None or value >= least, f"{flag} is {value}", f"use {least} or more"
        )
    problems.require(given.port < 65536, f"--port is {given.port}", "use a port below 65536")
    for name in ABOVE_0:
        value, flag = getattr(given, name), "--" + name.replace("_", "-")
        problems.require(
            math.isfinite(value) and value > 0, f"{flag} is {value}", "use a number above 0"
        )
    most = given.max_peers
    problems.require(
        most is None or most >= given.min_peers,
        f"--max-peers {most} is below --min-peers {given.min_peers}",
        f"use --max-peers {given.min_peers} or more",
    )
    problems.raise_any()
    return with_secret(ElasticLaunch(**vars(given)))


def with_secret(launch: ElasticLaunch) -> ElasticLaunch:
    """The launch with one secret for launcher and script, whichever of the two was given it."""
    settings, script = dict(vars(launch)), list(launch.script)
    of_script = value_of("cluster_secret_file", script)
    settings["secret_file"] = launch.secret_file or of_script or None
    if launch.secret_file and not of_script:
        script += ["--cluster-secret-file", launch.secret_file]
    is_public = any(word.replace("_", "-") == "--allow-public-address" for word in script)
    if launch.allow_public_address and not is_public:
        script += ["--allow-public-address"]
    settings |= {"script": script, "allow_public_address": launch.allow_public_address or is_public}
    return ElasticLaunch(**settings)


def main() -> int:
    """The command line."""
    return run_elastic(parse(sys.argv[1:]))


if __name__ == "__main__":
    run_script(main)
