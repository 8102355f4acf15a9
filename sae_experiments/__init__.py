"""Train small language models, fit sparse autoencoders to their activations, evaluate and compare them."""

__version__ = "0.1.0"
