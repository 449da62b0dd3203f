"""Questions, patching pairs and labelled texts; splits in which no group is on two sides.

Each kind is a frozen sequence of rows with the same face: `len`, iteration, slicing, `.groups`, `.select`, `.to_df`,
`.save` and `.load` (jsonl). A group is what must not be on both sides of a split: a person, an entity, a template.
"""

from probe.data._rows import Labelled, LabelledText, Pair, Pairs, Question, Questions
from probe.data._splits import group_folds, split_groups
from probe.data._words import WordData, word_data

__all__ = [
    "Labelled",
    "LabelledText",
    "Pair",
    "Pairs",
    "Question",
    "Questions",
    "WordData",
    "group_folds",
    "split_groups",
    "word_data",
]
