"""page.py without a browser: what is in the file. test_page_in_browser.py opens it."""

import html.parser
import json
import math
import re

import pytest
from toy_trace import HOSTILE, toy_trace

from config import RunError
from page import TEMPLATE, page, write_page


class Elements(html.parser.HTMLParser):
    """Every start tag with its attributes, and the text of each element of script or style."""

    def __init__(self, text: str):
        super().__init__(convert_charrefs=True)
        self.tags: list[tuple[str, dict]] = []
        self.raw: list[tuple[dict, str]] = []
        self.feed(text)

    def handle_starttag(self, tag, attrs):
        self.tags.append((tag, dict(attrs)))

    def handle_data(self, data):
        if self.tags and self.tags[-1][0] in ("script", "style") and data.strip():
            self.raw.append((self.tags[-1][1], data))


@pytest.fixture(scope="module")
def trace() -> dict:
    return toy_trace()


def trace_in(text: str) -> dict:
    (found,) = [data for attributes, data in Elements(text).raw if attributes.get("id") == "trace"]
    return json.loads(found)


def test_the_json_in_the_page_is_the_trace(trace):
    """To the last bit of every number; one that is no number, which JSON does not know, is null."""
    expected = json.loads(json.dumps(trace).replace(": NaN", ": null"))
    assert math.isnan(trace["updates"][0]["policy_loss"])
    assert trace_in(page(trace)) == expected
    trace = {**trace, "note": [float("inf"), -0.0, 1e-300, 0.1 + 0.2]}
    assert trace_in(page(trace))["note"] == [None, -0.0, 1e-300, 0.1 + 0.2]


@pytest.mark.parametrize("text", [HOSTILE, "</SCRIPT>", "<!--<script>", "]]>", "\ud800 half a pair", "TRACE_AS_JSON"])
def test_nothing_that_a_text_says_breaks_out(trace, text):
    """The elements are the template's whatever is said anywhere in the trace."""
    rows = [
        {**row, "prompt": text, "response": text, "tokens": [token | {"text": text} for token in row["tokens"]]}
        for row in trace["rows"]
    ]
    said = {**trace, "title": text, "model": text, "note": text, "rows": rows}
    written = page(said)
    assert [tag for tag, _ in Elements(written).tags] == [tag for tag, _ in Elements(page({})).tags]
    assert trace_in(written)["rows"][0]["tokens"][0]["text"] == text
    assert trace_in(written)["title"] == text
    before, after = TEMPLATE.read_text(encoding="utf-8").split("TRACE_AS_JSON")
    assert written.startswith(before) and written.endswith(after)
    assert "<" not in written[len(before) : -len(after)]


def test_nothing_is_loaded_from_anywhere(trace):
    """No element, style or script names a resource, and the page forbids the browser to fetch one."""
    elements = Elements(page(trace))
    for tag, attributes in elements.tags:
        assert not {"src", "srcset", "data", "action", "background", "poster"} & attributes.keys(), (tag, attributes)
        assert attributes.get("href", "#").startswith(("#", "data:,")), (tag, attributes)
    code = "\n".join(data for attributes, data in elements.raw if attributes.get("id") != "trace")
    assert not re.search(r"url\(|@import|@font-face|fetch\(|XMLHttpRequest|WebSocket|sendBeacon|import\(", code)
    assert set(re.findall(r"https?://[^\s\"'`]+", code)) == {  # names, which nobody visits
        "http://www.w3.org/1998/Math/MathML",
        "http://www.w3.org/2000/svg",
    }
    (policy,) = [a["content"] for _, a in elements.tags if a.get("http-equiv") == "Content-Security-Policy"]
    assert policy.split("; ") == [
        "default-src 'none'",
        "style-src 'unsafe-inline'",
        "script-src 'unsafe-inline'",
        "img-src data:",
    ]


def test_texts_are_never_read_as_html(trace):
    code = TEMPLATE.read_text(encoding="utf-8")
    assert not re.search(r"innerHTML|outerHTML|insertAdjacentHTML|document\.write|DOMParser|eval\(|new Function", code)


def test_the_page_is_written_whole(trace, tmp_path):
    write_page(trace, tmp_path / "page.html")
    assert (tmp_path / "page.html").read_text(encoding="utf-8") == page(trace)
    assert [path.name for path in tmp_path.iterdir()] == ["page.html"]
    with pytest.raises(RunError, match="cannot be written"):
        write_page(trace, tmp_path / "nowhere" / "page.html")
