"""Results of the benchmarks as JSON and as Markdown; no torch."""

from __future__ import annotations

import json
import os
import platform
from collections.abc import Callable, Iterable, Sequence
from datetime import date
from pathlib import Path
from statistics import median
from typing import Any

TITLES = {
    "steps": "SAE training steps",
    "together": "Several SAEs in one pass",
    "scaling": "Cost as work grows",
    "lm": "Language model",
    "jobs": "Where a run's time goes",
    "quality": "Reconstruction at an equal budget",
    "device_steps": "SAE training steps on a device",
    "device_lm": "Language model on a device",
}
BASE = ("product, default", "product, onednn", "product, bf16", "ours", "plain torch")


def machine() -> dict[str, Any]:
    """Kind of the machine and the day."""
    cpu = platform.processor() or platform.machine()
    info = Path("/proc/cpuinfo")
    flags = ""
    if info.exists():
        lines = info.read_text(errors="replace").splitlines()
        cpu = next(
            (line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), cpu
        )
        flags = next((line for line in lines if line.startswith("flags")), "")
    known = [f for f in ("avx2", "avx512f", "avx512_bf16", "amx_bf16") if f" {f}" in flags]
    return {
        "cpu": cpu,
        "cores": os.cpu_count(),
        "features": known,
        "date": date.today().isoformat(),
    }


def write(out: Path, name: str, data: dict[str, Any]) -> None:
    """`<name>.json` and `<name>.md` in the folder `out`."""
    out.mkdir(parents=True, exist_ok=True)
    (out / f"{name}.json").write_text(json.dumps(data, indent=1), encoding="utf-8")
    text = (
        "\n".join(
            [f"# {TITLES[name]}", "", *_about(data["about"]), "", *RENDER[name](data)]
        ).rstrip()
        + "\n"
    )
    (out / f"{name}.md").write_text(text, encoding="utf-8")
    print(text)


def table(head: Sequence[str], rows: Iterable[Sequence[str]]) -> list[str]:
    """A Markdown table."""
    return [
        f"| {' | '.join(head)} |",
        "|---" * len(head) + "|",
        *(f"| {' | '.join(row)} |" for row in rows),
        "",
    ]


def ratio(results: dict[str, Any], a: str, b: str) -> float | None:
    """Ratio of the time of `a` to that of `b`: the median over rounds of the ratio within one."""
    if not all("rounds" in results.get(name, {}) for name in (a, b)):
        return None
    return median(x / y for x, y in zip(results[a]["rounds"], results[b]["rounds"], strict=True))


def _about(about: dict[str, Any]) -> list[str]:
    if "card" in about:
        features = f" ({', '.join(about['features'])})" if about["features"] else ""
        lines = [f"{about['date']}; {about['card']}; host {about['cpu']}{features}."]
        return lines + ([about["note"]] if about["note"] else [])
    kind = (
        "processor time of one thread"
        if about["threads"] == 1
        else f"time on the clock, {about['threads']} threads"
    )
    features = f" ({', '.join(about['features'])})" if about["features"] else ""
    lines = [
        f"{about['date']}; {about['cpu']}{features}, {about['cores']} cores; {kind}; medians of"
        f" {about['rounds']} rounds in turns."
    ]
    libraries: dict[str, str] = {}
    for found in about["versions"].values():
        libraries |= found
    if libraries:
        lines.append("Versions: " + ", ".join(f"{k} {v}" for k, v in libraries.items()) + ".")
    if about.get("note"):
        lines.append(about["note"])
    return lines


def _ms(found: dict[str, Any] | None) -> str:
    if not found:
        return "-"
    return (
        "failed"
        if "ms" not in found
        else f"{found['ms']:.3g}"
        if found["ms"] < 1000
        else f"{found['ms']:,.0f}"
    )


def _times(value: float | None) -> str:
    return "-" if value is None else f"{value:.2f}" if value < 10 else f"{value:.1f}"


# --- steps ----------------------------------------------------------------------------------------


def _steps(data: dict[str, Any]) -> list[str]:
    lines = [
        f"Rows of 4,096, 32 active latents. Matrix rate (2,048 cubed): {_rates(data['gflops'])}.",
        "",
    ]
    if not data["about"]["peers"]:
        lines += ["Peers are left out: `PEERS_PYTHON` was not set.", ""]
    lines += [
        (
            "`product` is the encoder's product alone (our path to it / the default library / bf16"
            " inputs): no step can cost less without another algorithm."
        ),
        (
            "The last columns: the fastest peer's step over ours, with default and with tuned"
            " memory settings on the peer's side; our step over the two products."
        ),
        "",
    ]
    for d, m in dict.fromkeys((g["d"], g["m"]) for g in data["groups"]):
        groups = [g for g in data["groups"] if (g["d"], g["m"]) == (d, m)]
        lines += [f"## d {d}, m {m}", "", "Median milliseconds of a step.", ""]
        lines += table(STEP_COLUMNS, [_step_row(g) for g in groups])
        lines += ["Peak memory above what the process held before it built the SAE (MB).", ""]
        lines += table(MEMORY_COLUMNS, [_memory_row(g) for g in groups])
    return lines


STEP_COLUMNS = [
    "variant",
    "product",
    "ours",
    "active",
    "plain torch",
    "peers",
    "fastest peer / ours",
    "the same, tuned",
    "ours / product",
    "ours / default product",
]
MEMORY_COLUMNS = ["variant", "ours", "peers", "ours / leanest peer"]


def _peers_of(results: dict[str, Any], *, tuned: bool = False) -> list[str]:
    """Peers with a time, with default or with tuned memory settings."""
    timed = [name for name in results if name not in BASE and "ms" in results[name]]
    return [name for name in timed if name.endswith(", tuned") == tuned]


def _step_row(group: dict[str, Any]) -> list[str]:
    r = group["results"]
    peers = _peers_of(r)
    fastest = min(peers, key=lambda name: r[name]["ms"], default="")
    fastest_tuned = min(_peers_of(r, tuned=True), key=lambda name: r[name]["ms"], default="")
    products = [_ms(r.get(f"product, {lib}")) for lib in ("onednn", "default", "bf16")]
    active = r["ours"].get("info", {}).get("active")
    return [
        group["variant"],
        " / ".join(products),
        _ms(r["ours"]),
        "-" if active is None else f"{active:.0f}",
        _ms(r.get("plain torch")),
        ", ".join(f"{name} {_ms(r[name])}" for name in peers) or "-",
        f"**{_times(ratio(r, fastest, 'ours'))}**",
        _times(ratio(r, fastest_tuned, "ours")),
        _times(ratio(r, "ours", "product, onednn")),
        _times(ratio(r, "ours", "product, default")),
    ]


def _memory_row(group: dict[str, Any]) -> list[str]:
    r = group["results"]
    peers = _peers_of(r)
    leanest = min((n for n in peers if r[n]["peak"]), key=lambda n: r[n]["peak"], default="")
    share = "-"
    if leanest and "peak" in r["ours"]:
        share = f"{r['ours']['peak'] / r[leanest]['peak']:.2f}"
    names = ", ".join(f"{name} {_mb(r[name])}" for name in peers) or "-"
    return [group["variant"], _mb(r["ours"]), names, share]


def _rates(gflops: dict[str, float]) -> str:
    return ", ".join(f"{name} {value:,.0f} GFLOP/s" for name, value in gflops.items())


def _mb(result: dict[str, Any]) -> str:
    return f"{result['peak'] / 2**20:,.0f}" if "peak" in result else "failed"


# --- the others -----------------------------------------------------------------------------------


def _together(data: dict[str, Any]) -> list[str]:
    lines = []
    for g in data["groups"]:
        one = g["results"]["1"]
        rows = [
            [n, _ms(f), _times(f["ms"] / one["ms"] / int(n)), _mb(f)]
            for n, f in g["results"].items()
            if "ms" in f
        ]
        lines += [
            f"batch_topk, d {g['d']}, m {g['m']}.",
            "",
            *table(["SAEs", "ms per step", "of as many single steps", "peak MB"], rows),
        ]
    return lines


def _scaling(data: dict[str, Any]) -> list[str]:
    lines = ["d 128; width at 4,096 rows, rows at m 2,048.", ""]
    for g in data["groups"]:
        rows = [[n, _ms(f), _mb(f)] for n, f in g["results"].items()]
        lines += [f"## {g['variant']}", "", *table(["", "ms per step", "peak MB"], rows)]
    return lines


def _lm(data: dict[str, Any]) -> list[str]:
    rows = []
    for g in data["groups"]:
        r = g["results"]
        first = r.get("ours", {})
        for name, found in r.items():
            rate = (
                f"{g['tokens'] / found['ms'] * 1e3:,.0f}"
                if "tokens" in g and "ms" in found
                else "-"
            )
            faster = _times(ratio(r, name, "ours")) if name != "ours" and "ms" in first else "1"
            rows.append([g["preset"], g["what"], name, _ms(found), rate, faster, _mb(found)])
    return table(["preset", "work", "who", "ms", "tokens/s", "time / ours", "peak MB"], rows)


def stages(run: Path) -> dict[str, dict[str, float]]:
    """Seconds by stage of every record in `run/cells`."""
    found = {}
    for path in sorted((run / "cells").glob("*.json")):
        seconds = json.loads(path.read_text(encoding="utf-8")).get("seconds") or {}
        if seconds:
            found[path.stem] = seconds
    return found


def _jobs(data: dict[str, Any]) -> list[str]:
    cells = data["cells"]
    if not cells:
        return ["No finished run was given (`--run FOLDER`)."]
    names = list(dict.fromkeys(name for seconds in cells.values() for name in seconds))
    rows = [
        [
            n,
            *(f"{s[n]:.1f}" if n in s else "-" for s in cells.values()),
            f"{sum(s.get(n, 0.0) for s in cells.values()):.1f}",
        ]
        for n in names
    ]
    return [
        (
            f"Run `{data['run']}`, seconds. Language models that came from the cache count as they"
            " took when they were trained."
        ),
        "",
        *table(["stage", *cells, "sum"], rows),
    ]


def _quality(data: dict[str, Any]) -> list[str]:
    lines = [
        (
            f"Residual stream of the laptop preset's language model (d 128); m {data['m']}, batch"
            f" {data['batch']}, {data['steps']} steps, L0 {data['l0']} asked."
        ),
        (
            "A peer's row is its best learning rate of those in brackets. `ours at that L0`: this"
            " project's SAE asked for the L0 that the peer ended with."
        ),
        "dead: share of latents that fire for none of the held-out rows.",
        "",
    ]
    rows = []
    for variant, found in data["variants"].items():
        for who, r in found.items():
            rates = f" ({', '.join(f'{x:g}' for x in r['rates'])})" if r.get("rates") else ""
            rows.append(
                [
                    variant,
                    who + rates,
                    f"{r['lr']:g}" if r.get("lr") else "-",
                    f"{r['l0']:.1f}",
                    f"{r['fvu']:.4f}",
                    f"{r['dead']:.3f}",
                    f"{r['seconds']:.0f}",
                ]
            )
    return lines + table(["variant", "who", "lr", "L0", "FVU", "dead", "s"], rows)


# --- on a device ----------------------------------------------------------------------------------


def _device_steps(data: dict[str, Any]) -> list[str]:
    lines = [
        f"Rows of {data['batch']:,}, {data['k']} active latents; milliseconds of a step, the mean"
        f" of {data['about']['steps']}. `device` and `host` are the values of `fit.backend`; plain"
        " loops are dense PyTorch with fused Adam and clipping. The ratio is the fastest plain"
        " loop in TF32, compiled or not, over `device`; a variant without a plain loop of its own"
        " is compared with that of `standard`.",
        "",
    ]
    for d, m in dict.fromkeys((g["d"], g["m"]) for g in data["groups"]):
        groups = [g for g in data["groups"] if (g["d"], g["m"]) == (d, m)]
        names = list(dict.fromkeys(name for g in groups for name in g["results"]))
        standard = next((g for g in groups if g["variant"] == "standard"), None)
        rows = []
        for g in groups:
            found = g["results"]
            plain = _fastest_tf32(found) or _fastest_tf32(standard["results"] if standard else {})
            ours = found.get("ours, device", {}).get("ms")
            ratio_ = _times(plain / ours if plain and ours else None)
            peak = [_gb(found.get(f"ours, {b}")) for b in ("device", "host")]
            times = [_ms(found.get(name)) for name in names]
            rows.append([g["variant"], *times, f"**{ratio_}**", " / ".join(peak)])
        head = ["variant", *names, "plain TF32 / ours", "peak memory, device / host (GB)"]
        lines += [f"## d {d}, m {m}", "", *table(head, rows)]
    return lines


def _fastest_tf32(found: dict[str, Any]) -> float | None:
    """Milliseconds of the faster of the plain loops in TF32."""
    names = ("plain tf32", "plain tf32, compiled")
    return min((found[n]["ms"] for n in names if "ms" in found.get(n, {})), default=None)


def _gb(found: dict[str, Any] | None) -> str:
    peak = (found or {}).get("peak")
    return "-" if peak is None or peak != peak else f"{peak / 1e9:.2f}"


def _device_lm(data: dict[str, Any]) -> list[str]:
    head = ["backend", "training step, ms", "evaluation batch, ms", "characters per second"]
    rows = [
        [name, _ms(r), f"{r['evaluation_ms']:.3g}", f"{r['characters_per_second']:,.0f}"]
        for name, r in data["backends"].items()
    ]
    about = "The full preset on shakespeare_char with AdamW; samples are made one by one."
    return [about, "", *table(head, rows)]


RENDER: dict[str, Callable[[dict[str, Any]], list[str]]] = {
    "steps": _steps,
    "together": _together,
    "scaling": _scaling,
    "lm": _lm,
    "jobs": _jobs,
    "quality": _quality,
    "device_steps": _device_steps,
    "device_lm": _device_lm,
}
