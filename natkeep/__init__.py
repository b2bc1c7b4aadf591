"""natkeep: the network side of moving a live process to another address."""

__version__ = "0.1.0"
