"""Formulas as MathML at build time: a hook of mkdocs, so that no script and no font is fetched."""

import html
import re

from latex2mathml.converter import convert

RAW = re.compile(r'<(span|div) class="arithmatex">\\[(\[](.*?)\\[)\]]</\1>', re.S)


def mathml(tex, display="inline"):
    "One formula. Raises ValueError where a command is not known and would be printed as it is."
    made = convert(tex, display=display)
    if unknown := re.findall(r"\\[a-zA-Z]+", made):
        raise ValueError(f"no MathML for {', '.join(unknown)} in the formula {tex!r}")
    return made


def on_page_content(text, page, config, files):
    "Called by mkdocs with the HTML of every page."

    def formula(found):
        tag, tex = found.groups()
        made = mathml(html.unescape(tex).strip(), "block" if tag == "div" else "inline")
        return f'<{tag} class="formula">{made}</{tag}>'

    return RAW.sub(formula, text)
