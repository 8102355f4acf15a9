"""Entry point of `python -m sae_experiments`, which does the same as `experiment.py`."""

import sys

from sae_experiments.cli.main import main
from sae_experiments.files import conf_folder

if __name__ == "__main__":
    sys.exit(main(sys.argv[1:], plan="variants", extra=[], conf=conf_folder()))
