"""toprovar: a compiler for visual autoregressive (next-scale) image models.

Nothing is imported here: a deployment machine needs neither PyTorch nor the exporter.
"""

__version__ = "0.1.0"
