"""Trackers of live numbers: a mirror to wandb, if asked for, which can never make a run fail."""

from __future__ import annotations

import netrc
import os
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Protocol

from sae_experiments.errors import UserError
from sae_experiments.files import read_json
from sae_experiments.results.records import means_of

MODES = ("auto", "online", "offline", "disabled")
#: Host under which wandb looks for a key of its own server, whatever its newest address is.
HOST = "api.wandb.ai"


class Tracker(Protocol):
    """Receives the same numbers as the curves; nothing is ever read back from it."""

    def start(self, folder: Path, config: Mapping[str, Any], label: str, plan: str | None) -> None:
        """Open the mirror of a run folder."""
        ...

    def log(self, dataset: str, seed: int, step: int, values: Mapping[str, float]) -> None:
        """Record the values of a training step of one cell, by name."""
        ...

    def summary(self, dataset: str, seed: int, metrics: Mapping[str, float | None]) -> None:
        """Record the final metrics of one cell."""
        ...

    def publish(self, folder: Path) -> None:
        """Mirror the figures and tables of a run folder."""
        ...

    def finish(self, status: str) -> None:
        """Close the mirror, with the status of the run."""
        ...


class NoTracker:
    """Tracker that mirrors nothing; curves are on disk only."""

    def start(self, folder: Path, config: Mapping[str, Any], label: str, plan: str | None) -> None:
        """Do nothing: there is no mirror."""

    def log(self, dataset: str, seed: int, step: int, values: Mapping[str, float]) -> None:
        """Do nothing: there is no mirror."""

    def summary(self, dataset: str, seed: int, metrics: Mapping[str, float | None]) -> None:
        """Do nothing: there is no mirror."""

    def publish(self, folder: Path) -> None:
        """Do nothing: there is no mirror."""

    def finish(self, status: str) -> None:
        """Do nothing: there is no mirror."""


class Wandb:
    """Mirror to Weights & Biases: offline without an API key, silent after its first error.

    With mode auto, the variable WANDB_MODE and wandb's own settings decide, if they are set. Every
    point carries its own step (`<dataset>/<seed>/step`), so that resumed and parallel stages never
    run backwards.
    """

    def __init__(
        self, *, project: str, group: str | None, mode: str, say: Callable[[str], None] = print
    ) -> None:
        if mode not in MODES:
            raise UserError(f"track.mode={mode} is not one of {', '.join(MODES)}")
        self.project = project
        self.group = group
        self.mode = mode
        self.say = say
        #: The wandb run, once it is open; None again if it failed.
        self.run: Any = None

    def start(self, folder: Path, config: Mapping[str, Any], label: str, plan: str | None) -> None:
        """Open a wandb run named after the folder and label, grouped by plan.

        It is offline if `mode` is, or if no API key is set.
        """

        def begin() -> None:
            import wandb

            mode: Any = self.mode if self.mode != "auto" else mode_of(wandb)
            self.run = wandb.init(
                project=self.project,
                group=self.group or plan,
                name=f"{folder.name}: {label}",
                dir=str(folder),
                config=dict(config),
                mode=mode,
                settings=wandb.Settings(silent=True, console="off", init_timeout=20),
            )
            self.say(f"wandb: {mode}, project {self.project}, run {label}")

        self._guarded(begin, "start")

    def log(self, dataset: str, seed: int, step: int, values: Mapping[str, float]) -> None:
        """Mirror the values of one step."""
        place = f"{dataset}/{seed}"
        if self.run is not None:
            self._guarded(
                lambda: self.run.log(
                    {f"{place}/{k}": v for k, v in values.items()} | {f"{place}/step": step}
                ),
                "log",
            )

    def summary(self, dataset: str, seed: int, metrics: Mapping[str, float | None]) -> None:
        """Mirror the final metrics of a cell."""
        if self.run is not None:
            self._guarded(
                lambda: self.run.summary.update(
                    {f"{dataset}/{seed}/{k}": v for k, v in metrics.items()}
                ),
                "summary",
            )

    def publish(self, folder: Path) -> None:
        """Mirror the final table, the figures and the report of a run folder."""

        def send() -> None:
            import wandb

            final = read_json(folder / "final_info.json")
            rows: list[Any] = [
                [
                    name,
                    metric.removesuffix("_mean"),
                    mean,
                    report["stderrs"].get(f"{metric.removesuffix('_mean')}_stderr"),
                ]
                for name, report in final.items()
                for metric, mean in means_of(report).items()
            ]
            columns: list[str | int] = ["dataset", "metric", "mean", "stderr"]
            shown: dict[str, Any] = {"final_info": wandb.Table(columns=columns, data=rows)}
            for png in sorted((folder / "figures").glob("*.png")):
                shown[f"figures/{png.stem}"] = wandb.Image(str(png))
            if (folder / "report.html").exists():
                shown["report"] = wandb.Html(
                    (folder / "report.html").read_text(encoding="utf-8"), inject=False
                )
            self.run.log(shown)

        if self.run is not None and (folder / "final_info.json").exists():
            self._guarded(send, "publish")

    def finish(self, status: str) -> None:
        """Close the wandb run."""
        if self.run is not None:
            self._guarded(lambda: self.run.finish(exit_code=0 if status == "done" else 1), "finish")

    def _guarded(self, action: Callable[[], None], what: str) -> None:
        """Take an action, whose failure ends the tracking and not the run."""
        try:
            action()
        except Exception as error:
            # A tracker is a mirror: nothing that breaks in it may break the run.
            self.run = None
            first = (str(error).splitlines() or [""])[0]
            self.say(f"wandb: {what} failed ({type(error).__name__}: {first}); going on without it")


def mode_of(wandb: Any) -> str:
    """Mode of wandb if `track.mode=auto` leaves it open.

    Args:
        wandb: The module.

    Returns:
        The mode in WANDB_MODE, or the one that `wandb offline` or `wandb disabled` has set; without
        either, online with an API key and offline without one.
    """
    settings = wandb.setup().settings
    asked = os.environ.get("WANDB_MODE") or settings.mode
    if asked and (asked != "online" or os.environ.get("WANDB_MODE")):
        return asked
    return "online" if _has_key(settings) else "offline"


def _has_key(settings: Any) -> bool:
    """True if wandb has an API key: in its settings (WANDB_API_KEY) or in the netrc file."""
    if settings.api_key or os.environ.get("WANDB_API_KEY"):
        return True
    server = (settings.base_url or "").removeprefix("https://").removeprefix("http://").strip("/")
    named = os.environ.get("NETRC")
    files = [Path(named)] if named else [Path.home() / ".netrc", Path.home() / "_netrc"]
    for file in (path for path in files if path.is_file()):
        known = netrc.netrc(str(file)).hosts
        return any(host in known for host in (server, HOST))
    return False
