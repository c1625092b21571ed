"""`make docs`: the site in Portuguese and English, which opens from the disk too; a broken link or anchor fails it.

    python docs/site/make_site.py [--output build/docs]

Each language is a site of its own: zensical builds it from the pages of that language, copied with their links
rewritten, and from pages that `generated.py` makes of the code. Pages in English alone are in both.
"""

from __future__ import annotations

import argparse
import fnmatch
import json
import os
import re
import shutil
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path
from urllib.parse import unquote, urlsplit

import yaml

from generated import GENERATED
from pages import LANGUAGES, LINK, ROOT, TEXTS, Page, pages

HERE = Path(__file__).parent
REPOSITORY = "https://github.com/OWNER/cartilha"
IN_ENGLISH = " (em inglês)"


def site_pages(language: str, all_pages: list[Page]) -> dict[str, Page]:
    """The pages of one site by the English path: the twin where there is one, the English page where there is none."""
    by_path = {page.path: page for page in all_pages}
    english = [page for page in all_pages if page.language == "en"]
    if language == "en":
        return {page.path: page for page in english}
    return {page.path: by_path.get(page.twin or "", page) for page in english}


def navigation(language: str, here: dict[str, Page]) -> list[dict[str, list[dict[str, str]]]]:
    """The sections with the pages that are there; what no section names comes last."""
    sections = yaml.safe_load((HERE / "navigation.yaml").read_text(encoding="utf-8"))
    made, left = [], dict(here)
    for section in sections:
        entries = []
        for pattern in section["pages"]:
            if pattern.startswith("+"):
                entries.append({GENERATED[pattern[1:]].titles[language]: f"{pattern[1:]}.md"})
            for path in sorted(fnmatch.filter(left, pattern)):
                entries.append(_entry(left.pop(path), language))
        if entries:
            made.append({section["title"][language]: entries})
    made[-1][next(iter(made[-1]))] += [_entry(page, language) for page in left.values()]
    return made


def _entry(page: Page, language: str) -> dict[str, str]:
    return {page.title.partition(": ")[0] + (IN_ENGLISH if page.language != language else ""): f"{page.slug}.md"}


def stage(language: str, here: dict[str, Page], into: Path) -> None:
    """Write the pages of one site, and the files that they show, into a folder."""
    for page in here.values():
        target = into / f"{page.slug}.md"
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(_plain_pipes(_rewritten(page, here, into)), encoding="utf-8")
    for name, made in GENERATED.items():
        (into / f"{name}.md").write_text(_plain_pipes(made.text(language)), encoding="utf-8")
    (into / "javascripts").mkdir(exist_ok=True)
    shutil.copy(HERE / "iframe-worker.js", into / "javascripts")
    (into / "stylesheets").mkdir(exist_ok=True)
    shutil.copy(HERE / "extra.css", into / "stylesheets")


def _rewritten(page: Page, here: dict[str, Page], into: Path) -> str:
    """A page with links to the pages of its site, to copied files, and to the repository for all else."""
    of_twins = {path: here[path] for path in here} | {page.path: page for page in here.values()}
    start = os.path.dirname(f"{page.slug}.md")

    def link(found: re.Match[str]) -> str:
        target = found[1]
        if urlsplit(target).scheme or target.startswith("#"):
            return found[0]
        path, fragment = page.resolve(target), target.partition("#")[2]
        if path in of_twins:
            to = f"{of_twins[path].slug}.md"
        elif (ROOT / path).is_file() and re.search(r"\.(png|svg|jpg|ipynb)$", path):
            to = path.removeprefix("docs/").removeprefix("pt/")
            (into / to).parent.mkdir(parents=True, exist_ok=True)
            shutil.copy(ROOT / path, into / to)
        else:
            to = ""
        new = os.path.relpath(to, start or ".") if to else f"{REPOSITORY}/blob/main/{path}"
        same_text = page.path in of_twins and (path not in of_twins or of_twins[path].path == path)
        return f"]({new}{'#' + fragment if fragment and same_text else ''})"

    return LINK.sub(link, page.without_switch())


def _plain_pipes(text: str) -> str:
    r"""Code without the `\|` that GitHub wants in tables; Python-Markdown would show the backslash."""
    return re.sub(r"`[^`\n]*`", lambda code: code[0].replace(r"\|", "|"), text)


def configuration(language: str, sections: list[dict[str, list[dict[str, str]]]]) -> dict[str, object]:
    """The settings of zensical."""
    other = next(name for name in LANGUAGES if name != language)
    return {
        "site_name": "Cartilha",
        "site_description": TEXTS[language]["description"],
        "docs_dir": f"pages/{language}",
        "site_dir": f"site/{language}",
        "use_directory_urls": False,
        "nav": sections,
        "theme": {
            "language": {"en": "en", "pt": "pt-BR"}[language],
            "font": False,
            "features": ["navigation.sections", "navigation.footer", "content.code.copy", "search.highlight"],
            "palette": [{"scheme": "default", "primary": "teal", "accent": "teal"}],
        },
        "extra_css": ["stylesheets/extra.css"],
        "extra": {
            "generator": False,
            "alternate": [
                {"name": TEXTS[language]["name"], "link": "index.html", "lang": language},
                {"name": TEXTS[other]["name"], "link": f"../{other}/index.html", "lang": other},
            ],
        },
        "plugins": {"offline": {}, "search": {}},
        "markdown_extensions": {
            "attr_list": {},
            "footnotes": {},
            "tables": {},
            "toc": {
                "permalink": True,
                "permalink_title": TEXTS[language]["permalink"],
                "slugify": {"kwds": {"case": "lower"}},
            },
            "pymdownx.highlight": {"pygments_lang_class": True},
            "pymdownx.inlinehilite": {},
            "pymdownx.superfences": {},
        },
    }


def build(output: Path) -> list[str]:
    """Both sites below `output`; returns what is wrong with them."""
    for made in ("pages", "site"):
        shutil.rmtree(output / made, ignore_errors=True)
    all_pages = pages()
    for language in LANGUAGES:
        here = site_pages(language, all_pages)
        stage(language, here, output / "pages" / language)
        settings = configuration(language, navigation(language, here))
        file = output / f"{language}.yml"
        file.write_text(yaml.safe_dump(settings, allow_unicode=True, sort_keys=False), encoding="utf-8")
        zensical = [sys.executable, "-m", "zensical", "build", "--strict", "--config-file", str(file)]
        if subprocess.run(zensical, env={**os.environ, "NO_COLOR": "1"}).returncode:
            return [f"zensical could not build the site in {TEXTS[language]['name']}."]
    site = output / "site"
    shutil.copy(HERE / "index.html", site)
    faults = []
    for language in LANGUAGES:
        _join(site, language, all_pages)
        faults += translate_search(site / language, TEXTS[language]["search"])
    return faults + check(site)


def _join(site: Path, language: str, all_pages: list[Page]) -> None:
    """Lead from each page to its twin, and keep the search's helper for pages from the disk among our own files."""
    slugs = {page.slug: {"en": page.slug} for page in all_pages if page.language == "en"}
    by_path = {page.path: page for page in all_pages}
    for page in all_pages:
        if page.twin and page.language == "en":
            slugs[page.slug]["pt"] = by_path[page.twin].slug
    other = next(name for name in LANGUAGES if name != language)
    twins = {names.get(language, names["en"]): names.get(other, names["en"]) for names in slugs.values()}
    for file in (site / language).rglob("*.html"):
        slug = file.relative_to(site / language).with_suffix("").as_posix()
        up = "../" * slug.count("/")
        text = file.read_text(encoding="utf-8")
        text = text.replace(f'"{up or "./"}../{other}/index.html"', f'"{up}../{other}/{twins.get(slug, slug)}.html"')
        text = text.replace(f'"../{other}/index.html"', f'"{up}../{other}/{twins.get(slug, slug)}.html"')
        text = text.replace("https://unpkg.com/iframe-worker/shim", f"{up}javascripts/iframe-worker.js")
        for english, ours in TEXTS[language]["of_pages"].items():
            text = text.replace(english, ours)
        file.write_text(text, encoding="utf-8")


def translate_search(site: Path, words: dict[str, str]) -> list[str]:
    """Replace the English words of zensical's script, which has no setting for them; returns those that are missing."""
    (script,) = site.glob("assets/javascripts/bundle.*.js")
    text = script.read_text(encoding="utf-8")
    missing = [
        f"{script.name} has no {english}: mend `search` in texts.yaml." for english in words if english not in text
    ]
    for english, ours in words.items():
        text = text.replace(english, ours)
    script.write_text(text, encoding="utf-8")
    return missing


def check(site: Path) -> list[str]:
    """Links and anchors that lead nowhere, and resources that are not on the disk."""
    texts = {file: file.read_text(encoding="utf-8") for file in site.rglob("*.html") if file.name != "404.html"}
    anchors = {file: set(re.findall(r'\sid="([^"]+)"', text)) for file, text in texts.items()}
    faults = []
    for file, text in texts.items():
        name = file.relative_to(site).as_posix()
        for tag, target in re.findall(r"<(\w+)\b[^>]*?\s(?:href|src)=\"([^\"]*)\"", text):
            parts = urlsplit(target)
            if parts.scheme or parts.netloc:
                if tag != "a":
                    faults.append(f"{name} takes {target} from the network.")
                continue
            to = (file.parent / unquote(parts.path)).resolve() if parts.path else file
            if not to.exists():
                faults.append(f"{name} links to {target}, which is not there.")
            elif parts.fragment and to in anchors and unquote(parts.fragment) not in anchors[to]:
                faults.append(f"{name} links to {target}, which has no such heading.")
    for style in site.rglob("*.css"):
        if re.search(r"url\([\"']?https?:|@import", style.read_text(encoding="utf-8")):
            faults.append(f"{style.relative_to(site)} takes something from the network.")
    return faults


def main() -> int:
    """Build, and say what is wrong."""
    parser = argparse.ArgumentParser(description=str(__doc__).splitlines()[0])
    parser.add_argument("--output", type=Path, default=ROOT / "build" / "docs")
    output = parser.parse_args().output.resolve()
    if find_spec("zensical") is None:
        parser.error("the extra `docs` is not installed: pip install -e '.[docs]'")
    faults = build(output)
    print(*faults, sep="\n", file=sys.stderr)
    if not faults:
        counts = {name: len(list((output / "site" / name).rglob("*.html"))) for name in LANGUAGES}
        print(
            f"{output / 'site' / 'index.html'}: {json.dumps(counts)} pages; links, anchors and resources are in order."
        )
    return 1 if faults else 0


if __name__ == "__main__":
    sys.exit(main())
