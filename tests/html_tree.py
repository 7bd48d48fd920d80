"""HTML as a tree of `[tag, attributes, children]`, for tests of pages."""

from __future__ import annotations

import base64
import hashlib
from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """A parser that keeps a page's elements in `root`, and fails where tags do not match."""

    def __init__(self, html):
        super().__init__()
        self.root = ["root", {}, []]
        self.open = [self.root]
        self.feed(html)
        self.close()
        assert self.open == [self.root]

    def handle_starttag(self, tag, attrs):
        assert len({name for name, _ in attrs}) == len(attrs), attrs
        element = [tag, {name: value or "" for name, value in attrs}, []]
        self.open[-1][2].append(element)
        if tag not in VOID:
            self.open.append(element)

    def handle_endtag(self, tag):
        assert self.open.pop()[0] == tag

    def handle_data(self, data):
        self.open[-1][2].append(data)


def elements(root):
    """An element and all elements within it."""
    if isinstance(root, list):
        yield root
        for child in root[2]:
            yield from elements(child)


def find(root, tag, **attributes):
    """Elements of a tag that have these attributes, with `_` for `-`."""
    wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
    return [e for e in elements(root) if e[0] == tag and wanted.items() <= e[1].items()]


def text(element):
    """All text within an element."""
    return "".join(c if isinstance(c, str) else text(c) for c in element[2])


def assert_allows_no_request(root):
    """Check that the page's policy comes before all else in the page, and allows no request."""
    head = [e for e in find(root, "head")[0][2] if isinstance(e, list)]
    assert "charset" in head[0][1] and head[1][1]["http-equiv"] == "Content-Security-Policy"
    rules = dict(rule.split(" ", 1) for rule in head[1][1]["content"].split("; "))
    hashed = rules.pop("script-src").strip("'").removeprefix("sha256-")
    assert rules == {
        "default-src": "'none'",
        "style-src": "'unsafe-inline'",
        "img-src": "data:",
        "base-uri": "'none'",
        "form-action": "'none'",
    }
    for script in find(root, "script"):
        if script[1].get("type") != "application/json":
            digest = hashlib.sha256(text(script).encode()).digest()
            assert hashed == base64.b64encode(digest).decode()
