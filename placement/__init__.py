"""Expert placement: traces, affinity, topology, solvers, bounds and evaluation; no model code."""
