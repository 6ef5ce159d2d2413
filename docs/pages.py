"""Makes the site's pages from the project's files, each at its own path.

Markdown is taken as it is. A guide becomes alternating text and code. Any other
file that a page links to is shown in full, or as a table. The pages of the API
follow the table of parts in `keras_laid/README.md`.
"""

import ast
import csv
import functools
import html
import pathlib
import posixpath
import re

from mkdocs.exceptions import PluginError
from mkdocs.structure.files import File
from mkdocs.utils import get_relative_url

ROOT = pathlib.Path(__file__).parent.parent
PAGES = (
    "*.md",
    "benchmarks/*.md",
    "guides/*.py",
    "keras_laid/**/README.md",
)
LINK = re.compile(r"\]\((?!\w+:|#)([^)#\s]+)")
# Where the pictures are that a run of a guide drew.
PICTURES = {
    "guides/distill_paligemma.py": "benchmarks/results",
    "guides/gain_modulation_in_your_model.py": (
        "guides/pictures/gain_modulation_in_your_model"
    ),
}


def on_config(config):
    """Puts the pages of the API into the navigation."""
    api = next(entry for entry in config.nav if "API" in entry)
    api["API"] = [f"{page}.md" for page in api_pages()]
    return config


def on_files(files, config):
    """Adds all pages, and all files that they link to."""
    waiting = [
        path.relative_to(ROOT).as_posix()
        for pattern in PAGES
        for path in ROOT.glob(pattern)
    ]
    seen = set()
    while waiting:
        path = waiting.pop()
        if path in seen:
            continue
        seen.add(path)
        if not (ROOT / path).is_file():
            raise PluginError(f"A page links to {path}, which is not a file.")
        if path.endswith(".png"):
            source = str(ROOT / path)
            files.append(File.generated(config, path, abs_src_path=source))
            continue
        text = page_of(path)
        files.append(File.generated(config, page_path(path), content=text))
        waiting += [resolve(path, link) for link in LINK.findall(text)]
    for page, (title, names) in api_pages().items():
        text = "\n\n".join([f"# {title}", *map(section, names)])
        files.append(File.generated(config, f"{page}.md", content=text))
    return files


def on_page_markdown(markdown, page, **kwargs):
    """Makes links to files lead to the pages that show these files."""
    folder = posixpath.dirname(page.file.src_uri)
    path = page.file.src_uri.removesuffix(".md")
    path = path if (ROOT / path).is_file() else page.file.src_uri

    def to_page(link):
        target = page_path(resolve(path, link[1]))
        return "](" + posixpath.relpath(target, folder or ".")

    return LINK.sub(to_page, markdown)


def on_page_content(content, page, **kwargs):
    """Links the public names in a text to their place in the API."""

    def to_link(code):
        name = code[1]
        if name and name not in places() and name.startswith("keras_laid."):
            name = name.rpartition(".")[2]
        if name not in places():
            return code[0]
        url = get_relative_url(places()[name], page.url)
        return f'<a href="{url}">{code[0]}</a>'

    # Descriptions without a name and a type would start with a dash.
    content = re.sub(r'(<li class="doc-section-item[^>]*>)\s*–', r"\1", content)
    # Not within links, headings and blocks of code.
    return re.sub(
        r"<(?:a|h\d|pre)\b.*?</(?:a|h\d|pre)>|<code>([\w.]+)</code>",
        to_link,
        content,
        flags=re.DOTALL,
    )


def resolve(path, link):
    """The path of the file that the file at `path` links to."""
    target = posixpath.normpath(posixpath.join(posixpath.dirname(path), link))
    return f"{target}/README.md" if (ROOT / target).is_dir() else target


def page_path(path):
    return path if path.endswith((".md", ".png")) else f"{path}.md"


def page_of(path):
    """The file at `path` as Markdown."""
    if path.endswith(".md"):
        return (ROOT / path).read_text()
    if path.startswith("guides/"):
        return guide(path)
    if path.endswith(".csv"):
        return table(path)
    language = "python" if path.endswith(".py") else "text"
    return f"# {path}\n\n```{language}\n{(ROOT / path).read_text()}\n```\n"


def table(path):
    with open(ROOT / path, newline="") as file:
        head, *rows = (
            [html.escape(cell) for cell in row] for row in csv.reader(file)
        )
    lines = [f"# {path}\n", "<table data-rows>", "<tr><th>" + "<th>".join(head)]
    lines += ["<tr><td>" + "<td>".join(row) for row in rows]
    return "\n".join([*lines, "</table>\n"])


def guide(path):
    """Texts and code in turn; after code, the pictures that it draws."""
    source = (ROOT / path).read_text()
    lines = source.splitlines()
    texts = [
        node
        for node in ast.parse(source).body
        if isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant)
    ]
    header = dict(
        line.split(": ", 1) for line in texts[0].value.value.split("\n") if line
    )
    parts = [f"# {header['Title']}\n\n{header['Description']}"]
    ends = [node.lineno - 1 for node in texts[2:]] + [len(lines)]
    for node, end in zip(texts[1:], ends, strict=True):
        code = "\n".join(lines[node.end_lineno : end]).strip()
        parts += [node.value.value.strip(), f"```python\n{code}\n```"]
        for name in re.findall(r'"(\w+)\.png"', code):
            picture = f"{PICTURES.get(path)}/{name}.png"
            if (ROOT / picture).is_file():
                to = posixpath.relpath(picture, posixpath.dirname(path))
                parts.append(f"![{name.replace('_', ' ')}]({to})")
    return "\n\n".join(parts) + "\n"


def section(name):
    """The text from which mkdocstrings documents a public name."""
    # The constants of such a package are shown without docstrings.
    is_package = (ROOT / name.replace(".", "/") / "__init__.py").is_file()
    constants = is_package and identifier(name) == name
    return (
        f"::: {identifier(name)}\n"
        "    options:\n"
        f"      heading: {name}\n"
        f"      show_if_no_docstring: {str(constants).lower()}"
    )


@functools.cache
def api_pages():
    """A page for each row of the table of parts, and one for all other names.

    Returns:
        A dictionary from the path of a page, without suffix, to a pair of its
        title and the full names that it documents.
    """
    readme = (ROOT / "keras_laid/README.md").read_text()
    table = re.search(r"\| part \|.*?\n(?=\n|$)", readme, re.DOTALL)[0]
    rows = table.split("\n")[2:]
    pages, documented = {}, set()

    def add(title, names):
        names = [n for n in names if n.rpartition(".")[2] not in documented]
        documented.update(name.rpartition(".")[2] for name in names)
        page = title.split(", ")[0].rpartition(".")[2]
        pages[f"api/{page}"] = title, names

    for row in filter(None, rows):
        parts = re.findall(r"`([\w.]+)`", row.split("|")[1])
        module = parts[0].removesuffix(".attention_layers")
        if module.startswith("keras_laid."):
            add(module, public_names(module))
            continue
        mentioned = re.findall(r"`([\w.]+)`", row)
        names = [f"keras_laid.{name}" for name in mentioned]
        add(", ".join(parts), [n for n in names if n in public_names()])
    add("Others", public_names())
    return pages


@functools.cache
def places():
    """The address in the API of each public name and each module."""
    found = {}
    for path, (title, names) in api_pages().items():
        if title.startswith("keras_laid."):
            found[title] = f"{path}/"
        for name in names:
            found[name.rpartition(".")[2]] = f"{path}/#{identifier(name)}"
    return found


def public_names(module="keras_laid"):
    """The full names in `__all__` of a module of the package."""
    for node in syntax_of(module).body:
        if isinstance(node, ast.Assign) and node.targets[0].id == "__all__":
            return [f"{module}.{name}" for name in ast.literal_eval(node.value)]
    raise PluginError(f"{module} has no `__all__`.")


@functools.cache
def identifier(name):
    """The name by which mkdocstrings finds a public name in the source.

    It differs from the public name in two cases. Where a function has the name
    of its module, the public name would stand for the module. Names in `LATER`
    are only imported on first use, so their module must be named.
    """
    module, _, last = name.rpartition(".")
    later = {}
    for node in syntax_of(module).body:
        if isinstance(node, ast.ImportFrom):
            if last in [alias.name for alias in node.names]:
                return f"{name}.{last}" if node.module == name else name
        elif isinstance(node, ast.Assign) and node.targets[0].id == "LATER":
            later = ast.literal_eval(node.value)
    return f"{module}.{later[last]}.{last}"


def syntax_of(module):
    path = ROOT / module.replace(".", "/") / "__init__.py"
    return ast.parse(path.read_text())
