"""Stop strings: whatever the cut into pieces, the text shown is the same."""

from __future__ import annotations

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from flashllm.engine.stopping import StopStrings


def shown(pieces, stops, **kwargs):
    matcher, out = StopStrings(tuple(stops), **kwargs), []
    for piece in pieces:
        out.append(matcher.push(piece))
        if matcher.stopped:
            break
    else:
        out.append(matcher.flush())
    return "".join(out), matcher.stopped


def expected(text, stops, include=False):
    hits = [(text.find(s), -len(s), s) for s in stops if s in text]
    if not hits:
        return text, False
    at, _, stop = min(hits)
    return text[: at + len(stop)] if include else text[:at], True


@pytest.mark.parametrize("include", [False, True])
def test_a_stop_over_three_pieces(include):
    text, stopped = shown(["ab", "c", "de"], ["bcd"], include_stop=include)
    assert stopped and text == ("abcd" if include else "a")


def test_held_text_comes_out_at_the_end():
    assert shown(["abc"], ["cd"]) == ("abc", False)


@settings(max_examples=200, deadline=None)
@given(
    st.lists(st.text("abc", max_size=4), max_size=8),
    st.lists(st.text("abc", min_size=1, max_size=3), max_size=3),
)
def test_any_cut_shows_a_prefix_that_is_never_taken_back(pieces, stops):
    text, stopped = shown(pieces, stops)
    want, want_stopped = expected("".join(pieces), stops)
    # With several stops the first one completed wins; it can only be at or before the end.
    assert stopped == want_stopped
    if len(stops) == 1 or not stopped:
        assert text == want
    assert "".join(pieces).startswith(text)
