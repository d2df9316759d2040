"""Make the multiple-choice cloze task that ships with the package, from the bundled held-out manuals.

    python examples/reference/make_cloze.py

Each item is a passage of a held-out document that breaks off in the middle of a line, and four ways to go on: the one
that stands in the document, and three of as many words taken from elsewhere. The same seed makes the same file.

Five words, because a choice's likelihood is its fit with the context plus how common its words are anyway, and the
second adds noise with every word: on 150 to 300 items, the bundled model is right in some 70 % with four words, 60 %
with twelve and 50 % with twenty. Distractors from the item's own document (`--own 3`) cost it a few points more.
"""

from __future__ import annotations

import argparse
import json
import random
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

HERE = Path(__file__).parent
PACK = HERE.parent.parent / "hf_compress" / "evaluation" / "tasks" / "manuals_cloze" / "manuals_cloze.jsonl"
LENGTH_TOLERANCE = 0.15  # of the right continuation's characters, so that length gives nothing away
LETTERS = 0.85  # of the characters that are not white space: prose, not tables, code or macros
MARKUP = re.compile(r"^[.'][A-Za-z\\]|\\[*(f&]", re.MULTILINE)  # what is left of roff


@dataclass(frozen=True)
class Span:
    """Words `start` to `end` (exclusive) of document `document` and the characters that they cover."""

    document: int
    start: int
    end: int
    text: str


@dataclass(frozen=True)
class Shape:
    """How an item looks: words of context and of continuation, and distractors from the item's own document."""

    context: int
    continuation: int
    own: int


class Corpus:
    """The held-out documents, cut into words, with where each word begins and ends."""

    def __init__(self, path: Path) -> None:
        records = [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]
        self.texts = [record["text"] for record in records]
        self.sources = [record["source"] for record in records]
        self.words = [[match.span() for match in re.finditer(r"\S+", text)] for text in self.texts]
        self.joined = "\0".join(" ".join(text.split()) for text in self.texts)

    def span(self, document: int, start: int, end: int) -> Span:
        """The words as they stand in the document, with the white space between them."""
        words = self.words[document]
        return Span(document, start, end, self.texts[document][words[start][0] : words[end - 1][1]])

    def after_a_space(self, document: int, start: int) -> bool:
        """Whether exactly one space stands before the word, so that any continuation can stand there as well."""
        words = self.words[document]
        return self.texts[document][words[start - 1][1] : words[start][0]] == " "

    def is_unique(self, text: str) -> bool:
        """Whether the words occur once in all documents: no boilerplate, and no second right answer."""
        return self.joined.count(" ".join(text.split())) == 1


def is_prose(text: str) -> bool:
    """Mostly letters and no leftovers of roff."""
    visible = re.sub(r"\s", "", text)
    return sum(character.isalpha() for character in visible) >= LETTERS * len(visible) and not MARKUP.search(text)


def continuations(corpus: Corpus, document: int, shape: Shape) -> list[Span]:
    """Every span of the document that could be a continuation, right or wrong."""
    starts = range(1, len(corpus.words[document]) - shape.continuation + 1)
    spans = (corpus.span(document, at, at + shape.continuation) for at in starts if corpus.after_a_space(document, at))
    return [span for span in spans if is_prose(span.text) and corpus.is_unique(span.text)]


def questions(corpus: Corpus, candidates: list[Span], shape: Shape) -> Iterator[tuple[Span, Span]]:
    """Pairs (context, right continuation) of one document that do not overlap, from its beginning to its end."""
    free = 0
    for right in candidates:
        begin = right.start - shape.context
        if begin < free:
            continue
        context = corpus.span(right.document, begin, right.start)
        if is_prose(context.text):
            free = right.end
            yield context, right


def distractors(context: Span, right: Span, pool: list[Span], count: int, rng: random.Random) -> list[Span]:
    """Up to `count` spans about as long as the right one that overlap neither the question nor each other."""
    chosen: list[Span] = []
    taken = [Span(context.document, context.start, right.end, "")]
    for span in rng.sample(pool, len(pool)):
        if len(chosen) == count:
            break
        if abs(len(span.text) - len(right.text)) > LENGTH_TOLERANCE * len(right.text):
            continue
        if any(span.document == t.document and span.start < t.end and t.start < span.end for t in taken):
            continue
        chosen.append(span)
        taken.append(span)
    return chosen


def make_items(corpus: Corpus, shape: Shape, seed: int) -> Iterator[dict[str, object]]:
    """Every item that the documents give, in a random order, the right answer at a random place."""
    rng = random.Random(seed)
    pools = [continuations(corpus, document, shape) for document in range(len(corpus.texts))]
    asked = [question for pool in pools for question in questions(corpus, pool, shape)]
    rng.shuffle(asked)
    for context, right in asked:
        source = corpus.sources[right.document]
        others = [
            span
            for document, pool in enumerate(pools)
            if corpus.sources[document] == source and document != right.document
            for span in pool
        ]
        wrong = distractors(context, right, pools[right.document], shape.own, rng)
        wrong += distractors(context, right, others, 3 - len(wrong), rng)
        if len(wrong) < 3:
            continue
        choices = [right.text, *(span.text for span in wrong)]
        order = rng.sample(range(4), 4)
        yield {
            "context": context.text,
            "choices": [choices[index] for index in order],
            "answer": order.index(0),
            "source": source,
            "document": right.document,
        }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--heldout", type=Path, default=HERE / "heldout.jsonl")
    parser.add_argument("--output", type=Path, default=PACK)
    parser.add_argument("--items", type=int, default=500)
    parser.add_argument("--context", type=int, default=40, help="words before the gap")
    parser.add_argument("--continuation", type=int, default=5, help="words of each choice")
    parser.add_argument("--own", type=int, default=0, choices=range(4), help="distractors from the same document")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    shape = Shape(args.context, args.continuation, args.own)
    items = list(make_items(Corpus(args.heldout), shape, args.seed))
    if len(items) < args.items:
        raise SystemExit(f"{args.heldout} gives {len(items)} items, fewer than --items {args.items}: ask for fewer.")
    lines = [json.dumps(item, ensure_ascii=False) + "\n" for item in items[: args.items]]
    args.output.write_text("".join(lines), encoding="utf-8")
    print(f"{args.output}: {args.items} items of {len(items)} possible")


if __name__ == "__main__":
    main()
