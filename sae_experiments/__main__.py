"""`python -m sae_experiments` is `experiment.py` where only the package is installed."""

import sys

from sae_experiments.cli.main import main
from sae_experiments.files import conf_folder

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], plan="variants", extra=[], conf=conf_folder()))
