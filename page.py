"""A trace of an update (explain.py) as one page for a browser: the text, and every equation with its numbers put in.

The page is page.html with the trace in it as JSON. It loads nothing from anywhere, and its own policy has the browser
refuse to. Whatever a prompt or a response says stays text: JSON is written without the one character that could end the
element that holds it, and the page's script never reads it as anything but text.
"""

import json
from pathlib import Path

from files import is_no_number, write_whole

TEMPLATE = Path(__file__).with_name("page.html")
MARK = "TRACE_AS_JSON"  # where in the template


def page(trace: dict) -> str:
    """The page of a trace, as HTML."""
    before, after = TEMPLATE.read_text(encoding="utf-8").split(MARK)
    return before + embedded(trace) + after


def write_page(trace: dict, path: Path) -> None:
    """Write the page of a trace, whole. Raises RunError if it cannot be written."""
    write_whole(path, page(trace))


def embedded(trace: dict) -> str:
    """JSON for an HTML element of data: without `<`, no text in it can end the element or begin a comment."""
    return json.dumps(known_to_json(trace), allow_nan=False).replace("<", "\\u003c")


def known_to_json(value):
    """The same, with null for numbers that are none, which JSON does not know."""
    if isinstance(value, dict):
        return {name: known_to_json(each) for name, each in value.items()}
    if isinstance(value, list | tuple):
        return [known_to_json(each) for each in value]
    return None if is_no_number(value) else value
