"""The thin reference trainer: distils a teacher's features into a small student, without labels.

Run it with `python -m pc_kernels.distill`. It compares perception coherence with FitNet's projected
MSE, RKD distance and LFCC. It is no part of `import pc_kernels` and needs the extra `distill`.
"""

from importlib.util import find_spec

_NEEDS = {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn", "tqdm": "tqdm"}
_missing = [package for module, package in _NEEDS.items() if find_spec(module) is None]
if _missing:
    raise ImportError(
        f"pc_kernels.distill needs {', '.join(_missing)}: pip install pc_kernels[distill]"
    )
