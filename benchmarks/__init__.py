"""How fast torchload is, how fast its peers are, and how fast the machine would allow: ``python -m benchmarks``.

- `cases`: what is measured: which model, from which file, into what
- `models`: the models
- `files`: their checkpoints: random, deterministic, made once
- `arms`: the contestants, one small function each
- `ceilings`: what the machine itself can do, measured beside them
- `machine`: the page cache, and a record of the environment
- `worker`: one sample, in a process of its own
- `measure`: the order of the samples, their time limit, and the memory they take
- `report`: medians and ratios, as a table, JSON and Markdown
- `charts`: the same as SVG
"""
