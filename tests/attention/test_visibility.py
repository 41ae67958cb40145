"""The visibility rule against its drawing, and against a slow reading of its sentence."""

import re
from itertools import accumulate

import numpy as np
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from unimodal.attention import SegmentTable, TokenTable, dense_mask, visibility, visible

Spans = list[list[tuple[int, bool, bool]]]  # documents of (length, bidirectional, private)

SPAN = st.tuples(st.integers(1, 4), st.booleans(), st.booleans())
LAYOUTS = st.lists(st.lists(SPAN, min_size=1, max_size=5), min_size=1, max_size=3)


def segments(documents: Spans) -> SegmentTable:
    spans = [(d, *span) for d, document in enumerate(documents) for span in document]
    return SegmentTable(*(np.array(column) for column in zip(*spans, strict=True)))


def table(documents: Spans) -> TokenTable:
    return segments(documents).tokens(torch.device("cpu"))


def slow(documents: Spans) -> list[list[bool]]:
    """A set of visible keys a token, grown by walking through each document; shares no line with the rule."""
    rows, start = [], 0
    total = sum(n for document in documents for n, _, _ in document)
    for document in documents:
        public: list[int] = []  # what later blocks of this document may see
        for length, bidirectional, private in document:
            mine = list(range(start, start + length))
            for seen in [mine] * length if bidirectional else list(accumulate([m] for m in mine)):
                rows.append([k in {*public, *seen} for k in range(total)])
            public += [] if private else mine
            start += length
    return rows


def test_the_drawn_matrix() -> None:
    drawing = re.findall(r"^    (\S+)  +(s.*?)\n", visibility.__doc__ or "", flags=re.M)
    assert [name for name, _ in drawing] == ["a", "boi", "N", "N", "C", "C", "eoi", "word"]
    (header,) = re.findall(r"^ +(a  boi  N  N  C  C  eoi  word)$", visibility.__doc__ or "", flags=re.M)
    columns = [m.start() for m in re.finditer(r"\S+", header)]
    assert len(columns) == 8
    drawn = torch.zeros(8, 8, dtype=torch.bool)
    for row, (_, marks) in enumerate(drawing):
        for mark in re.finditer("s", marks):
            drawn[row, min(range(8), key=lambda c: abs(columns[c] - mark.start()))] = True
    one = table([[(2, False, False), (2, True, True), (2, True, False), (2, False, False)]])
    assert torch.equal(dense_mask(one), drawn)
    written = [  # the same, should the drawing be lost
        "s.......", "ss......", "ssss....", "ssss....", "ss..ss..", "ss..ss..", "ss..sss.", "ss..ssss",
    ]  # fmt: skip
    assert drawn.tolist() == [[c == "s" for c in line] for line in written]


@given(documents=LAYOUTS)
@settings(max_examples=60, deadline=None, derandomize=True)
def test_the_rule_equals_a_slow_walk(documents: Spans) -> None:
    assert dense_mask(table(documents)).tolist() == slow(documents)


@given(documents=LAYOUTS, seed=st.integers(0, 1000))
@settings(max_examples=20, deadline=None, derandomize=True)
def test_the_rule_broadcasts_over_any_shapes(documents: Spans, seed: int) -> None:
    one = table(documents)
    mask = dense_mask(one)
    rng = torch.Generator().manual_seed(seed)
    q = torch.randint(len(mask), (3, 4, 1), generator=rng)
    k = torch.randint(len(mask), (3, 1, 2), generator=rng)
    assert torch.equal(visible(one, q, k), mask[q.expand(3, 4, 2), k.expand(3, 4, 2)])


@pytest.mark.parametrize("flags", [(False, False), (True, False), (False, True), (True, True)])
def test_every_token_sees_itself_and_no_other_document(flags: tuple[bool, bool]) -> None:
    one = table([[(3, *flags), (2, *flags)], [(2, *flags)]])
    mask = dense_mask(one)
    assert mask.diagonal().all()
    assert not mask[:5, 5:].any()
    assert not mask[5:, :5].any()


@given(documents=LAYOUTS)
@settings(max_examples=20, deadline=None, derandomize=True)
def test_a_table_counts_its_tokens(documents: Spans) -> None:
    one = segments(documents)
    assert len(one) == len(one.tokens(torch.device("cpu")).document) == sum(n for d in documents for n, _, _ in d)
    assert one.document_lengths.tolist() == [sum(n for n, _, _ in document) for document in documents]
    assert one.start.tolist() == [0, *accumulate(n for d in documents for n, _, _ in d)][:-1]


def test_tokens_are_made_where_they_are_wanted() -> None:
    made = segments([[(3, True, False)], [(2, False, True)]]).tokens(torch.device("meta"))
    assert all(column.device.type == "meta" for column in made)
    assert [column.dtype for column in made] == [torch.long, torch.long, torch.bool, torch.bool]
    here = table([[(3, True, False)], [(2, False, True)]])
    assert [column.tolist() for column in here] == [
        [0, 0, 0, 1, 1], [0, 0, 0, 1, 1], [True, True, True, False, False], [False, False, False, True, True],
    ]  # fmt: skip
