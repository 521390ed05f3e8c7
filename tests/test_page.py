"""The page as text: whole, small, and nothing in it that a value could break out of."""
import base64
import hashlib
import html.parser
import re
import zlib

import pytest

import pomex

VOID = {"meta", "link", "input", "br", "hr", "img"}
STYLE, = re.findall(r"<style>(.*?)</style>", pomex.PAGE, re.DOTALL)
SCRIPT, = re.findall(r"<script>(.*?)</script>", pomex.PAGE, re.DOTALL)


class Tags(html.parser.HTMLParser):
    def __init__(self):
        super().__init__()
        self.open, self.seen = [], []

    def handle_starttag(self, tag, attributes):
        self.seen.append((tag, dict(attributes)))
        if tag not in VOID:
            self.open.append(tag)

    def handle_endtag(self, tag):
        assert self.open.pop() == tag


def test_the_page_is_balanced_and_under_82_kb_raw():
    tags = Tags()
    tags.feed(pomex.PAGE)
    assert tags.open == []
    assert len(pomex.PAGE.encode()) < 82_000 and pomex.PAGE.isprintable() is False


@pytest.mark.parametrize("word", ["innerHTML", "outerHTML", "insertAdjacentHTML", "document.write", "eval(", "new Function",
                                  "http://", "https://", "style=", "@import", "url(", "javascript:"])
def test_the_page_holds_no(word):
    assert word not in pomex.PAGE


def test_no_tag_loads_anything_or_holds_a_handler():
    tags = Tags()
    tags.feed(pomex.PAGE)
    for tag, attributes in tags.seen:
        assert not [name for name in attributes if name.startswith("on") or name in ("src", "style")], tag
        assert attributes.get("href", "#").startswith(("#", "data:"))


def test_the_policy_allows_this_script_and_this_style_by_what_they_are():
    headers, page = pomex.page_answer(False)
    zipped_headers, zipped = pomex.page_answer(True)
    policy = dict(headers)["content-security-policy"]
    for directive, text in (("script-src", SCRIPT), ("style-src", STYLE)):
        assert f"{directive} 'sha256-{base64.b64encode(hashlib.sha256(text.encode()).digest()).decode()}'" in policy
    assert "default-src 'none'" in policy and "unsafe" not in policy and "frame-ancestors 'none'" in policy
    assert zipped_headers == [*headers, ("content-encoding", "gzip")]
    assert zlib.decompress(zipped, 31) == page and len(zipped) < 27_900


def test_every_endpoint_that_the_page_asks_is_there():
    asked = set(re.findall(r'api\(["`]([a-z]+)', SCRIPT)) | set(re.findall(r'/admin/api/([a-z]+)[."]', SCRIPT))
    served = {path.split("/")[0].split(".")[0] for names in pomex.ADMIN_ROUTES.values() for _, path in map(str.split, names)}
    assert asked - served == set() and {"overview", "keys", "usage", "playground", "events"} <= asked


def test_the_script_is_written_to_be_read():
    assert max(map(len, pomex.PAGE.split("\n"))) <= 128
    bare = re.sub(r'(?m)\s//.*$|^//.*$|for \(.*?\) |`[^`]*`|"[^"\n]*"', "", SCRIPT)        # no comments, loops and strings
    assert re.findall(r".*;[ ]*[^\s].*", bare) == []                                     # one statement a line
    assert re.findall(r".* \? [^,;()\n]* \? .*", bare) == []                            # no nested conditions


def test_every_colour_of_text_has_its_contrast():
    def rgb(name, theme):
        light, dark = re.search(rf"--{name}:light-dark\(#([0-9a-f]+),#([0-9a-f]+)\)", STYLE).groups()
        text = light if theme == "light" else dark
        text = "".join(c * 2 for c in text) if len(text) == 3 else text
        parts = [int(text[i:i + 2], 16) / 255 for i in (0, 2, 4)]
        return sum(w * (c / 12.92 if c <= 0.04045 else ((c + 0.055) / 1.055) ** 2.4) for w, c in zip((0.2126, 0.7152, 0.0722), parts))
    for theme in ("light", "dark"):
        for ink, ground, least in [("ink", "surface", 4.5), ("ink2", "bg", 4.5), ("ink3", "sunken", 4.5), ("on-accent", "accent", 4.5),
                                   ("accent", "accent-soft", 4.5), ("warn", "warn-soft", 4.5), ("bad", "bad-soft", 4.5),
                                   ("line2", "surface", 3), *((f"s{n}", "surface", 3) for n in range(1, 6))]:
            one, other = sorted((rgb(ink, theme), rgb(ground, theme)))
            assert (other + 0.05) / (one + 0.05) >= least, (theme, ink, ground)
