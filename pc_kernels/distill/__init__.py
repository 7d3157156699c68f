"""The thin reference trainer: distils a teacher's features into a small student, without labels.

`python -m pc_kernels.distill compare` puts perception coherence beside its rivals; docs/distill.md
says how. It is no part of `import pc_kernels` and needs the extra `distill`.
"""

import sys
from importlib.util import find_spec

_NEEDS = {"matplotlib": "matplotlib", "PIL": "pillow", "sklearn": "scikit-learn", "tqdm": "tqdm"}
if sys.version_info < (3, 11):
    _NEEDS["tomli"] = "tomli"
_missing = [package for module, package in _NEEDS.items() if find_spec(module) is None]
if _missing:
    raise ImportError(
        f"pc_kernels.distill needs {', '.join(_missing)}: pip install pc_kernels[distill]"
    )
