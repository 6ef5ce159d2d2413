"""Tables in Markdown, and the places in a text that they fill."""

import re


def markdown_table(header, lines):
    """A table from the cells of its header and of its lines."""
    rows = [header, ["---"] * len(header), *lines]
    return "\n".join(
        "| " + " | ".join(map(str, cells)) + " |" for cells in rows
    )


def marks(text):
    """Names of the places in a text: `<!-- name -->...<!-- /name -->`."""
    return re.findall(r"<!-- /(\w+) -->", text)


def fill(text, name, table):
    """Replaces the text between the marks of a table."""
    begin, end = f"<!-- {name} -->", f"<!-- /{name} -->"
    before, found_begin, rest = text.partition(begin)
    _, found_end, after = rest.partition(end)
    if not (found_begin and found_end):
        raise ValueError(
            f"The text must have the marks {begin} and {end}. "
            "Add them where the table belongs."
        )
    return f"{before}{begin}\n{table}\n{end}{after}"
