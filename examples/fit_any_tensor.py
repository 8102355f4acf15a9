"""Fit an SAE to activations from any model: they only have to be rows of one tensor.

python examples/fit_any_tensor.py
"""

import torch

from sae_experiments import build_sae, evaluate, fit_saes, load_sae, save_sae


def sparse_rows(n: int, directions: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """Rows in which about four of the directions are active, in place of a model's activations."""
    active = torch.rand(n, len(directions), generator=generator) < 4 / len(directions)
    size = 1 + 0.2 * torch.randn(n, len(directions), generator=generator)
    return (active * size) @ directions


def main(steps: int = 300) -> None:
    """Fit, evaluate, save in SAELens format and load again."""
    generator = torch.Generator().manual_seed(0)
    directions = torch.nn.functional.normalize(torch.randn(128, 64, generator=generator), dim=1)
    train = sparse_rows(50_000, directions, generator)
    test = sparse_rows(5_000, directions, generator)

    sae = build_sae("batch_topk", d_in=64, d_sae=128, target_l0=5)
    fit_saes(sae, train, steps=steps, batch_size=1024)
    for name in ("sae_fvu", "sae_l0", "sae_dead_frac"):
        print(f"{name}: {evaluate(sae, test)[name]:.4f}")

    save_sae(sae, "my_sae", reference=test[:64], metadata={"made_by": "examples/fit_any_tensor.py"})
    difference = (load_sae("my_sae")(test) - sae(test)).abs().max()
    print(f"largest difference after saving and loading: {difference:.1e}")


if __name__ == "__main__":
    main()
