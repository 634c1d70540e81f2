#!/usr/bin/env python3
"""Writes the Unicode tables at the end of qlora.c to stdout.

    python3 test/unicode_tables.py > tables.c

Needs nothing but Python's own `unicodedata`. The tables in the repository were made with Unicode
16, the version of Oniguruma inside `tokenizers` 0.22: use Python 3.14, or an older one with the
package unicodedata2==16.0.0. Case mappings come from Python's str and have its own version. The
normal forms inside `tokenizers` are those of Unicode 9; what is newer is left out of their tables,
because ids must be the same.

A table is a list of numbers. A number is written in base 26, its digits upper-case letters, the
last one a lower-case letter; what can be negative is stored as 2n or -2n-1. No number crosses a
line.
"""
import sys
import unicodedata as python_unicode

try:
    import unicodedata2 as unicode
except ImportError:
    unicode = python_unicode

LIMIT = 0x110000
CATEGORIES = ("Lu Ll Lt Lm Lo Mn Mc Me Nd Nl No Pc Pd Ps Pe Pi Pf Po Sm Sc Sk So Zs Zl Zp "
              "Cc Cf Cs Co Cn").split()

# Marks and decompositions of Unicode 16 that Unicode 9 does not have: ranges of codes.
NEWER_THAN_UNICODE_9 = """
    7FD 897-89F 8CA-8D3 9FE C3C D3B-D3C EBA 1715 1ABF-1ACE 1DF6-1DFA 32FF A7F2-A7F4 A82C AB69
    105C9 105E4 10781-10785 10787-107B0 107B2-107BA 10D24-10D27 10D69-10D6D 10EAB-10EAC 10EFD-10EFF
    10F46-10F50 10F82-10F85 11070 1133B 11383 11385 1138E 11391 113C5 113C7-113C8 113CE-113D0 1145E
    11839-1183A 11938 1193D-1193E 11943 119E0 11A34 11A47 11A99 11D42 11D44-11D45 11D97 11F41-11F42
    16121-16128 1612F 16D68-16D6A 16FF0-16FF1 1CCD6-1CCF9 1E030-1E06D 1E08F 1E130-1E136 1E2AE
    1E2EC-1E2EF 1E4EC-1E4EF 1E5EE-1E5EF 1F16C 1FBF0-1FBF9"""
NEWER = set()
for span in NEWER_THAN_UNICODE_9.split():
    first, _, last = span.partition("-")
    NEWER.update(range(int(first, 16), int(last or first, 16) + 1))


def combining(code):
    return 0 if code in NEWER else unicode.combining(chr(code))


def number(n):
    text = chr(ord("a") + n % 26)
    while n >= 26:
        n //= 26
        text = chr(ord("A") + n % 26) + text
    return text


def signed(n):
    return number(2 * n if n >= 0 else -2 * n - 1)


def category_table():
    """Runs from code 0 on: category, length."""
    start = 0
    for code in range(1, LIMIT + 1):
        before = unicode.category(chr(start))
        if code == LIMIT or unicode.category(chr(code)) != before:
            yield number(CATEGORIES.index(before)) + number(code - start)
            start = code


def combining_table():
    """Runs of one canonical combining class: codes left out before it, length, class."""
    end = start = 0
    while start < LIMIT:
        value = combining(start)
        stop = start + 1
        while stop < LIMIT and combining(stop) == value:
            stop += 1
        if value:
            yield number(start - end) + number(stop - start) + number(value)
            end = stop
        start = stop


def mapping_table(mapping):
    """Runs of characters with one distance to what they map to: codes left out before it, how many
    characters, their stride, the distance."""
    codes, end = sorted(mapping), 0
    while codes:
        start, distance = codes[0], mapping[codes[0]] - codes[0]
        best = []
        for stride in (1, 2):
            run = [start]
            for code in codes[1:]:
                if code != run[-1] + stride or mapping[code] - code != distance:
                    break
                run.append(code)
            if len(run) > len(best):
                best = run
        stride = best[1] - best[0] if len(best) > 1 else 1
        yield number(start - end) + number(len(best)) + number(stride) + signed(distance)
        end = best[-1] + 1
        codes = codes[len(best):]


def lower_mapping():
    pairs = ((code, chr(code).lower()) for code in range(LIMIT))
    return {code: ord(text) for code, text in pairs if len(text) == 1 and ord(text) != code}


def fold_mapping():
    """Characters that the lower case alone does not bring together with their kin: s and long s."""
    lower, kin = lower_mapping(), {}
    for code in range(LIMIT):
        fold = chr(code).casefold()
        if len(fold) == 1:
            kin.setdefault(fold, set()).add(lower.get(code, code))
    extra = {}
    for fold, lowers in kin.items():
        chosen = lower.get(ord(fold), ord(fold))
        extra.update({code: chosen for code in lowers if code != chosen})
    return extra


def decompositions(compatibility):
    for code in range(LIMIT):
        text = "" if code in NEWER else unicode.decomposition(chr(code))
        if text and text.startswith("<") == compatibility:
            yield code, [int(part, 16) for part in text.split() if not part.startswith("<")]


def canonical_table():
    """Codes left out, kind (0 one character, 1 a pair, 2 a pair that is never composed again),
    and the characters, each as its distance to the one in the same place before."""
    end, last = 0, [0, 0]
    for code, parts in decompositions(False):
        composes = unicode.normalize("NFC", chr(code)) == chr(code)
        kind = 0 if len(parts) == 1 else 1 if composes else 2
        text = number(code - end) + number(kind)
        for place, part in enumerate(parts):
            text += signed(part - last[place])
            last[place] = part
        end = code + 1
        yield text


def compatibility_table():
    """Codes left out, count, length, characters: `count` codes in a row map to `length` characters,
    of which the last grows by one from code to code."""
    entries = list(decompositions(True))
    end, last, at = 0, 0, 0
    while at < len(entries):
        code, parts = entries[at]
        count = 1
        while at + count < len(entries) and entries[at + count] == (
                code + count, parts[:-1] + [parts[-1] + count]):
            count += 1
        text = number(code - end) + number(count) + number(len(parts))
        for part in parts:
            text += signed(part - last)
            last = part
        last += count - 1
        end = code + count
        at += count
        yield text


def write_table(name, comment, entries):
    for line in comment:
        print("// " + line)
    print(f"static const char *const {name}[] = {{")
    line = ""
    for entry in list(entries) + [None]:
        if entry is None or len(line) + len(entry) > 92:
            print(f'    "{line}",')
            line = ""
        line += entry or ""
    print("    NULL\n};\n")


def main():
    sys.stdout.reconfigure(encoding="utf-8")
    bar = "// " + "=" * 97
    versions = f"{unicode.unidata_version} (case mappings: {python_unicode.unidata_version})"
    print(f"""{bar}
//  Generated tables: Unicode {versions}
//
//  Written by test/unicode_tables.py; do not edit. A number is in base 26, its digits upper-case
//  letters, the last one a lower-case letter; what can be negative is stored as 2n or -2n-1.
{bar}
""")
    write_table("unicode_categories", [
        "Runs from U+0000 on: general category (in the order of enum Category), length."],
        category_table())
    write_table("unicode_combining", [
        "Canonical combining classes (Unicode 9): codes left out, length of the run, class."],
        combining_table())
    write_table("unicode_lower", [
        "Simple lower case: codes left out, how many characters, their stride, signed distance."],
        mapping_table(lower_mapping()))
    write_table("unicode_folds", [
        "What case folding unites beyond the lower case, written like it."],
        mapping_table(fold_mapping()))
    write_table("unicode_canonical", [
        "Canonical decompositions (Unicode 9): codes left out; 0 for one character, 1 for a pair, 2",
        "for a pair that is never composed again; each character as signed distance to the last one",
        "in its place."],
        canonical_table())
    write_table("unicode_compatibility", [
        "Compatibility decompositions (Unicode 9): codes left out, codes in a row, length and then",
        "characters as signed distances to the last one; the last grows by one from code to code."],
        compatibility_table())
    print("""static const char *const *unicode_table(UnicodeTable which) {
    static const char *const *const tables[] = {
        unicode_categories, unicode_combining, unicode_lower, unicode_folds, unicode_canonical,
        unicode_compatibility};
    return tables[which];
}""")


if __name__ == "__main__":
    main()
