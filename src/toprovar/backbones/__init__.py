"""The architectures, in readable PyTorch with one attention seam; they load the original checkpoints."""
