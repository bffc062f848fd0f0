"""Small data sets, made of words that the small tokenizer knows."""

from __future__ import annotations

from collections.abc import Sequence

from editors.data import DataSet, Example

COUNTRIES = ("France", "England", "Italy", "Germany", "Spain", "Norway", "Austria")
CITIES = ("Rome", "Oslo", "Paris", "Madrid", "Vienna", "Berlin", "London")


def capitals(paraphrases: int = 1) -> list[Example]:
    """Of one relation. The first paraphrase names the subject."""
    phrasings = ("In {} the capital is", "{}: city?", "Who is born in the capital of {}")[:paraphrases]
    return [
        Example(
            prompt=f"The capital of {country} is",
            correction=city,
            subject=country,
            paraphrases=tuple(phrasing.format(country) for phrasing in phrasings),
            neighbours=(f"The language of {country} is",),
        )
        for country, city in zip(COUNTRIES, CITIES, strict=True)
    ]


def languages() -> list[Example]:
    """Of another relation, with unrelated prompts of their own and corrections of several tokens."""
    return [
        Example(
            prompt=f"Born in {city}, he speaks",
            correction=f"{language} only",
            subject=city,
            paraphrases=(f"{city} speaks the language", f"A city in {city}"),
            unrelated=("2 + 2 =",),
        )
        for city, language in zip(CITIES, ("English", "French", "Italian", "German") * 2, strict=False)
    ]


def data_set(examples: Sequence[Example], name: str = "small.json") -> DataSet:
    return DataSet(name, "mend", "0" * 64, tuple(examples), 0)
