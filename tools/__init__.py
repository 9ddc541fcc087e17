"""Programs beside train.py, sample.py and depth.py: merge, evaluate, measure_depth, bench, costs, full_size."""
