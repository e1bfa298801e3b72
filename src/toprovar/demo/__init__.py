"""The embedded demo: a checkpoint small enough for the package, its prompts, and the generator of its pictures.

Nothing is imported here; `labels` and `scenes` need no torch, `pictures` does.
"""
