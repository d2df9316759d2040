"""A feature report's sections: sums, tokens and logits put into words."""

from __future__ import annotations

from collections.abc import Sequence

from transformers import PreTrainedTokenizerBase

from hf_compress.calibration.data import Calibration
from hf_compress.features.logits import DirectPath
from hf_compress.features.page import Card, Example, Section
from hf_compress.features.subjects import Subject
from hf_compress.features.tallies import DEAD, Tally, tokens_at
from hf_compress.modules.bottleneck import Form

_AROUND = 10  # tokens of context on either side
_WORDS = 8  # tokens whose logits rise, or fall, most


class Writer:
    """Makes the section of one bottleneck."""

    def __init__(
        self,
        subject: Subject,
        tally: Tally,
        data: Calibration,
        tokenizer: PreTrainedTokenizerBase,
        direct: DirectPath,
    ) -> None:
        self.subject, self.tally, self.data, self.tokenizer, self.direct = subject, tally, data, tokenizer, direct
        self.numbers = subject.kept if subject.kept is not None else subject.columns.tolist()

    def section(self, features: int) -> Section:
        subject, tally = self.subject, self.tally
        quality, dead = tally.sums.result(), tally.dead()
        order = tally.energy.argsort(descending=True, stable=True)
        chosen = [index for index in order.tolist() if not dead[index]][:features]
        linear = subject.module.form.select == "all"
        rule = f", or whose z²·‖W′‖² is in the mean below {DEAD:g} of the mean feature’s" if linear else ""
        return Section(
            name=f"block {subject.layer}",
            path=f"{subject.stack.path}.{subject.layer}",
            form=_described(subject.module.form),
            features=len(subject.columns),
            trained=subject.trained,
            quality=quality,
            curve=subject.curve,
            importance=subject.importance,
            kept=subject.kept,
            dead=[self.numbers[index] for index in dead.nonzero()[:, 0].tolist()],
            dead_rule=f"Of the features kept, those whose code is 0 on every token of these texts{rule}.",
            cards=self._cards(chosen),
            logits=self.direct.remark,
            remarks=subject.remarks,
        )

    def _cards(self, chosen: list[int]) -> list[Card]:
        tally, tokens = self.tally, self.tally.sums.tokens
        whole = float(tally.energy.sum())
        moved = self._moved(chosen)
        return [
            Card(
                index=self.numbers[index],
                activity=float(tally.active[index]) / tokens,
                mean=float(tally.size[index]) / tokens,
                largest=float(tally.peak[index]),
                energy=float(tally.energy[index]) / whole,
                above=self._examples(index, 1),
                below=self._examples(index, -1),
                raises=raises,
                lowers=lowers,
            )
            for index, (raises, lowers) in zip(chosen, moved, strict=True)
        ]

    def _moved(self, chosen: list[int]) -> list[tuple[list[tuple[str, float]], list[tuple[str, float]]]]:
        """Of each feature, the tokens whose logits it raises most and those that it lowers most."""
        if self.direct.unembedding is None or not chosen:
            return [([], []) for _ in chosen]
        rows = self.subject.module.decoder[self.subject.columns[chosen]]
        words = min(len(self.tokenizer), len(self.direct.unembedding))
        effects = self.direct.effects(rows, words)
        order = effects.argsort(dim=1, stable=True)
        count = min(_WORDS, words // 2)
        return [
            ([(self._word(i), float(row[i])) for i in reversed(by[len(by) - count :])],
             [(self._word(i), float(row[i])) for i in by[:count]])
            for row, by in zip(effects, order.tolist(), strict=True)
        ]  # fmt: skip

    def _word(self, token: int) -> str:
        """A token by itself, with the space before it where it has one."""
        text = str(self.tokenizer.decode([token], clean_up_tokenization_spaces=False))
        stored = str(self.tokenizer.convert_ids_to_tokens(token))
        spaced = stored[:1] in "▁Ġ" and not text.startswith(" ")
        return f" {text}" if spaced else text or stored

    def _examples(self, index: int, sign: int) -> list[Example]:
        if sign not in self.tally.largest:
            return []
        largest = self.tally.largest[sign]
        pairs = zip(largest.values[index].tolist(), largest.places[index].tolist(), strict=True)
        return [self._example(sign * value, *place) for value, place in pairs if value > 0]

    def _example(self, value: float, text: int, position: int) -> Example:
        row = self._row(text)
        window = [i for i in row if abs(i - position) <= _AROUND]
        pieces = _pieces(self.tokenizer, [row[i] for i in window])
        at = window.index(position)
        before = ("…" if min(row) < window[0] else "") + "".join(pieces[:at])
        after = "".join(pieces[at + 1 :]) + ("…" if max(row) > window[-1] else "")
        return Example(value, before, pieces[at] or self._word(row[position]), after, f"text {text}, token {position}")

    def _row(self, text: int) -> dict[int, int]:
        """The token at each position of a text that is no padding."""
        for batch in self.data:
            if text < batch.samples:
                break
            text -= batch.samples
        ids, there = tokens_at(self.subject.stack, batch)
        assert ids is not None
        return {i: int(ids[text, i]) for i in there[text].nonzero()[:, 0].tolist()}


def _pieces(tokenizer: PreTrainedTokenizerBase, ids: Sequence[int]) -> list[str]:
    """What each token adds to the text of those before it, which tells spaces as no token by itself does."""
    pieces, before = [], ""
    for end in range(1, len(ids) + 1):
        whole = str(tokenizer.decode(list(ids[:end]), clean_up_tokenization_spaces=False))
        # Of a character that goes on in the next token there is a mark before, which is then taken back.
        pieces.append(whole.removeprefix(before if whole.startswith(before) else before.rstrip("\ufffd")))
        before = whole
    return pieces


def _described(form: Form) -> str:
    selects = {
        "all": "linear code",
        "top": f"the {form.active} largest features of each token",
        "above": "features above thresholds of their own",
    }
    norm = {"kept": "the stream is normed, and its mean and spread given back", "lost": "the stream is normed",
            "none": "the stream is not normed"}[form.norm]  # fmt: skip
    return f"{selects[form.select]} · {norm} · {100 * form.skip:g}% of the stream passes by"
