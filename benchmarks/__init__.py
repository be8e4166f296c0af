"""Speed and memory, side by side: mmalign against public peers and the hardware's limits. `python -m benchmarks`.

A benchmark is a module here with `measure(settings) -> list[Report]`; the first line of its docstring describes it.
"""

BENCHMARKS = ("training_step", "answer_step", "sampling", "scoring", "cpu_attention", "memory", "two_pass")
