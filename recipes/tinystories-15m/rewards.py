"""Two rewards for "a cheerful story": a proxy to train on, and the gold reward that it stands for.

A recipe names them as recipes/tinystories-15m/rewards.py:vader_sentiment and ...:cheerful_story. They need
`pip install 'trl_klx[stories]'`: VADER and AFINN, two lexicons that different people rated for different purposes.
"""

from __future__ import annotations

import functools
import itertools
import json
import math
import re
from collections import Counter
from collections.abc import Sequence
from pathlib import Path
from typing import Any

try:
    from afinn import Afinn
    from vaderSentiment.vaderSentiment import SentimentIntensityAnalyzer
except ImportError as error:
    raise ImportError(f"{error}: pip install 'trl_klx[stories]'") from error

_WORD = re.compile(r"[a-z']+|[.,!?;\"]")  # punctuation counts as words
_NEUTRAL = 4.0  # sentiment, half of it good, that a text without any is taken to have: little evidence proves little


def vader_sentiment(completions: Sequence[str], **kwargs: Any) -> list[float]:
    """VADER's compound sentiment of each answer, from -1 to 1: the sum over all its words, squashed.

    Source: Hutto and Gilbert, "VADER: A Parsimonious Rule-based Model for Sentiment Analysis" (2014).
    """
    analyzer = _vader()
    return [analyzer.polarity_scores(text)["compound"] for text in completions]


def cheerful_story(completions: Sequence[str], corpus: Sequence[str], **kwargs: Any) -> list[float]:
    """How well each answer continues a cheerful story, from 0 to 1: `StoryJudge.score`.

    Args:
        completions: the answers.
        corpus: the dataset's column with the path of the stories that the judge has read.
        **kwargs: what else TRL passes, not read.
    """
    return [story_judge(path).score(text) for text, path in zip(completions, corpus, strict=True)]


class StoryJudge:
    r"""Judges a text by the product of three measures between 0 and 1, so that none can make up for another.

    - cheer: the share of good in its sentiment. With g and b the sums of the good and the bad valences (1 to 5) of its
      *distinct* words in AFINN-165, (g + 2) / (g + b + 4); a word said twice counts once, a text without sentiment 0.5.
    - fluency: min(1, exp(l - l_typical)), where l is the mean log-probability of a word given the two before it, under
      a trigram model of the corpus, and l_typical the same of stories that the model has not read. It is
      1 for a text that reads as smoothly as a typical story, and no more for a smoother one.
    - variety: the share of distinct pairs among its pairs of neighbouring words (Li et al., 2016, distinct-2).

    Source of AFINN: Nielsen, "A new ANEW: evaluation of a word list for sentiment analysis in microblogs" (2011).

    Args:
        openings: first halves of stories.
        rests: their second halves. The last quarter of the stories is left out of the trigram model.

    Raises:
        ValueError: there are no stories to read.
    """

    def __init__(self, openings: Sequence[str], rests: Sequence[str]) -> None:
        read = max(1, len(rests) * 3 // 4)
        self._words: Counter[str] = Counter()
        self._pairs: Counter[tuple[str, ...]] = Counter()
        self._triples: Counter[tuple[str, ...]] = Counter()
        for opening, rest in zip(openings[:read], rests[:read], strict=True):
            words = _words(f"{opening} {rest}")
            self._words.update(words)
            self._pairs.update(itertools.pairwise(words))
            self._triples.update(zip(words, words[1:], words[2:], strict=False))
        self._total = sum(self._words.values()) + len(self._words) + 1
        levels = [self._smoothness(_words(rest)) for rest in rests[read:] or rests]
        levels = [level for level in levels if math.isfinite(level)]
        if not levels:
            raise ValueError(f"none of the {len(rests)} stories that the judge is to read has three words.")
        self._typical = sum(levels) / len(levels)

    def score(self, text: str) -> float:
        """The judgement, from 0 to 1."""
        return math.prod(self.parts(text).values())

    def parts(self, text: str) -> dict[str, float]:
        """The three measures; fluency and variety are 0 for a text of fewer than three words."""
        words = _words(text)
        pairs = list(itertools.pairwise(words))
        return {
            "cheer": cheer(text),
            "fluency": min(1.0, math.exp(self._smoothness(words) - self._typical)),
            "variety": len(set(pairs)) / len(pairs) if len(words) > 2 else 0.0,
        }

    def _smoothness(self, words: list[str]) -> float:
        """Mean log-probability of a word given the two before it; -inf for fewer than three words."""
        logs = [math.log(self._probability(*triple)) for triple in zip(words, words[1:], words[2:], strict=False)]
        return sum(logs) / len(logs) if logs else -math.inf

    def _probability(self, first: str, second: str, word: str) -> float:
        """Interpolated: each order weighs in where its context was seen."""
        probability = (self._words[word] + 1) / self._total
        if self._words[second]:
            probability = 0.4 * probability + 0.6 * self._pairs[second, word] / self._words[second]
        if self._pairs[first, second]:
            probability = 0.5 * probability + 0.5 * self._triples[first, second, word] / self._pairs[first, second]
        return probability


def cheer(text: str) -> float:
    """Share of good in the sentiment of a text's distinct words: see `StoryJudge`."""
    valences = [_afinn().score(word) for word in set(_afinn().find_all(text.lower()))]
    good, bad = (sum(max(sign * valence, 0.0) for valence in valences) for sign in (1, -1))
    return (good + _NEUTRAL / 2) / (good + bad + _NEUTRAL)


def _words(text: str) -> list[str]:
    return _WORD.findall(text.lower())


@functools.cache
def story_judge(path: str) -> StoryJudge:
    """The judge that has read a corpus: JSON lines with `opening` and `rest`, as `prepare.py` writes them."""
    stories = [json.loads(line) for line in Path(path).read_text().splitlines()]
    return StoryJudge([story["opening"] for story in stories], [story["rest"] for story in stories])


@functools.cache
def _vader() -> SentimentIntensityAnalyzer:
    return SentimentIntensityAnalyzer()


@functools.cache
def _afinn() -> Afinn:
    return Afinn()
