"""Pages: text is escaped, nothing is fetched, nothing is forgotten silently."""

from __future__ import annotations

import base64
from html.parser import HTMLParser

import pytest
from jinja2 import UndefinedError

from ich_prep.html import BLUE, NOTICE, Cell, Row, Tile, png_uri, render

HEAD = "{% extends 'page.html' %}{% import 'kit.html' as kit %}{% block title %}{{ title }}{% endblock %}"


class Page(HTMLParser):
    """Collects text and attributes, and fails on tags that do not nest."""

    def __init__(self) -> None:
        super().__init__()
        self.open: list[str] = []
        self.text: list[str] = []
        self.attributes: list[tuple[str, str | None]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        if tag not in ("meta", "img"):
            self.open.append(tag)
        self.attributes += attrs

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_data(self, data: str) -> None:
        self.text.append(data)


def page_of(body: str, **values: object) -> tuple[Page, str]:
    html = render(f"{HEAD}{{% block body %}}{body}{{% endblock %}}", title="<a> & b", **values)
    page = Page()
    page.feed(html)
    page.close()
    assert not page.open
    return page, html


def test_a_page_has_a_title_the_notice_twice_and_both_colour_schemes() -> None:
    page, html = page_of("")
    text = "".join(page.text)
    assert html.startswith("<!doctype html>\n")
    assert text.count("<a> & b") == 2
    assert "<a>" not in html
    assert text.count(NOTICE) == 2
    assert BLUE in html
    assert "prefers-color-scheme: dark" in html
    assert "://" not in html
    assert "<script" not in html


def test_every_part_of_the_kit_escapes_what_it_is_given() -> None:
    evil = "<script>x</script>"
    rows = [Row([Cell(evil, (evil,)), evil, Cell(evil, undefined=True)]), Row([evil], mean=True)]
    page, html = page_of(
        "{{ kit.navigation(['run']) }}{{ kit.tiles(tiles) }}{{ kit.table([evil], rows, kind='facts') }}"
        "{% call kit.section('run', evil) %}{% call kit.fold(evil, open=True) %}{{ evil }}{% endcall %}{% endcall %}"
        "{{ kit.figure(evil, evil, evil, png) }}",
        tiles=[Tile(Cell(evil), evil, evil)],
        rows=rows,
        evil=evil,
        png=b"\x89PNG",
    )
    assert "<script" not in html
    assert "".join(page.text).count(evil) == 3 + 1 + 5 + 3 + 2
    assert ("class", "undefined") in page.attributes
    assert ("class", "mean") in page.attributes
    assert ("open", None) in page.attributes
    assert ("alt", evil) in page.attributes
    assert ("src", png_uri(b"\x89PNG")) in page.attributes


def test_the_links_of_a_narrow_page_wrap() -> None:
    _, html = page_of("{{ kit.navigation(places) }}", places=["run", "results"])
    assert "nav { display: flex; flex-wrap: wrap;" in html
    assert ".pair { display: grid; grid-template-columns: repeat(auto-fit, minmax(min(20rem, 100%), 1fr));" in html


def test_a_value_that_is_missing_is_an_error_and_no_hole() -> None:
    with pytest.raises(UndefinedError):
        page_of("{{ nothing }}")


def test_pictures_are_embedded_in_the_page() -> None:
    assert base64.b64decode(png_uri(b"\x00\xff").removeprefix("data:image/png;base64,")) == b"\x00\xff"
