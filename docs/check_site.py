"""Checks the built site: links and files, then each page in Chromium."""

import argparse
import functools
import html.parser
import http.server
import pathlib
import shutil
import sys
import tempfile
import threading
import urllib.parse

from selenium import webdriver

FLAGS = (
    "--headless",
    "--no-sandbox",
    "--disable-gpu",
    "--disable-quic",
    "--no-first-run",
    "--disable-background-networking",
    "--disable-component-update",
    "--disable-sync",
    # Only this host can be reached: requests to others are errors.
    "--host-resolver-rules=MAP * ~NOTFOUND, EXCLUDE localhost",
)
WIDTHS = (1280, 390)
# Finds faults that a reader would see: missing pictures, and pages that are
# wider than the window. Also finds files that are loaded from other hosts.
LOOK = """
return {
  missing: [...document.images].filter(i => i.complete && !i.naturalWidth)
    .map(i => i.src),
  overflow: document.documentElement.scrollWidth
    - document.documentElement.clientWidth,
  elsewhere: performance.getEntriesByType("resource").map(e => e.name)
    .filter(name => new URL(name).host != location.host),
}
"""


class Page(html.parser.HTMLParser):
    """The anchors of a page, and all that it links to or loads."""

    def __init__(self, text):
        super().__init__()
        self.anchors, self.links, self.loaded = {""}, [], []
        self.feed(text)

    def handle_starttag(self, tag, attributes):
        attributes = dict(attributes)
        self.anchors.update(
            attributes[key] for key in ("id", "name") if attributes.get(key)
        )
        if tag == "a" and "href" in attributes:
            self.links.append(attributes["href"])
        if tag == "link" and attributes.get("rel") in ("stylesheet", "icon"):
            self.loaded.append(attributes["href"])
        if attributes.get("src"):
            self.loaded.append(attributes["src"])


def check_links(site):
    """Findings about links, internal anchors and files that pages load."""
    pages = {
        path: Page(path.read_text(encoding="utf-8"))
        for path in sorted(site.rglob("*.html"))
    }
    findings = []
    for path, page in pages.items():
        base = f"http://localhost/{path.relative_to(site).as_posix()}"
        for link in page.loaded + page.links:
            url = urllib.parse.urlsplit(urllib.parse.urljoin(base, link))
            where = f"{path.relative_to(site)}: {link}"
            if url.hostname != "localhost":
                if link in page.loaded:
                    findings.append(f"{where} is loaded from another host")
                continue
            target = site / urllib.parse.unquote(url.path).lstrip("/")
            if url.path.endswith("/"):
                target = target / "index.html"
            if not target.is_file():
                findings.append(f"{where} leads nowhere")
            elif target in pages:
                anchor = urllib.parse.unquote(url.fragment)
                if anchor not in pages[target].anchors:
                    findings.append(f"{where} has no such anchor")
    return list(pages), findings


class QuietHandler(http.server.SimpleHTTPRequestHandler):
    def log_message(self, *args):
        pass


def open_chromium(profile):
    options = webdriver.ChromeOptions()
    options.binary_location = shutil.which("chromium")
    for flag in (*FLAGS, f"--user-data-dir={profile}"):
        options.add_argument(flag)
    options.set_capability("goog:loggingPrefs", {"browser": "ALL"})
    service = webdriver.ChromeService(shutil.which("chromedriver"))
    return webdriver.Chrome(options, service)


def look(browser, address, width):
    """Findings about one page at one width."""
    browser.execute_cdp_cmd(
        "Emulation.setDeviceMetricsOverride",
        dict(width=width, height=900, deviceScaleFactor=1, mobile=False),
    )
    browser.get(address)
    seen = browser.execute_script(LOOK)
    findings = [f"picture {source} is missing" for source in seen["missing"]]
    findings += [f"{name} is of another host" for name in seen["elsewhere"]]
    if seen["overflow"] > 0:
        findings.append(f"{seen['overflow']} pixels wider than the window")
    return findings + [
        f"console: {entry['message']}"
        for entry in browser.get_log("browser")
        if entry["level"] in ("SEVERE", "WARNING")
    ]


def check_pages(site, pages, screenshots):
    """Findings about all pages, as Chromium shows them."""
    handler = functools.partial(QuietHandler, directory=site)
    server = http.server.ThreadingHTTPServer(("localhost", 0), handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    root = f"http://localhost:{server.server_port}/"
    findings = []
    with tempfile.TemporaryDirectory() as profile:
        with open_chromium(profile) as browser:
            for path in pages:
                name = path.relative_to(site).as_posix()
                name = name.removesuffix("index.html")
                for width in WIDTHS:
                    for finding in look(browser, root + name, width):
                        findings.append(f"/{name} at {width}: {finding}")
                    if screenshots:
                        file = f"{name.replace('/', '_')}{width}.png"
                        browser.save_screenshot(str(screenshots / file))
    server.shutdown()
    return findings


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("site", type=pathlib.Path, nargs="?", default="site")
    parser.add_argument("--screenshots", type=pathlib.Path, help="a folder")
    arguments = parser.parse_args()
    if not (arguments.site / "index.html").is_file():
        sys.exit(f"{arguments.site} has no index.html. Build the site first.")
    if not (shutil.which("chromium") and shutil.which("chromedriver")):
        sys.exit(
            "Chromium is missing: the pages were not looked at. On Debian, "
            "install `chromium` and `chromium-driver`."
        )
    if arguments.screenshots:
        arguments.screenshots.mkdir(parents=True, exist_ok=True)
    pages, findings = check_links(arguments.site)
    findings += check_pages(arguments.site, pages, arguments.screenshots)
    for finding in findings:
        print(finding)
    print(f"{len(pages)} pages, {len(findings)} findings")
    sys.exit(bool(findings))


if __name__ == "__main__":
    main()
