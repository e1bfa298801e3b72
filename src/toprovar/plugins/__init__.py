"""The op inside TensorRT: the plugin library (cpp/) and how Python finds and loads it (`library.py`)."""
