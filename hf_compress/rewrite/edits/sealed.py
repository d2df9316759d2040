"""The seal: what keeps stock Transformers from loading a model that it would take for another."""

from __future__ import annotations

from dataclasses import dataclass

import torch

from hf_compress.anatomy.dispatch import computing_device
from hf_compress.errors import PlanError
from hf_compress.modules.sealed import Sealed
from hf_compress.plan.edits import ModuleEdit, Path
from hf_compress.rewrite.site import Site


@dataclass(frozen=True)
class Seal(ModuleEdit):
    """A module is `Sealed`, because the other edits leave every shape as it was; added where it is needed."""

    module: Path

    def describe(self) -> str:
        return "loads with hf_compress only"

    def restructure(self, site: Site) -> None:
        module = site.module(self.module)
        if module._parameters.get("weight") is None:
            raise PlanError(f"{self.module} has no weight to seal")
        sealed = Sealed(module)
        sealed.weight = torch.empty_like(sealed.weight, device=computing_device(module))
        site.replace(self.module, sealed)
