"""Reading and replacing activations gives what the model computes, and the store on disk gives
it back.
"""

from __future__ import annotations

import json
import tracemalloc
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from torch import nn

from sae_experiments.errors import UserError
from sae_experiments.metrics.steering import continued
from sae_experiments.models import store as activations_module
from sae_experiments.models.begin import begin_with
from sae_experiments.models.gpt2 import build_lm
from sae_experiments.models.hooks import Site, activations, capture, parse_site, patched
from sae_experiments.models.store import Source, Store, collect
from support.common import lm_spec

LAYERS, WIDTH, LENGTH, VOCABULARY = 3, 16, 16, 11
SITES = [Site("resid", layer) for layer in range(LAYERS + 1)] + [
    Site(s, layer) for s in ("attn_out", "mlp_in", "mlp_act", "mlp_out") for layer in (1, 2, 3)
]


@pytest.fixture
def model() -> Any:
    made = build_lm(lm_spec(), VOCABULARY, seed=0).eval()
    with torch.no_grad():
        for p in (
            made.parameters()
        ):  # at their initial size, what blocks add is lost beside the embeddings
            if p.ndim == 2:
                p.mul_(5)
    return made


@pytest.fixture
def tokens() -> torch.Tensor:
    return torch.randint(VOCABULARY, (5, LENGTH), generator=torch.Generator().manual_seed(0))


def hooks(model: nn.Module) -> int:
    return sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.modules())


def logits(model: nn.Module, tokens: torch.Tensor) -> torch.Tensor:
    with torch.no_grad():
        return model(input_ids=tokens, use_cache=False).logits


# ------------------------------------------------------------------------------------------------
# sites


@pytest.mark.parametrize(
    ("text", "site"),
    [
        ("resid.mid", Site("resid", 3)),
        ("resid.0", Site("resid", 0)),
        ("resid.6", Site("resid", 6)),
        ("mlp_in.1", Site("mlp_in", 1)),
        ("mlp_act.mid", Site("mlp_act", 3)),
        ("mlp_out.6", Site("mlp_out", 6)),
    ],
)
def test_a_site_is_a_stream_and_a_block_counted_from_one(text, site):
    assert parse_site(text, 6) == site
    assert parse_site(str(site), 6) == site


@pytest.mark.parametrize(
    "text",
    [
        "resid.7",
        "resid",
        "resid.",
        "mlp_in.0",
        "mlp_out.7",
        "attn.2",
        "resid.-1",
        "resid.1.5",
        "resid.two",
        "",
        "mlp_act",
        "resid.²",
    ],
)
def test_a_site_that_does_not_exist_is_one_line_that_names_it_and_those_that_do(text):
    with pytest.raises(UserError) as caught:
        parse_site(text, 6)
    assert (
        repr(text) in str(caught.value)
        and "resid.6" in str(caught.value)
        and "\n" not in str(caught.value)
    )


def test_a_model_of_one_block_has_no_middle_of_its_mlps():
    assert parse_site("resid.mid", 1) == Site("resid", 0)
    with pytest.raises(UserError):
        parse_site("mlp_in.mid", 1)


# ------------------------------------------------------------------------------------------------
# reading


def test_residual_streams_equal_the_hidden_states_of_transformers(model, tokens):
    found = activations(model, tokens, SITES)
    with torch.no_grad():
        states = model(input_ids=tokens, output_hidden_states=True, use_cache=False).hidden_states
    assert len(states) == LAYERS + 1
    for layer in range(LAYERS):
        assert torch.equal(found[Site("resid", layer)], states[layer]), f"resid.{layer}"
    # transformers gives the last one after the final layer norm
    torch.testing.assert_close(model.transformer.ln_f(found[Site("resid", LAYERS)]), states[LAYERS])


def test_mlp_sites_equal_the_mlp_computed_by_hand(model, tokens):
    found = activations(model, tokens, SITES)
    for layer in range(1, LAYERS + 1):
        block = model.transformer.h[layer - 1]
        read, act, out, after = (
            found[Site(s, layer)] for s in ("mlp_in", "mlp_act", "mlp_out", "resid")
        )
        assert act.shape[-1] == 4 * WIDTH and read.shape[-1] == out.shape[-1] == WIDTH
        torch.testing.assert_close(read, block.ln_2(after - out), rtol=1e-4, atol=1e-5)
        torch.testing.assert_close(
            act,
            nn.functional.gelu(
                read @ block.mlp.c_fc.weight + block.mlp.c_fc.bias, approximate="tanh"
            ),
        )
        torch.testing.assert_close(out, act @ block.mlp.c_proj.weight + block.mlp.c_proj.bias)


def test_capture_sees_what_activations_gives_and_leaves_the_logits_bit_identical(model, tokens):
    plain = logits(model, tokens)
    with capture(model, SITES) as seen:
        assert torch.equal(logits(model, tokens), plain)
    found = activations(model, tokens, SITES)
    assert set(seen) == set(found) == set(SITES)
    assert all(torch.equal(seen[s], found[s]) for s in SITES)


@pytest.mark.parametrize("site", SITES, ids=str)
def test_the_forward_pass_ends_at_the_site(model, tokens, site):
    ran = []
    for i, block in enumerate(model.transformer.h):
        block.ln_1.register_forward_hook(lambda *_, i=i: ran.append(f"block {i + 1}"))
    model.transformer.ln_f.register_forward_hook(lambda *_: ran.append("ln_f"))
    activations(model, tokens, [site])
    assert ran == [f"block {i + 1}" for i in range(site.layer)], (
        "later blocks are not run, earlier ones once"
    )


def test_several_sites_need_one_pass_that_ends_at_the_last(model, tokens):
    ran = []
    for i, block in enumerate(model.transformer.h):
        block.ln_1.register_forward_hook(lambda *_, i=i: ran.append(i + 1))
    wanted = [Site("mlp_act", 2), Site("resid", 0), Site("resid", 1)]
    assert set(activations(model, tokens, wanted)) == set(wanted)
    assert ran == [1, 2]


def test_activations_carry_no_graph(model, tokens):
    assert not any(x.requires_grad for x in activations(model, tokens, SITES).values())


# ------------------------------------------------------------------------------------------------
# replacing


@pytest.mark.parametrize("site", SITES, ids=str)
def test_patching_with_the_identity_leaves_the_logits_bit_identical(model, tokens, site):
    plain = logits(model, tokens)
    with patched(model, site, lambda x: x.clone()):
        assert torch.equal(logits(model, tokens), plain)
    with patched(model, site, lambda x: x + 1):
        assert not torch.allclose(logits(model, tokens), plain)
    assert torch.equal(logits(model, tokens), plain)


@pytest.mark.parametrize("layer", range(LAYERS + 1))
def test_what_is_patched_in_is_what_later_blocks_read(model, tokens, layer):
    other = tokens.flip(0)
    replacement = activations(model, other, [Site("resid", layer)])[Site("resid", layer)]
    with patched(model, Site("resid", layer), lambda x: replacement):
        found = logits(model, tokens)
    torch.testing.assert_close(found, logits(model, other))


def test_an_mlp_whose_output_is_zero_adds_nothing(model, tokens):
    site = Site("mlp_out", 2)
    with (
        patched(model, site, torch.zeros_like),
        capture(model, [Site("resid", 2), Site("mlp_in", 2)]) as seen,
    ):
        logits(model, tokens)
    torch.testing.assert_close(
        model.transformer.h[1].ln_2(seen[Site("resid", 2)]), seen[Site("mlp_in", 2)]
    )


@pytest.mark.parametrize(
    "site",
    [Site("resid", 0), Site("resid", 2), Site("mlp_in", 1), Site("mlp_act", 3), Site("mlp_out", 2)],
    ids=str,
)
def test_hooks_are_gone_after_exceptions(model, tokens, site):
    def fail(x):
        raise RuntimeError("inside")

    with pytest.raises(RuntimeError, match="inside"), patched(model, site, fail):
        logits(model, tokens)
    with pytest.raises(RuntimeError, match="outside"), capture(model, [site]):
        raise RuntimeError("outside")
    handle = model.transformer.h[0].attn.register_forward_pre_hook(lambda *_: fail(None))
    with pytest.raises(RuntimeError, match="inside"):
        activations(model, tokens, [Site("resid", 3)])
    handle.remove()
    assert hooks(model) == 0
    activations(model, tokens, [site])
    assert hooks(model) == 0


def test_a_model_of_another_layout_is_named():
    with pytest.raises(UserError, match=r"Linear: model_type=None is not a known layout"):
        activations(nn.Linear(2, 2), torch.zeros(1, 2), [Site("resid", 1)])


def only_first(x: torch.Tensor) -> torch.Tensor:
    return torch.cat([x[:, :1], torch.zeros_like(x[:, 1:])], 1)


@pytest.mark.parametrize("kind", ["gpt2", "opt", "llama"])
def test_a_begin_token_is_read_by_the_model_and_seen_by_no_caller(kind):
    from support.layouts import MADE, all_sites, made

    config = next(c for (name, _), c in MADE.items() if name == kind)
    plain, begun = made(config), made(config)
    begin_with(begun, 5)
    ids = torch.randint(31, (3, 9), generator=torch.Generator().manual_seed(2))
    whole = torch.cat([torch.full((3, 1), 5), ids], 1)
    sites = all_sites(plain)
    assert torch.equal(logits(begun, ids), logits(plain, whole)[:, 1:])
    wanted, read = activations(plain, whole, sites), activations(begun, ids, sites)
    assert all(torch.equal(read[s], wanted[s][:, 1:]) for s in sites)
    for site in sites:
        with patched(begun, site, lambda x: x.clone()):
            assert torch.equal(logits(begun, ids), logits(plain, whole)[:, 1:])
        with patched(begun, site, torch.zeros_like), patched(plain, site, only_first):
            assert torch.equal(logits(begun, ids), logits(plain, whole)[:, 1:]), site


def test_a_begin_token_stands_once_before_a_text_that_is_generated():
    from support.layouts import MADE, made

    config = next(c for (name, _), c in MADE.items() if name == "llama")
    plain, begun = made(config), made(config)
    begin_with(begun, 5)
    plain.config.n_positions = begun.config.n_positions = 12
    prompt, whole = torch.tensor([7, 8]), torch.tensor([5, 7, 8])
    nothing = {Site("resid", 1): torch.zeros(1, config.hidden_size)}
    one, other = (
        continued(model, ids, nothing, 4, seed=0, top_k=1)
        for model, ids in ((begun, prompt), (plain, whole))
    )
    assert one.tolist() == other.tolist()


# ------------------------------------------------------------------------------------------------
# the store


class Text:
    """A text of random ids; ``tokens_of`` notes how many windows were asked for at a time."""

    def __init__(self, n: int = 400) -> None:
        self.ids = torch.randint(VOCABULARY, (n,), generator=torch.Generator().manual_seed(1))
        self.asked: list[int] = []

    def __call__(self, starts: np.ndarray) -> torch.Tensor:
        self.asked.append(len(starts))
        return torch.stack([self.ids[s : s + LENGTH] for s in starts])


def collected(
    model: nn.Module, cache: Path, *, starts: Any = None, text: Text | None = None, **changes: Any
) -> Store:
    plain = {"length": LENGTH, "split": "train", "key": {"lm": 1}, "dtype": "float32", "batch": 4}
    starts = np.arange(0, 10 * LENGTH, LENGTH) if starts is None else np.asarray(starts)
    sites = changes.pop("sites", [Site("resid", 1), Site("mlp_act", 2)])
    source = Source(model=model, tokens_of=text or Text(), **(plain | changes))
    return collect(source, starts, sites, cache=cache)


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("batch", [1, 4, 100])
def test_rows_of_the_store_equal_a_direct_forward_pass(model, tmp_path, dtype, batch):
    text, starts = Text(), np.array([0, 5, 16, 100, 333])
    store = collected(model, tmp_path, starts=starts, text=text, dtype=dtype, batch=batch)
    direct = activations(model, text(starts), list(store.sites))
    assert store.n_rows == len(starts) * LENGTH and max(text.asked[:-1]) <= batch
    for site, x in direct.items():
        expected = x.reshape(-1, x.shape[-1])
        found = store.rows(site, slice(None))
        assert found.dtype == torch.float32 and store.width(site) == expected.shape[1]
        off = (
            1e-3 * float(expected.std()) if dtype == "float16" else 1e-5
        )  # half precision is about the mean
        torch.testing.assert_close(
            found, expected, rtol=1e-5 if dtype == "float32" else 1e-3, atol=off
        )
        row = 3 * LENGTH + 7  # position 7 of window 3
        torch.testing.assert_close(
            store.rows(site, np.array([row]))[0], x[3, 7], rtol=1e-3, atol=off
        )


def test_a_store_is_made_once_and_another_text_model_or_site_has_another(model, tmp_path):
    text = Text()
    first = collected(model, tmp_path, text=text)
    asked = len(text.asked)
    assert collected(model, tmp_path, text=text).folder == first.folder and len(text.asked) == asked
    others = [
        {"starts": [0, 16, 33]},
        {"dtype": "float16"},
        {"key": {"lm": 2}},
        {"split": "val"},
        {"sites": [Site("resid", 1)]},
    ]
    assert (
        len({collected(model, tmp_path, **o).folder for o in others} | {first.folder})
        == len(others) + 1
    )


def test_windows_with_the_same_ends_and_the_same_sum_are_different_stores(model, tmp_path):
    a, b = [0, 20, 40, 100], [0, 25, 35, 100]
    stores = [collected(model, tmp_path, starts=s) for s in (a, b)]
    assert [s.starts.tolist() for s in stores] == [a, b]


def test_a_collection_that_was_interrupted_ends_with_the_same_bytes(model, tmp_path):
    whole = collected(model, tmp_path / "a")

    class Cut(Text):
        def __call__(self, starts):
            if len(self.asked) == 2:
                raise KeyboardInterrupt
            return super().__call__(starts)

    with pytest.raises(KeyboardInterrupt):
        collected(model, tmp_path / "b", text=Cut())
    again = collected(model, tmp_path / "b")
    for site in whole.sites:
        assert (whole.folder / f"{site}.bin").read_bytes() == (
            again.folder / f"{site}.bin"
        ).read_bytes()


def bare(folder: Path, n_windows: int, width: int = 8, fill: bool = True) -> Store:
    """A store whose row r holds the number r."""
    n = n_windows * LENGTH
    rows = np.memmap(folder / "x.bin", dtype="float32", mode="w+", shape=(n, width))
    if fill:
        rows[:] = np.arange(n)[:, None]
    rows.flush()
    np.save(folder / "starts.npy", np.arange(n_windows) * LENGTH)
    site = {"site": ["resid", 1], "file": "x.bin", "dtype": "float32", "width": width}
    (folder / "store.json").write_text(
        json.dumps({"key": {}, "length": LENGTH, "split": "train", "sites": [site]})
    )
    return Store(folder)


def test_every_epoch_is_a_permutation_of_the_rows(tmp_path):
    store = bare(tmp_path, 10)  # 160 rows
    epochs = [
        np.concatenate([store.index_at(step, rows=32, seed=7) for step in range(5 * e, 5 * e + 5)])
        for e in range(3)
    ]
    assert all(np.array_equal(np.sort(e), np.arange(160)) for e in epochs)
    batches = {tuple(store.index_at(step, rows=32, seed=7)) for step in range(15)}
    assert len(batches) == 15, "another order in each epoch"


def test_rows_that_do_not_fill_a_batch_are_left_out_of_their_epoch_only(tmp_path):
    store = bare(tmp_path, 10)
    seen = np.concatenate([store.index_at(step, rows=50, seed=1) for step in range(3)])
    assert len(np.unique(seen)) == 150
    assert (
        len(
            np.unique(np.concatenate([store.index_at(step, rows=50, seed=1) for step in range(30)]))
        )
        == 160
    )


def test_a_batch_depends_on_seed_and_step_alone(tmp_path):
    store, big = bare(tmp_path, 10), 2**62 + 12345
    in_order = [store.index_at(step, rows=32, seed=big) for step in range(12)]
    fresh = Store(tmp_path)
    for step in (11, 0, 7, 3, 5, 10):
        assert np.array_equal(fresh.index_at(step, rows=32, seed=big), in_order[step])
        fresh.index_at(2, rows=16, seed=step)  # something else in between
    assert not np.array_equal(
        store.index_at(0, rows=32, seed=big), store.index_at(0, rows=32, seed=big + 1)
    )
    assert not np.array_equal(
        store.index_at(0, rows=32, seed=big), store.index_at(0, rows=32, seed=big - 2**61)
    )


def test_a_part_of_the_rows_stays_within_its_bounds(tmp_path):
    store = bare(tmp_path, 10)
    seen = np.concatenate(
        [store.index_at(step, rows=20, seed=3, first=40, last=100) for step in range(3)]
    )
    assert np.array_equal(np.sort(seen), np.arange(40, 100))


def test_the_index_names_the_rows_that_are_read(tmp_path):
    store = bare(tmp_path, 10)
    index = store.index_at(4, rows=32, seed=0)
    assert np.array_equal(store.rows(Site("resid", 1), index)[:, 3].numpy(), index)


@pytest.mark.parametrize("rows", [slice(0, 5), np.arange(5)], ids=["slice", "index"])
def test_rows_are_a_copy_that_may_be_written_to(tmp_path, rows):
    store = bare(tmp_path, 10)
    found = store.rows(Site("resid", 1), rows).numpy()
    assert found.flags.writeable and not np.shares_memory(found, store.sites[Site("resid", 1)])


def test_a_batch_larger_than_the_store_is_one_line_with_both_numbers(tmp_path):
    with pytest.raises(UserError, match=r"161 rows.*160"):
        bare(tmp_path, 10).index_at(0, rows=161, seed=0)


def test_memory_is_bounded_by_the_batch_and_not_by_the_store(tmp_path):
    store = bare(tmp_path, 10_000, width=64, fill=False)  # 40 MB on disk
    index = store.index_at(0, rows=256, seed=0)
    tracemalloc.start()
    for _ in range(3):
        store.rows(Site("resid", 1), index)
        store.rows(Site("resid", 1), slice(5000, 5256))
    peak = tracemalloc.get_traced_memory()[1]
    tracemalloc.stop()
    assert peak < 8 * 256 * 64 * 4


@pytest.mark.parametrize(("offset", "factor"), [(1000.0, 1.0), (0.0, 1e-7), (-3e5, 100.0)])
def test_a_store_of_half_precision_keeps_digits_under_any_mean_and_unit(
    model, tmp_path, offset, factor, monkeypatch
):
    plain = collected(model, tmp_path / "plain", dtype="float32").rows(
        Site("resid", 1), slice(None)
    )
    real = activations_module.activations
    monkeypatch.setattr(
        activations_module,
        "activations",
        lambda *a: {s: (x + offset) * factor for s, x in real(*a).items()},
    )
    store = collected(model, tmp_path / "moved", dtype="float16")
    found = store.rows(Site("resid", 1), slice(None)).double() / factor - offset
    rounding = abs(offset) * 2.0**-23  # of float32, which is there before the store
    error = (found - plain).square().mean().sqrt()
    assert error < 1e-3 * plain.std() + rounding
    assert torch.equal(
        store.rows(Site("resid", 1), np.arange(5)), store.rows(Site("resid", 1), slice(0, 5))
    )


@pytest.mark.filterwarnings("ignore:overflow encountered")
def test_activations_too_large_for_float16_are_one_line_that_names_site_and_remedy(
    model, tmp_path, monkeypatch
):
    real, seen = activations_module.activations, []

    def growing(*args):
        seen.append(args)
        return {s: x * 1e6 ** (len(seen) > 1) for s, x in real(*args).items()}

    monkeypatch.setattr(activations_module, "activations", growing)
    with pytest.raises(UserError, match=r"resid\.1 .*float16.*store_dtype=float32") as caught:
        collected(model, tmp_path, dtype="float16")
    assert "\n" not in str(caught.value)
    assert torch.isfinite(
        collected(model, tmp_path, dtype="float32").rows(Site("resid", 1), slice(None))
    ).all()


def test_activations_that_are_not_finite_are_one_line_that_names_the_site(model, tmp_path):
    with torch.no_grad():
        model.transformer.h[0].mlp.c_proj.weight[0, 0] = float("nan")
    with pytest.raises(UserError, match=r"resid\.1 are not finite") as caught:
        collected(model, tmp_path)
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.rglob("done.json")), "a broken store is not kept as a whole one"


def test_activations_of_a_broken_model_count_as_a_failure_and_not_as_a_mistake_in_the_options(
    model, tmp_path
):
    with torch.no_grad():
        model.transformer.wte.weight.fill_(float("nan"))
    with pytest.raises(UserError) as caught:
        collected(model, tmp_path)
    assert caught.value.exit_status == 1
