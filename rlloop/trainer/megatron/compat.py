"""The one place that knows what Megatron-Core 0.19 and Megatron-Bridge 0.6 lack where Transformer Engine is not installed.

Import it before anything under `megatron`. Each gap is closed by replacing a text while the named module is loaded, so
installed files stay as they are and nothing fake enters `sys.modules` (Megatron decides by `import transformer_engine`
whether it has it). A text that is no longer there is left alone: then upstream has closed the gap.

megatron.bridge.peft.lora_layers             imports Transformer Engine unconditionally, for a layer not used here
megatron.bridge.peft.utils, .module_matcher  take Transformer Engine for present when its names are mocks
megatron.core...ops.paged_stash              imports Triton unconditionally, which CPU builds of torch lack
megatron.training.models.gpt, .hybrid        import `typing.override`, which Python 3.11 lacks
"""

from __future__ import annotations
import __future__

import importlib.machinery
import importlib.util
import sys
from collections.abc import Sequence
from importlib.abc import MetaPathFinder
from types import CodeType, ModuleType

_HAS_TRANSFORMER_ENGINE = importlib.util.find_spec("transformer_engine") is not None
_REPLACEMENTS: dict[str, tuple[str, str]] = {}

if not _HAS_TRANSFORMER_ENGINE:
    _REPLACEMENTS["megatron.bridge.peft.lora_layers"] = ("import transformer_engine.pytorch as te", "te = None")
    _REPLACEMENTS["megatron.bridge.peft.utils"] = ("HAVE_TE = all(", "HAVE_TE = False and all(")
    _REPLACEMENTS["megatron.bridge.peft.module_matcher"] = ("HAVE_TE = all(", "HAVE_TE = False and all(")
if importlib.util.find_spec("triton") is None:
    _REPLACEMENTS["megatron.core.transformer.moe.ops.paged_stash"] = (
        "import triton\nimport triton.language as tl",
        "triton = type('NoTriton', (), {'jit': staticmethod(lambda kernel: None)})",
    )
if sys.version_info < (3, 12):
    for _name in ("gpt", "hybrid"):
        _REPLACEMENTS[f"megatron.training.models.{_name}"] = (
            "ClassVar, Literal, override",
            "ClassVar, Literal\nfrom typing_extensions import override",
        )


class _Loader(importlib.machinery.SourceFileLoader):
    def get_code(self, fullname: str) -> CodeType:
        path = self.get_filename(fullname)
        text = self.get_data(path).decode().replace(*_REPLACEMENTS[fullname])
        # Annotations such as tl.constexpr must not be evaluated. No byte-code cache: it would outlive the replacement.
        return compile(text, path, "exec", flags=__future__.annotations.compiler_flag, dont_inherit=True)


class _Finder(MetaPathFinder):
    def find_spec(
        self, fullname: str, path: Sequence[str] | None, target: ModuleType | None = None
    ) -> importlib.machinery.ModuleSpec | None:
        if fullname not in _REPLACEMENTS:
            return None
        spec = importlib.machinery.PathFinder.find_spec(fullname, path, target)
        if spec is not None and isinstance(spec.loader, importlib.machinery.SourceFileLoader):
            spec.loader = _Loader(fullname, spec.loader.path)
        return spec


sys.meta_path.insert(0, _Finder())
