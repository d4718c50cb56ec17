"""Speed and memory beside other implementations: ``moetrain bench``. Results of runs are in benchmarks/results/."""
