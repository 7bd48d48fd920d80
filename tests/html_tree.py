"""HTML as a tree of `[tag, attributes, children]`, for tests of pages."""

from __future__ import annotations

from html.parser import HTMLParser

VOID = {"meta", "link", "br", "hr", "img", "input", "wbr"}


class Page(HTMLParser):
    """The elements of a page in `root`; fails where tags do not match."""

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
    """It and all within it."""
    if isinstance(root, list):
        yield root
        for child in root[2]:
            yield from elements(child)


def find(root, tag, **attributes):
    """Elements of a tag that have these attributes, `_` for `-`."""
    wanted = {name.replace("_", "-"): value for name, value in attributes.items()}
    return [e for e in elements(root) if e[0] == tag and wanted.items() <= e[1].items()]


def text(element):
    """All text within an element."""
    return "".join(c if isinstance(c, str) else text(c) for c in element[2])
