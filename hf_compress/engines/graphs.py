"""Models as graphs, for ONNX Runtime and for OpenVINO: exported and run by Transformers' own exporters."""

from __future__ import annotations

import logging
import warnings
from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, redirect_stdout
from importlib.util import find_spec
from io import StringIO
from pathlib import Path
from typing import Any, ClassVar

import torch
import transformers
from torch import Tensor
from transformers import DynamicCache, PreTrainedModel

from hf_compress.calibration.capture import inference
from hf_compress.calibration.media import Processor
from hf_compress.engines.agreement import Speaker, Word, word_of
from hf_compress.engines.target import Target
from hf_compress.errors import UnsupportedModelError, one_line
from hf_compress.rewrite.probe import quiet

_STAGE = "decode"  # reads any number of tokens after a cache, which may be empty


class Graphs(Target):
    """One graph, which reads tokens after a cache and gives logits and the longer cache.

    What a graph says is what the model computes, so every change of structure can be said.
    """

    dtype = "float32"
    running: ClassVar[dict[str, Any]] = {}  # how it is run when it is compared

    def check_installed(self) -> None:
        super().check_installed()
        if find_spec("transformers.exporters") is None:
            raise ImportError(
                f"{self.name} is written by Transformers' exporters, which {transformers.__version__} has not: "
                "pip install --upgrade transformers"
            )

    def tolerance(self, model: PreTrainedModel) -> float:
        return 1e-3  # both in float32

    def check(self, model: PreTrainedModel) -> None:
        if model.config.is_encoder_decoder or not model.can_generate():
            raise UnsupportedModelError(
                f"{self.name} is written of models that go on with a text; {type(model).__name__} is none: export it "
                "by transformers.exporters"
            )

    def write(
        self, model: PreTrainedModel, processor: Processor | None, folder: Path, prompts: Sequence[Sequence[int]]
    ) -> None:
        from transformers.exporters import utils

        length = min(map(len, prompts))
        ids = torch.tensor([list(prompt[:length]) for prompt in (*prompts, *prompts)][:2])  # a size of 1 would be fixed
        inputs = {"input_ids": ids, "attention_mask": torch.ones_like(ids)}
        try:
            with inference(model), _silent():
                exporter, settings = self._exporter()
                stages = utils.decompose_for_generation(model, inputs, multi_token_decode=True)
                exported = exporter.export(*stages[_STAGE], settings)
        except Exception as error:
            raise UnsupportedModelError(
                f"{type(model).__name__} cannot be exported to {self.name}: {one_line(error)}"
            ) from error
        exported.config, exported.generation_config = model.config, model.generation_config
        exported.save_pretrained(folder)
        if processor is not None:
            processor.save_pretrained(folder)

    @abstractmethod
    def _exporter(self) -> tuple[Any, Any]:
        """Transformers' exporter, and its settings."""

    @contextmanager
    def speaker(self, folder: Path, model: PreTrainedModel) -> Iterator[Speaker]:
        from transformers.exporters import ExportedModel

        with _silent():
            (runner,) = ExportedModel.from_pretrained(folder, device="cpu", **self.running).runners.values()
        yield self._speaker(runner, model)

    @abstractmethod
    def _speaker(self, runner: Any, model: PreTrainedModel) -> Speaker:
        """What runs a graph of `model`."""


class Onnx(Graphs):
    """`model.onnx`, for ONNX Runtime."""

    name = "onnx"
    engine = "ONNX Runtime"
    packages: ClassVar = {"onnx": "onnx", "onnxscript": "onnxscript", "onnxruntime": "onnxruntime"}

    def _exporter(self) -> tuple[Any, Any]:
        from transformers.exporters import OnnxConfig, OnnxExporter

        return OnnxExporter(), OnnxConfig(dynamic=True)

    def _speaker(self, runner: Any, model: PreTrainedModel) -> Speaker:
        return _OnnxSpeaker(runner, model)


class OpenVino(Graphs):
    """`openvino_model.xml`, for OpenVINO."""

    name = "openvino"
    engine = "OpenVINO"
    packages: ClassVar = {"openvino": "openvino"}
    running: ClassVar = {"config": {"INFERENCE_PRECISION_HINT": "f32"}}  # else it takes bfloat16 where the CPU has that

    def _exporter(self) -> tuple[Any, Any]:
        from transformers.exporters import OpenVINOConfig, OpenVINOExporter

        return OpenVINOExporter(), OpenVINOConfig(dynamic=True)

    def _speaker(self, runner: Any, model: PreTrainedModel) -> Speaker:
        return _OpenVinoSpeaker(runner)


class _GraphSpeaker(ABC):
    """A graph that is run on a prompt, and then a token at a time, after what it has read."""

    def say(self, prompt: Sequence[int], count: int) -> list[Word]:
        self._forget()
        ids, start, words = torch.tensor([list(prompt)]), 0, list[Word]()
        while len(words) < count:
            places = torch.arange(start, start + ids.shape[1])[None]
            words.append(word_of(self._read(ids, places)[0, -1]))
            start, ids = start + ids.shape[1], torch.tensor([[words[-1].token]])
        return words

    @abstractmethod
    def _forget(self) -> None:
        """Begin with an empty cache."""

    @abstractmethod
    def _read(self, ids: Tensor, places: Tensor) -> Tensor:
        """Logits (1, tokens, vocabulary) of tokens at places (1, tokens), which go into the cache."""


class _OnnxSpeaker(_GraphSpeaker):
    """One that is given the cache, and gives the longer one.

    Args:
        model: what it was made of; its cache tells the shapes.
    """

    def __init__(self, runner: Any, model: PreTrainedModel) -> None:
        self._runner = runner
        token = torch.zeros(1, 1, dtype=torch.long, device=model.device)
        with inference(model):
            cache = model(input_ids=token, use_cache=True).past_key_values
        self._empty = [(layer.keys[:, :, :0].cpu(), layer.values[:, :, :0].cpu()) for layer in cache.layers]

    def _forget(self) -> None:
        self._cache: Any = DynamicCache(self._empty)

    def _read(self, ids: Tensor, places: Tensor) -> Tensor:
        output = self._runner(input_ids=ids, position_ids=places, past_key_values=self._cache)
        self._cache = output.past_key_values
        logits: Tensor = output.logits
        return logits


class _OpenVinoSpeaker(_GraphSpeaker):
    """One that keeps its cache itself."""

    def __init__(self, runner: Any) -> None:
        self._request = runner.request
        self._known = {port.any_name for port in self._request.model_inputs}

    def _forget(self) -> None:
        self._request.reset_state()

    def _read(self, ids: Tensor, places: Tensor) -> Tensor:
        given = {"input_ids": ids, "position_ids": places, "beam_idx": torch.zeros(1, dtype=torch.int32)}
        found = self._request.infer({name: value.numpy() for name, value in given.items() if name in self._known})
        return torch.from_numpy(found[self._request.model_outputs[0]])


@contextmanager
def _silent() -> Iterator[None]:
    """Without what the exporters tell of their own inside; errors come as ever."""
    level = logging.root.manager.disable
    logging.disable(logging.WARNING)
    try:
        with warnings.catch_warnings(), redirect_stdout(StringIO()), quiet():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(level)
