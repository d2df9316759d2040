"""Tiny models with experts, and where they keep them."""

from transformers import PreTrainedModel

from tests.helpers.tiny import tiny_base_model, tiny_model


def model_of(name: str) -> PreTrainedModel:
    return tiny_base_model(name) if name == "openai_privacy_filter" else tiny_model(name)


def paths_of(model: PreTrainedModel) -> list[str]:
    """Where the tensors of all experts are."""
    return [path for path, module in model.named_modules() if type(module).__name__.endswith("Experts")]
