"""What did engine, rewards, trainer and refit do when? Draws a few steps of a run from its events.jsonl.

    python benchmarks/timeline.py runs/quickstart --first 3 --last 6 --out timeline.png

A bar is a span, its colour the policy version that it uses: the one that samples a group and whose answers are scored, the one
that the trainer's weights are, the one that is published. Spans that overlap lie in rows of their own. From the publish of
version `first` to that of version `last`.
"""

from __future__ import annotations

import argparse
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

from rlloop.tracking import jsonl

LANES = {
    "engine: groups sampled": ("rollout",),
    "rewards: groups scored": ("score",),
    "trainer": ("logprobs", "values", "forward_backward", "optim_step", "export_adapter"),
    "refit": ("refit",),
    "canary, sampled": ("canary",),
    "checkpoint": ("checkpoint",),
}
"""Title -> the spans that it shows."""
DARK = {"optim_step": 1.0, "export_adapter": 0.6}
"""How much of a bar is black, where its lane has several kinds of spans."""
HATCH = {"logprobs": "////", "values": "////"}


@dataclass(frozen=True, slots=True)
class Bar:
    name: str
    start: float
    end: float
    version: int
    row: int


def bars(spans: Sequence[dict[str, Any]], refits: Sequence[dict[str, Any]]) -> list[Bar]:
    """In as few rows as the spans need. One that names no version has the newest that was being published when it began."""
    rows: list[float] = []
    found = []
    for span in sorted(spans, key=lambda span: span["start"]):
        version = span["policy_version"]
        if version is None:
            version = max((each["policy_version"] for each in refits if each["start"] <= span["start"]), default=0)
        row = next((row for row, end in enumerate(rows) if end <= span["start"]), len(rows))
        rows[row : row + 1] = [span["end"]]
        found.append(Bar(span["name"], span["start"], span["end"], version, row))
    return found


def read_lanes(run_dir: Path, first: int, last: int) -> tuple[dict[str, list[Bar]], float, float]:
    """-> bars of each lane that has any; begin and end of what is to be drawn. Of the last attempt, if there were several."""
    events = list(jsonl.read(run_dir / "events.jsonl"))
    refits = [event for event in events if event["name"] == "refit"]
    versions = [event["policy_version"] for event in refits]
    restarts = [i for i, (before, after) in enumerate(pairwise(versions), 1) if after <= before]
    refits = refits[max(restarts, default=0) :]
    published = {event["policy_version"]: event["end"] for event in refits}
    begin, end = published[first], published[last]
    spans = [e for e in events if e["end"] > begin and e["start"] < end and e["start"] >= refits[0]["start"]]
    lanes = {title: bars([span for span in spans if span["name"] in names], refits) for title, names in LANES.items()}
    return {title: found for title, found in lanes.items() if found}, begin, end


def draw(lanes: dict[str, list[Bar]], begin: float, end: float, title: str, path: Path) -> None:
    import matplotlib.colors

    matplotlib.use("Agg")
    from matplotlib import pyplot
    from matplotlib.patches import Patch

    heights = {lane: max(bar.row for bar in found) + 1 for lane, found in lanes.items()}
    ratios = [max(1.6, 0.35 * rows) for rows in heights.values()]
    figure, axes = pyplot.subplots(
        len(lanes), 1, sharex=True, figsize=(12, 0.42 * sum(ratios) + 1.2), gridspec_kw={"height_ratios": ratios}
    )
    palette = matplotlib.color_sequences["tab10"]
    for axis, (lane, found) in zip(axes, lanes.items(), strict=True):
        for bar in found:
            color = matplotlib.colors.to_rgb(palette[bar.version % 10])
            share = DARK.get(bar.name, 0.0)
            shade = tuple(channel * (1 - share) for channel in color)
            left, width = max(bar.start, begin) - begin, min(bar.end, end) - max(bar.start, begin)
            axis.barh(
                bar.row,
                width,
                0.86,
                left=left,
                color=shade,
                hatch=HATCH.get(bar.name),
                edgecolor="white",
                linewidth=0.4,
            )
        axis.set(ylim=(heights[lane] - 0.5, -0.5), yticks=[], xlim=(0, end - begin))
        axis.set_ylabel(lane, rotation=0, ha="right", va="center")
        for side in ("top", "right", "left"):
            axis.spines[side].set_visible(False)
    for line in publishes(lanes["refit"], begin, end):
        for axis in axes:
            axis.axvline(line, color="grey", linewidth=0.6, linestyle=":")
    axes[-1].set_xlabel("seconds")
    versions = sorted({bar.version for found in lanes.values() for bar in found})
    handles = [Patch(color=palette[version % 10], label=f"version {version}") for version in versions]
    handles += [
        Patch(facecolor="white", edgecolor="grey", hatch="////", label="trainer: forward pass only"),
        Patch(color="black", label="optimizer step"),
    ]
    axes[0].set_title(title, loc="left", fontsize=11)
    figure.legend(handles=handles, loc="lower center", ncols=len(handles), frameon=False, fontsize=9)
    figure.tight_layout(rect=(0, 0.05, 1, 1), h_pad=0.2)
    figure.savefig(path, dpi=100)


def publishes(refits: Iterable[Bar], begin: float, end: float) -> list[float]:
    """When versions were served, seconds from the left edge."""
    return [bar.end - begin for bar in refits if begin < bar.end < end]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("run_dir", type=Path)
    parser.add_argument("--first", type=int, default=2)
    parser.add_argument("--last", type=int, default=5)
    parser.add_argument("--title", default="", help="beside what the versions say")
    parser.add_argument("--out", type=Path, default=Path("timeline.png"))
    options = parser.parse_args()
    lanes, begin, end = read_lanes(options.run_dir, options.first, options.last)
    title = options.title or f"{options.run_dir.name}: from version {options.first} to version {options.last}"
    draw(lanes, begin, end, title, options.out)


if __name__ == "__main__":
    main()
