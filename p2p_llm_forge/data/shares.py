"""The shares of a dataset's sources: what was asked, what each has got, and what that means."""

from __future__ import annotations

import math

from p2p_llm_forge.data.dataset import Manifest, SourceFacts
from p2p_llm_forge.data.splits import REASONS, TRAIN
from p2p_llm_forge.errors import Problems, counted, in_one_line

MISSED_BY = 0.1  # of a share: then it is a warning
SHORTEST_BLOCK = 2


def share_lines(manifest: Manifest) -> list[str]:
    """Of every source its share of the training tokens, for people; nothing where there is one."""
    if len(manifest.sources) < 2:
        return []
    total = manifest.splits[TRAIN].tokens
    return [f"{TRAIN} by source:", *(_line(source, total) for source in manifest.sources)]


def trained_lines(manifest: Manifest) -> list[str]:
    """Of conversations how much is trained and how full blocks are, for people; of text nothing."""
    if manifest.conversations is None:
        return []
    length = manifest.sequence_length
    lines = [
        f"{name}: {counted(facts.trained, 'trained token')} of {facts.tokens:,}; blocks are "
        f"{facts.tokens / max(1, facts.blocks * length):.1%} full"
        for name, facts in manifest.splits.items()
    ]
    cut = manifest.conversations.get("cut", 0)
    return lines + [f"longer than a block, and cut: {counted(cut, 'conversation')}"] * bool(cut)


def _line(source: SourceFacts, total: int) -> str:
    asked = "" if source.weight is None else f"{_percent(source.weight)} asked, "
    left_out = (
        f"; {counted(source.left_out_tokens, 'token')} left out" if source.left_out_tokens else ""
    )
    if source.left_out_documents:
        left_out = f"; {counted(source.left_out_documents, 'document')} left out{left_out}"
    return (
        f"  {in_one_line(source.name)}: {asked}{_percent(source.tokens / max(1, total))} got, "
        f"{counted(source.tokens, 'token')} of {counted(source.documents, 'document')}{left_out}"
    )


def _percent(share: float) -> str:
    """With so many digits that shares which differ by a tenth look different."""
    decimals = 2 if share >= 0.001 or not share else -1 - math.floor(math.log10(share))
    return f"{share:.{decimals}%}"


def share_warnings(manifest: Manifest) -> list[str]:
    """Shares that are not what was asked for, and weights that leave out most of the text."""
    sources, total = manifest.sources, manifest.splits[TRAIN].tokens
    found = []
    for source in sources:
        asked, got = source.weight, source.tokens / max(1, total)
        if asked is not None and abs(got - asked) > MISSED_BY * asked:
            found.append(
                f"{in_one_line(source.name)} has got {_percent(got)} of the training tokens, not "
                f"{_percent(asked)}: a share ends where a document or a block does, so it comes "
                "nearer with more text or a shorter --sequence-length"
            )
    if sum(source.left_out_tokens for source in sources) > total:
        scarce = min(sources, key=lambda source: source.left_out_tokens / max(1, source.found))
        found.append(
            f"{in_one_line(scarce.name)} has only {scarce.found:,} tokens to train on, so that "
            "these weights leave out more than half of the text: to take all of it, "
            f"{_without_loss(sources)}"
        )
    return found


def _without_loss(sources: list[SourceFacts]) -> str:
    weights = " and ".join(f"{source.found}" for source in sources)
    return f"give no weights, or, for the order of a mixture, the weights {weights}"


def require_shares(manifest: Manifest) -> None:
    """Raise ForgeError that names every source of a mixture that has got nothing."""
    sources, length = manifest.sources, manifest.sequence_length
    text = sum(source.found for source in sources)
    if len(sources) < 2 or any(source.weight is None for source in sources):
        return
    problems = Problems()
    for source in sources:
        problems.require(
            source.found > 0,
            f"{in_one_line(source.name)} has no text to train on{_why_none(source, manifest)}",
            "leave it out of --dataset-path",
        )
    problems.raise_any()
    if text < length:
        return  # too short for any weights
    shares = _shares(sources)
    shorter = _power_of_two_below(min(shares) // 2)
    fix = f"use --sequence-length {shorter} or a shorter one, or leave it out of --dataset-path"
    if shorter < SHORTEST_BLOCK:
        fix = "leave it out of --dataset-path, or give it a larger weight"
    for source, share in zip(sources, shares, strict=True):
        problems.require(
            source.tokens > 0,
            f"{in_one_line(source.name)} gets nothing: its share is {share:,} tokens, a block has "
            f"{length}",
            fix,
        )
    problems.raise_any()


def _why_none(source: SourceFacts, manifest: Manifest) -> str:
    if not source.left_out_documents:
        return ""
    reasons = [REASONS.get(why, why) for why, of in manifest.left_out.items() if of.documents]
    count = source.left_out_documents
    are = "are" if count != 1 else "is"
    return f": {counted(count, 'document')} of it {are} left out, {' or '.join(reasons)}"


def _shares(sources: list[SourceFacts]) -> list[int]:
    """The tokens of every source when none is taken twice."""
    scale = min(source.found / (source.weight or 1.0) for source in sources)
    return [int(scale * (source.weight or 1.0)) for source in sources]


def _power_of_two_below(number: int) -> int:
    return 1 << (number.bit_length() - 1) if number else 0
