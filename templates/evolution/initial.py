"""The program that evolves: an SAE and its settings. Scored by evaluate.py; higher is better."""

# EVOLVE-BLOCK-START
from sae_experiments.saes.batch_topk import BatchTopK


class Candidate(BatchTopK):
    """BatchTopK until it is changed. Methods to override: sae_experiments/saes/base.py."""

    def budget(self):
        """Active latents per row in training; the final threshold gives k whatever this is."""
        return self.k

    def activation(self, entries, col):
        """Values of the active latents, from their pre-activations (n,)."""
        return entries

    def penalties(self, fwd, step):
        """Terms of the loss beside the squared error; step.progress runs from 0 to 1."""
        return {}


LEARNING_RATE = 3e-3
# EVOLVE-BLOCK-END


def candidate():
    """The class and its learning rate, as evaluate.py expects them."""
    return Candidate, LEARNING_RATE
