"""Graphs beside circuit-tracer's own, of the same model, transcoders and prompt.

circuit-tracer needs an older transformers than this project. `CIRCUIT_TRACER_PYTHON` is the Python
of an environment that has it (docs/attribution.md); without it, its recorded numbers of one small
model are left. `CIRCUIT_TRACER_RECORD=1` records them anew.
"""

from __future__ import annotations

import json
import os
import subprocess
from pathlib import Path
from typing import Any, NamedTuple

import pytest
import torch
from safetensors.torch import load_file
from torch import Tensor

from sae_experiments.saes.circuit_tracer import save_transcoders
from sae_experiments.studies.attribution.front_end import DrawnGraph, as_circuit_tracer
from sae_experiments.studies.attribution.heads import edge_heads
from sae_experiments.studies.attribution.influence import Graph, prune
from sae_experiments.studies.attribution.local import LocalModel
from sae_experiments.studies.attribution.supernodes import group_latents
from support.attribution_worlds import WAVES, wave_world, world

PYTHON = os.environ.get("CIRCUIT_TRACER_PYTHON")
TESTS = Path(__file__).parents[1]
RECORD = TESTS / "data" / "circuit_tracer.json"
#: Kinds of transcoders, by folder: cross-layer decoders, skip paths.
KINDS = {"cross": (True, False), "plain": (False, False), "skip": (False, True)}
#: Largest difference of an edge.
TOLERANCE = 1e-3


class Ours(NamedTuple):
    """The graph of one prompt as this project makes it."""

    local: LocalModel
    graph: Graph

    @property
    def latents(self) -> Tensor:
        """Layer, position and number of every active latent, (n, 3)."""
        nodes = self.local.nodes
        return torch.stack([nodes.layer, nodes.position, nodes.latent], 1)


def ours(lm: Any, sae: Any, ids: Tensor) -> Ours:
    local = LocalModel(lm, sae, ids[:1])
    weights = local.adjacency().weights[:, : local.sources.tokens.stop]
    n_errors = local.n_layer * local.length
    return Ours(local, Graph(weights, local.logits.probability, n_errors))


def made(name: str) -> tuple[Any, Any, Tensor]:
    """Model, transcoders and prompt of a folder, in single precision."""
    if name == WAVES:
        return wave_world()
    cross, skip = KINDS[name]
    lm, sae, ids = world("gpt2", cross=cross, skip=skip)
    return lm.float(), sae.float(), ids


def write(folder: Path, name: str) -> None:
    """Write model, transcoders and prompt for circuit-tracer."""
    lm, sae, ids = made(name)
    lm.save_pretrained(folder)
    save_transcoders(sae, folder / "transcoders", model="gpt2", scan="scan")
    (folder / "tokens.json").write_text(json.dumps(ids[0].tolist()))
    (folder / "page.json").write_text(json.dumps(page(ours(lm, sae, ids))))


def page(mine: Ours) -> dict[str, Any]:
    """A graph in the form that circuit-tracer's page reads."""
    nodes, edges = prune(mine.graph, 0.8, 0.98)
    kept, position = nodes[: mine.graph.n], mine.local.nodes.position
    drawn = DrawnGraph(
        mine.local,
        mine.graph,
        nodes,
        edges,
        edge_heads(mine.local, edges),
        group_latents(mine.graph, position, kept, 0.3),
        [chr(ord("a") + i) for i in range(20)],
        "a graph",
    )
    return as_circuit_tracer(drawn, "slug", "scan", 0.8, {})


@pytest.fixture(scope="module")
def traced(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A folder each with circuit-tracer's graphs."""
    if not PYTHON:
        pytest.skip(
            "CIRCUIT_TRACER_PYTHON is not set: pip install circuit-tracer in an environment of its "
            "own, and name its Python"
        )
    home = tmp_path_factory.mktemp("circuit_tracer")
    folders = [home / name for name in (*KINDS, WAVES)]
    for folder in folders:
        write(folder, folder.name)
    script = TESTS / "support" / "circuit_tracer_peer.py"
    subprocess.run([PYTHON, str(script), *map(str, folders)], check=True, capture_output=True)
    return home


def by_rows(adjacency: Tensor, n: int, m: int) -> Tensor:
    """Rows of latents and then logits, columns without logits, of circuit-tracer's adjacency."""
    return torch.cat([adjacency[:n], adjacency[-m:]])[:, : len(adjacency) - m]


@pytest.mark.parametrize("kind", KINDS)
def test_edges_influence_and_scores_are_circuit_tracers(kind: str, traced: Path) -> None:
    theirs = load_file(traced / kind / "graph.safetensors")
    mine = ours(*made(kind))
    n, m = mine.graph.n, len(mine.graph.probability)
    assert n > 100
    assert torch.equal(mine.latents, theirs["latents"])
    assert torch.equal(mine.local.logits.token, theirs["logits"])
    torch.testing.assert_close(mine.local.nodes.value, theirs["values"], rtol=0, atol=TOLERANCE)
    edges = by_rows(theirs["adjacency"], n, m)
    assert float(edges.abs().max()) > 1
    torch.testing.assert_close(mine.graph.weights, edges, rtol=0, atol=TOLERANCE)
    influence = mine.graph.influence()[0]
    torch.testing.assert_close(influence, theirs["influence"][:-m], rtol=0, atol=TOLERANCE)
    scores = json.loads((traced / kind / "scores.json").read_text())
    assert mine.graph.scores()["replacement"] == pytest.approx(scores["replacement"], abs=1e-5)
    all_nodes = mine.graph.scores()["completeness_all"]
    assert all_nodes == pytest.approx(scores["completeness"], abs=1e-5)


@pytest.mark.parametrize("kind", KINDS)
def test_pruning_keeps_what_circuit_tracer_keeps(kind: str, traced: Path) -> None:
    theirs = load_file(traced / kind / "graph.safetensors")
    mine = ours(*made(kind))
    n, m = mine.graph.n, len(mine.graph.probability)
    nodes, edges = prune(mine.graph, 0.8, 0.98)
    assert torch.equal(nodes, theirs["kept"][:-m])
    assert torch.equal(edges, by_rows(theirs["kept_edges"], n, m))


@pytest.mark.parametrize("kind", KINDS)
def test_circuit_tracer_reads_the_graph_as_it_was_written(kind: str, traced: Path) -> None:
    written = json.loads((traced / kind / "page.json").read_text())
    read = json.loads((traced / kind / "page_read.json").read_text())
    assert read["nodes"] == written["nodes"] and read["links"] == written["links"]
    assert read["qParams"] == written["qParams"]
    assert written["qParams"]["supernodes"]


def test_members_of_supernodes_are_pinned_or_the_page_would_not_draw_them() -> None:
    written = page(ours(*made("cross")))
    pinned = written["qParams"]["pinnedIds"]
    groups = written["qParams"]["supernodes"]
    ids = {node["node_id"] for node in written["nodes"]}
    assert len(groups) > 1 and set(pinned) <= ids
    for label, *members in groups:
        assert label not in ids and len(members) > 1 and set(members) <= set(pinned)
    logits = {node["node_id"] for node in written["nodes"] if node["feature_type"] == "logit"}
    assert logits <= set(pinned)


def test_edges_are_those_that_circuit_tracer_computed_for_a_model_of_waves(
    request: pytest.FixtureRequest,
) -> None:
    mine = ours(*wave_world())
    if os.environ.get("CIRCUIT_TRACER_RECORD"):
        record(request.getfixturevalue("traced") / WAVES, mine)
    wanted = json.loads(RECORD.read_text())
    assert mine.latents.tolist() == wanted["latents"]
    assert mine.local.logits.token.tolist() == wanted["logits"]
    edges = torch.tensor(wanted["edges"])
    assert float(edges.abs().max()) > 1
    torch.testing.assert_close(mine.graph.weights, edges, rtol=0, atol=TOLERANCE)
    scores = mine.graph.scores()
    assert scores["replacement"] == pytest.approx(wanted["scores"]["replacement"], abs=1e-4)
    assert scores["completeness_all"] == pytest.approx(wanted["scores"]["completeness"], abs=1e-4)


def record(folder: Path, mine: Ours) -> None:
    """Write circuit-tracer's numbers of the model of waves."""
    theirs = load_file(folder / "graph.safetensors")
    edges = by_rows(theirs["adjacency"], mine.graph.n, len(mine.graph.probability))
    rows = [[round(value, 5) for value in row] for row in edges.tolist()]
    about = {
        "latents": theirs["latents"].tolist(),
        "logits": theirs["logits"].tolist(),
        "scores": json.loads((folder / "scores.json").read_text()),
        "edges": rows,
    }
    RECORD.write_text(json.dumps(about) + "\n")
