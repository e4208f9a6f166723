# SPDX-License-Identifier: Apache-2.0
"""MovieLens-100K (Harper & Konstan 2015): 943 users, 1,682 films, 100,000 ratings with times.

A behaviour is a rating, whatever its value: the film that a user turned to next. Ratings of one user that carry the
same second keep the order of the file, which is shuffled and so says nothing about which of them came first. The data
set also knows the users' age, gender and occupation; they raised the validation AUC of no model and are left out.
"""

from __future__ import annotations

import zipfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from examples.data.behaviours import BehaviourLog, RejectedLines
from examples.data.download import fetch_wheel

FOLDER = "recbole/dataset_example/ml-100k"


class DataError(ValueError):
    """The files are not the data set that was expected."""


def load_movielens(wheel: Path | None = None) -> BehaviourLog:
    """Reads MovieLens-100K from the cached wheel (fetched where needed)."""
    path = fetch_wheel() if wheel is None else wheel
    with zipfile.ZipFile(path) as archive:
        files = {kind: archive.read(f"{FOLDER}/ml-100k.{kind}") for kind in ("inter", "item")}
    return parse_movielens(files["inter"], files["item"])


def parse_movielens(inter: bytes, item: bytes) -> BehaviourLog:
    """Parses the two tab-separated files (first line: the field names).

    Lines that cannot be used are counted in `rejected`; a file without one good line raises :class:`DataError`.
    """
    rejected = RejectedLines()
    item_index, names, category, genres = _parse_items(item, rejected)
    events: dict[str, list[tuple[int, int]]] = {}
    for where, (user_id, item_id, _, time) in _rows("ml-100k.inter", inter, 4, rejected):
        if item_id not in item_index:
            rejected.add(where, f"item {item_id!r} is not in ml-100k.item")
        elif not time.isascii() or not time.isdigit():
            rejected.add(where, f"time {time!r} is not a whole number of seconds")
        else:
            events.setdefault(user_id, []).append((int(time), item_index[item_id]))
    if not events:
        raise DataError("ml-100k.inter holds no usable line")
    sequences = [
        np.array([item for _, item in sorted(of_user, key=lambda event: event[0])], dtype=np.int64)
        for of_user in events.values()
    ]
    return BehaviourLog("ml-100k", sequences, np.array(category), names, genres, rejected)


def _parse_items(item: bytes, rejected: RejectedLines) -> tuple[dict[str, int], list[str], list[int], list[str]]:
    index: dict[str, int] = {}
    names, category, genre_index = ["(padding)"], [0], {"(padding)": 0}
    for where, (item_id, title, year, classes) in _rows("ml-100k.item", item, 4, rejected):
        if item_id in index:
            rejected.add(where, f"item {item_id!r} stands here a second time")
            continue
        genre = classes.split(" ")[0] or "unknown"
        index[item_id] = len(names)
        names.append(f"{title} ({year})" if year else title)
        category.append(genre_index.setdefault(genre, len(genre_index)))
    if not index:
        raise DataError("ml-100k.item holds no usable line")
    return index, names, category, list(genre_index)


def _rows(file: str, content: bytes, fields: int, rejected: RejectedLines) -> Iterator[tuple[str, list[str]]]:
    """Yields (where, fields) of every line after the header that has as many fields as it should."""
    for number, raw in enumerate(content.splitlines()[1:], start=2):
        where = f"{file} line {number}"
        try:
            parts = raw.decode("utf-8").split("\t")
        except UnicodeDecodeError as error:
            rejected.add(where, f"not UTF-8 ({error.reason})")
            continue
        if len(parts) != fields:
            rejected.add(where, f"{len(parts)} fields, expected {fields}")
        else:
            yield where, parts
