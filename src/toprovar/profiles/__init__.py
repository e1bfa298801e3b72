"""The formats on disk: profile (a wish), calibration (a measurement), plan (a decision), manifest (of the artefact).

Imports neither PyTorch nor ONNX, here or below. The names are in the modules: `profile`, `calibration`, `plan`,
`manifest`, and `flops`, `files`, `noise` beside them.
"""
