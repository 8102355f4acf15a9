"""Graphs in two formats for viewing.

One is the JSON that circuit-tracer 0.5 writes for its front end (which Neuronpedia also uses);
the other is the graph of our report, which has the strongest nodes only.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from sae_experiments.files import rounded, write_json
from sae_experiments.studies.attribution.heads import name_of
from sae_experiments.studies.attribution.influence import Graph, cumulative_share
from sae_experiments.studies.attribution.local import LocalModel

#: Nodes that circuit-tracer's page pins at most.
PINNED = 200
#: Parts of an edge in the report.
CARRIERS = 3


@dataclass(frozen=True)
class DrawnGraph:
    """A pruned graph with everything that is shown of it.

    Args:
        local: The local replacement model.
        graph: Its graph before pruning.
        nodes: Kept columns (N,).
        edges: Kept edges (n + m, N).
        parts: Their parts by the last head passed (E, parts), in the order of `edges.nonzero()`.
        groups: Kept latents of each supernode.
        pieces: Text of every token id.
        title: One line about the prompt.
    """

    local: LocalModel
    graph: Graph
    nodes: Tensor
    edges: Tensor
    parts: Tensor
    groups: Sequence[Tensor]
    pieces: list[str]
    title: str

    @property
    def prompt(self) -> list[str]:
        """Text of the tokens."""
        return [self.pieces[i] for i in self.local.frozen.tokens[0].tolist()]

    def column_ids(self) -> list[str]:
        """Name of every column: latents, errors, tokens."""
        nodes, local = self.local.nodes, self.local
        ids = [
            f"{layer}_{latent}_{position}"
            for layer, latent, position in zip(
                nodes.layer.tolist(), nodes.latent.tolist(), nodes.position.tolist(), strict=True
            )
        ]
        # circuit-tracer's own name, 0_<layer>_<position>, is also that of a latent.
        ids += [f"error_{k}_{t}" for k in range(local.n_layer) for t in range(local.length)]
        tokens = local.frozen.tokens[0].tolist()
        return ids + [f"E_{token}_{t}" for t, token in enumerate(tokens)]

    def logit_ids(self) -> list[str]:
        """Name of every logit."""
        last = self.local.length - 1
        layer = self.local.n_layer + 1
        return [f"{layer}_{token}_{last}" for token in self.local.logits.token.tolist()]


def cantor(layer: int, latent: int) -> int:
    """Number by which circuit-tracer identifies a latent of a layer."""
    total = layer + latent
    return total * (total + 1) // 2 + latent


def slug_of(name: str) -> str:
    """Turn a name into a valid file name."""
    return re.sub(r"[^a-z0-9-]+", "-", name.lower()).strip("-") or "graph"


def as_circuit_tracer(
    drawn: DrawnGraph, slug: str, scan: str, node_share: float, labels: Mapping[int, str]
) -> dict[str, Any]:
    """The graph as circuit-tracer's front end reads it.

    Args:
        drawn: The pruned graph.
        slug: Name of the graph.
        scan: Name of the transcoders.
        node_share: Share of the influence that the nodes were pruned to.
        labels: Label of latents, by their number among those of all layers.
    """
    nodes = _latent_nodes(drawn, labels) + _leaf_nodes(drawn) + _logit_nodes(drawn)
    ids = drawn.column_ids()
    targets = [*ids[: drawn.graph.n], *drawn.logit_ids()]
    pairs = drawn.edges.nonzero().tolist()
    weights = drawn.graph.weights
    links = [
        {"source": ids[s], "target": targets[t], "weight": float(weights[t, s])} for t, s in pairs
    ]
    metadata = {
        "slug": slug,
        "scan": scan,
        "transcoder_list": [],
        "prompt_tokens": drawn.prompt,
        "prompt": "".join(drawn.prompt),
        "title_prefix": "",
        "node_threshold": node_share,
        "schema_version": 1,
    }
    groups = supernodes(drawn)
    # The page draws a supernode only of nodes that are pinned.
    members = [name for _, names in groups for name in names]
    settings = {
        "pinnedIds": [*members, *drawn.logit_ids()][:PINNED] if groups else [],
        "supernodes": [[label, *names] for label, names in groups],
        "linkType": "both",
        "clickedId": "",
        "sg_pos": "",
    }
    return {"metadata": metadata, "qParams": settings, "nodes": nodes, "links": links}


def supernodes(drawn: DrawnGraph) -> list[tuple[str, list[str]]]:
    """Label of every supernode, and the names of its latents that are kept."""
    nodes, ids = drawn.local.nodes, drawn.column_ids()
    labelled = []
    for number, group in enumerate(drawn.groups):
        layers = sorted(set((nodes.layer[group] + 1).tolist()))
        place = int(nodes.position[group[0]])
        mlps = ", ".join(str(layer) for layer in layers)
        label = f"MLP {mlps} at {drawn.prompt[place]!r} ({place}), group {number + 1}"
        kept = [i for i in group.tolist() if bool(drawn.nodes[i])]
        labelled.append((label, [ids[i] for i in kept]))
    return labelled


def _node(node_id: str, feature: int, layer: str, position: int, kind: str) -> dict[str, Any]:
    return {
        "node_id": node_id,
        "feature": feature,
        "layer": layer,
        "ctx_idx": position,
        "feature_type": kind,
        "token_prob": 0.0,
        "is_target_logit": False,
        "run_idx": 0,
        "reverse_ctx_idx": 0,
        "jsNodeId": f"{layer}_{feature}-0",
        "clerp": "",
        "influence": None,
        "activation": None,
    }


def _latent_nodes(drawn: DrawnGraph, labels: Mapping[int, str]) -> list[dict[str, Any]]:
    local, ids = drawn.local, drawn.column_ids()
    share = cumulative_share(drawn.graph.influence()[0]).tolist()
    out = []
    for i in drawn.nodes[: drawn.graph.n].nonzero().squeeze(1).tolist():
        layer, latent = int(local.nodes.layer[i]), int(local.nodes.latent[i])
        position = int(local.nodes.position[i])
        kind = "cross layer transcoder"
        out.append(
            _node(ids[i], cantor(layer, latent), str(layer), position, kind)
            | {
                "jsNodeId": f"{layer}_{latent}-0",
                "clerp": labels.get(layer * local.sae.per_layer + latent, ""),
                "influence": share[i],
                "activation": float(local.nodes.value[i]),
            }
        )
    return out


def _leaf_nodes(drawn: DrawnGraph) -> list[dict[str, Any]]:
    local, ids = drawn.local, drawn.column_ids()
    share = cumulative_share(drawn.graph.influence()[0]).tolist()
    out = []
    for i in drawn.nodes.nonzero().squeeze(1).tolist():
        if i < drawn.graph.n:
            continue
        layer, position = divmod(i - drawn.graph.n, local.length)
        if i < drawn.graph.errors.stop:
            kind = "mlp reconstruction error"
            node = _node(ids[i], -1, str(layer), position, kind)
            node["jsNodeId"] = f"{layer}_{position}-0"
        else:
            token = int(local.frozen.tokens[0, position])
            node = _node(ids[i], position, "E", position, "embedding")
            node["jsNodeId"] = f"E_{token}-{position}"
        out.append(node | {"influence": share[i]})
    return out


def _logit_nodes(drawn: DrawnGraph) -> list[dict[str, Any]]:
    local = drawn.local
    last, layer = local.length - 1, local.n_layer + 1
    out = []
    pairs = zip(local.logits.token.tolist(), local.logits.probability.tolist(), strict=True)
    for i, (token, probability) in enumerate(pairs):
        node = _node(drawn.logit_ids()[i], token, str(layer), last, "logit")
        out.append(
            node
            | {
                "token_prob": probability,
                "is_target_logit": i == 0,
                "jsNodeId": f"L_{token}-{last}",
                "clerp": f'Output "{drawn.pieces[token]}" (p={probability:.3f})',
            }
        )
    return out


def write_circuit_tracer(folder: Path, graphs: Sequence[dict[str, Any]]) -> None:
    """Write each graph, and the list of all graphs, `graph-metadata.json`."""
    for graph in graphs:
        write_json(folder / f"{graph['metadata']['slug']}.json", graph)
    write_json(folder / "graph-metadata.json", {"graphs": [graph["metadata"] for graph in graphs]})


# --- the report ----------------------------------------------------------------------------------


def shown_columns(drawn: DrawnGraph, most: int) -> list[int]:
    """Columns shown in the report, those with the largest influence; tokens only if connected."""
    influence = drawn.graph.influence()[0] * drawn.nodes
    used = drawn.edges.any(0)
    order = torch.argsort(influence * used, descending=True, stable=True)[:most]
    return [i for i in order.tolist() if bool(used[i])]


def as_report(
    drawn: DrawnGraph, most: int, about: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    """The graph of our report.

    Args:
        drawn: The pruned graph.
        most: Nodes shown beside the logits.
        about: Rule and contexts of latents, by their number among those of all layers.
    """
    columns = shown_columns(drawn, most)
    ids, targets = drawn.column_ids(), drawn.logit_ids()
    share = cumulative_share(drawn.graph.influence()[0]).tolist()
    nodes = [_shown_node(drawn, i, about) | {"influence": rounded(share[i], 4)} for i in columns]
    last = drawn.local.n_layer + 1
    for name, token, p in zip(
        targets,
        drawn.local.logits.token.tolist(),
        drawn.local.logits.probability.tolist(),
        strict=True,
    ):
        label = f"next {drawn.pieces[token]!r}"
        nodes.append(_shown(name, label, last, 0, p, {}))
    chosen = dict.fromkeys(columns)
    rows = [*ids[: drawn.graph.n], *targets]
    edges = []
    for (t, s), parts in zip(drawn.edges.nonzero().tolist(), drawn.parts, strict=True):
        if s in chosen and (t >= drawn.graph.n or t in chosen):
            weight = rounded(float(drawn.graph.weights[t, s]), 4)
            edge = {"from": ids[s], "to": rows[t], "weight": weight}
            edges.append(edge | _carriers(drawn.local, parts))
    groups = [{"label": label, "members": members} for label, members in supernodes(drawn)]
    return {"title": drawn.title, "nodes": nodes, "edges": edges, "groups": groups}


def _carriers(local: LocalModel, parts: Tensor) -> dict[str, Any]:
    """The largest parts of an edge by the head that carries them; nothing if it passes none."""
    if not bool(parts[1:].any()):
        return {}
    order = parts.abs().argsort(descending=True, stable=True)[:CARRIERS].tolist()
    named = [[name_of(local, i) or "no head", rounded(float(parts[i]), 4)] for i in order]
    return {"parts": [part for part in named if part[1]]}


def _shown_node(
    drawn: DrawnGraph, i: int, about: Mapping[int, Mapping[str, Any]]
) -> dict[str, Any]:
    local, name = drawn.local, drawn.column_ids()[i]
    if i < drawn.graph.n:
        layer, latent = int(local.nodes.layer[i]), int(local.nodes.latent[i])
        row = int(local.nodes.position[i]) - local.length + 1
        known = about.get(layer * local.sae.per_layer + latent, {})
        value = float(local.nodes.value[i])
        return _shown(name, f"MLP {layer + 1} #{latent}", layer + 1, row, value, known)
    layer, position = divmod(i - drawn.graph.n, local.length)
    row = position - local.length + 1
    if i < drawn.graph.errors.stop:
        size = float(local.error[layer, position].norm())
        return _shown(name, f"MLP {layer + 1} error", layer + 1, row, size, {})
    label = f"token {drawn.prompt[position]!r}"
    return _shown(name, label, 0, row, None, {})


def _shown(
    name: str,
    label: str,
    column: int,
    row: int,
    value: float | None,
    about: Mapping[str, Any],
) -> dict[str, Any]:
    return {
        "id": name,
        "label": label,
        "column": column,
        "row": row,
        "value": None if value is None else rounded(value, 4),
        "rule": about.get("rule"),
        "contexts": list(about.get("top", []))[:4],
    }
