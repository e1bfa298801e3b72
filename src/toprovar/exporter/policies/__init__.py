"""Ways of making the same pictures: ours and every rival, behind one seam (`engine.Policy`), for fair comparisons."""
