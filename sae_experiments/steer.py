"""`python -m sae_experiments.steer`: continuations under a latent of a finished run."""

import sys

from sae_experiments.cli.steer import main

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
