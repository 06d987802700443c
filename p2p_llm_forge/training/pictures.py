"""Pictures of a run, drawn from its metrics.jsonl alone: loss.png, and peers.png of several peers.

    python -m p2p_llm_forge.training.pictures artifacts/x     draws those of any run, old or new

Needs matplotlib, which is optional.
"""

from __future__ import annotations

import contextlib
import importlib.util
import math
import shlex
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import numpy as np

from p2p_llm_forge.errors import ForgeError, run_script
from p2p_llm_forge.files import parse_json, write_file
from p2p_llm_forge.shapes import is_count, require_shape
from p2p_llm_forge.training.run_record import LOSS, METRICS, PEERS, put_on_record

SHARE = 0.01  # of the time, at most, that drawing may take while a run trains
FINENESS = 60  # bends that a smoothed curve may show
FEWEST_SMOOTHED = 12  # values; fewer are shown as they are
MOST_POINTS = 4000  # in a curve; more cannot be seen
BLUE, ORANGE, GREEN, GREY = "#1f6fb4", "#e07b00", "#2a8f4f", "#808080"
MOST_NAMED = 8  # ranks that a legend names


def is_installed() -> bool:
    """Whether there is a matplotlib to draw with."""
    return importlib.util.find_spec("matplotlib") is not None


def install_line(package: str) -> str:
    """The command that installs a package where this process would find it, as it is typed."""
    python = shlex.quote(sys.executable)
    if importlib.util.find_spec("pip") is None:  # as in what uv makes
        return f"uv pip install --python {python} {package}"
    return f"{python} -m pip install {package}"


class Pictures:
    """Draws the pictures of a run beside its figures, on the main process.

    may_write: whether a file of that name in the run's folder is this run's to write. say: shows a
    line to the person who watches.
    """

    def __init__(
        self,
        folder: Path,
        may_write: Callable[[str], bool],
        say: Callable[[str], None],
        clock: Callable[[], float] = time.perf_counter,
    ) -> None:
        self._folder, self._may_write, self._say, self._clock = folder, may_write, say, clock
        self._took_s, self._ended, self._drawn_bytes = 0.0, -math.inf, -1
        self._is_broken = False

    def draw_if_due(self) -> None:
        """Draw, unless the last drawing was so recent that drawing would cost more than SHARE."""
        if self._clock() - self._ended >= self._took_s / SHARE:
            self.draw()

    def draw(self) -> None:
        """Draw what metrics.jsonl holds, if that has changed. What fails is said once."""
        with self._surviving():
            size = (self._folder / METRICS).stat().st_size
            if self._is_broken or size == self._drawn_bytes:
                return
            import matplotlib.figure  # noqa: F401 - takes a second, and only once

            began = self._clock()
            for name, image in pictures_of(lines_in(self._folder), self._folder.name).items():
                if self._may_write(name):
                    write_file(self._folder / name, image)
            self._drawn_bytes, self._ended = size, self._clock()
            self._took_s = self._ended - began

    def rehearse(self) -> float:
        """The seconds that a drawing takes, tried with figures as large as they may become."""
        line = {"loss": 1.0, "learning_rate": 1.0, "tokens_per_second": 1.0, "peers": 2}
        lines = [{"step": step, "tokens": step, **line} for step in range(1, MOST_POINTS)]
        began = self._clock()
        with self._surviving():
            pictures_of(lines[:2], "")  # the first has much to load
            began = self._clock()
            pictures_of(lines, "")
        return self._clock() - began

    @contextlib.contextmanager
    def _surviving(self) -> Iterator[None]:
        """Say once that there are no pictures, and continue: none is worth a run."""
        try:
            yield
        except Exception as error:
            self._is_broken = True
            reason = (str(error).strip() or "no reason given").splitlines()[0]
            self._say(f"warning: no pictures ({type(error).__name__}: {reason}); the run continues")


# --- what metrics.jsonl holds ---------------------------------------------------------------------


def lines_in(folder: Path) -> list[dict[str, Any]]:
    """The lines of a run's metrics.jsonl, in order, without damaged ones. Raises OSError.

    Of many lines some are left out, but no evaluation.
    """
    rows = (folder / METRICS).read_bytes().splitlines()
    every = -(-len(rows) // MOST_POINTS)
    found = []
    for number, row in enumerate(rows, start=1):
        if number % every and number != len(rows) and b'"eval_loss"' not in row:
            continue
        try:
            require_shape(line := parse_json(row), {"step": is_count})
        except ValueError:
            continue
        found.append(line)
    return found


def number(line: dict[str, Any], key: str) -> float:
    """A figure of a line; NaN where it has none."""
    value = line.get(key)
    if isinstance(value, int | float) and not isinstance(value, bool):
        return float(value)
    return math.nan


def column(lines: list[dict[str, Any]], key: str) -> np.ndarray:
    """A figure of every line, float64; NaN where there is none."""
    return np.array([number(line, key) for line in lines], dtype=float)


def starts_of(lines: list[dict[str, Any]]) -> list[int]:
    """Of each line of training, the step at which its session began: 0, or where it resumed.

    Older lines do not name it: there the clock of the session, which begins again, shows it.
    """
    starts, start, before_s, before_step = [], 0, 0.0, 0
    for line in lines:
        resumed, seconds = number(line, "resumed_from"), number(line, "seconds")
        if resumed == resumed:
            start = int(resumed)
        elif seconds < before_s:
            start = before_step
        starts.append(start)
        before_s, before_step = seconds, line["step"]
    return starts


def restarts(lines: list[dict[str, Any]]) -> list[int]:
    """The steps from which the run was resumed."""
    return sorted(set(starts_of(lines)) - {0})


def between_lines(lines: list[dict[str, Any]]) -> dict[str, np.ndarray]:
    """What went on between one line of training and the next: tokens/s, and the part of the time
    that communication took. The lines themselves hold means since their session began.
    """
    found: dict[str, list[float]] = {"step": [], "tokens_per_second": [], "communication": []}
    before = (-1, 0.0, 0.0, 0.0)  # start of the session; its tokens, seconds, seconds waited so far
    for line, start in zip(lines, starts_of(lines), strict=True):
        speed, step = number(line, "tokens_per_second"), line["step"]
        if not speed > 0 or not step:
            continue
        tokens = number(line, "tokens") * (step - start) / step
        spent_s = tokens / speed
        waited_s = number(line, "communication") * spent_s
        if before[0] != start:
            before = (start, 0.0, 0.0, 0.0)
        took_s = spent_s - before[2]
        if took_s > 0:
            found["step"].append(step)
            found["tokens_per_second"].append((tokens - before[1]) / took_s)
            found["communication"].append(min(1.0, max(0.0, (waited_s - before[3]) / took_s)))
        before = (start, tokens, spent_s, waited_s)
    return {key: np.array(values, dtype=float) for key, values in found.items()}


def smoothed(values: np.ndarray) -> np.ndarray:
    """A mean over neighbours, weighted by nearness; values that are NaN are left out."""
    if len(values) < FEWEST_SMOOTHED:
        return values
    reach = max(1, len(values) // FINENESS)
    weights = np.exp(-0.5 * (np.arange(-3 * reach, 3 * reach + 1) / reach) ** 2)
    is_known = np.isfinite(values)

    def summed(row: np.ndarray) -> np.ndarray:
        return np.convolve(row, weights)[3 * reach : 3 * reach + len(row)]

    total = summed(is_known.astype(float))
    sums = summed(np.where(is_known, values, 0.0))
    return np.divide(sums, total, out=np.full(len(values), np.nan), where=total > 1e-12)


# --- drawing --------------------------------------------------------------------------------------


def pictures_of(lines: list[dict[str, Any]], name: str) -> dict[str, bytes]:
    """The pictures of a run, as PNG, by their files' names; the same for the same lines.

    lines: of metrics.jsonl. name: of the run. Empty before there is anything to see.
    """
    training = [line for line in lines if "tokens_per_second" in line]
    evaluations = [line for line in lines if math.isfinite(number(line, "eval_loss"))]
    found = {}
    if training or evaluations:
        found[LOSS] = loss_picture(training, evaluations, name)
    if any(number(line, "peers") > 1 for line in training):
        found[PEERS] = peers_picture(training, name)
    return found


def loss_picture(
    training: list[dict[str, Any]], evaluations: list[dict[str, Any]], name: str
) -> bytes:
    """Training loss raw and smoothed, validation loss, and the learning rate below."""
    figure, (top, low) = _axes([3.2, 1], f"{name}: loss")
    steps, losses = column(training, "step"), column(training, "loss")
    level = smoothed(losses)
    top.plot(steps, losses, color=BLUE, alpha=0.35, linewidth=0.9, label="training")
    last = level[np.isfinite(level)][-1:]
    label = "training, smoothed" + (f" ({last[0]:.3f})" if len(last) else "")
    top.plot(steps, level, color=BLUE, linewidth=1.8, label=label)
    held_out = column(evaluations, "eval_loss")
    if len(held_out):
        errors = np.nan_to_num(column(evaluations, "eval_loss_stderr"))
        top.errorbar(
            *(column(evaluations, "step"), held_out, errors),
            **{"color": ORANGE, "marker": "o", "markersize": 4, "linewidth": 1.4, "capsize": 2},
            label=f"validation ({held_out[-1]:.3f})",
        )
    shown = np.concatenate([level, held_out])
    _set_heights(top, losses, shown[np.isfinite(shown)])
    top.set_ylabel("nats per token")
    low.plot(steps, column(training, "learning_rate"), color=GREEN, linewidth=1.4)
    low.set_ylabel("learning rate")
    low.set_ylim(bottom=0)
    low.ticklabel_format(axis="y", style="sci", scilimits=(-2, 3))
    return _png(figure, [top, low], restarts(training))


def _set_heights(axes: Any, raw: np.ndarray, shown: np.ndarray) -> None:
    """Show all of the curves that matter, and of the raw one no single peak far above them."""
    if not len(shown):
        return
    raw = raw[np.isfinite(raw)]
    least, most = min([*raw, *shown]), max(shown if len(raw) > FINENESS else [*raw, *shown])
    most = max(most, min(max([*raw, most]), most + 0.1 * (most - least)))
    room = max(0.05 * (most - least), 1e-3 * abs(most))
    axes.set_ylim(least - room, most + room)


def peers_picture(training: list[dict[str, Any]], name: str) -> bytes:
    """Tokens/s of all peers, the time that communication took, and every rank's blocks."""
    figure, (speed, wait, share) = _axes([1.3, 1, 1.2], f"{name}: peers")
    between = between_lines(training)
    for axes, key, scale, colour in (
        (speed, "tokens_per_second", 1.0, BLUE),
        (wait, "communication", 100.0, ORANGE),
    ):
        values = scale * between[key]
        axes.plot(between["step"], values, color=colour, alpha=0.35, linewidth=0.9)
        axes.plot(between["step"], smoothed(values), color=colour, linewidth=1.8)
        axes.set_ylim(bottom=0)
    speed.set_ylabel("tokens/s, all")
    speed.yaxis.set_major_formatter(_short)
    wait.set_ylabel("% of the time\ncommunicating")
    wait.set_ylim(0, max(5.0, 1.1 * wait.get_ylim()[1]))
    _draw_shares(share, training)
    return _png(figure, [speed, wait, share], restarts(training))


def _short(value: float, _: object) -> str:
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if value >= size:
            return f"{value / size:g}{unit}"
    return f"{value:g}"


def _draw_shares(axes: Any, training: list[dict[str, Any]]) -> None:
    """The blocks of an update by rank, stacked; where they are not known, how many peers there are.

    Ranks come and go: those that are not there have none.
    """
    shares = [line.get("shares") for line in training]
    known = [one for one in shares if isinstance(one, list) and one and all(map(is_count, one))]
    steps = column(training, "step")
    if not known:
        axes.step(steps, column(training, "peers"), where="pre", color=GREEN, linewidth=1.8)
        axes.set_ylim(bottom=0)
        axes.set_ylabel("peers")
        return
    ranks = max(map(len, known))
    rows = np.zeros((ranks, len(training)))
    for at, one in enumerate(shares):
        if one in known:
            rows[: len(one), at] = one
    from matplotlib import colormaps

    colours = colormaps["viridis"](np.linspace(0.15, 0.9, ranks))
    names = [f"rank {rank}" for rank in range(ranks)] if ranks <= MOST_NAMED else None
    axes.stackplot(
        *(steps, rows),
        **{"labels": names or (), "colors": colours, "alpha": 0.8, "step": "pre"},
    )
    axes.set_ylabel("blocks of an\nupdate, by rank")


def _axes(heights: list[float], title: str) -> tuple[Any, Any]:
    """A figure, and axes below each other over the same steps."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(9, 5.6), dpi=110, facecolor="white")
    FigureCanvasAgg(figure)
    axes = figure.subplots(len(heights), 1, sharex=True, height_ratios=heights)
    figure.subplots_adjust(left=0.1, right=0.985, top=0.945, bottom=0.085, hspace=0.2)
    for one in axes:
        one.set_axisbelow(True)
        one.grid(color="#e4e4e4", linewidth=0.7)
        one.spines[["top", "right"]].set_visible(False)
        one.margins(x=0.01)
    axes[-1].set_xlabel("updates")
    axes[-1].xaxis.get_major_locator().set_params(integer=True)
    axes[-1].xaxis.set_major_formatter(lambda value, _: f"{value:,.0f}")
    axes[0].set_title(title, loc="left", fontsize=12, fontweight="bold", parse_math=False)
    return figure, axes


def _png(figure: Any, axes: list[Any], resumed: list[int]) -> bytes:
    """The figure as a PNG file, with the restarts marked."""
    from io import BytesIO

    for one in axes:
        for step in resumed:
            label = "restart" if step == resumed[0] and one is axes[0] else None
            one.axvline(step, color=GREY, linestyle="--", linewidth=1, label=label, zorder=1)
        one.yaxis.set_label_coords(-0.065, 0.5)
        if names := one.get_legend_handles_labels()[1]:
            above = {"loc": "lower right", "bbox_to_anchor": (1.01, 0.96), "ncols": len(names)}
            where = {"loc": "upper right"} if "training" in names else above
            one.legend(**where, frameon=where is not above, fontsize=9)
    held = BytesIO()
    figure.savefig(held, format="png", metadata={"Software": None})
    return held.getvalue()


# --- pictures of any run --------------------------------------------------------------------------


def main() -> int:
    """The command line."""
    folders = [Path(word) for word in sys.argv[1:]]
    if not folders or any(word.startswith("-") for word in sys.argv[1:]):
        print(__doc__.strip())
        return 0 if {*sys.argv[1:]} & {"-h", "--help"} else 2
    if not is_installed():
        raise ForgeError("matplotlib is not installed", install_line("matplotlib"))
    for folder in folders:
        try:
            drawn = pictures_of(lines_in(folder), folder.resolve().name)
        except OSError as error:
            raise ForgeError(
                f"{folder / METRICS} cannot be read: {error.strerror}",
                "give the --output-dir of a run",
            ) from error
        put_on_record(folder, [name for name in drawn if not (folder / name).exists()])
        for name, image in drawn.items():
            write_file(folder / name, image)
            print(folder / name)
    return 0


if __name__ == "__main__":
    run_script(main, 0)
