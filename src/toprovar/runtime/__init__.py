"""Run a bundle, bench it, compare it, report on it. Needs neither PyTorch nor the exporter.

Each module is imported on its own: opening a bundle needs no ONNX Runtime, and `toprovar --help` needs none of it.
"""
