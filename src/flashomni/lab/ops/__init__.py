"""Speed of the ops, as ratios within one run: correctness first, baselines interleaved, medians."""
