"""Attribution graphs: the identities of the local replacement model, influence, interventions."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor

from sae_experiments.cli.main import execute
from sae_experiments.config.compose import compose_checked
from sae_experiments.corpora.corpus import CharCorpus
from sae_experiments.errors import UserError
from sae_experiments.plots import attribution_checks, circuits_graph, virtual_removal
from sae_experiments.plots.base import NothingToDrawError
from sae_experiments.report import page
from sae_experiments.results.table import load_table
from sae_experiments.saes.circuit_tracer import load_transcoders
from sae_experiments.studies.attribution.front_end import cantor
from sae_experiments.studies.attribution.influence import Graph, keep_share, prune
from sae_experiments.studies.attribution.interventions import Interventions
from sae_experiments.studies.attribution.local import LocalModel
from sae_experiments.studies.attribution.prompts import (
    PromptSpec,
    choose,
    closes,
    given,
    names_speaker,
)
from support.attribution_worlds import every_world, graph_of, local_model, world
from support.common import CONF, TINY
from support.fake_runs import make_run
from support.pretrained import TEXT
from support.pretrained import folder_of as pretrained_folder


@every_world
def test_what_goes_into_a_node_adds_up_to_its_pre_activation(
    kind: str, cross: bool, skip: bool
) -> None:
    local, adjacency = local_model(kind, cross, skip)
    assert local.nodes.n > 40
    assert adjacency.gap < 1e-5  # some layouts norm and attend in single precision
    if kind == "gpt2":
        assert adjacency.gap < 1e-9
        assert float(adjacency.weights[:, local.sources.positions].abs().max()) > 1e-3
    assert float(adjacency.weights[:, local.sources.biases].abs().max()) > 1e-3


@every_world
def test_edges_are_the_gradients_of_a_replay_with_the_constants_detached(
    kind: str, cross: bool, skip: bool
) -> None:
    """The recipe of circuit-tracer: autograd of the model with patterns, norms and MLPs held."""
    local, adjacency = local_model(kind, cross, skip)
    sae, frozen, nodes = local.sae, local.frozen, local.nodes
    values = nodes.value.clone().requires_grad_()
    errors = local.error.clone().requires_grad_()
    tokens = local.token_embedding.detach().clone().requires_grad_()
    dense = torch.zeros_like(local.acts).index_put(
        (nodes.position, nodes.layer * sae.per_layer + nodes.latent), values
    )
    frozen.embedded = (tokens + local.position_embedding.detach())[None]

    def mlp(k: int, x: Tensor) -> Tensor:
        written = sae.decode_to(k, dense[local.first :]) + errors[k][local.first :]
        return sae.skip_to(k, x) + written

    # Before the text there is no transcoder, and what an MLP writes is an error.
    frozen.clean = [
        clean._replace(mlp_out=error[None])
        for clean, error in zip(frozen.clean, errors, strict=True)
    ]
    run = type(frozen).held.__wrapped__(frozen, mlp)
    torch.testing.assert_close(run.logits, frozen.logits, rtol=1e-4, atol=1e-5)
    targets = []
    for i in torch.arange(0, nodes.n, 17).tolist():
        layer, t = int(nodes.layer[i]), int(nodes.position[i])
        row = sae.encoders[layer * sae.per_layer + int(nodes.latent[i])]
        targets.append((i, run.mlp_in[layer][0, t] @ row))
    last = run.logits[0, -1]
    for j, token in enumerate(local.logits.token.tolist()):
        targets.append((nodes.n + j, last[token] - last.mean()))
    for i, target in targets:
        leaves = (values, errors, tokens)
        grads = torch.autograd.grad(
            target, leaves, retain_graph=True, allow_unused=True, materialize_grads=True
        )
        wanted = [
            grads[0] * values,
            (grads[1] * errors).sum(-1).flatten(),
            (grads[2] * tokens).sum(-1),
        ]
        found = adjacency.weights[i, : local.sources.tokens.stop]
        torch.testing.assert_close(found, torch.cat(wanted).detach(), rtol=1e-4, atol=1e-6)


def test_no_edge_leads_back_or_into_the_same_layer() -> None:
    local, adjacency = local_model()
    nodes, n = local.nodes, local.nodes.n
    edges = adjacency.weights[:n, :n] != 0
    assert edges.any()
    target, source = edges.nonzero(as_tuple=True)
    assert bool((nodes.layer[source] < nodes.layer[target]).all())
    assert bool((nodes.position[source] <= nodes.position[target]).all())
    first = nodes.layer == 0
    assert not bool(adjacency.weights[:n][first][:, : local.sources.errors.stop].any())


def test_the_result_does_not_depend_on_the_batch() -> None:
    _, whole = local_model(memory_mb=64)
    local, small = local_model(memory_mb=1e-3)
    assert local.batch == 1
    torch.testing.assert_close(whole.weights, small.weights)


def test_without_cross_layer_decoders_it_is_the_graph_of_per_layer_transcoders() -> None:
    lm, sae, ids = world(cross=True)
    _, plain, _ = world(cross=False)
    with torch.no_grad():
        for k in range(4):
            block = torch.zeros_like(sae.decoders[k])
            block[k * sae.per_layer :] = plain.decoders[k]
            sae.decoders[k].copy_(block)
    plain.load_state_dict(
        {k: v for k, v in sae.state_dict().items() if "decoders" not in k}, strict=False
    )
    one, other = (LocalModel(lm, each, ids[:1]).adjacency() for each in (sae, plain))
    torch.testing.assert_close(one.weights, other.weights)


# --- influence -----------------------------------------------------------------------------------


def test_influence_is_the_sum_of_the_geometric_series() -> None:
    local, adjacency = local_model()
    graph = graph_of(local, adjacency)
    n, m = graph.n, len(graph.probability)
    size = graph.weights.shape[1] + m
    square = torch.zeros(size, size, dtype=torch.float64)
    rows = torch.cat([torch.arange(n), torch.arange(size - m, size)])
    square[rows, : size - m] = graph.normalised
    start = torch.zeros(size, dtype=torch.float64)
    start[-m:] = graph.probability
    series = torch.linalg.inv(torch.eye(size, dtype=torch.float64) - square)
    expected = start @ (series - torch.eye(size, dtype=torch.float64))
    total, _ = graph.influence()
    torch.testing.assert_close(total, expected[: size - m])
    leaves = total[graph.errors].sum() + total[graph.tokens].sum()
    torch.testing.assert_close(leaves, graph.probability.sum())
    scores = graph.scores()
    assert scores["replacement"] == pytest.approx(
        float(total[graph.tokens].sum() / graph.probability.sum())
    )
    assert 0 < scores["completeness"] < scores["completeness_all"] < 1


def test_a_hand_made_graph_has_the_scores_worked_out_by_hand() -> None:
    """Two latents, one error, one token; latent 1 reads latent 0, the error and the token."""
    weights = torch.tensor(
        [[0.0, 0.0, 0.0, 2.0], [1.0, 0.0, -2.0, 1.0], [0.0, -3.0, 0.0, 1.0]], dtype=torch.float64
    )
    graph = Graph(weights, torch.tensor([0.8], dtype=torch.float64), 1)
    total, _ = graph.influence()
    expected = torch.tensor([0.15, 0.6, 0.3, 0.5], dtype=torch.float64)
    torch.testing.assert_close(total, expected)
    scores = graph.scores()
    assert scores["replacement"] == pytest.approx(0.5 / 0.8)
    assert scores["completeness"] == pytest.approx(1 - 0.5 * 0.6 / (0.15 + 0.6 + 0.8))
    assert scores["completeness_all"] == pytest.approx(1 - 0.3 / (0.15 + 0.6 + 0.8 + 0.8))
    kept = torch.tensor([False, True, False, True])
    pruned = graph.unexplained(kept).scores()  # the error and latent 0 count as errors
    assert pruned["replacement"] == pytest.approx((0.2 + 0.6 * 0.25) / 0.8)


def test_pruning_keeps_what_carries_the_influence_and_nothing_that_leads_nowhere() -> None:
    local, adjacency = local_model()
    graph = graph_of(local, adjacency)
    everything, edges = prune(graph, 1.0, 1.0)
    total, _ = graph.influence()
    assert bool(everything[total > 1e-9].all()) and int(edges.sum()) > 1000
    nodes, edges = prune(graph, 0.6, 0.9)
    assert 0 < int(nodes[: graph.n].sum()) < int(everything[: graph.n].sum())
    assert bool(nodes[graph.tokens].all())
    target, source = edges.nonzero(as_tuple=True)
    assert bool(nodes[source].all()) and bool(nodes[target[target < graph.n]].all())
    kept = nodes.clone()
    kept[graph.tokens] = False
    assert bool(edges.any(0)[kept].all())
    assert bool(edges[: graph.n].any(1)[nodes[: graph.n]].all())


def test_a_share_is_reached_by_the_largest() -> None:
    assert keep_share(torch.tensor([1.0, 5.0, 4.0]), 0.9).tolist() == [False, True, True]
    assert keep_share(torch.tensor([1.0, 5.0, 4.0]), 0.91).tolist() == [True, True, True]


# --- interventions -------------------------------------------------------------------------------


@pytest.mark.parametrize("multiple", [0.0, 2.0])
@every_world
def test_a_clamped_latent_moves_everything_by_its_column_if_norms_are_held(
    kind: str, cross: bool, skip: bool, multiple: float
) -> None:
    local, adjacency = local_model(kind, cross, skip)
    made = Interventions(local, adjacency, memory_mb=1e-1)
    sources = made.one_each(torch.arange(0, local.nodes.n, 9))
    assert made.batch < len(sources)
    predicted = made.direct(sources, multiple)
    measured = made.measure(sources, multiple, free=False, hold_norms=True)
    if skip:  # clamped MLPs have no skip path: only what does not pass one is the column
        plain = local.sae.W_skip.clone()
        local.sae.W_skip.zero_()
        predicted = Interventions(local, local.adjacency()).direct(sources, multiple)
        local.sae.W_skip.copy_(plain)
    torch.testing.assert_close(measured.latents, predicted.latents, rtol=1e-4, atol=1e-5)
    torch.testing.assert_close(measured.logits, predicted.logits, rtol=1e-4, atol=1e-5)
    assert not bool((predicted.latents != 0)[~made.later(sources)].any())


def test_a_total_effect_is_the_sum_over_all_paths() -> None:
    local, adjacency = local_model()
    made = Interventions(local, adjacency)
    n = local.nodes.n
    slopes = made.slopes[:n]
    paths = torch.linalg.inv(torch.eye(n, dtype=torch.float64) - slopes)
    sources = torch.arange(5)
    start = -adjacency.weights[:n, sources]
    expected = paths @ start
    torch.testing.assert_close(made.total(made.one_each(sources), 0.0).latents, expected.t())
    last = made.one_each(torch.tensor([n - 1]))
    last, direct = made.total(last, 0.0), made.direct(last, 0.0)
    torch.testing.assert_close(last.logits, direct.logits)


def test_deleting_nothing_costs_nothing_and_deleting_more_something() -> None:
    local, adjacency = local_model()
    made = Interventions(local, adjacency)
    order = local.nodes.value.argsort(descending=True)
    cost = made.deletion(order, [0, 1, 8, 10**6])
    assert float(cost[0]) == pytest.approx(0, abs=1e-12)
    assert bool((cost[2:] > 1e-3).all())  # the largest one may be too late to matter


# --- prompts -------------------------------------------------------------------------------------


def test_quotations_that_close_and_names_of_speakers_are_told_from_what_is_like_them() -> None:
    assert closes('he said "go', '"') and closes("so 'tis said, 'come here", "'")
    for text, after in [
        ('he said "go" and left', '"'),
        ("I don", "'"),
        ("the boys", "'"),
        ('he said "go ', '"'),
        ('he said "go', "n"),
        ("", '"'),
    ]:
        assert not closes(text, after), text
    assert names_speaker("sleep.\n\nROM", "E") and names_speaker("\n\nFirst Citizen", ":")
    for text, after in [
        ("sleep.\n\nROMEO: he", "r"),
        ("sleep.\nROM", "E"),
        ("sleep.\n\nrom", "e"),
        ("sleep.\n\nR", "O"),
        ("\n\nROMEO", "\n"),
        ("ROM", "E"),
    ]:
        assert not names_speaker(text, after), text


def test_kinds_of_prompts_that_occur_take_turns() -> None:
    """A model that knows each next token with probability one half."""
    text = 'ALONSO:\nno "no" no.\n\nTRINCULO:\n"yes" yes.\n\n'
    symbols = sorted(set(text))
    ids = torch.tensor([symbols.index(c) for c in text * 4])
    tokens, following = ids[:-1].unfold(0, 24, 5), ids[1:].unfold(0, 24, 5)

    class Sure(torch.nn.Module):
        def __init__(self) -> None:
            super().__init__()
            self.w = torch.nn.Parameter(torch.zeros(()))

        def forward(self, input_ids: Tensor, use_cache: bool) -> Any:
            logits = torch.zeros(*input_ids.shape, len(symbols))
            n = input_ids.shape[1]
            right = following[:, :n, None]
            return type("Out", (), {"logits": logits.scatter(2, right, 3.0)})

    def chosen(kinds: list[str], symbols: list[str] = symbols) -> list[str]:
        spec = PromptSpec(texts=None, count=4, length=24, windows=100, kinds=kinds)
        return [p.kind for p in choose(Sure(), tokens, following, symbols, spec)]

    assert (
        chosen(["closing quotation", "speaker name"])
        == [
            "closing quotation",
            "speaker name",
        ]
        * 2
    )
    plain = [c if c.isalpha() else "." for c in symbols]
    assert chosen(["closing quotation", "word completion"], plain) == ["word completion"] * 4
    assert chosen(["closing quotation"], plain) == ["any"] * 4
    with pytest.raises(UserError, match="kinds"):
        PromptSpec(texts=None, count=4, length=24, windows=1, kinds=["riddle"])


# --- the study -----------------------------------------------------------------------------------

SMALL = [
    *(
        o
        for o in TINY.split()
        if not o.startswith(("metric.", "lm.n_positions", "fit.train.steps"))
    ),
    "study=attribution",
    "metric=[reconstruction,replacement,features]",
    "metric.replacement.windows=16",
    "lm.n_positions=24",
    "study.graph.node_share=0.98",
    "fit.train.steps=40",
    "data=[text8]",
    "seeds=[0]",
]


def run(home: Path, text: Path, *more: str) -> Path:
    """A run in this process; `text` stands for text8."""
    return ran(home, *SMALL, f"data.text8.file={text}", "data.text8.head=null", *more)


def ran(home: Path, *options: str) -> Path:
    """A run in this process."""
    where = [f"runs_root={home}/runs", f"cache={home}/cache", "out_dir=run_0", "verbosity=quiet"]
    cfg, label = compose_checked(CONF, [*options, *where, "device=cpu"])
    about = {
        "argv": [],
        "overrides": [],
        "preset": "smoke",
        "preset_reason": "asked for",
        "plan_note": "",
    }
    return execute(cfg, about=about, label=label)


@pytest.fixture(scope="module")
def first(tmp_path_factory: pytest.TempPathFactory, corpus_file: Path) -> Path:
    """A finished run on the made text, both kinds of transcoders."""
    home = tmp_path_factory.mktemp("attribution")
    return run(home, corpus_file, "sae=[cross_layer_transcoder,per_layer_transcoder]")


def load(path: Path) -> Any:
    return json.loads(path.read_text())


def test_a_run_measures_graphs_and_checks_them(first: Path) -> None:
    final = load(first / "final_info.json")
    described = set(load(first / "manifest.json")["metrics"])
    assert set(final) == {"text8.cross_layer_transcoder", "text8.per_layer_transcoder"}
    for name, one in final.items():
        means = one["means"] | one["more_means"]
        assert {m.removesuffix("_mean") for m in means} <= described
        assert means["graph_gap_mean"] < 1e-4 and means["replaced_with_errors_gap_mean"] < 1e-4
        assert 0 < means["graph_replacement_mean"] < 1 and 0 < means["graph_completeness_mean"] < 1
        assert means["graph_latents_kept_mean"] >= 1 and means["constrained_latent_pairs_mean"] > 50
        assert means["constrained_latent_pearson_mean"] > 0.5
        assert means["deletion_influence_mean"] > means["deletion_random_mean"] > 0
        graphs = load(first / "graphs" / f"{name}_0.json")
        assert len(graphs) == 3
        for graph in graphs:
            ids = {node["id"] for node in graph["nodes"]}
            assert len(ids) == len(graph["nodes"]) and graph["edges"]
            assert all(e["from"] in ids and e["to"] in ids for e in graph["edges"])
            assert len(graph["groups"]) == len(graph["removals"])
            assert all(len(group["members"]) > 1 for group in graph["groups"])
        edges = [edge for graph in graphs for edge in graph["edges"]]
        assert any(part[0].startswith("block") for e in edges for part in e.get("parts", []))
        assert any(graph["groups"] for graph in graphs)
        assert 0 < means["graph_attention_share_mean"] < 1
        assert 0 <= means["virtual_never_share_mean"] <= 1
        assert (
            0 <= means["virtual_removable_random_mean"] <= means["virtual_removable_expected_mean"]
        )
        assert means["virtual_worth_mean"] != 0
        features = load(first / "features" / f"{name}_0.json")
        assert any(f.get("virtual_from") for f in features)
        assert any(f.get("virtual_to") for f in features)
        assert any(node["contexts"] for graph in graphs for node in graph["nodes"])


def test_the_graphs_of_a_run_are_in_its_report_and_not_in_the_figure_of_circuits(
    first: Path,
) -> None:
    table = load_table([first])
    assert "Attribution graphs" in page.page(table, [])
    with pytest.raises(NothingToDrawError):
        circuits_graph.draw(table, title="", graphs=2, nodes=4, max_rows=4)


def test_the_checks_of_a_run_are_drawn_and_a_run_without_them_is_not(
    first: Path, tmp_path: Path
) -> None:
    figure = attribution_checks.draw(load_table([first]), title="Checks", max_rows=1, points=50)
    drawn = [ax for ax in figure.axes if ax.get_visible() and ax.axison]
    assert len(drawn) == 4 and len(drawn[0].lines) == 5  # four orders and the axis
    assert sum(len(ax.collections[0].get_offsets()) for ax in drawn[1:]) <= 3 * 50
    bare = load_table([make_run(tmp_path, "run_1", seeds=(0,))])
    with pytest.raises(NothingToDrawError):
        attribution_checks.draw(bare, title="", max_rows=1, points=50)
    (axes,) = virtual_removal.draw(load_table([first]), title="Removal", max_rows=1).axes
    assert len(axes.lines) == 4  # three orders and the axis
    with pytest.raises(NothingToDrawError):
        virtual_removal.draw(bare, title="", max_rows=1)


def test_the_json_is_what_circuit_tracers_page_reads(first: Path) -> None:
    folder = first / "circuit_tracer" / "text8.cross_layer_transcoder_0"
    listed = load(folder / "graph-metadata.json")["graphs"]
    assert len(listed) == 3
    kinds = set()
    read = load_transcoders(folder / "transcoders")
    assert read.n_sites == 2 and read.cross
    for metadata in listed:
        graph = load(folder / f"{metadata['slug']}.json")
        assert graph["metadata"] == metadata and metadata["schema_version"] == 1
        assert "".join(metadata["prompt_tokens"]) == metadata["prompt"]
        ids = [node["node_id"] for node in graph["nodes"]]
        assert len(set(ids)) == len(ids)
        assert {end for e in graph["links"] for end in (e["source"], e["target"])} <= set(ids)
        kinds |= {node["feature_type"] for node in graph["nodes"]}
        assert sum(node["is_target_logit"] for node in graph["nodes"]) == 1
        for node in graph["nodes"]:
            assert set(node) == NODE_KEYS and isinstance(node["feature"], int)
    assert kinds >= {"cross layer transcoder", "embedding", "logit"}


NODE_KEYS = {
    "node_id",
    "feature",
    "layer",
    "ctx_idx",
    "feature_type",
    "token_prob",
    "is_target_logit",
    "run_idx",
    "reverse_ctx_idx",
    "jsNodeId",
    "clerp",
    "influence",
    "activation",
}


def test_numbers_of_latents_are_circuit_tracers() -> None:
    assert [cantor(0, 0), cantor(0, 1), cantor(1, 0), cantor(2, 3)] == [0, 2, 1, 18]


def test_a_pretrained_model_is_traced_from_its_begin_token_on(tmp_path: Path) -> None:
    """Llama layout, byte pairs, the study's own metrics; one prompt is typed."""
    (tmp_path / "text.txt").write_text(TEXT)
    folder = pretrained_folder(tmp_path / "tiny" / "model")
    prompt = TEXT[:40]
    options = "preset=smoke lm=pretrained lm.n_positions=16 data=text seeds=[0] fit.train_rows=3000"
    options += " fit.train.batch_size=128 fit.held_out_rows=2048 metric.replacement.windows=8"
    done = ran(
        tmp_path,
        "study=attribution",
        *options.split(),
        f"lm.path={folder}",
        f"data.text.file={tmp_path / 'text.txt'}",
        f"study.prompts.texts=[{json.dumps(prompt)}]",
    )
    final = load(done / "final_info.json")["text"]
    means = final["means"] | final["more_means"]
    assert means["graph_gap_mean"] < 1e-4 and means["replaced_with_errors_gap_mean"] < 1e-4
    assert means["replaced_frozen_ce_delta_bits_mean"] is not None
    assert means["constrained_latent_pearson_mean"] > 0.5
    (listed,) = load(done / "circuit_tracer" / "text_0" / "graph-metadata.json")["graphs"]
    assert listed["prompt_tokens"][0] == "<s>" and "".join(listed["prompt_tokens"][1:]) == prompt
    (graph,) = load(done / "graphs" / "text_0.json")
    labels = [node["label"] for node in graph["nodes"]]
    assert any(label.startswith("token") for label in labels)
    traced = load(done / "circuit_tracer" / "text_0" / f"{listed['slug']}.json")
    positions = {n["ctx_idx"] for n in traced["nodes"] if "transcoder" in n["feature_type"]}
    assert positions and 0 not in positions


def test_what_cannot_be_traced_is_one_line(tmp_path: Path, corpus_file: Path) -> None:
    letters = CharCorpus(
        name="letters",
        splits={"train": np.zeros(1, np.uint8)},
        symbols=sorted("a ctx"),
        provenance={},
        key="letters",
    )
    with pytest.raises(UserError, match="transcoders of every layer"):
        run(tmp_path, corpus_file, "sae=topk")
    with pytest.raises(UserError, match="characters that the corpus has, not"):
        given(["a cat", "\N{SNOWMAN} x"], letters, 20)
    with pytest.raises(UserError, match="2 to 20 characters that the corpus has, not 1"):
        given(["a"], letters, 20)
    with pytest.raises(UserError, match=r"multiples=1"):
        run(tmp_path, corpus_file, "study.checks.multiples=[1]")
