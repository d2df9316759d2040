"""What a run is known by."""

import torch

import hf_compress as hfc
from hf_compress.api.identity import identity_of, known_in_memory, tensors_of
from hf_compress.calibration.data import prepare
from hf_compress.numerics.fingerprint import fingerprint
from tests.helpers.disk import offloaded
from tests.helpers.runs import CALIBRATION
from tests.helpers.tiny import tiny_model

SETTINGS = hfc.ILLCConfig(ratio=0.5)


def test_the_order_of_data_counts_and_so_do_labels():
    model = tiny_model("llama")
    rows = [CALIBRATION, CALIBRATION.flip(0), {"input_ids": CALIBRATION, "labels": CALIBRATION}]
    assert len({fingerprint(tensors_of(prepare(one, model, None))) for one in [*rows, CALIBRATION.clone()]}) == 3


def test_one_weight_tells_models_apart_in_memory_and_on_the_disk(tmp_path):
    first, second = tiny_model("llama"), tiny_model("llama")
    on_disk = offloaded(tiny_model("llama"), tmp_path)
    assert known_in_memory(first) == known_in_memory(second) != known_in_memory(on_disk)
    same = identity_of(first, SETTINGS, None)
    assert identity_of(second, SETTINGS, None) == identity_of(on_disk, SETTINGS, None) == same
    with torch.no_grad():
        second.lm_head.weight[7, 7] *= 1.001
    assert known_in_memory(first) != known_in_memory(second)
    assert {name for name, value in identity_of(second, SETTINGS, None).items() if value != same[name]} == {"model"}
