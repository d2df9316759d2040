"""For the reference, which is made from the source and imports nothing.

`hf_compress` has its names only when they are used, so the source alone does not show them: they are taken from its
table. And what a setting means stands in its `setting(default, about, range)`, not in a docstring.
"""

from __future__ import annotations

import ast
from typing import Any

from griffe import Alias, Attribute, Docstring, ExprCall, Extension, Module


class PublicNames(Extension):
    """Gives the package its public names, and settings their docstrings."""

    def on_package(self, *, pkg: Module, **_: Any) -> None:
        """Add `hf_compress.compress` and the others."""
        if pkg.name == "hf_compress":
            for name, home in ast.literal_eval(str(pkg["_PUBLIC"].value)).items():
                if name not in pkg.members or not pkg.members[name].is_module:
                    pkg.set_member(name, Alias(name, f"{home}.{name}", parent=pkg))

    def on_attribute_instance(self, *, attr: Attribute, **_: Any) -> None:
        """Read what a setting says of itself."""
        if not (isinstance(attr.value, ExprCall) and str(attr.value.function) == "setting"):
            return
        call = ast.parse(str(attr.value), mode="eval").body
        assert isinstance(call, ast.Call)
        said = dict(zip(("help", "within"), call.args[1:], strict=False)) | {k.arg: k.value for k in call.keywords}
        about, within = (ast.literal_eval(said[name]) if name in said else "" for name in ("help", "within"))
        if about and attr.docstring is None:
            about = about[0].upper() + about[1:] + (f"; in {within}" if within else "")
            attr.docstring = Docstring(f"{about}.", parent=attr)
        attr.value = attr.value.arguments[0]
