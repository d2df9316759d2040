"""push_to_hub(): all of it in one commit, or nothing; the real client, against a Hub on this machine."""

import json
import logging
import traceback
from contextlib import contextmanager

import pytest
import torch
from huggingface_hub import ModelCard, constants, snapshot_download
from transformers import AutoModelForCausalLM, AutoTokenizer

import hf_compress.storage.hub as hub_module
from hf_compress.api.compress import compress
from hf_compress.errors import HubError, ParityError
from hf_compress.methods.drop_blocks import DropBlocksConfig
from hf_compress.report.report import REPORT_FILE, CompressionReport
from hf_compress.storage.hub import push_to_hub, stale_files
from hf_compress.storage.manifest import verify_files
from tests.helpers.hub_server import DROP, OTHER, READER, WRITER, HubServer

REPO = "me/small"
pytestmark = pytest.mark.filterwarnings("ignore:Use 'content=:DeprecationWarning")  # the client's own
CARD = ModelCard("---\nlicense: mit\n---\n\n# Mine\n")


@pytest.fixture
def small(model):
    return compress(model, DropBlocksConfig(num_blocks=2, criterion="last"))


@contextmanager
def refused(hub, message, error=HubError):
    """What stands inside is refused in these words, and changes nothing on the Hub."""
    before = hub.state()
    with pytest.raises(error, match=message) as caught:
        yield caught
    assert hub.state() == before


@pytest.fixture
def logits(small, ids):
    """Checks that what the Hub gives for a repository is `small`."""

    @torch.no_grad()
    def check(repo_id=REPO, **kwargs):
        loaded = AutoModelForCausalLM.from_pretrained(repo_id, **kwargs)
        return torch.equal(loaded(ids).logits, small(ids).logits)

    return check


def test_what_is_pushed_loads_again(hub, small, tokenizer, logits):
    info = push_to_hub(small, REPO, tokenizer, card=CARD, commit_message="Two blocks fewer")
    assert logits()
    assert AutoTokenizer.from_pretrained(REPO)("w1 w2").input_ids == tokenizer("w1 w2").input_ids
    files = {path: content.decode() for path, content in hub.files(REPO).items() if not path.endswith(".safetensors")}
    assert files["README.md"] == str(CARD)
    assert files[REPORT_FILE] == small.compression_report.to_json() + "\n"
    assert [commit.title for commit in hub.repos[REPO].commits.values()] == ["initial commit", "Two blocks fewer"]
    assert hub.repos[REPO].at("main").oid == info.oid
    verify_files(snapshot_download(REPO, local_dir=f"{constants.HF_HUB_CACHE}/here"))


def test_without_a_card_one_is_made_that_loads_the_model_from_there(hub, small):
    push_to_hub(small, REPO)
    assert f'from_pretrained("{REPO}")' in hub.files(REPO)["README.md"].decode()


def test_the_push_of_transformers_alone_gives_a_repository_that_loads(hub, small, logits):
    small.push_to_hub(REPO)
    assert logits()


def test_another_report_is_pushed_and_the_model_keeps_its_own(hub, small):
    own = small.compression_report
    other = CompressionReport.from_json(own.to_json().replace("drop_blocks", "another"))
    push_to_hub(small, REPO, report=other, card=CARD)
    assert json.loads(hub.files(REPO)[REPORT_FILE])["stages"][0]["method"] == "another"
    assert small.compression_report is own


def test_a_report_for_a_model_that_has_none(hub, small, make_llama):
    plain = make_llama()
    push_to_hub(plain, REPO, report=small.compression_report, card=CARD)
    assert REPORT_FILE in hub.files(REPO)
    assert not hasattr(plain, "compression_report")


def test_the_options_of_save_reach_it(hub, small, ids, monkeypatch):
    given = {}

    def save(model, folder, tokenizer, **kwargs):
        given.update(kwargs)
        raise KeyboardInterrupt

    monkeypatch.setattr(hub_module, "save", save)
    with pytest.raises(KeyboardInterrupt):  # goes through as it is
        push_to_hub(small, REPO, card=CARD, portable=True, probe=ids)
    assert given == {"card": CARD, "portable": True, "probe": ids}


OLDER = {
    "in one file": {"model.safetensors": b"old"},
    "in shards": {"model-1-of-1.safetensors": b"old", "model.safetensors.index.json": b'{"weight_map": {}}'},
    "pickled": {"pytorch_model.bin": b"old", "pytorch_model.bin.index.json": b"{}"},
    "an adapter": {"adapter_config.json": b'{"peft_type": "LORA"}', "adapter_model.safetensors": b"old"},
    "under another name": {"weights.safetensors": b"old"},
    "with an older tokenizer": {"tokenizer_config.json": b"{}", "chat_template.jinja": b"old", "merges.txt": b"old"},
    "that ignores weights": {".gitignore": b"*.safetensors\n"},
}


@pytest.mark.parametrize("older", OLDER.values(), ids=OLDER)
def test_a_push_over_an_older_model_gives_the_new_one(hub, small, tokenizer, logits, older):
    kept = {"notes.txt": b"mine", "older/model-00001-of-00002.safetensors": b"mine", "training_args.bin": b"mine"}
    hub.put(REPO, older | kept)
    push_to_hub(small, REPO, tokenizer, card=CARD)
    assert len(hub.asked("commit")) == 1
    assert logits()
    files = hub.files(REPO)
    assert {path: files[path] for path in kept} == kept
    assert [path for path, content in files.items() if content == b"old"] == []
    folder = snapshot_download(REPO, local_dir=f"{constants.HF_HUB_CACHE}/here", ignore_patterns=list(kept))
    verify_files(folder)


def test_a_push_over_a_sharded_model_of_transformers(hub, small, logits, make_llama):
    make_llama(layers=7).push_to_hub(REPO, max_shard_size="10KB")
    assert "model.safetensors.index.json" in hub.files(REPO)
    push_to_hub(small, REPO)
    assert [path for path in hub.files(REPO) if "safetensors" in path] == ["model.safetensors"]
    assert logits()


def test_stale_files():
    there = ["a/tokenizer.json", "merges.txt", "model-1-of-1.safetensors", "model.safetensors", REPORT_FILE, "README"]
    assert stale_files(there, ["model-1-of-1.safetensors"]) == [REPORT_FILE, "model.safetensors"]
    assert stale_files(there, [*there[2:5], "tokenizer.json"]) == ["merges.txt"]


def test_pushing_the_same_again_makes_no_commit(hub, small):
    first = push_to_hub(small, REPO, card=CARD)
    before = hub.state()
    assert push_to_hub(small, REPO, card=CARD).oid == first.oid
    assert hub.state() == before


def test_a_name_alone_goes_to_the_token_s_owner(hub, small, logits):
    assert push_to_hub(small, "small").repo_url.repo_id == REPO
    assert logits()


def test_a_branch_is_made_where_there_is_none(hub, small, logits):
    hub.put(REPO, {"config.json": b"{}"})
    main = hub.repos[REPO].branches["main"]
    push_to_hub(small, REPO, revision="tries/one")
    push_to_hub(small, REPO, card=CARD, revision="tries/one")
    assert logits(revision="tries/one")
    assert hub.repos[REPO].branches["main"] == main


def test_a_pull_request_leaves_the_branch_alone(hub, small, logits):
    hub.put("other/small", {"model.safetensors": b"old", "pytorch_model.bin": b"old"})
    main = hub.repos["other/small"].branches["main"]
    assert push_to_hub(small, "other/small", create_pr=True).pr_revision == "refs/pr/1"
    assert logits("other/small", revision="refs/pr/1")
    assert "pytorch_model.bin" not in hub.files("other/small", "refs/pr/1")
    assert hub.repos["other/small"].branches["main"] == main


def test_private(hub, small):
    push_to_hub(small, REPO, private=True)
    push_to_hub(small, REPO, card=CARD, private=True)
    assert hub.repos[REPO].private


def test_what_shall_be_private_does_not_go_to_a_public_repository(hub, small):
    hub.put(REPO, {})
    with refused(hub, r"^me/small exists and is public, which private=True does not change: make"):
        push_to_hub(small, REPO, private=True)


NOBODY = "the Hub does not accept the token"
ERRORS = [
    ("info", 401, rf"{NOBODY} \(401: injected\); log in with `hf auth login`, or set HF_TOKEN"),
    ("info", 503, r"the Hub has a problem \(503: injected\); push again later"),
    ("create_repo", 500, r"the Hub has a problem \(500: injected\)"),
    ("tree", 404, r"no such repository or revision, or the token may not see it \(404: injected\); check repo_id"),
    ("preupload", 429, r"too many requests \(429: injected\); wait some minutes"),
    ("preupload", 503, r"the Hub has a problem \(503: injected\)"),
    ("validate_card", 500, r"the Hub has a problem \(500: injected\)"),
    ("lfs_batch", 413, r"the Hub refuses it \(413: injected\)"),
    ("lfs_put", 503, r"the Hub has a problem \(503: injected\)"),
    ("lfs_put", DROP, r"the Hub or its storage cannot be reached \(RemoteProtocolError: .*\); check the connection"),
    ("lfs_verify", 404, r"there is no such repository"),
    ("branch", 409, r"somebody else pushed meanwhile \(409: injected\); look at what is there now"),
    ("commit", 401, NOBODY),
    ("commit", 403, "the token may not write there"),
    ("commit", 412, "somebody else pushed meanwhile"),
    ("commit", 500, r"the Hub has a problem \(500: injected\)"),
    ("commit", DROP, "the Hub or its storage cannot be reached"),
]


@pytest.mark.parametrize(("endpoint", "status", "message"), ERRORS)
def test_an_error_says_what_to_do_and_leaves_the_repository_as_it_was(hub, small, endpoint, status, message):
    hub.put(REPO, {"model.safetensors": b"old", "pytorch_model.bin": b"old"})
    hub.fail(endpoint, status)
    with refused(hub, f"^pushing to me/small failed: .*{message}") as caught:
        push_to_hub(small, REPO, card=CARD, revision="new" if endpoint == "branch" else None)
    assert hub.asked(endpoint)[-1].status == status
    assert isinstance(caught.value.__cause__, Exception)


def test_a_passing_trouble_is_no_error(hub, small, logits):
    for endpoint in ("preupload", "lfs_batch", "lfs_put", "lfs_verify"):
        hub.fail(endpoint, 503, times=2)
    push_to_hub(small, REPO)
    assert logits()
    assert len(hub.asked("commit")) == 1


def test_a_commit_that_was_made_although_the_answer_is_an_error_is_not_made_again(hub, small, logits):
    hub.fail("commit", 500, times=1, late=True)
    with pytest.raises(HubError, match="push again later: what has arrived is not sent twice"):
        push_to_hub(small, REPO, card=CARD)
    arrived = hub.state()
    push_to_hub(small, REPO, card=CARD)
    assert hub.state() == arrived
    assert logits()


def test_what_somebody_else_pushes_meanwhile_is_not_overwritten(hub, small):
    hub.put(REPO, {"README.md": b"theirs"})
    hub.before("commit", lambda: hub.put(REPO, {"README.md": b"theirs, again"}))
    with pytest.raises(HubError, match=r"somebody else pushed meanwhile \(412: A commit has happened since"):
        push_to_hub(small, REPO, card=CARD)
    assert hub.files(REPO)["README.md"] == b"theirs, again"
    assert "model.safetensors" not in hub.files(REPO)


@pytest.mark.parametrize("token", [None, True, False, ""])
def test_no_token(hub, small, monkeypatch, token):
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="pushing to me/small failed: there is no token; log in with `hf auth login`"):
        push_to_hub(small, REPO, token=token)
    assert hub.log == []


@pytest.mark.parametrize(
    ("token", "message"),
    [
        (READER, r"the token may not write there \(403: You don't have the rights.*; use a token with the write role"),
        (OTHER, r"the token may not write there \(403: .* namespace me, .*a repo_id in a namespace of your own"),
    ],
)
def test_a_token_that_is_not_enough(hub, small, token, message):
    hub.put(REPO, {"model.safetensors": b"old"}, private=True)
    with refused(hub, message):
        push_to_hub(small, REPO, token=token)


def test_a_bad_token_is_found_before_the_model_is_saved(hub, small, monkeypatch):
    hub.put(REPO, {"model.safetensors": b"old"}, private=True)
    monkeypatch.setattr(hub_module, "save", None)
    with refused(hub, rf"{NOBODY} \(401: Invalid credentials in Authorization header\); log in"):
        push_to_hub(small, REPO, token="hf_" + "x" * 34)


def test_offline(hub, small, monkeypatch):
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    with pytest.raises(HubError, match=r"me/small failed: HF_HUB_OFFLINE or .* is set; unset it before Python starts"):
        push_to_hub(small, REPO)
    assert hub.log == []


def test_no_connection(hub, small, monkeypatch):
    with HubServer({}) as gone:
        monkeypatch.setattr(constants, "ENDPOINT", gone.url)
    with pytest.raises(HubError, match=r"the Hub or its storage cannot be reached \(ConnectError: .*; check the conn"):
        push_to_hub(small, REPO)


def test_no_xet_storage(hub, small, monkeypatch):
    monkeypatch.setenv("HF_HOME", constants.HF_HUB_CACHE)  # read when it is imported
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", False)
    with pytest.raises(HubError, match=r"Hub or its storage cannot be reached \(ConnectionError: .*xet-write-token"):
        push_to_hub(small, REPO)
    assert list(hub.files(REPO)) == [".gitattributes"]


def test_a_card_that_the_hub_refuses_is_found_before_the_weights_go(hub, small):
    with refused(hub, r"refuses the card's metadata \(.*license.* must be one of .*correct them"):
        push_to_hub(small, REPO, card=ModelCard("---\nlicense: unheard-of\n---\n"))


def test_a_model_that_does_not_load_again_is_not_sent(hub, small):
    small.model.layers[0].input_layernorm.variance_epsilon = 0.1  # which no config can say of one block
    with refused(hub, None, ParityError):
        push_to_hub(small, REPO)
    assert [request.endpoint for request in hub.log if request.method != "GET"] == []


@pytest.mark.parametrize(
    ("arguments", "error", "message"),
    [
        ({"repo_id": "a/b/c"}, ValueError, "repo_id must be 'name' or 'namespace/name'.*'a/b/c'"),
        ({"repo_id": "me/my model"}, ValueError, "repo_id must be .*'me/my model'"),
        ({"repo_id": "./out"}, ValueError, "repo_id must be .*'./out'"),
        ({"repo_id": None}, ValueError, "repo_id must be .*not None"),
        ({"token": f"{WRITER}\n"}, ValueError, "token has spaces, line breaks or letters that no token has"),
        ({"report": {}}, TypeError, "report must be a CompressionReport, not dict"),
        ({"card": "# Mine"}, TypeError, "card must be a huggingface_hub.ModelCard, not str"),
        ({"commit_message": " "}, ValueError, "commit_message is empty"),
        ({"revision": "dev", "create_pr": True}, ValueError, "create_pr=True opens .* leave revision='dev' out"),
        ({"repo_id": f"me/{WRITER}"}, ValueError, "your token stands in repo_id"),
        ({"revision": WRITER, "commit_message": WRITER}, ValueError, "your token stands in revision, commit_message, "),
        ({"repo_id": f"me/{READER}/"}, ValueError, "repo_id must be .*'me/<token>/'"),
    ],
)
def test_bad_arguments_are_found_before_any_work(hub, small, monkeypatch, arguments, error, message):
    monkeypatch.setattr(hub_module, "save", None)
    with pytest.raises(error, match=message) as caught:
        push_to_hub(small, **{"repo_id": REPO, **arguments})
    assert hub.log == []
    assert WRITER not in "".join(traceback.format_exception(caught.value))


def test_a_token_in_the_card_or_the_report_is_not_pushed(hub, small, tokenizer):
    report = CompressionReport.from_json(small.compression_report.to_json().replace("drop_blocks", WRITER))
    card = ModelCard(f"---\nlicense: mit\n---\n\nMade with HF_TOKEN={WRITER}\n")
    with refused(hub, r"your token stands in README.md, compression_report.json, ", ValueError) as caught:
        push_to_hub(small, REPO, tokenizer, card=card, report=report)
    assert WRITER not in str(caught.value)


@pytest.fixture
def debugging(monkeypatch, caplog):
    """All that the client can log is logged. (Not what lies under it: that logs the headers of answers as they are.)"""
    monkeypatch.setattr(constants, "HF_DEBUG", True)
    for name in ("huggingface_hub", "httpx2", "transformers"):
        caplog.set_level(logging.DEBUG, logger=name)
        monkeypatch.setattr(logging.getLogger(name), "propagate", True)
    return caplog


def test_the_token_is_in_nothing_that_is_pushed_or_logged(hub, small, tokenizer, debugging, capfd):
    hub.fail("lfs_put", 503, times=1)
    push_to_hub(small, REPO, tokenizer)
    assert all(WRITER.encode() not in content for content in hub.files(REPO).values())
    assert all(WRITER.encode() not in request.body and WRITER not in request.path for request in hub.log)
    assert "/commit/main" in debugging.text  # the log is not just empty
    assert WRITER not in debugging.text + "".join(capfd.readouterr())


@pytest.mark.parametrize("endpoint", ["info", "create_repo", "preupload", "lfs_batch", "commit"])
@pytest.mark.parametrize("status", [400, 403, 500])
def test_a_token_that_the_server_echoes_is_not_shown(hub, small, debugging, capfd, endpoint, status):
    hub.fail(endpoint, status, "you sent {authorization}")
    with pytest.raises(HubError) as caught:
        push_to_hub(small, REPO, card=CARD)
    shown = "".join(traceback.format_exception(caught.value)) + caught.value.__cause__.server_message
    assert "you sent Bearer <token>" in str(caught.value)
    assert "The above exception was the direct cause" in shown
    assert WRITER not in shown + debugging.text + "".join(capfd.readouterr())
