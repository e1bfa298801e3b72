"""From a checkpoint to a bundle, a file for each stage in order: calibrate, plan, prune, graph, engine, package.

Nothing is imported here: planning needs no PyTorch, and building engines needs no exporter of graphs.
"""
