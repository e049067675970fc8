"""Plugins that put the decode kernels under inference engines, without a patch of either.

support.py   what the installed kernels decode: all that a plugin advertises comes from there
steps.py     a step of an engine: one plan for all layers, in memory that captured CUDA graphs may keep
vllm.py      vLLM's MLA backend, metadata builder and impl
sglang.py    SGLang's attention backend
plugins.py   the entry points that name them to the engines
"""
