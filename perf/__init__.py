"""Measuring FlashMLA-CuTe: one timing protocol, named workloads, ceilings of the card, peers in the same run.

python -m perf.bench --workload core --peers flashmla,fa3     rows of numbers, stored under perf/results/
python -m perf.parallel --ranks 2                             heads, tokens or requests divided among GPUs
python -m perf.host                                           compile, start and host cost of a call
python -m perf.soak                                           a million launches, checked; memory watched
python -m perf.plots perf/results/FILE.json --out DIR         pictures of a stored run
python -m perf.sass causal=False                              registers, spills and instruction mix; needs no GPU
"""
