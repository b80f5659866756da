"""Which classes of a dataset are text, told from the words of their names."""

from __future__ import annotations

import re
from collections.abc import Iterable, Sequence

from pipeline.core.errors import DataError
from pipeline.data.format.schema import DatasetCategory
from pipeline.data.prepare.coco import Category


def _words(*lines: str) -> frozenset[str]:
    return frozenset(word for line in lines for word in line.split())


_WORDS = re.compile(r"[A-Z]+(?![a-z])|[A-Z]?[a-z]+")
# Singular, lower case. Of a name such as "table caption", the last known word decides.
TEXT_WORDS = _words(
    "abstract acknowledgment address affiliation answer appendix article author bibliography biography block body",
    "bullet byline capital caption catchword chapter code colophon column comment content copyright credit date",
    "dateline definition description doi editor email entry epigraph folio footer footnote glossary greeting",
    "handwriting handwritten head header heading headline index introduction item jump keyword label lead legend",
    "letter line list main margin marginalia mark motto name note number numbering option paragraph part phone",
    "poem proof publication question quote reference remark row salutation section sentence sidebar sidenote",
    "slogan solution speech stanza subheading subject subsection subtitle summary synopsis teaser text textline",
    "theorem title toc topic typography value verse word",
)
NON_TEXT_WORDS = _words(
    "ad advert advertisement advertising algorithm artefact artifact background bar barcode blank border cartoon",
    "cell chart checkbox chem chemical clipart comic crest custom damage decoration diagram divider drawing",
    "emblem equation figure flowchart form formula frame graph graphic icon illustration image infographic logo",
    "map math maths miniature molecule music noise ornament other photo photograph picture plot portrait qr",
    "qrcode rule ruler screenshot seal separator signature sketch staff stain stamp table unknown vignette",
    "watermark",
)


def categories_with_text(categories: Sequence[Category], text: Iterable[str] | None) -> list[DatasetCategory]:
    """Classes of a dataset in the order of their ids, each flagged as text or not.

    Args:
        categories: classes of the annotations.
        text: names of the text classes, or only ``none``; None: told from the words of each name.

    Raises:
        DataError: if ``text`` names a class that does not exist, or a name has no known word.
    """
    names = [category.name for category in categories]
    chosen = None if text is None else set(text)
    if chosen == {"none"} and "none" not in names:
        chosen = set()
    missing = sorted((chosen or set()) - set(names))
    if missing:
        raise DataError(f"--text: unknown classes {', '.join(missing)}; the classes are {', '.join(names)}")
    flags = {name: name in chosen if chosen is not None else is_text(name) for name in names}
    unknown = [name for name, flag in flags.items() if flag is None]
    if unknown:
        known = " ".join(f"--text {name!r}" for name, flag in flags.items() if flag) or "--text NAME"
        raise DataError(
            f"whether {', '.join(map(repr, unknown))} is text cannot be told from the name; list every text class: "
            f"{known}, and those of them that are; or --text none"
        )
    return [
        DatasetCategory(id=category.id, name=category.name, text=bool(flags[category.name]))
        for category in sorted(categories, key=lambda category: category.id)
    ]


def is_text(name: str) -> bool | None:
    """Whether a class is text, by the last known word of its name; None if it has none."""
    for word in reversed([_singular(word.lower()) for word in _WORDS.findall(name)]):
        if word in NON_TEXT_WORDS:
            return False
        if word in TEXT_WORDS:
            return True
    return None


def _singular(word: str) -> str:
    if word in TEXT_WORDS or word in NON_TEXT_WORDS:
        return word
    for ending, singular in (("ies", "y"), ("es", "e"), ("es", ""), ("s", "")):
        stem = word.removesuffix(ending) + singular
        if word.endswith(ending) and (stem in TEXT_WORDS or stem in NON_TEXT_WORDS):
            return stem
    return word
