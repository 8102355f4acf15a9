"""SIGKILL at any moment of any stage, the same command again: the same numbers as undisturbed,
and no partial file read as a whole one.
"""

from __future__ import annotations

import collections
import contextlib
import hashlib
import http.server
import io
import json
import os
import random
import re
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.torch import load_file

from sae_experiments.cache import DONE, _damage
from sae_experiments.results.records import load_arrays, read_records
from support.common import ROOT, TIMED, TINY

STAGES = ("download", "encode", "language model", "collect", "fit", "metrics", "aggregate", "plot")
LONGER = (
    "lm.train.steps=60 fit.train.steps=60 sae=batch_topk"
    " metric=[reconstruction,sparsity,downstream,geometry]"
)
FIGURES = "--figures=pareto,final_metrics"


class Slow(http.server.BaseHTTPRequestHandler):
    """Serves one file in small pieces with pauses, from any byte on."""

    content = b""

    def do_GET(self) -> None:
        start = (
            int(found[1])
            if (found := re.fullmatch(r"bytes=(\d+)-", self.headers.get("Range", "")))
            else 0
        )
        self.send_response(206 if found else 200)
        if found:
            self.send_header(
                "Content-Range", f"bytes {start}-{len(self.content) - 1}/{len(self.content)}"
            )
        self.send_header("Content-Length", str(len(self.content) - start))
        self.end_headers()
        with contextlib.suppress(OSError):  # the reader was killed
            for at in range(start, len(self.content), 512):
                self.wfile.write(self.content[at : at + 512])
                time.sleep(0.01)

    def log_message(self, *args: Any) -> None:
        pass


class Killer:
    """The forking process, the server, and the experiment it runs in ``here``."""

    def __init__(self, here: Path, text: bytes) -> None:
        self.here, self.chance = here, random.Random(0)
        packed = io.BytesIO()
        with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as folder:
            folder.writestr("made", text)
        handler = type("Handler", (Slow,), {"content": packed.getvalue()})
        self.server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), handler)
        threading.Thread(target=self.server.serve_forever, daemon=True).start()
        source = {
            "url": f"http://127.0.0.1:{self.server.server_port}/made.zip",
            "bytes": len(packed.getvalue()),
            "archive": "zip",
            "member": "made",
        }
        sha = hashlib.sha256(text).hexdigest()
        listed = (
            "{"
            + ",".join(
                f"{k}:'{v}'" if isinstance(v, str) else f"{k}:{v}"
                for k, v in (source | {"sha256": None}).items()
            )
            + "}"
        )
        listed = listed.replace("sha256:None", "sha256:null")
        tiny = [o for o in TINY.split() if o != "offline=true"]
        text8 = [
            "data=[text8]",
            f"data.text8.sources=[{listed}]",
            f"data.text8.bytes={len(text)}",
            f"data.text8.sha256={sha}",
            "data.text8.md5=null",
        ]
        text8 += ["data.text8.head=null", "data.text8.stand_in=never"]
        self.commands = [
            ["experiment", *tiny, *text8, *LONGER.split(), "out_dir=k"],
            ["plot", "runs", FIGURES],
        ]
        clean = {
            k: v
            for k, v in os.environ.items()
            if not k.startswith(("SAE_", "WANDB_", "http", "HTTP"))
        }
        self.process = subprocess.Popen(
            [sys.executable, str(ROOT / "tests" / "support" / "killing.py")],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            text=True,
            env=clean,
            cwd=here,
        )

    def __call__(self, **moment: Any) -> dict[str, Any]:
        """Run the commands, killed at ``after_s`` seconds or ``at_event``, or not at all."""
        assert self.process.stdin is not None and self.process.stdout is not None
        request = {
            "here": str(self.here),
            "env": {"SAE_CACHE": str(self.here / "cache")},
            "said": str(self.here / "said.txt"),
        }
        self.process.stdin.write(json.dumps(request | {"commands": self.commands} | moment) + "\n")
        self.process.stdin.flush()
        return json.loads(self.process.stdout.readline())

    def clear(self) -> None:
        """As if nothing had ever been run."""
        for name in ("cache", "runs"):
            shutil.rmtree(self.here / name, ignore_errors=True)

    def close(self) -> None:
        self.process.kill()
        self.process.wait()
        self.server.shutdown()


@pytest.fixture(scope="module")
def killer(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Iterator[Killer]:
    found = Killer(tmp_path_factory.mktemp("killer"), corpus_file.read_bytes())
    yield found
    found.close()


@pytest.fixture(scope="module")
def undisturbed(killer: Killer) -> dict[str, Any]:
    """What the commands leave behind where nobody disturbs them, and how long and how many file
    operations that took.
    """
    began = time.monotonic()
    ended = killer()
    assert ended["status"] == 0, (killer.here / "said.txt").read_text()[-3000:]
    return left_behind(killer.here) | {
        "seconds": time.monotonic() - began,
        "events": ended["events"],
        "spent": ended["spent"],
    }


def left_behind(here: Path) -> dict[str, Any]:
    """Everything that no clock has a part in."""
    run, final = (
        here / "runs" / "k",
        json.loads((here / "runs" / "k" / "final_info.json").read_text()),
    )
    (record,) = read_records(run)
    table = [
        line
        for line in (here / "runs" / "comparison" / "comparison.csv").read_text().splitlines()
        if not any(name in line for name in TIMED)
    ]
    return {
        "final": {
            d: {
                k: {m: v for m, v in part.items() if not any(t in m for t in TIMED)}
                for k, part in entry.items()
            }
            for d, entry in final.items()
        },
        "metrics": {k: v for k, v in record.metrics.items() if k not in TIMED},
        "why_null": record.why_null,
        "curves": sorted((run / "curves" / "text8_0.jsonl").read_text().splitlines()),
        "arrays": {k: repr(v.tolist()) for k, v in load_arrays(run, "text8", 0).items()},
        "sae": {p.name: p.read_bytes() for p in sorted((run / "saes" / "text8_0").iterdir())},
        "table": table,
        "figures": sorted(p.name for p in (here / "runs" / "comparison").rglob("*.png")),
    }


def torn_files(here: Path) -> list[str]:
    """Files under their final names that are not whole, and cache folders that say they are
    finished and are not.
    """
    torn = [
        f"{done.parent}/{damaged}"
        for done in (here / "cache").rglob(DONE)
        if (damaged := _damage(done.parent))
    ]
    for path in (
        p for p in (here / "runs").rglob("*") if p.is_file() and not p.name.startswith(".")
    ):
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".npz":
                with np.load(path, allow_pickle=False) as found:
                    _ = [found[name] for name in found.files]
            elif path.suffix == ".safetensors":
                load_file(path)
            elif path.suffix == ".png":
                assert path.read_bytes().endswith(b"IEND\xaeB`\x82")
            elif path.suffix == ".svg":
                assert path.read_text().rstrip().endswith("</svg>")
        except Exception as error:
            torn.append(f"{path}: {error}")
    return torn


def finish_after(
    killer: Killer, moments: list[dict[str, Any]], undisturbed: dict[str, Any]
) -> collections.Counter[str]:
    """Kill at each moment, starting anew whenever the commands got through; at every end the
    same is there as undisturbed.
    """
    kills: collections.Counter[str] = collections.Counter()
    killer.clear()
    for moment in [*moments, {}]:
        ended = killer(**moment)
        assert ended["status"] in (0, -9), (moment, (killer.here / "said.txt").read_text()[-2000:])
        assert not torn_files(killer.here), moment
        if ended["status"] == -9:
            kills[ended["stage"]] += 1
            continue
        found = left_behind(killer.here)
        different = [k for k, v in found.items() if v != undisturbed[k]]
        assert not different, (moment, different)
        stale = [str(p) for p in killer.here.rglob(".*.tmp")]
        assert (
            not stale
            and not list(killer.here.rglob("checkpoint*"))
            and not list((killer.here / "cache").rglob("*.part"))
        )
        killer.clear()
    return kills


def moments(killer: Killer, undisturbed: dict[str, Any], n: int) -> list[dict[str, Any]]:
    """Half by the clock, half by the number of a file operation (between the writing of a file
    and its renaming, say).
    """
    chance = killer.chance
    timed = [{"after_s": chance.uniform(0.0, undisturbed["seconds"] * 0.8)} for _ in range(n // 2)]
    counted = [{"at_event": chance.randint(1, undisturbed["events"])} for _ in range(n - n // 2)]
    both = timed + counted
    chance.shuffle(both)
    return both


def staged(
    killer: Killer, undisturbed: dict[str, Any], stages: tuple[str, ...] = STAGES
) -> list[dict[str, Any]]:
    """One kill in each stage, in their order, at a moment of it that is anybody's guess."""
    return [
        {"in_stage": s, "after_s": killer.chance.uniform(0.0, 0.9 * undisturbed["spent"][s])}
        for s in stages
    ]


def test_killed_in_two_stages_and_started_again_gives_the_same_results(killer, undisturbed):
    kills = finish_after(killer, staged(killer, undisturbed, ("fit", "metrics")), undisturbed)
    assert kills.total() >= 1


@pytest.mark.slow
def test_killed_at_a_hundred_random_moments_and_started_again_gives_the_same_results(
    killer, undisturbed, capsys
):
    kills: collections.Counter[str] = collections.Counter()
    while kills.total() < 100 or not set(STAGES) <= set(kills):
        kills += finish_after(killer, staged(killer, undisturbed), undisturbed)
        kills += finish_after(killer, moments(killer, undisturbed, 3), undisturbed)
    with capsys.disabled():
        print(
            f"\nkills survived: {kills.total()}"
            f" ({', '.join(f'{stage} {n}' for stage, n in kills.most_common())})"
        )


@pytest.mark.slow
def test_killed_at_every_single_file_operation_gives_the_same_results(killer, undisturbed, capsys):
    """From an empty cache to the figures, at each file that is opened for writing, renamed or
    removed, in turn.
    """
    kills: collections.Counter[str] = collections.Counter()
    for event in range(1, undisturbed["events"] + 1, max(1, undisturbed["events"] // 60)):
        kills += finish_after(killer, [{"at_event": event}], undisturbed)
    with capsys.disabled():
        print(
            f"\nfile operations at which a kill was survived: {kills.total()} of"
            f" {undisturbed['events']}"
        )
    assert kills.total() > 40
