"""Texts and token ids in: one reader for every way people hold their data, and one tokenizer call for all of it.

`read_documents` turns a list, a file, a DataFrame or a Hugging Face dataset into `Documents`; `tokenize` turns those
into `Tokens`, with BOS, chat template and over-long texts each handled explicitly and recorded. Label columns come
along, one value per sequence or one per token.
"""

from __future__ import annotations

from activations_cache._reading import Documents, read_documents
from activations_cache.columns import RESERVED, Column, Scalar, storable_columns, unstorable_columns
from activations_cache.token_columns import TokenColumn
from activations_cache.tokens import Overflow, Tokens, tokenize

__all__ = [
    "RESERVED",
    "Column",
    "Documents",
    "Overflow",
    "Scalar",
    "TokenColumn",
    "Tokens",
    "read_documents",
    "storable_columns",
    "tokenize",
    "unstorable_columns",
]
