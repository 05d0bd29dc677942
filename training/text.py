"""Sentences to speak: small grammars, and manuals and example sentences from Debian packages where those are there.

In: training/grammars/*.toml; optionally files of the packages debian-handbook, gnome-user-docs, libreoffice-help-fr,
libreoffice-help-zh-cn and wordnet-base, under any root. Out: <work>/text/<language>.tsv, a line per utterance in the
notation of units.py, shuffled; no sentence of the held-out set is among them.

Why grammars: they give balanced everyday sentences with names, numbers and times in any amount; manuals alone speak of
windows and buttons. Only text fit for every audience is used. Manuals are by nature; a WordNet example is taken only if
each of its words also occurs in the manuals or the grammars and none is in _AVOIDED. Collections of quotations and
jokes are not read.
"""

from __future__ import annotations

import argparse
import html
import logging
import random
import re
import tomllib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from training.numbers import SLOT_MAKERS
from training.units import LANGUAGES

logger = logging.getLogger(__name__)

GRAMMARS = Path(__file__).resolve().parent / "grammars"
HELDOUT = Path(__file__).resolve().parent.parent / "benchmarks" / "heldout" / "sentences.toml"

GRAMMAR_SENTENCES = {"en": 60_000, "es": 22_000, "fr": 22_000, "de": 22_000, "ru": 22_000, "zh": 22_000}
_MOST_FROM_PACKAGES = 22_000
_PAIR_SHARE = 0.10
"""Of the sentences, so many are joined with the next one: two in a breath."""
_LONGEST_PAIR = {"zh": 60}
_LONGEST_PAIR_DEFAULT = 170

_LETTERS = {
    "en": "a-zA-Z",
    "es": "a-zA-ZáéíóúüñÁÉÍÓÚÜÑ¿¡",
    "fr": "a-zA-ZàâäçéèêëîïôöùûüÿœæÀÂÇÉÈÊËÎÏÔÙÛŒ",
    "de": "a-zA-ZäöüßÄÖÜ",
    "ru": "а-яА-ЯёЁ",
}
_PLAIN = {language: re.compile(f"^[{letters} ,.?!'-]+$") for language, letters in _LETTERS.items()}
_PLAIN["zh"] = re.compile("^[\u4e00-\u9fff，。？！、]+$")
_FREQUENT = {
    "en": "the of and is are with this that you your for from have will can to not be or which a in on it",
    "es": "el la los las de que en un una no es por con se su para",
    "fr": "le la les des de que et un une est en il ne pas pour ce sur dans du",
    "de": "der die das und ist nicht ein eine zu den von mit sich auf es in ich wir",
    "ru": "и в не на что с я как это он по но а из то все для к",
}
_MESS = re.compile(
    r"[.?!,'-]{2}|\.[a-zа-я]| '|' |[a-zа-я][A-ZА-Я]|[A-ZА-Я]{2}|-\s|\s-|^[a-zа-яà-ÿ]"
    r"|\b\w\.|\b(etc|vs|cf|bzw|usw|No|Nr)\."
)
"""Marks of text that is not a plain sentence: doubled stops, camel case, capitals, abbreviations, a small beginning."""
_AVOIDED = re.compile(r"\b(kill|die[ds]?|dead|death|weapon|gun|drug|attack|war|murder|hell|damn|blood|sex|naked)", re.I)

_FIRST_LETTER_VOWELS = "aeiou"
_NOT_AFTER_A = {"first", "second", "third", "last", "next", "same", "other", "whole", "right"}


@dataclass(frozen=True, slots=True)
class Grammar:
    """Templates with slots; a slot is a list of phrases or computed (numbers.py)."""

    language: str
    templates: tuple[str, ...]
    slots: dict[str, tuple[str, ...]]

    @classmethod
    def load(cls, language: str) -> Grammar:
        data = tomllib.loads((GRAMMARS / f"{language}.toml").read_text(encoding="utf8"))
        return cls(language, tuple(data["templates"]), {name: tuple(items) for name, items in data["slots"].items()})

    def sentence(self, rng: random.Random) -> str:
        """One random sentence. Raises KeyError for a template with an unknown slot."""
        text = re.sub(r"\{(\w+)\}", lambda match: self._fill(match[1], rng), rng.choice(self.templates))
        if self.language == "fr":
            text = re.sub(r"\b([Qq]u|[Dd])e ([aeiouéèêâîôAEIOUÉ])", r"\1'\2", text)
        if self.language == "zh":
            text = re.sub("([，。])\\1", "\\1", text)
        return _capitalised(text)

    def _fill(self, slot: str, rng: random.Random) -> str:
        name = slot.lower()
        maker = SLOT_MAKERS[self.language].get(name)
        if maker is not None:
            return maker(rng)
        if name == "subj2":
            subject = rng.choice(self.slots["subj"])
            return subject if subject == "I" else subject.lower()
        if name in ("adj2", "animal2"):
            return _after_article(self.slots[name[:-1]], rng)
        phrase = rng.choice(self.slots[name])
        if phrase.startswith("#"):
            low, high = map(int, phrase[1:].split("-"))
            number = rng.randint(low, high)
            return str(number + 1 if number % 10 == 1 else number)  # one, twenty-one, ... would need agreement
        return _capitalised(phrase) if slot[0].isupper() else phrase


def _after_article(phrases: Sequence[str], rng: random.Random) -> str:
    """A phrase that may follow 'a'."""
    fitting = [p for p in phrases if p[0] not in _FIRST_LETTER_VOWELS and p not in _NOT_AFTER_A]
    return rng.choice(fitting)


def _capitalised(text: str) -> str:
    start = 1 if text[0] in "¿¡" else 0
    return text[:start] + text[start].upper() + text[start + 1 :]


def build_lines(
    language: str, *, n_grammar: int, packages: Path | None = None, seed: int = 7, n_packages: int = _MOST_FROM_PACKAGES
) -> list[str]:
    """Lines to speak, shuffled. packages: root under which usr/share of the packages lies, e.g. Path('/')."""
    rng = random.Random(f"{seed} {language}")
    grammar = Grammar.load(language)
    made = list(dict.fromkeys(grammar.sentence(rng) for _ in range(n_grammar)))
    found = package_sentences(language, packages, made) if packages else []
    rng.shuffle(found)
    held_out = held_out_keys(language)
    lines = [line for line in made + found[:n_packages] if sentence_key(line) not in held_out]
    rng.shuffle(lines)
    logger.info("language=%s grammar=%d packages=%d", language, len(made), min(len(found), n_packages))
    return _join_some(lines, language, rng)


def held_out_keys(language: str) -> set[str]:
    """Keys of the sentences that may not be trained on."""
    kinds = tomllib.loads(HELDOUT.read_text(encoding="utf8"))[language]
    return {sentence_key(text) for texts in kinds.values() for text in texts}


def sentence_key(line: str) -> str:
    """What makes two sentences the same: letters and figures, without case, stops and pronunciation."""
    return re.sub(r"[\W_]", "", re.sub(r"~[\w-]+", "", line.partition("\t")[0]).lower())


def _join_some(lines: list[str], language: str, rng: random.Random) -> list[str]:
    longest, glue = _LONGEST_PAIR.get(language, _LONGEST_PAIR_DEFAULT), "" if language == "zh" else " "
    joined: list[str] = []
    rest = iter(lines)
    for line in rest:
        partner = next(rest, None) if rng.random() < _PAIR_SHARE else None
        if partner is not None and len(line) + len(partner) < longest:
            joined.append(line + glue + partner)
        else:
            joined += [line] if partner is None else [line, partner]
    return joined


def package_sentences(language: str, root: Path, grammar_lines: Sequence[str]) -> list[str]:
    """Plain sentences of the installed manuals; for English also WordNet's examples. Each once, in reading order."""
    found = (sentence for paragraph in manual_paragraphs(language, root) for sentence in split(paragraph, language))
    manuals = [s for s in dict.fromkeys(found) if is_plain(s, language) and not _AVOIDED.search(s)]
    if language != "en":
        return manuals
    known = {word for line in (*manuals, *grammar_lines) for word in _words(line)}
    examples = [s for s in dict.fromkeys(wordnet_examples(root)) if is_plain(s, "en") and known.issuperset(_words(s))]
    return manuals + [s for s in examples if not _AVOIDED.search(s)]


def manual_paragraphs(language: str, root: Path) -> Iterator[str]:
    """Paragraphs of the Debian handbook, GNOME's help and LibreOffice's help, without markup."""
    share = root / "usr" / "share"
    handbook = {"en": "en-US", "fr": "fr-FR", "de": "de-DE", "es": "es-ES", "ru": "ru-RU", "zh": "zh-CN"}[language]
    gnome = {"en": "C", "zh": "zh_CN"}.get(language, language)
    office = {"zh": "zh-CN"}.get(language, language)
    places = (
        (share / "doc" / "debian-handbook" / "html" / handbook, "*.html", r'<div class="para">(.*?)</div>'),
        (share / "help" / gnome, "*/*.page", r"<p[^>]*>(.*?)</p>"),
        (share / "libreoffice" / "help" / office, "**/*.html", r"<p[^>]*>(.*?)</p>"),
    )
    for folder, pattern, paragraph in places:
        for file in sorted(folder.glob(pattern)):
            for match in re.findall(paragraph, file.read_text(encoding="utf8", errors="replace"), re.DOTALL):
                yield html.unescape(re.sub(r"<[^>]+>", " ", match))


def wordnet_examples(root: Path) -> Iterator[str]:
    """The quoted examples in WordNet's data files (wndb(5)), as sentences."""
    for part in ("noun", "verb", "adj", "adv"):
        file = root / "usr" / "share" / "wordnet" / f"data.{part}"
        if not file.exists():
            return
        for line in file.read_text(encoding="utf8", errors="replace").splitlines():
            for example in re.findall(r'"([^"]{13,})"', line.partition("| ")[2]):
                text = re.sub(r"\s+", " ", example.strip(" .,;")).replace(" ,", ",")
                if text:
                    yield _capitalised(text) + ("" if text[-1] in "?!" else ".")


def split(paragraph: str, language: str) -> list[str]:
    """A paragraph's sentences, quotation marks, brackets and odd dashes gone."""
    text = re.sub(r"[“”„«»\"*_`]", "", paragraph.translate(str.maketrans("’‘–—…", "''--.")))
    text = re.sub(r"\([^)]*\)|\[[^\]]*\]", "", text)
    text = re.sub(r"\s+", " ", text).strip()
    if language == "zh":
        text = re.sub(r"[；：]", "，", text.replace(" ", ""))
        return [sentence for sentence in re.split(r"(?<=[。？！])", text) if sentence]
    text = re.sub(r"\s+([,.?!])", r"\1", re.sub(r"[;:]| --? ", ",", text))
    return re.split(r"(?<=[.!?])\s+(?=[A-ZÀ-ÖØ-ÞА-ЯЁ¿¡])", text)


def is_plain(sentence: str, language: str) -> bool:
    """A sentence that one can read aloud: letters only, of middling length, in the right language."""
    if not _PLAIN[language].match(sentence):
        return False
    if language == "zh":
        return 6 <= len(sentence) <= 42 and sentence[-1] in "。？！" and sentence[0] not in "，。、？！"
    if not 18 <= len(sentence) <= 150 or sentence[-1] not in ".?!" or _MESS.search(sentence):
        return False
    words = _words(sentence)
    if len(words) < 4 or max(map(len, words)) > 22:
        return False
    english = set(_FREQUENT["en"].split()) - set(_FREQUENT[language].split()) - {"a", "in", "on"}
    if language != "en" and sum(word in english for word in words) >= 2:
        return False  # an untranslated sentence of a translated manual
    return any(word in _FREQUENT[language].split() for word in words)


def _words(text: str) -> list[str]:
    return re.findall(r"[^\W\d_]+", re.sub(r"~[\w-]+", "", text.lower()))


def write_lines(folder: Path, language: str, lines: Sequence[str]) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"{language}.tsv").write_text("\n".join(lines) + "\n", encoding="utf8")


def read_lines(folder: Path, language: str) -> list[str]:
    return (folder / f"{language}.tsv").read_text(encoding="utf8").splitlines()


def main(arguments: Sequence[str] | None = None) -> None:
    parser = argparse.ArgumentParser(prog="python -m training.text", description="Write the sentences to speak.")
    parser.add_argument("--work", type=Path, required=True, help="folder of the run; text/ is made in it")
    parser.add_argument("--packages", type=Path, help="root of installed Debian packages with text, e.g. /")
    parser.add_argument(
        "--share", type=float, default=1.0, help="of the usual number of grammar sentences (default: 1)"
    )
    parser.add_argument("--seed", type=int, default=7)
    options = parser.parse_args(arguments)
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    for language in LANGUAGES:
        n_grammar = max(10, round(GRAMMAR_SENTENCES[language] * options.share))
        lines = build_lines(language, n_grammar=n_grammar, packages=options.packages, seed=options.seed)
        write_lines(options.work / "text", language, lines)


if __name__ == "__main__":
    main()
