"""Upload a run to the Hub of Hugging Face: model, card, pictures, figures; nothing else of it.

A failed upload never fails a run. A name on the Hub that was not uploaded from the run's folder is
taken, and left alone. What a library or the Hub says is shown without the token.
"""

from __future__ import annotations

import contextlib
import json
import re
import secrets
import shlex
import shutil
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path

from p2p_llm_forge.config import TrainConfig
from p2p_llm_forge.config.lora import BASE, CONFIG
from p2p_llm_forge.config.sharing import hub_name
from p2p_llm_forge.errors import ForgeError, quoted
from p2p_llm_forge.files import link, read_json, write_json
from p2p_llm_forge.peers.launch import rank_and_world_size
from p2p_llm_forge.training.results import RESULTS, TrainResult
from p2p_llm_forge.training.run_record import CHECKPOINT, METRICS, RunRecord

CARD = "README.md"
FIGURES = (METRICS, "samples.jsonl", "loss.png", "peers.png")  # beside the card, at any time
# Names of the Hub to which this folder was uploaded. It is on no record, so that it outlives
# --overwrite: the next run of this folder may follow the last one there.
UPLOADED = "uploaded.json"
OF_HUB = (".gitattributes",)  # what the Hub itself puts into a new model
OF_WEIGHTS = (".safetensors", ".safetensors.index.json", "adapter_config.json")
LOOK_S = 10.0  # for a look at the Hub before a run
LONGEST_REASON = 300  # characters
ONE_UPLOAD = threading.Lock()  # the upload at the end waits for that of a checkpoint

Content = dict[str, Path | bytes]  # what is uploaded, by its name there


# --- before a run ---------------------------------------------------------------------------------


def require_login(config: TrainConfig) -> None:
    """Raise ForgeError where an upload is asked for that this machine cannot make. Asks nobody."""
    if config.push_to_hub is None:
        return
    from huggingface_hub import constants, get_token

    without = "leave out --push-to-hub: a finished run can be uploaded later"
    if constants.HF_HUB_OFFLINE:
        raise ForgeError(
            "HF_HUB_OFFLINE is set in the environment, so nothing can be uploaded",
            f"unset it (and TRANSFORMERS_OFFLINE), or {without}",
        )
    if not get_token():
        raise ForgeError(
            f"--push-to-hub {config.push_to_hub}: this machine has no token of the Hub",
            "make one that may write at https://huggingface.co/settings/tokens, then type `hf auth"
            f" login` or set HF_TOKEN to it; or {without}",
        )


def look_at_hub(config: TrainConfig) -> None:
    """See, before hours of training, whether the upload would be refused, and raise ForgeError.

    Prints a warning where the Hub is not reached: the run needs it at its end only.
    """
    if config.push_to_hub is None:
        return
    found: list[Exception | None] = []

    def look() -> None:
        try:
            _require_ours(config, _full_name(config))
            found.append(None)
        except Exception as error:
            found.append(error)

    # In a thread, for looking up the Hub's address keeps to no limit.
    thread = threading.Thread(target=look, daemon=True)
    thread.start()
    thread.join(LOOK_S)
    error = found[0] if found else TimeoutError(f"no answer within {LOOK_S:.0f} s")
    if error is None:
        return
    if refused := _refusal(error, config):
        raise refused
    print(
        f"warning: the Hub was not reached: {_reason(error)}; the upload is tried at the end",
        flush=True,
    )


def _full_name(config: TrainConfig) -> str:
    """OWNER/NAME of the model. Asks the Hub who the token's user is, and what it may do.

    Raises ForgeError where it may not write there.
    """
    from huggingface_hub import HfApi

    name, user = str(config.push_to_hub), HfApi().whoami()
    token = (user.get("auth") or {}).get("accessToken") or {}
    if token.get("role") == "read":
        raise ForgeError(
            f"--push-to-hub {name}: this machine's token of the Hub may only read",
            "make one that may write at https://huggingface.co/settings/tokens, and set HF_TOKEN to"
            " it or type `hf auth login`",
        )
    owner, _, last = name.rpartition("/")
    owners = [user["name"], *(one["name"] for one in user.get("orgs") or ())]
    if owner and owner.lower() not in {one.lower() for one in owners}:
        raise ForgeError(
            f"--push-to-hub {name}: the token is of {quoted(user['name'])}, who does not belong to"
            f" {owner}",
            f"use --push-to-hub {user['name']}/{last}",
        )
    return name if owner else f"{user['name']}/{name}"


def _require_ours(config: TrainConfig, name: str) -> None:
    """Raise ForgeError where the Hub has another model of this name, or shows it to everybody."""
    from huggingface_hub import HfApi
    from huggingface_hub.errors import RepositoryNotFoundError

    try:
        there = HfApi().model_info(name)
    except RepositoryNotFoundError:
        return
    files = {one.rfilename for one in there.siblings or ()} - {*OF_HUB}
    if files and name not in uploaded_to(Path(config.output_dir)):
        raise ForgeError(
            f"--push-to-hub {name}: the Hub has a model of that name already, which was not"
            f" uploaded from {config.output_dir}",
            "choose another name, or delete that model on its page",
        )
    if config.private and not there.private:
        raise ForgeError(
            f"--push-to-hub {name}: everybody sees that model, and --private was asked for",
            "make it private on its page (Settings), or choose another name",
        )


def uploaded_to(output_dir: Path) -> list[str]:
    """The names of the Hub to which the folder was uploaded."""
    with contextlib.suppress(OSError, ValueError):
        return list(read_json(output_dir / UPLOADED, {"names": [str]})["names"])
    return []


# --- uploading ------------------------------------------------------------------------------------


def push(config: TrainConfig) -> str:
    """Upload the finished run of `--output-dir`; returns its address. Raises ForgeError."""
    require_login(config)
    folder = Path(config.output_dir)
    result, record = TrainResult.load(folder), RunRecord.read(folder)
    if result is None or record is None or not result.is_published:
        raise ForgeError(
            f"--output-dir {folder} holds no finished run, so there is nothing to upload",
            "give the folder of a finished run, or train with --dataset-path",
        )
    content: Content = {
        name: folder / name
        for name in sorted(record.wrote)
        if "/" not in name and not CHECKPOINT.fullmatch(name)
        if (folder / name).is_file() and not (folder / name).is_symlink()
    }
    content |= _figures_in(folder)
    # Where it lies on this machine is nobody else's business.
    shown = vars(result) | {"output_dir": folder.resolve().name}
    content[RESULTS] = json.dumps(shown, indent=2, sort_keys=True).encode()
    with ONE_UPLOAD:
        return _upload(config, content, f"After {result.steps:,} updates")


def push_finished(config: TrainConfig) -> TrainResult:
    """Upload the finished run of `--output-dir` and do nothing else. Raises ForgeError."""
    if rank_and_world_size()[0] == 0 and not config.rank:
        print(f"uploaded  {push(config)}", flush=True)
    result = TrainResult.load(Path(config.output_dir))
    return result or TrainResult(config.output_dir, 0, 0, None, None, 1)  # of another machine


def push_at_end(config: TrainConfig) -> None:
    """Upload the run that has just ended, if asked to, and print what came of it."""
    if config.push_to_hub is None:
        return
    print(f"uploading to the Hub as {config.push_to_hub}; the run itself is complete", flush=True)
    try:
        print(f"uploaded  {push(config)}", flush=True)
    except ForgeError as error:
        one = error.problems[0]
        print(
            f"warning: not uploaded: {one.found}\n  fix: {one.fix}\n  then: {later(config)}",
            flush=True,
        )


def later(config: TrainConfig) -> str:
    """The line that uploads the finished run, without training again."""
    is_script = Path(sys.argv[0]).name == "train.py"
    words = ["python", *([sys.argv[0]] if is_script else ["-m", "p2p_llm_forge"])]
    words += ["--output-dir", config.output_dir, "--push-to-hub", str(config.push_to_hub)]
    return shlex.join([*words, *(["--private"] if config.private else [])])


def _figures_in(folder: Path) -> Content:
    """The figures and pictures of a run, as they are now."""
    there = [folder / name for name in FIGURES]
    return {path.name: path.read_bytes() for path in there if path.is_file()}


def _upload(config: TrainConfig, content: Content, message: str) -> str:
    """Make one commit of the content; returns the model's address. Raises ForgeError."""
    try:
        with _quiet():
            return _commit(config, content, message)
    except Exception as error:  # of the network, of HTTP, of the Hub, of a library
        raise _refusal(error, config) or _failure(error, config) from None


def _commit(config: TrainConfig, content: Content, message: str) -> str:
    from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi

    api, name, folder = HfApi(), _full_name(config), Path(config.output_dir)
    content = without_paths(content)
    _require_ours(config, name)
    url = str(api.create_repo(name, private=config.private or None, exist_ok=True))
    names = uploaded_to(folder)
    if name not in names:
        write_json(folder / UPLOADED, {"names": [*names, name]})
    there = [one.rfilename for one in api.model_info(name).siblings or ()]
    # Weights of an upload before that would be read beside these.
    old = [one for one in there if one.endswith(OF_WEIGHTS) and one not in content]
    additions = [CommitOperationAdd(path, source) for path, source in content.items()]
    deletions = [CommitOperationDelete(path) for path in old]
    api.create_commit(name, [*additions, *deletions], commit_message=message)
    return url


def without_paths(content: Content) -> Content:
    """The content; adapters call their base by a name, not by its path on this machine."""
    named = {}
    for file, key in ((CONFIG, "base_model_name_or_path"), (BASE, "name")):
        path = content.get(file)
        if isinstance(path, Path):
            values = read_json(path, {key: str})
            name = hub_name(values[key]) or Path(values[key]).name
            named[file] = json.dumps({**values, key: name}, indent=2).encode()
    return {**content, **named}


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """Without the bars of huggingface_hub, where they would come between lines of a log."""
    from huggingface_hub.utils import (
        are_progress_bars_disabled,
        disable_progress_bars,
        enable_progress_bars,
    )

    is_watched = sys.stderr is not None and sys.stderr.isatty()
    in_background = threading.current_thread() is not threading.main_thread()
    if are_progress_bars_disabled() or (is_watched and not in_background):
        yield
        return
    disable_progress_bars()
    try:
        yield
    finally:
        enable_progress_bars()


# --- what went wrong ------------------------------------------------------------------------------


def _refusal(error: Exception, config: TrainConfig) -> ForgeError | None:
    """What a user can fix of an error, whenever it is tried again; None for all others."""
    if isinstance(error, ForgeError):
        return error
    name = config.push_to_hub
    status = getattr(getattr(error, "response", None), "status_code", None)
    if status == 401:
        return ForgeError(
            f"--push-to-hub {name}: the Hub does not know this machine's token: {_reason(error)}",
            "make one that may write at https://huggingface.co/settings/tokens, and set HF_TOKEN to"
            " it or type `hf auth login`",
        )
    if status == 403:
        return ForgeError(
            f"--push-to-hub {name}: the token may not write there: {_reason(error)}",
            "give the token that right at https://huggingface.co/settings/tokens, or use a name of"
            " your own",
        )
    return None


def _failure(error: Exception, config: TrainConfig) -> ForgeError:
    """An error that may be gone when it is tried again."""
    return ForgeError(
        f"the upload to {config.push_to_hub} failed: {_reason(error)}",
        "see that the network and the Hub are there (https://status.huggingface.co), and try again",
    )


def _reason(error: BaseException) -> str:
    """What an error says: one line, in quotes, and never the token."""
    response = getattr(error, "response", None)
    status = f"HTTP {response.status_code}: " if response is not None else ""
    text = getattr(error, "server_message", None) or str(error) or "no reason given"
    if not status:
        text = f"{type(error).__name__}: {text}"
    return quoted(without_tokens(status + text), LONGEST_REASON)


def without_tokens(text: str) -> str:
    """A text without what may be a token: this machine's, or anything that looks like one."""
    from huggingface_hub import get_token

    with contextlib.suppress(Exception):
        if token := get_token():
            for form in (token, repr(token)[1:-1], ascii(token)[1:-1]):
                text = text.replace(form, "TOKEN")
    return re.sub(r"hf_\w{4,}|(?i:bearer)\s+[^\s'\"]+", "TOKEN", text)


# --- at checkpoints -------------------------------------------------------------------------------


class Uploads:
    """Uploads checkpoints while training continues; those that come during an upload are left out.

    Lives on the main process. say: shows a line.
    """

    def __init__(self, config: TrainConfig, say: Callable[[str], None]) -> None:
        self._config, self._say = config, say

    def start(self, step: int, saved: Path, names: list[str], card: str) -> None:
        """Upload these files of a checkpoint that is complete, with a card. Raises nothing."""
        if not ONE_UPLOAD.acquire(blocking=False):
            self._say(f"note      step {step} is not uploaded: the one before it still is")
            return
        # Not in its own folder, from which it may be pruned meanwhile.
        kept = saved.parent / f"tmp-uploaded-{step}-{secrets.token_hex(4)}"
        try:
            kept.mkdir()
            for name in names:
                link(saved / name, kept / name)
        except OSError as error:
            shutil.rmtree(kept, ignore_errors=True)
            ONE_UPLOAD.release()
            self._say(f"warning: step {step} is not uploaded: {error}; training continues")
            return
        threading.Thread(target=self._upload, args=(step, kept, card), daemon=True).start()

    def _upload(self, step: int, kept: Path, card: str) -> None:
        try:
            content: Content = {path.name: path for path in sorted(kept.iterdir())}
            content |= {CARD: card.encode(), **_figures_in(kept.parent)}
            url = _upload(self._config, content, f"Step {step:,}")
            self._say(f"uploaded  step {step} to {url}")
        except (ForgeError, OSError) as error:
            self._say(f"warning: step {step} is not uploaded: {error}; training continues")
        finally:
            ONE_UPLOAD.release()
            shutil.rmtree(kept, ignore_errors=True)
