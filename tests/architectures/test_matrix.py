"""Every architecture survives losing blocks, or is refused in words; docs/architectures.md says which."""

import pytest

from tests.helpers import matrix
from tests.helpers.matrix import CANNOT, DOCUMENT, FAMILIES, PARTLY, REFUSED, SURVIVES, Verdict, documented

# One of each way that a config speaks of blocks, so that a mistake shows before the slow test runs.
QUICK = [
    *(("causal", name) for name in ("llama", "gpt2", "qwen3", "gemma3_text", "mixtral", "qwen3_moe", "deepseek_v3")),
    *(("causal", name) for name in ("smollm3", "llama4_text", "gpt_neo", "recurrent_gemma", "longcat_flash")),
    *(("encoder", "bert"), ("encoder", "vit"), ("encoder", "dinov2"), ("seq2seq", "bart"), ("seq2seq", "t5")),
]
ALL = [(key, name) for key, family in FAMILIES.items() for name in family.types]


@pytest.fixture(scope="module")
def tables() -> dict[str, dict[str, Verdict]]:
    return documented(DOCUMENT.read_text(encoding="utf-8"))


def check(key: str, model_type: str, tables: dict[str, dict[str, Verdict]]) -> None:
    for verdict in matrix.verdicts(FAMILIES[key], model_type):
        expected = tables[key][verdict.name]
        # What cannot be built depends on the packages installed; where it can be built, it must still pass the above.
        if CANNOT not in (verdict.status, expected.status):
            same = (verdict.status, verdict.equal) == (expected.status, expected.equal)
            assert same, f"{verdict.row}\nis not what docs/architectures.md has"


@pytest.mark.parametrize(("key", "model_type"), QUICK)
def test_representative_types(key, model_type, tables):
    check(key, model_type, tables)


@pytest.mark.slow
@pytest.mark.parametrize(("key", "model_type"), [entry for entry in ALL if entry not in QUICK])
def test_every_type(key, model_type, tables):
    check(key, model_type, tables)


@pytest.mark.parametrize("key", FAMILIES)
def test_the_document_has_every_type_and_no_other(key, tables):
    assert {name.split(", ")[0] for name in tables[key]} == set(FAMILIES[key].types)


def first_stacks(table: dict[str, Verdict]) -> list[Verdict]:
    """Of every type, the stack that is cut by default."""
    return [verdict for name, verdict in table.items() if ", " not in name]


def test_the_document_counts_its_own_table(tables):
    found = [verdict.status for verdict in first_stacks(tables["causal"])]
    counts = matrix.COUNTS.format(
        survive=found.count(SURVIVES) + found.count(PARTLY),
        partly=found.count(PARTLY),
        refused=found.count(REFUSED),
        cannot=found.count(CANNOT),
        total=len(FAMILIES["causal"].types),
    )
    assert counts in DOCUMENT.read_text(encoding="utf-8")
    assert set(found) <= {SURVIVES, PARTLY, REFUSED, CANNOT}


def test_the_document_gives_a_reason_for_all_that_does_not_survive(tables):
    for table in tables.values():
        for verdict in table.values():
            assert bool(verdict.why) == (verdict.status != SURVIVES), verdict.row


def test_most_types_survive(tables):
    """A change that makes the whole mapping refused would pass every other test here, once the document is written."""
    found = [verdict.status for verdict in first_stacks(tables["causal"])]
    assert found.count(SURVIVES) > 0.8 * len(found)
    assert found.count(REFUSED) + found.count(CANNOT) < 0.08 * len(found)


def test_a_written_document_can_be_read():
    refused = Verdict("llama", REFUSED, "0 of 5", "a | in its reason")
    table = documented(matrix.document({"causal": [refused, Verdict("gpt2", SURVIVES, "5 of 5")]}))["causal"]
    assert table["llama"] == Verdict("llama", REFUSED, "0 of 5", "a / in its reason")
    assert table["gpt2"] == Verdict("gpt2", SURVIVES, "5 of 5")
