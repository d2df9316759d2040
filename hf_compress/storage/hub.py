"""Pushing a compressed model to the Hub: proven on disk first, and then everything in one commit."""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from fnmatch import fnmatchcase
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from huggingface_hub import CommitInfo, CommitOperationAdd, CommitOperationDelete, HfApi, ModelCard, ModelInfo
from huggingface_hub.errors import (
    HfHubHTTPError,
    HTTPError,  # the client's own base class, whichever HTTP library it was built with
    LocalTokenNotFoundError,
    OfflineModeIsEnabled,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)
from huggingface_hub.utils import build_hf_headers, validate_repo_id
from transformers import PreTrainedModel

from hf_compress import __version__
from hf_compress.calibration.data import Batch
from hf_compress.calibration.media import Processor
from hf_compress.calibration.processes import by_first
from hf_compress.errors import HubError
from hf_compress.report.card import model_card
from hf_compress.report.card_facts import CardDetails
from hf_compress.report.history import history_of
from hf_compress.report.report import REPORT_FILE, CompressionReport
from hf_compress.storage.portable import SHIM_MODULE
from hf_compress.storage.save import save

# Files of another model, in the root of a repository, that some loader would take for this one's: from_pretrained
# prefers model.safetensors to an index, and adds an adapter that lies beside; vLLM reads every *.safetensors.
_WEIGHTS = (
    "*.safetensors",
    "*.safetensors.index.json",
    "pytorch_model*.bin",
    "pytorch_model*.bin.index.json",
    "consolidated*.pth",
    "tf_model*.h5",
    "flax_model*.msgpack",
    "adapter_config.json",
    "adapter_model*",
    f"{SHIM_MODULE}.py",
    REPORT_FILE,
)
_TOKENIZER = (
    "tokenizer*.json",
    "tokenizer.model*",
    "special_tokens_map.json",
    "added_tokens.json",
    "vocab.json",
    "vocab.txt",
    "merges.txt",
    "spiece.model",
    "sentencepiece*.model",
    "chat_template.jinja",
    "chat_template.json",
    "additional_chat_templates/*",
)

_TOKEN = re.compile(r"\bhf_[A-Za-z0-9]{20,}")
_LOG_IN = "log in with `hf auth login`, or set HF_TOKEN (https://huggingface.co/settings/tokens)"
_MEANWHILE = "somebody else pushed meanwhile", "look at what is there now, and push again"
_ANSWERS = {
    401: ("the Hub does not accept the token", _LOG_IN),
    403: (
        "the token may not write there",
        "use a token with the write role, a repo_id in a namespace of your own, or create_pr=True",
    ),
    404: ("there is no such repository or revision, or the token may not see it", "check repo_id and revision"),
    409: _MEANWHILE,
    412: _MEANWHILE,
    429: ("there were too many requests", "wait some minutes and push again"),
}


@by_first
def push_to_hub(  # noqa: PLR0913 (they are those of save, and of Transformers' own push_to_hub)
    model: PreTrainedModel,
    repo_id: str,
    tokenizer: Processor | None = None,
    *,
    report: CompressionReport | None = None,
    card: ModelCard | None = None,
    portable: bool = False,
    probe: Batch | Mapping[str, Any] | None = None,
    private: bool | None = None,
    token: bool | str | None = None,
    revision: str | None = None,
    commit_message: str | None = None,
    create_pr: bool = False,
) -> CommitInfo:
    """Put `model`, its tokenizer, its compression report and its card on the Hub, in one commit.

    The model is first saved to a temporary folder, loaded from there and compared, as `save` does; nothing is sent
    before. The repository is made where there is none. Weights that an older model left in its root are deleted in the
    same commit, and its tokenizer where a new one is pushed; everything else stays. If somebody else's commit comes in
    between, nothing is committed. What has not changed is not sent again; where nothing has, there is no new commit.

    Args:
        model: any model in memory. What is known of its history (see `history_of`) goes into a report beside it.
        repo_id: "name", or "namespace/name".
        tokenizer: pushed beside the model.
        report: pushed instead of what is known of the model's history.
        card: pushed as README.md; made of the history when None, if there is one.
        portable, probe: as for `save`.
        private: whether a new repository is private; None leaves it to the Hub.
        token: a token; None or True for the one that `hf auth login` or HF_TOKEN has left.
        revision: a branch, made from the main one where it does not exist.
        commit_message: the commit's title.
        create_pr: open a pull request against the main branch instead of committing to it.

    Returns:
        The commit; the latest one where nothing had changed.

    Raises:
        ValueError, TypeError: a bad argument, or the token stands in something that would be pushed.
        ParityError: the model does not load as it is in memory; nothing was sent.
        HubError: the Hub could not be reached, or did not take it. No branch holds half of a model.
    """
    message = "Upload a model with hf_compress" if commit_message is None else commit_message
    _check_arguments(repo_id, token, report, card, message)
    if create_pr and revision not in (None, "main"):
        raise ValueError(f"create_pr=True opens against the main branch: leave revision={revision!r} out, or create_pr")
    with _explained(repo_id, token):
        secret = _token_to_send(token)
    texts = {"repo_id": repo_id, "revision": revision or "", "commit_message": message}
    _check_no_token(secret, ((name, text.encode()) for name, text in texts.items()))
    api = HfApi(token=secret, library_name="hf_compress", library_version=__version__)
    with _explained(repo_id, secret):
        _check_access(api, repo_id)
    with TemporaryDirectory() as parent:
        with _reported(model, report):
            card = _card(model, repo_id, tokenizer is not None, portable) if card is None else card
            told = history_of(model)
            with _reported(model, told and told.published()):
                folder = save(model, Path(parent) / "model", tokenizer, portable=portable, card=card, probe=probe)
        _check_no_token(secret, ((p.name, p.read_bytes()) for p in _files(folder) if p.suffix != ".safetensors"))
        with _explained(repo_id, secret):
            _check_card(card, repo_id)
            return _send(api, folder, repo_id, private=private, revision=revision, message=message, create_pr=create_pr)


def _check_arguments(repo_id: Any, token: Any, report: Any, card: Any, message: str) -> None:
    try:
        validate_repo_id(repo_id)
    except ValueError as error:
        raise ValueError(
            f"repo_id must be 'name' or 'namespace/name', of letters, digits, '-', '_' and '.', such as 'me/smaller': "
            f"{_hidden(str(error), token)}"
        ) from None
    if repo_id is None:
        raise ValueError("repo_id must be 'name' or 'namespace/name', such as 'me/smaller', not None")
    if isinstance(token, str) and (not token.isascii() or not token.isprintable() or " " in token):
        raise ValueError("token has spaces, line breaks or letters that no token has: pass it as the Hub shows it")
    if report is not None and not isinstance(report, CompressionReport):
        raise TypeError(f"report must be a CompressionReport, not {type(report).__name__}")
    if card is not None and not isinstance(card, ModelCard):
        raise TypeError(f"card must be a huggingface_hub.ModelCard, not {type(card).__name__}")
    if not message.strip():
        raise ValueError("commit_message is empty: pass a title for the commit, or None")


@contextmanager
def _reported(model: PreTrainedModel, report: CompressionReport | None) -> Iterator[None]:
    """Have `model` carry `report`, where there is one, and afterwards what it carried before."""
    attributes = vars(model)
    before = {name: value for name, value in attributes.items() if name == "compression_report"}
    try:
        if report is not None:
            attributes["compression_report"] = report
        yield
    finally:
        attributes.pop("compression_report", None)
        attributes.update(before)


def _card(model: PreTrainedModel, repo_id: str, tokenizer: bool, portable: bool) -> ModelCard | None:
    """The card that `save` would make, with an example that loads the model from where it goes."""
    if history_of(model) is None:
        return None
    space, _, name = repo_id.rpartition("/")
    named = repo_id if space else None  # whose it will be, the Hub knows
    return model_card(model, details=CardDetails(name=name, repo_id=named, tokenizer=tokenizer, portable=portable))


def _token_to_send(token: bool | str | None) -> str:
    """The token that the client would send."""
    secret = build_hf_headers(token=token).get("authorization", "").removeprefix("Bearer ")
    if not secret:
        raise LocalTokenNotFoundError("pushing takes a token")
    return secret


def _check_access(api: HfApi, repo_id: str) -> None:
    """Raise if the Hub is out of reach or does not accept the token: saving may take minutes, so ask before."""
    try:
        api.model_info(repo_id)
    except RepositoryNotFoundError as error:
        if error.response.status_code != 404:
            raise


def _check_card(card: ModelCard | None, repo_id: str) -> None:
    """Raise if the Hub would refuse the card: the client asks only when the weights are already there."""
    try:
        if card is not None:
            card.validate()
    except ValueError as error:
        said = _one_line(str(error))
        raise HubError(
            f"pushing to {repo_id} failed: the Hub refuses the card's metadata ({said}); correct them"
        ) from error


def _check_no_token(secret: str, texts: Iterable[tuple[str, bytes]]) -> None:
    """Raise if the token stands in one of these named texts."""
    if found := [name for name, text in texts if secret.encode() in text]:
        raise ValueError(
            f"your token stands in {', '.join(found)}, which others would read: take it out there, and push again"
        )


def _send(
    api: HfApi, folder: Path, repo_id: str, *, private: bool | None, revision: str | None, message: str, create_pr: bool
) -> CommitInfo:
    """Commit every file of `folder`, and that the files of an older model go, on top of what was there when asked."""
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    head, branch = _head(api, repo_id, revision)
    if private and not head.private:
        raise HubError(
            f"{repo_id} exists and is public, which private=True does not change: make it private on its settings "
            "page, choose another repo_id, or leave private out"
        )
    additions = [CommitOperationAdd(path.relative_to(folder).as_posix(), path) for path in _files(folder)]
    stale = stale_files(api.list_repo_files(repo_id, revision=head.sha), [add.path_in_repo for add in additions])
    # Not upload_folder, which makes a commit of each some minutes' worth. An ignore file in the repository would leave
    # the weights out without a word; an empty one takes its place.
    api.preupload_lfs_files(repo_id, additions, revision=branch, create_pr=create_pr, gitignore_content="# none")
    if revision is not None and branch is None:
        api.create_branch(repo_id, branch=revision, revision=head.sha)
    return api.create_commit(
        repo_id,
        [*(CommitOperationDelete(path, is_folder=False) for path in stale), *additions],
        commit_message=message,
        revision=revision,
        create_pr=create_pr,
        parent_commit=head.sha,
    )


def _head(api: HfApi, repo_id: str, revision: str | None) -> tuple[ModelInfo, str | None]:
    """What stands at `revision`; or, where that is a branch to be made, at the main one, and None for the branch."""
    try:
        return api.model_info(repo_id, revision=revision), revision
    except RevisionNotFoundError:
        if revision is None or revision.startswith("refs/"):
            raise
        return api.model_info(repo_id), None


def stale_files(there: list[str], new: list[str]) -> list[str]:
    """Those of the files in a repository that a loader would take for a model that has only the `new` ones."""
    patterns = _WEIGHTS + (_TOKENIZER if any(_matches(path, _TOKENIZER) for path in new) else ())
    return sorted(path for path in set(there) - set(new) if _matches(path, patterns))


def _matches(path: str, patterns: tuple[str, ...]) -> bool:
    return any(fnmatchcase(path, pattern) and path.count("/") == pattern.count("/") for pattern in patterns)


def _files(folder: Path) -> list[Path]:
    return sorted(path for path in folder.rglob("*") if path.is_file())


@contextmanager
def _explained(repo_id: str, token: bool | str | None) -> Iterator[None]:
    """Raise what the client raises as a HubError, with the token taken out of every message of the chain."""
    try:
        yield
    except HubError:
        raise
    except Exception as error:
        text = _hidden(f"pushing to {repo_id} failed: {_explanation(error)}", token)
        _hide(error, token)
        raise HubError(text) from error


def _explanation(error: BaseException) -> str:
    """What happened, and what to do."""
    known = (LocalTokenNotFoundError, HTTPError, ConnectionError)  # the last from Xet storage, and being offline
    cause: BaseException | None = error
    while cause is not None and not isinstance(cause, known):
        cause = cause.__cause__  # an upload's error comes wrapped
    if isinstance(cause, LocalTokenNotFoundError):
        return f"there is no token; {_LOG_IN}"
    if isinstance(cause, OfflineModeIsEnabled):
        return "HF_HUB_OFFLINE or TRANSFORMERS_OFFLINE is set; unset it before Python starts, or use save()"
    if isinstance(cause, HfHubHTTPError):
        return _answered(cause.response.status_code, cause.server_message)
    if cause is not None:
        return (
            f"the Hub or its storage cannot be reached ({_brief(cause)}); check the connection, proxy and HF_ENDPOINT"
        )
    return f"{_brief(error)}; push again: what has arrived is not sent twice"


def _answered(status: int, said: str | None) -> str:
    """What an answer of the Hub means, what the Hub itself says of it, and what to do."""
    if status >= 500:  # now and then a commit was made although the answer is an error
        happened, remedy = "the Hub has a problem", "push again later: what has arrived is not sent twice"
    else:
        happened, remedy = _ANSWERS.get(status, ("the Hub refuses it", "change what it names, and push again"))
    return f"{happened} ({status}{f': {_one_line(said)}' if said else ''}); {remedy}"


def _brief(error: BaseException) -> str:
    return f"{type(error).__name__}: {_one_line(str(error))}"


def _one_line(text: str) -> str:
    line = " ".join(text.split())
    return line if len(line) <= 300 else f"{line[:300]}…"


def _hide(error: BaseException, token: bool | str | None) -> None:
    """Take the token out of the messages of an error and of all that led to it: a server may echo what it was sent."""
    todo: list[BaseException | None] = [error]
    seen: set[int] = set()
    while todo:
        one = todo.pop()
        if one is None or id(one) in seen:
            continue
        seen.add(id(one))
        one.args = tuple(_hidden(value, token) if isinstance(value, str) else value for value in one.args)
        if isinstance(one, HfHubHTTPError) and one.server_message:
            one.server_message = _hidden(one.server_message, token)
        todo += [one.__cause__, one.__context__]


def _hidden(text: str, token: bool | str | None) -> str:
    """`text` without the token, and without whatever looks like one."""
    return _TOKEN.sub("<token>", text.replace(token, "<token>") if isinstance(token, str) and token else text)
